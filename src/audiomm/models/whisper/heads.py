"""Whisper with a head: speech to text, the decoder alone as a draft model, and audio classification."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.errors import ShapeError
from ...base.outputs import CausalLMOutput, ModelOutput, Seq2SeqLMOutput, SequenceClassifierOutput
from ...generation import GenerationConfig, GenerationMixin
from ...layers.cache import Cache
from ...layers.embedding import check_token_ids
from ...layers.quick import WithQuickStep
from ...layers.regions import recorder
from .config import WhisperConfig
from .modeling import WhisperDecoder, WhisperEncoder, WhisperModel, WhisperPreTrainedModel, as_encoder_output
from .step import WhisperStep

#: Label that the loss leaves out.
IGNORED_LABEL = -100


class WhisperWithTokenHead(WithQuickStep, WhisperPreTrainedModel):
    """A model whose tied head turns the decoder's states into scores of tokens."""

    tied_weights: ClassVar[dict[str, str]] = {"proj_out.weight": "model.decoder.embed_tokens.weight"}

    model: Any
    proj_out: nn.Linear

    def make_quick_step(self) -> WhisperStep:
        return WhisperStep.of(self)

    def get_input_embeddings(self) -> nn.Embedding:
        table: nn.Embedding = self.model.decoder.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.decoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.proj_out

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.proj_out = value

    def get_decoder(self) -> WhisperDecoder:
        decoder: WhisperDecoder = self.model.decoder
        return decoder

    def step(self, input_ids: Tensor, cache: Cache, **flags: bool) -> ModelOutput:
        """One decode step: (rows, 1) token ids to logits (rows, 1, vocabulary)."""
        return self._head(self.model.decoder(input_ids, past_key_values=cache, **flags))

    def _decode_prompt(
        self, input_ids: Tensor, cache: Cache, mask: Tensor | None, encoded: Tensor | None, keep: int, **flags: bool
    ) -> ModelOutput:
        record = recorder()
        # Asked for here: torch before 2.7 cannot compile how it is found.
        quick = self.quick_step()
        if record is None or any(flags.values()):
            return self._read_prompt(quick, input_ids, cache, mask, encoded, keep, **flags)

        def read(ids: Tensor, mask: Tensor | None, encoded: Tensor | None) -> tuple[Tensor, ...]:
            return (self._read_prompt(quick, ids, cache, mask, encoded, keep)["logits"],)

        (logits,) = record(self, ("prompt", keep), read, input_ids, mask, encoded, cache=cache)
        return Seq2SeqLMOutput(logits=logits, past_key_values=cache)

    def _read_prompt(
        self, quick: Any, input_ids: Tensor, cache: Cache, mask: Tensor | None, encoded: Tensor | None, keep: int,
        **flags: bool,
    ) -> ModelOutput:  # fmt: skip
        if encoded is not None and quick is not None and cache.cross(0) is None and not torch.is_grad_enabled():
            quick.hear(encoded, cache)
        decoded = self.model.decoder(
            input_ids, attention_mask=mask, encoder_hidden_states=encoded, past_key_values=cache, **flags
        )
        decoded.last_hidden_state = decoded.last_hidden_state[:, -keep:]
        return self._head(decoded)

    def _head(self, decoded: Any) -> ModelOutput:
        return Seq2SeqLMOutput(
            logits=self.proj_out(decoded.last_hidden_state),
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )


class WhisperSeq2Seq(WhisperWithTokenHead):
    """Encoder, decoder and head; `generation.py` adds how it transcribes."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.model = WhisperModel(config)
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self) -> WhisperEncoder:
        encoder: WhisperEncoder = self.model.encoder
        return encoder

    def freeze_encoder(self) -> None:
        """Keep the encoder's weights from being trained."""
        self.model.freeze_encoder()

    def prefill(
        self,
        input_ids: Tensor,
        cache: Cache,
        *,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        logits_to_keep: int = 1,
        **flags: bool,
    ) -> ModelOutput:
        """Encode the audio and decode the prompt.

        Args:
            input_ids: (rows, prompt) token ids.
            cache: Empty; filled with the prompt and the encoder's keys and values.
            attention_mask: (rows, prompt), 0 for padding at the left.
            input_features: (batch, mel bins, frames) windows; or encoder_outputs.
            logits_to_keep: How many of the last positions to score.

        Returns:
            logits (rows, logits_to_keep, vocabulary).
        """
        encoded = self.model.encode(input_features, encoder_outputs, **flags).last_hidden_state
        return self._decode_prompt(input_ids, cache, attention_mask, encoded, logits_to_keep, **flags)

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Scores of the next tokens, and the loss against `labels`.

        Args:
            labels: (batch, tokens) with -100 where no loss is wanted; without decoder_input_ids the decoder reads
                the labels moved one to the right behind the start token.

        The other arguments are those of `WhisperModel.forward`.

        Raises:
            ShapeError: More labels than max_target_positions.
            InputError: Labels or ids that are none of this model; on a GPU they are not read, which would hold it up.
        """
        if labels is not None:
            check_token_ids(labels, self.config.vocab_size, "labels", ignored=IGNORED_LABEL, wait=False)
            if labels.shape[1] > self.config.max_target_positions:
                raise ShapeError(
                    f"labels are {labels.shape[1]} tokens long; at most max_target_positions="
                    f"{self.config.max_target_positions} fit."
                )
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif decoder_input_ids is not None:
            check_token_ids(decoder_input_ids, self.config.vocab_size, "decoder_input_ids", wait=False)
        decoded = self.model(
            input_features=input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            head_mask=head_mask,
            decoder_head_mask=decoder_head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.proj_out(decoded.last_hidden_state)
        fields = dict(decoded.items())
        fields.pop("last_hidden_state")
        output = Seq2SeqLMOutput(loss=token_loss(logits, labels), logits=logits, **fields)
        return output.to_tuple() if return_dict is False else output

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict `labels`: the start token, then the labels, -100 turned into padding."""
        config = self.config
        shifted = torch.empty_like(labels)
        shifted[:, 1:] = labels[:, :-1]
        shifted[:, 0] = torch.tensor(config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORED_LABEL, config.pad_token_id or 0)


def token_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross-entropy of (batch, tokens, vocabulary) logits over all labels that are not -100."""
    if labels is None:
        return None
    return functional.cross_entropy(
        logits.flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=IGNORED_LABEL
    )


class WhisperDecoderWrapper(WhisperPreTrainedModel):
    """Holds the decoder under the name it has in a checkpoint of the whole model."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.decoder = WhisperDecoder(config)


class WhisperForCausalLM(GenerationMixin, WhisperWithTokenHead):
    """The decoder and its head alone, reading encoder states made by another model: a draft model for speculation."""

    main_input_name: ClassVar[str] = "input_ids"
    ignored_weights: ClassVar[tuple[str, ...]] = (r"model\.encoder\.", r"encoder\.")

    def __init__(self, config: WhisperConfig) -> None:
        config = config.copy()
        config.is_encoder_decoder = False
        super().__init__(config)
        self.model = WhisperDecoderWrapper(config)
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    def prefill(
        self,
        input_ids: Tensor,
        cache: Cache,
        *,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        logits_to_keep: int = 1,
        **flags: bool,
    ) -> ModelOutput:
        """Decode the prompt, reading `encoder_outputs`; see `WhisperSeq2Seq.prefill`."""
        encoded = None if encoder_outputs is None else as_encoder_output(encoder_outputs).last_hidden_state
        return self._decode_prompt(input_ids, cache, attention_mask, encoded, logits_to_keep, **flags)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Scores of the next tokens.

        Args:
            input_ids: (rows, tokens).
            encoder_outputs: The encoder's last hidden state (batch, positions, d_model), or what the encoder returned.
            labels: (rows, tokens), compared with the scores at the same place: not shifted.
        """
        decoded = self.model.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=None if encoder_outputs is None else as_encoder_output(encoder_outputs)[0],
            head_mask=head_mask,
            cross_attn_head_mask=cross_attn_head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.proj_out(decoded.last_hidden_state)
        output = CausalLMOutput(
            loss=token_loss(logits, labels),
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
        )
        return output.to_tuple() if return_dict is False else output


class WhisperForAudioClassification(WhisperPreTrainedModel):
    """The encoder, a projection, the mean over time and a classifier."""

    new_weights: ClassVar[tuple[str, ...]] = ("projector.", "classifier.", "layer_weights")
    ignored_weights: ClassVar[tuple[str, ...]] = (r"(model\.)?decoder\.", r"proj_out\.")

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.ones(config.encoder_layers + 1) / (config.encoder_layers + 1))
        self.projector = nn.Linear(config.d_model, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if module is self and self.config.use_weighted_layer_sum:
            self.layer_weights.fill_(1 / len(self.layer_weights))

    def freeze_encoder(self) -> None:
        """Train the projection and the classifier only."""
        self.encoder.freeze()

    def forward(
        self,
        input_features: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Scores of the classes.

        Args:
            input_features: (batch, mel bins, frames) windows; or encoder_outputs, with hidden states where
                config.use_weighted_layer_sum needs them.
            labels: (batch,) class indices.

        Raises:
            ShapeError: Neither features nor encoder_outputs were given.
        """
        weighted = self.config.use_weighted_layer_sum
        if encoder_outputs is None:
            if input_features is None:
                raise ShapeError("pass input_features (batch, mel bins, frames) or encoder_outputs; both are None.")
            encoded = self.encoder(
                input_features,
                head_mask=head_mask,
                output_attentions=output_attentions,
                output_hidden_states=True if weighted else output_hidden_states,
            )
        else:
            encoded = as_encoder_output(encoder_outputs)
        if weighted:
            if encoded.hidden_states is None:
                raise ShapeError("use_weighted_layer_sum needs encoder_outputs with hidden states of every layer.")
            shares = functional.softmax(self.layer_weights, dim=-1)
            hidden = torch.einsum("l,lbtd->btd", shares, torch.stack(encoded.hidden_states))
        else:
            hidden = encoded.last_hidden_state
        logits = self.classifier(self.projector(hidden).mean(dim=1))
        loss = None if labels is None else functional.cross_entropy(logits, labels.to(logits.device).flatten())
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output.to_tuple() if return_dict is False else output
