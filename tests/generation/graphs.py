"""A recorder in the place of CUDA graphs, for machines without a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiomm.generation.regions import Region


class Recorder(TorchDispatchMode):
    """Records operations on tensors at fixed addresses, as a CUDA graph does, and undoes what they changed."""

    def __init__(self, is_view: Any) -> None:
        super().__init__()
        self._is_view = is_view
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh"):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for spec, value in zip(function._schema.arguments, args, strict=False):
            self._keep(spec, value)
        for spec in function._schema.arguments:
            self._keep(spec, kwargs.get(spec.name))
        result = function(*args, **kwargs)
        if not name.startswith("empty") and not self._is_view(function, args, result):
            self._calls.append((function, args, kwargs, result))
        return result

    def _keep(self, spec: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor) and spec.alias_info is not None and spec.alias_info.is_write:
            self._before.append((value, value.clone()))

    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, result in self._calls:
            outcome = function(*args, **kwargs)
            pairs = zip((result,), (outcome,), strict=True) if isinstance(result, torch.Tensor) else ()
            if isinstance(result, (tuple, list)):
                pairs = zip(result, outcome, strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeGraphs:
    """CUDA graphs on the CPU: recording leaves all tensors as they are, replaying runs no code of the host."""

    #: Of decode steps.
    captures, replays, warm_ups = 0, 0, 0
    #: "captures", "replays" and "warm_ups" of encoders and prompts.
    regions: ClassVar[Counter[str]] = Counter()
    generators: ClassVar[list[Any]] = []
    fails = False
    is_view: Any = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def clear(cls) -> None:
        cls.captures, cls.replays, cls.warm_ups, cls.generators, cls.fails = 0, 0, 0, [], False
        cls.regions.clear()

    @classmethod
    def _count(cls, what: str, function: Any) -> None:
        if isinstance(function.args[0], Region):
            cls.regions[what] += 1
        else:
            setattr(cls, what, getattr(cls, what) + 1)

    def warm(self, function: Any) -> None:
        self._count("warm_ups", function)
        function()

    def capture(self, function: Any, generators: list[Any]) -> Any:
        if self.fails:
            if function.args[0].cache is not None:
                function.args[0].cache.note(1)
            raise RuntimeError("operation not permitted when stream is capturing")
        sources = [torch.default_generator, *generators]
        states = [source.get_state() for source in sources]
        recorder = Recorder(self.is_view)
        try:
            with recorder:
                function()
        finally:
            recorder.undo()
            for source, state in zip(sources, states, strict=True):
                source.set_state(state)
        self._count("captures", function)
        type(self).generators = generators

        def replay() -> None:
            self._count("replays", function)
            recorder.replay()

        return replay
