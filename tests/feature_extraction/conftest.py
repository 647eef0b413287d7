"""Sounds the feature tests share, and the reference cases where they lie beside the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def golden() -> Path:
    """The folder of reference cases; the test is skipped where it is missing."""
    folder = Path(__file__).parents[2] / "../shared/golden"
    if not folder.is_dir():
        pytest.skip("the reference cases are not beside this repository")
    return folder


@pytest.fixture
def speech() -> np.ndarray:
    """1.7 s at 16 kHz, float32: a gliding voice over noise, with a pause."""
    seconds = np.arange(27_251) / 16000
    voice = sum(np.sin(2 * np.pi * k * (120 * seconds + 40 * seconds**2)) / k for k in range(1, 20))
    noise = np.random.default_rng(3).standard_normal(len(seconds))
    return ((0.1 * voice * (np.sin(5 * seconds) > 0)) + 0.003 * noise).astype(np.float32)
