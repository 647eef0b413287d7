"""Encoders and prompts as units that are captured or compiled, one for each bucket of shapes, like the decode step.

A region runs as it is for the first times; what comes often is then recorded. Encoders keep theirs beside themselves;
prompts write to a cache at fixed addresses, and their regions lie with it in its workplace, which is why prompts are
padded to a few lengths.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.projection import Keeper, has_additions
from ..layers.regions import Function, bucket, inside, recorded_by
from .config import GenerationConfig
from .runners import Mode, Runner, Shelf, device_mode, make_runner, surroundings

#: Regions run so often before they are compiled: a length that comes once is not worth it.
FIRST_RUNS = 2
#: Lengths of prompts that a workplace keeps regions for.
KEPT_PROMPTS = 8
#: Passes over more numbers keep a GPU busy as they are, and their graphs would take much memory.
MOST_NUMBERS = 2**24
#: Inputs that go with the columns of a prompt.
_BY_COLUMN = ("inputs_embeds", "per_layer_inputs", "mm_token_type_ids")


class Region:
    """One region for tensors of one shape; see `runners.Unit`.

    Args:
        function: What it does.
        tensors: Like those that it will get.
        cache: What it writes to besides; None is nothing.
        runner: Runs it.
    """

    title, is_settled = "A part of the model that reads audio or a prompt", True

    def __init__(self, function: Function, tensors: tuple[Tensor | None, ...], cache: Any, runner: Runner) -> None:
        self.cache = cache
        self._function, self._runner = function, runner
        self._inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        self._made: tuple[Tensor, ...] = ()
        #: Tokens that the cache gets.
        self._count = 0

    def run(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What the function makes of other tensors of the same shapes."""
        for kept, tensor in zip(self._inputs, tensors, strict=True):
            if kept is not None and tensor is not None:
                kept.copy_(tensor)
        self._runner.run(self)
        # The buffers are written to again by the next run.
        return tuple(one.clone() for one in self._made)

    def whole(self) -> None:
        before = 0 if self.cache is None else self.cache.length
        self.work()
        self._count = 0 if self.cache is None else self.cache.length - before

    def work(self) -> None:
        made = self._function(*self._inputs)
        if not self._made:
            self._made = tuple(one.clone() for one in made)
        for kept, one in zip(self._made, made, strict=True):
            kept.copy_(one)

    def note(self) -> None:
        if self.cache is not None:
            self.cache.note_prompt(self._count)

    def rest(self) -> None:
        """Nothing is left."""


class Recorder:
    """Runs the regions of one call of generate(); see `layers.regions.Recorder`.

    Args:
        mode: "compiled" or "captured".
        config: Says how to compile.
        prompts: Where regions that write to a cache are kept; None where the cache is not kept.
    """

    def __init__(self, mode: Mode, config: GenerationConfig, prompts: Shelf[Region] | None = None) -> None:
        self._mode, self._config, self._prompts = mode, config, prompts

    def __call__(
        self, owner: nn.Module, name: Hashable, function: Function, *tensors: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, ...]:
        shelf = self._shelf(owner, tensors, cache)
        if shelf is None:
            with recorded_by(None):
                return function(*tensors)
        shapes = tuple(None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        device = next(tensor.device for tensor in tensors if tensor is not None)
        compiles = repr(self._config.compile_config)
        key = name, shapes, self._mode, compiles, surroundings(device), None if cache is None else cache.length
        region = shelf.take(key)
        if region is None:
            runner = make_runner(self._mode, self._config, device, first_runs=FIRST_RUNS)
            region = Region(function, tensors, cache, runner)
        try:
            with inside():
                return region.run(tensors)
        finally:
            shelf.give_back(key, region)

    def _shelf(self, owner: nn.Module, tensors: tuple[Tensor | None, ...], cache: Any) -> Shelf[Region] | None:
        """Where regions of this kind are kept; None where they are not to be."""
        numbers = max(tensor.numel() for tensor in tensors if tensor is not None)
        if numbers > MOST_NUMBERS or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if cache is not None:
            return self._prompts if cache.fixed else None
        return shelf_of(owner)


def shelf_of(owner: nn.Module) -> Shelf[Region] | None:
    """Where regions of a module are kept, another one as soon as it has changed; None where they are not to be."""
    keeper: Keeper[Shelf[Region]] = vars(owner).setdefault("_regions", Keeper())
    return keeper.get(owner, lambda: Shelf() if _is_known(owner) else None)


def _is_known(owner: nn.Module) -> bool:
    """Whether a module does what its weights say and nothing else: no hooks, no parts of others, on one device."""
    for part in owner.modules():
        package = type(part).__module__.split(".")[0]
        if package not in ("audiomm", "torch") or part.training or has_additions(part):
            return False
    return len({weight.device for weight in owner.parameters()}) == 1


@contextmanager
def recording(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside, regions of this thread are recorded where the config and the model's device let them."""
    mode = device_mode(config, next(model.parameters()).device)
    with recorded_by(None if mode == "plain" else Recorder(mode, config)):
        yield


def padded(prompt: Tensor, mask: Tensor | None, inputs: dict[str, Any], room: int) -> tuple[Tensor, Tensor | None]:
    """A prompt (rows, length) and its mask, padded at the left to the length of its bucket where there is room."""
    missing = bucket(prompt.shape[1]) - prompt.shape[1]
    if not 0 < missing <= room or any(inputs.get(name) is not None for name in _BY_COLUMN):
        return prompt, mask
    seen = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
    return functional.pad(prompt, (missing, 0)), functional.pad(seen, (missing, 0))
