"""What runs a unit of work from tensors to tensors at fixed addresses: as it is, compiled, or captured as a CUDA graph.

After moshi's `CUDAGraphed`, with its exact complaints and its off switch. Units and what they work in are kept on
shelves from call to call.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from ..base.errors import GenerationError
from .program import Program
from .sampling import Generators

logger = logging.getLogger("audiomm.generation")

Mode = Literal["plain", "compiled", "captured"]
Kept = TypeVar("Kept")

#: Set it to 0 to do without CUDA graphs.
SWITCH = "AUDIOMM_CAPTURE"
#: What a shelf keeps between calls.
KEPT = 4


def device_mode(config: Any, device: torch.device) -> Mode:
    """How work can be run, as far as a GenerationConfig and the device say."""
    if config.disable_compile or config.cache_implementation in ("dynamic", "dynamic_full"):
        return "plain"
    if config.compile_config is not None:
        return "compiled"
    return "captured" if _is_captured_on(device) else "plain"


def _is_captured_on(device: torch.device) -> bool:
    return _can_capture(device) and os.environ.get(SWITCH, "1") != "0"


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def surroundings(device: torch.device) -> tuple[Hashable, ...]:
    """What recorded work on a device depends on besides its tensors."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)


class Shelf(Generic[Kept]):
    """What is kept for the next call, each by its key. Copies and pickles of what has a shelf begin with an empty one.

    Args:
        size: How many things are kept: those that were used last.
    """

    def __init__(self, size: int = KEPT) -> None:
        self._free: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._size = size

    def take(self, key: Hashable) -> Kept | None:
        """What was given back with this key, unless another thread works with it."""
        with self._lock:
            return self._free.pop(key, None)

    def give_back(self, key: Hashable, thing: Kept) -> None:
        """Keep a thing, and forget the one that has not been used for the longest time."""
        with self._lock:
            self._free[key] = thing
            while len(self._free) > self._size:
                self._free.popitem(last=False)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Shelf, (self._size,)


class Unit(Protocol):
    """Work that a runner runs: `whole` alone, or `work`, `note` and `rest` one after the other.

    Attributes:
        title: Names it in a sentence.
        cache: What it writes to, or None.
        is_settled: Nothing that it depends on changes without another unit being made.
    """

    title: str
    cache: Any
    is_settled: bool

    def whole(self) -> None:
        """All of it."""

    def note(self) -> None:
        """What the host does, when the rest is replayed."""

    def work(self) -> None:
        """What can be compiled."""

    def rest(self) -> None:
        """What cannot."""


class Runner:
    """Runs a unit as it is; `Compiled` and `Captured` do it more quickly."""

    #: Runs before a unit is what it will be.
    first_runs = 0

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

    def run(self, unit: Unit) -> None:
        unit.whole()


class Compiled(Runner):
    """Runs a unit as a compiled program.

    Args:
        config: A `CompileConfig`, or a dictionary like it.
        first_runs: Run it as it is so many times before that.
    """

    def __init__(self, config: Any, first_runs: int = 0) -> None:
        super().__init__()
        self.first_runs = first_runs
        self._config, self._runs = config, 0
        self._program: Program | None = None

    def run(self, unit: Unit) -> None:
        self._runs += 1
        if self._runs <= self.first_runs:
            unit.whole()
            return
        if self._program is None:
            self._program = Program(unit.work, self._config, unit.is_settled)
        length = None if unit.cache is None else unit.cache.length
        self._program()
        # Compiled code cannot count on the host; where torch.compile is switched off, the code as it is has counted.
        if length is None or unit.cache.length == length:
            unit.note()
        unit.rest()


#: Torch allows one capture at a time in a process.
_CAPTURING = threading.Lock()


class Graphs:
    """CUDA graphs, all in one pool of memory: they are replayed one after the other, on one stream.

    Args:
        device: Where they work; it need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def warm(self, function: Callable[[], None]) -> None:
        """Run a function for the first times, on the stream that it is to be captured on."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        # Its device is the current one there, too.
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def capture(self, function: Callable[[], None], generators: list[Generator]) -> Callable[[], None]:
        """Record what a function would do, without doing it; what comes back does it."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
        # Other threads may go on allocating meanwhile. The outer of the two streams, which are one, is left even where
        # capture fails.
        with (
            _CAPTURING,
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, capture_error_mode="thread_local", **options),
        ):
            function()
        replay: Callable[[], None] = graph.replay
        return replay


class Captured(Runner):
    """Runs a unit a few times, which are runs like any other, then records it, and from then on replays.

    Where it cannot be recorded, it goes on as it is and says so.

    Args:
        graphs: What records.
        generators: Sources of random numbers that the unit draws from.
        inner: Runs the unit while it is not replayed.
    """

    WARM_UPS = 2

    def __init__(self, graphs: Graphs, generators: list[Generator], inner: Runner) -> None:
        super().__init__()
        self._graphs, self._generators, self._inner = graphs, generators, inner
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._is_possible = True

    def run(self, unit: Unit) -> None:
        if self._replay is None and self._runs >= self.WARM_UPS + self._inner.first_runs and self._is_possible:
            self._record(unit)
        if self._replay is not None:
            # Nothing on the host runs along with a replay.
            unit.note()
            self._replay()
        elif self._is_possible:
            self._graphs.warm(partial(self._inner.run, unit))
        else:
            self._inner.run(unit)
        self._runs += 1

    def _record(self, unit: Unit) -> None:
        length = None if unit.cache is None else unit.cache.length
        try:
            self._replay = self._graphs.capture(partial(self._inner.run, unit), self._generators)
        except RuntimeError as error:
            self._is_possible = False
            logger.warning(
                "%s cannot be captured as a CUDA graph and runs without, more slowly: %s. %s=0 does without from the "
                "start.",
                unit.title,
                error,
                SWITCH,
            )
        if length is not None:
            # Recording counted tokens that were not run.
            unit.cache.length = length


_GRAPHS: dict[Hashable, Graphs] = {}


def make_runner(
    mode: Mode, config: Any, device: torch.device, generators: Generators = None, first_runs: int = 0
) -> Runner:
    """What runs the units of a mode.

    Args:
        config: A GenerationConfig, which may say how to compile.
        device: Where the units work.
        generators: Sources of random numbers that they draw from.
        first_runs: Run a unit as it is so many times before it is compiled.
    """
    inner = Compiled(config.compile_config, first_runs) if mode == "compiled" else Runner()
    if not _is_captured_on(device):
        return inner
    key = surroundings(device)[:2]
    graphs = _GRAPHS.setdefault(key, _GRAPHS.get(key) or Graphs(device))
    given = [] if generators is None else [generators] if isinstance(generators, Generator) else list(generators)
    return Captured(graphs, given, inner)
