"""Speculative decoding: cheap drafts of several tokens, checked by the model in one pass.

The model chooses at every drafted place exactly as it would have without a draft, and goes on while its choice is
the draft's: so the result is that of the main loop, greedy or sampled, only sooner (arXiv:2211.17192, with drafts
that are certain). In a greedy batch each row goes on as far as it agrees with its own drafts: its tokens are written at
its own length, while the newest keys of all rows lie in one slot of the cache (`Cache.take_back`), so that a pass is
that of any other batch. Rows that must keep step (`_may_part`) advance as far as all of them agree. `rounds` does the
same as units of tensors, where that is possible.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..base.outputs import CausalLMOutput, GenerateOutput, ModelOutput
from ..layers.cache import SPARE
from .choice import Choice, Slot, choose
from .decode import DecodeRequest, DecodeState, Record
from .drafts import Drafter, Texts
from .logits import LogitsProcessorList, PrefixConstrainedLogitsProcessor
from .sample import finish
from .stopping import EosTokenCriteria


class Balance:
    """Whether drafts are worth what they cost, by how many were accepted; pauses them while they are not.

    It counts and does not measure, so that a run can be repeated to the last bit. Drafts that are hardly ever right
    are tried again after pauses of growing length.

    Args:
        cost: What a draft costs, as a share of a step of the model.
    """

    #: Rounds that are looked at together, and the first pause.
    ROUNDS = 16

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.rounds = self.pause = 0
        self.gain = 0.0
        self._next_pause = self.ROUNDS

    def wants_drafts(self) -> bool:
        """Whether the round that begins is to have drafts."""
        if self.pause > 0:
            self.pause -= 1
            return False
        return True

    def note(self, drafted: float, accepted: float) -> None:
        """A round is over: each accepted draft of a row saved a step, and each drafted one cost a part of it."""
        self.gain += accepted - drafted * self.cost
        self.rounds += 1
        if self.rounds == self.ROUNDS:
            pays = self.gain >= 0
            self.pause = 0 if pays else self._next_pause
            self._next_pause = self.ROUNDS if pays else 2 * self._next_pause
            self.rounds, self.gain = 0, 0.0


def speculate(
    request: DecodeRequest, drafter: Drafter, state: DecodeState, logits: Tensor, record: Record
) -> GenerateOutput:
    """Continue every prompt with the help of drafts; see `sample.sample` for what comes back.

    Args:
        request, state, logits, record: As `decode.start` left them.
        drafter: Makes the drafts.
    """
    counts = {"rounds": 0, "drafted": 0, "accepted": 0}
    balance = Balance(drafter.cost)
    _choose_and_show(request, state, logits, record)
    rows = _Apart(request, state, logits) if _may_part(request, len(state.tokens)) else _InStep(request, state, record)
    texts = rows.texts
    room = min(request.max_length - texts.longest - 1, rows.most)
    while texts.longest:
        has_drafts = room > 0 and balance.wants_drafts()
        newest = texts.newest()
        drafts = drafter.propose(texts, room) if has_drafts else newest[:, :0]
        if drafts.shape[1] == 0 and state.quick is not None and state.hidden is None:
            output: ModelOutput = CausalLMOutput(logits=state.quick(newest, state.cache)[:, None])
        else:
            output = request.model.step(torch.cat((newest, drafts), dim=1), state.cache, **request.flags)
        going = sum(texts.going)
        taken = rows.take(output, drafts)
        room = min(request.max_length - texts.longest - 1, rows.most)
        _forget_others(state, texts, output, drafts.shape[1] + 1 - taken, room + 1)
        accepted = int(taken.sum()) - going
        if has_drafts:
            balance.note(drafts.shape[1], accepted / going)
        for name, count in (("rounds", 1), ("drafted", drafts.shape[1] * going), ("accepted", accepted)):
            counts[name] += count
    rows.settle()
    result = finish(state, record)
    result.draft_counts = counts
    return result


def _forget_others(state: DecodeState, texts: Texts, output: ModelOutput, wrong: Tensor, room: int) -> None:
    """Take back the last `wrong` (rows,) tokens that were read, and keep the state before each newest one.

    Args:
        room: Tokens that the next pass may bring.
    """
    last = output.get("last_hidden_state")
    if last is not None:
        place = (last.shape[1] - 1 - wrong).clamp(min=0)
        state.hidden = last[torch.arange(len(last), device=last.device), place][:, None]
    if texts.longest:
        # What rows hold that are done is not looked at any more.
        going = torch.tensor(texts.going, device=wrong.device)
        wrong = torch.where(going, wrong, state.cache.length)
    state.cache.take_back(wrong, room if texts.longest else 0)


def _may_part(request: DecodeRequest, rows: int) -> bool:
    """Whether rows may go on one by one: nothing is drawn or told a step at a time, and all rules are functions."""
    config, ours = request.config, __name__.partition(".")[0]
    asks_for_more = bool(request.flags) or config.output_scores or config.output_logits or request.streamer is not None
    return (
        rows > 1
        and not asks_for_more
        and not config.do_sample
        and not request.warpers
        and all(type(rule) is EosTokenCriteria for rule in request.stopping)
        and all(type(rule).__module__.partition(".")[0] == ours for rule in request.processors)
        # Whose function may know real texts only.
        and not any(type(rule) is PrefixConstrainedLogitsProcessor for rule in request.processors)
    )


class _InStep:
    """Rows that advance together, as far as all of them agree with their drafts.

    Args:
        request, state, record: The run; the first token has been chosen.
    """

    #: Drafts of a round at most: so many tokens can be taken back by layers with a window.
    most = SPARE

    def __init__(self, request: DecodeRequest, state: DecodeState, record: Record) -> None:
        self._request, self._state, self._record = request, state, record
        self.texts = Texts(state.tokens, [], [])
        self._tell()

    def take(self, output: ModelOutput, drafts: Tensor) -> Tensor:
        """Choose tokens place by place, until a choice is not the draft's; how many each row (rows,) took."""
        request, state, record = self._request, self._state, self._record
        begin = state.length
        for place in range(drafts.shape[1] + 1):
            record.add_output(_at(output, place))
            _choose_and_show(request, state, output["logits"][:, place].float(), record)
            if place == drafts.shape[1]:
                break
            agreed = state.finished | (state.ids[:, -1] == drafts[:, place])
            if not bool(agreed.all()) or not bool(state.going.any()):
                break
        self._tell()
        return torch.full((len(drafts),), state.length - begin, device=drafts.device)

    def _tell(self) -> None:
        state, rows = self._state, len(self._state.tokens)
        goes = state.length < self._request.max_length and bool(state.going.any())
        self.texts.lengths, self.texts.going = [state.length] * rows, [goes] * rows

    def settle(self) -> None:
        """Nothing is left to be done."""


class _Apart:
    """Rows of which each advances as far as it agrees with its own drafts; `_may_part` holds.

    Args:
        request, state, logits: The run; the first token has been chosen, from logits of this size.
    """

    #: As many again may be gaps.
    most = SPARE // 2

    def __init__(self, request: DecodeRequest, state: DecodeState, logits: Tensor) -> None:
        self._request, self._state = request, state
        # The rules have to see each row at its own length.
        self._choice = Choice(replace(request, processors=LogitsProcessorList()), logits)
        self.texts = Texts(state.tokens, [state.length] * len(state.tokens), [])
        self._tell(state.going)

    def take(self, output: ModelOutput, drafts: Tensor) -> Tensor:
        """Choose tokens place by place, until no row's choice is its draft's; how many each row (rows,) took."""
        texts, count = self.texts, drafts.shape[1]
        going = torch.tensor(texts.going, device=drafts.device)
        takes, taken = going, torch.zeros_like(going, dtype=torch.long)
        for place in range(count + 1):
            slot = self._choose(texts, output["logits"][:, place].float(), takes)
            taken += takes
            going = torch.where(takes, slot.still_going, going)
            takes = takes & slot.still_going
            if place < count:
                takes = takes & (slot.token == drafts[:, place])
            texts = Texts(texts.tokens, [length + 1 for length in texts.lengths], takes.tolist())
            if not any(texts.going):
                break
        self.texts.lengths = [sum(both) for both in zip(self.texts.lengths, taken.tolist(), strict=True)]
        self._tell(going)
        return taken

    def _choose(self, texts: Texts, logits: Tensor, takes: Tensor) -> Slot:
        """Choose the next token of each row, and write it down for those (rows,) that take it."""
        state, column = self._state, texts.columns(0, 1)
        score, chosen = torch.zeros(2, len(takes), dtype=torch.float32, device=takes.device)
        token, keep = torch.zeros_like(column[:, 0]), None if state.chosen is None else chosen
        slot = Slot(going=takes, still_going=torch.zeros_like(takes), token=token, picked=score, chosen=keep)
        self._choice.pick(texts.tokens, texts.ruled(self._request.processors, logits), slot)
        _write(state.tokens, column, token, takes)
        step = column - state.prompt_length
        _write(state.picked.t(), step, score, takes)
        if state.chosen is not None:
            _write(state.chosen.t(), step, chosen, takes)
        return slot

    def _tell(self, going: Tensor) -> None:
        limit = self._request.max_length
        going_on = zip(self.texts.lengths, going.tolist(), strict=True)
        self.texts.going = [goes and length < limit for length, goes in going_on]

    def settle(self) -> None:
        """Write down for all rows at once how far each has come."""
        state = self._state
        state.length = max(self.texts.lengths)
        steps = torch.tensor(self.texts.lengths, device=state.alive.device) - state.prompt_length
        state.alive.copy_(torch.arange(len(state.alive), device=steps.device)[:, None] < steps)


def _write(buffer: Tensor, columns: Tensor, values: Tensor, rows: Tensor) -> None:
    """Write values (rows,) to the columns (rows, 1) of a buffer, in those rows (rows,) that are marked."""
    values = torch.where(rows[:, None], values[:, None], buffer.gather(1, columns))
    buffer.scatter_(1, columns, values)


def _choose_and_show(request: DecodeRequest, state: DecodeState, logits: Tensor, record: Record) -> None:
    choose(request, state, logits, record)
    if request.streamer is not None:
        request.streamer.put(state.ids[:, -1].cpu())


def _at(output: ModelOutput, place: int) -> ModelOutput:
    """A step's output as it would be for the token at `place` alone; queries are the second last dimension."""
    kept = {}
    for name in ("attentions", "decoder_attentions", "cross_attentions", "hidden_states", "decoder_hidden_states"):
        layers = output.get(name)
        if layers is not None:
            kept[name] = tuple(layer[..., place : place + 1, :] for layer in layers)
    return type(output)(**kept)
