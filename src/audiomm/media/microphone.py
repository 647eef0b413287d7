"""A microphone as an iterator of samples, by PortAudio through the extra `microphone`."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np

from ..base.errors import InputError, MissingExtra
from .resample import check_rate


def microphone(
    sampling_rate: int = 16000, block_seconds: float = 0.1, device: int | str | None = None
) -> Iterator[np.ndarray]:
    """What a microphone hears, block by block, until the iterator is closed.

    Args:
        sampling_rate: Hz.
        block_seconds: Length of a block.
        device: Number or name of the input device; None is the system's choice.

    Yields:
        float32 (samples,). No block is lost while the one before it is worked on.

    Raises:
        MissingExtra: The package sounddevice, or PortAudio itself, is not installed.
        InputError: There is no such microphone, or it does not have this rate.
    """
    rate = check_rate(sampling_rate)
    if not 0.01 <= block_seconds <= 10:
        raise InputError(f"block_seconds={block_seconds!r}: accepted are 0.01 to 10.")
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # it raises OSError where the PortAudio library is missing
        raise MissingExtra("listening to a microphone", "sounddevice", "microphone") from error
    return _blocks(sounddevice, rate, round(block_seconds * rate), device)


def _blocks(sounddevice: Any, rate: int, size: int, device: int | str | None) -> Iterator[np.ndarray]:
    heard: Queue[np.ndarray] = Queue()

    def take(block: np.ndarray, *_: Any) -> None:
        heard.put(block[:, 0].copy())

    try:
        stream = sounddevice.InputStream(
            samplerate=rate, blocksize=size, device=device, channels=1, dtype="float32", callback=take
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        raise InputError(f"the microphone cannot be opened at {rate} Hz with device={device!r}: {error}.") from error
    with stream:
        while True:
            yield heard.get()
