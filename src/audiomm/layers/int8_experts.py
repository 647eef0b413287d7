"""Experts in 8-bit weights with a scale for every output; tokens are rounded once and go to their experts in groups.

Each expert's weights are multiplied where they lie. What becomes of a token does not depend on the tokens beside it, as
with `Int8Linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional

from .experts import Experts, gated
from .quantized import quantise_weight, round_rows, whole_product


class Int8Experts(nn.Module):
    """`Experts` that were quantised; they cannot be trained.

    Args:
        count: Number of experts.
        width: Size of a token.
        hidden: Inner size of one expert.
        device: Of the weights, which come with `take_gate_up_proj` and `take_down_proj`.
    """

    gate_up_proj: Tensor
    gate_up_scale: Tensor
    down_proj: Tensor
    down_scale: Tensor

    def __init__(self, count: int, width: int, hidden: int, device: Any = None) -> None:
        super().__init__()
        self.count = count
        for name, outputs, inputs in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
            shape = (count, outputs, inputs)
            self.register_buffer(f"{name}_proj", torch.empty(shape, dtype=torch.int8, device=device))
            self.register_buffer(f"{name}_scale", torch.empty(shape[:2], dtype=torch.float32, device=device))

    @classmethod
    def empty_like(cls, experts: Experts) -> Int8Experts:
        """Experts of the same sizes, on the same device, without weights."""
        count, width, hidden = experts.down_proj.shape
        return cls(count, width, hidden, experts.down_proj.device)

    def take_gate_up_proj(self, tensor: Tensor, device: Any, dtype: torch.dtype) -> None:
        """Round weights (experts, 2 x hidden, width) to 8 bits; called while loading."""
        self.gate_up_proj, self.gate_up_scale = _rounded(tensor, device)

    def take_down_proj(self, tensor: Tensor, device: Any, dtype: torch.dtype) -> None:
        """Round weights (experts, width, hidden) to 8 bits; called while loading."""
        self.down_proj, self.down_scale = _rounded(tensor, device)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Experts:
        # As in `Int8Linear`: scales stay as exact as they are.
        scales = {name: getattr(self, name) for name in ("gate_up_scale", "down_scale")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if not scale.is_meta:
                setattr(self, name, scale.to(self.down_proj.device))
        return self

    def waits(self, tokens: int) -> bool:
        """`Experts.waits`."""
        return self.down_proj.is_cuda

    # As `torch.compiler.disable`, which imports the compiler at once and so made two seconds of `import`.
    @_disable_dynamo
    def forward(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`Experts.forward`: (tokens, width) with weights and choice (tokens, active) to (tokens, width)."""
        active, flat = chosen.shape[1], chosen.flatten()
        order = flat.argsort(stable=True)
        tokens, ends = order // active, flat.bincount(minlength=self.count).cumsum(0).tolist()
        whole, factor = round_rows(hidden, hidden.abs().amax(dim=1, keepdim=True))
        made = torch.empty(len(flat), hidden.shape[1], device=hidden.device)
        first = 0
        for expert, end in enumerate(ends):
            if end > first:
                own = tokens[first:end]
                inner = gated(_product(whole[own], factor[own], self.gate_up_proj[expert], self.gate_up_scale[expert]))
                rounded = round_rows(inner, inner.abs().amax(dim=1, keepdim=True))
                made[order[first:end]] = _product(*rounded, self.down_proj[expert], self.down_scale[expert])
                first = end
        # A sum in a fixed order is the same from run to run.
        return (made.unflatten(0, (-1, active)) * weights[..., None]).sum(dim=1).to(hidden.dtype)


def _rounded(stack: Tensor, device: Any) -> tuple[Tensor, Tensor]:
    """Weights (experts, outputs, inputs) as int8, and a scale for every output."""
    whole, scale = quantise_weight(stack.detach().flatten(0, 1))
    return whole.view(stack.shape).to(device), scale.view(stack.shape[:2]).to(device)


def _product(whole: Tensor, factor: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What rounded rows are mapped to, float32; on other devices than the CPU without whole-number products."""
    if whole.is_cpu:
        return whole_product(whole, factor, weight, scale, None)
    return functional.linear(whole * factor, weight * scale[:, None])
