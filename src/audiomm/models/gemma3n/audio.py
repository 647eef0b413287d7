"""Gemma 3n's audio encoder: log-mel frames to soft tokens of 160 ms, through two convolutions and a conformer.

Argument, output and weight names are those of transformers. Two things differ from it, both at the end of clips that
were padded to be batched: frames of nothing but zeros count as absent, before the first convolution and after it, so
that a clip gives the same tokens in a batch as alone; and a recording can be encoded as a stream.

Source: Universal Speech Model, arXiv:2303.01037.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...base.errors import ConfigError, ShapeError
from ...base.modeling import PreTrainedModel
from ...base.outputs import ModelOutput
from ...feature_extraction.frame_stream import FrameStream
from ...feature_extraction.usm import Gemma3nAudioFeatureExtractor
from ...layers.conformer import (
    AudioStream,
    HalfStepFeedForward,
    LayerState,
    LightConv,
    LocalAttention,
    StageState,
    SubsampleStage,
    bounded,
    fresh_layer,
    initialise_part,
    plain_linear,
)
from ...layers.norm import RMSNorm
from ...layers.regions import recorded
from .config import Gemma3nAudioConfig


@dataclass
class Gemma3nAudioEncoderModelOutput(ModelOutput):
    """last_hidden_state (batch, tokens, width), 0 where padded; audio_mel_mask bool (batch, tokens), True = padded."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    audio_mel_mask: Tensor | None = None


@dataclass
class StreamState:
    """What the encoder remembers of a stream."""

    stages: tuple[StageState, StageState] = field(default_factory=lambda: (StageState(), StageState()))
    layers: list[LayerState] = field(default_factory=list)
    #: Conformer tokens made so far.
    tokens: int = 0


class Gemma3nAudioCumulativeGroupNorm(nn.Module):
    """Norm over all channels and frequencies, with the mean and variance of everything heard so far.

    The squares are taken from each row's own running mean, so the variance is not the textbook's; the model was
    trained so. float32 inside.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, hidden: Tensor, state: StageState | None = None) -> Tensor:
        """(batch, time, frequency, channels) -> the same; a state is carried on."""
        values = hidden.float()
        zero = values.new_zeros(values.shape[0], 1)
        total, squares, count = (zero, zero, zero) if state is None or state.totals is None else state.totals
        group = values[0, 0].numel()
        count = count + group * torch.arange(1, values.shape[1] + 1, device=values.device)
        total = total + values.sum(dim=(2, 3)).cumsum(dim=1)
        mean = (total / count)[:, :, None, None]
        centred = values - mean
        squares = squares + centred.square().sum(dim=(2, 3)).cumsum(dim=1)
        variance = (squares / count)[:, :, None, None]
        if state is not None:
            state.totals = (total[:, -1:], squares[:, -1:], count[:, -1:])
        return (centred * torch.rsqrt(variance + self.eps) * self.weight.float()).to(hidden.dtype)


class Gemma3nAudioSSCPConvBlock(SubsampleStage):
    """A convolution that looks ahead in time, its cumulative norm and a ReLU."""

    def normalise(self, hidden: Tensor, state: StageState | None) -> Tensor:
        normed: Tensor = self.norm(hidden, state)
        return normed


class Gemma3nAudioSubSampleConvProjection(nn.Module):
    """Two convolutions, four frames to one, and a map to the encoder's width."""

    def __init__(self, config: Gemma3nAudioConfig) -> None:
        super().__init__()
        channels = [1, *config.sscp_conv_channel_size]
        self.conv_0, self.conv_1 = (
            self._block(config, place, channels[place], channels[place + 1]) for place in range(2)
        )
        bins = config.input_feat_size
        for block in (self.conv_0, self.conv_1):
            bins = (bins + 2 - block.conv.kernel_size[1]) // block.conv.stride[1] + 1
        self.input_proj_linear = plain_linear(bins * channels[-1], config.hidden_size)

    @staticmethod
    def _block(config: Gemma3nAudioConfig, place: int, wide_in: int, wide_out: int) -> Gemma3nAudioSSCPConvBlock:
        height, width = config.sscp_conv_kernel_size[place]
        over_time, over_bins = config.sscp_conv_stride_size[place]
        norm = Gemma3nAudioCumulativeGroupNorm(wide_out, config.sscp_conv_group_norm_eps)
        return Gemma3nAudioSSCPConvBlock(
            (wide_in, wide_out), (height, width), (over_time, over_bins), (0, height - 1), norm
        )

    def forward(self, frames: Tensor, present: Tensor) -> Tensor:
        """(batch, frames, bins) -> (batch, tokens, width).

        Args:
            frames: Log-mel frames.
            present: int64 (batch, 1): so many frames of each clip are there, the rest are padding of the batch.
        """
        first, second = self.conv_0, self.conv_1
        rows = first(frames[:, None])
        stride = first.conv.stride[0]
        there = torch.arange(rows.shape[2], device=rows.device) * stride < present
        # The norm has made something of the absent rows; the next convolution is to see nothing, as in a clip alone.
        return self._project(second(rows * there[:, None, :, None].to(rows.dtype)))

    def piece(self, frames: Tensor, states: tuple[StageState, StageState], last: bool) -> Tensor:
        """The tokens that the next frames of a stream complete."""
        rows = self.conv_0(frames[:, None], states[0], last)
        return self._project(self.conv_1(rows, states[1], last))

    def _project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.input_proj_linear(rows.permute(0, 2, 3, 1).flatten(2))
        return projected


class Gemma3nAudioAttention(LocalAttention):
    """Local attention over 13 tokens, the own among them."""

    def __init__(self, config: Gemma3nAudioConfig) -> None:
        past = config.conf_attention_context_left - 1
        super().__init__(
            config.hidden_size,
            config.conf_num_attention_heads,
            chunk=config.conf_attention_chunk_size,
            past=past,
            reach=past,
            cap=config.conf_attention_logit_cap,
        )
        self.relative_position_embedding = nn.ModuleDict({"pos_proj": plain_linear(self.width, self.width)})

    def position_projection(self) -> nn.Linear:
        return cast(nn.Linear, self.relative_position_embedding["pos_proj"])


class Gemma3nAudioConformerAttention(nn.Module):
    """Attention with its norms and output map, added to its input."""

    def __init__(self, config: Gemma3nAudioConfig) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        self.pre_attn_norm = RMSNorm(config.hidden_size)
        self.attn = Gemma3nAudioAttention(config)
        self.post = plain_linear(config.hidden_size, config.hidden_size)
        self.post_norm = RMSNorm(config.hidden_size)

    def forward(self, hidden: Tensor, valid: Tensor, state: LayerState | None = None) -> Tensor:
        attended = self.post(self.attn(self.pre_attn_norm(bounded(hidden, self.limit)), valid, state))
        step: Tensor = self.post_norm(bounded(attended, self.limit))
        return hidden + step


class Gemma3nAudioConformerBlock(nn.Module):
    """Half step, attention, light convolution, half step, norm."""

    def __init__(self, config: Gemma3nAudioConfig) -> None:
        super().__init__()
        self.limit = config.gradient_clipping
        width = config.hidden_size
        self.ffw_layer_start = HalfStepFeedForward(width, config.conf_residual_weight, self.limit)
        self.attention = Gemma3nAudioConformerAttention(config)
        self.lconv1d = LightConv(width, config.conf_conv_kernel_size, self.limit, config.rms_norm_eps)
        self.ffw_layer_end = HalfStepFeedForward(width, config.conf_residual_weight, self.limit)
        self.norm = RMSNorm(width)

    def forward(self, hidden: Tensor, valid: Tensor, state: LayerState | None = None) -> Tensor:
        """(batch, tokens, width) -> the same; `valid` bool (batch, tokens)."""
        hidden = self.attention(self.ffw_layer_start(hidden), valid, state)
        hidden = self.lconv1d(hidden * valid[:, :, None].to(hidden.dtype), state)
        normed: Tensor = self.norm(bounded(self.ffw_layer_end(hidden), self.limit))
        return normed


class Gemma3nAudioEncoder(PreTrainedModel):
    """The audio tower of Gemma 3n: (batch, frames, 128) log-mel to (batch, tokens, 1536), 16 frames a token."""

    config_class = Gemma3nAudioConfig
    config: Gemma3nAudioConfig
    base_model_prefix: ClassVar[str] = "model.audio_tower"
    main_input_name: ClassVar[str] = "audio_mel"
    ignored_weights: ClassVar[tuple[str, ...]] = (r"model\.", r"lm_head\.")
    no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma3nAudioConformerBlock",)

    def __init__(self, config: Gemma3nAudioConfig) -> None:
        super().__init__(config)
        if config.conf_attention_context_right != 0:
            raise ConfigError(
                f"conf_attention_context_right={config.conf_attention_context_right}: accepted is 0; the encoder "
                "attends to what was heard, never to what is to come."
            )
        self.subsample_conv_projection = Gemma3nAudioSubSampleConvProjection(config)
        self.conformer = nn.ModuleList(Gemma3nAudioConformerBlock(config) for _ in range(config.conf_num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        initialise_part(module, self.config.initializer_range)
        if isinstance(module, Gemma3nAudioCumulativeGroupNorm):
            module.weight.fill_(1.0)

    def forward(
        self,
        audio_mel: Tensor,
        audio_mel_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **ignored: Any,
    ) -> Gemma3nAudioEncoderModelOutput:
        """Soft tokens of a batch of clips.

        Args:
            audio_mel: (batch, frames, input_feat_size), padded at the right.
            audio_mel_mask: bool or 0/1 (batch, frames), True where a frame is PADDED (the opposite of the extractor's
                mask); None when none is.
            output_hidden_states: Add what went into each layer, before the reduction of tokens.
            **ignored: `return_dict` and the like.

        Raises:
            ShapeError: Features or mask have another shape.
        """
        padded = self._checked_mask(audio_mel, audio_mel_mask)
        # By exact length: whether the last token is padding depends on it.
        fields = "last_hidden_state", "audio_mel_mask"
        made = None if output_hidden_states else recorded(self, fields, audio_mel, padded)
        if made is not None:
            return Gemma3nAudioEncoderModelOutput(last_hidden_state=made[0], audio_mel_mask=made[1])
        hidden = self.subsample_conv_projection(audio_mel, _present(audio_mel, padded))
        stride = self.config.sscp_conv_stride_size[0][0] * self.config.sscp_conv_stride_size[1][0]
        places = torch.arange(hidden.shape[1], device=hidden.device) * stride
        padded = padded[:, places.clamp(max=padded.shape[1] - 1)]
        states: tuple[Tensor, ...] = ()
        for block in self.conformer:
            states += (hidden,)
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(block, hidden, ~padded, use_reentrant=False)
            else:
                hidden = block(hidden, ~padded)
        hidden = hidden[:, :: self.config.conf_reduction_factor]
        padded = padded[:, :: self.config.conf_reduction_factor]
        hidden = hidden.masked_fill(padded[:, :, None], 0.0)
        return Gemma3nAudioEncoderModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            audio_mel_mask=padded,
        )

    def _checked_mask(self, audio_mel: Tensor, mask: Tensor | None) -> Tensor:
        bins = self.config.input_feat_size
        if audio_mel.dim() != 3 or audio_mel.shape[2] != bins or audio_mel.shape[1] == 0:
            raise ShapeError(
                f"audio_mel has shape {tuple(audio_mel.shape)}: (clips, frames, {bins}), at least 1 frame, is needed."
            )
        if mask is None:
            return torch.zeros(audio_mel.shape[:2], dtype=torch.bool, device=audio_mel.device)
        if mask.shape != audio_mel.shape[:2]:
            raise ShapeError(
                f"audio_mel_mask has shape {tuple(mask.shape)}: {tuple(audio_mel.shape[:2])}, (clips, frames) of "
                "audio_mel, is needed."
            )
        return mask.to(device=audio_mel.device, dtype=torch.bool)

    # ------------------------------------------------------------------ streams

    def fresh_stream(self) -> StreamState:
        """The state of a stream that has heard nothing."""
        blocks = (cast(Gemma3nAudioConformerBlock, block) for block in self.conformer)
        return StreamState(layers=[fresh_layer(block.attention.attn, block.lconv1d) for block in blocks])

    def encode_piece(self, frames: Tensor, state: StreamState, last: bool) -> Tensor:
        """(1, frames, bins), the next of a stream -> (1, tokens, width), the tokens that they complete."""
        hidden = self.subsample_conv_projection.piece(frames, state.stages, last)
        if hidden.shape[1] == 0:
            return hidden
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for block, layer in zip(self.conformer, state.layers, strict=True):
            hidden = block(hidden, valid, layer)
        factor = self.config.conf_reduction_factor
        first = -state.tokens % factor
        state.tokens += hidden.shape[1]
        return hidden[:, first::factor]


class Gemma3nStreamingAudioEncoder(AudioStream):
    """A recording encoded while it goes on, equal to the encoder's answer for the whole.

    Args:
        tower: The audio encoder.
        extractor: Its feature extractor; None is one with the published settings.
    """

    def __init__(self, tower: Gemma3nAudioEncoder, extractor: Gemma3nAudioFeatureExtractor | None = None) -> None:
        super().__init__(tower, FrameStream(extractor or Gemma3nAudioFeatureExtractor(), device=tower.device))


def _present(frames: Tensor, padded: Tensor) -> Tensor:
    """int64 (batch, 1): frames of each clip up to the last that is not both padded and all zeros."""
    there = ~(padded & (frames == 0).all(dim=-1))
    order = torch.arange(1, frames.shape[1] + 1, device=frames.device)
    return (there * order).amax(dim=1, keepdim=True)
