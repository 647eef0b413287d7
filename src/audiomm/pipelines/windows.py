"""Where one long recording is cut into windows that are heard side by side, independently of each other.

A cut lies in a pause, found by the energy of what is around it. Only where a whole window has no pause is speech cut:
then the two windows share some seconds, and what both heard there is merged. Together the windows hear every sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..media.speech import energy_spans, frame_levels
from .clips import Clip, Piece

#: Shorter gaps between sounds may lie inside a word, like the closure before a "t".
MIN_PAUSE_SECONDS = 0.15
#: Of the pauses that are at least this long, the latest is taken.
CLEAR_PAUSE_SECONDS = 0.5
#: Below this level, in decibels of full scale, nothing can be heard.
_SILENT_DB = -60.0
#: What windows share with each other on each side of a cut in speech, as part of a window.
_SHARED = 1 / 6


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, in samples.

    Attributes:
        start: Its first sample.
        end: Behind its last sample.
        left: Samples at its start that the window before it heard, too.
        right: Samples at its end that the next window hears, too.
    """

    start: int
    end: int
    left: int = 0
    right: int = 0


def plan_windows(samples: np.ndarray, sampling_rate: int, length: int) -> list[Window]:
    """Windows of at most `length` samples that cover a recording.

    Args:
        samples: (samples,) float32, mono.
        sampling_rate: Hz.
        length: Samples in a window at most.
    """
    windows: list[Window] = []
    start = left = 0
    while len(samples) - start > length:
        cut = _pause(samples[start : start + length], sampling_rate, left + sampling_rate)
        if cut is not None:
            windows.append(Window(start, start + cut, left))
            start, left = start + cut, 0
        else:
            shared = round(length * _SHARED)
            windows.append(Window(start, start + length, left, shared))
            start, left = start + length - 2 * shared, shared
    return [*windows, Window(start, len(samples), left)]


def cut_at_pauses(clip: Clip, sampling_rate: int, length: int) -> Iterator[Piece]:
    """The clip in the windows of `plan_windows`; those that share samples belong to one part of it."""
    windows = plan_windows(clip.samples, sampling_rate, length)
    last = 0
    for place, window in enumerate(windows):
        if not window.left:
            last = next(later for later in range(place, len(windows)) if not windows[later].right)
            first = window.start
        size = window.end - window.start
        yield Piece(
            clip,
            clip.samples[window.start : window.end],
            stride=(size, window.left, window.right) if window.left or window.right else None,
            is_last=place == len(windows) - 1,
            part=(first, windows[last].end),
        )


def _pause(samples: np.ndarray, sampling_rate: int, earliest: int) -> int | None:
    """The middle of the best pause of a window that is followed by more, or None where it has none.

    The latest clear pause of the window's second half is best, then the longest pause there, then the latest one
    before that.
    """
    spans = energy_spans(samples, sampling_rate)
    if not spans:
        # Where something sounds but nothing stands out, speech may hide in steady noise.
        return None if _is_audible(samples, sampling_rate) else len(samples)
    edges = [0, *(edge for span in spans for edge in span), len(samples)]
    gaps = [(max(begin, earliest), end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    pauses = [(begin, end) for begin, end in gaps if end - begin >= MIN_PAUSE_SECONDS * sampling_rate]
    middles = [((begin + end) // 2, end - begin) for begin, end in pauses]
    late = [(middle, size) for middle, size in middles if middle >= len(samples) // 2]
    clear = [middle for middle, size in late if size >= CLEAR_PAUSE_SECONDS * sampling_rate]
    if clear:
        return clear[-1]
    if late:
        return max(late, key=lambda pause: (pause[1], pause[0]))[0]
    return middles[-1][0] if middles else None


def _is_audible(samples: np.ndarray, sampling_rate: int) -> bool:
    levels, _ = frame_levels(samples, sampling_rate)
    return bool(len(levels)) and float(levels.max()) > _SILENT_DB
