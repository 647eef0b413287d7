"""Inputs of the speech pipelines as clips: mono samples at the model's rate, whole, in parts or in overlapping windows.

An input may be a path, a URL, bytes, an open file, samples, or a dict in the form of transformers and datasets:
{"raw" or "array", "sampling_rate"[, "stride"]}. Dicts are read and never changed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..base.errors import EmptyAudioError, InputError
from ..media.audio import load_audio
from ..media.speech import SpeechClock, join

#: Keywords of `load_audio` that pipelines pass on.
LOAD_OPTIONS = ("channel", "layout", "max_seconds", "on_truncated", "allow_urls", "allowed_hosts")

T = TypeVar("T")

_SOURCE_KEYS = ("raw", "array", "bytes", "path", "sampling_rate")


@dataclass(frozen=True)
class Clip:
    """One input, read.

    Attributes:
        name: What messages call it.
        number: Its place among the inputs, from 0.
        samples: (samples,) float32, mono, at the model's rate: what is to be heard of the recording.
        stride: Samples at the left and right that belong to its neighbours, where the caller cut the audio.
        extra: Keys of the input that go to the result.
        clock: Goes from times in `samples` to times in the recording, where only parts of it are to be heard.
        recording_samples: Samples of the whole recording, where only parts of it are to be heard.
    """

    name: str
    number: int
    samples: np.ndarray
    stride: tuple[int, int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    clock: SpeechClock | None = None
    recording_samples: int | None = None

    def only(self, spans: list[tuple[int, int]], sampling_rate: int, slack_seconds: float = 0.0) -> Clip:
        """The clip with these spans of its samples joined, and the rest left out.

        Args:
            spans: (start, end) in samples.
            sampling_rate: Hz.
            slack_seconds: Silence that the spans hold around what is said in them; see `SpeechClock`.

        Raises:
            InputError: The clip has a stride, whose samples would be anywhere afterwards.
        """
        if self.stride is not None:
            raise InputError(
                f"{self.name}: its stride cannot be kept when parts of it are cut out; leave out 'stride', or "
                "vad_filter and clip_timestamps."
            )
        return replace(
            self,
            samples=join(self.samples, spans),
            clock=SpeechClock(spans, sampling_rate, slack_seconds),
            recording_samples=len(self.samples),
        )


@dataclass(frozen=True)
class Piece:
    """What goes through the model at once: a whole clip, or one window of it.

    Attributes:
        clip: Where it comes from.
        samples: (samples,) float32.
        stride: (length, left, right) in samples when the piece overlaps its neighbours.
        is_last: The clip ends with this piece.
        part: First sample and the one behind the last of the part of the clip to which the piece belongs, where parts
            are heard apart from each other; None where the clip is one.
    """

    clip: Clip
    samples: np.ndarray
    stride: tuple[int, int, int] | None = None
    is_last: bool = True
    part: tuple[int, int] | None = None


def read_clip(item: Any, number: int, sampling_rate: int, **options: Any) -> Clip:
    """Read one input.

    Args:
        item: The input.
        number: Its place among the inputs, for messages.
        sampling_rate: The model's rate in Hz; samples without a rate are taken to have it.
        options: For `load_audio`, from `LOAD_OPTIONS`.

    Returns:
        The clip; without samples when the input holds none.

    Raises:
        AudioError: The audio cannot be used; the message names the input.
        InputError: The input is of no known kind, or its stride does not fit.
    """
    name = _name(item, number)
    source, stride, extra = item, None, dict[str, Any]()
    if isinstance(item, Mapping):
        source, stride, extra = _open_dict(item, name)
    elif isinstance(item, (int, float, list, tuple)) or item is None:
        raise InputError(
            f"{name} is a {type(item).__name__}; a path, bytes, an open file, an array or a dict with 'raw' and "
            "'sampling_rate' is needed. A list is a batch of inputs: pass the samples of one clip as an array."
        )
    samples = _load(source, sampling_rate, name, options)
    if stride is None:
        return Clip(name, number, samples, extra=extra)
    scale = sampling_rate / item.get("sampling_rate", sampling_rate)
    left, right = (round(side * scale) for side in stride)
    if left + right > len(samples):
        raise InputError(f"{name}: its stride of {left} + {right} samples is longer than its {len(samples)} samples.")
    return Clip(name, number, samples, (left, right), extra)


def done_ahead(jobs: Iterator[Callable[[], T]], threads: int) -> Iterator[T]:
    """What jobs return, in their order; as many that come next as there are threads are done meanwhile.

    Args:
        jobs: Are asked for in the caller's thread. What one raises is raised when its turn comes.
        threads: 0 does each job when its turn comes.
    """
    if not threads:
        yield from (job() for job in jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[T]] = deque()
        for job in jobs:
            under_way.append(pool.submit(job))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def cut(clip: Clip, length: int, left: int, right: int) -> Iterator[Piece]:
    """The clip in windows, each sharing samples with its neighbours; whole when `length` is 0.

    Args:
        clip: What to cut.
        length: Samples in a window.
        left: Samples that a window shares with the one before it; the first shares none.
        right: Samples that it shares with the next; the last shares none.
    """
    count = len(clip.samples)
    if not length:
        yield Piece(clip, clip.samples, None if clip.stride is None else (count, *clip.stride))
        return
    for start in range(0, max(count, 1), length - left - right):
        samples = clip.samples[start : start + length]
        is_last = start + length >= count
        yield Piece(clip, samples, (len(samples), left if start else 0, 0 if is_last else right), is_last)
        if is_last:
            return


def clip_times(clip_timestamps: str | Sequence[float] | None) -> tuple[float, ...]:
    """Starts and ends in turn of the parts of a recording to be heard, in seconds.

    Args:
        clip_timestamps: Numbers, or a text of them with commas between, as openai-whisper has it. Without an end the
            last part reaches to the end of the recording.

    Returns:
        An even count of them, the last perhaps infinite; nothing where the whole recording is to be heard.

    Raises:
        InputError: They are not numbers of seconds, or not in order.
    """
    if clip_timestamps is None:
        return ()
    entries = clip_timestamps.split(",") if isinstance(clip_timestamps, str) else clip_timestamps
    if isinstance(clip_timestamps, str) and not clip_timestamps.strip():
        entries = []
    try:
        times = [float(entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"clip_timestamps={clip_timestamps!r}: expected seconds as 'start,end,start,end', or a list of them."
        ) from error
    if not all(0 <= time < math.inf for time in times):
        raise InputError(f"clip_timestamps={clip_timestamps!r}: seconds of at least 0 are needed.")
    if any(later < earlier for earlier, later in itertools.pairwise(times)):
        raise InputError(
            f"clip_timestamps={clip_timestamps!r}: the parts must be in order, each time no earlier than the one "
            "before it."
        )
    if len(times) % 2:
        times.append(math.inf)
    return () if times in ([], [0.0, math.inf]) else tuple(times)


def time_spans(times: Sequence[float], length: int, sampling_rate: int) -> list[tuple[int, int]]:
    """The spans in samples of `clip_times`, as far as a recording of `length` samples has them."""
    ends = [length if time == math.inf else min(round(time * sampling_rate), length) for time in times]
    return [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end]


def _name(item: Any, number: int) -> str:
    if isinstance(item, Mapping) and isinstance(item.get("path"), (str, os.PathLike)):
        return str(item["path"])
    if isinstance(item, (str, os.PathLike)):
        return str(item)
    return f"input {number}"


def _open_dict(item: Mapping[str, Any], name: str) -> tuple[dict[str, Any], tuple[float, float] | None, dict[str, Any]]:
    """What to load, the stride, and the keys that go to the result."""
    if not any(item.get(key) is not None for key in ("raw", "array", "bytes", "path")):
        hint = " Of a row of a dataset, pass row['audio']." if "audio" in item else ""
        raise InputError(
            f"{name}: a dict needs 'raw' or 'array' with the samples and 'sampling_rate' with their rate; this one "
            f"holds {', '.join(map(repr, item)) or 'nothing'}.{hint}"
        )
    stride = item.get("stride")
    if stride is not None and (len(stride) != 2 or min(stride) < 0):
        raise InputError(f"{name}: stride={stride!r}: expected two numbers of samples, left and right.")
    source = {key: item[key] for key in _SOURCE_KEYS if item.get(key) is not None}
    used = {*_SOURCE_KEYS, "stride"}
    if "raw" in source:
        # As in transformers: beside "raw", a path is the caller's own.
        source.pop("array", None)
        used.discard("path")
    return source, stride, {key: value for key, value in item.items() if key not in used}


def _load(source: Any, sampling_rate: int, name: str, options: dict[str, Any]) -> np.ndarray:
    """Mono samples at `sampling_rate`; errors name the input."""
    try:
        if _holds_nothing(source):
            return np.zeros(0, dtype=np.float32)
        return load_audio(source, sampling_rate=sampling_rate, **options)
    except EmptyAudioError:
        return np.zeros(0, dtype=np.float32)
    except (InputError, TypeError) as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def _holds_nothing(source: Any) -> bool:
    """True for arrays of no samples, bare or in a dict."""
    if isinstance(source, dict):
        return any(_holds_nothing(source.get(key)) for key in ("raw", "array"))
    return isinstance(source, (np.ndarray, Tensor, list)) and 0 in np.shape(source)
