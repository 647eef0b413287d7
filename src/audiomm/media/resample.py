"""Resampling a waveform to the rate a model listens at, whole or piece by piece.

The filter is libsoxr's HQ, and the length is ceil(samples * to / from), as in librosa and in transformers' loader.
"""

from __future__ import annotations

import numpy as np
import soxr

from ..base.errors import SampleRateError

#: Rates that recordings have, Hz; a header outside of it is broken or forged.
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000


def check_rate(rate: object, where: str = "sampling_rate") -> int:
    """`rate` as an int.

    Raises:
        SampleRateError: It is not a whole number of Hz that a recording can have.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)) or rate != rate // 1:
        raise SampleRateError(f"{where}={rate!r}: a whole number of samples a second is needed.")
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise SampleRateError(f"{where}={rate}: accepted are {MIN_RATE_HZ} to {MAX_RATE_HZ} samples a second.")
    return int(rate)


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
    """Samples after resampling: ceil(num_samples * to_rate / from_rate)."""
    return -(-num_samples * to_rate // from_rate)


def resample(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Band-limited resampling of a mono waveform.

    Args:
        samples: float32 (samples,).
        from_rate: Samples a second of `samples`.
        to_rate: Samples a second wanted.

    Returns:
        float32 (ceil(samples * to_rate / from_rate),); `samples` itself when the rates are equal.
    """
    stream = Resampler(from_rate, to_rate)
    return np.concatenate([stream.push(samples), stream.finish()]) if from_rate != to_rate else samples


class Resampler:
    """Resamples a mono waveform that comes in pieces; the pieces that come out add up to what `resample` gives."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self._rates = (from_rate, to_rate)
        self._stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32") if from_rate != to_rate else None
        self._taken = 0
        self._given = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take float32 (samples,), return what is ready of the result."""
        if self._stream is None:
            return samples
        self._taken += len(samples)
        ready = self._stream.resample_chunk(np.ascontiguousarray(samples))
        self._given += len(ready)
        return ready

    def finish(self) -> np.ndarray:
        """The rest of the result, so that its whole length is the ceiling."""
        empty = np.zeros(0, np.float32)
        if self._stream is None or self._taken == 0:
            return empty
        missing = resampled_length(self._taken, *self._rates) - self._given
        rest = self._stream.resample_chunk(empty, last=True)[: max(0, missing)]
        return np.pad(rest, (0, max(0, missing - len(rest))))
