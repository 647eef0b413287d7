"""Gemma3nForConditionalGeneration: text, pictures and sound in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...base.outputs import CausalLMOutput
from ...generation import GenerationConfig
from .causal import Gemma3nWithHead, positions_read
from .config import Gemma3nConfig
from .modeling import Gemma3nModel, MediaFeatures, absent_parts
from .step import QuickStep
from .streams import make_step
from .text import Gemma3nTextModel
from .weights import WHOLE_NAMES


@dataclass
class Gemma3nCausalLMOutputWithPast(CausalLMOutput):
    """Scores of the next token, and what stood on the places of pictures and clips, (items, tokens, hidden_size)."""

    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None


class Gemma3nForConditionalGeneration(Gemma3nWithHead):
    """Gemma 3n with its head: answers to text, pictures and sound, and trains."""

    config_class = Gemma3nConfig
    config: Gemma3nConfig
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = WHOLE_NAMES

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__(config)
        self.model = Gemma3nModel(config)
        self.ignored_weights = (*type(self).ignored_weights, *absent_parts(config))  # type: ignore[misc]
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    def get_decoder(self) -> Gemma3nTextModel:
        decoder: Gemma3nTextModel = self.model.language_model
        return decoder

    def make_quick_step(self) -> QuickStep:
        return make_step(self.get_decoder(), self.lm_head, self.model.media_rows())

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        tower: nn.Module = self.model.vision_tower
        return tower

    @property
    def audio_tower(self) -> nn.Module:
        """The audio encoder."""
        tower: nn.Module = self.model.audio_tower
        return tower

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MediaFeatures:
        """See `Gemma3nModel.get_image_features`."""
        features: MediaFeatures = self.model.get_image_features(pixel_values, **kwargs)
        return features

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **kwargs: Any) -> MediaFeatures:
        """See `Gemma3nModel.get_audio_features`."""
        features: MediaFeatures = self.model.get_audio_features(input_features, input_features_mask, **kwargs)
        return features

    def freeze_towers(self) -> None:
        """Keep the weights of both towers from being trained."""
        self.model.freeze_towers()

    def read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        per_layer_inputs: Tensor | None,
        token_type_ids: Tensor | None = None,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None]:
        embeds, per_layer, _, _ = self.model.merge(
            input_ids, inputs_embeds=inputs_embeds, per_layer_inputs=per_layer_inputs, **media
        )
        return embeds, per_layer

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Any = None,
        input_features_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_positions_only: bool = False,
    ) -> Gemma3nCausalLMOutputWithPast | tuple[Any, ...]:
        """Scores of the next tokens, and the loss against `labels`.

        Args:
            labels, logits_to_keep, num_items_in_batch, loss_positions_only: As in `Gemma3nForCausalLM.forward`.

        The other arguments, and what is raised, are those of `Gemma3nModel.forward`.

        Returns:
            logits (rows, kept, vocabulary) float32 and what was asked for besides.
        """
        read = positions_read(logits_to_keep, labels, loss_positions_only)
        decoded = self.model(
            input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            attention_mask=attention_mask,
            input_features_mask=input_features_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            last_positions=read,
        )
        fields = self.score(decoded, labels, logits_to_keep, num_items_in_batch, read)
        output = Gemma3nCausalLMOutputWithPast(**fields)
        return output.to_tuple() if return_dict is False else output
