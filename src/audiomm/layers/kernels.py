"""Triton kernels of the operations in `fused`, which says what each must compute; read only where there is a GPU.

Rows of a decode step are few and as wide as the model: a program takes a row, or a part of one, and reads every number
once. Sums are taken in float32, results rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Numbers that a program takes at once where rows need not be seen as a whole.
_BLOCK = 1024

#: Bytes of keys that a program of attention reads at once, and how many programs keep a large GPU busy.
_KEPT, _PROGRAMS = 2**14, 256

#: Outputs and inputs of an expert that a program takes at once.
_OUTPUTS, _INPUTS = 8, 256


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of a tensor, which need not be the current one."""
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **options)


def whole_row(width: int) -> dict[str, int]:
    """The block that holds a row, and the warps that carry it."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


# ---------------------------------------------------------------------- rows


@triton.jit
def load_row(start, columns, width):
    """Numbers of a row in float32, zeros behind its end."""
    return tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def inverse_size(row, width, eps):
    """What RMSNorm multiplies a row with."""
    return 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / width + eps)


@triton.jit
def tanh(value):
    """Without overflow for any value."""
    return 1.0 - 2.0 / (tl.exp(2.0 * value) + 1.0)


@triton.jit
def gelu(value):
    """In the tanh form."""
    return 0.5 * value * (1.0 + tanh(0.7978845608028654 * (value + 0.044715 * value * value * value)))


@triton.jit
def _norm_added(base, made, weight, scalar, rows, width, eps, times, HAS_SCALAR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    base += row * width
    new = load_row(made + (row % rows) * width, columns, width)
    scaled = new * load_row(weight, columns, width) * (inverse_size(new, width, eps) * times)
    kept = load_row(base, columns, width)
    if HAS_SCALAR:
        kept = kept * tl.load(scalar).to(tl.float32)
    tl.store(base + columns, (kept + scaled).to(base.dtype.element_ty), mask=columns < width)


def norm_added(
    base: Tensor, made: Tensor, weight: Tensor, eps: float, times: float = 1.0, scalar: Tensor | None = None
) -> Tensor:
    """`fused.norm_added`."""
    rows, width = made.shape
    numbers = rows, width, eps, times, scalar is not None
    launch(_norm_added, (len(base),), base, base, made, weight, scalar, *numbers, **whole_row(width))
    return base


@triton.jit
def _gelu_times(gate, other, result, gate_stride, other_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    made = gelu(load_row(gate + row * gate_stride, columns, width)) * load_row(
        other + row * other_stride, columns, width
    )
    tl.store(result + row * width + columns, made.to(result.dtype.element_ty), mask=columns < width)


def gelu_times(gate: Tensor, other: Tensor) -> Tensor:
    """`fused.gelu_times`."""
    rows, width = gate.shape
    result = gate.new_empty(rows, width)
    grid = rows, triton.cdiv(width, _BLOCK)
    launch(_gelu_times, grid, gate, gate, other, result, gate.stride(0), other.stride(0), width, BLOCK=_BLOCK)
    return result


@triton.jit
def _strong_gelu_times(gate, other, result, gate_stride, other_stride, width, deviations, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    gates = load_row(gate + row * gate_stride, columns, width)
    mean = tl.sum(gates, axis=0) / width
    distances = tl.where(columns < width, gates - mean, 0.0)
    deviation = tl.sqrt(tl.sum(distances * distances, axis=0) / width)
    beyond = distances - deviation * deviations
    strong = tl.where(beyond < 0.0, 0.0, beyond)  # which leaves NaN what it is
    made = gelu(strong) * load_row(other + row * other_stride, columns, width)
    tl.store(result + row * width + columns, made.to(result.dtype.element_ty), mask=columns < width)


def strong_gelu_times(gate: Tensor, other: Tensor, deviations: float) -> Tensor:
    """`fused.strong_gelu_times`."""
    rows, width = gate.shape
    result = gate.new_empty(rows, width)
    numbers = gate.stride(0), other.stride(0), width, deviations
    launch(_strong_gelu_times, (rows,), gate, gate, other, result, *numbers, **whole_row(width))
    return result


# ---------------------------------------------------------------------- heads


@triton.jit
def _turned(
    heads, firsts, seconds, result, stride, first_stride, second_stride, given, sets, groups, half, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    group = place % groups
    number = (place // groups) % sets
    row = place // (groups * sets)
    columns = tl.arange(0, BLOCK)
    read = heads + row * stride + (tl.minimum(number, given - 1) * groups + group) * 2 * half
    first = load_row(read, columns, half)
    second = load_row(read + half, columns, half)
    size = tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)
    inverse = 1.0 / tl.sqrt(size / (2 * half) + eps)
    firsts += row * first_stride + number * 2 * half
    seconds += row * second_stride + number * 2 * half
    result += place * 2 * half
    for part in tl.static_range(2):
        made = first * load_row(firsts + part * half, columns, half)
        made += second * load_row(seconds + part * half, columns, half)
        tl.store(result + part * half + columns, (made * inverse).to(result.dtype.element_ty), mask=columns < half)


def turned(heads: Tensor, firsts: Tensor, seconds: Tensor, eps: float) -> Tensor:
    """`fused.turned`."""
    rows, given, groups, _, half = heads.shape
    sets = firsts.shape[1]
    result = heads.new_empty(rows, sets, groups, 2, half)
    strides = [heads.stride(0), *(0 if len(factors) == 1 else factors.stride(0) for factors in (firsts, seconds))]
    launch(
        _turned, (rows * sets * groups,), heads, heads, firsts, seconds, result, *strides, given, sets, groups, half,
        eps, BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return result


@triton.jit
def _attended(
    queries, keys, values, mask, result, sizes, query_stride, row_stride, head_stride, slot_stride, mask_stride,
    groups, slots, span,
    EACH: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of one head of keys read of a span of slots, and the largest and the sum of their scores."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row, group = place // groups, place % groups
    query, column = tl.arange(0, QUERIES), tl.arange(0, COLUMNS)
    inside = (query[:, None] < EACH) & (column[None, :] < WIDTH)
    rows = query[:, None] * WIDTH + column[None, :]
    asked = tl.load(queries + row * query_stride + group * EACH * WIDTH + rows, mask=inside, other=0.0).to(tl.float32)
    first = row * row_stride + group * head_stride
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    read = tl.zeros((QUERIES, COLUMNS), tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, slots), SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        added = tl.load(mask + row * mask_stride + slot, mask=slot < slots, other=-float("inf")).to(tl.float32)
        # Slots that nothing was written to yet are not read.
        if tl.max(added, axis=0) > -float("inf"):
            known = (slot[:, None] < slots) & (column[None, :] < WIDTH)
            places = first + slot[:, None].to(tl.int64) * slot_stride + column[None, :]
            key = tl.load(keys + places, mask=known, other=0.0).to(tl.float32)
            scores = tl.dot(asked, tl.trans(key), input_precision=PRECISION) + added[None, :]
            new = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp(scores - new[:, None])
            fading = tl.exp(largest - new)
            value = tl.load(values + places, mask=known, other=0.0).to(tl.float32)
            read = read * fading[:, None] + tl.dot(weights, value, input_precision=PRECISION)
            total = total * fading + tl.sum(weights, axis=1)
            largest = new
    place = place * tl.num_programs(1) + part
    tl.store(result + place * EACH * WIDTH + rows, read, mask=inside)
    sizes += place * EACH * 2 + query * 2
    tl.store(sizes, largest, mask=query < EACH)
    tl.store(sizes + 1, total, mask=query < EACH)


@triton.jit
def _joined(parts, sizes, result, count, EACH: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """What a query read of all spans."""
    place = tl.program_id(0).to(tl.int64)
    first = (place // EACH) * count * EACH + place % EACH
    column = tl.arange(0, COLUMNS)
    largest = tl.load(sizes + first * 2)
    for part in range(1, count):
        largest = tl.maximum(largest, tl.load(sizes + (first + part * EACH) * 2))
    total = 0.0
    read = tl.zeros((COLUMNS,), tl.float32)
    for part in range(count):
        each = first + part * EACH
        share = tl.exp(tl.load(sizes + each * 2) - largest)
        total += share * tl.load(sizes + each * 2 + 1)
        read += share * load_row(parts + each * WIDTH, column, WIDTH)
    tl.store(result + place * WIDTH + column, (read / total).to(result.dtype.element_ty), mask=column < WIDTH)


def attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`fused.attended`, in spans that are read side by side, and joined."""
    (rows, heads, width), (_, groups, slots, _) = queries.shape, keys.shape
    each = heads // groups
    columns = max(triton.next_power_of_2(width), 16)
    block = max(min(_KEPT // (columns * keys.element_size()), 64), 16)
    # As many programs as keep a large GPU busy, each with enough to do.
    count = max(min(triton.cdiv(slots, 4 * block), _PROGRAMS // (rows * groups)), 1)
    span = triton.cdiv(triton.cdiv(slots, count), block) * block
    count = triton.cdiv(slots, span)
    parts = queries.new_empty(rows * groups, count, each, width, dtype=torch.float32)
    sizes = queries.new_empty(rows * groups, count, each, 2, dtype=torch.float32)
    result = queries.new_empty(rows, heads * width)
    launch(
        _attended, (rows * groups, count), queries, queries, keys, values, mask, parts, sizes, queries.stride(0),
        *keys.stride()[:3], 0 if len(mask) == 1 else mask.stride(0), groups, slots, span, EACH=each, WIDTH=width,
        QUERIES=max(triton.next_power_of_2(each), 16), COLUMNS=columns, SLOTS=block,
        # What was rounded to 16 bits loses nothing in TF32, which is NVIDIA's.
        PRECISION="tf32" if queries.dtype != torch.float32 and torch.version.hip is None else "ieee", num_stages=1,
    )  # fmt: skip
    launch(_joined, (rows * heads,), queries, parts, sizes, result, count, EACH=each, WIDTH=width, COLUMNS=columns)
    return result


# ---------------------------------------------------------------------- experts


@triton.jit
def _weighted(weights, row, outputs, stop, width, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Some outputs of a matrix (stop, width) times a row, float32."""
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for begin in range(0, width, INPUTS):
        inputs = begin + tl.arange(0, INPUTS)
        inside = (outputs[:, None] < stop) & (inputs[None, :] < width)
        part = tl.load(weights + outputs[:, None] * width + inputs[None, :], mask=inside, other=0.0)
        total += part.to(tl.float32) * load_row(row, inputs, width)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _expert_gates(hidden, weights, chosen, result, active, inner, width, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = hidden + (place // active) * width
    weights += tl.load(chosen + place) * 2 * inner * width
    gate = _weighted(weights, row, outputs, inner, width, OUTPUTS, INPUTS)
    up = _weighted(weights + inner * width, row, outputs, inner, width, OUTPUTS, INPUTS)
    # Rounded as products are.
    kind = result.dtype.element_ty
    made = gelu(gate.to(kind).to(tl.float32)) * up.to(kind).to(tl.float32)
    tl.store(result + place * inner + outputs, made.to(kind), mask=outputs < inner)


def expert_gates(hidden: Tensor, gate_up: Tensor, chosen: Tensor) -> Tensor:
    """`fused.expert_gates`."""
    (tokens, active), (_, both, width) = chosen.shape, gate_up.shape
    inner = both // 2
    result = hidden.new_empty(tokens, active, inner)
    grid = tokens * active, triton.cdiv(inner, _OUTPUTS)
    numbers = active, inner, width, _OUTPUTS, _INPUTS
    launch(_expert_gates, grid, hidden, hidden, gate_up, chosen, result, *numbers)
    return result


@triton.jit
def _expert_sum(
    inner_rows, down, weights, chosen, result, active, inner, width, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for number in range(active):
        place = token * active + number
        expert = down + tl.load(chosen + place) * width * inner
        made = _weighted(expert, inner_rows + place * inner, outputs, width, inner, OUTPUTS, INPUTS)
        total += made * tl.load(weights + place).to(tl.float32)
    tl.store(result + token * width + outputs, total.to(result.dtype.element_ty), mask=outputs < width)


def expert_sum(inner: Tensor, down: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """`fused.expert_sum`."""
    (tokens, active), (_, width, size) = chosen.shape, down.shape
    result = inner.new_empty(tokens, width)
    grid = tokens, triton.cdiv(width, _OUTPUTS)
    numbers = active, size, width, _OUTPUTS, _INPUTS
    launch(_expert_sum, grid, inner, inner, down, weights, chosen, result, *numbers)
    return result
