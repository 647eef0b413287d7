"""Batches for training a tiny Whisper on digit strings: windows that grow, and what the decoder shall write for them.

With timestamps every digit is a segment of its own, `<|0.36|> three<|0.78|><|1.06|> one<|1.44|>`: the last timestamp
says where to listen next, which a small decoder learns far sooner than counting the words it has written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import digit_strings as ds
import numpy as np
import torch
from digit_checkpoint import (
    EN,
    EOT,
    FIRST_TIME,
    NO_SPEECH,
    NO_TIMES,
    PREV,
    SOT,
    TRANSCRIBE,
    TRANSLATE,
    WORD_TOKEN,
)
from torch import Tensor

IGNORE = -100
ORDERS = 64  # classes of "the how manieth digit is this"
LAST_POSITION = 1500
LONGEST = 448  # tokens of the decoder


class Clock:
    """Progress from 0 to 1 in wall time; a resumed run goes on where it stopped."""

    def __init__(self, minutes: float, done: float) -> None:
        self.minutes, self.done, self.start = minutes, done, time.time()

    def progress(self) -> float:
        return self.done + (1 - self.done) * min((time.time() - self.start) / (self.minutes * 60), 1.0)


def target_rows(
    window: ds.Window, offset: int, times: bool, task: int, prompt: list[int], earlier: list[int]
) -> dict[str, Any]:
    """Decoder inputs and labels of a window, and where in the window each label is heard (encoder positions).

    Args:
        window: the audio and its digits.
        offset: the encoder position of the window's start, as if it were a part of a longer window.
        times: whether to write timestamps.
        task: the token of the task.
        prompt: what was written for earlier windows, from `<|startofprev|>` on.
        earlier: the segments before `offset`; they are read, not learnt.
    """

    def position(seconds: float) -> int:
        return round(seconds * ds.FRAMES_PER_SECOND)

    prefix = [*prompt, SOT, EN, task] + (earlier if times else [NO_TIMES])
    body: list[tuple[int, tuple[int, int] | None]] = []
    for number, (digit, begin, stop) in enumerate(window.digits):
        start, end = position(begin), position(stop)
        if times:
            body.append((FIRST_TIME + min(offset + start, LAST_POSITION), (start - 1, start + 2)))
        body.append((WORD_TOKEN + digit, (start, end)))
        if times and not (window.open_end and number == len(window.digits) - 1):
            body.append((FIRST_TIME + min(offset + end, LAST_POSITION), (end - 2, end + 1)))
    if not window.digits and times and not earlier:
        body = [(FIRST_TIME, None)]
    last = position(window.digits[-1][2]) if window.digits else 0
    body.append((EOT, (last, last + 12) if window.digits else None))
    ids = prefix + [token for token, _ in body]
    labels = [IGNORE] * (len(prefix) - 1) + ids[len(prefix) :]
    labels[len(prompt)] = EN if window.digits or earlier else NO_SPEECH
    return {"ids": ids[:-1], "labels": labels, "first": len(prefix) - 1, "places": [place for _, place in body]}


def made_up_prompt(rng: np.random.Generator, times: bool) -> list[int]:
    """Digits of a window before this one, from `<|startofprev|>` on."""
    count = int(rng.integers(1, 12)) if rng.random() < 0.7 else int(rng.integers(12, 200))
    words = [WORD_TOKEN + int(digit) for digit in rng.integers(0, 10, count)]
    if times:  # earlier segments keep their times in the prompt
        words = [FIRST_TIME + 20, *words, FIRST_TIME + int(rng.integers(30, LAST_POSITION))]
    return [PREV, *words[-220:]]


def made_up_segments(rng: np.random.Generator, offset: int) -> list[int]:
    """Segments that end before an offset: a short window then reads like the end of a long one, at its price."""
    tokens: list[int] = []
    now, widest = int(rng.integers(0, min(offset, 75))), int(rng.integers(4, 60))
    while True:
        end = now + int(rng.integers(12, 40))
        if end > offset:
            return tokens
        tokens += [FIRST_TIME + now, WORD_TOKEN + int(rng.integers(10)), FIRST_TIME + end]
        now = end + int(rng.integers(1, widest))


class Batches:
    """Endless batches whose windows grow with the progress of the training (0 to 1).

    A batch holds `features` (batch, 80, 2 * positions), `positions` (batch, positions), decoder `ids` and `labels`
    (batch, tokens), `places` (batch, tokens, 2: first and last position of what a label says), and for each encoder
    position its digit (`frames`), which one of the window it is (`order`) and the two before it (`past`).
    """

    def __init__(self, voices: dict[str, ds.Voices], mel_filters: np.ndarray, clock: Clock, rank: int) -> None:
        self.voices, self.mel_filters, self.clock, self.rank = voices, mel_filters, clock, rank

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        seed = self.rank + int(time.time())
        maker = ds.WindowMaker(**self.voices, seed=seed)
        features, rng = ds.LogMel(self.mel_filters, seed + 1), np.random.default_rng(seed + 2)
        while True:
            yield self.batch(maker, features, rng)

    def shape(self, rng: np.random.Generator) -> tuple[float, int]:
        """Seconds and number of windows of the next batch."""
        progress, dice = self.clock.progress(), rng.random()
        if progress < 0.12:
            return float(rng.choice([2.0, 3.0])), 12
        whole = 0.0 if progress < 0.5 else 0.5
        if dice < whole:
            return ds.WINDOW_SECONDS, 8
        if dice < whole + 0.2:
            return float(rng.choice([8.0, 12.0, 16.0])), 12
        return float(rng.choice([3.0, 4.0, 5.0, 6.0])), 16

    def batch(self, maker: ds.WindowMaker, features: ds.LogMel, rng: np.random.Generator) -> dict[str, Tensor]:
        seconds, size = self.shape(rng)
        maker.difficulty = features.difficulty = min(0.1 + self.clock.progress() / 0.3, 1.0)
        length = int(seconds * ds.FRAMES_PER_SECOND)
        prompted = rng.random() < 0.15
        windows: list[ds.Window] = []
        rows: list[dict[str, Any]] = []
        offsets: list[int] = []
        for _ in range(size):
            offset = int(rng.integers(0, LAST_POSITION - length + 1)) if rng.random() < 0.6 else 0
            full = seconds > 6 and rng.random() < 0.55
            if not full and seconds < ds.WINDOW_SECONDS and rng.random() < 0.1:
                offset, full = LAST_POSITION - length, True
            speech = seconds
            if seconds == ds.WINDOW_SECONDS and not full and rng.random() < 0.8:
                speech = float(rng.uniform(1, 12))
            window = maker.draw(speech, dense=full, cut=full and rng.random() < 0.7)
            window.wave = np.pad(window.wave, (0, int(seconds * ds.RATE) - len(window.wave)))
            times = rng.random() < (0.7 if len(window.digits) < 12 else 0.95)  # long strings cannot be counted
            task = TRANSLATE if rng.random() < 0.1 else TRANSCRIBE
            prompt = made_up_prompt(rng, times) if prompted and rng.random() < 0.7 else []
            earlier = made_up_segments(rng, offset) if offset and not prompt and rng.random() < 0.4 else []
            row = target_rows(window, offset, times, task, prompt, earlier)
            if len(row["ids"]) > LONGEST:
                row = target_rows(window, offset, times, task, [], [])
            windows.append(window)
            rows.append(row)
            offsets.append(offset)
        return collate(features(windows), windows, rows, offsets, length)


def collate(
    features: Tensor,
    windows: Sequence[Any],
    rows: list[dict[str, Any]],
    offsets: list[int],
    length: int,
    end: int = EOT,
    silence: int = ds.SILENCE,
) -> dict[str, Tensor]:
    """Tensors of one batch; rows are filled up with `end` tokens that are not learnt, frames with `silence`."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), width), end)
    labels = torch.full((len(rows), width), IGNORE)
    places = torch.zeros(len(rows), width, 2, dtype=torch.long)
    frames = torch.full((len(rows), length), silence)
    order = torch.full((len(rows), length), IGNORE)
    past = torch.full((len(rows), length, 2), IGNORE)
    for index, (row, window) in enumerate(zip(rows, windows, strict=True)):
        ids[index, : len(row["ids"])] = torch.tensor(row["ids"])
        labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        for step, place in enumerate(row["places"]):
            if place is not None and max(place[0], 0) < length:
                begin = max(place[0], 0)
                places[index, row["first"] + step] = torch.tensor([begin, min(max(place[1], begin + 1), length)])
        for number, (word, start, stop) in enumerate(window.digits):
            first = round(start * ds.FRAMES_PER_SECOND)
            span = slice(first, max(round(stop * ds.FRAMES_PER_SECOND), first + 1))
            frames[index, span] = word
            order[index, span] = min(number, ORDERS - 1)
            before = [silence, silence, *(item[0] for item in window.digits[:number])]
            past[index, span] = torch.tensor(before[-2:])
    past[0, 0] = past[0, 0].clamp(min=0)
    order[0, 0] = order[0, 0].clamp(min=0)  # never nothing to learn
    positions = torch.tensor(offsets)[:, None] + torch.arange(length)
    batch = {"features": features, "positions": positions, "ids": ids, "labels": labels}
    return batch | {"places": places, "frames": frames, "order": order, "past": past}
