"""Many recordings through one model: short ones in batches, long ones side by side, each row taking the next of them.

Results come in the order of the inputs. Inputs are read as there is room for them, so an iterator may be endless; while
a long recording keeps the ones behind it waiting, only a few batches of those are heard ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .assembly import Heard
from .clips import Piece

#: Batches that are heard ahead of a recording that is not done.
BATCHES_AHEAD = 8


class SideBySide:
    """Goes through whole recordings.

    Args:
        pieces: One for each recording.
        size: Recordings that go through the model together.
        is_long: Whether a piece is more than one window.
        hear: What the model hears in short pieces, in order.
        hear_long: Likewise for a long piece, and those that its second argument gives as there is room for them (None
            where there is none for now), in the order in which they are done.
    """

    def __init__(
        self,
        pieces: Iterator[Piece],
        size: int,
        is_long: Callable[[Piece], bool],
        hear: Callable[[list[Piece]], list[Heard]],
        hear_long: Callable[[Piece, Callable[[], Piece | None]], Iterator[Heard]],
    ) -> None:
        self._pieces, self._size = pieces, size
        self._is_long, self._hear, self._hear_long = is_long, hear, hear_long
        self._short: list[Piece] = []
        self._done: dict[int, Heard] = {}
        self._next = 0

    def __iter__(self) -> Iterator[Heard]:
        """What was heard in each recording, in their order."""
        while (piece := self._next_long()) is not None or self._short:
            if piece is None:
                self._hear_short()
            else:
                for heard in self._hear_long(piece, self._more):
                    self._done[heard.piece.clip.number] = heard
                    yield from self._ready()
            # Short ones may have been heard after the last long one was done.
            yield from self._ready()

    def _next_long(self) -> Piece | None:
        """Read on to the next long piece; None where a batch of short ones was full first, or nothing is left."""
        while len(self._short) < self._size and (piece := next(self._pieces, None)) is not None:
            if self._is_long(piece):
                return piece
            self._short.append(piece)
        return None

    def _more(self) -> Piece | None:
        """Another long piece, where not too much has been heard ahead already."""
        if len(self._short) == self._size:
            self._hear_short()
        return None if len(self._done) >= BATCHES_AHEAD * self._size else self._next_long()

    def _hear_short(self) -> None:
        self._done.update((heard.piece.clip.number, heard) for heard in self._hear(self._short))
        self._short = []

    def _ready(self) -> Iterator[Heard]:
        while self._next in self._done:
            yield self._done.pop(self._next)
            self._next += 1
