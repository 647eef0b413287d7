"""WhisperFeatureExtractor: 16 kHz mono clips to 80 or 128 log-mel bands, 100 frames a second, in windows of 30 s.

The numbers are those of openai-whisper's `log_mel_spectrogram`, the arguments those of transformers.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..base.errors import ConfigError, EmptyAudioError, InputError
from .base import BatchFeature, SequenceFeatureExtractor, require_positive
from .mel import MelFilters, frame_count, log_mel, mel_filter_bank

logger = logging.getLogger("audiomm.feature_extraction")

#: Upper edge of the last mel band, Hz.
_MAX_FREQUENCY_HZ = 8000.0


class WhisperFeatureExtractor(SequenceFeatureExtractor):
    """Clips to Whisper's log-mel features.

    Args:
        feature_size: Mel bands: 80, or 128 for large-v3 and turbo.
        sampling_rate: Samples a second.
        hop_length: Samples from frame to frame.
        chunk_length: Seconds of a window, what clips are padded and cut to.
        n_fft: Samples a frame.
        padding_value: What clips are extended with; 0 is silence.
        dither: Standard deviation of noise added to the clips; 0 adds none.
        return_attention_mask: Whether batches carry a mask of real frames unless the call says otherwise.
        padding_side: "right" or "left".
        **extra: Unknown keys, kept and written back.

    Attributes:
        n_samples: Samples of a window.
        nb_max_frames: Frames of a window.
        mel_filters: float64 (n_fft // 2 + 1, feature_size).

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    model_input_names: ClassVar[list[str]] = ["input_features"]
    time_axis: ClassVar[int] = -1
    derived: ClassVar[frozenset[str]] = frozenset({"extra", "mel_filters"})

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        chunk_length: int = 30,
        n_fft: int = 400,
        padding_value: float = 0.0,
        dither: float = 0.0,
        return_attention_mask: bool = False,
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        for computed in ("n_samples", "nb_max_frames"):
            extra.pop(computed, None)
        super().__init__(feature_size, sampling_rate, padding_value, padding_side, return_attention_mask, **extra)
        require_positive(hop_length=hop_length, n_fft=n_fft, chunk_length=chunk_length)
        if not dither >= 0.0:
            raise ConfigError(f"dither={dither!r}: a number of at least 0 is needed.")
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.chunk_length = chunk_length
        self.dither = dither
        self.n_samples = chunk_length * sampling_rate
        self.nb_max_frames = self.n_samples // hop_length
        self.mel_filters = mel_filter_bank(
            1 + n_fft // 2, feature_size, 0.0, _MAX_FREQUENCY_HZ, sampling_rate, norm="slaney", mel_scale="slaney"
        )
        self._filters: dict[torch.device, MelFilters] = {}

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        padding: bool | str | None = "max_length",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        do_normalize: bool | None = None,
        device: str | torch.device | None = None,
        return_token_timestamps: bool = False,
        pad_mode: Literal["waveform", "logmel"] = "waveform",
        **ignored: Any,
    ) -> BatchFeature:
        """Features of one clip or of a batch.

        Args:
            raw_speech: One mono clip (array, tensor, list of numbers), or a batch: a list of clips, or a 2-D array
                (clips, samples). Integers are scaled by their type.
            truncation: Cut clips at `max_length`, with a warning that says what is lost.
            pad_to_multiple_of: Round padded lengths, in samples, up to a multiple of this.
            return_tensors: "pt", "np", or None (numpy, one array, or a list of arrays when frames differ).
            return_attention_mask: Add the mask of real frames; None follows the setting.
            padding: "max_length", "longest" or True, "do_not_pad" or False.
            max_length: Samples to pad and cut to; None is a window, `n_samples`.
            sampling_rate: Of the clips; another than the extractor's is an error, None is a warning.
            do_normalize: Shift and scale each clip to mean 0 and variance 1 first.
            device: Where to compute; None is where a tensor lies, else the CPU. With return_tensors="pt" the result
                stays there.
            return_token_timestamps: Add `num_frames`, the real frames of each clip.
            pad_mode: "waveform" pads clips with silence before the transform, as transformers and openai-whisper's
                `pad_or_trim` do; "logmel" pads the finished log-mel with 0.0, as openai-whisper's `transcribe` does.
            **ignored: Anything else is named in a warning and not used.

        Returns:
            input_features float32 (batch, feature_size, frames); attention_mask int32 (batch, frames) if wanted;
            num_frames int64 (batch,) if wanted.

        Raises:
            SampleRateError: `sampling_rate` is not the extractor's.
            EmptyAudioError: A clip has no samples.
            InputError: Audio, padding or lengths that cannot be used; its subclasses say which.
        """
        if ignored:
            logger.warning("WhisperFeatureExtractor does not know and does not use %s.", ", ".join(sorted(ignored)))
        self.check_sampling_rate(sampling_rate)
        if pad_mode not in ("waveform", "logmel"):
            raise InputError(f"pad_mode={pad_mode!r}: accepted are 'waveform' and 'logmel'.")
        clips = self.read_clips(raw_speech, device)
        if not clips or any(clip.shape[0] == 0 for clip in clips):
            row = next((row for row, clip in enumerate(clips) if clip.shape[0] == 0), 0)
            raise EmptyAudioError(f"clip {row} of {len(clips)} has no samples; at least 1 is needed.")
        whole = [clip.shape[0] for clip in clips]
        lengths, padded = self.padded_lengths(
            whole, padding, max_length or self.n_samples, truncation, pad_to_multiple_of
        )
        self.tell_what_is_cut(whole, lengths)
        clips = [clip[:length] for clip, length in zip(clips, lengths, strict=True)]
        if do_normalize:
            clips = [_normalized(clip) for clip in clips]
        rows = self._mel_padded(clips, padded) if pad_mode == "logmel" else self._waveform_padded(clips, padded)
        batch: dict[str, Any] = {"input_features": _stacked(rows)}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            frames = [row.shape[-1] for row in rows]
            batch["attention_mask"] = _stacked(
                [self._mask(*sizes).to(clips[0].device) for sizes in zip(lengths, padded, frames, strict=True)]
            )
        if return_token_timestamps:
            batch["num_frames"] = torch.tensor(
                [length // self.hop_length for length in lengths], device=clips[0].device
            )
        if return_tensors is None:
            return BatchFeature({name: _as_numpy(value) for name, value in batch.items()})
        return BatchFeature(batch, tensor_type=return_tensors)

    def _device_filters(self, device: torch.device) -> MelFilters:
        """The filters in float32 on `device`, made once."""
        if device not in self._filters:
            with torch.inference_mode(False):
                whole = torch.from_numpy(self.mel_filters).to(device=device, dtype=torch.float32)
                self._filters[device] = MelFilters.of(whole)
        return self._filters[device]

    def _waveform_padded(self, clips: list[torch.Tensor], padded: list[int]) -> torch.Tensor | list[torch.Tensor]:
        """Log-mel of clips extended with `padding_value`."""
        filters = self._device_filters(clips[0].device)
        plain = self.dither == 0.0 and self.padding_value == 0.0 and self.padding_side == "right"
        if not plain:
            clips = [self._extended(clip, length) for clip, length in zip(clips, padded, strict=True)]
            if self.dither != 0.0:
                noise = torch.randn(len(clips), max(padded), device=clips[0].device)
                clips = [clip + self.dither * row[: clip.shape[0]] for clip, row in zip(clips, noise, strict=True)]
        return log_mel(clips, padded, filters, self.n_fft, self.hop_length)

    def _mel_padded(self, clips: list[torch.Tensor], padded: list[int]) -> list[torch.Tensor]:
        """Log-mel of clips followed by silence, then 0.0 for every frame after the last whole hop of each clip."""
        if self.dither != 0.0:
            clips = [clip + self.dither * torch.randn_like(clip) for clip in clips]
        silence = 2 * self.n_fft
        spoken = [clip.shape[0] + silence for clip in clips]
        rows = log_mel(clips, spoken, self._device_filters(clips[0].device), self.n_fft, self.hop_length)
        result = []
        for row, clip, length in zip(rows, clips, padded, strict=True):
            real = frame_count(clip.shape[0], self.n_fft, self.hop_length)
            missing = frame_count(length, self.n_fft, self.hop_length) - real
            sides = (missing, 0) if self.padding_side == "left" else (0, missing)
            result.append(torch.nn.functional.pad(row[:, :real], sides))
        return result

    def _extended(self, clip: torch.Tensor, length: int) -> torch.Tensor:
        missing = length - clip.shape[0]
        sides = (missing, 0) if self.padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(clip, sides, value=self.padding_value)

    def _mask(self, length: int, padded: int, frames: int) -> torch.Tensor:
        """int32 (frames,): 1 where a frame's centre lies on a real sample."""
        centres = torch.arange(frames) * self.hop_length
        real = centres < length if self.padding_side == "right" else centres >= padded - length
        return real.to(torch.int32)


def _normalized(clip: torch.Tensor) -> torch.Tensor:
    """`clip` with mean 0 and variance 1; numpy's pairwise sums, whose last digits quiet bands can see."""
    samples = clip.cpu().numpy()
    return (clip - float(samples.mean())) / float(np.sqrt(samples.var() + 1e-7))


def _stacked(rows: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor when the rows have one shape, else the rows."""
    if isinstance(rows, torch.Tensor):
        return rows
    if len(rows) == 1:
        return rows[0][None]
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def _as_numpy(value: torch.Tensor | list[torch.Tensor]) -> np.ndarray | list[np.ndarray]:
    return [row.cpu().numpy() for row in value] if isinstance(value, list) else value.cpu().numpy()
