"""The gated feed-forward block of Gemma: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


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
