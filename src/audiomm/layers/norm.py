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
    size_of, scale = quick_size(len(weight), eps, dtype), whole_scale(weight)
    if dtype == torch.float32:
        return lambda hidden: (hidden * scale).div_(size_of(hidden))
    return lambda hidden: (hidden * scale).div_(size_of(hidden)).to(dtype)


def quick_added_norm(weight: Tensor, eps: float, times: float = 1.0) -> Callable[..., Tensor]:
    """A function of `base` and `hidden`: base + times * RMSNorm(hidden), of the base's dtype; see `quick_norm`.

    With `out` it is written there.
    """
    if has_norm_kernel(weight.device):
        norm, add = quick_norm(weight, eps), torch.add

        def fused(base: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
            return add(base, norm(hidden), alpha=times, out=out)

        return fused
    size_of, scale, addcdiv = quick_size(len(weight), eps, weight.dtype), whole_scale(weight) * times, torch.addcdiv
    if weight.dtype == torch.float32:

        def in_place(base: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
            size = size_of(hidden)
            return addcdiv(base, hidden.mul_(scale), size, out=out)

        return in_place

    def spelled_out(base: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        total = addcdiv(base, hidden * scale, size_of(hidden), out=out)
        return total if total.dtype == base.dtype else total.to(base.dtype)

    return spelled_out


def quick_norm_product(weight: Tensor, eps: float, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """RMSNorm, then a small matrix (outputs, width): (rows, width) -> (rows, outputs), all float32.

    On the CPU the norm's weight lies in a copy of the matrix.
    """
    multiply = torch.mm
    if has_norm_kernel(weight.device):
        norm, plain = quick_norm(weight, eps), matrix.t()
        return lambda hidden: multiply(norm(hidden), plain)
    size_of, scaled = quick_size(len(weight), eps, torch.float32), (matrix * whole_scale(weight)).t()
    return lambda hidden: multiply(hidden, scaled).div_(size_of(hidden))


def whole_scale(weight: Tensor) -> Tensor:
    """What norms on the CPU multiply with before they divide by `quick_size`, float32."""
    return weight.float() * len(weight) ** 0.5


def quick_size(
    width: int, eps: float, dtype: torch.dtype, dimensions: int | tuple[int, ...] = -1
) -> Callable[[Tensor], Tensor]:
    """root(width) times what RMSNorm over dimensions of `width` numbers in all divides by, float32; for the CPU.

    Args:
        width: How many numbers are normed together.
        eps: Of the norm.
        dtype: Of the model: in float32 everything is of this type, else some states may be.
        dimensions: Of the input, to be normed together.
    """
    room = torch.tensor((width * eps) ** 0.5, dtype=torch.float32)
    vector_norm, precise = torch.linalg.vector_norm, torch.float32
    if dtype == precise:
        return lambda hidden: vector_norm(hidden, 2, dimensions, True).hypot_(room)
    return lambda hidden: vector_norm(hidden, 2, dimensions, True, dtype=precise).hypot_(room)
