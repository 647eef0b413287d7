"""Sounds and files the media tests share."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

RATE = 16000


@pytest.fixture
def tone() -> np.ndarray:
    """One second of 440 Hz at 16 kHz, float32."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Write samples, (samples,) or (samples, channels), as the bytes of an audio file."""

    def write(samples: np.ndarray, container: str = "WAV", rate: int = RATE, subtype: str | None = None) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=container, subtype=subtype)
        return file.getvalue()

    return write


@pytest.fixture
def noise() -> np.ndarray:
    """Two seconds of noise at 16 kHz, float32: no codec makes it small."""
    return (np.random.default_rng(0).standard_normal(2 * RATE) * 0.1).astype(np.float32)
