"""The heads of a decode step, one token a row: queries, keys and values normed together, turned together, and attended.

What rotation and norms come to is made once a step for all layers; a layer then takes its share and does what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import fused
from .attention import attend_one
from .cache import Cache
from .masks import step_masks
from .norm import has_norm_kernel, quick_size

Pair = tuple[Tensor, Tensor]

#: From so many slots on a kernel that reads them in spans, and only those in use, is worth its second launch.
LONG = 1024

#: Positions whose cosines and sines are kept ready for decode steps.
KNOWN_POSITIONS = 4096


class Heads(NamedTuple):
    """The heads that one layer's projection gives, in this order: queries, keys, values.

    Attributes:
        queries: Query heads; a multiple of `groups`.
        groups: Key-value heads.
        query_norm: (head_dim,) weight of the queries' norm.
        key_norm: Of the keys'; None where the layer has queries only. Values are normed without a weight.
    """

    queries: int
    groups: int
    query_norm: Tensor
    key_norm: Tensor | None

    @property
    def sets(self) -> int:
        """How many times `groups` heads these are."""
        return self.queries // self.groups + 2 * (self.key_norm is not None)


class HeadFactors:
    """What norms and turns the heads of all layers of a decoder in a decode step: queries, keys and values together.

    Weights of the norms, cosines and sines go into one factor for the first half of the heads and one for the second,
    each as wide as the head that is summed up from the two; a step makes both for all layers of a kind at once.
    Values get factors of one and zero. Weights are copied: whoever keeps this watches them.

    Args:
        frequencies: (head_dim / 2,) float32 of each kind of layers, on the device of the states.
        kinds: Of each kind, its layers' heads.
        dtype: Of the states.
    """

    def __init__(self, frequencies: Sequence[Tensor], kinds: Sequence[Sequence[Heads]], dtype: torch.dtype) -> None:
        self.fused = has_norm_kernel(frequencies[0].device)
        # On the CPU the factors stay precise, and take in what `quick_norm` leaves over: root(head_dim).
        self.dtype = dtype if self.fused else torch.float32
        self.frequencies = frequencies
        first = torch.arange(KNOWN_POSITIONS, device=frequencies[0].device)[:, None]
        self.known = [self._turns(first, each) for each in frequencies]
        self.tables = [self._tables(layers) for layers in kinds]
        self.counts = [[heads.sets for heads in layers] * 2 for layers in kinds]

    def _turns(self, positions: Tensor | int, frequencies: Tensor) -> Tensor:
        """(cos, sin; sin, cos) of positions (rows, 1): (rows, 2, 1, 1, 2, head_dim / 2)."""
        angles = positions * frequencies.view(1, -1)
        cosines, sines = angles.cos(), angles.sin()
        turns = torch.stack((cosines, sines, sines, cosines), dim=1).to(self.dtype)
        return turns.view(len(turns), 2, 1, 1, 2, -1)

    def _tables(self, layers: Sequence[Heads]) -> tuple[Tensor, Tensor]:
        """What is added, and what cosines and sines are multiplied with: (2, sets, 1, 2, head_dim / 2) each."""
        rows: list[Tensor] = []
        values: list[int] = []
        for heads in layers:
            rows += [heads.query_norm] * (heads.queries // heads.groups)
            if heads.key_norm is not None:
                values.append(len(rows) + 1)
                rows += [heads.key_norm, torch.zeros_like(heads.key_norm)]
        first, second = torch.stack(rows).float().view(len(rows), 1, 2, -1).unbind(2)
        table = torch.stack((torch.stack((first, first), 2), torch.stack((-second, second), 2)))
        plain = torch.zeros_like(table)
        plain[0, values, :, 0] = plain[1, values, :, 1] = 1.0
        scale = 1.0 if self.fused else (2 * table.shape[-1]) ** 0.5
        return (plain * scale).to(self.dtype), (table * scale).to(self.dtype)

    def at(self, positions: Tensor | int, limit: int) -> list[tuple[Tensor, ...]]:
        """For each kind the factors of first halves, one layer after the other, then those of second halves.

        Args:
            positions: (rows, 1) int64, or one for all rows.
            limit: Positions are below this.
        """
        found = []
        parts = zip(self.known, self.frequencies, self.counts, self.tables, strict=True)
        for known, frequencies, counts, (plain, table) in parts:
            if limit > KNOWN_POSITIONS:
                turns = self._turns(positions, frequencies)
            elif isinstance(positions, int):
                turns = known.narrow(0, positions, 1)
            else:
                turns = known.index_select(0, positions.view(-1))
            factors = torch.addcmul(plain, table, turns)
            rows, width = len(factors), factors.shape[-1]
            found.append(factors.view(rows, -1, 1, 2, width).split_with_sizes(counts, 1))
        return found


def head_turner(
    heads: Heads, eps: float, dtype: torch.dtype, keys_are_values: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of heads (rows, sets, groups, 2, width / 2) and two factors of `HeadFactors`: normed and turned heads.

    Args:
        heads: What these are.
        eps: Of the norm.
        dtype: Of the states.
        keys_are_values: The last set is missing, and the same as the one before it.
    """
    width, halves, addcmul = len(heads.query_norm), (1, 1), torch.addcmul
    if fused.has_kernels(heads.query_norm):
        return lambda heads, firsts, seconds: fused.turned(heads, firsts, seconds, eps)
    if has_norm_kernel(heads.query_norm.device):
        shape, rms_norm = (2, width // 2), functional.rms_norm

        def turn(heads: Tensor, firsts: Tensor, seconds: Tensor) -> Tensor:
            first, second = rms_norm(heads, shape, None, eps).split_with_sizes(halves, 3)
            return addcmul(first * firsts, second, seconds)

    else:
        size_of = quick_size(width, eps, (-2, -1))

        def turn(heads: Tensor, firsts: Tensor, seconds: Tensor) -> Tensor:
            first, second = heads.split_with_sizes(halves, 3)
            turned = (first * firsts).addcmul_(second, seconds).div_(size_of(heads))
            return turned if turned.dtype == dtype else turned.to(dtype)

    if keys_are_values:
        return lambda heads, *factors: turn(torch.cat((heads, heads.narrow(1, -1, 1)), dim=1), *factors)
    return turn


@dataclass
class OneToken:
    """What a decode step's layers are told besides the states, and what they leave each other.

    Attributes:
        cache: Keys and values of the tokens so far, this one's included as layers go by.
        factors: For each kind of layers, what `HeadFactors` gives.
        masks: What is added to scores, by window.
        pairs: For each kind of layers, the keys and values that layers without their own read.
    """

    cache: Cache
    factors: list[tuple[Tensor, ...]]
    masks: dict[int | None, Tensor | None]
    pairs: dict[int, Pair] = field(default_factory=dict)


class HeadReader:
    """Attention of one layer, between its two projections.

    Args:
        heads: What the first projection gives.
        eps: Of the norms.
        dtype: Of the states.
        place: Which of the step's kinds of layers this is one of, which of this kind's layers, and of how many.
        owner: The layer's number in the cache; None where it reads the keys of the last layer of its kind that has one.
        window: How many tokens back it looks, itself included; None is all.
        keys_are_values: The projection gives keys alone, and they are the values, too.
    """

    def __init__(
        self,
        heads: Heads,
        eps: float,
        dtype: torch.dtype,
        place: tuple[int, int, int],
        owner: int | None,
        window: int | None,
        keys_are_values: bool,
    ) -> None:
        width, groups = len(heads.query_norm), heads.groups
        self.kind, self.first, self.second = place[0], place[1], place[1] + place[2]
        self.owner, self.window = owner, window
        self.turn = head_turner(heads, eps, dtype, keys_are_values)
        self.shape = (-1, heads.sets - keys_are_values, groups, 2, width // 2)
        self.queries, self.groups, self.width = heads.queries, groups, width
        self.stride = heads.sets * groups * width
        self.strides = (groups * width, self.stride, width, width, 1)
        # Made for many queries, the fused kernel of the CPU takes longer to start than all of this.
        self.by_products = dtype == torch.float32 and not has_norm_kernel(heads.query_norm.device)
        self.each = heads.queries // groups
        self.reads_long = fused.has_kernels(heads.query_norm)

    def __call__(self, projected: Tensor, token: OneToken) -> Tensor:
        """(rows, heads of the projection x head_dim) to what is read, (rows, query heads x head_dim)."""
        factors = token.factors[self.kind]
        heads = self.turn(projected.view(self.shape), factors[self.first], factors[self.second])
        rows, groups, width, mask = len(heads), self.groups, self.width, token.masks[self.window]
        by_products = self.by_products and (rows == 1 or groups == 1)
        if self.owner is not None:
            # Keys and values lie behind the queries: (2, rows, groups, 1, width), to be written at once.
            new = heads.as_strided((2, rows, groups, 1, width), self.strides, self.queries * width)
            keys, values = token.cache.layers[self.owner].append(new)
            window = self.window
            if window is not None and mask is None and keys.shape[2] > window:
                # Nothing is padded and the cache grows: a window is the last of what is kept.
                surplus = keys.shape[2] - window
                keys, values = keys.narrow(2, surplus, window), values.narrow(2, surplus, window)
            if by_products:
                keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
            token.pairs[self.kind] = keys, values
        keys, values = token.pairs[self.kind]
        if not by_products:
            queries = heads.as_strided((rows, self.queries, 1, width), (self.stride, width, width, 1))
            is_long = self.reads_long and keys.shape[2] >= LONG
            if is_long and mask is not None and not torch.compiler.is_compiling():
                return fused.attended(queries[:, :, 0], keys, values, mask)
            return attend_one(queries, keys, values, mask)
        # The queries that read the same keys, as if they were one head's tokens.
        each = self.each
        queries = heads.as_strided(
            (rows * groups, each, width), (self.stride if groups == 1 else each * width, width, 1)
        )
        scores = torch.bmm(queries, keys) if mask is None else torch.baddbmm(mask.select(1, 0), queries, keys)
        return torch.bmm(scores.softmax(-1), values).view(rows, -1)


class StepHeads:
    """Attention of all layers of a decoder in a decode step.

    Args:
        layers: What each layer's projection gives.
        kinds: Of which kind each is: layers of one kind share rotation and window.
        frequencies: (head_dim / 2,) float32 of each kind, on the device of the states.
        windows: Of each kind; None is no window.
        owners: How many of the first layers have keys and values of their own.
        eps: Of the norms.
        dtype: Of the states.
        keys_are_values: Layers whose projection gives keys alone, which are the values, too.
    """

    def __init__(
        self,
        layers: Sequence[Heads],
        kinds: Sequence[Hashable],
        frequencies: Mapping[Any, Tensor],
        windows: Mapping[Any, int | None],
        *,
        owners: int,
        eps: float,
        dtype: torch.dtype,
        keys_are_values: Sequence[int] = (),
    ) -> None:
        names = list(dict.fromkeys(kinds))
        members = [[layer for layer, kind in enumerate(kinds) if kind == name] for name in names]
        groups = [[layers[layer] for layer in group] for group in members]
        self.factors = HeadFactors([frequencies[name] for name in names], groups, dtype)
        self.windows, self.dtype = [windows[name] for name in names], dtype
        self.readers: list[HeadReader] = []
        for layer, heads in enumerate(layers):
            kind = names.index(kinds[layer])
            place = kind, members[kind].index(layer), len(members[kind])
            owner = layer if layer < owners else None
            self.readers.append(
                HeadReader(heads, eps, dtype, place, owner, self.windows[kind], layer in keys_are_values)
            )

    def begin(self, cache: Cache, rows: int, device: torch.device) -> OneToken:
        """Take a slot of the cache for one more token a row, and make what the layers need to know of it."""
        slots = cache.reserve(1, None, rows, device)
        positions = slots.past if slots.queries is None else slots.queries
        factors = self.factors.at(positions, cache.capacity or cache.length)
        return OneToken(cache, factors, step_masks(slots, self.windows, self.dtype))
