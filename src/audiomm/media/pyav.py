"""Decoding what libsndfile cannot (m4a, mp4, webm, aac, ...) with PyAV, where that is installed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import AudioDecodeError, MissingExtra


def import_av(kind: str) -> Any:
    """The PyAV module.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtra(f"reading {kind} files", "av", "video") from error
    return av


def blocks_of_video(name: str, source: Path | bytes, kind: str) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks float32 (samples, channels) of the first audio stream, each with its samples a second.

    Raises:
        MissingExtra: PyAV is not installed.
        AudioDecodeError: It cannot be decoded, or has no audio.
    """
    av = import_av(kind)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.audio:
                raise AudioDecodeError(f"{name} has no audio track.")
            packed = av.AudioResampler(format="flt")
            for frame in container.decode(container.streams.audio[0]):
                for part in packed.resample(frame):
                    yield part.to_ndarray().reshape(-1, len(part.layout.channels)), part.sample_rate
            for part in packed.resample(None):
                yield part.to_ndarray().reshape(-1, len(part.layout.channels)), part.sample_rate
    except av.FFmpegError as error:
        raise AudioDecodeError(f"{name} cannot be decoded as {kind}: {error}.") from error


def seconds_of_video(name: str, source: Path | bytes, kind: str) -> float | None:
    """Seconds the first audio stream, or a container without pictures, declares; None when neither does.

    Raises:
        MissingExtra: PyAV is not installed.
        AudioDecodeError: It cannot be read, or has no audio.
    """
    av = import_av(kind)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.audio:
                raise AudioDecodeError(f"{name} has no audio track.")
            stream = container.streams.audio[0]
            if stream.duration is not None:
                return float(stream.duration * stream.time_base)
            if container.duration is not None and not container.streams.video:
                return float(container.duration / av.time_base)
            return None
    except av.FFmpegError as error:
        raise AudioDecodeError(f"{name} cannot be read as {kind}: {error}.") from error
