"""What quick decode steps are made of: products of linears that may be joined, or the word that there are none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import Cache
from .norm import Roomy
from .projection import Keeper, Projection, has_additions, projection
from .quantized import Int8Linear

#: A quick step: ids (rows, 1) and a cache to logits (rows, vocabulary) float32.
Step = Callable[[Tensor, Cache], Tensor]

#: Types of states that quick steps are made for; float16 needs bounds that they leave out.
_DTYPES = (torch.float32, torch.bfloat16)


class NoQuickStep(Exception):
    """A model as it stands has no quick step: an adapter, a hook or an offloaded part must be walked through."""


class WithQuickStep:
    """A model with a head that may have a quick twin of its decode step, and keeps it while it stays as it is."""

    def get_decoder(self) -> Any:
        """The text decoder."""
        raise AttributeError(f"{type(self).__name__} does not say which of its parts is the decoder.")

    def quick_step(self) -> Any:
        """The quick twin of `step` for inference, a `Step`, or None where the model as it stands has none.

        Called with (rows, 1) token ids and the cache it gives (rows, vocabulary) logits in float32.
        """
        if self.get_decoder().config.attn_implementation == "eager":
            return None
        keeper: Keeper[Step] | None = vars(self).get("_quick_steps")
        if keeper is None:
            keeper = vars(self)["_quick_steps"] = Keeper()
        model: Any = self
        return keeper.get(model, self._quick_step_or_none)

    def _quick_step_or_none(self) -> Step | None:
        try:
            return self.make_quick_step()
        except NoQuickStep:
            return None

    def make_quick_step(self) -> Step:
        """A quick step from the weights as they are.

        Raises:
            NoQuickStep: There is none.
        """
        raise NoQuickStep


def straight() -> AbstractContextManager[object]:
    """Operations go to their kernels without a look at autograd, which is an eighth of the time of a small step.

    Unlike in inference mode, what comes out are tensors like others.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def require_projection(*linears: nn.Module, many_rows: bool = False) -> Projection:
    """`projection`.

    Raises:
        NoQuickStep: The linear maps cannot be used so.
    """
    joined = projection(*linears, many_rows=many_rows)
    if joined is None:
        raise NoQuickStep
    return joined


def product(*linears: nn.Module) -> Projection:
    """One product for linears that read the same rows (rows, width); their outputs side by side.

    Raises:
        NoQuickStep: They cannot be used so.
    """
    project, weight = _product(*linears)
    if weight is None:
        return project
    multiply = torch.mm
    return lambda rows: multiply(rows, weight)


def product_into(linear: nn.Module) -> Callable[[Tensor, Roomy | None], Roomy]:
    """`product` that writes to rows with room where it is given such of its type and can, else to rows of its own.

    Raises:
        NoQuickStep: The linear map cannot be used so.
    """
    project, weight = _product(linear)
    if weight is None:
        return lambda rows, place: (project(rows), None)
    multiply = torch.mm

    def write(rows: Tensor, place: Roomy | None) -> Roomy:
        if place is None or place[0].dtype != rows.dtype:
            return multiply(rows, weight), None
        multiply(rows, weight, out=place[0])
        return place

    return write


def _product(*linears: nn.Module) -> tuple[Projection, Tensor | None]:
    """A projection and, where it is that alone, the matrix (width, outputs) that rows are multiplied by.

    What `linear` asks itself before it multiplies takes longer than the product of a small step.
    """
    joined = require_projection(*linears)
    if isinstance(joined, partial) and joined.func is functional.linear and joined.keywords["bias"] is None:
        return joined, joined.keywords["weight"].t()
    return joined, None


def require_parts(model: nn.Module, *kinds: type[nn.Module], apart: tuple[type[nn.Module], ...] = ()) -> None:
    """Look through a model for what a quick step would pass by.

    Args:
        model: All that the step stands for.
        kinds: What may be found in it besides linears.
        apart: Of these, those whose weights may be elsewhere.

    Raises:
        NoQuickStep: There is a module of another class, or one with hooks or another `forward`; weights are of other
            types than float32 or bfloat16, of several, on several devices or spread over some; the model is trained.
    """
    places = set()
    for part in model.modules():
        known = type(part) in kinds or type(part) in (nn.Linear, nn.ModuleList, Int8Linear)
        if not known or part.training or has_additions(part):
            raise NoQuickStep
        for weight in part.parameters(recurse=False):
            if type(weight.data) is not Tensor:
                raise NoQuickStep
            if type(part) not in (*apart, Int8Linear):
                places.add((weight.device, weight.dtype))
    if len(places) != 1 or next(iter(places))[1] not in _DTYPES:
        raise NoQuickStep
