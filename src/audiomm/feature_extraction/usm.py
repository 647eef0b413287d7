"""The feature extractors of the Gemma models that listen: one algorithm, two sets of defaults, and raw samples.

Gemma 3n and Gemma 4 differ in where frames start, in how silence is kept from minus infinity, and in which frames of a
padded clip count as real. Names and arguments are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .raw_frames import Gemma4UnifiedAudioFeatureExtractor
from .usm_frames import UsmFeatureExtractor

__all__ = ["Gemma3nAudioFeatureExtractor", "Gemma4AudioFeatureExtractor", "Gemma4UnifiedAudioFeatureExtractor"]


class Gemma3nAudioFeatureExtractor(UsmFeatureExtractor):
    """Clips to Gemma 3n's features: frames of 32 ms every 10 ms, pre-emphasis, 125 to 7,600 Hz.

    A frame is real when its first sample is. Arguments and attributes are those of `UsmFeatureExtractor`.

    Source: transformers 5.23, which differs in batches: there a clip beside a longer one gets up to three more frames
    that reach into the padding, and with them other soft tokens than alone. `batch_invariant = False` does the same.
    """

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        frame_length_ms: float = 32.0,
        hop_length_ms: float = 10.0,
        min_frequency: float = 125.0,
        max_frequency: float = 7600.0,
        preemphasis: float = 0.97,
        preemphasis_htk_flavor: bool = True,
        fft_overdrive: bool = True,
        dither: float = 0.0,
        input_scale_factor: float = 1.0,
        mel_floor: float = 1e-5,
        per_bin_mean: Sequence[float] | None = None,
        per_bin_stddev: Sequence[float] | None = None,
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        super().__init__(
            feature_size, sampling_rate, padding_value, return_attention_mask, frame_length_ms, hop_length_ms,
            min_frequency, max_frequency, preemphasis, preemphasis_htk_flavor, fft_overdrive, dither,
            input_scale_factor, mel_floor, per_bin_mean, per_bin_stddev, padding_side, **extra,
        )  # fmt: skip

    @staticmethod
    def make_window(length: int) -> np.ndarray:
        positions = np.arange(length, dtype=np.float32)
        return (0.5 * (1 - np.cos(2 * np.pi * positions / length))).astype(np.float32)


class Gemma4AudioFeatureExtractor(UsmFeatureExtractor):
    """Clips to Gemma 4's features: frames of 20 ms every 10 ms, half a frame of zeros before, 0 to 8,000 Hz.

    A frame is real when its last sample is; frames that are not real are 0. Arguments and attributes are those of
    `UsmFeatureExtractor`.

    Source: transformers 5.23.
    """

    lead_divisor: ClassVar[int] = 2

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        frame_length_ms: float = 20.0,
        hop_length_ms: float = 10.0,
        min_frequency: float = 0.0,
        max_frequency: float = 8000.0,
        preemphasis: float = 0.0,
        preemphasis_htk_flavor: bool = True,
        fft_overdrive: bool = False,
        dither: float = 0.0,
        input_scale_factor: float = 1.0,
        mel_floor: float = 1e-3,
        per_bin_mean: Sequence[float] | None = None,
        per_bin_stddev: Sequence[float] | None = None,
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        super().__init__(
            feature_size, sampling_rate, padding_value, return_attention_mask, frame_length_ms, hop_length_ms,
            min_frequency, max_frequency, preemphasis, preemphasis_htk_flavor, fft_overdrive, dither,
            input_scale_factor, mel_floor, per_bin_mean, per_bin_stddev, padding_side, **extra,
        )  # fmt: skip

    @staticmethod
    def make_window(length: int) -> np.ndarray:
        return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)

    def compress(self, mel: Tensor) -> Tensor:
        return (mel + self.mel_floor).log()

    def real_frames(self, start: int, stop: int, frames: int) -> range:
        ends_before = self.frame_length - self.lead  # frame i ends with sample i * hop_length + this
        first = max(0, -(-(start - ends_before) // self.hop_length))
        return range(first, max(first, min(frames, -(-(stop - ends_before) // self.hop_length))))

    def kept_frames(self, real: range, own: int) -> range:
        return real
