"""Whisper: an encoder of log-mel windows, a decoder of text, and the heads on them.

Argument and output names are those of transformers; weight names are the checkpoint's. Source: arXiv:2212.04356.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...base.errors import ShapeError
from ...base.modeling import PreTrainedModel
from ...base.outputs import BaseModelOutput, DecoderOutput, Seq2SeqModelOutput
from ...layers.cache import Cache, LayerSpec, PassThrough
from ...layers.embedding import empty_embedding, sinusoids
from ...layers.masks import attention_mask as build_mask
from ...layers.projection import Keeper
from ...layers.quantized import Int8Linear
from ...layers.regions import recorded
from .augment import spec_augment
from .config import WhisperConfig
from .encoder_quick import QuickEncoder
from .layers import WhisperDecoderLayer, WhisperEncoderLayer


class WhisperPreTrainedModel(PreTrainedModel):
    """What all Whisper models share."""

    config_class = WhisperConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_features"
    no_split_modules: ClassVar[tuple[str, ...]] = ("WhisperEncoderLayer", "WhisperDecoderLayer")
    quantized_linear: ClassVar[Any] = Int8Linear
    config: WhisperConfig

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        deviation = self.config.init_std
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.weight.normal_(std=deviation)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=deviation)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, WhisperEncoder):
            module.embed_positions.weight.copy_(sinusoids(*module.embed_positions.weight.shape))

    def cache_specs(self) -> list[LayerSpec]:
        """What each decoder layer keeps while generating."""
        config = self.config
        heads = config.decoder_attention_heads
        spec = LayerSpec(heads, config.d_model // heads, cross_length=config.max_source_positions)
        return [spec] * config.decoder_layers

    def make_cache(self, batch: int, *, max_length: int | None = None, fixed: bool = False) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        limit = self.config.max_target_positions
        length = min(max_length or limit, limit)
        quick = self.quick_step()
        cache = Cache(
            self.cache_specs(),
            rows=batch,
            length=length,
            fixed=fixed,
            device=self.device,
            dtype=self.dtype,
            for_products=quick is not None and quick.attends_by_products,
        )
        cache.cross_dtype = None if quick is None else quick.cross_dtype
        return cache

    def quick_step(self) -> Any:
        """The quick twin of a decode step, where a model has one."""
        return None


class WhisperEncoder(WhisperPreTrainedModel):
    """Two convolutions, fixed sinusoidal positions and a stack of layers: one window of log-mel frames in."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = empty_embedding(config.max_source_positions, config.d_model)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList([WhisperEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self._quick: Keeper[QuickEncoder] = Keeper()
        self.post_init()

    def freeze(self) -> None:
        """Keep the weights from being trained."""
        self.requires_grad_(False)

    _freeze_parameters = freeze

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode log-mel windows.

        Args:
            input_features: (batch, num_mel_bins, 2 * max_source_positions), cast to the type of the weights.
            attention_mask: Accepted and unused: Whisper attends to the padding of a window, as it was trained to.
            head_mask: (encoder_layers, heads) factors on the attention of each head.

        Raises:
            ShapeError: The features have another number of mel bins or frames.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self._check(input_features)
        features = input_features.to(self.conv1.weight.dtype)
        if not (output_attentions or output_hidden_states or head_mask is not None):
            quick = self._quick_encoder(features)
            if quick is not None:
                output = BaseModelOutput(last_hidden_state=quick(features))
                return output.to_tuple() if return_dict is False else output
            made = recorded(self, ("last_hidden_state",), features)
            if made is not None:
                output = BaseModelOutput(last_hidden_state=made[0])
                return output.to_tuple() if return_dict is False else output
        hidden = functional.gelu(self.conv2(functional.gelu(self.conv1(features)))).transpose(1, 2)
        hidden = functional.dropout(hidden + self.embed_positions.weight, config.dropout, self.training)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            states.append(hidden)
            if self.training and config.encoder_layerdrop and float(torch.rand(())) < config.encoder_layerdrop:
                continue
            layer_mask = None if head_mask is None else head_mask[index]
            if self.gradient_checkpointing and self.training:
                hidden, weight = checkpoint(layer, hidden, layer_mask, output_attentions, use_reentrant=False)
            else:
                hidden, weight = layer(hidden, layer_mask, output_attentions)
            if weight is not None:
                weights.append(weight)
        hidden = self.layer_norm(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _quick_encoder(self, features: Tensor) -> QuickEncoder | None:
        """What runs the encoder straight on the CPU; None where layers must be walked through."""
        if self.training or features.device.type != "cpu" or self.config.attn_implementation == "eager":
            return None
        # Not for tensors that only trace, and not where a gradient may be asked for.
        if type(features) is not Tensor or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and (features.requires_grad or any(p.requires_grad for p in self.parameters())):
            return None
        return self._quick.get(self, lambda: QuickEncoder.of(self))

    def _check(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise ShapeError(not_features(features))
        expected = (self.config.num_mel_bins, self.config.window_frames)
        if features.dim() != 3 or tuple(features.shape[1:]) != expected:
            raise ShapeError(
                f"input_features is of shape {tuple(features.shape)}; (batch, {expected[0]}, {expected[1]}) is needed: "
                f"{expected[0]} mel bins and {expected[1]} frames, one whole window. WhisperFeatureExtractor pads "
                "shorter audio to it; generate() takes longer audio."
            )


def not_features(value: Any) -> str:
    """What is wrong with features that are no tensor."""
    return (
        f"input_features is a {type(value).__name__}: a tensor is needed, as the processor gives it for audio with "
        "return_tensors='pt'; its answer is passed as model(**answer) or model.generate(**answer)."
    )


class WhisperDecoder(WhisperPreTrainedModel):
    """Token and learned position embeddings and a stack of layers that read the encoder's output."""

    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        padding = padding if padding is not None and padding < config.vocab_size else None
        self.embed_tokens = empty_embedding(config.vocab_size, config.d_model, padding)
        self.embed_positions = empty_embedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        past_key_values: Cache | PassThrough | tuple[Any, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DecoderOutput | tuple[Any, ...]:
        """Decode tokens that follow those in the cache.

        Args:
            input_ids: (rows, new) token ids; or inputs_embeds (rows, new, d_model).
            attention_mask: (rows, past + new), 0 for padding; None when there is none.
            encoder_hidden_states: (audios, positions, d_model); rows may be a multiple of audios.
            head_mask, cross_attn_head_mask: (decoder_layers, heads) factors on the attention of each head.
            past_key_values: A Cache, or the tuples of four tensors a layer of older programs.
            position_ids: (rows, new); follows from the mask and the cache when None.
            use_cache: Keep keys and values for a next call; config.use_cache when None.

        Raises:
            ShapeError: More tokens than max_target_positions, or both or none of input_ids and inputs_embeds.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("the decoder needs either token ids or embeddings of them: pass exactly one of the two.")
        hidden = self.embed_tokens(input_ids) * self.embed_scale if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, config.use_cache if use_cache is None else use_cache)
        rows, count = hidden.shape[:2]
        slots = cache.reserve(count, _positions(attention_mask, count), rows, hidden.device)
        mask = build_mask(count, slots.queries, slots.keys, past=slots.past)
        hidden = hidden + self._embed_positions(slots.past, count, slots.queries, position_ids)
        hidden = functional.dropout(hidden, config.dropout, self.training)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        cross_weights: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            states.append(hidden)
            if self.training and config.decoder_layerdrop and float(torch.rand(())) < config.decoder_layerdrop:
                continue
            arguments = (
                index,
                cache,
                mask,
                encoder_hidden_states,
                None if head_mask is None else head_mask[index],
                None if cross_attn_head_mask is None else cross_attn_head_mask[index],
                output_attentions,
            )
            if self.gradient_checkpointing and self.training:
                hidden, weight, cross_weight = checkpoint(layer, hidden, *arguments, use_reentrant=False)
            else:
                hidden, weight, cross_weight = layer(hidden, *arguments)
            if weight is not None:
                weights.append(weight)
            if cross_weight is not None:
                cross_weights.append(cross_weight)
        hidden = self.layer_norm(hidden)
        output = DecoderOutput(
            last_hidden_state=hidden,
            past_key_values=cache if isinstance(cache, Cache) else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
            cross_attentions=tuple(cross_weights) if output_attentions and cross_weights else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _cache(self, past: Cache | PassThrough | tuple[Any, ...] | None, use_cache: bool) -> Cache | PassThrough:
        if isinstance(past, (Cache, PassThrough)):  # a union of types cannot be compiled before torch 2.7
            return past
        if past is not None:
            return Cache.from_legacy_cache(self.cache_specs(), past)
        # Recomputing a layer in the backward pass would store its keys twice.
        wanted = use_cache and not (self.gradient_checkpointing and self.training)
        return Cache(self.cache_specs()) if wanted else PassThrough()

    def _embed_positions(self, past: int, count: int, positions: Tensor | None, position_ids: Tensor | None) -> Tensor:
        table = self.embed_positions.weight
        if position_ids is not None:
            return functional.embedding(position_ids, table)
        if positions is not None:
            return functional.embedding(positions.clamp(min=0), table)
        if past + count > len(table):
            raise ShapeError(
                f"{past + count} tokens were given to a decoder of max_target_positions={len(table)}: shorten the "
                "prompt or lower max_new_tokens."
            )
        return table[past : past + count]


def _positions(mask: Tensor | None, count: int) -> Tensor | None:
    """(rows, count) positions of the newest tokens of a padding mask (rows, total), -1 where it is 0."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ShapeError(f"the decoder's attention mask is of shape {tuple(mask.shape)}; (rows, tokens) is needed.")
    if mask.shape[1] < count:
        raise ShapeError(
            f"the decoder's attention mask is of shape {tuple(mask.shape)}, but there are {count} tokens: one entry is "
            "needed for each, and for those in the cache."
        )
    real = mask.bool()
    positions = (real.long().cumsum(dim=1) - 1).masked_fill(~real, -1)
    return positions[:, -count:]


class WhisperModel(WhisperPreTrainedModel):
    """Encoder and decoder, without a head."""

    ignored_weights: ClassVar[tuple[str, ...]] = (r"proj_out\.",)

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder(config)
        self.decoder = WhisperDecoder(config)

    def get_encoder(self) -> WhisperEncoder:
        return self.encoder

    def get_decoder(self) -> WhisperDecoder:
        return self.decoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed_tokens = value

    def freeze_encoder(self) -> None:
        """Keep the encoder's weights from being trained."""
        self.encoder.freeze()

    def encode(
        self,
        input_features: Tensor | None,
        encoder_outputs: Any,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        **flags: bool | None,
    ) -> BaseModelOutput:
        """The encoder's output: computed, or taken from what was passed as `encoder_outputs`."""
        if encoder_outputs is None:
            if input_features is None:
                raise ShapeError("pass input_features (batch, mel bins, frames) or encoder_outputs; both are None.")
            features = self._augment(input_features, attention_mask)
            output = self.encoder(features, head_mask=head_mask, **flags)
            assert isinstance(output, BaseModelOutput), "the encoder was asked for a dataclass"
            return output
        output = as_encoder_output(encoder_outputs)
        states = output.last_hidden_state
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[2] != self.config.d_model:
            shape = tuple(getattr(states, "shape", ()))
            raise ShapeError(
                f"encoder_outputs are of shape {shape}; (batch, positions, d_model={self.config.d_model}) is needed: "
                "are they another model's?"
            )
        return output

    def _augment(self, features: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        if not (self.training and config.apply_spec_augment):
            return features
        return spec_augment(
            features,
            time_probability=config.mask_time_prob,
            time_length=config.mask_time_length,
            time_minimum=config.mask_time_min_masks,
            bin_probability=config.mask_feature_prob,
            bin_length=config.mask_feature_length,
            bin_minimum=config.mask_feature_min_masks,
            frame_counts=None if mask is None else mask.sum(dim=1),
        )

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        decoder_inputs_embeds: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput | tuple[Any, ...]:
        """Encode windows and decode tokens.

        Args:
            input_features: (batch, num_mel_bins, 2 * max_source_positions) log-mel windows.
            attention_mask: (batch, frames); bounds SpecAugment in training, otherwise unused.
            decoder_input_ids: (rows, tokens); or decoder_inputs_embeds (rows, tokens, d_model).
            decoder_attention_mask: (rows, past + tokens), 0 for padding.
            head_mask: (encoder_layers, heads); decoder_head_mask, cross_attn_head_mask: (decoder_layers, heads).
            encoder_outputs: What the encoder returned before, instead of input_features.
            past_key_values: The cache of an earlier call.
            decoder_position_ids: (rows, tokens).
        """
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        encoded = self.encode(input_features, encoder_outputs, attention_mask, head_mask, **flags)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoded.last_hidden_state,
            head_mask=decoder_head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            position_ids=decoder_position_ids,
            use_cache=use_cache,
            **flags,
        )
        output = Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output


def as_encoder_output(given: Any) -> BaseModelOutput:
    """An encoder's output from any of the forms callers hold it in: dataclass, tensor, tuple or list."""
    if isinstance(given, BaseModelOutput):
        return given
    if isinstance(given, Tensor):
        return BaseModelOutput(last_hidden_state=given)
    if isinstance(given, tuple | list) and given:
        return BaseModelOutput(*given[:3])
    raise ShapeError(
        f"encoder_outputs is a {type(given).__name__}; accepted are what the encoder returns, its last hidden state "
        "(batch, positions, d_model), or a tuple that starts with it."
    )
