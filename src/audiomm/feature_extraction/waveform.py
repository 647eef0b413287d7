"""Recordings of any form as a list of waveforms, for models that are called with audio instead of features."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.errors import EmptyAudioError
from ..media.audio import load_audio


def as_recordings(audio: Any) -> tuple[list[Any], bool]:
    """What is to be heard, and whether it came alone: a list or tuple holds several recordings, all else is one."""
    return (list(audio), False) if isinstance(audio, (list, tuple)) else ([audio], True)


def read_waveform(audio: Any, sampling_rate: int, **options: Any) -> np.ndarray:
    """One recording as mono samples (samples,) float32; none where it holds none.

    Args:
        audio: Whatever `load_audio` takes.
        sampling_rate: Hz wanted.
        **options: For `load_audio`.

    Raises:
        AudioError: It cannot be used.
    """
    try:
        return load_audio(audio, sampling_rate=sampling_rate, **options)
    except EmptyAudioError:
        return np.zeros(0, dtype=np.float32)
