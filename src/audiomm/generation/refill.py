"""Rows that come and go: when a text is done, the next prompt takes its row, while the other rows go on.

The newest tokens of all rows lie in one column, and their keys and values in one slot of the cache: a row that comes
later begins later, as if it were padded at the left, and masks go by the positions that the slots hold. So a step is
that of any other run, captured or not, and what comes out is what would have come out alone. When columns run out,
all rows move back together. On a CPU rows that nobody takes leave, and a step costs less the fewer rows it has.
Source of the idea: Orca's iteration-level scheduling (Yu et al., OSDI 2022).
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import GenerationError
from ..base.outputs import GenerateOutput
from .choice import Choice, choose
from .decode import DecodeRequest, DecodeState, Record, StopFlag, advance, filled, start
from .rules import Rules
from .sample import finish
from .step import StepUnit, Units, Workplace, mode_of, workplace
from .stopping import EosTokenCriteria

#: Columns that nobody needs any more are given up when there are this many and rows enter.
SLACK = 32


class Done(NamedTuple):
    """A row that is done.

    Attributes:
        key: What it was entered with.
        output: That of a run of this row alone, its prompt padded as it was.
        row: Which row it had; its cross-attention pairs are there until another one enters.
    """

    key: Any
    output: GenerateOutput
    row: int


@dataclass
class _Row:
    """A row under way: the column of its first new token, columns of its prompt before it, and new tokens at most."""

    key: Any
    first: int
    prompt: int
    most: int

    @property
    def begin(self) -> int:
        return self.first - self.prompt


def can_enter(request: DecodeRequest) -> bool:
    """Whether the rows of a request may enter one by one: nothing goes by their number, or by the length of a text."""
    config, length = request.config, request.prompt.shape[1]
    plain = config.num_beams == 1 and not config.do_sample and (config.num_return_sequences or 1) == 1
    asks_for_more = bool(request.flags) or config.output_scores or config.output_logits or request.streamer is not None
    is_growing = config.cache_implementation in (None, "dynamic", "dynamic_full")
    return (
        plain
        and not asks_for_more
        and (is_growing or mode_of(request) != "plain")
        and all(type(rule) is EosTokenCriteria for rule in request.stopping)
        and Rules(request.processors).is_settled_at(length + 1)
        and Rules(request.warpers).is_settled_at(length)
    )


class RowBatch:
    """Rows under way, of requests that differ in their prompts and lengths alone; `can_enter` holds for them.

    The model's layers have no windows. Use it as a context, which gives back what it has taken.

    Args:
        size: Rows at most.
        longest: Tokens of a text at most, its prompt included.
    """

    def __init__(self, size: int, longest: int) -> None:
        self.size, self.longest = size, longest
        self._rows: list[_Row | None] = []
        self._stack = ExitStack()
        self._place: Workplace | None = None
        self._is_open = False

    def __enter__(self) -> RowBatch:
        return self

    def __exit__(self, *problem: Any) -> None:
        self._stack.close()

    @property
    def is_busy(self) -> bool:
        """Whether any row is under way."""
        return any(row is not None for row in self._rows)

    @property
    def free(self) -> int:
        """How many rows may enter."""
        return self.size - sum(row is not None for row in self._rows)

    def cross_pairs(self, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What each layer made of what some rows heard; see `Done.row`."""
        # One row is looked at where it is; several are copied.
        index = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
        return [(pair[0][index], pair[1][index]) for pair in self._state.cache.cross_pairs if pair is not None]

    # ------------------------------------------------------------------ in

    def enter(self, request: DecodeRequest, keys: list[Any]) -> None:
        """Run the prompts of a request, and let its rows go on with the others.

        Args:
            keys: Names each row.

        Raises:
            GenerationError: There is no room for so many, or for so long ones.
        """
        if len(keys) > self.free or request.max_length > self.longest:
            raise GenerationError(
                f"{len(keys)} rows of at most {request.max_length} tokens cannot enter: {self.free} rows are free, "
                f"for at most {self.longest} tokens."
            )
        alone = copy(request.config)
        alone.cache_implementation = "dynamic"
        new, logits = start(replace(request, config=alone), 1, Record(alone))
        choose(request, new, logits, Record(alone))
        assert new.choice is not None, "made with the first token"
        new.choice.rules.settle(new.ids, logits.shape[-1])
        if not self.is_busy:
            self._open(request, new, logits)
        if self._rows.count(None) < len(keys):
            self._select([*range(len(self._rows)), *[0] * (len(keys) - self._rows.count(None))])
        places = [place for place, row in enumerate(self._rows) if row is None][: len(keys)]
        self._make_room(new.length)
        self._write(new, torch.tensor(places, device=logits.device))
        for place, key in zip(places, keys, strict=True):
            prompt = new.prompt_length
            self._rows[place] = _Row(key, self._state.length - new.step, prompt, request.max_length - prompt)
        self._let_idle_rows_rest()
        self._flag.forget()

    def _open(self, request: DecodeRequest, new: DecodeState, logits: Tensor) -> None:
        """Set up buffers for the first rows that enter: as many as enter, or as many as there can be, in fixed ones."""
        if not self._is_open:
            longest = replace(request, max_length=self.longest)
            self._place = self._stack.enter_context(workplace(longest, 1, self.size))
            self._is_open = True
        place, device = self._place, logits.device
        cache, rows, columns, make = new.cache, len(new.tokens), self.longest, filled
        if place is not None:
            rows, columns, make = self.size, place.capacity, place.tensor
            # The last token is never read.
            cache = place.empty_cache(self.longest - 1)
            if cache is None:
                cache = request.model.make_cache(rows, max_length=columns, fixed=True)
            cache.shift(new.cache.length)
            place.cache = cache
        self._request, self._record = request, Record(request.config)
        self._rows = [None] * rows
        self._state = DecodeState(
            tokens=make("tokens", (rows, columns), request.pad_token, device, torch.long),
            length=new.length,
            prompt_length=0,
            cache=cache,
            alive=make("alive", (columns + 1, rows), True, device, torch.bool),
            picked=make("picked", (columns, rows), 0.0, device, torch.float32),
            chosen=make("chosen", (columns, rows), 0.0, device, torch.float32) if request.logprobs else None,
            trouble=torch.zeros(rows, dtype=torch.long, device=device),
            quick=new.quick,
        )
        choice = self._state.choice = Choice(request, logits.new_empty(rows, logits.shape[-1]))
        for rules in (choice.rules, choice.warpers):
            rules.settle(self._state.ids, logits.shape[-1])
        self._units = Units(request, self._state, place)
        self._unit: StepUnit | None = None
        self._flag = StopFlag(device, at_once=False)

    def _write(self, new: DecodeState, rows: Tensor) -> None:
        """Put new rows, which have one new token each, where the rows of these numbers are."""
        state, last, cache = self._state, self._state.length - 1, self._state.cache
        state.tokens[:, state.length - new.length : state.length].index_copy_(0, rows, new.ids)
        state.alive[last].index_fill_(0, rows, True)
        state.alive[state.length].index_copy_(0, rows, new.going)
        state.picked[last].index_copy_(0, rows, new.picked[0])
        if state.chosen is not None and new.chosen is not None:
            state.chosen[last].index_copy_(0, rows, new.chosen[0])
        if cache is not new.cache:
            cache.enter(rows, new.cache)
        choice = state.choice if self._unit is None else self._unit.choice
        assert choice is not None and new.choice is not None, "made with the first token"
        choice.rules.take(new.choice.rules, rows)
        if self._unit is not None:
            self._unit.resume(state)

    def _make_room(self, length: int) -> None:
        """See that there are `length` columns, and few that no row needs any more."""
        if not self._state.cache.fixed and self._surplus() >= SLACK:
            self._shift(-self._surplus())
        if self._state.length < length:
            self._shift(length - self._state.length)

    def _surplus(self) -> int:
        """Columns at the left that no row needs."""
        return min((row.begin for row in self._rows if row is not None), default=0)

    def _shift(self, count: int) -> None:
        """Move all rows so many columns to the right."""
        state = self._state
        state.tokens.copy_(state.tokens.roll(count, 1))
        for written in (state.alive, state.picked, state.chosen):
            if written is not None:
                written.copy_(written.roll(count, 0))
        state.cache.shift(count)
        state.length += count
        for row in self._rows:
            if row is not None:
                row.first += count
        if self._unit is not None:
            self._unit.resume(state)

    def _let_idle_rows_rest(self) -> None:
        idle = [place for place, row in enumerate(self._rows) if row is None]
        if idle and self._state.cache.fixed:
            self._state.cache.leave(torch.tensor(idle, device=self._state.tokens.device))

    # ------------------------------------------------------------------ on

    def run(self, wanted: int) -> list[Done]:
        """Take steps until so many rows are done, or all there are; at least one, where any is under way."""
        self._let_idle_rows_go()
        found: list[Done] = []
        while self.is_busy:
            found += self._done()
            if len(found) >= wanted or not self.is_busy:
                break
            self._step()
        return found

    def _step(self) -> None:
        state, cache = self._state, self._state.cache
        if state.length == state.tokens.shape[1] or (cache.fixed and cache.length == cache.capacity):
            self._shift(-self._surplus())
        self._unit = self._units.next()
        if self._unit is None:
            choose(self._request, state, advance(self._request, state, self._record), self._record)
        else:
            self._unit.run(state)

    def _done(self) -> list[Done]:
        """The rows that are done now; their places are free."""
        state = self._state
        going = self._flag.rows(state.going)
        found = []
        for place, row in enumerate(self._rows):
            if row is not None and (not going[place] or state.length - row.first >= row.most):
                found.append(Done(row.key, self._output(place, row), place))
                self._rows[place] = None
        if found:
            self._let_idle_rows_rest()
        return found

    def _output(self, place: int, row: _Row) -> GenerateOutput:
        """What a row has come to, as if it had been alone."""
        state, own, steps = self._state, slice(place, place + 1), slice(row.first, None)
        alone = DecodeState(
            tokens=state.tokens[own, row.begin :],
            length=state.length - row.begin,
            prompt_length=row.prompt,
            cache=None,
            alive=state.alive[steps, own],
            picked=state.picked[steps, own],
            chosen=None if state.chosen is None else state.chosen[steps, own],
            trouble=state.trouble[own],
        )
        return finish(alone, Record(self._request.config))

    def _let_idle_rows_go(self) -> None:
        """Free rows leave buffers that grow."""
        if self.is_busy and None in self._rows and not self._state.cache.fixed:
            self._select(_closed_up(self._rows))

    def _select(self, kept: list[int]) -> None:
        """Row i becomes what row kept[i] was, in buffers that grow; what was not there before is free."""
        state, old = self._state, self._rows
        rows = torch.tensor(kept, device=state.tokens.device)
        if len(kept) < len(old):
            state.cache.keep(kept)
        else:
            state.cache.widen(len(kept) - len(old))
        self._rows = [
            old[place] if number == place or len(kept) < len(old) else None for number, place in enumerate(kept)
        ]
        state.tokens, state.trouble = state.tokens.index_select(0, rows), state.trouble.index_select(0, rows)
        state.alive, state.picked = state.alive.index_select(1, rows), state.picked.index_select(1, rows)
        state.chosen = None if state.chosen is None else state.chosen.index_select(1, rows)
        assert state.choice is not None, "made with the first token"
        state.choice.keep(rows)
        self._flag.forget()


def _closed_up(rows: list[Any]) -> list[int]:
    """Places of those that are not None: rows from the end in the gaps, so that what is large mostly stays."""
    stays = [place for place, row in enumerate(rows) if row is not None]
    late = iter([place for place in stays if place >= len(stays)])
    return [place if rows[place] is not None else next(late) for place in range(len(stays))]
