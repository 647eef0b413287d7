"""Gemma 4 12B ("unified"): the text stack, and in place of towers a linear layer on pixels and one on samples.

Source: the model card of Gemma 4 12B. Who sees whom is what it is in the other sizes, in every kind of call; in
transformers 5.23 training and generation differ from generation with a static cache.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.config import PreTrainedConfig
from ...base.errors import InputError, ShapeError
from .audio import Gemma4AudioModelOutput
from .heads import Gemma4ForCausalLM
from .media import Gemma4FeatureOutput, Gemma4MultimodalEmbedder
from .modeling import Gemma4ForConditionalGeneration, Gemma4Model
from .text import Gemma4TextModel
from .variants import Gemma4UnifiedConfig, Gemma4UnifiedTextConfig, Gemma4UnifiedVisionConfig
from .weights import UNIFIED_NAMES


class Gemma4UnifiedVisionEmbedder(nn.Module):
    """One square of pixels to one token: norm, linear, norm, plus a learned position for each axis, norm."""

    def __init__(self, config: Gemma4UnifiedVisionConfig, width: int) -> None:
        super().__init__()
        self.side = config.patch_size * config.pooling_kernel_size
        values, inner = 3 * self.side**2, config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(values)
        self.patch_dense = nn.Linear(values, inner)
        self.patch_ln2 = nn.LayerNorm(inner)
        self.pos_embedding = nn.Parameter(torch.empty(config.mm_posemb_size, 2, inner))
        self.pos_norm = nn.LayerNorm(inner)
        self.multimodal_embedder = Gemma4MultimodalEmbedder(config.output_proj_dims, width, config.rms_norm_eps)

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """States before the last embedder, (images, squares, inner width).

        Args:
            pixel_values: (images, squares, values).
            positions: (images, squares, 2) column and row of each square, -1 for padding.

        Raises:
            ShapeError: Squares of another size.
        """
        values = self.patch_dense.in_features
        if pixel_values.shape[-1] != values:
            raise ShapeError(
                f"pixel_values is of shape {tuple(pixel_values.shape)}; (images, squares, {values}) is needed: "
                f"squares of {self.side} x {self.side} pixels in 3 colours. Gemma4UnifiedProcessor makes "
                "them; Gemma4Processor is for the other sizes."
            )
        weight = self.patch_dense.weight
        hidden = self.patch_ln2(self.patch_dense(self.patch_ln1(pixel_values.to(weight.dtype))))
        columns, rows = positions.clamp(min=0).unbind(dim=-1)
        places = self.pos_embedding[columns, 0] + self.pos_embedding[rows, 1]
        normed: Tensor = self.pos_norm(hidden + places)
        return normed


class Gemma4UnifiedModel(Gemma4Model):
    """Embedders and text stack, without a head."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedConfig
    config: Gemma4UnifiedConfig
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = UNIFIED_NAMES

    def add_media_parts(self, config: Any) -> None:
        width = config.text_config.hidden_size
        if config.vision_config is not None:
            self.embed_vision = Gemma4UnifiedVisionEmbedder(config.vision_config, width)
        if config.audio_config is not None:
            samples = config.audio_config.audio_embed_dim
            self.embed_audio = Gemma4MultimodalEmbedder(samples, width, config.audio_config.rms_norm_eps)

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, Gemma4UnifiedVisionEmbedder):
            module.pos_embedding.normal_(std=self.config.initializer_range)

    def get_image_features(
        self, pixel_values: Tensor, image_position_ids: Tensor | None = None, **flags: Any
    ) -> Gemma4FeatureOutput:
        """Features of images.

        Args:
            pixel_values: (images, squares, values) in 0..1, padded squares included.
            image_position_ids: (images, squares, 2) column and row of each square, -1 for padding.

        Returns:
            pooler_output: one (tokens, width) tensor an image.
        """
        self.require("embed_vision", "image")
        if image_position_ids is None:
            raise InputError("image_position_ids were not passed: the processor makes them together with pixel_values.")
        embedder: Any = self.embed_vision
        hidden = embedder(pixel_values, image_position_ids)
        features = embedder.multimodal_embedder(hidden)
        real = (image_position_ids >= 0).all(dim=-1)
        items = tuple(image[valid] for image, valid in zip(features, real, strict=True))
        return Gemma4FeatureOutput(last_hidden_state=hidden, pooler_output=items)

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **flags: Any
    ) -> Gemma4AudioModelOutput:
        """Features of clips.

        Args:
            input_features: (clips, frames, samples of a frame).
            input_features_mask: (clips, frames), True where a frame is real; None: all are.

        Returns:
            pooler_output (clips, frames, width) and attention_mask (clips, frames).

        Raises:
            ShapeError: Frames of another size: features of the other sizes' extractor, for one.
        """
        self.require("embed_audio", "audio")
        samples = self.config.audio_config.audio_embed_dim
        if input_features.dim() != 3 or input_features.shape[-1] != samples:
            raise ShapeError(
                f"input_features is of shape {tuple(input_features.shape)}; (clips, frames, {samples}) is needed, raw "
                f"samples, {samples} to a frame. Gemma4UnifiedProcessor makes them; Gemma4Processor makes log-mel "
                "frames for the other sizes."
            )
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(input_features.shape[:2], dtype=torch.bool)
        return Gemma4AudioModelOutput(
            pooler_output=self.embed_audio(input_features), attention_mask=input_features_mask.bool()
        )


class Gemma4UnifiedForConditionalGeneration(Gemma4ForConditionalGeneration):
    """Text, pictures, video and sound in; text out."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedConfig
    config: Gemma4UnifiedConfig
    model_class: ClassVar[type[Gemma4Model]] = Gemma4UnifiedModel
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = UNIFIED_NAMES


class Gemma4UnifiedTextModel(Gemma4TextModel):
    """The text stack of the 12B alone."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedTextConfig
    config: Gemma4UnifiedTextConfig


class Gemma4UnifiedForCausalLM(Gemma4ForCausalLM):
    """The text stack of the 12B alone and its head."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedTextConfig
    config: Gemma4UnifiedTextConfig
