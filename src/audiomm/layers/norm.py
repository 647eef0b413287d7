"""RMSNorm, in float32 inside, with or without a scale; as a module, and as plain functions for decode steps.

Source: "Root Mean Square Layer Normalization", arXiv:1910.07467. The weight multiplies directly (no "1 + weight").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import fused


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


#: Rows (..., width), and where they lie with their room beside them, (..., width + 1); None where there is none.
Roomy = tuple[Tensor, Tensor | None]


def roomy(*sizes: int, eps: float, like: Tensor, dtype: torch.dtype = torch.float32) -> Roomy:
    """Unwritten rows of these sizes on the device of `like` and, where it is of use, their room.

    They are float32, and of `dtype` where norms are kernels.

    The room of a row is the number root(width * eps) behind it: the length of both is what RMSNorm divides by, but for
    root(width), and need not be worked out from that of the row.
    """
    if has_norm_kernel(like.device):
        return like.new_empty(sizes, dtype=dtype), None
    if torch.compiler.is_compiling():
        return like.new_empty(sizes, dtype=torch.float32), None
    *others, width = sizes
    whole = like.new_full((*others, width + 1), (width * eps) ** 0.5, dtype=torch.float32)
    return whole.narrow(-1, 0, width), whole


def quick_norm(weight: Tensor, eps: float) -> Callable[..., Tensor]:
    """RMSNorm of (..., width) with a weight (width,) in as few operations as its device allows; of the weight's dtype.

    The answer takes rows and, where they have it, their room with the same eps, as `Roomy` holds them. On the CPU
    root(mean(x^2) + eps) is taken as the length of x and its room, over root(width), which the weight takes in: a copy,
    so whoever keeps the answer watches the weight.
    """
    shape, dtype = (len(weight),), weight.dtype
    if has_norm_kernel(weight.device):
        rms_norm, precise = functional.rms_norm, weight.float()

        def fused(hidden: Tensor, whole: Tensor | None = None) -> Tensor:
            if hidden.dtype == dtype:
                return rms_norm(hidden, shape, weight, eps)
            return rms_norm(hidden, shape, precise, eps).to(dtype)

        return fused
    size_of, scale = quick_size(len(weight), eps), whole_scale(weight)
    if dtype == torch.float32:
        return lambda hidden, whole=None: (hidden * scale).div_(size_of(hidden, whole))
    return lambda hidden, whole=None: (hidden * scale).div_(size_of(hidden, whole)).to(dtype)


def quick_added_norm(weight: Tensor, eps: float, times: float = 1.0) -> Callable[..., Tensor]:
    """A function that writes base + times * RMSNorm(made) to `base`, and gives it back; see `quick_norm`.

    It takes the base, what was made, which may be written over, and the room of this.
    """
    if fused.has_kernels(weight):
        return lambda base, made, whole=None: fused.norm_added(base, made, weight, eps, times=times)
    if has_norm_kernel(weight.device):
        norm = quick_norm(weight, eps)
        return lambda base, made, whole=None: base.add_(norm(made), alpha=times)
    size_of, add = quick_size(len(weight), eps), measured_added(weight, times)
    return lambda base, made, whole=None: add(base, made, size_of(made, whole))


def quick_measure(width: int, eps: float, device: torch.device) -> Callable[..., Tensor]:
    """What RMSNorm without a weight makes of (..., width), or by what it divides it; see `quick_norm`.

    Several rows are measured at once, wherever each is used then: by `measured_added` or `measured_product`.
    """
    if not has_norm_kernel(device):
        return quick_size(width, eps)
    shape, rms_norm = (width,), functional.rms_norm
    return lambda hidden, whole=None: rms_norm(hidden, shape, None, eps)


def measured_added(weight: Tensor, times: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function that writes base + times * RMSNorm(made) to `base`, and gives it back.

    It takes the base; what was made, which may be written over; and the `quick_measure` of this.
    """
    if has_norm_kernel(weight.device):
        precise = weight.float() * times
        return lambda base, made, measure: base.addcmul_(measure, precise)
    scale = whole_scale(weight) * times

    def spelled_out(base: Tensor, made: Tensor, measure: Tensor) -> Tensor:
        scaled = made.mul_(scale) if made.dtype == scale.dtype else made * scale
        return base.addcdiv_(scaled, measure)

    return spelled_out


def both_added(first: Tensor, second: Tensor) -> Callable[..., Tensor]:
    """`measured_added` for two things that were made: both are measured at once where they lie in one place.

    Args:
        first, second: The weights.

    Returns:
        From the base, both that were made, the place (2, ..., width) that both are in or None, and a `quick_measure` to
        the base.
    """
    adds = measured_added(first), measured_added(second)
    is_fused = has_norm_kernel(first.device)
    scales = None if is_fused else torch.stack((whole_scale(first), whole_scale(second)))[:, None]

    def add(base: Tensor, made: tuple[Tensor, Tensor], place: Roomy | None, measure: Callable[..., Tensor]) -> Tensor:
        if place is None:
            for one, add_one in zip(made, adds, strict=True):
                add_one(base, one, measure(one))
        elif scales is None:
            for one, add_one, measured in zip(made, adds, measure(*place).unbind(0), strict=True):
                add_one(base, one, measured)
        else:
            size = measure(*place)
            place[0].mul_(scales).div_(size)
            base.add_(made[0]).add_(made[1])
        return base

    return add


def measured_product(weight: Tensor, matrix: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """RMSNorm, then a small matrix (outputs, width): (rows, width) and its `quick_measure` to (rows, outputs), float32.

    The norm's weight lies in a copy of the matrix.
    """
    multiply = torch.mm
    if has_norm_kernel(weight.device):
        weighted = (matrix * weight).t()
        return lambda hidden, measure: multiply(measure, weighted)
    scaled = (matrix * whole_scale(weight)).t()
    return lambda hidden, measure: multiply(hidden, scaled).div_(measure)


def whole_scale(weight: Tensor) -> Tensor:
    """What norms on the CPU multiply with before they divide by `quick_size`, float32."""
    return weight.float() * len(weight) ** 0.5


def quick_size(width: int, eps: float, dimensions: int | tuple[int, ...] = -1) -> Callable[..., Tensor]:
    """root(width) times what RMSNorm over dimensions of `width` numbers in all divides by, float32; for the CPU."""
    room = torch.tensor((width * eps) ** 0.5, dtype=torch.float32)
    vector_norm, precise = torch.linalg.vector_norm, torch.float32

    def size(hidden: Tensor, whole: Tensor | None = None) -> Tensor:
        if whole is not None:
            return vector_norm(whole, 2, dimensions, True)
        if hidden.dtype == precise:
            return vector_norm(hidden, 2, dimensions, True).hypot_(room)
        return vector_norm(hidden, 2, dimensions, True, dtype=precise).hypot_(room)

    return size
