"""Where in a recording something is said: spans of energy above the recording's own background.

The built-in detector needs no model: it compares the energy of short frames with the background level it finds in the
recording, so steady noise and hum are background whatever their level. It tells sound from background, not speech from
music. Whoever needs that passes a detector of their own (silero-vad through the extra `vad`). What is done with the
spans afterwards is the same for all detectors, with the options and defaults of faster-whisper.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..base.errors import InputError, MissingExtra

#: A detector: mono samples and their rate to (start, end) spans in samples, in order and apart.
Detector = Callable[[np.ndarray, int], "list[tuple[int, int]]"]

_FRAME_SECONDS, _HOP_SECONDS = 0.03, 0.01
#: The background is what the quietest tenth of the frames does not exceed.
_BACKGROUND_SHARE = 0.1
#: Decibels above the background at which a span starts, and below which it ends.
_START_DB, _STOP_DB = 12.0, 6.0
#: Nothing below this level, in decibels of full scale, is taken for speech.
_QUIETEST_DB = -60.0


@dataclass(frozen=True)
class SpeechOptions:
    """What is done with the detector's spans.

    Attributes:
        min_speech_duration_ms: Shorter spans are dropped.
        min_silence_duration_ms: Spans closer than this are joined.
        speech_pad_ms: Added before and after each span, as far as its neighbours allow.
        max_speech_duration_s: Longer spans are cut, at their quietest place near the limit.
    """

    min_speech_duration_ms: float = 50
    min_silence_duration_ms: float = 2000
    speech_pad_ms: float = 400
    max_speech_duration_s: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: a number of milliseconds of at least 0 is needed.")
        if self.max_speech_duration_s <= 0:
            raise InputError(
                f"max_speech_duration_s={self.max_speech_duration_s}: a number of seconds above 0 is needed."
            )


def speech_spans(
    samples: np.ndarray, sampling_rate: int, options: SpeechOptions | None = None, detector: Detector | None = None
) -> list[tuple[int, int]]:
    """Spans of a recording in which something is said.

    Args:
        samples: (samples,) float32, mono.
        sampling_rate: Hz.
        options: How spans are joined, padded and cut.
        detector: Finds the raw spans; the energy detector when None.

    Returns:
        (start, end) in samples, in order, not overlapping; empty when nothing is said.
    """
    options = options or SpeechOptions()
    raw = (detector or energy_spans)(samples, sampling_rate)
    per_ms = sampling_rate / 1000
    joined: list[tuple[int, int]] = []
    for start, end in raw:
        if joined and start - joined[-1][1] < options.min_silence_duration_ms * per_ms:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    kept = [(start, end) for start, end in joined if end - start >= options.min_speech_duration_ms * per_ms]
    padded = _pad(kept, round(options.speech_pad_ms * per_ms), len(samples))
    if options.max_speech_duration_s == float("inf"):
        return padded
    limit = max(int(options.max_speech_duration_s * sampling_rate), 1)
    return [part for span in padded for part in _cut(samples, span, limit, sampling_rate)]


def energy_spans(samples: np.ndarray, sampling_rate: int) -> list[tuple[int, int]]:
    """Spans (start, end) in samples whose energy stands out from the recording's background."""
    levels, hop = frame_levels(samples, sampling_rate)
    if not len(levels):
        return []
    background = max(float(np.quantile(levels, _BACKGROUND_SHARE)), _QUIETEST_DB - _START_DB)
    begins, holds = levels > background + _START_DB, levels > background + _STOP_DB
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for index in range(len(levels)):
        if start is None and begins[index]:
            start = index
            # The span reaches back over the frames that were already rising.
            while start > 0 and holds[start - 1] and (not spans or start - 1 >= spans[-1][1]):
                start -= 1
        elif start is not None and not holds[index]:
            spans.append((start, index))
            start = None
    if start is not None:
        spans.append((start, len(levels)))
    return [(begin * hop, min(end * hop, len(samples))) for begin, end in spans]


def frame_levels(samples: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, int]:
    """Level of each frame in decibels of full scale, and the samples from one frame to the next."""
    hop, size = max(round(_HOP_SECONDS * sampling_rate), 1), max(round(_FRAME_SECONDS * sampling_rate), 1)
    if len(samples) < hop:
        return np.zeros(0), hop
    squares = np.asarray(samples, dtype=np.float64) ** 2
    sums = np.concatenate(([0.0], np.cumsum(squares)))
    starts = np.arange(0, len(samples) - hop + 1, hop)
    ends = np.minimum(starts + size, len(samples))
    return 10 * np.log10(np.maximum((sums[ends] - sums[starts]) / (ends - starts), 1e-12)), hop


def silero_detector(threshold: float = 0.5) -> Detector:
    """A detector that knows speech from other sounds, by the silero-vad package.

    Raises:
        MissingExtra: The package is not installed.
    """
    try:
        from silero_vad import get_speech_timestamps, load_silero_vad
    except ImportError as error:
        raise MissingExtra("telling speech from other sounds", "silero-vad", "vad") from error
    import torch

    model = load_silero_vad()

    def detect(samples: np.ndarray, sampling_rate: int) -> list[tuple[int, int]]:
        found = get_speech_timestamps(
            torch.from_numpy(np.ascontiguousarray(samples)), model, threshold=threshold, sampling_rate=sampling_rate,
            min_silence_duration_ms=0, speech_pad_ms=0,
        )  # fmt: skip
        return [(int(span["start"]), int(span["end"])) for span in found]

    return detect


class SpeechClock:
    """Times in speech that was joined, back to times in the recording it was taken from.

    Args:
        spans: (start, end) in samples, as they were joined.
        sampling_rate: Hz.
    """

    def __init__(self, spans: list[tuple[int, int]], sampling_rate: int) -> None:
        self._begins = [start / sampling_rate for start, _ in spans]
        self._joined = [0.0]
        for start, end in spans:
            self._joined.append(self._joined[-1] + (end - start) / sampling_rate)

    def original(self, seconds: float, is_end: bool = False) -> float:
        """The time in the recording of a time in the joined speech.

        Args:
            seconds: In the joined speech.
            is_end: At a join, take the end of the span before it, not the start of the one after.
        """
        if not self._begins:
            return seconds
        place = bisect_right(self._joined, seconds) - 1
        if is_end and place > 0 and seconds <= self._joined[place] + 1e-9:
            place -= 1
        place = min(max(place, 0), len(self._begins) - 1)
        return self._begins[place] + min(seconds, self._joined[place + 1]) - self._joined[place]


def join(samples: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """The samples of all spans, one behind the other."""
    return np.concatenate([samples[start:end] for start, end in spans]) if spans else samples[:0]


def _pad(spans: list[tuple[int, int]], pad: int, length: int) -> list[tuple[int, int]]:
    """Spans made longer at both ends; two that would meet share the silence between them."""
    padded = []
    for index, (start, end) in enumerate(spans):
        before = spans[index - 1][1] if index else 0
        after = spans[index + 1][0] if index + 1 < len(spans) else length
        room_before = (start - before) // 2 if index else start
        room_after = (after - end) // 2 if index + 1 < len(spans) else after - end
        padded.append((start - min(pad, room_before), end + min(pad, room_after)))
    return padded


def _cut(samples: np.ndarray, span: tuple[int, int], limit: int, sampling_rate: int) -> list[tuple[int, int]]:
    """Parts of at most `limit` samples, cut where the last quarter before the limit is quietest."""
    start, end = span
    parts = []
    while end - start > limit:
        first = start + limit * 3 // 4
        levels, hop = frame_levels(samples[first : start + limit], sampling_rate)
        cut = first + int(np.argmin(levels)) * hop if len(levels) else start + limit
        cut = max(cut, start + 1)
        parts.append((start, cut))
        start = cut
    parts.append((start, end))
    return parts
