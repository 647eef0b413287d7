"""The main loop, greedy or sampling: prefill, then choose, append and step until every row is done."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.outputs import GenerateOutput
from .decode import DecodeRequest, DecodeState, Record, StopFlag, advance, note_trouble, raise_trouble, start
from .sampling import pick_best, pick_random


def sample(request: DecodeRequest) -> GenerateOutput:
    """Continue every prompt, `num_return_sequences` times when sampling.

    Returns:
        Output with `sequences` (rows, length): rows that ended early are padded at the right.

    Raises:
        NumericalError: The model gave NaN.
        GenerationError: Every token was forbidden.
    """
    record = Record(request.config)
    copies = request.config.num_return_sequences or 1
    state, logits = start(request, copies, record)
    flag = StopFlag(logits.device, at_once=request.streamer is not None)
    while True:
        choose(request, state, logits, record)
        if request.streamer is not None:
            request.streamer.put(state.tokens[:, state.length - 1].cpu())
        if state.length >= request.max_length or flag.is_set(state.finished):
            break
        logits = advance(request, state, record)
    return finish(state, record)


def finish(state: DecodeState, record: Record) -> GenerateOutput:
    """What a run gives back: steps taken after all rows were done are dropped.

    Raises:
        NumericalError: The model gave NaN.
        GenerationError: Every token was forbidden.
    """
    raise_trouble(state)
    state.length = state.prompt_length + int(state.live_steps)
    output = GenerateOutput(sequences=state.ids.clone(), logprobs=state.logprobs, past_key_values=state.cache)
    return record.into(output, state.length - state.prompt_length)


def choose(request: DecodeRequest, state: DecodeState, logits: Tensor, record: Record) -> None:
    """Pick and append the next token of each row from its logits (rows, vocabulary), and see which rows are done."""
    processed = request.processors(state.ids, logits)
    scores = request.warpers(state.ids, processed)
    record.add_scores(logits, scores)
    if request.config.do_sample:
        tokens, picked = pick_random(scores, request.generators)
    else:
        tokens, picked = pick_best(scores)
    state.live_steps = state.live_steps + (~state.finished).any()
    note_trouble(state, picked)
    if state.logprobs is not None:
        chosen = processed.gather(-1, tokens[:, None])[:, 0].float() - processed.float().logsumexp(dim=-1)
        state.logprobs = state.logprobs + torch.where(state.finished, 0.0, chosen)
    state.append(torch.where(state.finished, request.pad_token, tokens))
    scored = tuple(record.steps.get("scores", ()))
    state.finished = state.finished | request.stopping(state.ids, scored)
