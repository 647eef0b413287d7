"""Where in a recording something is said: spans of energy above the recording's own background.

The built-in detector needs no model: it compares the energy of short frames with the background level it finds in the
recording, so steady noise and hum are background whatever their level. It tells sound from background, not speech from
music. Whoever needs that passes a detector of their own (silero-vad through the extra `vad`). What is done with the
spans afterwards is the same for all detectors, with the options and defaults of faster-whisper.
"""

from __future__ import annotations

import itertools
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from ..base.errors import InputError, MissingExtra

#: A detector: mono samples and their rate to (start, end) spans in samples, in order and apart.
Detector = Callable[[np.ndarray, int], "list[tuple[int, int]]"]

_FRAME_SECONDS, _HOP_SECONDS = 0.03, 0.01
#: Frames whose energy is summed up at a time, so that an hour needs no more memory than a minute.
_BLOCK_FRAMES = 1 << 14
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
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise InputError(f"{name}={value!r}: a number of milliseconds of at least 0 is needed.")
        if not _is_number(self.max_speech_duration_s) or not self.max_speech_duration_s > 0:
            raise InputError(
                f"max_speech_duration_s={self.max_speech_duration_s!r}: a number of seconds above 0 is needed."
            )


@dataclass(frozen=True)
class SpeechFinder:
    """A detector and what is done with its spans, ready to be used on many recordings.

    Attributes:
        options: How spans are joined, padded and cut.
        detector: Finds the raw spans.
    """

    options: SpeechOptions = field(default_factory=SpeechOptions)
    detector: Detector | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any] | None) -> SpeechFinder:
        """The finder that a dict describes.

        Args:
            parameters: The fields of `SpeechOptions`; "detector", "energy" (the default) or "silero"; and "threshold",
                the probability from which silero takes sound for speech, 0.5 unless given.

        Raises:
            InputError: A name is unknown or a value cannot be.
            MissingExtra: The detector is "silero" and its package is not installed.
        """
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InputError(f"vad_parameters is a {type(parameters).__name__}; a dict is needed.")
        given = dict(parameters or {})
        names = [one.name for one in fields(SpeechOptions)]
        unknown = [name for name in given if name not in (*names, "detector", "threshold")]
        if unknown:
            raise InputError(
                f"vad_parameters has no {unknown[0]!r}; it takes {', '.join(names)}, detector and threshold."
            )
        name, threshold = given.pop("detector", "energy"), given.pop("threshold", None)
        if name not in ("energy", "silero"):
            raise InputError(f"vad_parameters: detector={name!r}: expected 'energy' or 'silero'.")
        if threshold is not None and name != "silero":
            raise InputError(
                f"vad_parameters: threshold={threshold!r} is for detector='silero'; the energy detector has none."
            )
        if threshold is not None and (not _is_number(threshold) or not 0 < threshold < 1):
            raise InputError(f"vad_parameters: threshold={threshold!r}: a number between 0 and 1 is needed.")
        options = SpeechOptions(**given)
        return cls(options, None if name == "energy" else silero_detector(0.5 if threshold is None else threshold))

    def __call__(self, samples: np.ndarray, sampling_rate: int) -> list[tuple[int, int]]:
        """Spans (start, end) in samples in which something is said; see `speech_spans`."""
        return speech_spans(samples, sampling_rate, self.options, self.detector)


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
    frames = len(samples) // hop
    blocks = [
        _power(samples[first * hop :], min(_BLOCK_FRAMES, frames - first), hop, size)
        for first in range(0, frames, _BLOCK_FRAMES)
    ]
    return 10 * np.log10(np.maximum(np.concatenate(blocks), 1e-12)), hop


def _power(samples: np.ndarray, frames: int, hop: int, size: int) -> np.ndarray:
    """Mean square of each of the first frames."""
    needed = np.asarray(samples[: (frames - 1) * hop + size], dtype=np.float64)
    sums = np.concatenate(([0.0], np.cumsum(needed**2)))
    starts = np.arange(frames) * hop
    ends = np.minimum(starts + size, len(needed))
    return (sums[ends] - sums[starts]) / (ends - starts)


def silero_detector(threshold: float = 0.5) -> Detector:
    """A detector that knows speech from other sounds, by the silero-vad package.

    Raises:
        MissingExtra: The package is not installed.
    """
    try:
        from silero_vad import get_speech_timestamps
    except ImportError as error:
        raise MissingExtra("telling speech from other sounds", "silero-vad", "vad") from error
    import torch

    model = _silero_model()

    def detect(samples: np.ndarray, sampling_rate: int) -> list[tuple[int, int]]:
        found = get_speech_timestamps(
            torch.from_numpy(np.ascontiguousarray(samples)), model, threshold=threshold, sampling_rate=sampling_rate,
            min_silence_duration_ms=0, speech_pad_ms=0,
        )  # fmt: skip
        return [(int(span["start"]), int(span["end"])) for span in found]

    return detect


@lru_cache(maxsize=1)
def _silero_model() -> Any:
    """The detector's network, loaded once for all calls."""
    from silero_vad import load_silero_vad

    with warnings.catch_warnings():
        # Its file is TorchScript, whose loader torch calls deprecated; no user can change that.
        warnings.simplefilter("ignore", DeprecationWarning)
        return load_silero_vad()


class SpeechClock:
    """Times in speech that was joined, back to times in the recording it was taken from.

    Args:
        spans: (start, end) in samples, as they were joined.
        sampling_rate: Hz.
        slack_seconds: How far the silence around speech reaches into the spans: what begins no longer than this before
            a join begins behind it, and what ends no longer than this after one ends before it.
    """

    def __init__(self, spans: list[tuple[int, int]], sampling_rate: int, slack_seconds: float = 0.0) -> None:
        # Spans between which nothing was cut out join as they did in the recording: no time there is in doubt.
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
        self._slack = [slack_seconds if gap > 1 else 0.0 for gap in gaps]
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
        return self._at(seconds, self._place(seconds, is_end)) if self._begins else seconds

    def stretch(self, start: float, end: float) -> tuple[float, float]:
        """Start and end in the recording of a stretch of joined speech, which may reach over joins.

        Where it reaches over a join by no more than the slack, and that is its smaller part, this part is silence that
        was kept around the speech: it is left out, so that the stretch does not grow by all that was cut out there.
        """
        if not self._begins:
            return start, end
        first, last = self._reach(start, end)
        return self._at(start, first), self._at(end, last)

    def word(self, start: float, end: float, within: tuple[float, float] | None = None) -> tuple[float, float]:
        """Start and end in the recording of a word, which lies wholly in the span that its middle is in.

        Args:
            start: In the joined speech.
            end: In the joined speech.
            within: Where what the word belongs to starts and ends in the joined speech: the span is one of those.
        """
        if not self._begins:
            return start, end
        place = self._place((start + end) / 2)
        if within is not None:
            first, last = self._reach(*within)
            place = min(max(place, first), last)
        return self._at(start, place), self._at(end, place)

    def _reach(self, start: float, end: float) -> tuple[int, int]:
        """The numbers of the first and the last span of a stretch of joined speech."""
        first, last = self._place(start), self._place(end, is_end=True)
        while first < last:
            before = self._joined[first + 1] - start
            if before > min(self._slack[first], end - start - before):
                break
            first, start = first + 1, self._joined[first + 1]
        while first < last and end - self._joined[last] <= self._slack[last - 1]:
            end = self._joined[last]
            last -= 1
        return first, max(last, first)

    def _place(self, seconds: float, is_end: bool = False) -> int:
        """The number of the span that a time in the joined speech is in."""
        place = bisect_right(self._joined, seconds) - 1
        if is_end and place > 0 and seconds <= self._joined[place] + 1e-9:
            place -= 1
        return min(max(place, 0), len(self._begins) - 1)

    def _at(self, seconds: float, place: int) -> float:
        """The time in the recording of a time in the joined speech, in the span of that number at any rate."""
        inside = min(max(seconds, self._joined[place]), self._joined[place + 1])
        return self._begins[place] + inside - self._joined[place]


def join(samples: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """The samples of all spans, one behind the other."""
    return np.concatenate([samples[start:end] for start, end in spans]) if spans else samples[:0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
