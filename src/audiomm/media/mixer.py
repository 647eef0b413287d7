"""Blocks of many channels in, one mono waveform at the wanted rate out."""

from __future__ import annotations

import logging

import numpy as np
import torch

from ..base.errors import AudioLayoutError, AudioLimitError
from .resample import Resampler, resampled_length
from .samples import check_finite

logger = logging.getLogger("audiomm.media")

#: Below this part of the channels' energy the average has cancelled them.
_CANCELLED = 0.01


class Mixer:
    """Averages channels and resamples, block by block.

    Args:
        name: What messages call the audio.
        to_rate: Samples a second wanted.
        channel: Take this channel only; None averages all.
        max_seconds: More audio is an error.

    Attributes:
        taken: Samples a channel taken so far.
    """

    def __init__(self, name: str, to_rate: int, channel: int | None, max_seconds: float) -> None:
        self.name = name
        self.taken = 0
        self._to_rate = to_rate
        self._channel = channel
        self._max_seconds = max_seconds
        self._resampler: Resampler | None = None
        self._waveform: np.ndarray | None = None
        self._filled = self._expected = 0
        self._energy_in = self._energy_out = 0.0

    def check_length(self, num_samples: int, rate: int) -> None:
        """Refuse audio of `num_samples` at `rate` if that is too long.

        Raises:
            AudioLimitError: It is.
        """
        if num_samples > self._max_seconds * rate:
            raise AudioLimitError(
                f"{self.name} lasts {num_samples / rate:.0f} s or more; {self._max_seconds:.0f} s are allowed. Pass "
                "max_seconds= to allow more, or cut it."
            )

    def expect(self, num_samples: int, rate: int) -> None:
        """Make room for audio of `num_samples` at `rate`, so that hours of it lie in memory once, not twice."""
        self._expected = resampled_length(num_samples, rate, self._to_rate)

    def push(self, block: np.ndarray, rate: int) -> None:
        """Take float32 (samples, channels) at `rate`, the same rate every time.

        Raises:
            AudioLimitError: It is getting too long.
            AudioLayoutError: There is no such channel.
            NonFiniteAudioError: A sample is NaN, infinite or absurdly large.
        """
        if self._resampler is None:
            self._resampler = Resampler(rate, self._to_rate)
        check_finite(torch.from_numpy(block), self.name, self.taken)
        self.taken += len(block)
        self.check_length(self.taken, rate)
        self._append(self._resampler.push(self._mono(block)))

    def waveform(self) -> np.ndarray:
        """float32 (samples,), all that was taken; ends the mixing."""
        if self._energy_out < _CANCELLED * self._energy_in:
            logger.warning(
                "%s: averaging the channels leaves %.2g %% of their energy, they cancel each other. "
                "Pass channel=0 to listen to one.",
                self.name,
                100 * self._energy_out / self._energy_in,
            )
        if self._resampler is not None:
            self._append(self._resampler.finish())
        if self._waveform is None:
            return np.zeros(0, np.float32)
        waveform = self._waveform[: self._filled]
        # A header that declares far more than there is must not keep its room.
        return waveform.copy() if self._filled < len(self._waveform) // 2 else waveform

    def _append(self, piece: np.ndarray) -> None:
        if not len(piece):
            return
        if self._waveform is None and not self._expected:
            # Samples that come at once and need no change are returned as they are.
            self._waveform, self._filled = piece, len(piece)
            return
        end = self._filled + len(piece)
        if self._waveform is None or end > len(self._waveform):
            larger = np.empty(max(end, self._expected, self._filled * 5 // 4), np.float32)
            if self._waveform is not None:
                larger[: self._filled] = self._waveform[: self._filled]
            self._waveform = larger
        self._waveform[self._filled : end] = piece
        self._filled = end

    def _mono(self, block: np.ndarray) -> np.ndarray:
        channels = block.shape[1]
        if self._channel is not None:
            if not 0 <= self._channel < channels:
                raise AudioLayoutError(f"channel={self._channel}: {self.name} has {channels}, 0 to {channels - 1}.")
            return block[:, self._channel]
        if channels == 1:
            return block[:, 0]
        mono = block.mean(axis=1)
        self._energy_in += float(np.square(block, dtype=np.float64).sum()) / channels
        self._energy_out += float(np.square(mono, dtype=np.float64).sum())
        return mono
