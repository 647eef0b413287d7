"""Gemma4UnifiedAudioFeatureExtractor: the samples themselves, 640 a token, for the Gemma that has no audio encoder."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch.nn import functional

from ..base.errors import ConfigError, EmptyAudioError
from .base import BatchFeature, SequenceFeatureExtractor, require_positive

logger = logging.getLogger("audiomm.feature_extraction")


class Gemma4UnifiedAudioFeatureExtractor(SequenceFeatureExtractor):
    """Clips cut into frames of raw samples; each frame becomes one soft token (40 ms as published).

    Args:
        feature_size: Samples a frame; the same number as `audio_samples_per_token`.
        sampling_rate: Samples a second.
        padding_value: What frames are added with when a batch is padded.
        audio_samples_per_token: Samples a frame.
        padding_side: "right" or "left".
        **extra: Unknown keys, kept and written back.

    Raises:
        ConfigError: A value is mistyped, or the two sizes of a frame differ.

    Source: transformers 5.23.
    """

    model_input_names: ClassVar[list[str]] = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 640,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        audio_samples_per_token: int = 640,
        return_attention_mask: bool = True,
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, padding_side, return_attention_mask, **extra)
        require_positive(audio_samples_per_token=audio_samples_per_token)
        if feature_size != audio_samples_per_token:
            raise ConfigError(
                f"feature_size={feature_size} and audio_samples_per_token={audio_samples_per_token} both are the "
                "samples of a frame: pass the same number."
            )
        self.audio_samples_per_token = audio_samples_per_token

    def frame_count(self, num_samples: int) -> int:
        """Frames, and so soft tokens, of a clip of so many samples."""
        return -(-num_samples // self.audio_samples_per_token)

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str | None = "longest",
        max_length: int | None = None,
        truncation: bool = True,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = True,
        sampling_rate: int | None = None,
        device: str | torch.device | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """Frames of one clip or of a batch.

        Args:
            raw_speech: One mono clip, or a batch; see `UsmFeatureExtractor`.
            padding: "longest" or True, "max_length", "do_not_pad" or False.
            max_length: Frames (not samples) to cut to; None cuts nothing.
            truncation: Cut clips at `max_length`, with a warning that says what is lost.
            return_tensors: "pt", "np", or None (a list of numpy arrays for each entry).
            pad_to_multiple_of: Round padded lengths, in frames, up to a multiple of this.
            return_attention_mask: Add `input_features_mask`; None follows the setting.
            sampling_rate: Of the clips; another than the extractor's is an error.
            device: Where the result of return_tensors="pt" lies.
            **ignored: Anything else is named in a warning and not used.

        Returns:
            input_features float32 (batch, frames, feature_size); input_features_mask bool (batch, frames), True where
            a frame is real.

        Raises:
            SampleRateError: `sampling_rate` is not the extractor's.
            EmptyAudioError: A clip has no samples.
            InputError: Audio, padding or lengths that cannot be used; its subclasses say which.
        """
        if ignored:
            logger.warning("%s does not know and does not use %s.", type(self).__name__, ", ".join(sorted(ignored)))
        if sampling_rate is not None:
            self.check_sampling_rate(sampling_rate)
        clips = self.read_clips(raw_speech, device)
        if not clips or any(clip.shape[0] == 0 for clip in clips):
            row = next((row for row, clip in enumerate(clips) if clip.shape[0] == 0), 0)
            raise EmptyAudioError(f"clip {row} of {len(clips)} has no samples; at least 1 is needed.")
        size = self.audio_samples_per_token
        lengths = [self.frame_count(clip.shape[0]) for clip in clips]
        cut = truncation and max_length is not None
        kept, padded = self.padded_lengths(lengths, padding, max_length, cut, pad_to_multiple_of)
        rows, masks = [], []
        for place, (clip, length, used, final) in enumerate(zip(clips, lengths, kept, padded, strict=True)):
            if used < length:
                logger.warning(
                    "clip %d has %d frames of %d samples and is cut to max_length: only the first %d are heard.",
                    place, length, size, used,
                )  # fmt: skip
            frames = functional.pad(clip, (0, length * size - clip.shape[0])).view(length, size)[:used]
            sides = (final - used, 0) if self.padding_side == "left" else (0, final - used)
            rows.append(functional.pad(frames, (0, 0, *sides), value=self.padding_value))
            masks.append(functional.pad(torch.ones(used, dtype=torch.bool, device=clip.device), sides))
        batch: dict[str, Any] = {"input_features": rows}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            batch["input_features_mask"] = masks
        if return_tensors is None:
            return BatchFeature({name: [row.cpu().numpy() for row in value] for name, value in batch.items()})
        return BatchFeature(batch, tensor_type=return_tensors)
