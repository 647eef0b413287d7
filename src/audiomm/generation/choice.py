"""From the scores of the next token to that token: rules, the pick, and which rows go on.

All of it is tensors in, tensors out, and few kernels: what a step finds out is written straight to where it is kept,
and what has to be known at the end only is worked out there (`decode.finish`).
"""

from __future__ import annotations

from collections.abc import Hashable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .decode import DecodeRequest, DecodeState, Record
from .rules import Rules
from .sampling import best_in_blocks, has_many, pick_random
from .stopping import EosTokenCriteria, StoppingCriteriaList


@dataclass
class Slot:
    """Where a step reads which rows go on and writes what it finds out, each (rows,).

    Attributes:
        going: bool, rows that are not done.
        still_going: bool, to be written: the same after the step; may be `going` itself.
        token: int64, to be written.
        picked: float32, to be written: the score of the token.
        chosen: float32, to be written where wanted: the log-probability of the token.
    """

    going: Tensor
    still_going: Tensor
    token: Tensor
    picked: Tensor
    chosen: Tensor | None


class Choice:
    """How the tokens of one run are chosen.

    Args:
        request: What is asked for.
        scores: (rows, vocabulary) of the first token: their size and place count, not their values.
    """

    def __init__(self, request: DecodeRequest, scores: Tensor) -> None:
        rows, vocabulary = scores.shape
        self.vocabulary = vocabulary
        self.rules, self.warpers = Rules(request.processors), Rules(request.warpers)
        self.samples, self.generators = bool(request.config.do_sample), request.generators
        ends = [rule for rule in request.stopping if type(rule) is EosTokenCriteria]
        #: What ends a row besides the end tokens.
        self.others = StoppingCriteriaList(rule for rule in request.stopping if type(rule) is not EosTokenCriteria)
        self.ends = sorted({token for rule in ends for token in rule.eos_token_id.tolist() if token < vocabulary})
        #: (vocabulary,) the score a token must beat so that its row goes on: an end token never does.
        self._bars = torch.full((vocabulary,), -torch.inf, device=scores.device)
        self._bars[self.ends] = torch.inf
        #: A row that is done is filled up with an end token, which keeps it so.
        self._stays_done = request.pad_token in self.ends
        self.pad = request.pad_token
        self._pad = torch.full((), self.pad, device=scores.device)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=scores.device)

    def key(self) -> Hashable | None:
        """What is done from here on, as a value to compare; None where it takes more than tensors."""
        rules, warpers = self.rules.key(), self.warpers.key()
        if rules is None or warpers is None or self.warpers.until < self.rules.until:
            return None
        given = self.generators
        generators = given if given is None or isinstance(given, Generator) else tuple(given)
        return rules, warpers, tuple(self.ends), self.pad, self.samples, generators

    def frozen(self) -> Choice:
        """This choice as it is made now, whatever length there will be."""
        other = copy(self)
        other.rules, other.warpers = self.rules.frozen(), self.warpers.frozen()
        return other

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, and there are no others."""
        self.rules.keep(rows)
        self.warpers.keep(rows)
        self._tokens = self._tokens.new_zeros(len(rows))

    def pick(self, ids: Tensor, logits: Tensor, slot: Slot) -> Tensor:
        """Choose the tokens after ids (rows, length) from logits (rows, vocabulary), and fill the slot.

        Returns:
            (rows, vocabulary) the scores that the tokens were chosen by.
        """
        processed = self.rules(ids, logits)
        scores = self.warpers(ids, processed)
        if self.samples:
            tokens, picked = pick_random(scores, self.generators)
            slot.picked.copy_(picked)
        elif scores.dtype == slot.picked.dtype and not has_many(scores):
            tokens = self._tokens
            torch.max(scores, dim=-1, out=(slot.picked, tokens))
        else:
            picked, tokens = best_in_blocks(scores) if has_many(scores) else scores.max(dim=-1)
            slot.picked.copy_(picked)
        if slot.chosen is not None:
            logs = processed.float().log_softmax(dim=-1)
            torch.gather(logs, 1, tokens[:, None], out=slot.chosen[:, None])
        torch.where(slot.going, tokens, self._pad, out=slot.token)
        if self._stays_done:
            torch.gt(slot.picked, self._bars.index_select(0, slot.token), out=slot.still_going)
        else:
            goes_on = slot.picked > self._bars.index_select(0, tokens)
            torch.logical_and(slot.going, goes_on, out=slot.still_going)
        return scores


def choose(request: DecodeRequest, state: DecodeState, logits: Tensor, record: Record) -> None:
    """Pick and append the next token of each row from its logits (rows, vocabulary), and see which rows are done."""
    choice = state.choice
    if choice is None:
        choice = state.choice = Choice(request, logits)
    step = state.step
    slot = Slot(
        going=state.alive[step],
        still_going=state.alive[step + 1],
        token=state.tokens[:, state.length],
        picked=state.picked[step],
        chosen=None if state.chosen is None else state.chosen[step],
    )
    record.add_scores(logits, choice.pick(state.ids, logits, slot))
    state.length += 1
    if choice.others:
        scored = tuple(record.steps.get("scores", ()))
        slot.still_going.logical_and_(~choice.others(state.ids, scored))
