"""Beam search on the same step as the main loop, all batch items at once.

The rules are those of transformers 5: of every item's continuations the best few are looked at, those that end are
candidates for the result if they are among the best `num_beams`, the rest run on. Scores of finished sequences are
sums of log-probabilities divided by length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.outputs import GenerateOutput
from .config import GenerationConfig
from .decode import DecodeRequest, DecodeState, Record, advance, raise_trouble, start
from .sampling import exponential_noise

#: What counts as "never": a score no sum of log-probabilities reaches, and still a number one can add to.
HOPELESS = -1.0e9


@dataclass
class Beams:
    """Some sequences of every batch item.

    Attributes:
        tokens: (batch, n, max_length) int64.
        scores: (batch, n) float32.
        origins: (batch, n, max_new) int64, the row each generated token was continued from; -1 where there is none.
    """

    tokens: Tensor
    scores: Tensor
    origins: Tensor

    def take(self, index: Tensor) -> Beams:
        """The beams `index` (batch, m) of each item."""
        return Beams(_take(self.tokens, index), self.scores.gather(1, index), _take(self.origins, index))

    def beside(self, other: Beams) -> Beams:
        """These beams followed by those of `other`."""
        return Beams(
            torch.cat((self.tokens, other.tokens), dim=1),
            torch.cat((self.scores, other.scores), dim=1),
            torch.cat((self.origins, other.origins), dim=1),
        )


@dataclass
class BeamState:
    """Where a search stands.

    Attributes:
        running: The beams that go on.
        finished: The best ended sequences so far; unused places have the score HOPELESS.
        is_finished: (batch, beams) bool, places of `finished` that are in use.
        can_improve: (batch, 1) bool, False once no running beam can beat the finished ones.
        all_ended: () bool, True when every continuation looked at has ended.
    """

    running: Beams
    finished: Beams
    is_finished: Tensor
    can_improve: Tensor
    all_ended: Tensor


def beam_search(request: DecodeRequest) -> GenerateOutput:
    """The best `num_return_sequences` continuations of every prompt.

    Returns:
        Output with `sequences` (batch x returned, length), best first, `sequences_scores` and `beam_indices`.

    Raises:
        NumericalError: The model gave NaN.
        GenerationError: Every token was forbidden.
    """
    config, record = request.config, Record(request.config)
    rows, logits = start(request, _count(config), record)
    state = first_state(request, rows, places=_count(config))
    while True:
        candidates = _candidates(request, state, rows, logits, record)
        _select(request, state, rows, candidates)
        if rows.length >= request.max_length or not _goes_on(config, state):
            break
        origin = state.running.origins[:, :, rows.length - 1 - rows.prompt_length]
        rows.cache.reorder(origin.flatten())
        rows.tokens = state.running.tokens.flatten(0, 1)
        logits = advance(request, rows, record)
    raise_trouble(rows)
    return _result(request, state, rows, record)


def _count(config: GenerationConfig) -> int:
    return config.num_beams or 1


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values (batch, n, length) at `index` (batch, m): (batch, m, length)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def first_state(request: DecodeRequest, rows: DecodeState, places: int) -> BeamState:
    """The start of a search that keeps up to `places` finished sequences of each item."""
    beams, batch = _count(request.config), request.prompt.shape[0]
    device = rows.tokens.device
    # A pad token of 0 counts as none here, as it does in transformers, and the first end token takes its place.
    filler = request.pad_token or next(iter(request.config.eos_ids), 0)
    rows.tokens[:, rows.prompt_length :] = filler
    tokens = rows.tokens.view(batch, beams, -1)
    origins = torch.full((batch, beams, request.max_length - rows.prompt_length), -1, device=device)
    # All beams of an item start out alike, so only the first may be continued.
    scores = torch.full((batch, beams), HOPELESS, device=device)
    scores[:, 0] = 0.0
    return BeamState(
        running=Beams(tokens, scores, origins),
        finished=Beams(
            tokens[:, :1].expand(-1, places, -1),
            torch.full((batch, places), HOPELESS, device=device),
            origins[:, :1].expand(-1, places, -1),
        ),
        is_finished=torch.zeros(batch, places, dtype=torch.bool, device=device),
        can_improve=torch.ones(batch, 1, dtype=torch.bool, device=device),
        all_ended=torch.zeros((), dtype=torch.bool, device=device),
    )


def _candidates(request: DecodeRequest, state: BeamState, rows: DecodeState, logits: Tensor, record: Record) -> Beams:
    """The best continuations by one token, enough of them that `num_beams` go on even if all end tokens are hit."""
    config, beams = request.config, _count(request.config)
    batch, vocabulary = request.prompt.shape[0], logits.shape[-1]
    keep = max(2, 1 + len(config.eos_ids)) * beams
    scores = request.processors(rows.ids, logits.log_softmax(dim=-1))
    scores = request.warpers(rows.ids, scores)
    record.add_scores(logits, scores)
    total = (scores.view(batch, beams, vocabulary) + state.running.scores[:, :, None]).flatten(1)
    if config.do_sample:
        # The largest ratios of probability to exponential noise are a draw without replacement.
        probabilities = total.softmax(dim=-1)
        chosen = torch.topk(probabilities / exponential_noise(probabilities, request.generators), keep).indices
        best = total.gather(1, chosen)
    else:
        best, chosen = torch.topk(total, keep, dim=-1)
    note_beam_trouble(rows, scores.amax(dim=-1).view(batch, beams), best)
    return continued(state, rows, chosen // vocabulary, chosen % vocabulary, best)


def continued(state: BeamState, rows: DecodeState, source: Tensor, token: Tensor, scores: Tensor) -> Beams:
    """Beams `source` (batch, n) of each item, each with one more token (batch, n) and its new score (batch, n)."""
    batch, beams = state.running.scores.shape
    offset = torch.arange(batch, device=source.device)[:, None] * beams
    candidates = Beams(_take(state.running.tokens, source), scores, _take(state.running.origins, source))
    candidates.tokens[:, :, rows.length] = token
    candidates.origins[:, :, rows.length - rows.prompt_length] = source + offset
    return candidates


def note_beam_trouble(rows: DecodeState, row_best: Tensor, best: Tensor) -> None:
    """Mark rows whose scores hold NaN, and items none of whose beams can go on; a single beam may just die out.

    Args:
        rows: The state whose `trouble` is kept.
        row_best: (batch, beams) best score of each row, NaN if one of them is.
        best: (batch, candidates) scores of the candidates.
    """
    is_nan = row_best.isnan()
    is_stuck = (best == -torch.inf).all(dim=1, keepdim=True)
    code = 2 * (rows.length - rows.prompt_length) + 2 + is_nan.long()
    bad = (is_nan | is_stuck).flatten()
    rows.trouble = torch.where(bad & (rows.trouble == 0), code.flatten(), rows.trouble)


def _select(request: DecodeRequest, state: BeamState, rows: DecodeState, candidates: Beams) -> None:
    """Split the candidates into those that end and those that run on, and append the newest token."""
    config, beams = request.config, _count(request.config)
    rows.length += 1
    batch, seen = candidates.scores.shape
    ended = request.stopping(candidates.tokens[:, :, : rows.length].flatten(0, 1), None).view(batch, seen)
    if rows.length >= request.max_length:
        ended = torch.ones_like(ended)
    state.all_ended = ended.all()
    alive = candidates.scores + ended.float() * HOPELESS
    state.running = Beams(candidates.tokens, alive, candidates.origins).take(torch.topk(alive, beams).indices)
    # Only what ended among the best `beams` competes with what ended earlier.
    is_top = torch.arange(seen, device=ended.device) < beams
    ended = ended & is_top
    new_length = rows.length - rows.prompt_length
    scores = candidates.scores / new_length ** (config.length_penalty or 0.0)
    closed = ~state.can_improve
    if config.early_stopping is True:
        closed = closed | state.is_finished.all(dim=1, keepdim=True)
    scores = scores + closed.float() * HOPELESS + (~ended).float() * HOPELESS
    merged = state.finished.beside(Beams(candidates.tokens, scores, candidates.origins))
    best = torch.topk(merged.scores, beams).indices
    state.is_finished = torch.cat((state.is_finished, ended), dim=1).gather(1, best)
    state.finished = merged.take(best)
    state.can_improve = state.can_improve & _best_can_improve(request, state, rows)


def _best_can_improve(request: DecodeRequest, state: BeamState, rows: DecodeState) -> Tensor:
    """(batch, 1) whether the best running beam could still beat the worst finished sequence."""
    config = request.config
    penalty = config.length_penalty or 0.0
    length = rows.length - rows.prompt_length
    if config.early_stopping == "never" and penalty > 0:
        # Longer sequences are favoured, so the most hopeful length is the longest.
        length = request.max_length - rows.prompt_length
    hope = state.running.scores[:, :1] / length**penalty
    worst = state.finished.scores.amin(dim=1, keepdim=True)
    worst = torch.where(state.is_finished, worst, HOPELESS)
    return (hope > worst).any(dim=1, keepdim=True)


def _goes_on(config: GenerationConfig, state: BeamState) -> bool:
    going = state.can_improve.any() & ~state.all_ended
    if config.early_stopping is True:
        going = going & ~state.is_finished.all()
    return bool(going)


def _result(request: DecodeRequest, state: BeamState, rows: DecodeState, record: Record) -> GenerateOutput:
    config = request.config
    returned = config.num_return_sequences or 1
    tokens = state.finished.tokens[:, :returned].flatten(0, 1)
    origins = state.finished.origins[:, :returned].flatten(0, 1)
    scores = state.finished.scores[:, :returned].flatten()
    lengths = (origins >= 0).sum(dim=1)
    longest = int(lengths.max())
    output = GenerateOutput(
        sequences=tokens[:, : rows.prompt_length + longest].clone(),
        sequences_scores=scores if config.output_scores else None,
        beam_indices=origins[:, :longest].clone(),
        logprobs=scores * lengths ** (config.length_penalty or 0.0) if request.logprobs else None,
        past_key_values=rows.cache,
    )
    return record.into(output, rows.length - rows.prompt_length)
