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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch

from ..base.errors import (
    AudioDecodeError,
    AudioLayoutError,
    AudioLimitError,
    InputError,
    SampleRateError,
    ShapeError,
    TruncatedAudioError,
)
from .containers import Container, damage, declared_rate, sniff
from .fetch import FetchLimits, describe, fetch
from .pyav import blocks_of_video, duration_of_video
from .quiet import quiet_stderr
from .resample import Resampler, check_rate
from .samples import ACCEPTED, MAX_CHANNELS, check_finite, to_float

logger = logging.getLogger("audiomm.media")

#: Longest audio that is decoded unless the caller says otherwise: at 16 kHz it fills 0.9 GB.
MAX_SECONDS = 4 * 3600.0

_BLOCK_SAMPLES = 1 << 16
#: The block in which a broken flac frame is met is lost as a whole, so flac is read by about its frame.
_FLAC_BLOCK_SAMPLES = 1 << 12
#: An mp3 decoder may drop its start-up and its last frame, 1152 samples each, without anything being lost.
_MP3_SLACK_SAMPLES = 2 * 1152
#: Below this part of the channels' energy the average has cancelled them.
_CANCELLED = 0.01


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


@dataclass
class _Mixer:
    """Blocks of many channels in, one mono float32 waveform at the wanted rate out."""

    name: str
    from_rate: int
    to_rate: int
    channel: int | None
    max_seconds: float

    def __post_init__(self) -> None:
        self._resampler = Resampler(self.from_rate, self.to_rate)
        self._pieces: list[np.ndarray] = []
        self._energy_in = self._energy_out = 0.0
        self.taken = 0

    def push(self, block: np.ndarray) -> None:
        """Take float32 (samples, channels)."""
        check_finite(torch.from_numpy(block), self.name, self.taken)
        self.taken += len(block)
        if self.taken > self.max_seconds * self.from_rate:
            raise too_long(self.name, self.taken / self.from_rate, self.max_seconds, at_least=True)
        if block.shape[1] == 1:
            mono = block[:, 0]
        elif self.channel is not None:
            mono = block[:, self.channel]
        else:
            mono = block.mean(axis=1)
            self._energy_in += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
            self._energy_out += float(np.square(mono, dtype=np.float64).sum())
        self._pieces.append(self._resampler.push(mono))

    def waveform(self) -> np.ndarray:
        """float32 (samples,)."""
        if self._energy_out < _CANCELLED * self._energy_in:
            logger.warning(
                "%s: averaging the channels leaves %.2g %% of their energy, they cancel each other. "
                "Pass channel=0 to listen to one.",
                self.name,
                100 * self._energy_out / self._energy_in,
            )
        self._pieces.append(self._resampler.finish())
        pieces = [piece for piece in self._pieces if len(piece)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.float32), *pieces])


def too_long(name: str, seconds: float, max_seconds: float, at_least: bool = False) -> AudioLimitError:
    """The error for audio that is longer than allowed."""
    return AudioLimitError(
        f"{name} lasts {'more than ' if at_least else ''}{seconds:.0f} s; {max_seconds:.0f} s are allowed. Pass "
        "max_seconds= to allow more, or cut it."
    )


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
    if not max_seconds > 0:
        raise InputError(f"max_seconds={max_seconds!r}: a number above 0 is needed.")
    audio, from_rate = _unpacked(audio, rate)
    if isinstance(audio, (np.ndarray, torch.Tensor, list, tuple)):
        return _from_samples(audio, from_rate, rate, channel, layout, max_seconds)
    if audio is None or not (isinstance(audio, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(audio, "read")):
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
        AudioDecodeError: Not an audio file.
        MissingExtra: The format needs PyAV.
    """
    name, source = describe(audio), fetch(audio)
    kind = sniff(source)
    if kind.needs_pyav:
        return duration_of_video(name, source, kind.name)
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
                raise SampleRateError(f"the dict holds {key!r} but no 'sampling_rate'; samples mean nothing without it.")
            return audio[key], check_rate(audio["sampling_rate"])
    for key in ("bytes", "path"):
        if audio.get(key) is not None:
            return audio[key], rate
    raise TypeError(f"a dict of audio needs 'array', 'raw', 'bytes' or 'path'; this one has {sorted(map(str, audio))}.")


def _from_samples(
    audio: Any, from_rate: int, rate: int, channel: int | None, layout: str | None, max_seconds: float
) -> np.ndarray:
    if isinstance(audio, (list, tuple)) and audio and (isinstance(audio[0], str) or np.ndim(audio[0]) > 0):
        raise TypeError(
            f"a list of {type(audio[0]).__name__} is not one clip: {ACCEPTED} is needed. Load the clips of a batch one "
            "by one; pass channels as one 2-D array."
        )
    samples = to_float(audio, "cpu").numpy()
    if samples.ndim == 0 or samples.ndim > 2:
        raise ShapeError(f"audio of shape {samples.shape}: (samples,), or two axes for several channels, is needed.")
    block = samples[:, None] if samples.ndim == 1 else _channels_last(samples, layout)
    if len(block) > max_seconds * from_rate:
        raise too_long("the array", len(block) / from_rate, max_seconds)
    _check_channel("the array", channel, block.shape[1])
    mixer = _Mixer("the array", from_rate, rate, channel, max_seconds)
    mixer.push(block)
    return mixer.waveform()


def _channels_last(samples: np.ndarray, layout: str | None) -> np.ndarray:
    """A 2-D array as (samples, channels)."""
    first, last = samples.shape
    if layout is None:
        could_be_first = first <= MAX_CHANNELS and (last > MAX_CHANNELS or first == 1)
        could_be_last = last <= MAX_CHANNELS and (first > MAX_CHANNELS or last == 1)
        if could_be_first == could_be_last and first != last:
            raise AudioLayoutError(
                f"an array of shape {samples.shape}: neither axis is clearly the channels (one of up to {MAX_CHANNELS}, "
                "the other longer). Pass layout='channels_first' or 'channels_last'."
            )
        layout = "channels_first" if could_be_first else "channels_last"
    block = samples.T if layout == "channels_first" else samples
    if block.shape[1] > MAX_CHANNELS or block.shape[1] == 0:
        raise AudioLayoutError(
            f"an array of shape {samples.shape} with layout={layout!r} has {block.shape[1]} channels; 1 to "
            f"{MAX_CHANNELS} are accepted."
        )
    return block


def _check_channel(name: str, channel: int | None, channels: int) -> None:
    if channel is not None and not 0 <= channel < channels:
        raise AudioLayoutError(f"channel={channel}: {name} has {channels} channels, 0 to {channels - 1}.")


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
    if kind.needs_pyav:
        mixer: _Mixer | None = None
        for block, block_rate in blocks_of_video(name, source, kind.name):
            if mixer is None:
                _check_channel(name, channel, block.shape[1])
                mixer = _Mixer(name, check_rate(block_rate, name), rate, channel, max_seconds)
            mixer.push(block)
        return mixer.waveform() if mixer is not None else np.zeros(0, np.float32)
    trouble = damage(source, kind)
    with quiet_stderr() if kind.noisy else nullcontext(), _opened(name, source, kind, trouble) as file:
        declared = file.frames
        if declared > max_seconds * file.samplerate and declared < 1 << 62:
            raise too_long(name, declared / file.samplerate, max_seconds)
        _check_channel(name, channel, file.channels)
        mixer = _Mixer(name, file.samplerate, rate, channel, max_seconds)
        try:
            for block in _blocks(file):
                mixer.push(block)
        except soundfile.SoundFileError as error:
            trouble = trouble or f"decoding stopped ({str(error).rstrip('.')})"
        slack = _MP3_SLACK_SAMPLES if file.format in ("MP3", "MPEG") else 0
    if trouble is None and mixer.taken < declared - slack:
        trouble = "it ends early"
    if trouble is not None:
        of_declared = f" of {declared} declared" if declared > mixer.taken else ""
        message = f"{name} is damaged: {trouble}; {mixer.taken}{of_declared} samples could be read"
        if on_truncated == "error":
            raise TruncatedAudioError(f"{message}. Pass on_truncated='partial' to use those.")
        logger.warning("%s, and are used.", message)
    return mixer.waveform()


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """float32 (samples, channels) until the file ends."""
    size = _FLAC_BLOCK_SAMPLES if file.format == "FLAC" else _BLOCK_SAMPLES
    while True:
        block = file.read(size, dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        yield block

