"""Logits processors that depend on how long the text is: what may come first, when it may end, when it must.

Names, arguments and results are those of transformers; see `logits` for the house rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import FOREVER, MINUS_INFINITY, BannedTokens, LogitsProcessor, VocabularyMask, token_ids


class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Forbid some tokens as the first generated one.

    Args:
        begin_suppress_tokens: Token ids.
        begin_index: Length at which the first token is chosen, in tokens.
    """

    def __init__(
        self, begin_suppress_tokens: Sequence[int] | Tensor, begin_index: int, device: str | torch.device = "cpu"
    ) -> None:
        self.begin_suppress_tokens = token_ids(begin_suppress_tokens, "begin_suppress_tokens", device)
        self.begin_index = begin_index
        self._mask = VocabularyMask(self.begin_suppress_tokens)

    def set_begin_index(self, begin_index: int) -> None:
        """Move the start, for prompts of another length."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] != self.begin_index:
            return scores.clone()
        return scores.masked_fill(self._mask.like(scores), MINUS_INFINITY)

    def at_length(self, length: int) -> tuple[Any, int]:
        return _at_one(self, length, self.begin_index)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Make `bos_token_id` the only choice as the second token, after a prompt of one.

    Args:
        bos_token_id: The token.
    """

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id
        self._mask = VocabularyMask(token_ids(bos_token_id, "bos_token_id"))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _force(scores, self._mask) if input_ids.shape[-1] == 1 else scores.clone()

    def at_length(self, length: int) -> tuple[Any, int]:
        return _at_one(self, length, 1)


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Make an end token the only choice as the last token that fits.

    Args:
        max_length: Length limit in tokens, prompt included.
        eos_token_id: The end token or tokens.
    """

    def __init__(
        self, max_length: int, eos_token_id: int | Sequence[int] | Tensor, device: str | torch.device = "cpu"
    ) -> None:
        self.max_length = max_length
        self.eos_token_id = token_ids(eos_token_id, "eos_token_id", device)
        self._mask = VocabularyMask(self.eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _force(scores, self._mask) if input_ids.shape[-1] == self.max_length - 1 else scores.clone()

    def at_length(self, length: int) -> tuple[Any, int]:
        return _at_one(self, length, self.max_length - 1)


def _at_one(rule: LogitsProcessor, length: int, place: int) -> tuple[Any, int]:
    """`LogitsProcessor.at_length` of a rule that changes something at one length alone."""
    if length == place:
        return rule, place + 1
    return None, place if length < place else FOREVER


def _force(scores: Tensor, mask: VocabularyMask) -> Tensor:
    return torch.full_like(scores, MINUS_INFINITY).masked_fill(mask.like(scores), 0.0)


class MinLengthLogitsProcessor(LogitsProcessor):
    """Forbid the end tokens until a length is reached.

    Args:
        min_length: Length in tokens, prompt included.
        eos_token_id: The end token or tokens.
    """

    def __init__(
        self, min_length: int, eos_token_id: int | Sequence[int] | Tensor, device: str | torch.device = "cpu"
    ) -> None:
        if isinstance(min_length, bool) or not isinstance(min_length, int) or min_length < 0:
            raise GenerationError(f"min_length={min_length!r} is not accepted: pass an integer of at least 0.")
        self.min_length = min_length
        self.eos_token_id = token_ids(eos_token_id, "eos_token_id", device)
        self._mask = VocabularyMask(self.eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[-1] >= self.min_length:
            return scores.clone()
        return scores.masked_fill(self._mask.like(scores), MINUS_INFINITY)

    def at_length(self, length: int) -> tuple[Any, int]:
        return (None, FOREVER) if length >= self.min_length else (BannedTokens(self.eos_token_id), self.min_length)


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """Forbid the end tokens until some tokens have been generated.

    Args:
        prompt_length_to_skip: Length of the prompt in tokens.
        min_new_tokens: Tokens to generate before the end may come.
        eos_token_id: The end token or tokens.
    """

    def __init__(
        self,
        prompt_length_to_skip: int,
        min_new_tokens: int,
        eos_token_id: int | Sequence[int] | Tensor,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value in (("prompt_length_to_skip", prompt_length_to_skip), ("min_new_tokens", min_new_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise GenerationError(f"{name}={value!r} is not accepted: pass an integer of at least 0.")
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id, device)
        self.prompt_length_to_skip = prompt_length_to_skip
        self.min_new_tokens = min_new_tokens


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raise the score of the end tokens more and more after a length.

    Args:
        exponential_decay_length_penalty: (tokens generated before it starts, factor per token).
        eos_token_id: The end token or tokens.
        input_ids_seq_length: Length of the prompt in tokens.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: int | Sequence[int] | Tensor,
        input_ids_seq_length: int,
    ) -> None:
        self.regulation_start = exponential_decay_length_penalty[0] + input_ids_seq_length
        self.regulation_factor = exponential_decay_length_penalty[1]
        self.eos_token_id = token_ids(eos_token_id, "eos_token_id")
        self._mask = VocabularyMask(self.eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        late = input_ids.shape[-1] - self.regulation_start
        if late <= 0:
            return scores.clone()
        growth = self.regulation_factor**late - 1
        # What another rule has forbidden stays so: -inf plus its size would be NaN, the smallest number's infinity.
        raised = self._mask.like(scores) & (scores > torch.finfo(scores.dtype).min)
        return torch.where(raised, scores + scores.abs() * growth, scores)

    def at_length(self, length: int) -> tuple[Any, int]:
        return (self, FOREVER) if length > self.regulation_start else (None, self.regulation_start + 1)
