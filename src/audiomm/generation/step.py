"""The whole decode step as one unit: model, rules, pick, rows that end, and the writing down of it all.

A unit reads and writes tensors at fixed addresses only, so that it can be compiled or captured (see `runners`). Cache
and buffers are kept between calls together with the units that were made for them: a further call with the same shapes
replays at once.
What is no tensor (rules and criteria of the caller, streamers, records) makes a run go step by step, as `sample` does
on its own: that is the slow twin of everything here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.outputs import ModelOutput
from ..layers.cache import Cache
from ..layers.regions import recorded_by
from .choice import Choice, Slot
from .decode import DecodeRequest, DecodeState, QuickStep, last_logits, quick_step
from .regions import KEPT_PROMPTS, Recorder, padded
from .runners import Mode, Runner, Shelf, device_mode, make_runner, surroundings
from .stopping import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

#: Units are worth their making from so many steps on, and have room for so many at least.
FEWEST_STEPS, SHORTEST_ROOM = 8, 64


def mode_of(request: DecodeRequest, tokens: int | None = None) -> Mode:
    """How steps can be taken, by the run's config and the device; single rules may still say no.

    Args:
        request: The run.
        tokens: That a step reads; one for each prompt, if None.
    """
    config, model = request.config, request.model
    asks_for_more = bool(request.flags) or config.output_scores or config.output_logits or request.streamer is not None
    on_host = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria}
    if asks_for_more or not all(type(rule) in on_host for rule in request.stopping):
        return "plain"
    if request.past is not None or not isinstance(model, nn.Module) or not hasattr(model, "quick_step"):
        return "plain"
    mode = device_mode(config, request.prompt.device)
    return "plain" if mode == "captured" and not _can_be_captured(model, tokens or len(request.prompt)) else mode


def _can_be_captured(model: nn.Module, tokens: int) -> bool:
    # What a graph has recorded does not see that a module was changed; a model with a quick step is as it was.
    step = quick_step(model)
    if step is None or len({weight.device for weight in model.parameters()}) > 1:
        return False
    # A failed capture is not to be tried: torch does not leave it cleanly.
    waits = getattr(step, "waits", None)
    return waits is None or not waits(tokens)


class Workplace:
    """Cache and buffers of runs of one shape, and the units that work in them.

    Attributes:
        mode: "compiled" or "captured".
        capacity: Tokens there is room for.
        cache: The cache of the last run, or None before the first.
        units: By what they do; see `Choice.key`.
        regions: Of prompts, which write to the cache.
        is_shared: Whether another run will work here after this one.
        added: Columns that the prompt was padded with.
    """

    def __init__(self, mode: Mode, capacity: int, is_shared: bool) -> None:
        self.mode, self.capacity, self.is_shared = mode, capacity, is_shared
        self.cache: Any = None
        self.added = 0
        self.units: dict[Hashable, Any] = {}
        self.regions: Shelf[Any] = Shelf(KEPT_PROMPTS)
        self._tensors: dict[str, Tensor] = {}

    def empty_cache(self, limit: int) -> Any:
        """The cache of the last run, emptied, if it holds `limit` tokens; else None."""
        if self.cache is None or self.cache.capacity < limit:
            self.units.clear()
            self.regions = Shelf(KEPT_PROMPTS)
            return None
        self.cache.reset()
        return self.cache

    def read_prompt(self, request: DecodeRequest, cache: Any, inputs: dict[str, Any], limit: int) -> ModelOutput:
        """`model.prefill`, recorded where that is possible.

        Args:
            cache: Of this place; empty.
            inputs: What prefill takes besides prompt and mask.
            limit: Tokens that the cache must have room for, but for padding.
        """
        self.cache = cache
        prompt, mask = padded(request.prompt, request.prompt_mask, inputs, cache.capacity - limit)
        self.added = prompt.shape[1] - request.prompt.shape[1]
        # Only a model with a quick step is known to be as it was when a prompt was recorded.
        may_record = self.mode != "plain" and quick_step(request.model) is not None
        with recorded_by(Recorder(self.mode, request.config, self.regions) if may_record else None):
            return request.model.prefill(prompt, cache, attention_mask=mask, **inputs)

    def tensor(self, name: str, shape: tuple[int, ...], value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor full of `value`: that of the last run where there is one."""
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            found = self._tensors[name] = torch.empty(shape, device=device, dtype=dtype)
        return found.fill_(value)


@contextmanager
def workplace(request: DecodeRequest, copies: int, rows: int | None = None) -> Iterator[Workplace | None]:
    """The place where a run keeps its tensors at fixed addresses; None for a run that goes step by step.

    Args:
        copies: Rows that a prompt becomes.
        rows: Of the place; as many as there are prompts, if None.
    """
    mode = mode_of(request, rows or len(request.prompt) * copies)
    if mode == "plain":
        yield None
        return
    config, model = request.config, request.model
    capacity = _bucket(max(request.max_length, config.max_cache_len or 0), model)
    # Who gets the cache may keep it, and rows that are repeated after the prompt move to other addresses.
    is_shared = copies == 1 and not config.return_dict_in_generate
    # A quick step is another one when anything about the model has changed, and then it starts with none.
    places: Shelf[Workplace] = vars(quick_step(model) or model).setdefault("_workplaces", Shelf())
    weight = next(model.parameters())  # type: ignore[attr-defined]
    key = (
        (mode, repr(config.compile_config), rows or len(request.prompt), capacity),
        (request.logprobs, config.cross_cache_dtype),
        (weight.dtype, *surroundings(weight.device)),
    )
    place = (places.take(key) if is_shared else None) or Workplace(mode, capacity, is_shared)
    try:
        yield place
    finally:
        if is_shared:
            places.give_back(key, place)


def _bucket(length: int, model: Any) -> int:
    """Room for `length` tokens: the next power of two, or all that the model has positions for."""
    bucket = max(SHORTEST_ROOM, 1 << (length - 1).bit_length())
    most = getattr(model.config, "max_target_positions", None)
    return min(bucket, most) if most is not None and most >= length else bucket


class StepUnit:
    """One decode step for as many rows as there are, from tensors to tensors; see `runners.Unit`.

    Args:
        state: Whose buffers and cache the unit works in.
        advance: (ids (rows, 1), cache) -> logits (rows, vocabulary).
        choice: How tokens are chosen at every length.
        runner: Runs the step.
    """

    title = "The decode step"

    def __init__(self, state: DecodeState, advance: QuickStep, choice: Choice, runner: Runner) -> None:
        rows, device = len(state.tokens), state.tokens.device
        self.advance, self.choice, self.cache, self.runner = advance, choice, state.cache, runner
        self._tokens, self._alive, self._picked, self._chosen = state.tokens, state.alive, state.picked, state.chosen
        #: (rows,) the newest tokens.
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._going = torch.ones(rows, dtype=torch.bool, device=device)
        self._score, self._logprob = torch.zeros(2, rows, dtype=torch.float32, device=device)
        #: (1,) column of the next token, and number of the step.
        self._column, self._step = torch.zeros(2, 1, dtype=torch.long, device=device)
        #: Code that only calls modules says nothing when one of them changes.
        self.is_settled = state.quick is not None
        #: (rows, vocabulary) float32 scores, where tokens are drawn from them.
        self._scores = None
        if choice.samples:
            self._scores = torch.empty(rows, choice.vocabulary, dtype=torch.float32, device=device)

    def enter(self, state: DecodeState, choice: Choice) -> None:
        """Go on from where a run stands.

        Raises:
            GenerationError: Tensors of the run are not those that the unit was made for.
        """
        self.runner.check(self.watched(state))
        self.choice.rules.take(choice.rules)
        self.resume(state)

    def resume(self, state: DecodeState) -> None:
        """Read from a run what the next step begins with; the rules have been told."""
        self._token.copy_(state.ids[:, -1])
        self._going.copy_(state.going)
        self._column.fill_(state.length)
        self._step.fill_(state.step)

    def watched(self, state: DecodeState) -> dict[str, Tensor]:
        """The tensors of a run that must stay where they are, by name."""
        return {"tokens": state.tokens, "alive": state.alive, "picked": state.picked, **cache_tensors(state.cache)}

    def run(self, state: DecodeState) -> None:
        """Take a step: one more token for each row."""
        self.runner.run(self)
        state.length += 1
        others = None if state.choice is None else state.choice.others
        if others:
            for going in (self._going, state.going):
                going.logical_and_(~others(state.ids, ()))

    def logits(self) -> Tensor:
        """(rows, vocabulary) float32 scores of the next token: the model's part."""
        return self.advance(self._token[:, None], self.cache)

    def conclude(self, logits: Tensor) -> None:
        """The rest: choose, and write down."""
        going, chosen = self._going, None if self._chosen is None else self._logprob
        self.choice.pick(self._token[:, None], logits, Slot(going, going, self._token, self._score, chosen))
        self.choice.rules.hold()
        self._tokens.index_copy_(1, self._column, self._token[:, None])
        self._alive[1:].index_copy_(0, self._step, going[None])
        self._picked.index_copy_(0, self._step, self._score[None])
        if self._chosen is not None:
            self._chosen.index_copy_(0, self._step, self._logprob[None])
        self._column.add_(1)
        self._step.add_(1)

    def whole(self) -> None:
        """The step."""
        self.conclude(self.logits())

    def note(self) -> None:
        """What the host does in a step."""
        self.cache.note(1)

    def work(self) -> None:
        """The step without what is drawn at random: a seed is to give the same tokens, compiled or not."""
        if self._scores is None:
            self.whole()
        else:
            self._scores.copy_(self.logits())

    def rest(self) -> None:
        """What `work` leaves."""
        if self._scores is not None:
            self.conclude(self._scores)


def cache_tensors(cache: Any, whose: str = "") -> dict[str, Tensor]:
    """What a fixed cache keeps, by name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        found |= {f"{whose}keys of layer {index}": layer.keys, f"{whose}values of layer {index}": layer.values}
        cross = cache.cross(index)
        if cross is not None:
            names = f"{whose}cross keys of layer {index}", f"{whose}cross values of layer {index}"
            found |= dict(zip(names, cross, strict=True))
    return found


class Units:
    """Finds the unit for each step of a run.

    Args:
        request, state: The run; at least one token has been chosen.
        place: Where it works, or None to go step by step.
    """

    def __init__(self, request: DecodeRequest, state: DecodeState, place: Workplace | None) -> None:
        self._request, self._state = request, state
        self._place = place if isinstance(state.cache, Cache) and state.cache.fixed else None
        self._unit: StepUnit | None = None
        self._until = 0

    def next(self) -> StepUnit | None:
        """The unit for the next step; None where the step has to be taken on its own."""
        place, state = self._place, self._state
        if place is None or state.choice is None or state.length >= state.choice.rules.until:
            return None
        if self._until != state.choice.rules.until:
            self._until = state.choice.rules.until
            self._unit = self._find(place, state.choice)
        return self._unit

    def _find(self, place: Workplace, choice: Choice) -> StepUnit | None:
        state, request = self._state, self._request
        key = choice.key()
        if key is None:
            return None
        unit = place.units.get(key)
        if unit is None or (state.quick is not None and unit.advance is not state.quick):
            if min(self._until, request.max_length) - state.length < FEWEST_STEPS:
                return None
            model = request.model
            advance = state.quick or (lambda ids, cache: last_logits(model.step(ids, cache)))
            runner = make_runner(place.mode, request.config, request.prompt.device, request.generators)
            unit = place.units[key] = StepUnit(state, advance, choice.frozen(), runner)
        unit.enter(state, choice)
        return unit
