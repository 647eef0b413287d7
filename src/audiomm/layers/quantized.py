"""Int8Linear: a linear map with 8-bit weights, a scale for every output, and inputs rounded to 8 bits row by row.

Each row of the input has a scale of its own and products are summed as whole numbers, so what becomes of a row does
not depend on the rows beside it. Source: arXiv:2206.01861 (a scale per token), arXiv:2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Largest whole number of 8 bits used, the same on both sides of zero.
_LARGEST = 127.0

#: Results of fewer numbers than this are made with few operations, larger ones with quick ones.
_SMALL = 65536

#: Rows of a weight that are rounded at a time.
_PIECE = 4096


class Int8Linear(nn.Module):
    """A linear map that was quantised; it cannot be trained.

    Args:
        weight: (out_features, in_features) int8.
        scale: (out_features,) float32; weight times scale is the map.
        bias: (out_features,) or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty_like(cls, linear: nn.Linear) -> Int8Linear:
        """A map of the sizes of `linear` and on its device, whose weight comes with `take_weight`."""
        weight = torch.empty_like(linear.weight, dtype=torch.int8)
        bias = None if linear.bias is None else torch.empty_like(linear.bias)
        return cls(weight, weight.new_empty(len(weight), dtype=torch.float32), bias)

    def take_weight(self, tensor: Tensor, device: Any, dtype: torch.dtype) -> None:
        """Round a weight (out_features, in_features) to 8 bits; called while loading."""
        weight, scale = quantise_weight(tensor.detach())
        self.weight, self.scale = weight.to(device), scale.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        # What model.to() and .bfloat16() go through: the scales stay as exact as they are.
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = self.scale if scale.is_meta else scale.to(self.weight.device)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), same dtype."""
        return int8_linear(hidden, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass(frozen=True)
class Int8Product:
    """What a row is multiplied by, outside a module: the parts of one or several Int8Linear."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return int8_linear(hidden, self.weight, self.scale, self.bias)

    def of_rounded(self, whole: Tensor, factor: Tensor) -> Tensor:
        """The product of rows that are rounded already, as `round_rows` gives them: (rows, out) float32."""
        return whole_product(whole, factor, self.weight, self.scale, self.bias)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) weights as int8 and a float32 scale (out,) for every row."""
    whole = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32)
    # In pieces: the table of a large vocabulary in float32 would be a multiple of what it comes to.
    for rows, out, factors in zip(weight.split(_PIECE), whole.split(_PIECE), scale.split(_PIECE), strict=True):
        values = rows.float()
        torch.div(values.abs().amax(dim=1), _LARGEST, out=factors)
        # A row of zeros stays zeros.
        inverse = torch.where(factors > 0, 1 / factors, 0.0)
        out.copy_((values * inverse[:, None]).round_())
    return whole, scale


def int8_linear(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map hidden (..., in): times int8 weight (out, in), times scale (out,), plus bias (out,); same dtype as hidden."""
    if not hidden.is_cpu:
        return functional.linear(hidden, weight.to(hidden.dtype) * scale[:, None].to(hidden.dtype), bias)
    # A decode step is made of calls with one row: what changes nothing is not called.
    flat = hidden.dim() == 2
    rows = hidden if flat else hidden.reshape(-1, hidden.shape[-1])
    mapped = whole_product(*round_rows(rows, rows.abs().amax(dim=1, keepdim=True)), weight, scale, bias)
    if hidden.dtype != torch.float32:
        mapped = mapped.to(hidden.dtype)
    return mapped if flat else mapped.view(*hidden.shape[:-1], len(weight))


def round_rows(rows: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., width) as int8 and the float32 factors (..., 1) that undo it, where `largest` is their largest size.

    A row of zeros comes out as zeros, one with NaN or infinity as NaN once the factor is applied.
    """
    factor = largest.float() * (1 / _LARGEST)
    return torch.div(rows, factor).round_().to(torch.int8), factor


def whole_product(whole: Tensor, factor: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What rounded rows (rows, in) with their factors (rows, 1) are mapped to: (rows, out) float32."""
    summed = torch._int_mm(whole, weight.t())
    # Both say the same: one operation where its start is what takes time, or two where its conversion is.
    summed = summed * factor if summed.numel() < _SMALL else summed.float().mul_(factor)
    return summed.mul_(scale) if bias is None else torch.addcmul(bias.float(), summed, scale, out=summed)
