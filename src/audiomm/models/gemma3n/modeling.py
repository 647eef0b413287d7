"""Gemma 3n with its towers: text, pictures and sound in, states out; `conditional` adds the head.

Argument and output names are those of transformers; weight names are the checkpoint's. Towers run when a prompt is
read, never while tokens are made. Source: the model card of Gemma 3n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.errors import AudioLimitError, InputError, ShapeError
from ...base.outputs import BaseModelOutput, DecoderOutput
from ...layers.cache import Cache
from ...layers.embedding import check_token_ids
from ...layers.merge import place_features, refuse_empty_places
from .audio import Gemma3nAudioEncoder
from .config import Gemma3nConfig
from .embedder import Gemma3nMultimodalEmbedder
from .text import Gemma3nPreTrainedModel, Gemma3nTextModel
from .vision import Gemma3nVisionModel
from .weights import AUDIO, UNUSED, VISION, WHOLE_NAMES


@dataclass
class MediaFeatures(BaseModelOutput):
    """A tower's answer, and its projection into the space of the text.

    Attributes:
        pooler_output: (items, tokens, hidden_size).
        audio_mel_mask: (clips, tokens) bool, True where a clip is padding.
    """

    pooler_output: Tensor | None = None
    audio_mel_mask: Tensor | None = None


@dataclass
class Gemma3nModelOutputWithPast(DecoderOutput):
    """The decoder's answer, and what stood on the places of pictures and clips, (items, tokens, hidden_size)."""

    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None


class Gemma3nModel(Gemma3nPreTrainedModel):
    """Towers, embedders and text decoder, without a head."""

    config_class = Gemma3nConfig
    config: Gemma3nConfig
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, r"lm_head\.")
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = WHOLE_NAMES

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__(config)
        width, vision, audio = config.text_config.hidden_size, config.vision_config, config.audio_config
        self.vision_tower = None if vision is None else Gemma3nVisionModel(vision)
        self.language_model = Gemma3nTextModel(config.text_config)
        self.audio_tower = None if audio is None else Gemma3nAudioEncoder(audio)
        self.embed_vision = None if vision is None else _embedder(vision, width, vision.hidden_size**0.5)
        self.embed_audio = None if audio is None else _embedder(audio, width)
        self.ignored_weights = (*type(self).ignored_weights, *absent_parts(config))  # type: ignore[misc]
        # What `_rows` found, and which state of the weights it was found for.
        self._kept_rows: tuple[list[tuple[int, int, int]], list[nn.Parameter], Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> Gemma3nTextModel:
        return self.language_model

    def get_per_layer_input_embeddings(self) -> nn.Module:
        """The table of per-layer embeddings."""
        return self.language_model.embed_tokens_per_layer

    def freeze_towers(self) -> None:
        """Keep the weights of both towers from being trained; their embedders still are."""
        for tower in (self.vision_tower, self.audio_tower):
            if tower is not None:
                tower.requires_grad_(False)

    # ------------------------------------------------------------------ media

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MediaFeatures:
        """What goes on the places of pictures.

        Args:
            pixel_values: (images, 3, height, width).

        Returns:
            pooler_output (images, vision_soft_tokens_per_image, hidden_size of the text).
        """
        places = self.config.image_tokens()
        if self.vision_tower is None or self.embed_vision is None:
            raise _without("pixel_values", "image")
        seen = self.vision_tower(pixel_values=pixel_values, do_pooling=False).last_hidden_state
        tokens = seen.flatten(2)
        if tokens.shape[2] != places:
            raise ShapeError(
                f"the vision encoder gives {tokens.shape[2]} tokens a picture, but vision_soft_tokens_per_image="
                f"{places}: set it, or msfa_output_resolution in model_args, so that they agree."
            )
        embedded = self.embed_vision(inputs_embeds=tokens.transpose(1, 2))
        return MediaFeatures(last_hidden_state=seen, pooler_output=embedded)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **kwargs: Any) -> MediaFeatures:
        """The audio encoder's tokens in the space of the text.

        Args:
            input_features: (clips, frames, mels) log-mel.
            input_features_mask: (clips, frames), True where a frame is PADDING: the opposite of what `forward` takes.

        Returns:
            pooler_output (clips, tokens, hidden_size of the text), and audio_mel_mask, True where that is padding.
        """
        if self.audio_tower is None or self.embed_audio is None:
            raise _without("input_features", "audio")
        heard = self.audio_tower(input_features, input_features_mask.bool())
        embedded = self.embed_audio(inputs_embeds=heard.last_hidden_state)
        return MediaFeatures(
            last_hidden_state=heard.last_hidden_state, pooler_output=embedded, audio_mel_mask=heard.audio_mel_mask
        )

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where pictures and clips go, each (rows, length, 1) bool; features are accepted and not looked at."""
        ids = (self.config.image_token_id, self.config.audio_token_id)
        image, audio = (self._places(input_ids, inputs_embeds, token)[..., None] for token in ids)
        return image, audio

    def _places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token: int | None) -> Tensor:
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None, "one of the two was passed"
        wanted = torch.tensor(-1 if token is None else token, device=given.device)
        if input_ids is not None:
            return input_ids == wanted
        if token is None:
            return torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        return (given == self.get_input_embeddings()(wanted)).all(dim=-1)

    def _clip_tokens(self, input_features: Tensor | None, mask: Tensor | None, made: Any) -> Tensor:
        """(clips, places, width) the tokens of clips, filled up to the places that a clip always takes."""
        if self.embed_audio is None:
            raise _without("input_features", "audio")
        places = self.config.audio_tokens()
        if made is None:
            assert input_features is not None, "clips come as log-mel frames or as encoded"
            mask = self._check_frames(input_features, mask)
            made = self.get_audio_features(input_features, ~mask)
        filler = self._rows()[-1]
        tokens = torch.where(made.audio_mel_mask[..., None], filler, made.pooler_output)
        rest = places - tokens.shape[1]
        if rest < 0:
            return tokens[:, :places]  # padding only: `_check_frames` has seen to that
        return torch.cat((tokens, filler.expand(len(tokens), rest, -1)), dim=1)

    def _check_frames(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The mask (clips, frames) as booleans, True where a frame is sound.

        Raises:
            ShapeError: Features or mask are of another shape.
            AudioLimitError: A clip is longer than its places.
        """
        mels, most = self.config.audio_config.input_feat_size, self.config.max_audio_frames()
        if features.dim() != 3 or features.shape[2] != mels:
            raise ShapeError(
                f"input_features is of shape {tuple(features.shape)}; (clips, frames, {mels}) is needed, as "
                "Gemma3nAudioFeatureExtractor makes it."
            )
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if mask.shape != features.shape[:2]:
            raise ShapeError(
                f"input_features_mask is of shape {tuple(mask.shape)}; {tuple(features.shape[:2])} (clips, frames) is "
                "needed, as input_features has it."
            )
        mask = mask.bool()
        if features.shape[1] > most and bool(mask[:, most:].any()):
            clip = int(mask[:, most:].any(dim=1).int().argmax())
            raise AudioLimitError(
                f"clip {clip} has {int(mask[clip].sum())} log-mel frames; at most {most} fit the "
                f"{self.config.audio_tokens()} places of a clip (thirty seconds). Cut it into pieces: the speech "
                "recognition pipeline does so at pauses."
            )
        return mask

    # ------------------------------------------------------------------ text and media together

    def _embedders(self) -> list[Gemma3nMultimodalEmbedder]:
        return [embedder for embedder in (self.embed_vision, self.embed_audio) if embedder is not None]

    def _rows(self) -> Tensor:
        """(rows, width) embeddings of the token ids that stand for media, pictures' first; kept while weights stay."""
        embedders = self._embedders()
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([embedder.rows() for embedder in embedders])
        weights = [weight for embedder in embedders for weight in embedder.parameters()]
        state = [(id(weight), weight.data_ptr(), _age(weight)) for weight in weights]
        if self._kept_rows is None or self._kept_rows[0] != state:
            # The weights are kept too, so that nothing else can come to have their identity.
            self._kept_rows = state, weights, torch.cat([embedder.rows() for embedder in embedders])
        return self._kept_rows[2]

    def embed(self, input_ids: Tensor) -> Tensor:
        """(rows, length) token ids -> (rows, length, width); ids that stand for media have rows of their own."""
        check_token_ids(input_ids, self.language_model.embed_tokens.num_embeddings)
        text: Tensor = self.language_model.embed_tokens(input_ids)
        if not self._embedders():
            return text
        rows, first = self._rows(), 0
        index = torch.full_like(input_ids, -1)
        for embedder in self._embedders():
            own = input_ids - embedder.vocab_offset
            index = torch.where((own >= 0) & (own < embedder.vocab_size), own + first, index)
            first += embedder.vocab_size
        media = nn.functional.embedding(index.clamp(min=0), rows).to(text.dtype)
        return torch.where((index >= 0)[..., None], media, text)

    def media_rows(self) -> tuple[Tensor, Tensor] | None:
        """Each token id's row, (ids,), of a table (rows, width) beside that of text; 0 for text. None without media."""
        if not self._embedders():
            return None
        rows = self._rows()
        places = torch.zeros(self.language_model.embed_tokens.num_embeddings, dtype=torch.long, device=rows.device)
        first = 1
        for embedder in self._embedders():
            own = places[embedder.vocab_offset : embedder.vocab_offset + embedder.vocab_size]
            own.copy_(torch.arange(first, first + len(own), device=rows.device))
            first += embedder.vocab_size
        return places, torch.cat((torch.zeros_like(rows[:1]), rows))

    def merge(
        self,
        input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What the decoder is to read: embeddings with the media on their places, and the layers' own.

        Args:
            goes_on: The tokens follow others, among which the media may be: places without media are then fine.

        The other arguments, and what is raised, are those of `forward`.

        Returns:
            Embeddings (rows, new, width), the token part of the layers' embeddings or None, and the tokens of pictures
            and clips or None.
        """
        ready = dict(mm_encoder_outputs or {})
        self._check_inputs(input_ids, inputs_embeds, pixel_values, input_features, per_layer_inputs, ready)
        if inputs_embeds is None:
            assert input_ids is not None, "one of the two was passed"
            embeds, per_layer_inputs = self.embed(input_ids), self.language_model.get_per_layer_inputs(input_ids)
        else:
            embeds = inputs_embeds
        images = clips = None
        if pixel_values is not None or "image" in ready:
            made: Any = ready["image"] if pixel_values is None else self.get_image_features(pixel_values)
            images = made.pooler_output.to(embeds)
        if input_features is not None or "audio" in ready:
            clips = self._clip_tokens(input_features, input_features_mask, ready.get("audio")).to(embeds)
        embeds = self._place(None if goes_on and images is None and clips is None else input_ids, embeds, images, clips)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            embeds = embeds + self._no_gradient(image=images is None, audio=clips is None)
        return embeds, per_layer_inputs, images, clips

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Any = None,
        input_features_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        last_positions: int | Tensor = 0,
    ) -> Gemma3nModelOutputWithPast | tuple[Any, ...]:
        """Decode a prompt of text, pictures and sound, or tokens that follow those in the cache.

        Args:
            input_ids: (rows, new) token ids, with image_token_id and audio_token_id on the places of media.
            pixel_values: (images, 3, height, width), those of row 0 first.
            input_features: (clips, frames, mels) log-mel, those of row 0 first.
            input_features_mask: (clips, frames), True or 1 where a frame is sound; None is everywhere.
            token_type_ids: Accepted and unused, as processors make them.
            mm_encoder_outputs: {"image": what get_image_features gave, "audio": what get_audio_features gave}, instead
                of pixel_values and input_features: for a conversation that goes on about the same media.

        The other arguments are those of `Gemma3nTextModel.forward`.

        Raises:
            ShapeError: Both or none of input_ids and inputs_embeds, or shapes that do not fit.
            PlaceholderError: Places in the text and media passed do not agree.
            AudioLimitError: A clip is longer than its places.
        """
        embeds, per_layer_inputs, images, clips = self.merge(
            input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            mm_encoder_outputs=mm_encoder_outputs,
            goes_on=isinstance(past_key_values, Cache) and past_key_values.length > 0,
        )
        decoded = self.language_model(
            inputs_embeds=embeds,
            per_layer_inputs=per_layer_inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            last_positions=last_positions,
        )
        output = Gemma3nModelOutputWithPast(
            **dict(decoded.items()), image_hidden_states=images, audio_hidden_states=clips
        )
        return output.to_tuple() if return_dict is False else output

    def _place(self, input_ids: Tensor | None, embeds: Tensor, images: Tensor | None, clips: Tensor | None) -> Tensor:
        """`embeds` with the media on their places."""
        text = embeds
        for kind, token, features, argument in (
            ("image", self.config.image_token_id, images, "pixel_values"),
            ("audio", self.config.audio_token_id, clips, "input_features"),
        ):
            if features is not None:
                embeds = place_features(embeds, self._places(input_ids, text, token), features, kind=kind)
            elif input_ids is not None and not torch.compiler.is_compiling():
                refuse_empty_places(self._places(input_ids, None, token), kind=kind, argument=argument)
        return embeds

    def _no_gradient(self, *, image: bool, audio: bool) -> Tensor:
        """A zero that reaches every weight of the towers that a batch has nothing for.

        Processes that train together wait for the gradient of every weight of every one of them.
        """
        unused = [self.vision_tower, self.embed_vision] * image + [self.audio_tower, self.embed_audio] * audio
        weights = [
            weight for part in unused if part is not None for weight in part.parameters() if weight.requires_grad
        ]
        zeros = [0.0 * weight.flatten()[0] for weight in weights]
        return torch.stack(zeros).sum() if zeros else torch.zeros((), device=self.device, dtype=self.dtype)

    def _check_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        input_features: Tensor | None,
        per_layer_inputs: Tensor | None,
        ready: dict[str, Any],
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("the model needs either input_ids or inputs_embeds: pass exactly one of the two.")
        if input_ids is not None and per_layer_inputs is not None:
            raise ShapeError("per_layer_inputs follow from input_ids: pass them with inputs_embeds only.")
        for name, argument, value in (
            ("image", "pixel_values", pixel_values),
            ("audio", "input_features", input_features),
        ):
            if value is not None and name in ready:
                raise InputError(
                    f"{argument} and mm_encoder_outputs[{name!r}] are the same media twice: pass one of them."
                )
        unknown = sorted(set(ready) - {"image", "audio"})
        if unknown:
            raise InputError(f"mm_encoder_outputs has an entry {unknown[0]!r}: accepted are 'image' and 'audio'.")


def _embedder(config: Any, text_width: int, scale: float = 1.0) -> Gemma3nMultimodalEmbedder:
    return Gemma3nMultimodalEmbedder(
        config.vocab_offset, config.vocab_size, config.hidden_size, text_width, config.rms_norm_eps, scale
    )


def absent_parts(config: Gemma3nConfig) -> list[str]:
    """Patterns of the weights of towers that the model goes without."""
    return [pattern for pattern, part in ((VISION, config.vision_config), (AUDIO, config.audio_config)) if part is None]


def _without(argument: str, modality: str) -> InputError:
    return InputError(f"{argument} was passed to a model that was loaded without {modality!r}: add it to modalities.")


def _age(weight: Tensor) -> int:
    """How often a weight was written to; tensors of inference mode do not count and never change."""
    return 0 if weight.is_inference() else weight._version
