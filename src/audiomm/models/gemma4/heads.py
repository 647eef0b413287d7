"""The language-model head of Gemma 4: scores, loss, and what generation asks for; and the text model with it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.config import PreTrainedConfig
from ...base.errors import ShapeError
from ...base.outputs import ModelOutput
from ...generation import GenerationConfig, GenerationMixin
from ...layers.cache import Cache
from ...layers.embedding import check_token_ids
from ...layers.language_head import DecoderAnswers, following_labels, label_loss, loss_columns, token_logits
from ...layers.masks import Mask
from ...layers.regions import recorder
from .config import Gemma4TextConfig
from .step import QuickStep
from .text import CACHE_ONLY, Gemma4PreTrainedModel, Gemma4TextModel, Pair
from .weights import NOT_TEXT, TEXT_NAMES, UNUSED

#: Longer prompts are read in pieces of about so many tokens: a mask of (piece, prompt) is what a piece needs at most.
PREFILL_CHUNK = 4096


@dataclass
class Gemma4CausalLMOutput(ModelOutput):
    """Scores of the next tokens.

    Attributes:
        loss: Mean over all labels that are not -100.
        logits: (rows, kept tokens, vocabulary) float32.
        past_key_values: The cache, for the next call.
        hidden_states, attentions: One tensor a layer, if asked for.
        image_hidden_states, audio_hidden_states: (tokens, width) features put in the place of the media's marks.
        shared_kv_states: {kind of layer: (keys, values)} of the last layer of each kind, if asked for.
        router_logits: One (tokens, experts) tensor of probabilities a layer, if asked for.
        last_hidden_state: (rows, kept tokens, width), after the last norm, for drafters.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    shared_kv_states: dict[str, Pair] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    last_hidden_state: Tensor | None = None


@dataclass
class Prompt:
    """What enters the decoder, settled before it is read piece by piece.

    Attributes:
        embeddings: (rows, length, width).
        ids: (rows, length) token ids for the per-layer embeddings, padding at media; None where there are none.
        per_layer: (rows, length, layers, width) in place of ids.
        blocks: (rows, length) bool, True for tokens of pictures that see each other; None where that is not done.
    """

    embeddings: Tensor
    ids: Tensor | None = None
    per_layer: Tensor | None = None
    blocks: Tensor | None = None


class Gemma4WithTokenHead(DecoderAnswers, GenerationMixin, Gemma4PreTrainedModel):
    """A model whose tied head turns the decoder's states into scores of tokens."""

    model: Any

    def get_decoder(self) -> Gemma4TextModel:
        """The text stack."""
        text: Gemma4TextModel = self.model
        return text

    def step(self, input_ids: Tensor, cache: Cache, **flags: Any) -> Gemma4CausalLMOutput:
        """Decode steps: (rows, new) token ids to logits (rows, new, vocabulary)."""
        decoded = self.get_decoder()(input_ids, past_key_values=cache, **flags)
        return self.headed(decoded, last_hidden_state=decoded.last_hidden_state)

    def make_quick_step(self) -> QuickStep:
        return QuickStep(self.get_decoder(), self.lm_head, getattr(self.model, "text_ids", None))

    def embed_drafted(self, input_ids: Tensor) -> Tensor:
        """(rows, 1, width) embeddings of drafted tokens (rows, 1), as the decoder reads them."""
        embedded: Tensor = self.get_decoder().embed_tokens(input_ids)
        return embedded

    def draft_view(self, cache: Cache) -> tuple[dict[str, Pair], dict[str, Mask], Tensor]:
        """What a drafter reads of the cache, whose tokens are all before the newest one.

        Returns:
            Keys and values of the last layer of each kind that has its own; who is seen; and the position of the newest
            token (rows, 1).
        """
        config = self.get_decoder().config
        pairs: dict[str, Pair] = {}
        masks: dict[str, Mask] = {}
        place = torch.zeros(0)
        for kind in set(config.layer_types or []):
            source = config.key_value_source(config.last_of(kind))
            keys, values, positions = cache.view(source)
            place = positions.amax(dim=1, keepdim=True) + 1
            pairs[kind] = keys, values
            masks[kind] = keys_before(positions, config.window_of(source))
        return pairs, masks, place

    def headed(self, decoded: Any, **fields: Any) -> Gemma4CausalLMOutput:
        """The decoder's answer with logits in place of the last hidden state."""
        kept = {name: value for name, value in decoded.items() if name != "last_hidden_state"}
        cap = self.get_decoder().config.final_logit_softcapping
        logits = token_logits(decoded.last_hidden_state, self.lm_head, cap)
        return Gemma4CausalLMOutput(**{**kept, **fields, "logits": logits})

    def read_prompt(
        self,
        prompt: Prompt,
        cache: Cache,
        attention_mask: Tensor | None,
        logits_to_keep: int,
        chunk: int | None,
        **flags: Any,
    ) -> Gemma4CausalLMOutput:
        """Run a prompt through the decoder, in pieces when it is long, and score its last positions.

        Args:
            prompt: What enters the decoder.
            cache: Filled with the prompt, behind what it holds.
            attention_mask: (rows, held and new tokens), 0 for padding at the left.
            logits_to_keep: How many of the last positions to score.
            chunk: Tokens of a piece; None is PREFILL_CHUNK.
        """
        decoder, length, record = self.get_decoder(), prompt.embeddings.shape[1], recorder()
        whole, past = any(flags.values()), cache.length
        # How many tokens an expert gets is asked for on the way.
        fits = length <= (chunk or PREFILL_CHUNK) and not decoder.config.enable_moe_block
        if record is not None and fits and not whole:
            per_layer = prompt.per_layer if prompt.ids is None else decoder.get_per_layer_inputs(prompt.ids)

            def read(embeddings: Tensor, per_layer: Tensor | None, blocks: Tensor | None, mask: Tensor | None) -> Any:
                one_piece = Prompt(embeddings, per_layer=per_layer, blocks=blocks)
                output = self.read_prompt(one_piece, cache, mask, logits_to_keep, chunk)
                return output.logits, output.last_hidden_state

            inputs = prompt.embeddings, per_layer, prompt.blocks, attention_mask
            logits, states = record(self, ("prompt", logits_to_keep), read, *inputs, cache=cache)
            return Gemma4CausalLMOutput(logits=logits, past_key_values=cache, last_hidden_state=states)
        edges = [0, length] if whole else chunk_edges(length, logits_to_keep, chunk or PREFILL_CHUNK, prompt.blocks)
        decoded: Any = None
        for begin, end in pairwise(edges):
            part, last = slice(begin, end), end == length
            per_layer = None if prompt.per_layer is None else prompt.per_layer[:, part]
            if prompt.ids is not None:
                per_layer = decoder.get_per_layer_inputs(prompt.ids[:, part])
            decoded = decoder(
                inputs_embeds=prompt.embeddings[:, part],
                per_layer_inputs=per_layer,
                attention_mask=None if attention_mask is None else attention_mask[:, : past + end],
                past_key_values=cache,
                blocks=None if prompt.blocks is None else prompt.blocks[:, part],
                kept=slice(-logits_to_keep, None) if last else CACHE_ONLY,
                **flags,
            )
        return self.headed(decoded, last_hidden_state=decoded.last_hidden_state)

    def with_loss(
        self,
        output: Gemma4CausalLMOutput,
        labels: Tensor | None,
        kept: slice | Tensor | None,
        count: Tensor | int | None,
    ) -> Gemma4CausalLMOutput:
        """The output with its loss: cross-entropy of each kept position against the label after it.

        Args:
            labels: (rows, tokens), -100 where no loss is wanted; None is no loss.
            kept: Columns the logits are for.
            count: Divide the sum by this instead of the number of labels, as gradient accumulation needs.
        """
        if labels is not None and output.logits is not None:
            wanted = following_labels(labels) if kept is None else following_labels(labels)[:, kept]
            if wanted.shape != output.logits.shape[:2]:
                raise ShapeError(
                    f"labels are of shape {tuple(labels.shape)} and the scores of shape "
                    f"{tuple(output.logits.shape)}: one label for each token is needed, -100 where none is wanted."
                )
            output.loss = label_loss(output.logits, wanted, count)
        return output


class Gemma4ForCausalLM(Gemma4WithTokenHead):
    """The text stack alone and its head; loads from checkpoints of the whole model too."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4TextConfig
    config: Gemma4TextConfig
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, *NOT_TEXT)
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = TEXT_NAMES

    def __init__(self, config: Gemma4TextConfig) -> None:
        super().__init__(config)
        self.model = Gemma4TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

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
        **flags: Any,
    ) -> Gemma4CausalLMOutput:
        """Read the prompt.

        Args:
            input_ids: (rows, prompt) token ids; (rows, 0) with inputs_embeds.
            cache: Empty; filled with the prompt.
            attention_mask: (rows, prompt), 0 for padding at the left.
            inputs_embeds, per_layer_inputs: As in `forward`, in place of ids.
            logits_to_keep: How many of the last positions to score.
            prefill_chunk_size: Read longer prompts in pieces of so many tokens.
        """
        if inputs_embeds is not None:
            prompt = Prompt(inputs_embeds, per_layer=per_layer_inputs)
        else:
            check_token_ids(input_ids, self.config.vocab_size)
            ids = input_ids if self.config.hidden_size_per_layer_input else None
            prompt = Prompt(self.model.embed_tokens(input_ids), ids)
        return self.read_prompt(prompt, cache, attention_mask, logits_to_keep, prefill_chunk_size, **flags)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_positions_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_shared_kv_states: bool = False,
        return_dict: bool | None = None,
    ) -> Gemma4CausalLMOutput | tuple[Any, ...]:
        """Scores of the next tokens, and the loss against `labels`.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, per_layer_inputs: As
                in `Gemma4TextModel.forward`.
            labels: (rows, tokens) with -100 where no loss is wanted, as at padding; each is compared with the scores
                before it.
            logits_to_keep: Score the last so many positions, or those at these columns (kept,); 0 is all.
            num_items_in_batch: Divide the loss by this number of labels instead of those of this batch.
            loss_positions_only: Score only columns that some label follows, and run the layers that share keys and
                values on these alone: the same loss and gradients for a part of the work.
        """
        if input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
        kept = kept_columns(logits_to_keep, labels, loss_positions_only)
        decoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=use_cache,
            kept=kept,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_shared_kv_states=return_shared_kv_states,
        )
        output = self.with_loss(self.headed(decoded), labels, kept, num_items_in_batch)
        return output.to_tuple() if return_dict is False else output


def keys_before(positions: Tensor, window: int | None) -> Mask:
    """Which keys the token right behind them is shown, (rows, 1, 1, keys) bool.

    Args:
        positions: (rows, keys), -1 for padding and empty slots.
        window: None is all keys; otherwise the last so many and one more, as transformers shows a drafter.
    """
    newest = positions.amax(dim=1, keepdim=True)
    earliest = torch.zeros_like(newest) if window is None else (newest - window).clamp(min=0)
    return (positions >= earliest)[:, None, None]


def kept_columns(logits_to_keep: int | Tensor, labels: Tensor | None, loss_only: bool) -> slice | Tensor | None:
    """Which columns are to be scored, as an index; None is all."""
    if loss_only:
        return loss_columns(labels, logits_to_keep)
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else None


def chunk_edges(length: int, keep: int, chunk: int, blocks: Tensor | None) -> list[int]:
    """Where a prompt is cut into pieces of about `chunk` tokens: 0, ..., length.

    Args:
        length: Tokens of the prompt.
        keep: The last so many stay in one piece.
        chunk: Tokens of a piece; more where a picture would be cut.
        blocks: (rows, length) bool, True for tokens of pictures, which are read whole; None where that is not needed.
    """
    if length <= chunk:
        return [0, length]
    inside = [False] * length
    if blocks is not None:
        inside = [False, *(blocks[:, 1:] & blocks[:, :-1]).any(dim=0).tolist()]
    edges, last = [0], length - keep
    while length - edges[-1] > chunk:
        begin = edges[-1]
        places = [*range(min(begin + chunk, last), begin, -1), *range(begin + chunk + 1, last + 1)]
        place = next((place for place in places if not inside[place]), None)
        if place is None:
            break
        edges.append(place)
    return [*edges, length]
