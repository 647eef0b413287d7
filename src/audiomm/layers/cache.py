"""Keys and values of earlier tokens, and the position each slot holds.

Every slot of a cache knows the position of the token in it (-1: nothing, or padding), so one mask rule serves every
model and every kind of cache: a query sees the slots whose position is not negative and not after its own. The idea
is moshi's ring cache (arXiv:2410.00037, `KVCacheResult`). Two kinds of storage answer to the same calls: `GrowingKV`
appends, `FixedKV` writes into buffers whose addresses never change, so that a decode step can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base.errors import GenerationError

#: Tokens that layers with a window keep beyond it: as many of the newest can be taken back again.
SPARE = 64


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer keeps.

    Attributes:
        kv_heads: Key-value heads.
        head_dim: Width of one head.
        window: How many tokens back the layer looks, itself included; None is all of them.
        cross_length: Encoder positions the layer attends to besides; None for decoder-only models.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    cross_length: int | None = None


class GrowingTrack:
    """Which tokens the growing storage of all layers with one window holds: all, or the newest ones."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        #: Tokens at the beginning that are held no longer.
        self.dropped = 0
        #: Tokens the storage is to hold after the pass under way.
        self.kept = 0

    def reserve(self, total: int) -> None:
        """A pass begins after which there are `total` tokens. Some slack saves cutting at every step."""
        if self.window is not None and total - self.dropped > self.window - 1 + 2 * SPARE:
            self.dropped = total - (self.window - 1 + SPARE)
        self.kept = total - self.dropped

    def can_crop(self, length: int) -> bool:
        """Whether all that layers with this window look at from token `length` on is held."""
        return self.window is None or self.dropped <= max(0, length - self.window + 1)

    def clear(self) -> None:
        self.dropped = self.kept = 0


class GrowingKV:
    """Keys and values that grow by concatenation: no size to choose, a new address a step."""

    def __init__(self, track: GrowingTrack) -> None:
        self.track = track
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new, head_dim) pairs and return all of them, those too that are dropped hereafter."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        surplus = keys.shape[2] - self.track.kept
        if surplus > 0:
            # Copies, so that what is dropped is freed.
            self.keys, self.values = keys[:, :, surplus:].contiguous(), values[:, :, surplus:].contiguous()
        return keys, values

    def crop(self, length: int) -> None:
        if self.keys is not None and self.values is not None:
            length = max(0, length - self.track.dropped)
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def select(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def clear(self) -> None:
        self.keys = self.values = None


class FixedTrack:
    """Which tokens the fixed buffers of all layers with one window hold, by the position of each slot.

    Layers with a window have a ring: token i lies in slot i modulo its size, and masks go by the positions alone, so
    nothing is ever moved. A pass of more tokens than the ring has to spare reads its own tokens beside the ring.
    """

    def __init__(self, window: int | None, rows: int, capacity: int, device: torch.device) -> None:
        self.window = window
        self.size = capacity if window is None else min(capacity, window - 1 + SPARE)
        self.is_ring = self.size < capacity
        self.positions = torch.full((rows, self.size), -1, device=device)
        self.slots: Tensor | None = None
        #: What the pass under way reads: the buffers, its own tokens, or both one after the other.
        self.reads_buffers, self.reads_own = True, False
        self._numbers = torch.arange(self.size, device=device)
        self._longest = 0

    def reserve(self, cursor: Tensor, positions: Tensor, past: int) -> Tensor:
        """Choose slots for new tokens at `positions` (rows, new); positions of all keys of this pass."""
        count = positions.shape[1]
        self.reads_own = self.is_ring and count > SPARE
        # The host's count is looked at in long passes only: compiled steps must not depend on it.
        self.reads_buffers = not self.reads_own or past > 0
        seen = torch.cat((self.positions, positions), dim=1) if self.reads_buffers else positions
        written = min(count, self.size)
        slots = cursor + count - written + self._numbers[:written]
        self.slots = slots % self.size if self.is_ring else slots
        self.positions.index_copy_(1, self.slots, positions[:, count - written :])
        return seen if self.reads_own else self.positions

    def note(self, length: int) -> None:
        """The cache holds `length` tokens now."""
        self._longest = max(self._longest, length)

    def can_crop(self, length: int) -> bool:
        """Whether all that layers with this window look at from token `length` on is held."""
        if not self.is_ring or self.window is None:
            return True
        return self._longest - self.size <= max(0, length - self.window + 1)

    def crop(self, length: int, padding: Tensor) -> None:
        """Empty the slots of the tokens from `length` on."""
        if self.is_ring:
            self.positions.masked_fill_(self.positions + padding >= length, -1)
        else:
            self.positions[:, length:] = -1

    def select(self, rows: Tensor) -> None:
        chosen = self.positions.index_select(0, rows)
        self.positions = self.positions.copy_(chosen) if len(rows) == len(self.positions) else chosen

    def clear(self) -> None:
        self.positions.fill_(-1)
        self._longest = 0


class FixedKV:
    """Keys and values in buffers of a fixed length, written in place at the slots of their track."""

    def __init__(self, rows: int, spec: LayerSpec, track: FixedTrack, device: torch.device, dtype: torch.dtype) -> None:
        shape = (rows, spec.kv_heads, track.size, spec.head_dim)
        self.track = track
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new, head_dim) pairs and return what the pass reads: as a rule, the whole buffers."""
        track = self.track
        assert track.slots is not None, "a pass reserves its slots first"
        read = self.keys, self.values
        if track.reads_own and track.reads_buffers:
            read = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        elif track.reads_own:
            read = keys, values
        first = keys.shape[2] - len(track.slots)
        self.keys.index_copy_(2, track.slots, keys[:, :, first:])
        self.values.index_copy_(2, track.slots, values[:, :, first:])
        return read

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
        return Slots(0, positions, positions, device)

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
        device: Where the tokens are.
        windows: `past` and `keys` of layers with a window that keep fewer tokens than the others.
    """

    past: int
    queries: Tensor | None
    keys: Tensor | None
    device: torch.device | None = None
    windows: Mapping[int, tuple[int, Tensor | None]] = field(default_factory=dict)

    def of(self, window: int | None) -> tuple[int, Tensor | None]:
        """`past` and `keys` as layers with this window have them."""
        own = None if window is None else self.windows.get(window)
        return (self.past, self.keys) if own is None else own


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
        #: Slots in use, counted on the host.
        self.length = 0
        self._windows: set[int] = {spec.window for spec in specs if spec.window is not None}
        kinds: list[int | None] = [None, *sorted(self._windows)]
        self._growing = {} if fixed else {window: GrowingTrack(window) for window in kinds}
        self._fixed = {window: FixedTrack(window, rows, self.capacity, device) for window in kinds} if fixed else {}
        self.layers: list[GrowingKV | FixedKV] = [
            FixedKV(rows, spec, self._fixed[spec.window], device, dtype)
            if fixed
            else GrowingKV(self._growing[spec.window])
            for spec in specs
        ]
        self._cross: list[tuple[Tensor, Tensor] | None] = [None] * len(specs)
        self._cross_ready = False
        self._positions: Tensor | None = None
        if fixed:
            self._cursor = torch.zeros(1, dtype=torch.long, device=device)
            self._padding = torch.zeros((rows, 1), dtype=torch.long, device=device)

    @property
    def positions(self) -> Tensor | None:
        """(rows, slots) position of the token in every slot of layers without a window; None: 0, 1, 2, ..."""
        return self._fixed[None].positions if self.fixed else self._positions

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
        if self.fixed and torch.compiler.is_compiling():
            # Compiled code must not depend on a count that changes every step; whoever replays it calls `note`.
            return self._reserve_fixed(count, positions, rows, past=1)
        past = self.length
        self.note(count)
        if self.fixed:
            return self._reserve_fixed(count, positions, rows, past)
        first = {window: self._growing[window].dropped for window in self._windows}
        for track in self._growing.values():
            track.reserve(self.length)
        if positions is None and self._positions is None:
            return Slots(past, None, None, device, {window: (past - gone, None) for window, gone in first.items()})
        old = self._positions
        if old is None:
            old = torch.arange(past, device=device).expand(rows, past)
        if positions is None:
            newest = old.amax(dim=1, keepdim=True)
            positions = newest + torch.arange(1, count + 1, device=device)
        self._positions = everything = torch.cat((old, positions), dim=1)
        windows = {window: (past - gone, everything[:, gone:]) for window, gone in first.items()}
        return Slots(past, positions, everything, device, windows)

    def _reserve_fixed(self, count: int, positions: Tensor | None, rows: int, past: int) -> Slots:
        if positions is None:
            numbers = torch.arange(count, device=self._cursor.device)
            positions = (self._cursor + numbers - self._padding).expand(rows, count)
        else:
            self._padding += (positions < 0).sum(dim=1, keepdim=True)
        keys = {window: track.reserve(self._cursor, positions, past) for window, track in self._fixed.items()}
        self._cursor += count
        windows = {window: (0, keys[window]) for window in self._windows}
        return Slots(0, positions, keys[None], positions.device, windows)

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
        for track in self._fixed.values():
            track.note(self.length)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (rows, heads, new, head_dim) pairs in the reserved slots and return all pairs of the layer."""
        return self.layers[layer].update(keys, values)

    def view(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values a layer holds, and the position of each (rows, slots), -1 for empty slots and padding."""
        stored, window = self.layers[layer], self.specs[layer].window
        if stored.keys is None or stored.values is None:
            raise GenerationError("the cache is empty: run the model once before reading what a layer holds.")
        if self.fixed:
            return stored.keys, stored.values, self._fixed[window].positions
        first = self._growing[window].dropped
        if self._positions is not None:
            return stored.keys, stored.values, self._positions[:, first:]
        places = torch.arange(first, self.length, device=stored.keys.device)
        return stored.keys, stored.values, places.expand(len(stored.keys), -1)

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
        if self.fixed:
            for track in self._fixed.values():
                track.select(rows)
            padding = self._padding.index_select(0, rows)
            self._padding = self._padding.copy_(padding) if len(rows) == len(self._padding) else padding
        elif self._positions is not None:
            self._positions = self._positions.index_select(0, rows)

    def repeat(self, count: int) -> None:
        """Each row becomes `count` adjacent rows, for beams or several samples of one prompt."""
        keys = self.layers[0].keys
        if count > 1 and keys is not None:
            self.reorder(torch.arange(len(keys), device=keys.device).repeat_interleave(count))

    def crop(self, length: int) -> None:
        """Forget all slots from `length` on.

        Raises:
            GenerationError: Layers with a window have dropped tokens that would be seen again.
        """
        tracks: list[GrowingTrack | FixedTrack] = [*self._growing.values(), *self._fixed.values()]
        for track in tracks:
            if length < self.length and not track.can_crop(length):
                raise GenerationError(
                    f"{self.length - length} of {self.length} tokens cannot be taken back: layers with a window of "
                    f"{track.window} tokens keep {SPARE} beyond it. Take back fewer, or begin a new cache."
                )
        for layer in self.layers:
            layer.crop(length)
        for fixed in self._fixed.values():
            fixed.crop(length, self._padding)
        if self.fixed:
            self._cursor.clamp_(max=length)
        elif self._positions is not None:
            self._positions = self._positions[:, :length]
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget everything and keep the buffers, for the next sequence."""
        for layer in self.layers:
            layer.clear()
        for growing in self._growing.values():
            growing.clear()
        for fixed in self._fixed.values():
            fixed.clear()
        if self.fixed:
            self._cursor.zero_()
            self._padding.zero_()
        self._positions = None
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
            if self._windows:
                raise GenerationError("a cache of layers with a window cannot be told as tuples: they drop tokens.")
            if layer.keys is None or layer.values is None:
                raise GenerationError("the cache is empty: run the model once before asking for its tuples.")
            own = (layer.keys[:, :, : self.length], layer.values[:, :, : self.length])
            pairs.append(own if cross is None else (*own, *cross))
        return tuple(pairs)
