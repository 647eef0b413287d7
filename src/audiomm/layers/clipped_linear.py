"""ClippedLinear: a linear map between two clamps, whose bounds come with the checkpoint; the towers of Gemma 4.

The bounds are part of the trained model (it was trained with them, for later quantisation), not a safety net. Weight
names are the checkpoint's: `linear.weight`, `input_min`, `input_max`, `output_min`, `output_max`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The buffers of a clipped layer and what they hold until a checkpoint says more.
_BOUNDS = {"input_min": -math.inf, "input_max": math.inf, "output_min": -math.inf, "output_max": math.inf}


class UnclippedPart(nn.Module):
    """y = W x; no nn.Linear, so that tools which adapt all linear layers take the clipped one, and it alone."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Linear(in_features, out_features, bias=False).weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), same dtype."""
        return functional.linear(hidden, self.weight)


class ClippedLinear(nn.Linear):
    """y = clamp(W clamp(x)), without a bias; an nn.Linear, so that tools which adapt linear layers find it.

    Args:
        in_features: Width in.
        out_features: Width out.
        clipped: Whether there are bounds; without them this is a plain linear layer under the same names.
    """

    linear: UnclippedPart
    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, in_features: int, out_features: int, *, clipped: bool = True) -> None:
        nn.Module.__init__(self)  # not Linear's: the weight lies in `linear`, under the checkpoint's name
        self.in_features, self.out_features = in_features, out_features
        self.clipped = clipped
        self.register_parameter("bias", None)
        self.linear = UnclippedPart(in_features, out_features)
        if clipped:
            for name, value in _BOUNDS.items():
                self.register_buffer(name, torch.tensor(value))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features); the same parameter as `linear.weight`."""
        return self.linear.weight

    @torch.no_grad()
    def open_bounds(self) -> None:
        """Set the bounds to infinity, where they are before training."""
        for name in _BOUNDS if self.clipped else ():
            getattr(self, name).fill_(_BOUNDS[name])

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), same dtype."""
        if not self.clipped:
            plain: Tensor = self.linear(hidden)
            return plain
        mapped = self.linear(torch.clamp(hidden, self.input_min, self.input_max))
        return torch.clamp(mapped, self.output_min, self.output_max)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, clipped={self.clipped}"
