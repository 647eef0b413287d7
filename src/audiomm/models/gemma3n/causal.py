"""Gemma3nForCausalLM, and what every Gemma 3n with a head does when it generates."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...base.outputs import CausalLMOutput, ModelOutput
from ...generation import GenerationConfig, GenerationMixin
from ...layers.cache import Cache
from ...layers.embedding import check_token_ids
from ...layers.language_head import (
    DecoderAnswers,
    following_labels,
    label_loss,
    loss_columns,
    shifted_loss,
    token_logits,
)
from ...layers.per_layer import find_token_ids
from ...layers.regions import recorder
from .config import Gemma3nTextConfig
from .step import QuickStep
from .streams import make_step
from .text import Gemma3nPreTrainedModel, Gemma3nTextModel
from .weights import NOT_TEXT, TEXT_NAMES, UNUSED


class Gemma3nWithHead(DecoderAnswers, GenerationMixin, Gemma3nPreTrainedModel):
    """A model whose head turns the decoder's states into scores of tokens."""

    model: Any

    def prefill(
        self,
        input_ids: Tensor,
        cache: Cache,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        logits_to_keep: int = 1,
        prefill_chunk_size: int | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Run the prompt, with pictures and sounds where the model takes them.

        Args:
            input_ids: (rows, prompt) token ids.
            cache: Empty; filled with the prompt's keys and values.
            attention_mask: (rows, prompt), 0 for padding at the left.
            inputs_embeds: (rows, prompt, hidden_size) to read instead of the ids' embeddings.
            per_layer_inputs: The layers' own embeddings that go with inputs_embeds. Without them they follow from the
                ids, or from the tokens whose embeddings inputs_embeds are.
            logits_to_keep: How many of the last positions to score.
            prefill_chunk_size: Read longer prompts in pieces of so many tokens, which takes less memory.

        Returns:
            logits (rows, logits_to_keep, vocabulary).
        """
        ids: Tensor | None = input_ids
        if inputs_embeds is not None:
            ids = None
            if per_layer_inputs is None:
                decoder = self.get_decoder()
                known = input_ids.shape[1] == inputs_embeds.shape[1]
                tokens = input_ids if known else find_token_ids(inputs_embeds, decoder.embed_tokens)
                per_layer_inputs = decoder.get_per_layer_inputs(tokens)
        whole, record = {"position_ids", "output_attentions", "output_hidden_states"} & set(inputs), recorder()
        if prefill_chunk_size is not None and not whole:
            embeds, per_layer = self.read(ids, inputs_embeds, per_layer_inputs, **inputs)
            begin = self._read_pieces(embeds, per_layer, cache, attention_mask, prefill_chunk_size, logits_to_keep)
            ids, inputs_embeds, inputs = None, embeds[:, begin:], {}
            per_layer_inputs = None if per_layer is None else per_layer[:, begin:]
        elif record is not None and not whole:
            embeds, per_layer = self.read(ids, inputs_embeds, per_layer_inputs, **inputs)

            def run(embeds: Tensor, per_layer: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
                given = {"inputs_embeds": embeds, "per_layer_inputs": per_layer, "past_key_values": cache}
                return (self(attention_mask=mask, logits_to_keep=logits_to_keep, **given).logits,)

            (logits,) = record(self, ("prompt", logits_to_keep), run, embeds, per_layer, attention_mask, cache=cache)
            return CausalLMOutput(logits=logits, past_key_values=cache)
        output: ModelOutput = self(
            ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            past_key_values=cache,
            logits_to_keep=logits_to_keep,
            **inputs,
        )
        return output

    def read(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, per_layer_inputs: Tensor | None, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (rows, prompt, width) of a prompt, media in their places, and the layers' own."""
        if input_ids is None:
            assert inputs_embeds is not None, "a prompt comes as ids or as embeddings"
            return inputs_embeds, per_layer_inputs
        decoder = self.get_decoder()
        check_token_ids(input_ids, decoder.embed_tokens.num_embeddings)
        return decoder.embed_tokens(input_ids), decoder.get_per_layer_inputs(input_ids)

    def _read_pieces(
        self, embeds: Tensor, per_layer: Tensor | None, cache: Cache, mask: Tensor | None, size: int, keep: int
    ) -> int:
        """Put all pieces of a prompt but the last into the cache; returns where the last begins."""
        begin, past = 0, cache.length
        for end in range(size, embeds.shape[1] - keep + 1, size):
            self.get_decoder()(
                inputs_embeds=embeds[:, begin:end],
                per_layer_inputs=None if per_layer is None else per_layer[:, begin:end],
                attention_mask=None if mask is None else mask[:, : past + end],
                past_key_values=cache,
                last_positions=1,
            )
            begin = end
        return begin

    def step(self, input_ids: Tensor, cache: Cache, **flags: bool) -> ModelOutput:
        """One decode step: (rows, new) token ids to logits (rows, new, vocabulary)."""
        output: ModelOutput = self(input_ids, past_key_values=cache, **flags)
        return output

    def make_quick_step(self) -> QuickStep:
        return make_step(self.get_decoder(), self.lm_head)

    def score(
        self, decoded: Any, labels: Tensor | None, keep: int | Tensor, items: Any, read: int | Tensor
    ) -> dict[str, Any]:
        """Fields of the output: scores, loss, and what the decoder gave besides its states.

        `read` is what `positions_read` answered: the decoder has left out what is not read.
        """
        cap = self.get_decoder().config.final_logit_softcapping
        keep = keep if isinstance(read, int) else 0
        logits = token_logits(decoded.last_hidden_state, self.lm_head, cap, keep)
        fields = dict(decoded.items())
        fields.pop("last_hidden_state")
        if isinstance(read, Tensor) and labels is not None:
            loss: Tensor | None = label_loss(logits, following_labels(labels)[:, read], items)
        else:
            loss = shifted_loss(logits, labels, items)
        return {"loss": loss, "logits": logits, **fields}


def positions_read(logits_to_keep: int | Tensor, labels: Tensor | None, loss_only: bool) -> int | Tensor:
    """How many of the last positions are scored, 0 for all, or the columns that labels ask for."""
    if loss_only:
        return loss_columns(labels, logits_to_keep)
    return logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0


class Gemma3nForCausalLM(Gemma3nWithHead):
    """The text decoder with its head; reads the text part of a whole checkpoint, too, and leaves the rest unread."""

    config_class = Gemma3nTextConfig
    config: Gemma3nTextConfig
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, *NOT_TEXT)
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = TEXT_NAMES

    def __init__(self, config: Gemma3nTextConfig) -> None:
        super().__init__(config)
        self.model = Gemma3nTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    def get_decoder(self) -> Gemma3nTextModel:
        decoder: Gemma3nTextModel = self.model
        return decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_positions_only: bool = False,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Scores of the next tokens, and the loss against `labels`.

        Args:
            labels: (rows, tokens), -100 where no loss is wanted; each is compared with the scores one before it.
            logits_to_keep: How many of the last positions to score, 0 for all; or their indices.
            num_items_in_batch: What to divide the loss by instead of the number of labels.
            loss_positions_only: Score only columns that some label follows: the same loss and gradients, and no scores
                of the other positions to keep for them.

        The other arguments are those of `Gemma3nTextModel.forward`.

        Returns:
            logits (rows, kept, vocabulary) float32 and what was asked for besides.
        """
        read = positions_read(logits_to_keep, labels, loss_positions_only)
        decoded = self.model(
            input_ids,
            per_layer_inputs=per_layer_inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            last_positions=read,
        )
        output = CausalLMOutput(**self.score(decoded, labels, logits_to_keep, num_items_in_batch, read))
        return output.to_tuple() if return_dict is False else output
