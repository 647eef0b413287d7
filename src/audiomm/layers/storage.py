"""Where a layer's keys and values lie: storage that grows, and storage at fixed addresses.

A track knows which tokens the storage of all layers with one window holds; `cache.Cache` puts them together, and tells
each pass with `Slots` where its tokens go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

#: Tokens that layers with a window keep beyond it: as many of the newest can be taken back again.
SPARE = 64

#: Tokens that growing storage makes room for beyond those it holds, or a quarter of them where that is more.
ROOM = 64


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

    def close(self, positions: Tensor, padding: Tensor, surplus: int, length: int) -> tuple[Tensor, Tensor]:
        """Put the tokens of each row side by side, `length` slots in all; see `_closed`.

        Args:
            positions: (rows, slots) of all slots, dropped ones too.
            padding: (rows, 1) slots before the tokens of each row, afterwards.
            surplus: Slots that are given up at the beginning.
        """
        held = positions[:, self.dropped :]
        self.dropped = max(0, self.dropped - surplus)
        self.kept = length - self.dropped
        return _closed(held, held + padding - self.dropped, self.kept)

    def clear(self) -> None:
        self.dropped = self.kept = 0


class GrowingKV:
    """Keys and values that grow: no size to choose; now and then they move to a larger room.

    Both lie in one tensor, so that a token's pair is written at once. What the first pass brings stays where it is
    until there is more; pairs that gradients flow through are concatenated and never written to.
    """

    def __init__(self, track: GrowingTrack, for_products: bool = False) -> None:
        self.track = track
        self.for_products = for_products
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        #: (2, rows, heads, capacity, head_dim); `keys` and `values` are views of its beginning.
        self._room: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new, head_dim) pairs and return all of them, those too that are dropped hereafter."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        elif keys.requires_grad or self.keys.requires_grad:
            self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
            self._room = None
        else:
            place = self._place(keys.shape[2])
            place[0].copy_(keys)
            place[1].copy_(values)
        return self._without_surplus()

    def append(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """`update` for pairs (2, rows, heads, new, head_dim) that follow others, in one write."""
        self._place(pairs.shape[3]).copy_(pairs)
        return self._without_surplus()

    def _place(self, count: int) -> Tensor:
        """Where `count` new pairs go, (2, rows, heads, count, head_dim); they count as stored from here on."""
        assert self.keys is not None and self.values is not None, "the first pass brings its own pairs"
        used = self.keys.shape[2]
        total = used + count
        if self._room is None or self._room.shape[3] < total:
            rows, heads, _, head_dim = self.keys.shape
            dtype = torch.float32 if self.for_products else self.keys.dtype
            room = self.keys.new_empty(2, rows, heads, self._capacity(total), head_dim, dtype=dtype)
            room[0, :, :, :used], room[1, :, :, :used] = self.keys, self.values
            self._room = room
        keys, values = self._room.narrow(3, 0, total).unbind(0)
        self.keys, self.values = keys, values
        return self._room.narrow(3, used, count)

    def _capacity(self, total: int) -> int:
        """How many tokens to make room for when there are `total`."""
        wanted, window = total + max(ROOM, total // 4), self.track.window
        return wanted if window is None else max(total, min(wanted, window - 1 + 2 * SPARE))

    def _without_surplus(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None, "called when there are pairs"
        surplus = keys.shape[2] - self.track.kept
        if surplus > 0:
            # Copies, so that what is dropped is freed.
            self.keys, self.values = keys[:, :, surplus:].contiguous(), values[:, :, surplus:].contiguous()
            self._room = None
        return keys, values

    def make_room(self) -> None:
        """It grows by itself."""

    def crop(self, length: int) -> None:
        if self.keys is not None and self.values is not None:
            length = max(0, length - self.track.dropped)
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def shift(self, count: int) -> None:
        """Make room for `count` tokens before the others, or drop the first ones where it is negative."""
        if self.keys is not None and self.values is not None:
            self.keys = functional.pad(self.keys, (0, 0, count, 0))
            self.values = functional.pad(self.values, (0, 0, count, 0))
            self._room = None

    def gather(self, source: Tensor) -> None:
        """Slot i of row r becomes what slot source[r, i] was, and there are no others."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _gathered(self.keys, source), _gathered(self.values, source)
            self._room = None

    def select(self, rows: Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        if self._room is None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            return
        used = self.keys.shape[2]
        self._room = self._room.index_select(1, rows)
        self.keys, self.values = self._room.narrow(3, 0, used).unbind(0)

    def clear(self) -> None:
        self.keys = self.values = self._room = None


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
        self._longest = 0

    def reserve(self, numbers: Tensor, positions: Tensor, past: int) -> Tensor:
        """Choose slots for new tokens at `positions` (rows, new); positions of all keys of this pass.

        Args:
            numbers: (new,) their numbers; (rows, new) where rows are apart.
            positions: -1 for padding.
            past: Tokens before them, as far as the host knows.
        """
        count = positions.shape[1]
        self.reads_own = self.is_ring and count > SPARE
        # The host's count is looked at in long passes only: compiled steps must not depend on it.
        self.reads_buffers = not self.reads_own or past > 0
        seen = self.positions
        if self.reads_own:
            seen = torch.cat((seen, positions), dim=1) if self.reads_buffers else positions
        written = min(count, self.size)
        slots = numbers[..., count - written :]
        self.slots = slots % self.size if self.is_ring else slots
        _put(self.positions, self.slots, positions[:, count - written :], row=0, slot=1)
        return seen

    def reserve_one(self, newest: Tensor, positions: Tensor) -> Tensor:
        """`reserve` of a decode step: one token a row, number `newest` (1,) or (rows, 1), the same until the next."""
        self.reads_buffers, self.reads_own = True, False
        self.slots = newest % self.size if self.is_ring else newest
        return _put(self.positions, self.slots, positions, row=0, slot=1)

    def note(self, length: int) -> None:
        """The cache holds `length` tokens now."""
        self._longest = max(self._longest, length)

    def can_crop(self, length: int) -> bool:
        """Whether all that layers with this window look at from token `length` on is held."""
        if not self.is_ring or self.window is None:
            return True
        return self._longest - self.size <= max(0, length - self.window + 1)

    def crop(self, length: int | Tensor, padding: Tensor) -> None:
        """Empty the slots of the tokens from `length` on, one number or (rows, 1); `padding` is that of the newest."""
        self.positions.masked_fill_(self.positions + padding >= length, -1)

    def close(self, padding: Tensor, length: int) -> Tensor:
        """Put the tokens of each row side by side, so that there are `length`.

        Args:
            padding: (rows, 1) slots before the tokens of each row, afterwards.

        Returns:
            (rows, slots) the slot that each is to be filled from.
        """
        places = self.positions + padding
        source, positions = _closed(self.positions, places % self.size if self.is_ring else places, self.size)
        self.positions.copy_(positions)
        self._longest = length
        return source

    def shift(self, count: int) -> None:
        """All tokens are `count` slots further on, or further back where it is negative."""
        moved = (count, -count)
        self.positions.copy_(
            self.positions.roll(count, 1) if self.is_ring else functional.pad(self.positions, moved, value=-1)
        )
        self._longest += count

    def make_room(self, capacity: int) -> None:
        """Have slots for `capacity` tokens, or for those that a ring keeps of them."""
        size = capacity if self.window is None else min(capacity, self.window - 1 + SPARE)
        if size > self.size:
            self.positions = functional.pad(self.positions, (0, size - self.size), value=-1)
        self.size, self.is_ring = size, size < capacity

    def hide(self, mask: Tensor) -> None:
        """Empty the slots of tokens where `mask` (rows, tokens) is False."""
        last = mask.shape[1] - 1
        numbers = last - (last - torch.arange(self.size, device=mask.device)) % self.size
        self.positions.masked_fill_(~mask[:, numbers.clamp(min=0)], -1)

    def select(self, rows: Tensor) -> None:
        chosen = self.positions.index_select(0, rows)
        self.positions = self.positions.copy_(chosen) if len(rows) == len(self.positions) else chosen

    def clear(self) -> None:
        self.positions.fill_(-1)
        self._longest = 0


class FixedKV:
    """Keys and values in buffers of a fixed length, written in place at the slots of their track."""

    def __init__(self, rows: int, spec: LayerSpec, track: FixedTrack, device: torch.device, dtype: torch.dtype) -> None:
        self.track = track
        self._pairs = torch.zeros(2, rows, spec.kv_heads, track.size, spec.head_dim, device=device, dtype=dtype)

    def make_room(self) -> None:
        """Have as many slots as the track."""
        if self.track.size > self._pairs.shape[3]:
            self._pairs = functional.pad(self._pairs, (0, 0, 0, self.track.size - self._pairs.shape[3]))

    @property
    def keys(self) -> Tensor:
        """(rows, heads, slots, head_dim), a view of the buffer."""
        return self._pairs[0]

    @property
    def values(self) -> Tensor:
        """(rows, heads, slots, head_dim), a view of the buffer."""
        return self._pairs[1]

    def append(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """`update` for the pairs (2, rows, heads, 1, head_dim) of a decode step, in one write."""
        assert self.track.slots is not None, "a pass reserves its slots first"
        _put(self._pairs, self.track.slots, pairs.to(self._pairs.dtype), row=1, slot=3)
        keys, values = self._pairs.unbind(0)
        return keys, values

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new, head_dim) pairs and return what the pass reads: as a rule, the whole buffers."""
        track = self.track
        assert track.slots is not None, "a pass reserves its slots first"
        read = self.keys, self.values
        if track.reads_own and track.reads_buffers:
            read = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        elif track.reads_own:
            read = keys, values
        first = keys.shape[2] - track.slots.shape[-1]
        dtype = self._pairs.dtype
        _put(self.keys, track.slots, keys[:, :, first:].to(dtype), row=0, slot=2)
        _put(self.values, track.slots, values[:, :, first:].to(dtype), row=0, slot=2)
        return read

    def crop(self, length: int) -> None:
        """Nothing to do: slots past `length` are marked empty by their positions."""

    def shift(self, count: int) -> None:
        """Move all pairs `count` slots on, or back where it is negative."""
        is_ring = self.track.is_ring
        self._pairs.copy_(self._pairs.roll(count, 3) if is_ring else functional.pad(self._pairs, (0, 0, count, -count)))

    def gather(self, source: Tensor) -> None:
        """Slot i of row r becomes what slot source[r, i] was."""
        for pairs in self._pairs.unbind(0):
            pairs.copy_(_gathered(pairs, source))

    def select(self, rows: Tensor) -> None:
        chosen = self._pairs.index_select(1, rows)
        self._pairs = self._pairs.copy_(chosen) if len(rows) == self._pairs.shape[1] else chosen

    def clear(self) -> None:
        self._pairs.zero_()


def _put(held: Tensor, slots: Tensor, values: Tensor, row: int, slot: int) -> Tensor:
    """Write values to slots (n,) of a tensor, or to slots (rows, n) of each row's own; the tensor.

    Args:
        row, slot: Which dimensions of both are rows and slots.
    """
    if slots.dim() == 1:
        return held.index_copy_(slot, slots, values)
    shape = [1] * held.dim()
    shape[row], shape[slot] = slots.shape
    return held.scatter_(slot, slots.view(shape).expand_as(values), values)


def _closed(positions: Tensor, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Move what slots at `positions` (rows, slots) hold to the slots `places`, of `size`; -1 holds nothing.

    Returns:
        (rows, size) the slot that each is filled from, and its position.
    """
    # What is nowhere goes to one slot more.
    places = places.masked_fill(positions < 0, size)
    numbers = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    room = positions.new_zeros(len(positions), size + 1)
    source, moved = room.scatter(1, places, numbers), (room - 1).scatter(1, places, positions)
    return source[:, :size], moved[:, :size]


def _gathered(stored: Tensor, source: Tensor) -> Tensor:
    """(rows, heads, slots, head_dim) read at the slots (rows, n)."""
    heads, width = stored.shape[1], stored.shape[3]
    return stored.gather(2, source[:, None, :, None].expand(-1, heads, -1, width))


def rows_like(like: Tensor, rows: int) -> Tensor:
    """Zeros of so many rows, each of which lies in memory as those of `like` do."""
    size = like[0].numel()
    return like.new_zeros(rows * size).as_strided((rows, *like.shape[1:]), (size, *like.stride()[1:]))
