"""Keys and values of earlier tokens, and the position each slot holds.

Every slot of a cache knows the position of the token in it (-1: nothing, or padding), so one mask rule serves every
model and every kind of cache: a query sees the slots whose position is not negative and not after its own. The idea
is moshi's ring cache (arXiv:2410.00037, `KVCacheResult`). Two kinds of storage answer to the same calls: `GrowingKV`
appends, `FixedKV` writes into buffers whose addresses never change, so that a decode step can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import GenerationError


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer keeps.

    Attributes:
        kv_heads: Key-value heads.
        head_dim: Width of one head.
        window: How many tokens back the layer looks, itself included; None is all of them.
        shared_with: Index of the layer whose keys and values this one reads; None when it has its own.
        cross_length: Encoder positions the layer attends to besides; None for decoder-only models.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    shared_with: int | None = None
    cross_length: int | None = None


class GrowingKV:
    """Keys and values that grow by concatenation: no size to choose, a new address a step."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new, head_dim) pairs and return all of them."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def select(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def clear(self) -> None:
        self.keys = self.values = None


class FixedKV:
    """Keys and values in buffers of a fixed length, written in place at the slots the cache hands out."""

    def __init__(self, rows: int, spec: LayerSpec, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (rows, spec.kv_heads, length, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new, head_dim) pairs at `slots` (new,) and return the whole buffers."""
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Nothing to do: slots past `length` are marked empty by their positions."""

    def select(self, rows: Tensor) -> None:
        if len(rows) == len(self.keys):
            self.keys.copy_(self.keys.index_select(0, rows))
            self.values.copy_(self.values.index_select(0, rows))
        else:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def clear(self) -> None:
        self.keys.zero_()
        self.values.zero_()


class PassThrough:
    """The cache of a call that keeps nothing: training, and forward passes with use_cache=False."""

    length = 0
    fixed = False

    def reserve(self, count: int, positions: Tensor | None, rows: int, device: torch.device) -> Slots:
        return Slots(0, positions, positions)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def cross(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return None

    def set_cross(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@dataclass(frozen=True)
class Slots:
    """What a forward pass learns when it reserves slots for its tokens.

    Attributes:
        past: Tokens before the new ones; meaningful only where positions are None.
        queries: (rows, new) positions of the new tokens, -1 for padding; None when they are past, past + 1, ...
        keys: (rows, slots) position of every slot, -1 for an empty one; None when they are 0, 1, 2, ...
    """

    past: int
    queries: Tensor | None
    keys: Tensor | None


class Cache:
    """The keys and values of all layers of one decoder, for `rows` sequences.

    A forward pass first calls `reserve` once, which hands out slots for the new tokens and tells the positions of
    all slots; then each layer calls `update`. Cross-attention pairs are kept once per audio: they are neither
    repeated nor reordered for beams, whose queries fold into the query length instead.

    With `fixed` everything lives in buffers that keep their addresses from call to call, where the next slot is a
    device tensor too: a decode step then reads and writes tensors only, and can be captured or compiled.

    Args:
        specs: One entry a layer.
        length: Slots to allocate; needed when `fixed`.
        fixed: Allocate once and write in place (a static cache).
        rows, device, dtype: Shape and place of the fixed buffers.
    """

    def __init__(
        self,
        specs: list[LayerSpec],
        *,
        rows: int = 1,
        length: int | None = None,
        fixed: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if fixed and not length:
            raise GenerationError(f"length={length}: a fixed cache needs to know how many slots to allocate.")
        self.specs, self.fixed, self.capacity = specs, fixed, length or 0
        device = torch.device(device)
        self.layers: list[GrowingKV | FixedKV] = [
            FixedKV(rows, spec, self.capacity, device, dtype) if fixed else GrowingKV() for spec in specs
        ]
        self._cross: list[tuple[Tensor, Tensor] | None] = [None] * len(specs)
        self._cross_ready = False
        #: Slots in use, counted on the host.
        self.length = 0
        self.positions: Tensor | None = None
        self._slots: Tensor | None = None
        if fixed:
            self.positions = torch.full((rows, self.capacity), -1, device=device)
            self._all_slots = torch.arange(self.capacity, device=device)
            self._cursor = torch.zeros(1, dtype=torch.long, device=device)
            self._padding = torch.zeros((rows, 1), dtype=torch.long, device=device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use; the name `transformers` gives to `length`."""
        return self.length

    def reserve(self, count: int, positions: Tensor | None, rows: int, device: torch.device) -> Slots:
        """Hand out slots for `count` new tokens.

        Args:
            count: New tokens a row.
            positions: (rows, count) positions of the new tokens, -1 for padding; None counts on from the last token.
            rows: Sequences of this pass.
            device: Where the tokens are.

        Raises:
            GenerationError: The fixed buffers are full.
        """
        if self.fixed:
            # Compiled code must not depend on a count that changes every step; whoever replays it calls `note`.
            if not torch.compiler.is_compiling():
                self.note(count)
            return self._reserve_fixed(count, positions, rows)
        past = self.length
        self.note(count)
        if positions is None and self.positions is None:
            return Slots(past, None, None)
        old = self.positions
        if old is None:
            old = torch.arange(past, device=device).expand(rows, past)
        if positions is None:
            newest = old.amax(dim=1, keepdim=True)
            positions = newest + torch.arange(1, count + 1, device=device)
        self.positions = torch.cat((old, positions), dim=1)
        return Slots(past, positions, self.positions)

    def _reserve_fixed(self, count: int, positions: Tensor | None, rows: int) -> Slots:
        assert self.positions is not None, "a fixed cache allocates its positions"
        self._slots = self._cursor + self._all_slots[:count]
        if positions is None:
            positions = (self._slots - self._padding).expand(rows, count)
        else:
            self._padding += (positions < 0).sum(dim=1, keepdim=True)
        self.positions.index_copy_(1, self._slots, positions)
        self._cursor += count
        return Slots(0, positions, self.positions)

    def note(self, count: int) -> None:
        """Count `count` new tokens on the host.

        Raises:
            GenerationError: The fixed buffers are full.
        """
        if self.fixed and self.length + count > self.capacity:
            raise GenerationError(
                f"the static cache holds {self.capacity} tokens and {self.length + count} are needed: raise "
                "max_length or max_new_tokens before generating."
            )
        self.length += count

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (rows, heads, new, head_dim) pairs in the reserved slots and return all pairs of the layer."""
        return self.layers[layer].update(keys, values, self._slots)  # type: ignore[arg-type]

    def cross(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The layer's pair for the encoder's positions, or None before the first pass."""
        return self._cross[layer] if self._cross_ready else None

    def set_cross(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the layer's pair for the encoder's positions; all layers are set in one pass, in order."""
        old = self._cross[layer]
        if self.fixed and old is not None and old[0].shape == keys.shape:
            pair = old[0].copy_(keys), old[1].copy_(values)
        else:
            # Read at every step: a head's keys side by side in memory, not between those of other heads.
            pair = keys.contiguous(), values.contiguous()
        self._cross[layer] = pair
        self._cross_ready = layer == len(self.specs) - 1
        return pair

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; cross-attention pairs stay (beams of one audio share them)."""
        for layer in self.layers:
            layer.select(rows)
        if self.positions is None:
            return
        if self.fixed and len(rows) == len(self.positions):
            self.positions.copy_(self.positions.index_select(0, rows))
            self._padding.copy_(self._padding.index_select(0, rows))
        else:
            self.positions = self.positions.index_select(0, rows)
            if self.fixed:
                self._padding = self._padding.index_select(0, rows)

    def repeat(self, count: int) -> None:
        """Each row becomes `count` adjacent rows, for beams or several samples of one prompt."""
        keys = self.layers[0].keys
        if count > 1 and keys is not None:
            self.reorder(torch.arange(len(keys), device=keys.device).repeat_interleave(count))

    def crop(self, length: int) -> None:
        """Forget all slots from `length` on."""
        for layer in self.layers:
            layer.crop(length)
        if self.fixed and self.positions is not None:
            self.positions[:, length:] = -1
            self._cursor.clamp_(max=length)
        elif self.positions is not None:
            self.positions = self.positions[:, :length]
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget everything and keep the buffers, for the next sequence."""
        for layer in self.layers:
            layer.clear()
        if self.fixed and self.positions is not None:
            self.positions.fill_(-1)
            self._cursor.zero_()
            self._padding.zero_()
        else:
            self.positions = None
        self._cross_ready = False
        self.length = 0

    @classmethod
    def from_legacy_cache(cls, specs: list[LayerSpec], pairs: tuple[tuple[Tensor, ...], ...]) -> Cache:
        """A growing cache from the tuples of older programs: (self keys, self values[, cross keys, cross values])."""
        if len(pairs) != len(specs):
            raise GenerationError(f"past_key_values holds {len(pairs)} layers; the decoder has {len(specs)}.")
        cache = cls(specs)
        for index, (layer, pair) in enumerate(zip(cache.layers, pairs, strict=True)):
            layer.keys, layer.values = pair[0], pair[1]
            if len(pair) == 4:
                cache.set_cross(index, pair[2], pair[3])
        cache.length = pairs[0][0].shape[2]
        return cache

    def to_legacy_cache(self) -> tuple[tuple[Tensor, ...], ...]:
        """The tuples of older programs, one a layer; views of what is stored."""
        pairs = []
        for layer, cross in zip(self.layers, self._cross, strict=True):
            if layer.keys is None or layer.values is None:
                raise GenerationError("the cache is empty: run the model once before asking for its tuples.")
            own = (layer.keys[:, :, : self.length], layer.values[:, :, : self.length])
            pairs.append(own if cross is None else (*own, *cross))
        return tuple(pairs)
