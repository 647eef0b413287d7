"""Counts what a decode step would ask of a GPU: kernels it would launch, waits, and the shapes it works on.

No GPU is needed: a dispatch mode sees every operation on the CPU. Left out is what touches no data on a GPU: views,
and memory that is merely set aside. Attention and RMS norm are one kernel each there, so they count once here too,
however many operations the CPU makes of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that give memory, numbers or another name for a tensor, and launch nothing.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor", "_unsafe_view",
         "resize_", "set_", "detach", "is_same_size", "_has_compatible_shallow_copy_type")  # fmt: skip
#: Operations after which the host waits for the device, or whose result's shape it must ask for.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal",
          "is_nonzero", "lift_fresh", "repeat_interleave.Tensor")  # fmt: skip
#: Python functions that are one kernel on a GPU.
_ONE_KERNEL = {
    functional.scaled_dot_product_attention: "scaled_dot_product_attention",
    functional.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
}


#: Counters at work, the innermost last.
_AT_WORK: list[Launches] = []


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that is one kernel on a GPU, spelled out here: counted as one."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _AT_WORK:
            return function(*args, **kwargs)
        return _AT_WORK[-1].one(function.__name__, function, args, kwargs)

    return run


class Launches(TorchDispatchMode):
    """A context that counts; what it found is in its attributes.

    Attributes:
        names: How often each operation was launched.
        waits: Operations that make the host wait, in order.
        shapes: Every operation with the shapes and dtypes of its tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: list[str] = []
        self.shapes: set[tuple[Any, ...]] = set()
        self._muted = False
        self._stack = ExitStack()

    @property
    def total(self) -> int:
        """Kernels that would have been launched."""
        return self.names.total()

    def clear(self) -> None:
        """Begin to count anew."""
        self.names.clear()
        self.waits.clear()
        self.shapes.clear()

    def __enter__(self) -> Launches:
        self._stack.enter_context(_Fused(self))
        super().__enter__()
        _AT_WORK.append(self)
        return self

    def __exit__(self, *problem: Any) -> None:
        _AT_WORK.pop()
        super().__exit__(*problem)
        self._stack.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._muted:
            self._note(function, args, kwargs or {}, result)
        return result

    def one(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function and count it as one launch, whatever it does inside."""
        if self._muted:
            return function(*args, **kwargs)
        self.names[name] += 1
        self.shapes.add((name, *_shapes(args, kwargs)))
        self._muted = True
        try:
            return function(*args, **kwargs)
        finally:
            self._muted = False

    def _note(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        packet, name = function.overloadpacket.__name__, _name(function)
        # An index of booleans is turned into places first, and their number is asked for.
        by_mask = packet in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if packet in _WAITS or name in _WAITS or by_mask:
            self.waits.append(name)
        if packet not in _FREE and packet != "lift_fresh" and not is_view(function, args, result):
            self.names[name] += 1
            self.shapes.add((name, *_shapes(args, kwargs)))


class _Fused(TorchFunctionMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = _ONE_KERNEL.get(function)
        if name is None:
            return function(*args, **(kwargs or {}))
        return self._launches.one(name, function, args, dict(kwargs or {}))


@cache
def _name(function: Any) -> str:
    overload = function._overloadname
    packet = function.overloadpacket.__name__
    return packet if overload == "default" else f"{packet}.{overload}"


def is_view(function: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether the result is another look at an argument: nothing is computed."""
    if not _may_view(function):
        return False
    # What may be a view, a reshape say, may also have been copied.
    looks = result if isinstance(result, (list, tuple)) else [result]
    return not looks or _storage(looks[0]) == _storage(args[0])


@cache
def _may_view(function: Any) -> bool:
    aliases = [value.alias_info for value in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    values = [*args, *kwargs.values()]
    tensors = [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors if isinstance(tensor, Tensor)]


def addresses(store: Any) -> list[int]:
    """Where a fixed cache keeps its keys and values, and the positions of its slots."""
    places = [layer.keys.data_ptr() for layer in store.layers] + [layer.values.data_ptr() for layer in store.layers]
    return [*places, *(track.positions.data_ptr() for track in store._fixed.values())]
