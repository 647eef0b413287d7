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
from .config import FULL, SLIDING
from .heads import keys_before
from .text import Gemma4PreTrainedModel, Gemma4TextModel, Pair, new_positions
from .variants import Gemma4AssistantConfig, Gemma4UnifiedAssistantConfig


@dataclass
class Gemma4AssistantOutput(ModelOutput):
    """A draft: the state for the next one (rows, 1, target's width), and logits (rows, 1, vocabulary)."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class GroupedScores(nn.Module):
    """Scores the tokens of the groups that fit a state best, and them alone; the others lie one below the lowest.

    The vocabulary is dealt out into groups of one size, each with a vector to compare states with.

    Args:
        groups: Into how many the vocabulary is dealt.
        best: How many of them are scored.
        vocabulary: Tokens.
        width: Of a state.
    """

    def __init__(self, groups: int, best: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.groups, self.best = groups, best
        self.centroids = nn.Linear(width, groups, bias=False)
        #: All token ids, those of one group side by side.
        self.token_ordering: Tensor
        self.register_buffer("token_ordering", torch.arange(vocabulary))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """(rows, length, width) and the embeddings (vocabulary, width) to (rows, length, vocabulary)."""
        nearest = self.centroids(states).topk(self.best).indices
        candidates = self.token_ordering.unflatten(0, (self.groups, -1))[nearest].flatten(-2)
        found = torch.einsum("rld,rlcd->rlc", states, table[candidates])
        everyone = (found.amin() - 1.0).expand(*states.shape[:-1], len(table))
        return everyone.scatter(-1, candidates, found)


class Gemma4AssistantForCausalLM(GenerationMixin, Gemma4PreTrainedModel):
    """A drafter for a Gemma 4 model; pass it to that model's generate() as assistant_model."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4AssistantConfig
    config: Gemma4AssistantConfig
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # A drafter is small, and its head is read by pieces.
    quantized_linear: ClassVar[Any] = None
    #: Tells generation that drafts are made from the target's states.
    drafts_from_states: ClassVar[bool] = True

    def __init__(self, config: Gemma4AssistantConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = Gemma4TextModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.pre_projection = nn.Linear(2 * config.backbone_hidden_size, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, config.backbone_hidden_size, bias=False)
        self.masked_embedding = None
        if config.use_ordered_embeddings:
            groups, best = config.num_centroids, config.centroid_intermediate_top_k
            self.masked_embedding = GroupedScores(groups, best, text.vocab_size, text.hidden_size)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if isinstance(module, GroupedScores):
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
        if not isinstance(attention_mask, dict):
            attention_mask = self._masks(attention_mask, shared_kv_states)
        state = self._state(inputs_embeds, position_ids, attention_mask, shared_kv_states)
        if self.masked_embedding is None:
            scores = self.lm_head(state)
        else:
            scores = self.masked_embedding(state, self.lm_head.weight)
        # The target goes on with both, and may be on another device.
        output = Gemma4AssistantOutput(
            last_hidden_state=self.post_projection(state).to(inputs_embeds), logits=scores.to(inputs_embeds.device)
        )
        return output.to_tuple() if return_dict is False else output

    def _state(self, inputs: Tensor, positions: Tensor, masks: dict[str, Mask], pairs: dict[str, Pair]) -> Tensor:
        """The drafter's own state (rows, 1, width): its layers, each reading the target's pair of its kind."""
        weight, stack = self.pre_projection.weight, self.model
        pairs = {kind: (keys.to(weight), values.to(weight)) for kind, (keys, values) in pairs.items()}
        state: Tensor = self.pre_projection(inputs.to(weight))
        tables = stack.tables(positions.to(weight.device), state.dtype)
        nothing = PassThrough()
        for kind, layer in zip(stack.config.layer_types or [], stack.layers, strict=True):
            mask = masks[kind]
            mask = mask.to(weight.device) if isinstance(mask, Tensor) else mask
            state, *_ = layer(state, None, tables[kind], mask, nothing, None, pairs[kind])
        return stack.norm(state)

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
        """Who of the target's tokens is seen, by a padding mask (rows, tokens) or by none.

        The mask may reach on to the newest token, which has no key; layers with a window may hold the last keys only.
        """
        longest = max(keys.shape[2] for keys, _ in pairs.values())
        if padding is None:
            keys = pairs[FULL if FULL in pairs else SLIDING][0]
            padding = torch.ones(len(keys), longest, device=keys.device)
        windows = {SLIDING: self.model.config.sliding_window, FULL: None}
        masks: dict[str, Mask] = {}
        for kind, (keys, _) in pairs.items():
            positions = new_positions(padding[:, :longest], keys.shape[2], PassThrough())
            masks[kind] = None if positions is None else keys_before(positions, windows[kind])
        return masks


class Gemma4UnifiedAssistantForCausalLM(Gemma4AssistantForCausalLM):
    """The 12B's drafter."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4UnifiedAssistantConfig
    config: Gemma4UnifiedAssistantConfig
