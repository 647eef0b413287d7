"""Gemma 4's drafters: four layers that read the target model's keys and values and write several tokens ahead.

A drafter gets the newest token's embedding and the state it was chosen from, both of the target, and hands on a state
in place of the target's for its next draft; all drafts of a round are made at one position. The small sizes score
only the tokens of the most promising groups. Source: the model cards of gemma-4-*-assistant; multi-token prediction,
arXiv:2404.19737.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.config import PreTrainedConfig
from ...base.errors import GenerationError, ShapeError
from ...base.outputs import ModelOutput
from ...generation import GenerationConfig, GenerationMixin
from ...layers.cache import PassThrough
from ...layers.masks import Mask
from .config import SLIDING
from .text import Gemma4PreTrainedModel, Gemma4TextModel, Pair
from .variants import Gemma4AssistantConfig, Gemma4UnifiedAssistantConfig


@dataclass
class Gemma4AssistantOutput(ModelOutput):
    """A draft: the state for the next one (rows, 1, target's width), and logits (rows, 1, vocabulary)."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class Gemma4AssistantMaskedEmbedder(nn.Module):
    """Scores of the tokens in the groups whose centroids fit a state best; all others score one less than the least."""

    def __init__(self, config: Gemma4AssistantConfig) -> None:
        super().__init__()
        vocabulary = config.text_config.vocab_size
        self.groups, self.best = config.num_centroids, config.centroid_intermediate_top_k
        self.centroids = nn.Linear(config.text_config.hidden_size, self.groups, bias=False)
        self.token_ordering: Tensor
        self.register_buffer("token_ordering", torch.arange(vocabulary))

    def forward(self, hidden: Tensor, head: Tensor) -> Tensor:
        """(rows, length, width) and the head's weight (vocabulary, width) to (rows, length, vocabulary)."""
        chosen = self.centroids(hidden).topk(self.best, dim=-1).indices
        tokens = self.token_ordering.view(self.groups, -1)[chosen].flatten(2)
        scores = torch.einsum("rld,rlkd->rlk", hidden, head[tokens])
        rest = (scores.amin() - 1.0).to(scores.dtype)
        return rest.expand(*hidden.shape[:2], len(head)).contiguous().scatter(-1, tokens, scores)


class Gemma4AssistantForCausalLM(GenerationMixin, Gemma4PreTrainedModel):
    """A drafter for a Gemma 4 model; pass it to that model's generate() as assistant_model."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4AssistantConfig
    config: Gemma4AssistantConfig
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    #: Tells generation that drafts are made from the target's states.
    drafts_from_states: ClassVar[bool] = True

    def __init__(self, config: Gemma4AssistantConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = Gemma4TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, config.backbone_hidden_size, bias=False)
        self.masked_embedding = Gemma4AssistantMaskedEmbedder(config) if config.use_ordered_embeddings else None
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if isinstance(module, Gemma4AssistantMaskedEmbedder):
            module.token_ordering.copy_(torch.arange(len(module.token_ordering)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """A drafter reads another model's states, so it cannot write alone.

        Raises:
            GenerationError: Always.
        """
        raise GenerationError(
            "a drafter cannot generate alone, it reads its target's states: call target.generate(..., "
            "assistant_model=drafter)."
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Mask] | None = None,
        shared_kv_states: dict[str, Pair] | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Gemma4AssistantOutput | tuple[Any, ...]:
        """One draft.

        Args:
            input_ids, use_cache: Accepted and not used, as in transformers.
            inputs_embeds: (rows, 1, 2 x target's width) embedding of the newest token, then the state before it.
            position_ids: (rows, 1) position of the newest token.
            attention_mask: (rows, keys) of the target's tokens, 0 at padding; or a mask for each kind of layer.
            shared_kv_states: {kind of layer: (keys, values)} of the target's last layer of each kind that has them.

        Raises:
            ShapeError: Something is missing, or of another target's sizes.
        """
        if inputs_embeds is None or shared_kv_states is None or position_ids is None:
            raise ShapeError("a drafter needs inputs_embeds, position_ids and shared_kv_states; one of them is None.")
        self._check(inputs_embeds, shared_kv_states)
        place = self.pre_projection.weight
        hidden = self.pre_projection(inputs_embeds.to(place))
        pairs = {kind: (keys.to(place), values.to(place)) for kind, (keys, values) in shared_kv_states.items()}
        masks = attention_mask if isinstance(attention_mask, dict) else self._masks(attention_mask, pairs)
        tables = self.model.tables(position_ids.to(place.device), hidden.dtype)
        for index, layer in enumerate(self.model.layers):
            kind = self.model.config.kind_of(index)
            hidden = layer(hidden, None, tables[kind], masks[kind], PassThrough(), None, pairs[kind])[0]
        hidden = self.model.norm(hidden)
        head = self.lm_head.weight
        logits = self.lm_head(hidden) if self.masked_embedding is None else self.masked_embedding(hidden, head)
        output = Gemma4AssistantOutput(
            last_hidden_state=self.post_projection(hidden).to(inputs_embeds), logits=logits.to(inputs_embeds.device)
        )
        return output.to_tuple() if return_dict is False else output

    def _check(self, inputs: Tensor, pairs: dict[str, Pair]) -> None:
        width = self.config.backbone_hidden_size
        if inputs.shape[-1] != 2 * width:
            raise ShapeError(
                f"inputs_embeds is {inputs.shape[-1]} wide; this drafter was made for a target of width {width}, whose "
                f"embedding and state together are {2 * width} wide. Pass the drafter of the target's own size."
            )
        text = self.model.config
        for index in range(text.num_hidden_layers):
            kind, wanted = text.kind_of(index), text.head_dim_of(index)
            if kind not in pairs or pairs[kind][0].shape[-1] != wanted:
                found = "none" if kind not in pairs else f"heads of {pairs[kind][0].shape[-1]}"
                raise ShapeError(
                    f"the target's keys of kind {kind}: {found}, but this drafter reads heads of {wanted}. Pass the "
                    "drafter of the target's own size."
                )

    def _masks(self, padding: Tensor | None, pairs: dict[str, Pair]) -> dict[str, Mask]:
        """Who is seen by the one query behind all keys: in sliding layers those of the window before its own place."""
        masks: dict[str, Mask] = {}
        full = max(keys.shape[2] for keys, _ in pairs.values())
        for kind, (keys, _) in pairs.items():
            count, window = keys.shape[2], self.model.config.sliding_window
            seen = None if padding is None else padding[:, :full][:, -count:, None].mT[:, None].bool()
            if kind == SLIDING and count > window + 1:
                near = torch.arange(count, device=keys.device) >= count - window - 1
                seen = near[None, None, None] if seen is None else seen & near
            masks[kind] = seen
        return masks


class Gemma4UnifiedAssistantForCausalLM(Gemma4AssistantForCausalLM):
    """The 12B's drafter."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedAssistantConfig
    config: Gemma4UnifiedAssistantConfig
