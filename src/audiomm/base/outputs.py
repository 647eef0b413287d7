"""What models and generation return: dataclasses that also answer to keys, indices and tuple unpacking.

The contract is the one users of `transformers` know: fields that are None are absent from `keys()`, from
`to_tuple()` and from integer indexing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Base of all outputs; `out.logits`, `out["logits"]` and `out[0]` read the same thing."""

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        value = getattr(self, name, None)
        return default if value is None else value

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(f"{key!r} is not in this {type(self).__name__}; it holds {', '.join(self.keys())}.")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseModelOutput(ModelOutput):
    """An encoder's answer: last_hidden_state (batch, length, width)."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DecoderOutput(ModelOutput):
    """A decoder's answer, with its cache and, for encoder-decoders, the attention to the encoder."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqModelOutput(ModelOutput):
    """Encoder and decoder together, without a head."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """Encoder, decoder and language-model head: logits (batch, length, vocabulary)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """A decoder with a language-model head: logits (batch, length, vocabulary)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """One score per class and item: logits (batch, classes)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """What generation returns when `return_dict_in_generate` is set.

    Attributes:
        sequences: (batch x returned sequences, length) token ids, prompt first, padded at the right.
        sequences_scores: (batch x returned sequences,) beam scores; None without beams.
        scores: one (rows, vocabulary) tensor a step, after the logits processors.
        logits: one (rows, vocabulary) tensor a step, as the model gave them.
        beam_indices: (batch x returned sequences, steps) which beam each token came from, -1 after the end.
        logprobs: (rows,) sum of the log-probabilities of the chosen tokens, end token included.
        encoder_hidden_states, encoder_attentions, decoder_attentions, cross_attentions, decoder_hidden_states:
            as asked for; the decoder's are one tuple of layers a step.
        past_key_values: the cache after the last step; rows that drafts have let part and that were done before the
            last one have left it.
        draft_counts: of speculative decoding: rounds; tokens drafted, of all rows together, and accepted ones.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    logprobs: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    draft_counts: dict[str, int] | None = None
