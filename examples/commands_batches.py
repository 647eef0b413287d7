"""Batches for the commands model: windows of joined words and running phrases, and what the decoder shall write.

As in `digit_batches` every word is a segment of its own, `<|0.36|> half<|0.60|><|0.60|> past<|0.88|>`; what is new is
the language, translation, and phrases in which no pause parts the words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import commands_words as cw
import digit_strings as ds
import numpy as np
from commands_checkpoint import (
    EN,
    EOT,
    ES,
    FIRST_TIME,
    NO_SPEECH,
    NO_TIMES,
    PREV,
    SOT,
    TRANSCRIBE,
    TRANSLATE,
    WORD_TOKEN,
)
from commands_voices import Clip, Voice, Voices
from digit_batches import IGNORE, LAST_POSITION, LONGEST, Clock, collate
from torch import Tensor

SILENCE = len(cw.WORDS)  # the class of a frame without a word
NOISE_SHARE, OTHERS_SHARE = 0.09, 0.015
MOST_WORDS = 140  # three tokens each, and the marks at the front


@dataclass
class Window(ds.Window):
    """A window whose `digits` are (number of the word, start, end) in seconds."""

    is_spanish: bool = False


@dataclass
class Teachers:
    """The voices of a training: recorded digits, synthetic English, synthetic Spanish."""

    real: Voices
    english: Voices
    spanish: Voices
    others: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.others = [wave for voice in self.english.values() for wave in voice.others]
        self.lists = [list(group.values()) for group in (self.real, self.english, self.spanish)]


class WindowMaker(ds.WindowMaker):
    """Draws windows of words and phrases, silence, noise and other words."""

    def __init__(self, teachers: Teachers, seed: int) -> None:
        super().__init__({}, {}, {}, seed)
        self.teachers, self.chance = teachers, random.Random(seed)
        self.recorded_share, self.spanish_share = 0.36, 0.1  # of the windows with words

    def draw(self, seconds: float, dense: bool, cut: bool) -> Window:
        """One window. `dense` fills it with speech; `cut` lets speech run over its end."""
        rng, samples = self.rng, int(seconds * ds.RATE)
        window = Window(np.zeros(samples, np.float32))
        kind = rng.random()
        if kind < NOISE_SHARE:
            window.content = seconds if dense else rng.uniform(0.5, seconds)
            length = int(window.content * ds.RATE)
            window.is_spanish = bool(rng.random() < 0.2)  # nothing is written in either language
            if rng.random() < 0.85:
                beat = self._pulses(length) if rng.random() < 0.4 else np.float32(1.0)
                window.wave[:length] = self.noise_like(length) * beat * 10 ** rng.uniform(-5, -0.7)
            return window
        if kind < NOISE_SHARE + OTHERS_SHARE and self.teachers.others:
            self._other_words(window)
        else:
            self._speech(window, seconds, dense, cut)
        self._pollute(window)
        return window

    def _pulses(self, samples: int) -> np.ndarray:
        """A loudness that comes and goes like that of syllables: by the clock, or by chance."""
        rng, time = self.rng, np.arange(samples, dtype=np.float32) / ds.RATE
        if rng.random() < 0.5:
            wave = np.sin(2 * np.pi * (rng.uniform(0.5, 9) * time + rng.random()))
            return np.clip(wave * rng.uniform(0.5, 4) + rng.uniform(-0.5, 0.7), rng.choice([0.0, 0.05]), 1)
        knots = max(int(samples / ds.RATE * rng.uniform(2, 12)), 2)
        return np.interp(time, np.linspace(0, samples / ds.RATE, knots), rng.random(knots) ** 3).astype(np.float32)

    def _other_words(self, window: Window) -> None:
        at, samples = int(self.rng.uniform(0, 0.5) * ds.RATE), len(window.wave)
        while at < samples and self.rng.random() < 0.9:
            word = self.teachers.others[int(self.rng.integers(len(self.teachers.others)))]
            window.wave[at : at + len(word)] += word[: samples - at].astype(np.float32) / 32768
            at += len(word) + int(self.rng.uniform(0.02, 0.6) * ds.RATE)
        window.content = min(at, samples) / ds.RATE

    def _speech(self, window: Window, seconds: float, dense: bool, cut: bool) -> None:
        rng, dice = self.rng, self.rng.random()
        group = 2 if dice < self.spanish_share else 0 if dice < self.spanish_share + self.recorded_share else 1
        if not self.teachers.lists[group]:
            group = 1
        window.is_spanish = group == 2
        count = MOST_WORDS if dense or cut else int(rng.integers(1, max(int(seconds * 2.4), 3)))
        for clip, start, gain in self._stream(seconds, count, dense or cut, group):
            wave, at = clip.wave * gain, int(start * ds.RATE)
            marks = clip.marks
            if start + len(wave) / ds.RATE > seconds and not cut:  # as many whole words as fit
                marks = [mark for mark in marks if start + mark[2] <= seconds]
                wave = wave[: int(marks[-1][2] * ds.RATE)] if marks else wave[:0]
                count = 0
            piece = wave[: len(window.wave) - at]
            window.wave[at : at + len(piece)] += piece
            for number, begin, end in marks:
                if start + end <= seconds:
                    window.digits.append((number, start + begin, start + end))
                    continue
                window.open_end = True
                if seconds - start - begin > 0.75 * (end - begin):
                    window.digits.append((number, start + begin, seconds))
                break
            if window.open_end or not count or len(window.digits) >= MOST_WORDS:
                break
        last = window.digits[-1][2] if window.digits else 0.2
        after = float(rng.choice([0.0, 0.1, rng.uniform(0, 2)]))
        full = (cut or dense) and len(window.digits) < MOST_WORDS - 8
        window.content = seconds if full else min(last + after, seconds)

    def _voice(self, group: int = 1) -> Voice:
        voices = self.teachers.lists[group]
        return voices[int(self.rng.integers(len(voices)))]

    def _stream(
        self, limit: float, count: int, dense: bool, group: int = 1
    ) -> Iterator[tuple[Clip, float, np.float32]]:
        """(clip, start in seconds, gain) of about `count` words, from one voice or several, within `limit` seconds."""
        rng = self.rng
        mixed, pauses = rng.random() < 0.15, rng.choice([0.0, 0.1, 0.25])
        low, high = [(0.02, 0.12), (0.03, 0.3), (0.1, 0.4), (-0.02, 0.05), (0.02, 0.42)][int(rng.integers(5))]
        now = float(rng.choice([0.0, rng.uniform(0, 0.3), rng.uniform(0, 1.5)]))
        if not dense and rng.random() < 0.1:
            now = float(rng.uniform(0, max(limit - 2, 0.1)))
        voice, level, said = self._voice(group), rng.uniform(0, 4), 0
        while said < count:
            if mixed and rng.random() < 0.5:
                voice = self._voice(group if group == 2 else int(rng.integers(2)) if self.teachers.real else 1)
            gain = rng.uniform(-level, level)
            for clip in map(self._gated, self._unit(voice, group == 2)):
                if now >= limit or said >= count:
                    return
                wave = clip.wave
                loudness = 10 ** ((gain + rng.uniform(-1, 1)) / 20) / (np.sqrt((wave**2).mean()) + 1e-4) * 0.1
                yield clip, now, np.float32(loudness)
                said += len(clip.marks)
                now += len(clip.samples) / ds.RATE + rng.uniform(low, high)
            if rng.random() < pauses:
                now += rng.uniform(0.62, 3.0 if rng.random() < 0.8 else 5.0)

    def _gated(self, clip: Clip) -> Clip:
        """Weak beginnings and ends cut away as by a gate: of "six" the vowel may be all that is left."""
        number = clip.marks[0][0]
        is_digit = number < len(cw.DIGITS)
        if len(clip.marks) > 1 or self.rng.random() > (0.3 if is_digit else 0.12):
            return clip
        samples = ds.trim(clip.wave, float(self.rng.uniform(10 if is_digit else 20, 32)))
        if len(samples) < 0.4 * len(clip.samples) or len(samples) < 0.1 * ds.RATE:
            return clip
        return Clip((samples * 32768).astype(np.int16), [(number, 0.0, len(samples) / ds.RATE)])

    def _unit(self, voice: Voice, is_spanish: bool) -> list[Clip]:
        """What a voice says next: a phrase in one breath, a phrase word by word, or some words without a sense."""
        dice, choice = self.rng.random(), self.chance.choice
        if len(voice.words) <= len(cw.DIGITS):
            if voice.phrases and dice < 0.5:
                return [choice(voice.phrases)]
            return [choice(choice(list(voice.words.values())))]
        if voice.phrases and dice < 0.5:
            return [choice(voice.phrases)]
        if dice < 0.65:
            numbers = [cw.NUMBER_OF[word] for word in cw.english(self.chance)]
            if all(number in voice.words for number in numbers):
                return [choice(voice.words[number]) for number in numbers]
        numbers = self.chance.choices(list(voice.words), k=4)
        return [choice(voice.words[number]) for number in numbers if cw.WORDS[number] not in cw.ONLY_IN_PHRASES]


def target_rows(
    window: Window, offset: int, times: bool, tokens: list[int], prompt: list[int], earlier: list[int]
) -> dict[str, Any]:
    """Decoder inputs and labels of a window, and where in the window each label is heard (encoder positions).

    Args:
        window: the audio and its words.
        offset: the encoder position of the window's start, as if it were a part of a longer window.
        times: whether to write timestamps.
        tokens: the language and, unless it is left out, the task.
        prompt: what was written for earlier windows, from `<|startofprev|>` on.
        earlier: the segments before `offset`; they are read, not learnt.
    """

    def position(seconds: float) -> int:
        return round(seconds * ds.FRAMES_PER_SECOND)

    prefix = [*prompt, SOT, *tokens] + (earlier if times else [NO_TIMES])
    translated = -cw.SPANISH_NUMBERS[0] if window.is_spanish and TRANSLATE in tokens else 0  # digits come first
    body: list[tuple[int, tuple[int, int] | None]] = []
    for index, (number, begin, stop) in enumerate(window.digits):
        start, end = position(begin), position(stop)
        if times:
            body.append((FIRST_TIME + min(offset + start, LAST_POSITION), (start - 1, start + 2)))
        body.append((WORD_TOKEN + number + translated, (start, end)))
        if times and not (window.open_end and index == len(window.digits) - 1):
            body.append((FIRST_TIME + min(offset + end, LAST_POSITION), (end - 2, end + 1)))
    if not window.digits and times and not earlier:
        body = [(FIRST_TIME, None)]
    last = position(window.digits[-1][2]) if window.digits else 0
    body.append((EOT, (last, last + 12) if window.digits else None))
    ids = prefix + [token for token, _ in body]
    labels = [IGNORE] * (len(prefix) - 1) + ids[len(prefix) :]
    labels[len(prompt)] = tokens[0] if window.digits else IGNORE if earlier else NO_SPEECH
    return {"ids": ids[:-1], "labels": labels, "first": len(prefix) - 1, "places": [place for _, place in body]}


def made_up_prompt(rng: np.random.Generator, times: bool) -> list[int]:
    """Words of a window before this one, from `<|startofprev|>` on."""
    count = int(rng.integers(1, 12)) if rng.random() < 0.7 else int(rng.integers(12, 200))
    words = [WORD_TOKEN + int(number) for number in rng.integers(0, len(cw.WORDS), count)]
    if times:  # earlier segments keep their times in the prompt
        words = [FIRST_TIME + 20, *words, FIRST_TIME + int(rng.integers(30, LAST_POSITION))]
    return [PREV, *words[-220:]]


def made_up_segments(rng: np.random.Generator, offset: int) -> list[int]:
    """Segments that end before an offset: a short window then reads like the end of a long one, at its price."""
    tokens: list[int] = []
    now, widest = int(rng.integers(0, min(offset, 75))), int(rng.integers(4, 60))
    while True:
        end = now + int(rng.integers(8, 40))
        if end > offset:
            return tokens
        tokens += [FIRST_TIME + now, WORD_TOKEN + int(rng.integers(len(cw.WORDS))), FIRST_TIME + end]
        now = end + int(rng.integers(0, widest))


class Batches:
    """Endless batches whose windows grow with the progress of the training (0 to 1).

    A batch holds `features` (batch, 80, 2 * positions), `positions` (batch, positions), decoder `ids` and `labels`
    (batch, tokens), `places` (batch, tokens, 2: first and last position of what a label says), and for each encoder
    position its word (`frames`), which one of the window it is (`order`) and the two before it (`past`). In the first
    half many short batches hold nothing for the decoder: hearing many words takes longest to learn.

    Args:
        teachers: Voices.
        mel_filters: Of the feature extractor.
        clock: Tells the progress.
        seed: Of everything drawn.
        is_new: The model starts from random weights: begin with very short windows.
    """

    def __init__(self, teachers: Teachers, mel_filters: np.ndarray, clock: Clock, seed: int, is_new: bool) -> None:
        self.maker, self.features = WindowMaker(teachers, seed), ds.LogMel(mel_filters, seed + 1)
        self.rng, self.clock, self.is_new = np.random.default_rng(seed + 2), clock, is_new

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch()

    def shape(self) -> tuple[float, int]:
        """Seconds and number of windows of the next batch."""
        progress, dice, rng = self.clock.progress(), self.rng.random(), self.rng
        if self.is_new and progress < 0.12:
            return float(rng.choice([2.0, 3.0])), 12
        whole = 0.07 if progress > 0.5 else 0.0 if self.is_new else 0.03  # they take ten times as long as short ones
        if dice < whole:
            return ds.WINDOW_SECONDS, 8
        if dice < whole + (0.2 if progress > 0.4 else 0.1):
            return float(rng.choice([8.0, 12.0, 16.0])), 12
        return float(rng.choice([3.0, 4.0, 5.0, 6.0])), 16

    def batch(self) -> dict[str, Tensor]:
        rng = self.rng
        seconds, size = self.shape()
        progress = self.clock.progress()
        self.maker.difficulty = self.features.difficulty = min(0.15 + progress / 1.2, 0.65)
        is_early = progress < 0.4  # first all the other words
        self.maker.recorded_share, self.maker.spanish_share = (0.2, 0.05) if is_early else (0.36, 0.1)
        length = int(seconds * ds.FRAMES_PER_SECOND)
        prompted = rng.random() < 0.15
        windows: list[Window] = []
        rows: list[dict[str, Any]] = []
        offsets: list[int] = []
        for _ in range(size):
            offset = int(rng.integers(0, LAST_POSITION - length + 1)) if rng.random() < 0.6 else 0
            full = rng.random() < 0.55
            cut = full and seconds > 6 and rng.random() < 0.7
            if not full and seconds < ds.WINDOW_SECONDS and rng.random() < 0.1:
                offset, full, cut = LAST_POSITION - length, True, True
            speech = seconds
            if seconds == ds.WINDOW_SECONDS and not full and rng.random() < 0.8:
                speech = float(rng.uniform(1, 12))
            window = self.maker.draw(speech, dense=full, cut=cut)
            window.wave = np.pad(window.wave, (0, int(seconds * ds.RATE) - len(window.wave)))
            rows.append(self._row(window, offset, prompted))
            windows.append(window)
            offsets.append(offset)
        batch = collate(self.features(windows), windows, rows, offsets, length, EOT, SILENCE)
        if seconds <= 6 and progress < 0.45 and rng.random() < 0.7:
            return {name: batch[name] for name in ("features", "positions", "frames", "order", "past")}
        return batch

    def _row(self, window: Window, offset: int, prompted: bool) -> dict[str, Any]:
        rng = self.rng
        times = rng.random() < (0.75 if len(window.digits) < 12 else 0.95)  # long strings cannot be counted
        dice, likely = rng.random(), 0.45 if window.is_spanish else 0.1
        task = [TRANSLATE] if dice < likely else [] if dice > 0.92 else [TRANSCRIBE]  # sometimes left out
        tokens = [ES if window.is_spanish else EN, *task]
        prompt = made_up_prompt(rng, times) if prompted and rng.random() < 0.7 else []
        earlier = made_up_segments(rng, offset) if offset and not prompt and rng.random() < 0.4 else []
        row = target_rows(window, offset, times, tokens, prompt, earlier)
        return row if len(row["ids"]) <= LONGEST else target_rows(window, offset, times, tokens, [], [])
