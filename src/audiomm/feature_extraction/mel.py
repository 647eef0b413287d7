"""Log-mel spectrograms: windows, framing, mel filter banks, and the fast and the obvious way to put them together.

The numbers are those of openai-whisper's `log_mel_spectrogram` (whisper/audio.py); the filter banks follow Slaney's
Auditory Toolbox (linear below 1 kHz, logarithmic above) and O'Shaughnessy's formula, which HTK uses. On a CPU the
spectrum is computed block by block, so that frames, spectrum and power stay in the cache; `plain_log_mel` is the slow
twin that says the same in six lines and is what a GPU runs. The Fourier transform is taken in float64: in float32 the
rounding of loud bins shows in quiet ones (2e-5 of the result, and differently on every processor).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from ..base.errors import ConfigError, EmptyAudioError

#: Smallest power that is told from silence: log10 of it is the floor of an all-silent clip.
POWER_FLOOR = 1e-10
#: Range below the loudest bin that is kept, in powers of ten (80 dB).
DYNAMIC_RANGE = 8.0

#: Frames computed at once on a CPU: 256 x 400 float64 samples and their spectrum (0.8 MB each) stay in a core's cache.
_BLOCK_FRAMES = 256

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


def _mel_power(source: torch.Tensor, filters: torch.Tensor, n_fft: int, hop_length: int, out: torch.Tensor) -> None:
    """Write the mel power of `source`'s frames into `out` (mels, frames), a block of frames at a time."""
    frames = source.unfold(0, n_fft, hop_length)
    window = hann_window(n_fft, source.device, torch.float64)
    total = out.shape[1]
    windowed = torch.empty(min(_BLOCK_FRAMES, total), n_fft, dtype=torch.float64)
    for start in range(0, total, _BLOCK_FRAMES):
        stop = min(start + _BLOCK_FRAMES, total)
        block = windowed[: stop - start].copy_(frames[start:stop]).mul_(window)
        spectrum = torch.view_as_real(torch.fft.rfft(block)).float()
        real, imaginary = spectrum[..., 0], spectrum[..., 1]
        power = real.square().addcmul_(imaginary, imaginary)
        out[:, start:stop] = (power @ filters).T


def _centred(clip: torch.Tensor, num_samples: int, half: int, stop: int) -> torch.Tensor:
    """`clip`, then zeros up to `num_samples`, mirrored by `half` samples at both ends; the first `stop` of these."""
    if stop <= half + num_samples:  # the mirrored right end is not reached: no need to lay out all the zeros
        body = torch.nn.functional.pad(clip, (0, max(0, stop - half - clip.shape[0])))
        missing = max(0, half + 1 - body.shape[0])
        head = torch.nn.functional.pad(body[: half + 1], (0, missing))[1:]
        return torch.cat([head.flip(0), body])[:stop]
    body = torch.nn.functional.pad(clip, (0, num_samples - clip.shape[0]))
    return torch.nn.functional.pad(body[None], (half, half), mode="reflect")[0, :stop]


def log_mel(
    clips: Sequence[torch.Tensor],
    num_samples: Sequence[int],
    filters: torch.Tensor,
    n_fft: int,
    hop_length: int,
) -> list[torch.Tensor]:
    """Whisper log-mel of clips that are each to be extended by zeros to a length, without computing the silence.

    A frame that lies wholly in the added zeros has the power floor in every band, so only frames that touch the clip
    are computed; the others are set to the value they would have had.

    Args:
        clips: float32 (samples,) each.
        num_samples: For each clip the length to extend it to, at least its own and more than n_fft // 2.
        filters: float32 (n_fft // 2 + 1, mels) on the clips' device.
        n_fft: Samples a window.
        hop_length: Samples from frame to frame.

    Returns:
        For each clip float32 (mels, frames), frames = frame_count(its length in `num_samples`).

    Raises:
        EmptyAudioError: A length is too short to be mirrored at its ends.
    """
    half = n_fft // 2
    if min(num_samples) <= half:
        raise EmptyAudioError(
            f"a clip of {min(num_samples)} samples without padding is too short for a window of {n_fft}: at least "
            f"{half + 1} samples are needed. Use padding='max_length' or 'longest', or pad_to_multiple_of."
        )
    if filters.device.type != "cpu":
        return _log_mel_on_accelerator(clips, num_samples, filters, n_fft, hop_length)
    filters = filters.contiguous()
    results = []
    for clip, length in zip(clips, num_samples, strict=True):
        total = frame_count(length, n_fft, hop_length)
        touched = min(total, (clip.shape[0] + half - 1) // hop_length + 1)
        mel = torch.empty(filters.shape[1], total)
        if total == 0:
            results.append(mel)
            continue
        source = _centred(clip, length, half, stop=(touched - 1) * hop_length + n_fft)
        computed = mel[:, :touched]
        _mel_power(source, filters, n_fft, hop_length, out=computed)
        computed.clamp_(min=POWER_FLOOR).log10_()
        loudest = computed.amax()
        torch.maximum(computed, loudest - DYNAMIC_RANGE, out=computed).add_(4.0).div_(4.0)
        if touched < total:
            mel[:, touched:] = compress(torch.tensor(POWER_FLOOR).log10(), loudest)
        results.append(mel)
    return results


def _log_mel_on_accelerator(
    clips: Sequence[torch.Tensor], num_samples: Sequence[int], filters: torch.Tensor, n_fft: int, hop_length: int
) -> list[torch.Tensor]:
    """One batched transform for every length that occurs (launches, not arithmetic, are what costs there)."""
    results: list[torch.Tensor] = [filters] * len(clips)
    for length in sorted(set(num_samples)):
        rows = [row for row, wanted in enumerate(num_samples) if wanted == length]
        batch = filters.new_zeros(len(rows), length)
        for place, row in enumerate(rows):
            batch[place, : clips[row].shape[0]] = clips[row]
        for row, mel in zip(rows, plain_log_mel(batch, filters, n_fft, hop_length), strict=True):
            results[row] = mel
    return results
