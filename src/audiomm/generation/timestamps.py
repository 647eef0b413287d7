"""The timestamp rules of Whisper as one logits processor.

The rules are OpenAI's `ApplyTimestampRules`, the class and its arguments those of transformers; the state they need
(last token, the one before, last timestamp) is computed for all rows at once from the tokens, with no device sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError
from .logits import FOREVER, MINUS_INFINITY, LogitsProcessor


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

    def at_length(self, length: int) -> tuple[Any, int]:
        # The first token has rules of its own.
        return (self, length + 1) if length <= self.begin_index else (TimestampState(self), FOREVER)


class TimestampState:
    """The same rules for a loop that adds one token after the other: what they need of the past is kept for each row.

    Kernels are few, since each of them costs as much as the numbers it works on: the class of the newest token comes
    from a table, that of the one before is kept, and the rest is arithmetic with them, in which 0 * log 0 is 0. Only
    the text part and the timestamp part of the scores are looked at, never a mask of the whole vocabulary.

    Args:
        rules: Whose rules; at least one token has been generated under them.
    """

    def __init__(self, rules: WhisperTimeStampLogitsProcessor) -> None:
        self.timestamp_begin, self.eos_token_id = rules.timestamp_begin, rules.eos_token_id
        self.detect = rules._detect_timestamp_from_logprob
        self._begin_index = rules.begin_index
        #: (vocabulary, 3) of each token: 1 for a timestamp, else 0; its id, if it is one; and how much further the
        #: ban of early timestamps reaches when it stands before a timestamp: over all of them, or one less.
        self._table = torch.empty(0)
        self._numbers = torch.empty(0)
        #: (rows, 1) the last timestamp but for the newest token; the id before all timestamps where there is none.
        self._last = torch.empty(0)
        #: (rows, 3) of the table: the token before the newest one. It is another tensor after each call; `hold` writes
        #: it to where it was before.
        self._before = self._held = torch.empty(0)

    def begin(self, ids: Tensor, vocabulary: int) -> None:
        """Read the state from the tokens so far, (rows, length)."""
        first = self.timestamp_begin
        numbers = torch.arange(vocabulary, device=ids.device, dtype=torch.float32)
        is_stamp = (numbers >= first).float()
        self._table = torch.stack((is_stamp, numbers * is_stamp, torch.where(is_stamp > 0, 2.0**30, -1.0)), dim=1)
        self._numbers = numbers[first - 1 :]
        earlier = ids[:, self._begin_index : -1]
        # A single token counts as the second of a pair: as if a timestamp stood before it.
        before = earlier[:, -1] if earlier.shape[1] else ids.new_full((len(ids),), first)
        self._before = self._held = self._table[before]
        earlier = torch.cat((ids.new_full((len(ids), 1), first - 1), earlier), dim=1)
        places = torch.arange(earlier.shape[1], device=ids.device)
        self._last = earlier.gather(1, ((earlier >= first) * places).amax(dim=1, keepdim=True)).float()

    @property
    def begin_index(self) -> int:
        """The column that generation begins in."""
        return self._begin_index

    def look(self, texts: Tensor, ends: Tensor, begin: Tensor) -> None:
        """Read the state from texts of lengths of their own, of which each makes `n` rows of the scores.

        Args:
            texts: (rows, columns).
            ends: (rows, n) the columns that they end before.
            begin: (1,) the column that generation begins in; at least one token has been generated.
        """
        first, before = self.timestamp_begin, ends - 2
        columns = torch.arange(texts.shape[1], device=texts.device)
        # Where the last timestamp up to each column stands, -1 for nowhere.
        places = torch.where((texts >= first) & (columns >= begin), columns, -1).cummax(dim=1).values
        places = places.gather(1, before)
        last = torch.where(places < 0, first - 1, texts.gather(1, places.clamp(min=0)))
        self._last = last.view(-1, 1).float()
        tokens = torch.where(before < begin, first, texts.gather(1, before))
        self._before = self._held = self._table[tokens.view(-1)]

    def take(self, other: TimestampState, rows: Tensor | None = None) -> None:
        """Go on from the state of another, all rows or those whose numbers are given; the tensors stay where they are.

        Args:
            rows: (n,) where the n rows of the other go.
        """
        self.hold()
        for mine, others in ((self._last, other._last), (self._before, other._before)):
            if rows is None:
                mine.copy_(others)
            else:
                mine.index_copy_(0, rows, others)

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, and there are no others."""
        self._last = self._last.index_select(0, rows)
        self._before = self._held = self._before.index_select(0, rows)

    def hold(self) -> None:
        """Bring what has been kept of the newest tokens to where it was kept before: for captured steps."""
        if self._before is not self._held:
            self._before = self._held.copy_(self._before)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary), changed in place; of input_ids (rows, length) the last one is looked at."""
        newest = self._table[input_ids[:, -1]]
        stamp, number, _ = newest.split(1, dim=1)
        stamp_before, _, reach = self._before.split(1, dim=1)
        self._before = newest
        torch.lerp(self._last, number, stamp, out=self._last)
        # The end of a pair may repeat its start; after a pair there is text; after that time must advance.
        bound = torch.addcmul(self._last, stamp, reach)
        stamps = scores[:, self.timestamp_begin - 1 :]
        stamps.masked_fill_(self._numbers <= bound, MINUS_INFINITY)
        # A pair that is open must be closed: log 0 for a timestamp after text.
        scores[:, : self.eos_token_id].add_(torch.xlogy(stamp, stamp_before))
        if self.detect and stamps.shape[1]:
            text = scores[:, : self.timestamp_begin]
            is_text = text.amax(dim=-1, keepdim=True) >= stamps.logsumexp(dim=-1, keepdim=True)
            text.add_(is_text.log())
        return scores
