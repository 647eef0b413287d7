"""RMSNorm, in float32 inside, with or without a scale; as a module, and as plain functions for decode steps.

Source: "Root Mean Square Layer Normalization", arXiv:1910.07467. The weight multiplies directly (no "1 + weight").
"""

from __future__ import annotations

from collections.abc import Callable

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


def has_norm_kernel(device: torch.device) -> bool:
    """Whether torch norms in one kernel there; on the CPU it makes six operations of it."""
    return device.type != "cpu"


def weight_of(norm: RMSNorm) -> Tensor:
    """The weight (width,), of ones where there is none to learn."""
    return torch.ones(norm.width) if norm.weight is None else norm.weight.detach()


def quick_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """RMSNorm of (..., width) with a weight (width,) in as few operations as its device allows; of the weight's dtype.

    On the CPU root(mean(x^2) + eps) is taken as the hypotenuse of |x| and root(width * eps), over root(width), which
    the weight takes in: a copy, so whoever keeps the answer watches the weight.
    """
    shape, dtype = (len(weight),), weight.dtype
    if has_norm_kernel(weight.device):
        rms_norm, precise = functional.rms_norm, weight.float()

        def fused(hidden: Tensor) -> Tensor:
            if hidden.dtype == dtype:
                return rms_norm(hidden, shape, weight, eps)
            return rms_norm(hidden, shape, precise, eps).to(dtype)

        return fused
    size_of, scale = quick_size(len(weight), eps), weight.float() * len(weight) ** 0.5

    def spelled_out(hidden: Tensor) -> Tensor:
        normed = (hidden * scale).div_(size_of(hidden))
        return normed if normed.dtype == dtype else normed.to(dtype)

    return spelled_out


def quick_added_norm(weight: Tensor, eps: float, share: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of `base` and `hidden`: share * base + RMSNorm(hidden), of the base's dtype; see `quick_norm`."""
    if has_norm_kernel(weight.device):
        norm, add = quick_norm(weight, eps), torch.add

        def fused(base: Tensor, hidden: Tensor) -> Tensor:
            total = add(norm(hidden), base, alpha=share)
            return total if total.dtype == base.dtype else total.to(base.dtype)

        return fused
    size_of, scale = quick_size(len(weight), eps), weight.float() * len(weight) ** 0.5

    def spelled_out(base: Tensor, hidden: Tensor) -> Tensor:
        total = (hidden * scale).div_(size_of(hidden)).add_(base, alpha=share)
        return total if total.dtype == base.dtype else total.to(base.dtype)

    return spelled_out


def quick_size(width: int, eps: float, dimensions: int | tuple[int, ...] = -1) -> Callable[[Tensor], Tensor]:
    """root(width) times what RMSNorm over dimensions of `width` numbers in all divides by, float32; for the CPU."""
    room = torch.tensor((width * eps) ** 0.5, dtype=torch.float32)
    vector_norm, precise = torch.linalg.vector_norm, torch.float32

    def size(hidden: Tensor) -> Tensor:
        if hidden.dtype == precise:
            return vector_norm(hidden, 2, dimensions, True).hypot_(room)
        return vector_norm(hidden, 2, dimensions, True, dtype=precise).hypot_(room)

    return size
