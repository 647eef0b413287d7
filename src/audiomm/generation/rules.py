"""The rules of one run: processors in the form that is quickest for a loop that adds one token after the other.

What a processor of transformers does is a function of all tokens so far. In a loop most of them change nothing at
most lengths, or need no more of the past than a number a row; `LogitsProcessor.at_length` says so.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import FOREVER, BannedTokens, InfNanRemoveLogitsProcessor, LogitNormalization
from .timestamps import TimestampState
from .warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

#: Rules that look at no more than the newest token and do the same at every length: fit for a captured step.
_TENSOR_ONLY = {
    BannedTokens,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TimestampState,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}


class Rules:
    """Processors one after the other, as `LogitsProcessorList` applies them, for texts that grow by one token a call.

    Args:
        processors: The rules; functions (tokens so far, scores) -> scores.

    Attributes:
        steps: The forms of the rules that hold at present.
        until: The first length at which they have to be asked again.
    """

    def __init__(self, processors: Iterable[Any]) -> None:
        self.processors = list(processors)
        self.steps: list[Any] = []
        self.until = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores after all rules; `scores` itself is not changed."""
        if input_ids.shape[1] >= self.until:
            self.settle(input_ids, scores.shape[-1])
        for rule in self.steps:
            given, scores = scores, rule(input_ids, scores)
            if not isinstance(scores, Tensor) or scores.shape != given.shape:
                what = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
                raise GenerationError(
                    f"the logits processor {getattr(rule, '__name__', type(rule).__name__)} returned {what}: scores of "
                    f"shape {tuple(given.shape)}, as it was given, are needed."
                )
        return scores

    def settle(self, input_ids: Tensor, vocabulary: int) -> None:
        """Ask every rule what it comes to now that there are the tokens (rows, length)."""
        self.steps, self.until = [], FOREVER
        is_copy = False
        for processor in self.processors:
            rule, until = _at_length(processor, input_ids.shape[1])
            self.until = min(self.until, until)
            if rule is None:
                continue
            if isinstance(rule, (BannedTokens, TimestampState)):
                rule.begin(input_ids, vocabulary)
            if isinstance(rule, TimestampState) and not is_copy:
                self.steps.append(_copy)
            self.steps.append(rule)
            # What others give back may be what they were given.
            is_copy = type(rule) in _TENSOR_ONLY

    def key(self) -> Hashable | None:
        """What the present forms do, as a value to compare; None where one of them is more than tensors."""
        keys = [_key(rule) for rule in self.steps]
        return None if None in keys else tuple(keys)

    def frozen(self) -> Rules:
        """The present forms, for whatever length there will be."""
        rules = Rules(self.processors)
        rules.steps, rules.until = self.steps, FOREVER
        return rules

    def is_settled_at(self, length: int) -> bool:
        """Whether the rules do the same at every length from this one on, and are no more than tensors."""
        found = [_at_length(processor, length) for processor in self.processors]
        return all(until == FOREVER and (rule is None or type(rule) in _TENSOR_ONLY) for rule, until in found)

    @property
    def begin_index(self) -> int:
        """The column from which on rules look at texts; 0 where none does."""
        return next((rule.begin_index for rule in self.steps if isinstance(rule, TimestampState)), 0)

    def look(self, texts: Tensor, ends: Tensor, begin: Tensor) -> None:
        """Get ready for the tokens after texts of lengths of their own; see `TimestampState.look`."""
        for rule in self.steps:
            if isinstance(rule, TimestampState):
                rule.look(texts, ends, begin)

    def take(self, other: Rules, rows: Tensor | None = None) -> None:
        """Go on from the state of other rules with the same key; the tensors stay where they are.

        Args:
            rows: (n,) where the n rows of the other rules go; None: all rows, in order.
        """
        for rule, given in zip(self.steps, other.steps, strict=True):
            if isinstance(rule, TimestampState):
                rule.take(given, rows)

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, and there are no others."""
        for rule in self.steps:
            if isinstance(rule, TimestampState):
                rule.keep(rows)

    def hold(self) -> None:
        """Bring the state to where it was before the last call; see `TimestampState.hold`."""
        for rule in self.steps:
            if isinstance(rule, TimestampState):
                rule.hold()


def _copy(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores.clone()


def _at_length(processor: Any, length: int) -> tuple[Any, int]:
    """`at_length` of a processor; one whose class has a `__call__` of its own is taken as it is."""
    kind = type(processor)
    if _owner(kind, "__call__") is not _owner(kind, "at_length"):
        return processor, FOREVER
    answer: tuple[Any, int] = processor.at_length(length)
    return answer


def _owner(kind: type, name: str) -> type | None:
    return next((parent for parent in kind.__mro__ if name in vars(parent)), None)


def _key(rule: Any) -> Hashable | None:
    if rule is _copy:
        return "copy"
    if type(rule) not in _TENSOR_ONLY:
        return None
    values = {name: value for name, value in vars(rule).items() if not name.startswith("_")}
    return type(rule), *((name, _as_value(value)) for name, value in sorted(values.items()))


def _as_value(value: Any) -> Hashable:
    return tuple(value.tolist()) if isinstance(value, torch.Tensor) else value
