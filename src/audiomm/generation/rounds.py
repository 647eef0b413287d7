"""Speculative decoding in units of tensors: a round of drafts is captured or compiled as a decode step is.

A round drafts equally many tokens for all rows and reads them all, so its shapes never change; each row keeps those it
agrees with, in columns and slots of the cache that are its own (`Cache.part`), and nothing is asked of the host, which
hears one round late whether any row goes on. The tokens of all places are chosen at once, as if each place were a row:
its text is that of the row and the drafts before it, and what follows a wrong draft is written over by the next round.
`speculative` is the slow, obvious twin, and does what does not fit in here: sampling, streamers, criteria, rules that
go by the length of a text or look at all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import GenerateOutput
from ..layers.cache import SPARE, Cache
from .choice import Choice, Slot, choose
from .decode import DecodeRequest, DecodeState, Record, StopFlag
from .drafts import Board, Drafter, StateDrafter, drafts_from_states
from .regions import shelf_of
from .rules import Rules
from .runners import Mode, Runner, make_runner
from .sample import finish
from .speculative import Balance
from .step import FEWEST_STEPS, Workplace, cache_tensors, mode_of, workplace
from .stopping import EosTokenCriteria

#: Drafts of a round at most: layers with a window can take back so many tokens.
MOST_DRAFTS = SPARE // 2
#: A round reads as many tokens as wait for the device if any number does.
MANY_TOKENS = 64


@contextmanager
def round_places(
    request: DecodeRequest, own: DecodeRequest | None
) -> Iterator[tuple[Workplace | None, Workplace | None]]:
    """The places where the model and its assistant work in rounds; None for both where a run is not made of these.

    Args:
        request: What is asked for.
        own: What the model that makes drafts is to read, if there is one.
    """
    with ExitStack() as stack:
        place = own_place = None
        if _may_run(request) and (own is None or _may_draft(request, own)):
            place = stack.enter_context(workplace(request, 1))
            if own is not None and not drafts_from_states(own):
                own_place = stack.enter_context(workplace(own, 1))
        yield place, own_place


def _may_run(request: DecodeRequest) -> bool:
    config, length = request.config, request.prompt.shape[1]
    return (
        mode_of(request, MANY_TOKENS) != "plain"
        and not config.do_sample
        and (config.num_return_sequences or 1) == 1
        and not request.warpers
        and all(type(rule) is EosTokenCriteria for rule in request.stopping)
        and request.max_length - length >= FEWEST_STEPS
        and Rules(request.processors).is_settled_at(length + 1)
        # Texts have all their tokens.
        and request.model_inputs.get("inputs_embeds") is None
    )


def _may_draft(request: DecodeRequest, own: DecodeRequest) -> bool:
    model: Any = own.model
    if next(model.parameters()).device != next(request.model.parameters()).device:  # type: ignore[attr-defined]
        return False
    return shelf_of(model) is not None if drafts_from_states(own) else mode_of(own, MANY_TOKENS) != "plain"


def fits(request: DecodeRequest, state: DecodeState) -> bool:
    """Whether there is a slot for each token of the longest text, and one that is not read."""
    cache = state.cache
    if not isinstance(cache, Cache) or not cache.fixed:
        return False
    return cache.length - state.prompt_length + request.max_length <= cache.capacity


def run_rounds(
    request: DecodeRequest, drafter: Drafter, state: DecodeState, logits: Tensor, place: Workplace
) -> GenerateOutput:
    """Continue every prompt with the help of drafts; see `sample.sample` for what comes back.

    Args:
        request, state, logits: As `decode.start` left them; `fits` holds.
        drafter: Makes the drafts.
        place: Where the run works.
    """
    record = Record(request.config)
    choose(request, state, logits, record)
    rounds = _entered(request, drafter, state, logits, place)
    balance, flag = Balance(drafter.cost), StopFlag(logits.device, at_once=False)
    names, known = ("rounds", "drafted", "accepted"), [len(state.tokens), 0, 0, 0]
    while known[0]:
        rounds.run(has_drafts=balance.wants_drafts())
        told = flag.read(rounds.counts) or known
        drafted, accepted = told[2] - known[2], told[3] - known[3]
        if drafted:
            balance.note(rounds.count, accepted * rounds.count / drafted)
        known = told
    rounds.settle(state)
    result = finish(state, record)
    result.draft_counts = dict(zip(names, rounds.counts[1:].tolist(), strict=True))
    if place.is_shared:
        result.past_key_values = None
    else:
        state.cache.join()
    return result


def _entered(request: DecodeRequest, drafter: Drafter, state: DecodeState, logits: Tensor, place: Workplace) -> Rounds:
    """The rounds that a run is made of: those of an earlier one, where they do the same."""
    drafts, first = min(drafter.steady, MOST_DRAFTS), _settled(state.choice, state, logits)
    key = "rounds", type(drafter), drafts, first.key()
    rounds: Rounds | None = place.units.get(key)
    if rounds is None or rounds.quick is not state.quick or rounds.drafter.parts != drafter.parts:
        rounds = place.units[key] = Rounds(request, drafter, state, logits, place.mode, drafts)
    rounds.enter(request, drafter, state, first.rules.begin_index)
    return rounds


def _settled(choice: Choice | None, state: DecodeState, logits: Tensor) -> Choice:
    """A choice as it is made from the second token on."""
    assert choice is not None, "made with the first token"
    for rules in (choice.rules, choice.warpers):
        rules.settle(state.ids, logits.shape[-1])
    return choice.frozen()


class Rounds:
    """Rounds with and without drafts, which work on the same texts.

    Args:
        request, state: A run; one token has been chosen.
        drafter: Makes its drafts.
        logits: (rows, vocabulary) that it was chosen from: their size and place count.
        mode: How the rounds are run.
        count: Drafts of a round that has some.

    Attributes:
        counts: (4,) int64: rows that go on; rounds; tokens drafted; tokens accepted.
    """

    def __init__(
        self, request: DecodeRequest, drafter: Drafter, state: DecodeState, logits: Tensor, mode: Mode, count: int
    ) -> None:
        rows, device = len(state.tokens), state.tokens.device
        self.model, self.quick, self.cache, self.drafter = request.model, state.quick, state.cache, drafter
        self.count = count
        columns = state.tokens.shape[1] + count + 1
        self.board = Board(rows, columns, state.hidden if isinstance(drafter, StateDrafter) else None, device)
        self.going = torch.ones(rows, dtype=torch.bool, device=device)
        self.limit = torch.zeros(1, dtype=torch.long, device=device)
        self.counts = torch.zeros(4, dtype=torch.long, device=device)
        #: (rows, columns) float32, beside the tokens: their scores and log-probabilities.
        self.scores = torch.zeros(rows, columns, dtype=torch.float32, device=device)
        self.logprobs = None if state.chosen is None else torch.zeros_like(self.scores)
        self._units: dict[int, tuple[Round, Runner]] = {}
        for drafts in (0, count):
            choice = Choice(request, logits.new_empty(rows * (drafts + 1), logits.shape[1]))
            unit = Round(self, drafts, _settled(choice, state, logits))
            self._units[drafts] = unit, make_runner(mode, request.config, device)

    def enter(self, request: DecodeRequest, drafter: Drafter, state: DecodeState, begin: int) -> None:
        """Go on from where a run stands: one token has been chosen.

        Args:
            begin: The column that generation begins in, as its rules have it.

        Raises:
            GenerationError: Tensors of the run are not those that the rounds were made for.
        """
        watched = cache_tensors(state.cache)
        state.cache.part()
        if drafter.cache is not None:
            watched |= cache_tensors(drafter.cache, "the assistant's ")
            drafter.cache.part()
            drafter.cache.take_back(torch.ones_like(self.going, dtype=torch.long))
        for _, runner in self._units.values():
            runner.check(watched)
        board = self.board
        board.tokens.fill_(request.pad_token)
        board.tokens[:, : state.length] = state.ids
        board.lengths.fill_(state.length)
        board.begin.fill_(begin)
        if board.hidden is not None and state.hidden is not None:
            board.hidden.copy_(state.hidden)
        self.limit.fill_(request.max_length)
        self.going.copy_(state.going)
        self.counts.zero_()

    def run(self, has_drafts: bool) -> None:
        """Take a round, if any row goes on."""
        unit, runner = self._units[self.count if has_drafts else 0]
        runner.run(unit)

    def settle(self, state: DecodeState) -> None:
        """Write down in the state of a run how far its rows have come."""
        lengths = self.board.lengths[:, 0]
        state.length = int(lengths.max())
        state.tokens.copy_(self.board.tokens[:, : state.tokens.shape[1]])
        # The first token was chosen before all rounds.
        columns, steps = slice(state.prompt_length + 1, state.length), slice(1, state.step)
        state.picked[steps].copy_(self.scores[:, columns].t())
        if state.chosen is not None and self.logprobs is not None:
            state.chosen[steps].copy_(self.logprobs[:, columns].t())
        numbers = torch.arange(len(state.alive), device=lengths.device)
        state.alive.copy_(numbers[:, None] < lengths - state.prompt_length)


class Round:
    """One round; see `runners.Unit`.

    Args:
        rounds: What it works on.
        count: Drafts.
        choice: How the tokens of all places of all rows are chosen, those of a row side by side.
    """

    title = "The round of drafts"

    def __init__(self, rounds: Rounds, count: int, choice: Choice) -> None:
        self._rounds, self._count, self._choice = rounds, count, choice
        self.cache = rounds.cache
        #: Code that only calls modules says nothing when one of them changes.
        self.is_settled = rounds.quick is not None
        device, places = rounds.going.device, len(rounds.going) * (count + 1)
        every = torch.ones(places, dtype=torch.bool, device=device)
        token = torch.zeros(places, dtype=torch.long, device=device)
        score, logprob = torch.zeros(2, places, dtype=torch.float32, device=device)
        self._slot = Slot(every, every.clone(), token, score, None if rounds.logprobs is None else logprob)

    def whole(self) -> None:
        """The round."""
        rounds, count, board = self._rounds, self._count, self._rounds.board
        if count or rounds.drafter.cache is not None:
            rounds.drafter.draft(board, self._choice.rules, count)
        ids = board.read(-1, count + 1)
        hidden = self._choose(ids)
        takes, still = self._accept(ids)
        taken = takes.sum(dim=1)
        self._write_down(takes, taken)
        last = (taken - 1).clamp(min=0)[:, None]
        rounds.going.logical_and_(still.gather(1, last)[:, 0])
        rounds.counts[:1].copy_(rounds.going.sum())
        if board.hidden is not None and hidden is not None:
            board.hidden.copy_(hidden.gather(1, last[..., None].expand_as(board.hidden)))
        rounds.cache.take_back(count + 1 - taken)
        if rounds.drafter.cache is not None:
            rounds.drafter.cache.take_back(max(count, 1) + 1 - taken)

    def _choose(self, ids: Tensor) -> Tensor | None:
        """Choose what follows each of ids (rows, places); the states (rows, places, width) they are chosen from."""
        rounds, board, hidden = self._rounds, self._rounds.board, None
        if self._count == 0 and rounds.quick is not None and board.hidden is None:
            logits = rounds.quick(ids, rounds.cache)
        else:
            output = rounds.model.step(ids, rounds.cache)
            logits, hidden = output["logits"].flatten(0, 1).float(), output.get("last_hidden_state")
        self._choice.rules.look(board.tokens, board.places(0, self._count + 1), board.begin)
        self._choice.pick(ids.view(-1, 1), logits, self._slot)
        return hidden

    def _accept(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which places (rows, places) a row takes, 0 or 1; and whether it would go on after each."""
        rounds, slot = self._rounds, self._slot
        shorter = rounds.board.places(1, self._count + 1) < rounds.limit
        still = slot.still_going.view_as(ids) & shorter
        agrees = still[:, :-1] & (slot.token.view_as(ids)[:, :-1] == ids[:, 1:])
        return torch.cat((rounds.going[:, None], agrees), dim=1).cumprod(dim=1), still

    def _write_down(self, takes: Tensor, taken: Tensor) -> None:
        rounds, board, slot = self._rounds, self._rounds.board, self._slot
        places = board.places(0, self._count + 1)
        board.tokens.scatter_(1, places, torch.where(takes > 0, slot.token.view_as(takes), self._choice.pad))
        rounds.scores.scatter_(1, places, slot.picked.view_as(takes))
        if rounds.logprobs is not None and slot.chosen is not None:
            rounds.logprobs.scatter_(1, places, slot.chosen.view_as(takes))
        board.lengths.add_(taken[:, None])
        going = rounds.going.sum()
        rounds.counts[1:].add_(torch.stack(((going > 0).long(), going * self._count, taken.sum() - going)))

    def note(self) -> None:
        """The host counts nothing."""

    def work(self) -> None:
        """All of it: nothing is drawn at random."""
        self.whole()

    def rest(self) -> None:
        """Nothing is left."""
