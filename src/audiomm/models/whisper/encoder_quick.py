"""The encoder run straight: one window after the other through plain functions, on the CPU and without gradients.

The states of a window fit into a processor's caches and those of a batch do not, so windows go one by one, and in
blocks of rows where a layer widens them; what becomes of a window does not depend on those beside it. With 8-bit
weights the scores of attention are products of whole numbers, too: queries have a scale for every row, keys one for
every head, after their mean, which no softmax sees, is taken away.

Source: arXiv:1706.03762; whole-number scores and the mean of the keys after arXiv:2410.02367.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.quantization import has_bfloat16_products
from ...layers.projection import has_additions, is_plain, projection
from ...layers.quantized import Int8Linear, round_rows

#: Positions that go through the wide parts of a layer together.
_BLOCK = 512

#: A head whose scores may be further from zero, as exponents of two, reads exactly: their rounding grows with them.
_SAFE_EXPONENT = 64.0

#: No value of gelu lies further below zero.
_LOWEST_GELU = 0.17

Norm = Callable[[Tensor], Tensor]


class QuickEncoder:
    """Maps features (windows, mel bins, frames) to what `WhisperEncoder` makes of them, (windows, positions, width)."""

    def __init__(self, encoder: Any, layers: list[Any], dtype: torch.dtype) -> None:
        table = encoder.embed_positions.weight
        self._layers, self._dtype, self._made_dtype = layers, dtype, table.dtype
        self._positions = table.detach().to(dtype)
        self._norm = _norm(encoder.layer_norm, dtype)
        whole = isinstance(layers[0], WholeLayer)
        product_dtype = torch.bfloat16 if whole and has_bfloat16_products() else dtype
        self._convs = [_taps(conv, product_dtype) for conv in (encoder.conv1, encoder.conv2)]

    @classmethod
    def of(cls, encoder: Any) -> QuickEncoder | None:
        """The quick twin of an encoder; None where it has adapters, hooks, parts elsewhere or another activation."""
        weights = list(encoder.parameters())
        kinds = {(weight.dtype, weight.device.type) for weight in weights}
        if encoder.config.activation_function != "gelu" or len(encoder.layers) == 0 or len(kinds) != 1:
            return None
        dtype, place = kinds.pop()
        if place != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not _is_bare(encoder):
            return None
        whole = all(isinstance(linear, Int8Linear) for layer in encoder.layers for linear in _linears(layer))
        dtype = torch.float32 if whole else dtype
        layers: list[Any] = []
        for layer in encoder.layers:
            products = _products(layer)
            if products is None:
                return None
            layers.append(WholeLayer(layer, products) if whole else FloatLayer(layer, dtype, products))
        return cls(encoder, layers, dtype)

    def __call__(self, features: Tensor) -> Tensor:
        made = torch.empty(len(features), *self._positions.shape, dtype=self._made_dtype)
        for window, out in zip(features, made, strict=True):
            hidden = self._convolve(window)
            for layer in self._layers:
                layer(hidden)
            out.copy_(self._norm(hidden))
        return made

    def _convolve(self, window: Tensor) -> Tensor:
        """(mel bins, frames) -> (positions, width): both convolutions as matrix products over neighbouring frames."""
        rows = window.t()
        for stride, (weight, bias) in enumerate(self._convs, start=1):
            padded = torch.zeros(len(rows) + 2, rows.shape[1], dtype=weight.dtype)
            padded[1:-1] = rows
            width = rows.shape[1]
            near = padded.as_strided((len(rows) // stride, 3 * width), (stride * width, 1)).contiguous()
            rows = torch.ops.aten.gelu_(functional.linear(near, weight, bias))
        return rows.to(self._dtype) + self._positions


class FloatLayer:
    """An encoder layer in float32 or bfloat16; changes the states of a window (positions, width) in place."""

    def __init__(self, layer: Any, dtype: torch.dtype, products: list[Any]) -> None:
        self._norm, self._final_norm = _norm(layer.self_attn_layer_norm, dtype), _norm(layer.final_layer_norm, dtype)
        self._qkv, self._out, self._widen, self._narrow = products
        self._heads = layer.self_attn.heads
        # Without AMX, attention in bfloat16 is the slower and the coarser one.
        self._attention_dtype = dtype if torch.cpu._is_amx_tile_supported() else torch.float32

    def __call__(self, hidden: Tensor) -> None:
        length, width = hidden.shape
        qkv = self._qkv(self._norm(hidden)).to(self._attention_dtype)
        queries, keys, values = qkv.view(length, 3, self._heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
        attended = functional.scaled_dot_product_attention(queries, keys, values)[0]
        hidden += self._out(attended.transpose(0, 1).reshape(length, width).to(hidden.dtype))
        for rows in hidden.split(_BLOCK):
            rows += self._narrow(torch.ops.aten.gelu_(self._widen(self._final_norm(rows))))


class WholeLayer:
    """An encoder layer of 8-bit weights, whose products are of whole numbers but for attention's sum of values."""

    def __init__(self, layer: Any, products: list[Any]) -> None:
        self._norm = _norm(layer.self_attn_layer_norm, torch.float32)
        self._final_norm = _norm(layer.final_layer_norm, torch.float32)
        self._qkv, self._out, self._widen, self._narrow = products
        self._heads, self._head_dim = layer.self_attn.heads, layer.self_attn.head_dim
        self._value_dtype = torch.bfloat16 if has_bfloat16_products() else torch.float32

    def __call__(self, hidden: Tensor) -> None:
        qkv = self._qkv(self._norm(hidden))
        hidden += self._out(self._attend(qkv))
        for rows in hidden.split(_BLOCK):
            wide = torch.ops.aten.gelu_(self._widen(self._final_norm(rows)))
            largest = wide.amax(dim=1, keepdim=True).clamp_(min=_LOWEST_GELU)
            rows += self._narrow.of_rounded(*round_rows(wide, largest))

    def _attend(self, qkv: Tensor) -> Tensor:
        """(positions, 3 x width) -> (positions, width)."""
        length, width = len(qkv), qkv.shape[1] // 3
        # (heads, positions, head_dim) each
        queries, keys, values = qkv.view(length, 3, self._heads, -1).permute(1, 2, 0, 3)
        queries, keys = queries.contiguous(), keys - keys.mean(dim=1, keepdim=True)
        whole_queries, factors = round_rows(queries, queries.abs().amax(dim=2, keepdim=True))
        whole_keys, key_factors = round_rows(keys, keys.abs().amax(dim=(1, 2), keepdim=True))
        # Scores as exponents of two, which are the quicker ones.
        step = math.log2(math.e) * self._head_dim**-0.5
        factors *= key_factors * step
        # No score is larger than the product of the longest query and the longest key of its head.
        reach = queries.norm(dim=2).amax(dim=1) * keys.norm(dim=2).amax(dim=1) * step
        whole_keys, coarse_values = whole_keys.contiguous(), values.to(self._value_dtype).contiguous()
        rows = min(_BLOCK, length)
        summed = torch.empty(rows, length, dtype=torch.int32)
        scores, weights = summed.view(torch.float32), torch.empty(rows, length, dtype=self._value_dtype)
        attended = torch.empty(length, width, dtype=torch.float32)
        for head, (out, exponent) in enumerate(zip(attended.split(self._head_dim, 1), reach.tolist(), strict=True)):
            if exponent > _SAFE_EXPONENT:
                exact = (part[None, None, head] for part in (queries, keys, values))
                out.copy_(functional.scaled_dot_product_attention(*exact)[0, 0])
                continue
            for start in range(0, length, rows):
                end = min(start + rows, length)
                count = end - start
                torch._int_mm(whole_queries[head, start:end], whole_keys[head].t(), out=summed[:count])
                block = scores[:count].copy_(summed[:count]).mul_(factors[head, start:end])
                total = block.exp2_().sum(dim=1, keepdim=True)
                read = torch.mm(weights[:count].copy_(block), coarse_values[head])
                torch.div(read, total, out=out[start:end])
        return attended


def _products(layer: Any) -> list[Any] | None:
    """The products of a layer: queries, keys and values; out; wide; narrow. None where one cannot be had."""
    queries, keys, values, *others = _linears(layer)
    products = [projection(*group, many_rows=True) for group in ((queries, keys, values), *((one,) for one in others))]
    return None if None in products else products


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Norm:
    weight, bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
    return partial(
        functional.layer_norm, normalized_shape=norm.normalized_shape, weight=weight, bias=bias, eps=norm.eps
    )


def _taps(conv: nn.Conv1d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A convolution over three frames as the matrix (out, 3 x in) of a linear map of them, and its bias."""
    assert conv.bias is not None, "the convolutions of Whisper have biases"
    return conv.weight.detach().permute(0, 2, 1).flatten(1).to(dtype).contiguous(), conv.bias.detach().to(dtype)


def _linears(layer: Any) -> list[nn.Module]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.fc1, layer.fc2]


def _is_bare(encoder: nn.Module) -> bool:
    """Whether no part has a hook or another `forward`, which a straight run would pass by."""
    linears = (nn.Linear, Int8Linear)
    return all(is_plain(part) if isinstance(part, linears) else not has_additions(part) for part in encoder.modules())
