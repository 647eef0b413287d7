"""Beam search that waits: it goes on until a fixed number of sequences has ended, however good they are.

The rules are those of OpenAI's Whisper: an end token counts wherever it ranks above the last beam that goes on, the
first `num_beams * patience` ended sequences are kept, and the best of them is the likeliest per token. Scores are
renormalised after the processors, so that a hypothesis is as likely as the rules let it be.
Source: arXiv:2204.05424 (patience); arXiv:2212.04356.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..base.errors import GenerationError
from ..base.outputs import GenerateOutput
from .beam import HOPELESS, Beams, BeamState, continued, first_state, note_beam_trouble
from .config import GenerationConfig
from .decode import DecodeRequest, DecodeState, Record, advance, raise_trouble, start


def patient_beam_search(request: DecodeRequest) -> GenerateOutput:
    """The best `num_return_sequences` continuations of every prompt, as `beam.beam_search` gives them.

    Raises:
        NumericalError: The model gave NaN.
        GenerationError: Every token was forbidden, or the patience is too small to wait for one sequence.
    """
    config, record = request.config, Record(request.config)
    beams, wanted = config.num_beams or 1, wanted_sequences(config)
    rows, logits = start(request, beams, record)
    state = first_state(request, rows, places=max(wanted, beams))
    while True:
        candidates = _candidates(request, state, rows, logits, record)
        rows.length += 1
        _select(request, state, rows, candidates, wanted)
        if rows.length >= request.max_length or not bool(state.can_improve.any()):
            break
        rows.cache.reorder(state.running.origins[:, :, rows.length - 1 - rows.prompt_length].flatten())
        rows.tokens = state.running.tokens.flatten(0, 1)
        logits = advance(request, rows, record)
    raise_trouble(rows)
    _fill(state, state.can_improve, beams)
    return _result(request, state, rows, record)


def wanted_sequences(config: GenerationConfig) -> int:
    """How many sequences of an item must have ended.

    Raises:
        GenerationError: It is less than one, or tokens are to be drawn at random.
    """
    wanted = round((config.num_beams or 1) * (config.patience or 1.0))
    if wanted < 1:
        raise GenerationError(
            f"patience={config.patience} with num_beams={config.num_beams} waits for {wanted} sequences: raise it, so "
            "that the product rounds to at least 1."
        )
    if config.do_sample:
        raise GenerationError("patience is for searches, and do_sample=True draws at random: leave one of them out.")
    return wanted


def _candidates(request: DecodeRequest, state: BeamState, rows: DecodeState, logits: Tensor, record: Record) -> Beams:
    """The likeliest continuations: at most one of each beam and end token ends, so enough of them go on."""
    batch, beams = request.prompt.shape[0], request.config.num_beams or 1
    scores = request.warpers(rows.ids, request.processors(rows.ids, logits)).log_softmax(dim=-1)
    record.add_scores(logits, scores)
    vocabulary = scores.shape[-1]
    total = (scores.view(batch, beams, vocabulary) + state.running.scores[:, :, None]).flatten(1)
    keep = (1 + max(len(request.config.eos_ids), 1)) * beams
    best, chosen = torch.topk(total, min(keep, total.shape[1]), dim=-1)
    note_beam_trouble(rows, scores.amax(dim=-1).view(batch, beams), best)
    return continued(state, rows, chosen // vocabulary, chosen % vocabulary, best)


def _select(request: DecodeRequest, state: BeamState, rows: DecodeState, candidates: Beams, wanted: int) -> None:
    """Keep candidates that end while there is room for them, and let the best others run on.

    Items that have all they want take no more, so that none depends on the rest of the batch.
    """
    batch, seen = candidates.scores.shape
    beams = request.config.num_beams or 1
    ended = request.stopping(candidates.tokens[:, :, : rows.length].flatten(0, 1), None).view(batch, seen)
    # Rather one that the rules forbid goes on than one that has ended.
    alive = torch.where(ended, 2 * HOPELESS, candidates.scores.clamp(min=HOPELESS))
    state.running = replace(candidates, scores=alive).take(torch.topk(alive, beams).indices)
    # What ranks behind the last beam that goes on is not looked at; what the rules forbid is no sequence.
    going_before = (~ended).long().cumsum(dim=1)
    is_new = ended & (going_before < beams) & (candidates.scores > HOPELESS / 2) & state.can_improve
    count = state.is_finished.sum(dim=1, keepdim=True)
    is_new = is_new & (count + is_new.long().cumsum(dim=1) <= wanted)
    _keep_first(state, candidates, is_new)
    is_full = state.is_finished.sum(dim=1, keepdim=True) >= wanted
    if wanted < beams:
        _fill(state, state.can_improve & is_full, beams)
    state.can_improve = state.can_improve & ~is_full


def _keep_first(state: BeamState, others: Beams, wanted: Tensor) -> None:
    """Append those of `others` that are wanted (batch, n) to the finished ones; there is room for them."""
    places = state.finished.scores.shape[1]
    used = torch.cat((state.is_finished, wanted), dim=1)
    order = used.long().argsort(dim=1, descending=True, stable=True)[:, :places]
    kept = state.finished.beside(others).take(order)
    state.is_finished = used.gather(1, order)
    state.finished = replace(kept, scores=torch.where(state.is_finished, kept.scores, HOPELESS))


def _fill(state: BeamState, items: Tensor, beams: int) -> None:
    """Where fewer than `beams` sequences of `items` (batch, 1) have ended, the best running ones count as they are."""
    count = state.is_finished.sum(dim=1, keepdim=True)
    places = torch.arange(beams, device=count.device)
    _keep_first(state, state.running, items & (count + places < beams) & (state.running.scores > HOPELESS / 2))


def _result(request: DecodeRequest, state: BeamState, rows: DecodeState, record: Record) -> GenerateOutput:
    config = request.config
    texts = state.finished.tokens[:, :, rows.prompt_length :]
    written = state.finished.origins >= 0
    ends = torch.isin(texts, torch.tensor(config.eos_ids, device=texts.device)) & written
    lengths = written.sum(dim=-1)
    scores = state.finished.scores / length_divisor(config, lengths - ends.sum(dim=-1))
    scores = torch.where(state.is_finished, scores, HOPELESS)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : config.num_return_sequences or 1]
    best = state.finished.take(order)
    longest = int(lengths.gather(1, order).max())
    output = GenerateOutput(
        sequences=best.tokens.flatten(0, 1)[:, : rows.prompt_length + longest].clone(),
        sequences_scores=scores.gather(1, order).flatten() if config.output_scores else None,
        beam_indices=best.origins.flatten(0, 1)[:, :longest].clone(),
        logprobs=best.scores.flatten() if request.logprobs else None,
        past_key_values=rows.cache,
    )
    return record.into(output, rows.length - rows.prompt_length)


def length_divisor(config: GenerationConfig, lengths: Tensor) -> Tensor:
    """What sums of log-probabilities are divided by before they are compared, from lengths without the end token.

    Source: arXiv:1609.08144, formula 14, where the config has a `google_length_penalty`.
    """
    if config.google_length_penalty is not None:
        return torch.pow((5 + lengths) / 6, config.google_length_penalty)
    return torch.pow(lengths.clamp(min=1).float(), config.length_penalty if config.length_penalty is not None else 1.0)
