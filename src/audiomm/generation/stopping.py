"""Stopping criteria: functions (tokens so far, scores) -> (rows,) bool, True for rows that are done.

Names and call convention are those of transformers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import token_ids


class StoppingCriteria:
    """Base of all criteria."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows,) bool.

        Args:
            input_ids: (rows, length) int64, the tokens so far, prompt and newest token included.
            scores: The scores of the steps so far, where they are collected.
        """
        raise GenerationError(f"{type(self).__name__} does not define __call__(input_ids, scores).")


class StoppingCriteriaList(list[Any]):
    """A row is done when any of the criteria says so."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows,) bool; a criterion that answers with a plain bool speaks for all rows."""
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            answer = criterion(input_ids, scores, **kwargs)
            if answer is None or (isinstance(answer, Tensor) and answer.shape not in (done.shape, ())):
                what = "None" if answer is None else f"shape {tuple(answer.shape)}"
                raise GenerationError(
                    f"the stopping criterion {getattr(criterion, '__name__', type(criterion).__name__)} returned "
                    f"{what}: True, False or a tensor of them, one for each of {len(done)} rows, is needed."
                )
            done = done | (answer.to(done.device) if isinstance(answer, Tensor) else bool(answer))
        return done

    @property
    def max_length(self) -> int | None:
        """The length limit in tokens, if one of the criteria is one."""
        limits = [criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)]
        return min(limits) if limits else None


def _all_rows(input_ids: Tensor, value: bool) -> Tensor:
    return torch.full((input_ids.shape[0],), value, dtype=torch.bool, device=input_ids.device)


class MaxLengthCriteria(StoppingCriteria):
    """Stop at a length.

    Args:
        max_length: In tokens, prompt included.
        max_position_embeddings: What the model was made for; only kept for callers that read it.
    """

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return _all_rows(input_ids, input_ids.shape[-1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    """Stop after a time.

    Args:
        max_time: In seconds, counted from `initial_timestamp`.
        initial_timestamp: A reading of time.time(); now, by default.
    """

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = initial_timestamp
        # Without a given start the monotonic clock is read, which no one can set back.
        self._start = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        given = self.initial_timestamp
        spent = time.monotonic() - self._start if given is None else time.time() - given
        return _all_rows(input_ids, spent > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Stop rows whose newest token is an end token.

    Args:
        eos_token_id: The end token or tokens.
    """

    def __init__(self, eos_token_id: int | Sequence[int] | Tensor) -> None:
        self.eos_token_id = token_ids(eos_token_id, "eos_token_id")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.eos_token_id.device != input_ids.device:
            self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -1], self.eos_token_id)


class StopStringCriteria(StoppingCriteria):
    """Stop rows whose newest token completes a string, also when the string ends inside that token.

    Args:
        tokenizer: Anything with decode(ids).
        stop_strings: One string or several.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        texts = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise GenerationError(
                f"stop_strings={stop_strings!r} is not accepted: pass one or more strings of one or more characters."
            )
        if not hasattr(tokenizer, "decode"):
            raise GenerationError(
                f"stop_strings need a tokenizer, but tokenizer is a {type(tokenizer).__name__}: pass "
                "tokenizer=processor.tokenizer to generate()."
            )
        self.tokenizer = tokenizer
        self.stop_strings = tuple(texts)
        # A character takes up to four byte-level tokens; more tokens than that cannot matter.
        self._tail_tokens = 4 * max(len(text) for text in texts) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Text is made on the host, so this criterion waits for the device; it costs nothing where it is not used.
        done = [self._is_complete(ids) for ids in input_ids[:, -self._tail_tokens :].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _is_complete(self, ids: list[int]) -> bool:
        before, text = self._decode(ids[:-1]), self._decode(ids)
        # Where a token completes a character, the text before it ended in a mark for half a character.
        known = next((i for i, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1]), None)
        start = min(len(before), len(text)) if known is None else known
        for wanted in self.stop_strings:
            if text.find(wanted, max(0, start - len(wanted) + 1)) >= 0:
                return True
        return False

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))
