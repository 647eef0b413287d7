"""RMSNorm, in float32 inside, with or without a scale.

Source: "Root Mean Square Layer Normalization", arXiv:1910.07467. The weight multiplies directly (no "1 + weight").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, rounded once to the dtype of x.

    Args:
        width: Size of the last dimension.
        eps: Added to the mean square.
        scaled: Whether there is a weight.
    """

    weight: nn.Parameter | None

    def __init__(self, width: int, eps: float = 1e-6, *, scaled: bool = True) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        if scaled:
            self.weight = nn.Parameter(torch.ones(width))
        else:
            self.register_parameter("weight", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., width), same dtype."""
        return functional.rms_norm(hidden, (self.width,), self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, scaled={self.weight is not None}"
