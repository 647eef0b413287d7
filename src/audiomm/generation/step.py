"""The whole decode step as one unit: model, rules, pick, rows that end, and the writing down of it all.

A unit reads and writes tensors at fixed addresses only, so that it can be compiled (`torch.compile`) or captured (a
CUDA graph, after moshi's `CUDAGraphed`, with its exact complaints and its off switch). Cache and buffers are kept
between calls together with the units that were made for them: a further call with the same shapes replays at once.
What is no tensor (rules and criteria of the caller, streamers, records) makes a run go step by step, as `sample` does
on its own: that is the slow twin of everything here.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..base.errors import GenerationError
from ..layers.cache import Cache
from .choice import Choice, Slot
from .decode import DecodeRequest, DecodeState, QuickStep, last_logits, quick_step
from .stopping import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

logger = logging.getLogger("audiomm.generation")

Mode = Literal["plain", "compiled", "captured"]

#: Set it to 0 to do without CUDA graphs.
SWITCH = "AUDIOMM_CAPTURE"
#: Units are worth their making from so many steps on, and have room for so many at least.
FEWEST_STEPS, SHORTEST_ROOM = 8, 64
#: Workplaces that a model keeps between calls.
KEPT = 4


def mode_of(request: DecodeRequest) -> Mode:
    """How the steps of a run can be taken, by its config and the device; single rules may still say no."""
    config, model = request.config, request.model
    asks_for_more = bool(request.flags) or config.output_scores or config.output_logits or request.streamer is not None
    on_host = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria}
    if asks_for_more or not all(type(rule) in on_host for rule in request.stopping):
        return "plain"
    if not isinstance(model, nn.Module) or not hasattr(model, "quick_step"):
        return "plain"
    if config.disable_compile or config.cache_implementation in ("dynamic", "dynamic_full"):
        return "plain"
    if config.compile_config is not None:
        return "compiled"
    captures = _can_capture(request.prompt.device) and os.environ.get(SWITCH, "1") != "0"
    # What a graph has recorded does not see that a module was changed; a model with a quick step is as it was.
    return "captured" if captures and quick_step(model) is not None else "plain"


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class Workplace:
    """Cache and buffers of runs of one shape, and the units that work in them.

    Attributes:
        mode: "compiled" or "captured".
        capacity: Tokens there is room for.
        cache: The cache of the last run, or None before the first.
        units: By what they do; see `Choice.key`.
        is_shared: Whether another run will work here after this one.
    """

    def __init__(self, mode: Mode, capacity: int, is_shared: bool) -> None:
        self.mode, self.capacity, self.is_shared = mode, capacity, is_shared
        self.cache: Any = None
        self.units: dict[Hashable, StepUnit] = {}
        self._tensors: dict[str, Tensor] = {}

    def empty_cache(self, limit: int) -> Any:
        """The cache of the last run, emptied, if it holds `limit` tokens; else None."""
        if self.cache is None or self.cache.capacity < limit:
            self.units.clear()
            return None
        self.cache.reset()
        return self.cache

    def tensor(self, name: str, shape: tuple[int, ...], value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor full of `value`: that of the last run where there is one."""
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            found = self._tensors[name] = torch.empty(shape, device=device, dtype=dtype)
        return found.fill_(value)


class Workplaces:
    """Those that are kept for the next call. Copies and pickles of what keeps them begin with none."""

    def __init__(self) -> None:
        self._free: OrderedDict[Hashable, Workplace] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> Workplace | None:
        """The workplace of the last run with this key, unless another thread works in it."""
        with self._lock:
            return self._free.pop(key, None)

    def give_back(self, key: Hashable, place: Workplace) -> None:
        """Keep a workplace, and forget the one that has not been used for the longest time."""
        with self._lock:
            self._free[key] = place
            while len(self._free) > KEPT:
                self._free.popitem(last=False)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Workplaces, ()


@contextmanager
def workplace(request: DecodeRequest, copies: int) -> Iterator[Workplace | None]:
    """The place where a run keeps its tensors at fixed addresses; None for a run that goes step by step."""
    mode = mode_of(request)
    if mode == "plain":
        yield None
        return
    config, model = request.config, request.model
    capacity = _bucket(max(request.max_length, config.max_cache_len or 0), model)
    # Who gets the cache may keep it, and rows that are repeated after the prompt move to other addresses.
    is_shared = copies == 1 and not config.return_dict_in_generate
    # A quick step is another one when anything about the model has changed, and then it starts with none.
    places: Workplaces = vars(quick_step(model) or model).setdefault("_workplaces", Workplaces())
    weight = next(model.parameters())  # type: ignore[attr-defined]
    key = (
        (mode, repr(config.compile_config), len(request.prompt), capacity, request.logprobs),
        (weight.dtype, weight.device, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(weight.device.type)),
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
    """One decode step for as many rows as there are, from tensors to tensors.

    Args:
        state: Whose buffers and cache the unit works in.
        advance: (ids (rows, 1), cache) -> logits (rows, vocabulary).
        choice: How tokens are chosen at every length.
        runner: Runs the step.
    """

    def __init__(self, state: DecodeState, advance: QuickStep, choice: Choice, runner: Runner) -> None:
        rows, device = len(state.tokens), state.tokens.device
        self.advance, self.choice, self.cache, self.runner = advance, choice, state.cache, runner
        self._tokens, self._alive, self._picked, self._chosen = state.tokens, state.alive, state.picked, state.chosen
        #: (2, rows) the last two tokens, so that the newest ones lie side by side.
        self._recent = torch.zeros(2, rows, dtype=torch.long, device=device)
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._going = torch.ones(rows, dtype=torch.bool, device=device)
        self._score, self._logprob = torch.zeros(2, rows, device=device)
        #: (1,) column of the next token, and number of the step.
        self._column, self._step = torch.zeros(2, 1, dtype=torch.long, device=device)

    def enter(self, state: DecodeState, choice: Choice) -> None:
        """Go on from where a run stands.

        Raises:
            GenerationError: Tensors of the run are not those that the unit was made for.
        """
        self.runner.check(self.watched(state))
        self.choice.rules.take(choice.rules)
        self._recent.copy_(state.ids[:, -2:].T)
        self._going.copy_(state.going)
        self._column.fill_(state.length)
        self._step.fill_(state.step)

    def watched(self, state: DecodeState) -> dict[str, Tensor]:
        """The tensors of a run that must stay where they are, by name."""
        found = {"tokens": state.tokens, "alive": state.alive, "picked": state.picked}
        for index, layer in enumerate(state.cache.layers):
            found |= {f"keys of layer {index}": layer.keys, f"values of layer {index}": layer.values}
            cross = state.cache.cross(index)
            if cross is not None:
                found |= {f"cross keys of layer {index}": cross[0], f"cross values of layer {index}": cross[1]}
        return found

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
        return self.advance(self._recent[1][:, None], self.cache)

    def conclude(self, logits: Tensor) -> None:
        """The rest: choose, and write down."""
        going, chosen = self._going, None if self._chosen is None else self._logprob
        self.choice.pick(self._recent.T, logits, Slot(going, going, self._token, self._score, chosen))
        self._recent[0].copy_(self._recent[1])
        self._recent[1].copy_(self._token)
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


class Runner:
    """Runs a unit as it is; `Compiled` and `Captured` do it more quickly."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}

    def check(self, tensors: dict[str, Tensor]) -> None:
        """See that tensors are where they were when this was called for the first time.

        Raises:
            GenerationError: One has moved or has another shape.
        """
        now = {name: (tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._places = self._places or now
        for name, (address, shape) in now.items():
            old_address, old_shape = self._places.get(name, (0, ()))
            if (address, shape) != (old_address, old_shape):
                how = f"is of shape {shape}" if shape != old_shape else f"has moved from {old_address} to {address}"
                raise GenerationError(
                    f"the decode step was made for {name} of shape {old_shape}, but it {how}: what a captured or "
                    f"compiled step reads must stay in place. Set {SWITCH}=0 or pass disable_compile=True to do "
                    "without."
                )

    def run(self, unit: StepUnit) -> None:
        unit.whole()


class Compiled(Runner):
    """Runs a unit that torch.compile has made one program of, but for what is drawn at random.

    Args:
        config: A `CompileConfig`, or a dictionary like it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._options = _compile_options(config)
        self._compiled: Callable[..., Any] | None = None

    def run(self, unit: StepUnit) -> None:
        samples = unit.choice.samples
        if self._compiled is None:
            # Compiled code has random numbers of its own, and a seed is to give the same tokens either way.
            self._compiled = torch.compile(unit.logits if samples else unit.whole, **self._options)
        # Compiled code cannot count on the host.
        unit.cache.note(1)
        if samples:
            unit.conclude(self._compiled())
        else:
            self._compiled()


def _compile_options(config: Any) -> dict[str, Any]:
    """Arguments for torch.compile from a config, a dictionary, or the config of another library with these fields."""
    values = config if isinstance(config, dict) else vars(config)
    names = ("fullgraph", "dynamic", "backend", "mode", "options")
    options = {name: values[name] for name in names if values.get(name) is not None}
    if "mode" in options and "options" in options:
        raise GenerationError(
            f"compile_config has mode={options['mode']!r} and options={options['options']!r}: torch.compile takes "
            "one of them. Leave the other out (None)."
        )
    return {"dynamic": False, **options}


class Graphs:
    """CUDA graphs, all in one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], None]) -> None:
        """Run a function for the first times, on a stream of its own as capture asks for."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)

    def capture(self, function: Callable[[], None], generators: list[Generator]) -> Callable[[], None]:
        """Record what a function would do, without doing it; what comes back does it."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads may go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        replay: Callable[[], None] = graph.replay
        return replay


class Captured(Runner):
    """Runs a unit as it is a few times, which are steps like any other, then records it, and from then on replays.

    Where it cannot be recorded, it goes on as it is and says so.

    Args:
        graphs: What records.
        generators: Sources of random numbers that the unit draws from.
    """

    WARM_UPS = 2

    def __init__(self, graphs: Graphs, generators: list[Generator]) -> None:
        super().__init__()
        self._graphs, self._generators = graphs, generators
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._is_possible = True

    def run(self, unit: StepUnit) -> None:
        if self._replay is None and self._runs >= self.WARM_UPS and self._is_possible:
            self._record(unit)
        if self._replay is not None:
            # Nothing on the host runs along with a replay.
            unit.cache.note(1)
            self._replay()
        elif self._is_possible:
            self._graphs.warm(unit.whole)
        else:
            unit.whole()
        self._runs += 1

    def _record(self, unit: StepUnit) -> None:
        length = unit.cache.length
        try:
            self._replay = self._graphs.capture(unit.whole, self._generators)
        except RuntimeError as error:
            self._is_possible = False
            logger.warning(
                "The decode step cannot be captured as a CUDA graph and runs without, more slowly: %s. %s=0 does "
                "without from the start.",
                error,
                SWITCH,
            )
        # Recording counted a token that was not run.
        unit.cache.length = length


_GRAPHS: dict[str, Graphs] = {}


def make_runner(mode: Mode, request: DecodeRequest) -> Runner:
    """What runs the units of a mode."""
    if mode == "compiled":
        return Compiled(request.config.compile_config)
    graphs = _GRAPHS.setdefault(str(request.prompt.device), _GRAPHS.get(str(request.prompt.device)) or Graphs())
    given = request.generators
    return Captured(graphs, [] if given is None else [given] if isinstance(given, Generator) else list(given))


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
        if key is None or state.length < 2:
            return None
        unit = place.units.get(key)
        if unit is None or (state.quick is not None and unit.advance is not state.quick):
            if min(self._until, request.max_length) - state.length < FEWEST_STEPS:
                return None
            model = request.model
            advance = state.quick or (lambda ids, cache: last_logits(model.step(ids, cache)))
            unit = place.units[key] = StepUnit(state, advance, choice.frozen(), make_runner(place.mode, request))
        unit.enter(state, choice)
        return unit
