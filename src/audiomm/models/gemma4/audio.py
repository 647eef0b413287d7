"""Gemma 4's audio tower: log-mel frames to soft tokens of 40 ms, through two convolutions and a conformer.

Argument, output and weight names are those of transformers. A recording can be encoded as a stream: no token depends
on more than 30 ms beyond its own, and what the layers need of the past is little.

Source: Universal Speech Model, arXiv:2303.01037.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...base.errors import ConfigError, ShapeError
from ...base.modeling import PreTrainedModel
from ...base.outputs import ModelOutput
from ...feature_extraction.frame_stream import FrameStream
from ...feature_extraction.usm import Gemma4AudioFeatureExtractor
from ...layers.clipped_linear import ClippedLinear
from ...layers.conformer import (
    AudioStream,
    HalfStepFeedForward,
    LayerState,
    LightConv,
    LinearFactory,
    LocalAttention,
    StageState,
    SubsampleStage,
    bounded,
    fresh_layer,
    initialise_part,
    plain_linear,
)
from ...layers.norm import RMSNorm
from ...layers.regions import bucket, recorded, recorder
from .config import Gemma4AudioConfig

#: The keys are scaled by softplus(1) / softplus(0), a constant the model was trained with.
_KEY_SCALE = math.log1p(math.e) / math.log(2.0)


@dataclass
class Gemma4AudioModelOutput(ModelOutput):
    """last_hidden_state (batch, tokens, width); attention_mask bool (batch, tokens), True where a token is real."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_mask: Tensor | None = None


@dataclass
class StreamState:
    """What the tower remembers of a stream."""

    stages: tuple[StageState, StageState] = field(default_factory=lambda: (StageState(), StageState()))
    layers: list[LayerState] = field(default_factory=list)


def clipped(config: Gemma4AudioConfig) -> LinearFactory:
    """Makes the linear layers that have bounds, if the configuration wants them."""
    return lambda wide_in, wide_out: ClippedLinear(wide_in, wide_out, clipped=config.use_clipped_linears)


class Gemma4AudioSubSampleConvProjection(nn.Module):
    """Two convolutions, four frames to one, and a map to the tower's width."""

    def __init__(self, config: Gemma4AudioConfig) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = self._stage(1, first, config.rms_norm_eps)
        self.layer1 = self._stage(first, second, config.rms_norm_eps)
        # As published a quarter of the first convolution's channels is also a quarter of the mel bands.
        self.bands = first // 4
        self.input_proj_linear = plain_linear(self.bands * second, config.hidden_size)

    @staticmethod
    def _stage(wide_in: int, wide_out: int, eps: float) -> SubsampleStage:
        return SubsampleStage((wide_in, wide_out), (3, 3), (2, 2), (1, 1), nn.LayerNorm(wide_out, eps, bias=False))

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, frames, bands) and a mask of real frames -> (batch, tokens, width) and a mask of real tokens."""
        rows = frames[:, None]
        for stage in (self.layer0, self.layer1):
            rows = stage(rows * mask[:, None, :, None].to(rows.dtype))
            mask = mask[:, ::2]
        return self._project(rows), mask

    def piece(self, frames: Tensor, states: tuple[StageState, StageState], last: bool) -> Tensor:
        """The tokens that the next frames of a stream complete."""
        return self._project(self.layer1(self.layer0(frames[:, None], states[0], last), states[1], last))

    def _project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.input_proj_linear(rows.permute(0, 2, 3, 1).flatten(2))
        return projected


class Gemma4AudioAttention(LocalAttention):
    """Local attention over 12 tokens, the own among them, and the map behind it."""

    def __init__(self, config: Gemma4AudioConfig) -> None:
        past = config.attention_context_left - 1
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            chunk=config.attention_chunk_size,
            past=past,
            reach=past - 1,
            cap=config.attention_logit_cap,
            key_scale=_KEY_SCALE,
            farthest=(config.attention_chunk_size + past) // 2,
            masked_score=config.attention_invalid_logits_value,
            linear=clipped(config),
        )
        self.post = clipped(config)(self.width, self.width)
        self.relative_k_proj = plain_linear(self.width, self.width)

    def position_projection(self) -> nn.Linear:
        return self.relative_k_proj

    def forward(self, hidden: Tensor, valid: Tensor, state: LayerState | None = None) -> Tensor:
        mapped: Tensor = self.post(super().forward(hidden, valid, state))
        return mapped


class Gemma4AudioLayer(nn.Module):
    """Half step, attention, light convolution, half step, norm."""

    def __init__(self, config: Gemma4AudioConfig) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        width, linear = config.hidden_size, clipped(config)
        self.feed_forward1 = HalfStepFeedForward(width, config.residual_weight, self.limit, linear)
        self.feed_forward2 = HalfStepFeedForward(width, config.residual_weight, self.limit, linear)
        self.self_attn = Gemma4AudioAttention(config)
        self.lconv1d = LightConv(width, config.conv_kernel_size, self.limit, config.rms_norm_eps, linear)
        self.norm_pre_attn = RMSNorm(width)
        self.norm_post_attn = RMSNorm(width)
        self.norm_out = RMSNorm(width)

    def forward(self, hidden: Tensor, valid: Tensor, state: LayerState | None = None) -> Tensor:
        """(batch, tokens, width) -> the same; `valid` bool (batch, tokens)."""
        hidden = self.feed_forward1(hidden)
        attended = self.self_attn(self.norm_pre_attn(bounded(hidden, self.limit)), valid, state)
        hidden = hidden + self.norm_post_attn(bounded(attended, self.limit))
        hidden = self.feed_forward2(self.lconv1d(hidden, state))
        normed: Tensor = self.norm_out(bounded(hidden, self.limit))
        return normed


class Gemma4AudioModel(PreTrainedModel):
    """The audio tower of E2B and E4B: (batch, frames, 128) log-mel to (batch, tokens, 1536), 4 frames a token."""

    config_class = Gemma4AudioConfig
    config: Gemma4AudioConfig
    base_model_prefix: ClassVar[str] = "model.audio_tower"
    main_input_name: ClassVar[str] = "input_features"
    ignored_weights: ClassVar[tuple[str, ...]] = (r"model\.", r"lm_head\.")
    no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma4AudioLayer",)

    def __init__(self, config: Gemma4AudioConfig) -> None:
        super().__init__(config)
        if config.attention_context_right != 0:
            raise ConfigError(
                f"attention_context_right={config.attention_context_right}: accepted is 0; the tower attends to what "
                "was heard, never to what is to come."
            )
        self.subsample_conv_projection = Gemma4AudioSubSampleConvProjection(config)
        self.layers = nn.ModuleList(Gemma4AudioLayer(config) for _ in range(config.num_hidden_layers))
        self.output_proj = nn.Linear(config.hidden_size, config.output_proj_dims)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        initialise_part(module, self.config.initializer_range)

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **ignored: Any,
    ) -> Gemma4AudioModelOutput:
        """Soft tokens of a batch of clips.

        Args:
            input_features: (batch, frames, bands), padded at the right.
            attention_mask: bool or 0/1 (batch, frames), True where a frame is real; None when all are.
            output_hidden_states: Add what went into each layer, and the result.
            **ignored: `return_dict` and the like.

        Raises:
            ShapeError: Features or mask have another shape.
        """
        mask = self._checked_mask(input_features, attention_mask)
        if recorder() is not None and not output_hidden_states:
            frames = mask.shape[1]
            missing, tokens = bucket(frames) - frames, -(-frames // 4)
            padded = functional.pad(input_features, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
            made = recorded(self, ("last_hidden_state", "attention_mask"), *padded)
            if made is not None:
                hidden, mask = (one[:, :tokens] for one in made)
                return Gemma4AudioModelOutput(last_hidden_state=hidden, attention_mask=mask)
        hidden, mask = self.subsample_conv_projection(input_features, mask)
        states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            states += (hidden,)
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
        hidden = self.output_proj(hidden)
        return Gemma4AudioModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attention_mask=mask,
        )

    def _checked_mask(self, features: Tensor, mask: Tensor | None) -> Tensor:
        needed = self.subsample_conv_projection.bands
        if features.dim() != 3 or features.shape[1] == 0 or (features.shape[2] + 3) // 4 != needed:
            raise ShapeError(
                f"input_features has shape {tuple(features.shape)}: (clips, frames, {4 * needed}), at least 1 frame, "
                "is needed."
            )
        if mask is None:
            return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if mask.shape != features.shape[:2]:
            raise ShapeError(
                f"attention_mask has shape {tuple(mask.shape)}: {tuple(features.shape[:2])}, (clips, frames) of "
                "input_features, is needed."
            )
        return mask.to(device=features.device, dtype=torch.bool)

    # ------------------------------------------------------------------ streams

    def fresh_stream(self) -> StreamState:
        """The state of a stream that has heard nothing."""
        layers = (cast(Gemma4AudioLayer, layer) for layer in self.layers)
        return StreamState(layers=[fresh_layer(layer.self_attn, layer.lconv1d) for layer in layers])

    def stream(self, extractor: Gemma4AudioFeatureExtractor | None = None) -> Gemma4StreamingAudioEncoder:
        """A recording encoded while it goes on, with the features of `extractor`; None is the published one."""
        return Gemma4StreamingAudioEncoder(self, extractor)

    def encode_piece(self, frames: Tensor, state: StreamState, last: bool) -> Tensor:
        """(1, frames, bands), the next of a stream -> (1, tokens, width), the tokens that they complete."""
        hidden = self.subsample_conv_projection.piece(frames, state.stages, last)
        if hidden.shape[1] == 0:
            return hidden.new_zeros(1, 0, self.config.output_proj_dims)
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for layer, memory in zip(self.layers, state.layers, strict=True):
            hidden = layer(hidden, valid, memory)
        projected: Tensor = self.output_proj(hidden)
        return projected


class Gemma4StreamingAudioEncoder(AudioStream):
    """A recording encoded while it goes on, equal to the tower's answer for the whole.

    Args:
        tower: The audio tower.
        extractor: Its feature extractor; None is one with the published settings.
    """

    def __init__(self, tower: Gemma4AudioModel, extractor: Gemma4AudioFeatureExtractor | None = None) -> None:
        super().__init__(tower, FrameStream(extractor or Gemma4AudioFeatureExtractor(), device=tower.device))
