"""Operations of decode steps that are one kernel each on a GPU, and here spelled out: what those kernels must compute.

Without a GPU, or without Triton, callers have shorter ways of their own; these are the twins that the kernels are tried
beside once a process, and what torch.compile sees, which makes kernels of its own of them. Products, norms alone and
attention to short caches are torch's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger("audiomm.layers.fused")

#: An operation, and what to try it with.
Trial = tuple[Callable[..., Any], tuple[Any, ...]]

#: Relative and absolute difference that a kernel may have from its twin, by dtype.
_TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3e-2, 3e-2)}


def norm_added(
    base: Tensor, made: Tensor, weight: Tensor, eps: float, *, times: float = 1.0, scalar: Tensor | None = None
) -> Tensor:
    """Write scalar * base + times * weight * RMSNorm(made) to `base`, worked out in float32 and rounded once.

    Args:
        base: (n x rows, width), contiguous.
        made: (rows, width), contiguous; added to each of n groups of rows.
        weight: (width,).
        eps: Of the norm.
        scalar: (1,); None is one.

    Returns:
        `base`.
    """
    if is_on_gpu(base):
        return _kernels().norm_added(base, made, weight, eps, times, scalar)
    added = functional.rms_norm(made.float(), weight.shape, weight.float(), eps) * times
    kept = base.float() if scalar is None else base.float() * scalar
    return base.copy_((kept.view(-1, *added.shape) + added).view(base.shape))


def gelu_times(gate: Tensor, other: Tensor) -> Tensor:
    """gelu(gate) * other, both (rows, width) with rows that may lie apart, in the tanh form; new, and contiguous."""
    if is_on_gpu(gate):
        return _kernels().gelu_times(gate, other)
    return functional.gelu(gate, approximate="tanh") * other


def strong_gelu_times(gate: Tensor, other: Tensor, deviations: float) -> Tensor:
    """`gelu_times` of what each gate is beyond so many deviations above the mean of all gates of its row."""
    if is_on_gpu(gate):
        return _kernels().strong_gelu_times(gate, other, deviations)
    precise = gate.float()
    deviation, mean = torch.std_mean(precise, dim=-1, keepdim=True, correction=0)
    strong = (precise - (mean + deviation * deviations)).relu().to(gate.dtype)
    return functional.gelu(strong, approximate="tanh") * other


def turned(heads: Tensor, firsts: Tensor, seconds: Tensor, eps: float) -> Tensor:
    """Norm heads without a weight, and add up their halves, each times its factors, as `heads.HeadFactors` has them.

    Args:
        heads: (rows, sets, groups, 2, width / 2), rows may lie apart; where factors have one set more, the last is
            read twice.
        firsts, seconds: (rows or 1, sets, 1, 2, width / 2) of the first and the second half; rows may lie apart.
        eps: Of the norm.

    Returns:
        (rows, sets of the factors, groups, 2, width / 2), contiguous.
    """
    if is_on_gpu(heads):
        return _kernels().turned(heads, firsts, seconds, eps)
    if firsts.shape[1] > heads.shape[1]:
        heads = torch.cat((heads, heads.narrow(1, -1, 1)), dim=1)
    normed = functional.rms_norm(heads.float(), heads.shape[-2:], None, eps)
    return (normed[..., :1, :] * firsts + normed[..., 1:, :] * seconds).to(heads.dtype)


def attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token a row to many slots of a cache; those that are masked out in a row are not even read.

    Args:
        queries: (rows, heads, width), rows may lie apart.
        keys, values: (rows, kv_heads, slots, width), both with the same strides.
        mask: (rows or 1, 1, 1, slots), added to the scores; no row is without a slot that is seen.

    Returns:
        (rows, heads x width).
    """
    if is_on_gpu(queries):
        return _kernels().attended(queries, keys, values, mask)
    rows, heads, width = queries.shape
    asked = queries.unflatten(1, (keys.shape[1], -1))
    scores = (asked.float() @ keys.float().transpose(-1, -2) + mask.float()).softmax(dim=-1)
    return (scores @ values.float()).to(queries.dtype).view(rows, heads * width)


def expert_gates(hidden: Tensor, gate_up: Tensor, chosen: Tensor) -> Tensor:
    """What goes down in the chosen experts of each token; weights are read where they lie.

    Args:
        hidden: (tokens, width), contiguous.
        gate_up: (experts, 2 x inner, width): gates, then what they let through.
        chosen: (tokens, active) int64, contiguous.

    Returns:
        (tokens, active, inner).
    """
    if is_on_gpu(hidden):
        return _kernels().expert_gates(hidden, gate_up, chosen)
    gate, up = torch.einsum("tw,taiw->tai", hidden, gate_up[chosen]).chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def expert_sum(inner: Tensor, down: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The weighted sum of what the chosen experts make of `expert_gates`.

    Args:
        inner: (tokens, active, inner), contiguous.
        down: (experts, width, inner).
        weights, chosen: (tokens, active), contiguous.

    Returns:
        (tokens, width) of the dtype of `inner`.
    """
    if is_on_gpu(inner):
        return _kernels().expert_sum(inner, down, weights, chosen)
    made = torch.einsum("tai,tawi->taw", inner, down[chosen])
    return (made.float() * weights.float()[..., None]).sum(dim=1).to(inner.dtype)


# ---------------------------------------------------------------------- kernels, and whether they are to be trusted


def has_kernels(like: Tensor) -> bool:
    """Whether there are kernels for the device and the dtype of a tensor.

    There are where Triton is, and where each kernel gave what its twin gives: that is tried once a process, with few
    numbers. A device on which one fails goes without them, after a warning. The environment variable AUDIOMM_KERNELS=0
    turns them off.
    """
    return can_run_kernels(like) and _are_right(like.device, like.dtype)


def can_run_kernels(like: Tensor) -> bool:
    """Whether Triton is there for a tensor's device, kernels are for its dtype, and nobody turned them off."""
    if like.device.type != "cuda" or like.dtype not in _TOLERANCES or os.environ.get("AUDIOMM_KERNELS", "1") == "0":
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


@cache
def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    return agree(device, _trials(device, dtype))


def agree(device: torch.device, trials: Iterator[Trial]) -> bool:
    """Whether operations give on a device what they give on the CPU, to the last of their arguments.

    Args:
        device: Where the arguments are.
        trials: Operations and what to call them with.
    """
    try:
        for operation, arguments in trials:
            expected = operation(*(_on_cpu(argument) for argument in arguments))
            found = operation(*arguments)
            pairs = zip(_tensors(expected), _tensors(found), strict=True)
            if not all(_is_close(one.to(device), other) for one, other in pairs):
                logger.warning("%s: %s gave other numbers there; kernels are left out.", device, operation)
                return False
    except Exception as problem:  # whatever a compiler says: there is a way without
        logger.warning("%s: kernels could not be run there and are left out: %s", device, problem)
        return False
    return True


def _trials(device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    maker = torch.Generator().manual_seed(0)

    def some(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=maker, dtype=torch.float32, device="cpu").to(device, dtype)

    # Sizes that no block divides, and, of experts, with more than one block.
    chosen = torch.tensor([[3, 0], [1, 2], [3, 1]], device=device)
    yield norm_added, (some(6, 40), some(3, 40), some(40), 1e-6)
    yield partial(norm_added, times=0.5, scalar=some(1)), (some(3, 40), some(3, 40), some(40), 1e-6)
    yield gelu_times, some(3, 2200).chunk(2, dim=1)
    yield strong_gelu_times, (*some(3, 96).chunk(2, dim=1), 0.5)
    yield turned, (some(3, 4, 2, 2, 12), *some(3, 10, 1, 2, 12).chunk(2, dim=1), 1e-6)
    yield turned, (some(3, 4, 2, 2, 12), *some(1, 8, 1, 2, 12).chunk(2, dim=1), 1e-6)
    mask = torch.full((3, 1, 1, 300), -torch.inf, device="cpu")
    for row, seen in enumerate((1, 70, 300)):
        mask[row, ..., :seen] = 0.0
    # The widest head there is: what it takes of a card's memory shows here.
    nothing = torch.zeros(1, 1, 1, 40, device=device, dtype=dtype)
    yield attended, (some(1, 2, 512) * 0.1, *some(2, 1, 1, 40, 512), nothing)
    yield attended, (some(3, 10, 12)[:, 2:8], *some(2, 3, 2, 300, 12), mask.to(device, dtype))
    yield expert_gates, (some(3, 300), some(4, 48, 300), chosen)
    yield expert_sum, (some(3, 2, 300), some(4, 20, 300), some(3, 2), chosen)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether an operation on a tensor is to be its kernel: callers have asked `has_kernels` before."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


@cache
def _kernels() -> Any:
    from . import kernels

    module: ModuleType = kernels
    return module


def _on_cpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value)) if type(value) is tuple else type(value)(*map(_on_cpu, value))
    # What is written over must not be what the other side reads.
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _is_close(expected: Tensor, found: Tensor) -> bool:
    relative, absolute = _TOLERANCES[expected.dtype]
    return expected.shape == found.shape and torch.allclose(expected, found, relative, absolute)
