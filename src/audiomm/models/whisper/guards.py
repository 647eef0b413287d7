"""What keeps imagined text out: thresholds on a window's text, loops in it, and words that no voice can have said.

A text that misses a threshold is decoded again at the next temperature. What repeats itself at the last one, too, is
cut where it begins to. Words that are too short, too long or too unlikely, with silence around them, are left out.
Source: arXiv:2212.04356, section 4.5; the rules of OpenAI's `transcribe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import FRAMES_PER_POSITION, FRAMES_PER_SECOND
from .options import Options
from .recordings import WindowText
from .word_times import Window

#: A loop is a run of tokens that stands at least this often in a row ...
LOOP_REPEATS = 5
#: ... and is at least this many tokens long in all.
LOOP_TOKENS = 16

#: What is wrong with the words of a segment is counted over the first few.
SUSPECT_WORDS = 8
#: From this sum on, or where it reaches the number of words, they are taken to be imagined.
SUSPECT_SCORE = 3.0
UNLIKELY_PROBABILITY = 0.15
SHORT_WORD_SECONDS, LONG_WORD_SECONDS = 0.133, 2.0
#: A segment this close to an end of its window counts as next to silence there.
EDGE_SECONDS = 2.0

_MARKS = "\"'“¿([{-\"'.。,，!！?？:：”)]}、"


def needs_fallback(text: WindowText, options: Options) -> bool:
    """Whether a window is to be decoded again at the next temperature."""
    repeats = (
        options.compression_ratio_threshold is not None and text.compression_ratio > options.compression_ratio_threshold
    )
    doubtful = options.logprob_threshold is not None and text.average_logprob < options.logprob_threshold
    loops = options.break_loops and text.has_loop
    return (repeats or doubtful or loops) and not is_silence(text, options)


def is_silence(text: WindowText, options: Options) -> bool:
    """No speech is likely, and the text is not so certain that it must be speech all the same."""
    if options.no_speech_threshold is None or text.no_speech_probability is None:
        return False
    certain = options.logprob_threshold is not None and text.average_logprob > options.logprob_threshold
    return text.no_speech_probability > options.no_speech_threshold and not certain


def better(first: WindowText, second: WindowText, options: Options) -> WindowText:
    """Of two texts neither of which is good enough, the likelier; one that repeats itself counts less.

    Source: faster-whisper's `generate_with_fallback`.
    """

    def rank(text: WindowText) -> tuple[bool, float]:
        limit = options.compression_ratio_threshold
        return limit is None or text.compression_ratio <= limit, text.average_logprob

    return max(first, second, key=rank)


# ---------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Loop:
    """A run of tokens that repeats itself.

    Attributes:
        start: Where the run begins.
        unit: Tokens of what is repeated.
        end: Where the last repetition ends.
    """

    start: int
    unit: int
    end: int


def find_loop(tokens: list[int]) -> Loop | None:
    """The loop that begins first in a text without timestamps, the shortest unit of it; None where there is none."""
    row = np.asarray(tokens)
    best: Loop | None = None
    for unit in range(1, len(row) // LOOP_REPEATS + 1):
        needed = max((LOOP_REPEATS - 1) * unit, LOOP_TOKENS - unit)
        # Position i continues the loop where it equals what stood one unit before.
        same = np.concatenate(([False], row[unit:] == row[:-unit], [False]))
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if end - start >= needed and (best is None or start < best.start):
                best = Loop(int(start), unit, int(end) + unit)
    return best


def without_loop(tokens: Tensor, timestamp_begin: int, window_frames: int) -> Tensor | None:
    """A window's tokens up to the first repetition of the loop in them, which is left out with all that follows.

    Args:
        tokens: (length,) without prompt and end token.
        timestamp_begin: Id of <|0.00|>; larger than any token where there are no timestamps.
        window_frames: Frames of audio in the window.

    Returns:
        The tokens; with timestamps they end in one, so that nothing of the window is heard again. None where there is
        no loop.
    """
    row = tokens.tolist()
    places = [place for place, token in enumerate(row) if token < timestamp_begin]
    loop = find_loop([row[place] for place in places])
    if loop is None:
        return None
    end = places[loop.start + loop.unit - 1] + 1
    kept = row[:end]
    if len(places) < len(row):
        later = [token for token in row[end:] if token >= timestamp_begin]
        kept.append(later[0] if later else timestamp_begin + window_frames // FRAMES_PER_POSITION)
    return torch.tensor(kept, dtype=tokens.dtype, device=tokens.device)


# ---------------------------------------------------------------------- words that nobody said


def is_suspect(words: list[dict[str, Any]]) -> bool:
    """Whether the words of a segment are such as models imagine."""
    spoken = [word for word in words if word["word"].strip() not in _MARKS][:SUSPECT_WORDS]
    score = sum(map(_oddness, spoken))
    return score >= SUSPECT_SCORE or score + 0.01 >= len(spoken)


def _oddness(word: dict[str, Any]) -> float:
    seconds = word["end"] - word["start"]
    unlikely = 1.0 if word["probability"] < UNLIKELY_PROBABILITY else 0.0
    return unlikely + max(0.0, (SHORT_WORD_SECONDS - seconds) * 15) + max(0.0, seconds - LONG_WORD_SECONDS)


def leave_out_imagined(window: Window, end_frame: int, silence_seconds: float) -> None:
    """Take segments that look imagined out of a window, and let the next window start where they did.

    Args:
        window: With the words of its segments.
        end_frame: Where the recording ends.
        silence_seconds: How much silence there must be around them.
    """
    heard = [place for place, segment in enumerate(window.segments) if segment["words"]]
    if not heard:
        return
    first, last = window.segments[heard[0]], window.segments[heard[-1]]
    offset = window.offset_seconds
    # As in the reference the end of a whole window, even where the recording ends before.
    window_end = offset + window.window_frames / FRAMES_PER_SECOND
    if not window.is_whole and (spoken_until := last["words"][-1]["end"]) > offset:
        remains = window_end - spoken_until > silence_seconds
        _go_to(window, spoken_until if remains else window_end)
    gap = float(first["start"]) - offset
    if is_suspect(first["words"]) and gap > silence_seconds:
        # Perhaps the silence before them is what made the model imagine things.
        window.segments = []
        _go_to(window, offset + gap)
        return
    spoken_until = window.speech_end_seconds
    for number, place in enumerate(heard):
        segment = window.segments[place]
        start, end = float(segment["start"]), float(segment["end"])
        following = window.segments[heard[number + 1]]["words"] if number + 1 < len(heard) else None
        if is_suspect(segment["words"]):
            before = start - spoken_until > silence_seconds or start < silence_seconds or start - offset < EDGE_SECONDS
            next_start = following[0]["start"] if following else offset + window.frames_heard / FRAMES_PER_SECOND
            after = (
                next_start - end > silence_seconds
                or (following is not None and is_suspect(following))
                or window_end - end < EDGE_SECONDS
            )
            if before and after:
                is_last = end_frame / FRAMES_PER_SECOND - end < silence_seconds
                window.segments = window.segments[:place]
                _go_to(window, end_frame / FRAMES_PER_SECOND if is_last else max(offset + 1.0, start))
                return
        spoken_until = end


def _go_to(window: Window, seconds: float) -> None:
    """Let the next window start at a time of the recording; it never stays in place."""
    frames = round(seconds * FRAMES_PER_SECOND) - window.first_frame
    window.advance = frames if frames > 0 and math.isfinite(seconds) else window.frames_heard
