"""The timestamp rules of Whisper as one logits processor.

The rules are OpenAI's `ApplyTimestampRules`, the class and its arguments those of transformers; the state they need
(last token, the one before, last timestamp) is computed for all rows at once from the tokens, with no device sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import MINUS_INFINITY, LogitsProcessor


class WhisperTimeStampLogitsProcessor(LogitsProcessor):
    """Timestamps come in pairs, never run backwards, and win when together they are likelier than any text token.

    Args:
        generate_config: Holds no_timestamps_token_id, eos_token_id (or bos_token_id) and, if the first timestamp is
            limited, max_initial_timestamp_index (in steps of 20 ms).
        begin_index: Length of the prompt in tokens, where generation begins.
        _detect_timestamp_from_logprob: False leaves out the rule that compares probabilities.

    Raises:
        GenerationError: The config has no no_timestamps_token_id or no end token.
    """

    def __init__(
        self, generate_config: Any, begin_index: int, _detect_timestamp_from_logprob: bool | None = None
    ) -> None:
        no_timestamps = getattr(generate_config, "no_timestamps_token_id", None)
        if no_timestamps is None:
            raise GenerationError(
                "timestamps need no_timestamps_token_id in the generation config; this one has none. Set it to the "
                "id of '<|notimestamps|>', or generate with return_timestamps=False."
            )
        end = getattr(generate_config, "eos_token_id", None)
        end = end if end is not None else getattr(generate_config, "bos_token_id", None)
        end = end[0] if isinstance(end, (list, tuple)) else end
        if end is None:
            raise GenerationError("timestamps need eos_token_id in the generation config; this one has none.")
        detect = _detect_timestamp_from_logprob
        if detect is None:
            detect = getattr(generate_config, "_detect_timestamp_from_logprob", True)
        self._detect_timestamp_from_logprob = bool(detect)
        self.no_timestamps_token_id = int(no_timestamps)
        self.timestamp_begin = self.no_timestamps_token_id + 1
        self.eos_token_id = int(end)
        self.begin_index = begin_index
        self.max_initial_timestamp_index = getattr(generate_config, "max_initial_timestamp_index", None)

    def set_begin_index(self, begin_index: int) -> None:
        """Move the start, for prompts of another length."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = torch.arange(scores.shape[-1], device=scores.device)[None]  # (1, vocabulary)
        is_timestamp = vocabulary >= self.timestamp_begin
        banned = vocabulary == self.no_timestamps_token_id
        generated = input_ids[:, self.begin_index :]
        if generated.shape[1] == 0:
            banned = banned | ~is_timestamp
            if self.max_initial_timestamp_index is not None:
                banned = banned | (vocabulary > self.timestamp_begin + self.max_initial_timestamp_index)
        else:
            banned = banned | self._pairs_and_order(generated, vocabulary, is_timestamp)
        scores = scores.masked_fill(banned, MINUS_INFINITY)
        return self._prefer_timestamp(scores, is_timestamp) if self._detect_timestamp_from_logprob else scores

    def _pairs_and_order(self, generated: Tensor, vocabulary: Tensor, is_timestamp: Tensor) -> Tensor:
        """(rows, vocabulary) True where a token would break a pair or go back in time."""
        length = generated.shape[1]
        stamps = generated >= self.timestamp_begin  # (rows, length)
        ends_in_stamp = stamps[:, -1:]
        # A single token counts as the second of a pair.
        pair_is_full = stamps[:, -2:-1] if length >= 2 else torch.ones_like(ends_in_stamp)
        pair_is_open = ends_in_stamp & ~pair_is_full
        banned = is_timestamp & ends_in_stamp & pair_is_full
        banned = banned | ((vocabulary < self.eos_token_id) & pair_is_open)
        # Position + 1 of the last timestamp; 0 where there is none.
        places = torch.arange(1, length + 1, device=generated.device)
        last_place = (stamps * places).amax(dim=1, keepdim=True)
        last_stamp = generated.gather(1, (last_place - 1).clamp(min=0))
        # The end of a pair may repeat its start; after that time must advance.
        bound = last_stamp + (~pair_is_open).long()
        return banned | (is_timestamp & (last_place > 0) & (vocabulary < bound))

    def _prefer_timestamp(self, scores: Tensor, is_timestamp: Tensor) -> Tensor:
        """Ban text where the timestamps together are more probable than the best text token."""
        logs = scores.float().log_softmax(dim=-1)
        stamps = logs.masked_fill(~is_timestamp, MINUS_INFINITY).logsumexp(dim=-1, keepdim=True)
        text = logs.masked_fill(is_timestamp, MINUS_INFINITY).amax(dim=-1, keepdim=True)
        return scores.masked_fill((stamps > text) & ~is_timestamp, MINUS_INFINITY)
