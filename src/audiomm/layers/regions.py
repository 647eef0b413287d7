"""Regions: parts of a model that do the same for all inputs of one shape, told to whoever would record them.

A model asks for the recorder of its thread where such a part begins. There is one while text is generated on a device
where recording pays (see `generation.regions`); without one, and inside a region, the part just runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

#: From tensors, some of which may be missing, to tensors.
Function = Callable[..., tuple[Tensor, ...]]


class Recorder(Protocol):
    """Runs regions, and remembers them."""

    def __call__(
        self, owner: nn.Module, name: Hashable, function: Function, *tensors: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, ...]:
        """What a function makes of tensors.

        Args:
            owner: All weights that the function reads are its.
            name: What the function does: the same for the same owner, name and shapes.
            function: Reads its arguments, weights and `cache`, and writes to `cache` only.
            cache: A cache that is written to.
        """


class _Here(threading.local):
    recorder: Recorder | None = None
    is_inside = False


_HERE = _Here()


def recorder() -> Recorder | None:
    """Who runs regions in this thread; None where they are to be run as they are."""
    return _HERE.recorder


def is_inside() -> bool:
    """Whether what runs now may be recorded: nothing may be asked of the device, and no branch taken on data."""
    return _HERE.is_inside


@contextmanager
def inside() -> Iterator[None]:
    """A region runs, and those in it are parts of it."""
    before, _HERE.is_inside = _HERE.is_inside, True
    try:
        with recorded_by(None):
            yield
    finally:
        _HERE.is_inside = before


@contextmanager
def recorded_by(recorder: Recorder | None) -> Iterator[None]:
    """Inside, regions of this thread are run by `recorder`."""
    before, _HERE.recorder = _HERE.recorder, recorder
    try:
        yield
    finally:
        _HERE.recorder = before


def recorded(module: nn.Module, fields: tuple[str, ...], *tensors: Tensor | None) -> tuple[Tensor, ...] | None:
    """Fields of a module's output for tensors, as a region; None where it is to run as it is.

    The module's forward may ask this itself: inside the region the answer is None.
    """
    record = recorder()
    if record is None:
        return None
    return record(module, fields, lambda *given: tuple(module(*given)[field] for field in fields), *tensors)


def bucket(length: int) -> int:
    """To how many tokens or frames so many are padded: few lengths, and at most a quarter is padding from 12 on."""
    step = max(4, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step
