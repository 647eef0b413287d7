"""The main loop, greedy or sampling: prefill, then choose, append and step until every row is done."""

from __future__ import annotations

from ..base.outputs import GenerateOutput
from ..layers.cache import Cache
from .choice import choose
from .decode import DecodeRequest, DecodeState, Record, StopFlag, advance, note_trouble, raise_trouble, start
from .leaving import Leaving
from .step import Units, workplace


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
    with workplace(request, copies) as place:
        state, logits = start(request, copies, record, place)
        flag = StopFlag(logits.device, at_once=request.streamer is not None)
        choose(request, state, logits, record)
        units, leaving = Units(request, state, place), Leaving(request, state)
        while not _is_over(request, state, flag):
            unit = units.next()
            if unit is None:
                state = leaving.without_done(state)
                choose(request, state, advance(request, state, record), record)
            else:
                unit.run(state)
        state = leaving.whole(state)
        taken = state.length
        output = finish(state, record)
        if place is not None and place.is_shared:
            output.past_key_values = None
        elif isinstance(state.cache, Cache) and request.hands_out_cache:
            # Who goes on from it counts the columns of the text: nothing before it, and nothing after its end.
            state.cache.crop(state.cache.length - taken + state.length)
            if place is not None and place.added:
                state.cache.shift(-place.added)
        return output


def _is_over(request: DecodeRequest, state: DecodeState, flag: StopFlag) -> bool:
    """Hand the newest tokens to who listens; True when there is nothing more to do."""
    if request.streamer is not None:
        request.streamer.put(state.tokens[:, state.length - 1].cpu())
    return state.length >= request.max_length or flag.is_set(state.going)


def finish(state: DecodeState, record: Record) -> GenerateOutput:
    """What a run gives back: steps taken after all rows were done are dropped.

    Raises:
        NumericalError: The model gave NaN.
        GenerationError: Every token was forbidden.
    """
    note_trouble(state)
    raise_trouble(state)
    state.length = state.prompt_length + state.live_steps()
    output = GenerateOutput(sequences=state.ids.clone(), logprobs=state.logprobs, past_key_values=state.cache)
    return record.into(output, state.step)
