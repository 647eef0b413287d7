"""Keys and values in 8 bits, with a scale for every head and position: half the memory and traffic of 16 bits.

Numbers and their scales lie in one tensor, so that rows of it are moved and selected like those of any other: first the
numbers of all positions, then the scales, float32 in the bytes of some further positions. Whole numbers are in int8,
float8 (e4m3) in uint8, whose bytes every operation can move. Idea: KIVI's scales for values, arXiv:2402.02750.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..base.errors import GenerationError

#: Name of a way to keep numbers -> the type of the tensor that holds them.
KINDS = {"int8": torch.int8, "fp8": torch.uint8}
#: Type of that tensor -> the largest number in it.
_LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}
_SCALE_BYTES = 4
#: A vector smaller than this counts as zeros.
_TINY = 1e-30


def room_shape(like: Tensor, rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Shape (rows, heads, positions, head_dim) of a tensor for values of some rows; more positions for 8 bits.

    Args:
        like: Values of one row, (positions, heads, head_dim).
        rows: Recordings.
        dtype: Of the tensor.

    Raises:
        GenerationError: Heads are of a width that scales cannot follow.
    """
    positions, heads, width = like.shape
    if not is_rounded(dtype):
        return rows, heads, positions, width
    if width % _SCALE_BYTES:
        raise GenerationError(
            f"keys and values of heads {width} wide cannot be kept in 8 bits, as {width} is not a multiple of "
            f"{_SCALE_BYTES}: leave cross_cache_dtype unset."
        )
    return rows, heads, positions + -(-positions * _SCALE_BYTES // width), width


def room(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A tensor of `room_shape`, not filled."""
    return like.new_empty(room_shape(like, rows, dtype), dtype=dtype)


def is_rounded(dtype: torch.dtype | None) -> bool:
    """Whether it is the type of tensors for values in 8 bits."""
    return dtype in _LARGEST


def store(kept: Tensor, values: Tensor) -> Tensor:
    """Write values (rows, heads, positions, head_dim) to `kept`, a tensor of their shape or of `room_shape`."""
    if not is_rounded(kept.dtype):
        return kept.copy_(values)
    whole, largest = _opened(kept)
    sizes = values.abs().amax(dim=-1).float()
    largest.copy_(sizes)
    scaled = values.float() * (_LARGEST[kept.dtype] / sizes.clamp(min=_TINY))[..., None]
    whole.copy_(scaled.round_() if kept.dtype == torch.int8 else scaled)
    return kept


def exact(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What was stored, (rows, heads, positions, head_dim), as far as it is still known."""
    if not is_rounded(kept.dtype):
        return kept.to(dtype)
    whole, largest = _opened(kept)
    return (whole.float() * (largest / _LARGEST[kept.dtype])[..., None]).to(dtype)


def read_rounded(queries: Tensor, keys: Tensor, values: Tensor, mask: None, *, scale: float) -> Tensor:
    """`attention.read_by_products` of keys and values in 8 bits; all of them are seen.

    Args:
        queries: (rows, heads, head_dim); n adjacent rows may share one row of keys.
        keys, values: Of `room_shape`.
        mask: None.
        scale: Factor on the scores.

    Returns:
        (rows, heads x head_dim), of the queries' dtype.
    """
    rows, heads, width = queries.shape
    folded = queries.reshape(len(keys), -1, heads, width).transpose(1, 2)
    # No sum of products with numbers up to 127 or 448 must leave float16: queries are made small beforehand.
    limit = _LARGEST[keys.dtype]
    # What is part of something that is being compiled is compiled with it.
    read: Callable[..., Tensor] = _by_sums
    if not torch.compiler.is_compiling():
        read = _compiled() if queries.device.type == "cuda" else _by_products
    attended = read(folded * (scale / limit), *_opened(keys), *_opened(values)) / limit
    return attended.transpose(1, 2).reshape(rows, heads * width).to(queries.dtype)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.utils._triton import has_triton

    return torch.compile(_by_sums, dynamic=True) if has_triton() else _by_products


def _opened(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (rows, heads, positions, head_dim), and the largest of each vector (rows, heads, positions); views."""
    total, width = kept.shape[2:]
    positions = total * width // (width + _SCALE_BYTES)
    whole, scales = kept.split((positions, total - positions), dim=2)
    if kept.dtype == torch.uint8:
        whole = whole.view(torch.float8_e4m3fn)
    return whole, scales.flatten(2).view(torch.float32)[..., :positions]


def _by_products(queries: Tensor, keys: Tensor, key_sizes: Tensor, values: Tensor, value_sizes: Tensor) -> Tensor:
    """Queries (rows, heads, n, head_dim) to what they read, by matrix products in their type."""
    dtype = queries.dtype
    scores = (queries @ keys.to(dtype).transpose(-1, -2)).float() * key_sizes[:, :, None]
    return (scores.softmax(dim=-1) * value_sizes[:, :, None]).to(dtype) @ values.to(dtype)


def _by_sums(queries: Tensor, keys: Tensor, key_sizes: Tensor, values: Tensor, value_sizes: Tensor) -> Tensor:
    """`_by_products` as sums that a compiler makes one pass over the 8-bit numbers of, with no copy in 16 bits."""
    scores = (keys.float()[:, :, None] * queries.float()[..., None, :]).sum(dim=-1) * key_sizes[:, :, None]
    weights = scores.softmax(dim=-1) * value_sizes[:, :, None]
    return (values.float()[:, :, None] * weights[..., None]).sum(dim=-2)
