"""Anything that sounds to a mono float32 waveform at the rate a model wants.

Files are decoded by libsndfile block by block: each block is averaged over its channels and resampled before the next
is read, so a small file that unpacks to hours of audio stops at the limit, not at the end of the memory.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch

from ..base.errors import (
    AudioDecodeError,
    AudioLayoutError,
    InputError,
    SampleRateError,
    ShapeError,
    TruncatedAudioError,
)
from .containers import Container, damage, declared_rate, sniff
from .fetch import FetchLimits, describe, fetch
from .mixer import Mixer
from .pyav import blocks_of_video, seconds_of_video
from .quiet import quiet_stderr
from .resample import check_rate
from .samples import ACCEPTED, MAX_CHANNELS, to_float

logger = logging.getLogger("audiomm.media")

#: Longest audio that is decoded unless the caller says otherwise: at 16 kHz it fills 0.9 GB.
MAX_SECONDS = 4 * 3600.0

_BLOCK_SAMPLES = 1 << 16
#: The block in which a broken flac frame is met is lost as a whole, so flac is read by about its frame.
_FLAC_BLOCK_SAMPLES = 1 << 12
#: An mp3 decoder may drop its start-up and its last frame, 1152 samples each, without anything being lost.
_MP3_SLACK_SAMPLES = 2 * 1152
#: What a container declares and what its codec gives differ by the codec's delay and its last frame.
_VIDEO_SLACK_SECONDS = 0.2
#: libsndfile's way to say that a file does not declare how long it is.
_UNKNOWN_SAMPLES = 1 << 62


class _Memory(io.BytesIO):
    """Bytes as a file whose seek, asked by a broken header for an impossible place, stays where it is.

    An exception there would be printed to standard error by cffi and then be lost.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new place, or the old one when the new one does not exist."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


class _ForwardFile(soundfile.SoundFile):
    """A file read from front to back: without the seek after every read, which upsets an mp3 decoder."""

    def seekable(self) -> bool:
        """No: nothing here jumps."""
        return False


def load_audio(
    audio: Any,
    sampling_rate: int = 16000,
    *,
    channel: int | None = None,
    layout: Literal["channels_first", "channels_last"] | None = None,
    max_seconds: float = MAX_SECONDS,
    on_truncated: Literal["error", "partial"] = "error",
    allow_urls: bool = False,
    allowed_hosts: Collection[str] | None = None,
    max_bytes: int = 1 << 30,
    timeout_seconds: float = 60.0,
) -> np.ndarray:
    """Read audio of any form.

    Args:
        audio: A path, bytes, a binary file object, a data URI, a URL (see `allow_urls`), samples (array, tensor or list
            of numbers, taken to be at `sampling_rate`; integers are scaled by their type), or a dict with "array" or
            "raw" and "sampling_rate", or with "path" or "bytes". wav, flac, ogg, opus, mp3 and aiff need nothing else;
            m4a, mp4, webm and aac need PyAV, `pip install 'audiomm[video]'`.
        sampling_rate: Samples a second wanted.
        channel: Take this channel, 0 is the first; None averages all.
        layout: Which axis of a 2-D array is which; None is enough where only one axis can be channels (up to 64).
        max_seconds: Longer audio is an error.
        on_truncated: What to do with a file that holds less than it declares: "error", or "partial" to return what is
            there and log a warning.
        allow_urls: Fetch http(s) addresses from any public host.
        allowed_hosts: Fetch http(s) addresses from these hosts, private ones too, and no other.
        max_bytes: Of a download, a data URI or a file object.
        timeout_seconds: For a download.

    Returns:
        float32 (samples,), writable only if it was decoded or changed here; the input itself when it already is that.

    Raises:
        AudioFileNotFoundError: There is no such file (also a FileNotFoundError).
        AudioDecodeError: Not an audio file, or a broken one.
        TruncatedAudioError: It holds less than it declares.
        AudioLimitError: Too long or too large.
        AudioLayoutError: Channels and samples cannot be told apart.
        SampleRateError: A rate is missing or impossible.
        NonFiniteAudioError: A sample is NaN, infinite or absurdly large.
        MissingExtra: The format needs PyAV.
        TypeError: Not audio at all.
    """
    rate = check_rate(sampling_rate)
    if on_truncated not in ("error", "partial"):
        raise InputError(f"on_truncated={on_truncated!r}: accepted are 'error' and 'partial'.")
    if layout not in (None, "channels_first", "channels_last"):
        raise InputError(f"layout={layout!r}: accepted are 'channels_first', 'channels_last' and None.")
    if channel is not None and (isinstance(channel, bool) or not isinstance(channel, int)):
        raise InputError(f"channel={channel!r}: a number is needed, 0 is the first; or None to average all.")
    if not isinstance(max_seconds, int | float) or not max_seconds > 0:
        raise InputError(f"max_seconds={max_seconds!r}: a number above 0 is needed.")
    audio, from_rate = _unpacked(audio, rate)
    if isinstance(audio, (np.ndarray, torch.Tensor, list, tuple)):
        return _from_samples(audio, from_rate, rate, channel, layout, max_seconds)
    if not isinstance(audio, (str, bytes, bytearray, memoryview, os.PathLike)) and not hasattr(audio, "read"):
        raise TypeError(
            f"{type(audio).__name__} is not audio: a path, bytes, a binary file object, a data URI, {ACCEPTED}, or a "
            "dict of one of them with its 'sampling_rate' is needed."
        )
    limits = FetchLimits(allow_urls, allowed_hosts, max_bytes, timeout_seconds)
    return _from_file(describe(audio), fetch(audio, limits), rate, channel, max_seconds, on_truncated)


def audio_duration(audio: str | os.PathLike[str] | bytes) -> float:
    """Seconds a file declares to last, read from its header without decoding it.

    Raises:
        AudioFileNotFoundError: There is no such file.
        AudioDecodeError: Not an audio file, or one that does not say.
        MissingExtra: The format needs PyAV.
    """
    name, source = describe(audio), fetch(audio)
    kind = sniff(source)
    if kind.needs_pyav:
        seconds = seconds_of_video(name, source, kind.name)
        if seconds is None:
            raise AudioDecodeError(f"{name} does not declare how long it lasts; load_audio can tell.")
        return seconds
    with quiet_stderr() if kind.noisy else nullcontext(), _opened(name, source, kind) as file:
        return file.frames / file.samplerate


def _unpacked(audio: Any, rate: int) -> tuple[Any, int]:
    """What a dict or a decoder object holds, and its rate; anything else as it is."""
    if hasattr(audio, "get_all_samples"):  # a decoded column of the datasets library
        samples = audio.get_all_samples()
        return samples.data, check_rate(samples.sample_rate, "the decoder's sample_rate")
    if not isinstance(audio, Mapping):
        return audio, rate
    for key in ("array", "raw"):
        if audio.get(key) is not None:
            if audio.get("sampling_rate") is None:
                raise SampleRateError(
                    f"the dict holds {key!r} but no 'sampling_rate', without which samples say nothing."
                )
            return audio[key], check_rate(audio["sampling_rate"])
    for key in ("bytes", "path"):
        if audio.get(key) is not None:
            return audio[key], rate
    raise TypeError(f"a dict of audio needs 'array', 'raw', 'bytes' or 'path'; this one has {sorted(map(str, audio))}.")


def _from_samples(
    audio: Any, from_rate: int, rate: int, channel: int | None, layout: str | None, max_seconds: float
) -> np.ndarray:
    if (
        isinstance(audio, (list, tuple))
        and audio
        and (isinstance(audio[0], (str, list, tuple)) or getattr(audio[0], "ndim", 0) > 0)
    ):
        raise TypeError(
            f"a list of {type(audio[0]).__name__} is not one clip: {ACCEPTED} is needed. Load the clips of a batch one "
            "by one; pass channels as one 2-D array."
        )
    samples = to_float(audio, "cpu").numpy()
    if samples.ndim == 0 or samples.ndim > 2:
        raise ShapeError(f"audio of shape {samples.shape}: (samples,), or two axes for several channels, is needed.")
    block = samples[:, None] if samples.ndim == 1 else _channels_last(samples, layout)
    mixer = Mixer("the array", rate, channel, max_seconds)
    mixer.push(block, from_rate)
    return mixer.waveform()


def _channels_last(samples: np.ndarray, layout: str | None) -> np.ndarray:
    """A 2-D array as (samples, channels)."""
    first, last = samples.shape
    if layout is None:
        could_be_first = first <= MAX_CHANNELS and (last > MAX_CHANNELS or first == 1)
        could_be_last = last <= MAX_CHANNELS and (first > MAX_CHANNELS or last == 1)
        if could_be_first == could_be_last and first != last:
            raise AudioLayoutError(
                f"an array of shape {samples.shape}: neither axis is clearly the channels (up to {MAX_CHANNELS}, the "
                "other longer). Pass layout='channels_first' or 'channels_last'."
            )
        layout = "channels_first" if could_be_first else "channels_last"
    block = samples.T if layout == "channels_first" else samples
    if block.shape[1] > MAX_CHANNELS or block.shape[1] == 0:
        raise AudioLayoutError(
            f"an array of shape {samples.shape} with layout={layout!r} has {block.shape[1]} channels; 1 to "
            f"{MAX_CHANNELS} are accepted."
        )
    return block


def _opened(name: str, source: Path | bytes, kind: Container, trouble: str | None = None) -> soundfile.SoundFile:
    """The file, its header checked; `trouble` is what is already known to be wrong with it.

    Raises:
        TruncatedAudioError: libsndfile cannot read it, and that is why.
        AudioDecodeError: libsndfile cannot read it.
        SampleRateError: The header's rate is impossible.
    """
    try:
        file = _ForwardFile(_Memory(source) if isinstance(source, bytes) else os.fspath(source))
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        if trouble is not None:
            raise TruncatedAudioError(f"{name} is damaged: {trouble}; nothing of it could be read.") from error
        rate = declared_rate(source, kind)
        if rate is not None:
            check_rate(rate, f"{name}: the header's sampling rate")
        reason = str(error).split(": ", 1)[-1].rstrip(".") if kind.name else f"it starts with {kind.start!r}"
        raise AudioDecodeError(f"{name} is not an audio file that can be read ({reason}).") from error
    try:
        check_rate(file.samplerate, f"{name}: the header's sampling rate")
        if file.channels > MAX_CHANNELS:
            raise AudioDecodeError(f"{name} declares {file.channels} channels; up to {MAX_CHANNELS} are accepted.")
    except (SampleRateError, AudioDecodeError):
        file.close()
        raise
    return file


def _from_file(
    name: str, source: Path | bytes, rate: int, channel: int | None, max_seconds: float, on_truncated: str
) -> np.ndarray:
    kind = sniff(source)
    decode = _decode_by_pyav if kind.needs_pyav else _decode_by_libsndfile
    mixer = Mixer(name, rate, channel, max_seconds)
    trouble, declared = decode(name, source, kind, mixer)
    if trouble is not None:
        of_declared = f" of {declared} declared" if declared > mixer.taken else ""
        message = f"{name} is damaged: {trouble}; {mixer.taken}{of_declared} samples could be read"
        if on_truncated == "error":
            raise TruncatedAudioError(f"{message}. Pass on_truncated='partial' to use those.")
        logger.warning("%s, and are used.", message)
    return mixer.waveform()


def _decode_by_libsndfile(name: str, source: Path | bytes, kind: Container, mixer: Mixer) -> tuple[str | None, int]:
    """Decode into `mixer`; what is wrong with the file, and the samples it declares."""
    trouble = damage(source, kind)
    with quiet_stderr() if kind.noisy else nullcontext(), _opened(name, source, kind, trouble) as file:
        declared = file.frames
        if declared < _UNKNOWN_SAMPLES:
            mixer.check_length(declared, file.samplerate)
            mixer.expect(declared, file.samplerate)
        try:
            for block in _blocks(file):
                mixer.push(block, file.samplerate)
        except soundfile.SoundFileError as error:
            trouble = trouble or f"decoding stopped ({str(error).rstrip('.')})"
        slack = _MP3_SLACK_SAMPLES if kind.name == "mp3" else 0
    if trouble is None and mixer.taken < declared - slack and declared < _UNKNOWN_SAMPLES:
        trouble = "it ends early"
    return trouble, declared


def _decode_by_pyav(name: str, source: Path | bytes, kind: Container, mixer: Mixer) -> tuple[str | None, int]:
    """Decode into `mixer`; what is wrong with the file, and the samples it declares."""
    seconds = seconds_of_video(name, source, kind.name) or 0.0
    block_rate, trouble = 0, None
    try:
        for block, block_rate in blocks_of_video(name, source, kind.name):
            if mixer.taken == 0:
                mixer.check_length(int(seconds * block_rate), check_rate(block_rate, name))
                mixer.expect(int(seconds * block_rate), block_rate)
            mixer.push(block, block_rate)
    except AudioDecodeError as error:
        if mixer.taken == 0:
            raise
        trouble = f"decoding stopped ({error})"
    declared = int(seconds * block_rate)
    if trouble is None and mixer.taken < declared - _VIDEO_SLACK_SECONDS * block_rate:
        trouble = "it ends early"
    return trouble, declared


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """float32 (samples, channels) until the file ends."""
    size = _FLAC_BLOCK_SAMPLES if file.format == "FLAC" else _BLOCK_SAMPLES
    while True:
        block = file.read(size, dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        yield block
