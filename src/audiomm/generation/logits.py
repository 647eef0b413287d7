"""Logits processors: functions (tokens so far, scores of the next token) -> scores, for a whole batch at once.

Names, arguments and results are those of transformers. Nothing here looks at a row in Python or waits for the
device: what depends on the tokens is expressed as masks over the vocabulary. Inputs are never changed in place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError

MINUS_INFINITY = -math.inf

#: A length that no text reaches.
FOREVER = 1 << 62


class LogitsProcessor:
    """Base of all processors."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores after this rule.

        Args:
            input_ids: (rows, length) int64, the tokens so far, prompt included.
            scores: (rows, vocabulary) logits or log-probabilities of the next token.
        """
        raise GenerationError(f"{type(self).__name__} does not define __call__(input_ids, scores).")

    def at_length(self, length: int) -> tuple[Any, int]:
        """What the rule comes to when `length` tokens are there, for loops that add one token after the other.

        Returns:
            A quicker rule with the same result, or None where nothing is changed; and the first length for which to
            ask again. See `rules.Rules`.
        """
        return self, FOREVER


class LogitsProcessorList(list[Any]):
    """Processors applied one after the other."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Scores after all rules; `kwargs` go to those processors that take more than two arguments."""
        for processor in self:
            extra = kwargs if kwargs and len(inspect.signature(processor.__call__).parameters) > 2 else {}
            scores = processor(input_ids, scores, **extra)
        return scores


def token_ids(value: int | Sequence[int] | Tensor, name: str, device: str | torch.device = "cpu") -> Tensor:
    """Token ids as a flat int64 tensor.

    Raises:
        GenerationError: An id is negative or not an integer.
    """
    ids = value if isinstance(value, Tensor) else torch.tensor([value] if isinstance(value, int) else list(value))
    if ids.numel() and (ids.is_floating_point() or int(ids.min()) < 0):
        raise GenerationError(f"{name}={value!r} is not accepted: pass token ids, integers of at least 0.")
    return ids.flatten().to(device=device, dtype=torch.long)


class VocabularyMask:
    """Marks of some ids over a vocabulary, made once per size and device; ids beyond the vocabulary are ignored."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._mask: Tensor | None = None

    def like(self, scores: Tensor) -> Tensor:
        """(vocabulary,) bool on the device of `scores`, True at the ids."""
        size = scores.shape[-1]
        if self._mask is None or self._mask.shape[0] != size or self._mask.device != scores.device:
            ids = self.ids.to(scores.device)
            self._mask = torch.isin(torch.arange(size, device=scores.device), ids)
        return self._mask


class BannedTokens:
    """Forbids some tokens: their scores become minus infinity, whatever they were.

    On a CPU only these scores are written, several times quicker than by a mask; elsewhere a mask is one kernel.

    Args:
        ids: (n,) int64; those beyond the vocabulary are ignored.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._places = ids
        self._mask: Tensor | None = None

    def begin(self, input_ids: Tensor, vocabulary: int) -> None:
        """Get ready for scores (rows, vocabulary) on the device of `input_ids`."""
        if input_ids.device.type == "cpu":
            self._places = self.ids[self.ids < vocabulary].to(input_ids.device)
        else:
            self._mask = VocabularyMask(self.ids).like(input_ids.new_empty(vocabulary))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._mask is not None:
            return torch.where(self._mask, MINUS_INFINITY, scores)
        return scores.index_fill(-1, self._places, MINUS_INFINITY)


def _mark(tokens: Tensor, wanted: Tensor, size: int) -> Tensor:
    """(rows, size) bool, True at those of `tokens` (rows, n) where `wanted` (rows, n) holds."""
    inside = wanted & (tokens >= 0) & (tokens < size)
    # What is not wanted goes to one extra column, so that shapes do not depend on the data.
    marks = torch.zeros(tokens.shape[0], size + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter_(1, torch.where(inside, tokens, size), True)[:, :size]


def _for_rows(values: Tensor, rows: int) -> Tensor:
    """Repeat each row of `values` so that there are `rows` (beams follow one another)."""
    return values if values.shape[0] == rows else values.repeat_interleave(rows // values.shape[0], dim=0)


def _penalise(scores: Tensor, marks: Tensor, penalty: float) -> Tensor:
    """Divide marked positive scores by `penalty` and multiply marked negative ones."""
    return torch.where(marks, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _check_penalty(penalty: float) -> float:
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 < penalty < math.inf:
        raise GenerationError(f"penalty={penalty!r} is not accepted: pass a finite number above 0; 1.0 is no penalty.")
    return float(penalty)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Make tokens that already occurred less likely (penalty above 1) or more likely (below 1).

    Args:
        penalty: Above 0; 1.0 changes nothing.
        prompt_ignore_length: How many tokens at the start do not count as occurrences (padding, say): one number, or
            (batch,) int64.

    Source: CTRL, arXiv:1909.05858.
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        self.penalty = _check_penalty(penalty)
        ignored = 0 if prompt_ignore_length is None else prompt_ignore_length
        is_vector = isinstance(ignored, Tensor) and ignored.dim() == 1
        if not is_vector and (isinstance(ignored, (bool, Tensor)) or not isinstance(ignored, int) or ignored < 0):
            raise GenerationError(
                f"prompt_ignore_length={ignored!r} is not accepted: pass an integer of at least 0, or one per row."
            )
        self.prompt_ignore_length = ignored

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ignored = self.prompt_ignore_length
        if isinstance(ignored, Tensor):
            ignored = _for_rows(ignored.to(input_ids.device), input_ids.shape[0])[:, None]
        counts = torch.arange(input_ids.shape[1], device=input_ids.device)[None] >= ignored
        seen = _mark(input_ids, counts.expand_as(input_ids), scores.shape[-1])
        return _penalise(scores, seen, self.penalty)


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Make tokens of the encoder's input more likely (penalty above 1): against hallucination.

    Args:
        penalty: Above 0; 1.0 changes nothing.
        encoder_input_ids: (batch, length) int64.
    """

    def __init__(self, penalty: float, encoder_input_ids: Tensor) -> None:
        self.penalty = 1 / _check_penalty(penalty)
        self.encoder_input_ids = encoder_input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = _for_rows(self.encoder_input_ids.to(scores.device), scores.shape[0])
        seen = _mark(tokens, torch.ones_like(tokens, dtype=torch.bool), scores.shape[-1])
        return _penalise(scores, seen, self.penalty)


def _check_ngram(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise GenerationError(f"{name}={size!r} is not accepted: pass an integer of at least 1.")
    return size


def _complete_ngrams(history: Tensor, recent: Tensor, size: int, vocabulary: int) -> Tensor:
    """(rows, vocabulary) bool: tokens that, after the last ones of `recent`, complete an n-gram of `history`."""
    windows = history.unfold(1, size, 1)  # (rows, positions, size)
    start = recent[:, recent.shape[1] - (size - 1) :]
    same = (windows[:, :, :-1] == start[:, None, :]).all(dim=-1)
    return _mark(windows[:, :, -1], same, vocabulary)


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbid tokens that would complete an n-gram for the second time.

    Args:
        ngram_size: Length of the n-grams that may occur once only, in tokens.
    """

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = _check_ngram("ngram_size", ngram_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.ngram_size:
            return scores.clone()
        banned = _complete_ngrams(input_ids, input_ids, self.ngram_size, scores.shape[-1])
        return scores.masked_fill(banned, MINUS_INFINITY)


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbid tokens that would complete an n-gram of the encoder's input.

    Args:
        encoder_ngram_size: Length of the n-grams, in tokens.
        encoder_input_ids: (batch, length) or (length,) int64.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor) -> None:
        self.ngram_size = _check_ngram("encoder_ngram_size", encoder_ngram_size)
        self.encoder_input_ids = encoder_input_ids[None] if encoder_input_ids.dim() == 1 else encoder_input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        history = _for_rows(self.encoder_input_ids.to(scores.device), scores.shape[0])
        if history.shape[1] < self.ngram_size or input_ids.shape[1] < self.ngram_size - 1:
            return scores.clone()
        banned = _complete_ngrams(history, input_ids, self.ngram_size, scores.shape[-1])
        return scores.masked_fill(banned, MINUS_INFINITY)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Add a bias to the last token of a sequence when its other tokens have just been written.

    Args:
        sequence_bias: Dictionary from a tuple of token ids to a bias, or a list of [[token ids], bias] pairs.
    """

    _option, _largest = "sequence_bias", -1

    def __init__(self, sequence_bias: dict[tuple[int, ...], float] | Sequence[Sequence[Any]]) -> None:
        pairs = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
        table: dict[tuple[int, ...], float] = {}
        for pair in pairs:
            is_pair = len(pair) == 2 and isinstance(pair[0], Sequence) and len(pair[0]) > 0
            if not is_pair or isinstance(pair[1], bool):
                raise GenerationError(
                    f"sequence_bias entry {pair!r} is not accepted: pass [[token ids], bias] with one or more ids."
                )
            token_ids(pair[0], "sequence_bias")
            table[tuple(int(token) for token in pair[0])] = float(pair[1])
        if not table:
            raise GenerationError("sequence_bias is empty: pass one or more sequences, or leave it unset.")
        self.sequence_bias = table
        self._largest = max(max(sequence) for sequence in table)
        self._groups = _group_by_length(table)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, size = scores.shape
        if self._largest >= size:
            raise GenerationError(
                f"{self._option} names the token {self._largest}, but the vocabulary ends at {size - 1}: leave it out."
            )
        bias = torch.zeros_like(scores)
        for length, (starts, lasts, values) in self._groups_on(scores.device).items():
            if length - 1 > input_ids.shape[1]:
                continue
            values = values.to(scores.dtype)
            recent = input_ids[:, input_ids.shape[1] - (length - 1) :]
            same = (recent[:, None, :] == starts[None]).all(dim=-1)  # (rows, sequences)
            added = torch.where(same, values[None], torch.zeros_like(values)[None])
            bias.scatter_add_(1, lasts[None].expand(rows, -1), added)
        return scores + bias

    def _groups_on(self, device: torch.device) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        if any(ids.device != device for ids, _, _ in self._groups.values()):
            self._groups = {
                length: (ids.to(device), lasts.to(device), values.to(device))
                for length, (ids, lasts, values) in self._groups.items()
            }
        return self._groups


def _group_by_length(table: dict[tuple[int, ...], float]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Sequences of one length as tensors: first tokens (n, length - 1), last token (n,), bias (n,)."""
    groups: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for length in sorted({len(sequence) for sequence in table}):
        chosen = [(sequence, bias) for sequence, bias in table.items() if len(sequence) == length]
        ids = torch.tensor([sequence for sequence, _ in chosen], dtype=torch.long)
        biases = torch.tensor([bias for _, bias in chosen], dtype=torch.float32)
        groups[length] = (ids[:, :-1], ids[:, -1], biases)
    return groups


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbid words, given as lists of token ids; a word that is just an end token is let through.

    Args:
        bad_words_ids: Words, each a list of one or more token ids.
        eos_token_id: End tokens.
    """

    _option = "bad_words_ids"

    def __init__(
        self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: int | Sequence[int] | Tensor | None = None
    ) -> None:
        if not isinstance(bad_words_ids, Sequence) or not len(bad_words_ids):
            raise GenerationError(f"bad_words_ids={bad_words_ids!r} is not accepted: pass one or more lists of ids.")
        ends = [] if eos_token_id is None else token_ids(eos_token_id, "eos_token_id").tolist()
        for word in bad_words_ids:
            if not isinstance(word, Sequence) or not len(word):
                raise GenerationError(f"bad_words_ids holds {word!r}: pass lists of one or more token ids.")
        words = [tuple(word) for word in bad_words_ids if not (len(word) == 1 and word[0] in ends)]
        self.bad_word_ids = bad_words_ids
        if words:
            super().__init__(dict.fromkeys(words, MINUS_INFINITY))
        else:
            self.sequence_bias, self._groups = {}, {}


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbid some tokens always.

    Args:
        suppress_tokens: Token ids.
    """

    def __init__(self, suppress_tokens: Sequence[int] | Tensor, device: str | torch.device = "cpu") -> None:
        self.suppress_tokens = token_ids(suppress_tokens, "suppress_tokens", device)
        self._mask = VocabularyMask(self.suppress_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self._mask.like(scores), MINUS_INFINITY)

    def at_length(self, length: int) -> tuple[Any, int]:
        return BannedTokens(self.suppress_tokens), FOREVER


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allow only the tokens that a function names for each row's prefix.

    Args:
        prefix_allowed_tokens_fn: Function (batch index, (length,) tokens so far) -> list of allowed ids.
        num_beams: Rows per batch item.
    """

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]], num_beams: int) -> None:
        self._allowed = prefix_allowed_tokens_fn
        self._beams = num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The function is the user's and takes one row, so this is the one processor with a loop over rows.
        marks = torch.zeros_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(input_ids):
            answer = self._allowed(row // self._beams, tokens)
            allowed = [] if answer is None else [int(token) for token in answer]
            if not allowed or not 0 <= min(allowed) <= max(allowed) < scores.shape[-1]:
                what = str(allowed)[:60] if allowed else "no token"
                raise GenerationError(
                    f"prefix_allowed_tokens_fn allows {what} for batch item {row // self._beams} after "
                    f"{len(tokens)} tokens: return one or more token ids from 0 to {scores.shape[-1] - 1}."
                )
            marks[row, torch.tensor(allowed, dtype=torch.long, device=scores.device)] = True
        scores = scores.masked_fill(~marks, MINUS_INFINITY)
        # Where other rules forbid all that the function allows, the function wins.
        is_stuck = (scores == MINUS_INFINITY).all(dim=-1, keepdim=True)
        return scores.masked_fill(is_stuck & marks, 0.0)


class LogitNormalization(LogitsProcessor):
    """Turn scores into log-probabilities that sum to one again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=-1)


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replace NaN by 0 and infinities by the largest and smallest finite numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        limits = torch.finfo(scores.dtype)
        return torch.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min)
