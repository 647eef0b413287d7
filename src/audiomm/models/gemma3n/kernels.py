"""Triton kernels of the operations in `streams`, which says what each must compute; read only where there is a GPU.

A program takes a row with all its streams.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...layers.kernels import inverse_size, launch, load_row, tanh, whole_row


@triton.jit
def _mixture(
    row, size, router, matrix, kept, columns, width,
    STREAMS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a row, of which RMSNorm's factor is `size`, is routed to: (ROWS, COLUMNS) coefficients."""
    stream = tl.arange(0, ROWS)[:, None]
    read = tl.arange(0, COLUMNS)[None, :]
    place = stream * INPUTS + read
    inside = (stream < STREAMS) & (read < INPUTS)
    mixture = tl.load(kept + place, mask=inside, other=0.0)
    for route in tl.static_range(STREAMS):
        score = tanh(tl.sum(row * load_row(router + route * width, columns, width), axis=0) * size)
        mixture += score * tl.load(matrix + route * STREAMS * INPUTS + place, mask=inside, other=0.0)
    return mixture


@triton.jit
def _share(mixture, number: tl.constexpr, COLUMNS: tl.constexpr):
    """A column of coefficients, (ROWS, 1)."""
    chosen = tl.arange(0, COLUMNS)[None, :] == number
    return tl.sum(tl.where(chosen, mixture, 0.0), axis=1)[:, None]


@triton.jit
def _first(streams, ROWS: tl.constexpr):
    """The first of streams (ROWS, BLOCK)."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == 0, streams, 0.0), axis=0)


@triton.jit
def _predicted(
    states, router, matrix, kept, weight, result, normed, rows, width, eps,
    STREAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    first = load_row(states + row * width, columns, width)
    size = inverse_size(first, width, eps)
    mixture = _mixture(first, size, router, matrix, kept, columns, width, STREAMS, STREAMS, ROWS, ROWS)
    made = tl.zeros((ROWS, BLOCK), tl.float32)
    for number in tl.static_range(STREAMS):
        read = load_row(states + (number * rows + row) * width, columns, width)
        made += _share(mixture, number, ROWS) * read[None, :]
    stream = tl.arange(0, ROWS)[:, None]
    inside = (stream < STREAMS) & (columns[None, :] < width)
    tl.store(result + (stream * rows + row) * width + columns[None, :], made, mask=inside)
    first = _first(made, ROWS)
    scaled = first * inverse_size(first, width, eps) * load_row(weight, columns, width)
    tl.store(normed + row * width + columns, scaled.to(normed.dtype.element_ty), mask=columns < width)


def predicted(states: Tensor, mixture: Any, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`streams.predicted`."""
    streams, rows, width = states.shape
    result, normed = states.new_empty(states.shape), weight.new_empty(rows, width)
    launch(
        _predicted, (rows,), states, states, *mixture, weight, result, normed, rows, width, eps, STREAMS=streams,
        ROWS=triton.next_power_of_2(streams), **whole_row(width),
    )  # fmt: skip
    return result, normed


@triton.jit
def _gathered(first, normed, attended, learned, weights, result, next_normed, width, eps, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = load_row(first + row * width, columns, width) + load_row(normed + row * width, columns, width)
    made = load_row(attended + row * width, columns, width)
    total += made * inverse_size(made, width, eps) * load_row(weights, columns, width)
    made = load_row(learned + row * width, columns, width)
    total += made * inverse_size(made, width, eps) * load_row(weights + width, columns, width)
    total *= factor
    tl.store(result + row * width + columns, total, mask=inside)
    scaled = total * inverse_size(total, width, eps) * load_row(weights + 2 * width, columns, width)
    tl.store(next_normed + row * width + columns, scaled.to(next_normed.dtype.element_ty), mask=inside)


def gathered(
    first: Tensor, normed: Tensor, attended: Tensor, learned: Tensor, weights: Tensor, eps: float, factor: float
) -> tuple[Tensor, Tensor]:
    """`streams.gathered`."""
    rows, width = first.shape
    result, next_normed = first.new_empty(rows, width), normed.new_empty(rows, width)
    parts = first, normed, attended, learned, weights, result, next_normed
    launch(_gathered, (rows,), first, *parts, width, eps, factor, **whole_row(width))
    return result, next_normed


@triton.jit
def _corrected(
    predicted, gated, made, router, matrix, kept, weight, scale, result, scaled, rows, width, eps,
    STREAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    new = load_row(made + row * width, columns, width)
    new = new * inverse_size(new, width, eps) * load_row(weight, columns, width)
    new += load_row(gated + row * width, columns, width)
    size = inverse_size(new, width, eps)
    mixture = _mixture(new, size, router, matrix, kept, columns, width, STREAMS, STREAMS + 1, ROWS, COLUMNS)
    mixed = _share(mixture, STREAMS, COLUMNS) * new[None, :]
    for number in tl.static_range(STREAMS):
        read = load_row(predicted + (number * rows + row) * width, columns, width)
        mixed += _share(mixture, number, COLUMNS) * read[None, :]
    stream = tl.arange(0, ROWS)[:, None]
    inside = (stream < STREAMS) & (columns[None, :] < width)
    tl.store(result + (stream * rows + row) * width + columns[None, :], mixed, mask=inside)
    first = _first(mixed, ROWS) * load_row(scale, columns, width)
    tl.store(scaled + row * width + columns, first.to(scaled.dtype.element_ty), mask=columns < width)


def corrected(
    predicted: Tensor, gated: Tensor, made: Tensor, mixture: Any, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`streams.corrected`."""
    streams, rows, width = predicted.shape
    result, scaled = predicted.new_empty(predicted.shape), made.new_empty(rows, width)
    parts = predicted, gated, made, *mixture, weight, scale, result, scaled
    launch(
        _corrected, (rows,), predicted, *parts, rows, width, eps, STREAMS=streams,
        ROWS=triton.next_power_of_2(streams), COLUMNS=triton.next_power_of_2(streams + 1), **whole_row(width),
    )  # fmt: skip
    return result, scaled
