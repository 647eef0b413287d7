"""Keys and values of earlier tokens, and the position each slot holds.

Every slot of a cache knows the position of the token in it (-1: nothing, or padding), so one mask rule serves every
model and every kind of cache: a query sees the slots whose position is not negative and not after its own. The idea
is moshi's ring cache (arXiv:2410.00037, `KVCacheResult`). Two kinds of storage answer to the same calls: `GrowingKV`
appends, `FixedKV` writes into buffers whose addresses never change, so that a decode step can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..base.errors import GenerationError
from . import rounded, storage
from .storage import SPARE, FixedKV, FixedTrack, GrowingKV, GrowingTrack, LayerSpec, PassThrough, Slots

__all__ = ["SPARE", "Cache", "LayerSpec", "PassThrough", "Slots"]


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
        for_products: Keep the pairs of tokens in float32, whatever the model computes in: `attention.read_by_products`
            reads these quickest on a CPU. Those for the encoder's positions, which are many, stay as they come.
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
        for_products: bool = False,
    ) -> None:
        if fixed and not length:
            raise GenerationError(f"length={length}: a fixed cache needs to know how many slots to allocate.")
        self.specs, self.fixed, self.capacity = specs, fixed, length or 0
        device, dtype = torch.device(device), torch.float32 if for_products else dtype
        #: Slots in use, counted on the host; and empty ones between the tokens of a row, at most: see `take_back`.
        self.length, self._gaps = 0, 0
        #: Whether each row of fixed buffers has slots of its own: see `part`.
        self.is_apart = False
        self._windows: set[int] = {spec.window for spec in specs if spec.window is not None}
        kinds: list[int | None] = [None, *sorted(self._windows)]
        self._growing = {} if fixed else {window: GrowingTrack(window) for window in kinds}
        self._fixed = {window: FixedTrack(window, rows, self.capacity, device) for window in kinds} if fixed else {}
        self.layers: list[GrowingKV | FixedKV] = [
            FixedKV(rows, spec, self._fixed[spec.window], device, dtype)
            if fixed
            else GrowingKV(self._growing[spec.window], for_products)
            for spec in specs
        ]
        self._cross: list[tuple[Tensor, Tensor] | None] = [None] * len(specs)
        self._cross_ready = False
        #: What pairs for the encoder's positions are kept in, one of `rounded.KINDS` too; None: as they come.
        self.cross_dtype: torch.dtype | None = None
        self.for_products = for_products
        self._positions: Tensor | None = None
        if fixed:
            #: (1,) number of the newest token; (rows, 1) while rows are apart.
            self._newest = self._common = torch.full((1,), -1, device=device)
            self._own, self._padding = (torch.zeros((rows, 1), dtype=torch.long, device=device) for _ in range(2))

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
        if positions is None and count == 1:
            # A decode step: one number moves on, and everything follows from it.
            numbers = self._within(self._newest.add_(1))
            positions = numbers - self._padding
            keys = {window: track.reserve_one(numbers, positions) for window, track in self._fixed.items()}
        else:
            numbers = self._within(self._newest + torch.arange(1, count + 1, device=self._newest.device))
            if positions is None:
                positions = (numbers - self._padding).expand(rows, count)
            else:
                self._padding += (positions < 0).sum(dim=1, keepdim=True)
            keys = {window: track.reserve(numbers, positions, past) for window, track in self._fixed.items()}
            self._newest += count
        windows = {window: (0, keys[window]) for window in self._windows}
        return Slots(0, positions, keys[None], positions.device, windows)

    def _within(self, numbers: Tensor) -> Tensor:
        """Numbers of slots; rows that are apart may read more than has room, all of it in the last slot."""
        return numbers.clamp(max=self.capacity - 1) if self.is_apart else numbers

    def note(self, count: int) -> None:
        """Count `count` new tokens on the host, but for rows that are apart.

        Raises:
            GenerationError: The fixed buffers are full.
        """
        if self.is_apart:
            return
        if self.fixed and self.length + count > self.capacity:
            raise GenerationError(
                f"the static cache holds {self.capacity} tokens and {self.length + count} are needed: raise "
                "max_length or max_new_tokens before generating."
            )
        self.length += count
        for track in self._fixed.values():
            track.note(self.length)

    def note_prompt(self, count: int) -> None:
        """Count a prompt of `count` tokens on the host, where a replay reads it and what the encoder made."""
        self.note(count)
        self._cross_ready = self._cross[-1] is not None

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

    @property
    def cross_pairs(self) -> list[tuple[Tensor, Tensor] | None]:
        """`cross` of all layers."""
        return self._cross if self._cross_ready else [None] * len(self._cross)

    def keep_cross_in(self, kind: str) -> None:
        """Keep pairs for the encoder's positions in 8 bits, of one of `rounded.KINDS`.

        Raises:
            GenerationError: There is nothing to be kept so: the model has no encoder that its decoder attends to.
        """
        if all(spec.cross_length is None for spec in self.specs):
            raise GenerationError(
                f"cross_cache_dtype={kind!r} is for decoders that attend to an encoder's output, like Whisper's; this "
                "one has no such layers. Leave it unset."
            )
        self.cross_dtype = rounded.KINDS[kind]

    def set_cross(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the layer's pair for the encoder's positions; all layers are set in one pass, in order.

        Returns:
            The pair as this pass is to read it; steps get what `cross` gives, in the types it is kept in.
        """
        places = self.cross_room(layer, keys[0].transpose(0, 1), len(keys))
        return rounded.store(places[0], keys), rounded.store(places[1], values)

    def cross_room(self, layer: int, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Where the layer's pair for the encoder's positions is to be written, all layers in one pass and in order.

        Args:
            layer: Its number.
            like: (positions, heads, head_dim), of the type and on the device of what will be written.
            rows: Audios.

        Returns:
            Keys and values (rows, heads, positions, head_dim), not filled; `cross` gives what `rounded.store` writes
            to them.
        """
        old = self._cross[layer]
        dtype = self.cross_dtype or like.dtype
        fits = old is not None and old[0].shape == rounded.room_shape(like, rows, dtype) and old[0].dtype == dtype
        if old is None or not (self.fixed and fits):
            # Read at every step: a head's keys side by side in memory, not between those of other heads.
            old = rounded.room(like, rows, dtype), rounded.room(like, rows, dtype)
        self._cross[layer] = old
        self._cross_ready = layer == len(self.specs) - 1
        return old

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

    def keep(self, rows: list[int]) -> None:
        """Row i becomes what row `rows[i]` was, cross-attention pairs too, and there are no others; for growing caches.

        Cross-attention pairs of rows that stay in their place are not touched.
        """
        for pair in self._cross:
            for kept in pair or ():
                for place, row in enumerate(rows):
                    if place != row:
                        kept[place].copy_(kept[row])
        self._cross = [pair and (pair[0][: len(rows)], pair[1][: len(rows)]) for pair in self._cross]
        places = self.layers[0].keys
        if places is not None:
            self.reorder(torch.tensor(rows, device=places.device))

    def enter(self, rows: Tensor, other: Cache) -> None:
        """Rows become those of another, growing cache; the newest tokens of both lie side by side.

        Buffers stay where they are. For layers without a window.

        Args:
            rows: (n,) numbers of the rows that the n rows of the other cache take.
            other: Holds at most as many tokens as this one; see `shift`.
        """
        span = slice(self.length - other.length, self.length)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            assert theirs.keys is not None and theirs.values is not None, "who enters has read a prompt"
            mine.keys[:, :, span].index_copy_(0, rows, theirs.keys.to(mine.keys.dtype))  # type: ignore[index, union-attr]
            mine.values[:, :, span].index_copy_(0, rows, theirs.values.to(mine.values.dtype))  # type: ignore[index, union-attr]
        positions = other._known_positions()
        if self.fixed:
            held = self._fixed[None].positions
            self._padding.index_copy_(0, rows, self._newest - positions[:, -1:])
        else:
            held = self._positions = self._known_positions().clone()
        held.index_fill_(0, rows, -1)
        held[:, span].index_copy_(0, rows, positions)
        for index, pair in enumerate(other._cross):
            if pair is not None:
                self._enter_cross(index, rows, pair)
        self.cross_dtype, self._cross_ready = other.cross_dtype, other._cross_ready

    def _enter_cross(self, layer: int, rows: Tensor, pair: tuple[Tensor, Tensor]) -> None:
        held = self._cross[layer]
        if held is None or held[0].shape[1:] != pair[0].shape[1:] or held[0].dtype != pair[0].dtype:
            count = len(self._known_positions())
            held = self._cross[layer] = storage.rows_like(pair[0], count), storage.rows_like(pair[1], count)
        for mine, new in zip(held, pair, strict=True):
            if mine.element_size() == 1:
                # Not every operation knows numbers of 8 bits.
                mine, new = mine.view(torch.int8), new.view(torch.int8)
            mine.index_copy_(0, rows, new)

    def widen(self, count: int) -> None:
        """Make `count` more rows, behind the others, for who enters; for growing caches."""
        rows = len(self._known_positions())
        self.reorder(torch.tensor([*range(rows), *[0] * count], device=self._known_positions().device))
        for index, pair in enumerate(self._cross):
            if pair is not None:
                wide = storage.rows_like(pair[0], rows + count), storage.rows_like(pair[1], rows + count)
                for new, old in zip(wide, pair, strict=True):
                    new[:rows].copy_(old)
                self._cross[index] = wide

    def leave(self, rows: Tensor) -> None:
        """Rows of a fixed cache hold nothing until others enter; the steps they take meanwhile count from 0 again."""
        self._padding.index_copy_(0, rows, (self._newest + 1).expand(len(rows), 1))
        for track in self._fixed.values():
            track.positions.index_fill_(0, rows, -1)

    def shift(self, count: int) -> None:
        """Move all tokens so many slots on, or back where it is negative, and forget those that find no slot.

        For fixed buffers, and layers without a window.
        """
        for layer in self.layers:
            layer.shift(count)
        for track in self._fixed.values():
            track.shift(count)
        if self.fixed:
            self._newest += count
            self._padding += count
        else:
            self._positions = functional.pad(self._known_positions(), (count, 0), value=-1)
        self.length += count

    def held(self) -> Tensor:
        """(rows, length) positions of the tokens so far, -1 for padding."""
        return self._known_positions()[:, : self.length]

    def _known_positions(self) -> Tensor:
        """`positions`, also where they are 0, 1, 2, ...; something has been read."""
        keys = self.layers[0].keys
        assert keys is not None, "a growing cache knows its rows from what they have read"
        known = self.positions
        return torch.arange(self.length, device=keys.device).expand(len(keys), -1) if known is None else known

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
                    f"{track.window} tokens keep {storage.SPARE} beyond it. Take back fewer, or begin a new cache."
                )
        for layer in self.layers:
            layer.crop(length)
        for fixed in self._fixed.values():
            fixed.crop(length, self._padding)
        if self.fixed:
            self._newest.clamp_(max=length - 1)
        elif self._positions is not None:
            self._positions = self._positions[:, :length]
        self.length = min(self.length, length)

    def make_room(self, length: int) -> None:
        """Let fixed buffers hold `length` tokens; they move to other addresses where they do not yet."""
        self.capacity = max(self.capacity, length)
        for track in self._fixed.values():
            track.make_room(self.capacity)
        for layer in self.layers:
            layer.make_room()

    def hide(self, mask: Tensor) -> None:
        """Forget the tokens of each row where `mask` (rows, length) is False, and count new ones from those left."""
        for track in self._fixed.values():
            track.hide(mask)
        if self.fixed:
            self._padding.copy_(self.length - 1 - self._fixed[None].positions.amax(dim=1, keepdim=True))
        else:
            self._positions = self._known_positions().masked_fill(~mask, -1)

    def part(self) -> None:
        """From here on each row of a fixed cache takes the slot behind its own newest token.

        All that passes and `take_back` do is tensors at fixed addresses then, and the host counts nothing; a pass is of
        `SPARE` tokens at most. What finds no room is written to the last slot, which no row may need.
        """
        self._newest, self.is_apart = self._own.copy_(self._newest.expand_as(self._own)), True

    def join(self) -> None:
        """Bring the newest tokens of rows that are apart back into one slot."""
        self._newest, self.length, self.is_apart = self._common, self.capacity, False
        self._close_gaps()

    def take_back(self, counts: Tensor, room: int = 0) -> None:
        """Forget the newest tokens of each row, more of one row than of another.

        The next tokens of all rows lie side by side again: slots that are empty in some rows only stay as gaps, which
        masks leave out, and are closed when there are many or no room is left.

        Args:
            counts: (rows,) tokens to forget; all of them where a row has fewer.
            room: Tokens that the next passes bring.

        Raises:
            GenerationError: Layers with a window have dropped tokens that would be seen again.
        """
        if self.is_apart:
            self._newest -= counts[:, None]
            for track in self._fixed.values():
                track.crop(self._newest + 1, self._padding)
            return
        positions = self._known_positions()
        padding = self.length - 1 - positions.amax(dim=1, keepdim=True)
        held = self.length - padding
        counts = torch.minimum(counts[:, None], held)
        fewest, most = (int(count) for count in counts.aminmax())
        if fewest < most:
            ends = self.length - counts
            for track in self._fixed.values():
                track.crop(ends, padding)
            if self.fixed:
                self._padding += counts - fewest
            else:
                self._positions = positions.masked_fill(positions + padding >= ends, -1)
            # A row that holds nothing has no gap.
            self._gaps += int(torch.where(counts < held, counts, fewest).max()) - fewest
        self.crop(self.length - fewest)
        if self._gaps >= SPARE // 2 or (self.fixed and self.length + room > self.capacity):
            self._close_gaps()

    def _close_gaps(self) -> None:
        """Put the tokens of each row side by side again, and give up slots at the beginning that no row needs."""
        positions = self._known_positions()
        padding = self.length - 1 - positions.amax(dim=1, keepdim=True)
        surplus = int(padding.min())
        padding -= surplus
        self.length -= surplus
        sources = {window: track.close(padding, self.length) for window, track in self._fixed.items()}
        if self.fixed:
            self._newest.fill_(self.length - 1)
            self._padding.copy_(padding)
        for window, growing in self._growing.items():
            sources[window], moved = growing.close(positions, padding, surplus, self.length)
            if window is None:
                self._positions = moved
        for spec, layer in zip(self.specs, self.layers, strict=True):
            layer.gather(sources[spec.window])
        self._gaps = 0

    def reset(self) -> None:
        """Forget everything and keep the buffers, for the next sequence."""
        for layer in self.layers:
            layer.clear()
        for growing in self._growing.values():
            growing.clear()
        for fixed in self._fixed.values():
            fixed.clear()
        if self.fixed:
            self._newest, self.is_apart = self._common.fill_(-1), False
            self._padding.zero_()
        self._positions = None
        self._cross_ready = False
        self.length = self._gaps = 0

    @classmethod
    def from_legacy_cache(cls, specs: list[LayerSpec], pairs: tuple[tuple[Tensor, ...], ...]) -> Cache:
        """A growing cache from the tuples of older programs: (self keys, self values[, cross keys, cross values])."""
        if len(pairs) != len(specs):
            raise GenerationError(f"past_key_values holds {len(pairs)} layers; the decoder has {len(specs)}.")
        cache = cls(specs)
        for index, (layer, pair) in enumerate(zip(cache.layers, pairs, strict=True)):
            assert isinstance(layer, GrowingKV), "made to grow"
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
            pairs.append(own if cross is None else (*own, *(rounded.exact(kept, layer.keys.dtype) for kept in cross)))
        return tuple(pairs)
