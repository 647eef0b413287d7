"""Log-mel spectrograms: windows, framing, mel filter banks, and the fast and the obvious way to put them together.

The numbers are those of openai-whisper's `log_mel_spectrogram` (whisper/audio.py); the filter banks follow Slaney's
Auditory Toolbox (linear below 1 kHz, logarithmic above) and O'Shaughnessy's formula, which HTK uses. On a CPU the
spectrum is computed block by block, so that frames, spectrum and power stay in the cache; `plain_log_mel` is the slow
twin that says the same in six lines and is what a GPU runs. The Fourier transform is taken in float64: in float32 the
rounding of loud bins shows in quiet ones (2e-5 of the result, and differently on every processor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from ..base.errors import ConfigError, EmptyAudioError

#: Smallest power that is told from silence: log10 of it is the floor of an all-silent clip.
POWER_FLOOR = 1e-10
#: Range below the loudest bin that is kept, in powers of ten (80 dB).
DYNAMIC_RANGE = 8.0

#: Frames computed at once on a CPU, a quarter of 30 s: their samples and spectrum (2.4 MB each) stay in the cache, and
#: two threads still have enough to do.
_BLOCK_FRAMES = 750
#: Groups of neighbouring mel bands, each multiplied with the bins it sees: 8 of them leave a fifth of the products.
_BAND_GROUPS = 8

_SLANEY_HZ_PER_MEL = 200.0 / 3.0
_SLANEY_KNEE_HZ = 1000.0
_SLANEY_KNEE_MEL = _SLANEY_KNEE_HZ / _SLANEY_HZ_PER_MEL
_SLANEY_LOG_STEP = np.log(6.4) / 27.0

MelScale = Literal["htk", "slaney"]


def hertz_to_mel(frequency_hz: np.ndarray | float, scale: MelScale = "htk") -> np.ndarray:
    """Mel value of a frequency in Hz."""
    frequency_hz = np.asarray(frequency_hz, dtype=np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + frequency_hz / 700.0)
    above = _SLANEY_KNEE_MEL + np.log(np.maximum(frequency_hz, _SLANEY_KNEE_HZ) / _SLANEY_KNEE_HZ) / _SLANEY_LOG_STEP
    return np.where(frequency_hz < _SLANEY_KNEE_HZ, frequency_hz / _SLANEY_HZ_PER_MEL, above)


def mel_to_hertz(mel: np.ndarray | float, scale: MelScale = "htk") -> np.ndarray:
    """Frequency in Hz of a mel value."""
    mel = np.asarray(mel, dtype=np.float64)
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    above = _SLANEY_KNEE_HZ * np.exp(_SLANEY_LOG_STEP * (np.maximum(mel, _SLANEY_KNEE_MEL) - _SLANEY_KNEE_MEL))
    return np.where(mel < _SLANEY_KNEE_MEL, mel * _SLANEY_HZ_PER_MEL, above)


@lru_cache(maxsize=32)
def _filter_bank(
    num_bins: int, num_mels: int, low_hz: float, high_hz: float, sampling_rate: int, area_norm: bool, scale: MelScale
) -> np.ndarray:
    bins_hz = np.linspace(0.0, sampling_rate / 2, num_bins)
    edges_mel = np.linspace(hertz_to_mel(low_hz, scale), hertz_to_mel(high_hz, scale), num_mels + 2)
    edges_hz = mel_to_hertz(edges_mel, scale)
    rising = (bins_hz[:, None] - edges_hz[None, :-2]) / np.diff(edges_hz)[:-1]
    falling = (edges_hz[None, 2:] - bins_hz[:, None]) / np.diff(edges_hz)[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if area_norm:
        filters *= 2.0 / (edges_hz[2:] - edges_hz[:-2])
    filters.setflags(write=False)
    return filters


def mel_filter_bank(
    num_frequency_bins: int,
    num_mel_filters: int,
    min_frequency: float,
    max_frequency: float,
    sampling_rate: int,
    norm: Literal["slaney"] | None = None,
    mel_scale: MelScale = "htk",
) -> np.ndarray:
    """Triangular filters that gather spectrum bins into mel bands.

    Args:
        num_frequency_bins: Bins of the spectrum, n_fft // 2 + 1, from 0 Hz to half the sampling rate.
        num_mel_filters: Bands.
        min_frequency: Lower edge of the first band, Hz.
        max_frequency: Upper edge of the last band, Hz.
        sampling_rate: Samples a second.
        norm: "slaney" gives every band the same area; None gives every band the peak 1.
        mel_scale: "htk" (logarithmic throughout) or "slaney" (linear below 1 kHz).

    Returns:
        float64 (num_frequency_bins, num_mel_filters).

    Raises:
        ConfigError: An argument is out of range.
    """
    if norm not in (None, "slaney"):
        raise ConfigError(f"norm={norm!r}: accepted are 'slaney' and None.")
    if mel_scale not in ("htk", "slaney"):
        raise ConfigError(f"mel_scale={mel_scale!r}: accepted are 'htk' and 'slaney'.")
    if num_frequency_bins < 2 or num_mel_filters < 1 or not 0 <= min_frequency < max_frequency or sampling_rate <= 0:
        raise ConfigError(
            f"no filter bank has {num_frequency_bins} bins and {num_mel_filters} mel bands from {min_frequency} to "
            f"{max_frequency} Hz at {sampling_rate} Hz: bins >= 2, bands >= 1, 0 <= from < to and rate > 0 are needed."
        )
    bank = _filter_bank(
        num_frequency_bins,
        num_mel_filters,
        float(min_frequency),
        float(max_frequency),
        sampling_rate,
        norm is not None,
        mel_scale,
    )
    return bank.copy()


def transform_dtype(device: torch.device) -> torch.dtype:
    """The type Fourier transforms are taken in: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@lru_cache(maxsize=32)
def hann_window(length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Periodic Hann window of `length` samples, kept per device and dtype; not to be written to."""
    with torch.inference_mode(False):
        return torch.hann_window(length, periodic=True, device=device, dtype=dtype)


def frame_count(num_samples: int, n_fft: int, hop_length: int) -> int:
    """Frames of a centred spectrogram whose last frame is dropped: num_samples // hop_length for an even n_fft."""
    return (num_samples + 2 * (n_fft // 2) - n_fft) // hop_length


def compress(log_power: torch.Tensor, loudest: torch.Tensor) -> torch.Tensor:
    """Whisper's scaling of log10 power: cut 80 dB below the loudest bin, then (x + 4) / 4."""
    return (torch.maximum(log_power, loudest - DYNAMIC_RANGE) + 4.0) / 4.0


def plain_log_mel(waveforms: torch.Tensor, filters: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """Whisper log-mel of equally long clips, all at once by torch.stft: the obvious form.

    Args:
        waveforms: float32 (batch, samples), samples > n_fft // 2.
        filters: float32 (n_fft // 2 + 1, mels) on the same device.
        n_fft: Samples a window.
        hop_length: Samples from frame to frame.

    Returns:
        float32 (batch, mels, frames), frames = frame_count(samples).
    """
    dtype = transform_dtype(waveforms.device)
    window = hann_window(n_fft, waveforms.device, dtype)
    spectrum = torch.stft(waveforms.to(dtype), n_fft, hop_length, window=window, return_complex=True)[..., :-1]
    power = spectrum.abs().square().float().contiguous()
    log_power = (filters.T @ power).clamp(min=POWER_FLOOR).log10()
    return compress(log_power, log_power.amax(dim=(1, 2), keepdim=True))


@dataclass(frozen=True)
class MelFilters:
    """A filter bank in the two forms that the transforms want.

    Attributes:
        whole: float32 (bins, bands).
        groups: (first band, end, first bin, end, weights): neighbouring bands, the bins any of them sees, and their
            weights, float32 (bands, 2 * bins), each bin's twice: for its real and for its imaginary part.
    """

    whole: torch.Tensor
    groups: tuple[tuple[int, int, int, int, torch.Tensor], ...]

    @classmethod
    def of(cls, whole: torch.Tensor) -> MelFilters:
        """Group the bands of `whole`, float32 (bins, bands): a band sees few bins, so most products would be zero."""
        used = whole.cpu().numpy() != 0
        groups = []
        for bands in np.array_split(np.arange(whole.shape[1]), min(_BAND_GROUPS, whole.shape[1])):
            first, last = int(bands[0]), int(bands[-1]) + 1
            bins = np.flatnonzero(used[:, first:last].any(axis=1))
            low, high = (int(bins[0]), int(bins[-1]) + 1) if bins.size else (0, 1)
            weights = whole[low:high, first:last].T.repeat_interleave(2, dim=1).contiguous()
            groups.append((first, last, low, high, weights))
        return cls(whole.contiguous(), tuple(groups))


class _Workspace:
    """Memory for one block of frames, used again for every block: fresh pages would cost as much as the transform.

    The views of it that a block takes are kept, too: taking them anew would be a hundred small calls for each block.
    """

    def __init__(self, most_frames: int, filters: MelFilters, n_fft: int, hop_length: int) -> None:
        most = min(most_frames, _BLOCK_FRAMES)
        self.n_fft, self.hop_length = n_fft, hop_length
        self.groups = filters.groups
        self.window = hann_window(n_fft, torch.device("cpu"), torch.float64)
        self.samples = torch.empty((most - 1) * hop_length + n_fft, dtype=torch.float64)
        self.windowed = torch.empty(most, n_fft, dtype=torch.float64)
        self.power = torch.empty(most, 2 * (n_fft // 2 + 1))
        self.bands = torch.empty(filters.whole.shape[1] * most)
        self._arrange(most)

    def _arrange(self, frames: int) -> None:
        """Take the views for blocks of `frames`."""
        self.frames = frames
        self.block = self.samples[: (frames - 1) * self.hop_length + self.n_fft]
        self.pieces = self.block.unfold(0, self.n_fft, self.hop_length)
        self.windows, self.powers = self.windowed[:frames], self.power[:frames]
        self.mel = self.bands[: len(self.bands) // len(self.power) * frames].view(-1, frames)
        self.products = [
            (weights, self.powers[:, 2 * low : 2 * high].T, self.mel[first:last])
            for first, last, low, high, weights in self.groups
        ]

    def log_power(self, clip: torch.Tensor, length: int, out: torch.Tensor) -> None:
        """Write log10 of the mel power of the first frames of `clip`, extended to `length`, to `out` (mels, frames)."""
        total = out.shape[1]
        frames = -(-total // -(-total // len(self.power)))
        if frames != self.frames:
            self._arrange(frames)
        for start in range(0, total, frames):
            # The last block may begin inside the one before it.
            start = min(start, total - frames)
            _lay_out(clip, length, start * self.hop_length - self.n_fft // 2, self.block)
            torch.mul(self.pieces, self.window, out=self.windows)
            # With out= PyTorch would transform into memory of its own all the same, and copy.
            spectrum = torch.fft.rfft(self.windows)
            self.powers.copy_(torch.view_as_real(spectrum).flatten(1)).square_()
            for weights, power, mel in self.products:
                torch.mm(weights, power, out=mel)
            torch.log10(self.mel, out=out[:, start : start + frames])


def _lay_out(clip: torch.Tensor, length: int, first: int, out: torch.Tensor) -> None:
    """Fill `out` with what `clip` holds from sample `first` on: zeros up to `length`, and mirrored at both ends."""
    end = first + out.shape[0]
    low, high = max(first, 0), min(end, clip.shape[0])
    if low < high:
        out[low - first : high - first] = clip[low:high]
    out[max(low, high) - first :] = 0.0
    if first < 0:
        out[:-first] = _stretch(clip, 1, 1 - first).flip(0)
    if end > length:
        out[length - first :] = _stretch(clip, 2 * length - 1 - end, length - 1).flip(0)


def _stretch(clip: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Samples `start` to `stop` of `clip`, zeros where it has ended."""
    piece = clip[start:stop]
    return torch.nn.functional.pad(piece, (0, stop - start - piece.shape[0]))


def log_mel(
    clips: Sequence[torch.Tensor],
    num_samples: Sequence[int],
    filters: MelFilters,
    n_fft: int,
    hop_length: int,
) -> torch.Tensor | list[torch.Tensor]:
    """Whisper log-mel of clips that are each to be extended by zeros to a length, without computing the silence.

    A frame that lies wholly in the added zeros has the power floor in every band, so only frames that touch the clip
    are computed; the others are set to the value they would have had.

    Args:
        clips: float32 (samples,) each.
        num_samples: For each clip the length to extend it to, at least its own and more than n_fft // 2.
        filters: Of n_fft // 2 + 1 bins, on the clips' device.
        n_fft: Samples a window.
        hop_length: Samples from frame to frame.

    Returns:
        For each clip float32 (mels, frames), frames = frame_count(its length in `num_samples`): one tensor
        (clips, mels, frames) if the lengths are equal, else a list.

    Raises:
        EmptyAudioError: A length is too short to be mirrored at its ends.
    """
    half = n_fft // 2
    if min(num_samples) <= half:
        raise EmptyAudioError(
            f"a clip of {min(num_samples)} samples without padding is too short for a window of {n_fft}: at least "
            f"{half + 1} samples are needed. Use padding='max_length' or 'longest', or pad_to_multiple_of."
        )
    if filters.whole.device.type != "cpu":
        return _log_mel_on_accelerator(clips, num_samples, filters.whole, n_fft, hop_length)
    mels, totals = filters.whole.shape[1], [frame_count(length, n_fft, hop_length) for length in num_samples]
    results: torch.Tensor | list[torch.Tensor]
    if len(set(num_samples)) == 1:
        results = torch.empty(len(clips), mels, totals[0])
    else:
        results = [torch.empty(mels, total) for total in totals]
    workspace = _Workspace(max(1, *totals), filters, n_fft, hop_length)
    for clip, length, mel in zip(clips, num_samples, results, strict=True):
        # The first frame that lies wholly in the added zeros ends the computation.
        touched = min(mel.shape[1], (clip.shape[0] + half - 1) // hop_length + 1)
        if touched:
            workspace.log_power(clip, length, out=mel[:, :touched])
            _compress_in_place(mel, touched)
    return results


def _compress_in_place(mel: torch.Tensor, touched: int) -> None:
    """`compress` the first `touched` frames of log10 power, -inf in silence; the others are set to the floor."""
    computed, floor = mel[:, :touched], torch.tensor(POWER_FLOOR).log10()
    loudest = computed.amax().maximum(floor)
    computed.clamp_(min=(loudest - DYNAMIC_RANGE).maximum(floor))
    # (x + 4) / 4, to the last digit, in one pass.
    torch.add(torch.ones(()), computed, alpha=0.25, out=computed)
    if touched < mel.shape[1]:
        mel[:, touched:] = compress(floor, loudest)


def _log_mel_on_accelerator(
    clips: Sequence[torch.Tensor], num_samples: Sequence[int], filters: torch.Tensor, n_fft: int, hop_length: int
) -> torch.Tensor | list[torch.Tensor]:
    """One batched transform for every length that occurs (launches, not arithmetic, are what costs there)."""
    results: list[torch.Tensor] = [filters] * len(clips)
    for length in sorted(set(num_samples)):
        rows = [row for row, wanted in enumerate(num_samples) if wanted == length]
        batch = filters.new_zeros(len(rows), length)
        for place, row in enumerate(rows):
            batch[place, : clips[row].shape[0]] = clips[row]
        found = plain_log_mel(batch, filters, n_fft, hop_length)
        if len(rows) == len(clips):
            return found
        for row, mel in zip(rows, found, strict=True):
            results[row] = mel
    return results
