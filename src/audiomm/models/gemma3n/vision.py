"""The vision tower of Gemma 3n: MobileNetV5 with multi-scale fusion, without timm.

Module names are timm's, which the checkpoint uses; so are the dicts by which `model_args` may describe other stages.
Source: "MobileNetV4", arXiv:2404.10518, for the blocks; the fusion of two scales is MobileNetV5's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...base.errors import ConfigError, InputError, ShapeError
from ...base.modeling import PreTrainedModel
from ...base.outputs import ModelOutput
from ...layers.attention import attend
from ...layers.norm import RMSNorm
from ...layers.regions import recorded
from .config import Gemma3nVisionConfig

#: Channels that come out of the tower, and how much the fusion widens in between.
_FUSED_CHANNELS, _FUSION_RATIO = 2048, 2.0
_LAYER_SCALE = 1e-5


@dataclass
class Gemma3nVisionOutput(ModelOutput):
    """last_hidden_state (pictures, 2048, rows, columns); hidden_states, one a stage, where they are asked for."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# ---------------------------------------------------------------------- parts


class Conv2d(nn.Conv2d):
    """A convolution without padding arguments: what comes out is the input's size divided by the stride, rounded up.

    Weights are brought to the dtype of the input, so that a float16 model can run it in float32.
    """

    def __init__(
        self, inputs: int, outputs: int, side: int, stride: int = 1, *, groups: int = 1, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, side, stride, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, outputs, ceil(height / stride), ceil(width / stride))."""
        side, stride = self.kernel_size[0], self.stride[0]
        weight = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if stride == 1:
            return functional.conv2d(input, weight, bias, 1, side // 2, 1, self.groups)
        missing = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in input.shape[-2:]]
        (top, left), (bottom, right) = (m // 2 for m in missing), (m - m // 2 for m in missing)
        return functional.conv2d(
            functional.pad(input, (left, right, top, bottom)), weight, bias, stride, 0, 1, self.groups
        )


class ChannelNorm(RMSNorm):
    """RMSNorm over the channels of (rows, channels, height, width), and GELU behind it where `active`."""

    def __init__(self, channels: int, *, active: bool = False) -> None:
        super().__init__(channels)
        self.active = active

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype; with channels last in memory nothing is copied."""
        weight = None if self.weight is None else self.weight.to(hidden.dtype)
        last = functional.rms_norm(hidden.permute(0, 2, 3, 1), (self.width,), weight, self.eps)
        if self.active:
            last = functional.gelu(last, approximate="tanh")
        return last.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution, norm and, where `active`, GELU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int = 1,
        stride: int = 1,
        *,
        active: bool = False,
        each: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(inputs, outputs, side, stride, groups=inputs if each else 1, bias=bias)
        self.bn = ChannelNorm(outputs, active=active)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, outputs, ...)."""
        output: Tensor = self.bn(self.conv(hidden))
        return output


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), _LAYER_SCALE))

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype."""
        return hidden * self.gamma.to(hidden.dtype).view(-1, 1, 1)


# ---------------------------------------------------------------------- blocks


class EdgeResidual(nn.Module):
    """A widening convolution, then one that narrows; the first stage is made of these."""

    def __init__(self, inputs: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        stride, outputs = spec["stride"], _rounded(spec["out_chs"])
        wide = _rounded(inputs * spec["exp_ratio"])
        self.conv_exp = Conv2d(inputs, wide, spec.get("exp_kernel_size", 3), stride)
        self.bn1 = ChannelNorm(wide, active=True)
        self.conv_pwl = Conv2d(wide, outputs, spec.get("pw_kernel_size", 1))
        self.bn2 = ChannelNorm(outputs)
        self.skip = _skips(inputs, outputs, spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, out_chs, height / stride, width / stride)."""
        changed: Tensor = self.bn2(self.conv_pwl(self.bn1(self.conv_exp(hidden))))
        return hidden + changed if self.skip else changed


class InvertedResidual(nn.Module):
    """Widen, look around channel by channel, narrow; with another look before where there is `dw_start`."""

    def __init__(self, inputs: int, spec: Mapping[str, Any], *, scaled: bool = True) -> None:
        super().__init__()
        stride, outputs = spec["stride"], _rounded(spec["out_chs"])
        start, middle = spec["dw_kernel_size_start"], spec["dw_kernel_size_mid"]
        wide = _rounded(inputs * spec["exp_ratio"])
        # The stride is at the middle look; without one it is at the first.
        first_stride = 1 if middle else stride
        self.dw_start = ConvNorm(inputs, inputs, start, first_stride, each=True) if start else nn.Identity()
        self.pw_exp = ConvNorm(inputs, wide, active=True)
        self.dw_mid = ConvNorm(wide, wide, middle, stride, active=True, each=True) if middle else nn.Identity()
        self.pw_proj = ConvNorm(wide, outputs)
        self.layer_scale = LayerScale(outputs) if scaled else nn.Identity()
        self.skip = _skips(inputs, outputs, spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, out_chs, height / stride, width / stride)."""
        changed: Tensor = self.layer_scale(self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(hidden)))))
        return hidden + changed if self.skip else changed


class Projection(nn.Module):
    """A linear map of the channels; keys and values of some blocks are thinned out before it."""

    def __init__(self, inputs: int, outputs: int, side: int = 0, stride: int = 1) -> None:
        super().__init__()
        if stride > 1:
            self.down_conv = Conv2d(inputs, inputs, side, stride, groups=inputs)
            self.norm = ChannelNorm(inputs)
        self.thins = stride > 1
        self.proj = Conv2d(inputs, outputs, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, outputs, ...)."""
        output: Tensor = self.proj(self.norm(self.down_conv(hidden)) if self.thins else hidden)
        return output


class MultiQueryAttention(nn.Module):
    """Every place looks at every place; all heads share one key and one value a place."""

    def __init__(self, inputs: int, outputs: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.key_width, self.value_width = spec["num_heads"], spec["key_dim"], spec["value_dim"]
        side, stride = spec.get("dw_kernel_size", 3), spec.get("kv_stride", 1)
        self.query = Projection(inputs, self.heads * self.key_width)
        self.key = Projection(inputs, self.key_width, side, stride)
        self.value = Projection(inputs, self.value_width, side, stride)
        self.output = Projection(self.heads * self.value_width, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, outputs, height, width)."""
        rows, _, height, width = hidden.shape
        # As the keys are shared, heads are so many more queries: one long list of them keeps the fused kernels fast.
        queries = self.query(hidden).permute(0, 2, 3, 1).reshape(rows, 1, -1, self.key_width)
        keys = self.key(hidden).permute(0, 2, 3, 1).reshape(rows, 1, -1, self.key_width)
        values = self.value(hidden).permute(0, 2, 3, 1).reshape(rows, 1, -1, self.value_width)
        seen = attend(queries, keys, values, scale=self.key_width**-0.5)
        output: Tensor = self.output(seen.reshape(rows, height, width, -1).permute(0, 3, 1, 2))
        return output


class MobileAttention(nn.Module):
    """Attention as a block: norm, multi-query attention, layer scale."""

    def __init__(self, inputs: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        outputs = _rounded(spec["out_chs"])
        self.norm = ChannelNorm(inputs)
        self.attn = MultiQueryAttention(inputs, outputs, spec)
        self.layer_scale = LayerScale(outputs)
        self.skip = _skips(inputs, outputs, spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, inputs, height, width) -> (rows, out_chs, height, width)."""
        changed: Tensor = self.layer_scale(self.attn(self.norm(hidden)))
        return hidden + changed if self.skip else changed


class MultiScaleFusion(nn.Module):
    """The last two stages at the finer one's size, mixed, and brought to a fixed number of places."""

    def __init__(self, inputs: int, side: int) -> None:
        super().__init__()
        mixing = {
            "out_chs": _FUSED_CHANNELS,
            "exp_ratio": _FUSION_RATIO,
            "stride": 1,
            "dw_kernel_size_start": 0,
            "dw_kernel_size_mid": 0,
            "noskip": True,
        }
        self.ffn = InvertedResidual(inputs, mixing, scaled=False)
        self.norm = ChannelNorm(_FUSED_CHANNELS)
        self.side = side

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Two maps of different size -> (rows, 2048, side, side)."""
        height, width = fine.shape[-2:]
        mixed = self.ffn(torch.cat((fine, functional.interpolate(coarse, size=(height, width), mode="nearest")), 1))
        if height % self.side or width % self.side:
            mixed = functional.interpolate(mixed, size=(self.side, self.side), mode="bilinear")
        elif (height, width) != (self.side, self.side):
            mixed = functional.avg_pool2d(mixed, (height // self.side, width // self.side))
        output: Tensor = self.norm(mixed)
        return output


_BLOCKS: dict[str, type[nn.Module]] = {"er": EdgeResidual, "uir": InvertedResidual, "mqa": MobileAttention}


# ---------------------------------------------------------------------- the encoder


class MobileNetV5Encoder(nn.Module):
    """A stem, stages of blocks, and the fusion.

    Args:
        block_args: Stages, each a list of blocks as dicts; None is the published encoder, "mobilenetv5_300m_enc".
        stem_size: Channels of the stem.
        msfa_output_resolution: Rows, and columns, of places that come out.
        **others: Further arguments of timm's encoder; only None is accepted.

    Raises:
        ConfigError: Something is described that is not built here.
    """

    def __init__(
        self,
        block_args: list[list[dict[str, Any]]] | None = None,
        stem_size: int = 64,
        msfa_output_resolution: int = 16,
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = {name: value for name, value in others.items() if value is not None}
        if unknown:
            raise ConfigError(f"model_args={unknown}: accepted are block_args, stem_size and msfa_output_resolution.")
        stages = PUBLISHED_STAGES if block_args is None else block_args
        if len(stages) < 2:
            raise ConfigError(f"block_args holds {len(stages)} stages; the fusion needs 2 or more.")
        channels = [_rounded(stem_size)]
        self.conv_stem = ConvNorm(3, channels[0], 3, 2, active=True, bias=True)
        built = []
        for stage in stages:
            blocks, width = _stage(channels[-1], stage)
            built.append(blocks)
            channels.append(width)
        self.blocks = nn.Sequential(*built)
        self.msfa = MultiScaleFusion(channels[-2] + channels[-1], msfa_output_resolution)
        self.gradient_checkpointing = False

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (rows, 3, height, width) to (rows, 2048, side, side), and what stem and stages gave."""
        hidden = self.conv_stem(pixels.contiguous(memory_format=torch.channels_last))
        states = [hidden]
        for stage in self.blocks:
            for block in stage:  # type: ignore[attr-defined]
                if self.gradient_checkpointing and self.training:
                    hidden = checkpoint(block, hidden, use_reentrant=False)
                else:
                    hidden = block(hidden)
            states.append(hidden)
        return self.msfa(states[-2], states[-1]), states


def _stage(inputs: int, specs: Iterable[Mapping[str, Any]]) -> tuple[nn.Sequential, int]:
    """The blocks of a stage, and the channels that come out."""
    blocks = []
    for spec in specs:
        kind = spec.get("block_type")
        unsupported = [name for name in ("se_ratio", "dw_kernel_size_end", "force_in_chs") if spec.get(name)]
        if kind not in _BLOCKS or unsupported:
            raise ConfigError(
                f"block_args holds the block {dict(spec)}: block_type must be one of {', '.join(_BLOCKS)}, without "
                "se_ratio, dw_kernel_size_end and force_in_chs."
            )
        blocks.append(_BLOCKS[kind](inputs, spec))
        inputs = _rounded(spec["out_chs"])
    return nn.Sequential(*blocks), inputs


def _rounded(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, never less than nine tenths of them."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _skips(inputs: int, outputs: int, spec: Mapping[str, Any]) -> bool:
    """Whether a block adds its input to what it gives."""
    return inputs == outputs and spec["stride"] == 1 and not spec.get("noskip")


def _edge(outputs: int, stride: int = 1) -> dict[str, Any]:
    return {"block_type": "er", "out_chs": outputs, "stride": stride, "exp_ratio": 4.0}


def _inverted(outputs: int, ratio: float, start: int = 0, middle: int = 0, stride: int = 1) -> dict[str, Any]:
    return {
        "block_type": "uir",
        "out_chs": outputs,
        "stride": stride,
        "exp_ratio": ratio,
        "dw_kernel_size_start": start,
        "dw_kernel_size_mid": middle,
    }


def _attention(outputs: int, heads: int, width: int, kv_stride: int) -> dict[str, Any]:
    return {
        "block_type": "mqa",
        "out_chs": outputs,
        "stride": 1,
        "num_heads": heads,
        "key_dim": width,
        "value_dim": width,
        "kv_stride": kv_stride,
    }


#: mobilenetv5_300m_enc: 294,126,912 weights with the fusion.
PUBLISHED_STAGES: list[list[dict[str, Any]]] = [
    [_edge(128, stride=2), _edge(128), _edge(128)],
    [_inverted(256, 6.0, 3, 5, stride=2), *(_inverted(256, 4.0, start) for start in (5, 3, 5, 3))],
    [
        _inverted(640, 6.0, 5, 5, stride=2),
        *[_inverted(640, 4.0, 5)] * 7,
        _inverted(640, 1.0),
        *[_attention(640, 12, 64, 2), _inverted(640, 2.0)] * 14,
    ],
    [_inverted(1280, 6.0, 5, 5, stride=2), *[_attention(1280, 16, 96, 1), _inverted(1280, 2.0)] * 19],
]


class Gemma3nVisionModel(PreTrainedModel):
    """The tower as a model of its own; transformers calls it TimmWrapperModel."""

    config_class = Gemma3nVisionConfig
    base_model_prefix: ClassVar[str] = "model.vision_tower"
    main_input_name: ClassVar[str] = "pixel_values"
    ignored_weights: ClassVar[tuple[str, ...]] = (r"model\.", r"lm_head\.")
    no_split_modules: ClassVar[tuple[str, ...]] = ("EdgeResidual", "InvertedResidual", "MobileAttention")
    config: Gemma3nVisionConfig

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        if config.hidden_size != _FUSED_CHANNELS:
            raise ConfigError(f"hidden_size={config.hidden_size}: the vision tower gives {_FUSED_CHANNELS} channels.")
        self.timm_model = MobileNetV5Encoder(**(config.model_args or {}))
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
            module.weight.normal_(std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        elif isinstance(module, LayerScale):
            module.gamma.fill_(_LAYER_SCALE)

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        do_pooling: bool | None = None,
        use_cache: bool | None = None,
    ) -> Gemma3nVisionOutput | tuple[Any, ...]:
        """Encode pictures.

        Args:
            pixel_values: (pictures, 3, height, width), cast to the type of the weights; the published tower was
                trained on 768 x 768, from 0 to 1. A float16 model computes in float32.
            output_attentions: Only None and False: the fused kernels keep no attention weights.
            output_hidden_states: Also what the stem and each stage gave; a list picks some of them.
            return_dict: False returns a tuple.
            do_pooling: Only None and False: this tower has no pooled output.
            use_cache: No effect.

        Raises:
            ShapeError: Not such a batch of pictures.
            InputError: Attention weights or a pooled output are asked for.
        """
        if output_attentions or do_pooling:
            raise InputError("the vision tower gives neither attention weights nor a pooled output; pass False.")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or 0 in pixel_values.shape:
            raise ShapeError(
                f"pixel_values is of shape {tuple(pixel_values.shape)}; (pictures, 3, height, width) is needed. "
                "SiglipImageProcessor makes it."
            )
        dtype = self.dtype
        made = None if output_hidden_states else recorded(self, ("last_hidden_state",), pixel_values)
        if made is not None:
            output = Gemma3nVisionOutput(last_hidden_state=made[0])
            return output.to_tuple() if return_dict is False else output
        features, states = self.timm_model(pixel_values.to(torch.float32 if dtype == torch.float16 else dtype))
        hidden_states = None
        if output_hidden_states:
            wanted = range(len(states)) if output_hidden_states is True else output_hidden_states
            hidden_states = tuple(states[index].to(dtype) for index in wanted)
        output = Gemma3nVisionOutput(last_hidden_state=features.to(dtype), hidden_states=hidden_states)
        return output.to_tuple() if return_dict is False else output
