"""The gated feed-forward block of Gemma: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from . import fused
from .norm import Roomy
from .quick import product, product_into


class GatedMLP(nn.Module):
    """GeGLU with the tanh form of GELU; module names are the checkpoint's.

    Source: "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        gate = functional.gelu(self.gate_proj(hidden), approximate="tanh")
        output: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return output


def quick_mlp(mlp: GatedMLP) -> Callable[[Tensor, Roomy | None], Roomy]:
    """The block for decode steps, with gate and up in one product; see `product_into`."""
    gate_up, down = product(mlp.gate_proj, mlp.up_proj), product_into(mlp.down_proj)
    join, sizes = gelu_times(mlp.gate_proj.weight), (mlp.gate_proj.out_features, mlp.up_proj.out_features)

    def run(hidden: Tensor, place: Roomy | None) -> Roomy:
        return down(join(*gate_up(hidden).split_with_sizes(sizes, 1)), place)

    return run


def gelu_times(like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of gate and other, (rows, width) each, to gelu(gate) * other, in the tanh form of GELU, for steps.

    Args:
        like: A weight, on whose device this is to run.
    """
    if fused.has_kernels(like):
        return fused.gelu_times
    gelu = functional.gelu
    return lambda gate, other: gelu(gate, approximate="tanh").mul_(other)
