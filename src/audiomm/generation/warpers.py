"""Logits warpers: processors that shape the distribution a token is drawn from.

Names, arguments and results are those of transformers; see `logits` for the house rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import MINUS_INFINITY, LogitsProcessor


def _check(name: str, value: Any, accepted: str, good: Callable[[Any], bool]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value):
        raise GenerationError(f"{name}={value!r} is not accepted: pass {accepted}.")
    return value


def _check_keep(value: int) -> int:
    return int(_check("min_tokens_to_keep", value, "an integer of at least 1", lambda v: v == int(v) and v >= 1))


class TemperatureLogitsWarper(LogitsProcessor):
    """Divide scores by a temperature: below 1 sharper, above 1 flatter.

    Args:
        temperature: Above 0.
    """

    def __init__(self, temperature: float) -> None:
        accepted = "a finite number above 0; for the most likely token use do_sample=False"
        self.temperature = float(_check("temperature", temperature, accepted, lambda v: 0 < v < math.inf))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


class _Filter(LogitsProcessor):
    """A warper that takes some tokens out of the draw, but never the `min_tokens_to_keep` best."""

    def __init__(self, filter_value: float, min_tokens_to_keep: int) -> None:
        self.filter_value = float(filter_value)
        self.min_tokens_to_keep = _check_keep(min_tokens_to_keep)

    def _remove(self, scores: Tensor, removed: Tensor, keep_best: bool = False) -> Tensor:
        if keep_best:
            best = torch.topk(scores, min(self.min_tokens_to_keep, scores.shape[-1]), dim=-1).values[..., -1:]
            removed = removed & (scores < best)
        return scores.masked_fill(removed, self.filter_value)


class TopKLogitsWarper(_Filter):
    """Keep the k best tokens (and those tied with the k-th).

    Args:
        top_k: At least 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.
    """

    def __init__(self, top_k: int, filter_value: float = MINUS_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        k = _check("top_k", top_k, "an integer of at least 1", lambda v: v == int(v) and v >= 1)
        self.top_k = max(int(k), self.min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        least = torch.topk(scores, min(self.top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        return self._remove(scores, scores < least)


class TopPLogitsWarper(_Filter):
    """Keep the fewest best tokens whose probabilities sum to `top_p`.

    Args:
        top_p: From 0 to 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.

    Source: nucleus sampling, arXiv:1904.09751.
    """

    def __init__(self, top_p: float, filter_value: float = MINUS_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = float(_check("top_p", top_p, "a number from 0 to 1", lambda v: 0 <= v <= 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Worst first: what the worst tokens sum to may be dropped while it stays within 1 - top_p.
        ordered, order = torch.sort(scores, dim=-1, descending=False)
        removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
        removed[..., -self.min_tokens_to_keep :] = False
        return self._remove(scores, removed.scatter(-1, order, removed))


class MinPLogitsWarper(_Filter):
    """Keep tokens at least `min_p` times as probable as the best one.

    Args:
        min_p: From 0 to 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.

    Source: arXiv:2407.01082.
    """

    def __init__(self, min_p: float, filter_value: float = MINUS_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = float(_check("min_p", min_p, "a number from 0 to 1", lambda v: 0 <= v <= 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        removed = probabilities < self.min_p * probabilities.amax(dim=-1, keepdim=True)
        best = torch.topk(probabilities, min(self.min_tokens_to_keep, scores.shape[-1]), dim=-1).indices
        return self._remove(scores, removed.scatter(-1, best, False))


class TypicalLogitsWarper(_Filter):
    """Keep tokens whose information is closest to the expected one, until they sum to `mass`.

    Args:
        mass: Above 0 and below 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.

    Source: locally typical sampling, arXiv:2202.00666.
    """

    def __init__(self, mass: float = 0.9, filter_value: float = MINUS_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = float(_check("typical_p", mass, "a number above 0 and below 1", lambda v: 0 < v < 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(dim=-1)
        entropy = -(logs * logs.exp()).nansum(dim=-1, keepdim=True)
        distance, order = torch.sort((-logs - entropy).abs(), descending=False)
        mass = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < self.mass).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(-1, last)
        removed[..., : self.min_tokens_to_keep] = False
        return self._remove(scores, removed.scatter(-1, order, removed))


class EpsilonLogitsWarper(_Filter):
    """Keep tokens with at least the probability `epsilon`.

    Args:
        epsilon: Above 0 and below 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.

    Source: arXiv:2210.15191.
    """

    def __init__(self, epsilon: float, filter_value: float = MINUS_INFINITY, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = float(_check("epsilon_cutoff", epsilon, "a number above 0 and below 1", lambda v: 0 < v < 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._remove(scores, scores.softmax(dim=-1) < self.epsilon, keep_best=True)


class EtaLogitsWarper(_Filter):
    """Like epsilon, with a threshold that falls where the distribution is flat.

    Args:
        epsilon: Above 0 and below 1.
        filter_value: Score of what is taken out.
        min_tokens_to_keep: Smallest number kept.

    Source: arXiv:2210.15191.
    """

    def __init__(
        self,
        epsilon: float,
        filter_value: float = MINUS_INFINITY,
        min_tokens_to_keep: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = float(_check("eta_cutoff", epsilon, "a number above 0 and below 1", lambda v: 0 < v < 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.log_softmax(dim=-1)
        probabilities = logs.exp()
        # A token that cannot occur adds nothing to the entropy, though 0 * -inf is NaN.
        entropy = -(probabilities * logs).nansum(dim=-1, keepdim=True)
        threshold = (math.sqrt(self.epsilon) * (-entropy).exp()).clamp(max=self.epsilon)
        return self._remove(scores, probabilities < threshold, keep_best=True)
