"""Projections: the linear maps that read one input as a single matrix product, for steps that run without modules.

The members' weights become slices of one tensor, so that training, saving and loading see what they always saw. On a
CPU narrow models keep a second copy of some in an order that is quicker to read. A `Keeper` keeps what was built from
weights, and builds anew when they have changed.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .quantized import Int8Linear, Int8Product

Projection = Callable[[Tensor], Tensor]
Built = TypeVar("Built")

#: Weights of up to so many bytes are worth a second copy in the order oneDNN likes best.
_PACKED_BYTES = 64 * 2**20
#: And of up to so many, one that lies input by input.
_TURNED_BYTES = 192 * 2**20
#: And of up to so many numbers on their shorter side: models that are wider are of a gigabyte and more, all of which
#: would be there twice.
_PACKED_WIDTH = 768


def projection(*linears: nn.Module, many_rows: bool = False) -> Projection | None:
    """One matrix product for linear maps that read the same input.

    Args:
        *linears: All nn.Linear or all Int8Linear, of one width, type and device. Missing biases count as zeros.
        many_rows: Whether it is for whole recordings and not for a token at a time: which layout is quicker.

    Returns:
        Maps (..., width) to the outputs of all members, side by side in the last dimension; None where a member is
        not exactly such a map: an adapter, a hook, a weight that is spread over devices.
    """
    if not linears or not all(map(is_plain, linears)) or len({type(linear) for linear in linears}) > 1:
        return None
    parts: list[Any] = list(linears)
    weights = [part.weight for part in parts]
    if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) > 1:
        return None
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = _joined(weights), _joined_bias(parts)
        if isinstance(linears[0], Int8Linear):
            return Int8Product(weight, _joined([part.scale for part in parts]), bias)
        packed = _packed(weight)
        if not many_rows:
            weight = _turned(weight)
    if packed is not None:
        return partial(_packed_linear, packed=packed, bias=bias)
    return partial(functional.linear, weight=weight, bias=bias)


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is nn.Linear or Int8Linear and nothing more: no adapter, hook or replaced forward."""
    if type(linear) not in (nn.Linear, Int8Linear) or has_additions(linear):
        return False
    tensors = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    return all(type(tensor.data) is Tensor and not tensor.is_meta for tensor in tensors)


def has_additions(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or another `forward`."""
    return "forward" in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )


def _turned(weight: Tensor) -> Tensor:
    """A copy that lies input by input, where that is quicker: float32 on the CPU, of more outputs than inputs.

    One row through it is a sum of long columns, not many short dot products, which BLAS does in less time. It is a copy
    because an optimizer that runs over plain memory would mix up a weight and its moments if they lay differently.
    """
    if not weight.is_cpu or weight.dtype != torch.float32 or len(weight) <= weight.shape[1]:
        return weight
    if weight.nbytes > _TURNED_BYTES or weight.shape[1] > _PACKED_WIDTH:
        return weight
    return weight.t().contiguous().t()


def _joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one after the other in one; they become slices of it, unless they are already."""
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first
    lengths = [len(tensor) for tensor in tensors]
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (tensor.data_ptr(), tensor.untyped_storage().data_ptr()) != (place, storage) or not tensor.is_contiguous():
            break
        place += tensor.nbytes
    else:
        return first.as_strided((sum(lengths), *first.shape[1:]), first.stride())
    whole = first.new_empty(sum(lengths), *first.shape[1:])
    for tensor, part in zip(tensors, whole.split(lengths), strict=True):
        part.copy_(tensor.detach())
        tensor.data = part
    return whole


def _joined_bias(linears: Iterable[Any]) -> Tensor | None:
    parts = [(linear.bias, linear.weight) for linear in linears]
    if all(bias is None for bias, _ in parts):
        return None
    if all(bias is not None for bias, _ in parts):
        return _joined([bias for bias, _ in parts])
    # Zeros have no owner, so these are copies; `Keeper` looks at the versions of what they were made from.
    kinds = [bias for bias, _ in parts if bias is not None]
    return torch.cat([kinds[0].new_zeros(len(weight)) if bias is None else bias.detach() for bias, weight in parts])


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's own order where that is quicker by far: bfloat16 on the CPU."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.nbytes > _PACKED_BYTES:
        return None
    if min(weight.shape) > _PACKED_WIDTH:
        return None
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed


def _packed_linear(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return mapped


class Keeper(Generic[Built]):
    """Keeps what was built from a model's weights until the model is no longer the one it was built from.

    It lies beside a model's modules: it is no part of the state_dict, and a copy of the model starts without it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: tuple[Marks, Built | None] | None = None

    def get(self, model: nn.Module, build: Callable[[], Built | None]) -> Built | None:
        """What `build` made, from now or from before; None where it made nothing.

        Args:
            model: What it is built from. Other weights, another place, type or value of one, another module, hook or
                mode than last time build anew; inside `checked_once`, than at the first call there.
            build: Called by one thread at a time. It may move weights to new places, as `projection` does.
        """
        answers = _RUN.answers
        if answers is None:
            return self._checked(model, build)
        if self not in answers:
            answers[self] = self._checked(model, build)
        answer: Built | None = answers[self]
        return answer

    def _checked(self, model: nn.Module, build: Callable[[], Built | None]) -> Built | None:
        kept = self._kept
        if kept is not None and kept[0].fit(model):
            return kept[1]
        with self._lock:
            kept = self._kept
            if kept is not None and kept[0].fit(model):
                return kept[1]
            with torch.inference_mode(False), torch.no_grad():
                built = build()
            self._kept = (Marks(model), built)
            return built

    def __deepcopy__(self, memo: dict[int, Any]) -> Keeper[Built]:
        return type(self)()

    def __reduce__(self) -> tuple[type[Keeper[Built]], tuple[()]]:
        return type(self), ()


class _Run(threading.local):
    #: What keepers have answered in the run that this thread is in; None outside of runs.
    answers: dict[Keeper[Any], Any] | None = None


_RUN = _Run()


@contextmanager
def checked_once() -> Iterator[None]:
    """Inside, nobody changes models: every keeper looks once whether its model is as it was."""
    if _RUN.answers is not None:
        yield
        return
    _RUN.answers = {}
    try:
        yield
    finally:
        _RUN.answers = None


_parts_of = itemgetter("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_version_of, _dtype_of, _mode_of = attrgetter("_version"), attrgetter("dtype"), attrgetter("training")


class Marks:
    """What tells whether a model is as it was: its modules and hooks, and the place, type and version of weights.

    All of it is laid out flat once, so that a look costs microseconds and not a walk through the modules.

    Args:
        model: As it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        # Not the model itself, which keeps this: it would live on until the garbage collector finds the circle.
        self._modules = [module for module in model.modules() if module is not model]
        everything = [vars(module) for module in (model, *self._modules)]
        self._parts = list(map(_parts_of, everything))
        self._modes = list(map(_mode_of, (model, *self._modules)))
        self._forwards = ["forward" in one for one in everything]
        self._places: list[dict[str, Any]] = [parts[0] for parts in self._parts]
        self._stores = [store for parts in self._parts for store in parts[1:3]]
        self._hooks = [hooks for parts in self._parts for hooks in parts[3:5]]
        self._children = _members(self._places)
        self._tensors = _members(self._stores)
        found = [tensor for tensor in self._tensors if tensor is not None]
        # Tensors of other kinds (sharded, fake) may have no address, those of inference mode have no version.
        self._placed = [tensor for tensor in found if type(tensor.data) is Tensor]
        self._versioned = [tensor for tensor in found if not tensor.is_inference()]
        self._typed = found
        self._trainings = getattr(model, "trainings", 0)
        self._values, self._has_hooks = self._look(), list(map(bool, self._hooks))

    def _look(self) -> tuple[list[Any], ...]:
        places = list(map(Tensor.data_ptr, self._placed))
        return places, list(map(_version_of, self._versioned)), list(map(_dtype_of, self._typed))

    def fit(self, model: nn.Module) -> bool:
        """Whether nothing has changed since."""
        everything = [vars(model), *map(vars, self._modules)]
        if getattr(model, "trainings", 0) != self._trainings:
            return False
        if ["forward" in one for one in everything] != self._forwards or not _are_same(
            chain.from_iterable(map(_parts_of, everything)), chain.from_iterable(self._parts)
        ):
            return False
        if (
            list(map(bool, self._hooks)) != self._has_hooks
            or list(map(_mode_of, (model, *self._modules))) != self._modes
        ):
            return False
        for stores, members in ((self._places, self._children), (self._stores, self._tensors)):
            now = _members(stores)
            if len(now) != len(members) or not _are_same(now, members):
                return False
        try:
            return self._look() == self._values
        except RuntimeError:
            # A tensor has become one of a kind without an address or version.
            return False


def _members(stores: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(store.values() for store in stores))


def _are_same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(map(operator.is_, now, before))
