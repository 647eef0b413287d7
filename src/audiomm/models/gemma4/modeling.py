"""Gemma 4 with eyes and ears: towers, embedders and the text stack; and the same with a head.

Argument and output names are those of transformers; weight names are the checkpoint's. The features of pictures,
videos and clips replace the embeddings of their marks, in order, counted row by row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base.config import PreTrainedConfig
from ...base.errors import InputError, ShapeError
from ...generation import GenerationConfig
from ...layers.cache import Cache
from ...layers.embedding import check_token_ids
from ...layers.merge import place_features, refuse_empty_places
from .audio import Gemma4AudioModel, Gemma4AudioModelOutput
from .config import Gemma4Config
from .heads import Gemma4CausalLMOutput, Gemma4WithTokenHead, Prompt, kept_columns
from .media import (
    ARGUMENTS,
    IMAGE_TYPE,
    VIDEO_TYPE,
    Gemma4FeatureOutput,
    Gemma4ModelOutput,
    Gemma4MultimodalEmbedder,
    Media,
    feature_items,
    hidden_features,
    picture_places,
)
from .text import Gemma4PreTrainedModel, Gemma4TextModel
from .vision import Gemma4VisionModel
from .weights import UNUSED, WHOLE_NAMES


class Gemma4Model(Gemma4PreTrainedModel):
    """Towers, embedders and text stack, without a head."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4Config
    config: Gemma4Config
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, r"lm_head\.")
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = WHOLE_NAMES

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__(config)
        self.language_model = Gemma4TextModel(config.text_config)
        self.add_media_parts(config)
        self.post_init()

    def add_media_parts(self, config: Gemma4Config) -> None:
        """The towers and embedders of the media that this model takes."""
        width = config.text_config.hidden_size
        if config.vision_config is not None:
            self.vision_tower = Gemma4VisionModel(config.vision_config)
            self.embed_vision: nn.Module = Gemma4MultimodalEmbedder(
                config.vision_config.hidden_size, width, config.vision_config.rms_norm_eps
            )
        if config.audio_config is not None:
            self.audio_tower = Gemma4AudioModel(config.audio_config)
            self.embed_audio = Gemma4MultimodalEmbedder(
                config.audio_config.output_proj_dims, width, config.audio_config.rms_norm_eps
            )

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        for name in ("vision_tower", "audio_tower"):
            tower = getattr(self, name, None)
            if tower is not None and any(module is part for part in tower.modules()):
                tower.init_module(module)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_per_layer_input_embeddings(self) -> nn.Module:
        """The table of per-layer embeddings."""
        return self.language_model.embed_tokens_per_layer

    # ------------------------------------------------------------------ features

    def get_image_features(
        self, pixel_values: Tensor, image_position_ids: Tensor | None = None, **flags: Any
    ) -> Gemma4FeatureOutput:
        """Features of images.

        Args:
            pixel_values: (images, patches, patch values), padded patches included.
            image_position_ids: (images, patches, 2) column and row of each patch, -1 for padding.

        Returns:
            pooler_output: one (tokens, width) tensor an image.
        """
        self.require("vision_tower", "image")
        if image_position_ids is None:
            raise InputError("image_position_ids were not passed: the processor makes them together with pixel_values.")
        flags.pop("return_dict", None)
        tower = self.vision_tower(pixel_values, image_position_ids, **flags)
        pooled = self.config.vision_config.pooling_kernel_size**2
        lengths = ((image_position_ids >= 0).all(dim=-1).sum(dim=-1) // pooled).tolist()
        features = self.embed_vision(tower.last_hidden_state)
        return Gemma4FeatureOutput(
            tower.last_hidden_state, features.split(lengths), tower.get("hidden_states"), tower.get("attentions")
        )

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        **flags: Any,
    ) -> Gemma4FeatureOutput:
        """Features of videos, frame after frame.

        Args:
            pixel_values_videos: (frames of all videos, patches, patch values).
            video_position_ids: (frames, patches, 2).
            num_frames_per_video: (videos,).

        Returns:
            pooler_output: one (tokens, width) tensor a video.
        """
        if num_frames_per_video is None:
            raise InputError(
                "num_frames_per_video was not passed: it tells which frames of pixel_values_videos belong to one "
                "video; the video processor returns it."
            )
        output = self.get_image_features(pixel_values_videos, video_position_ids, **flags)
        frames = output.pooler_output or ()
        counts = torch.as_tensor(num_frames_per_video).tolist()
        if sum(counts) != len(frames):
            raise ShapeError(
                f"num_frames_per_video={counts} counts {sum(counts)} frames, but pixel_values_videos holds "
                f"{len(frames)}: they must agree."
            )
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        output.pooler_output = tuple(
            torch.cat(frames[end - count : end]) for count, end in zip(counts, ends, strict=True) if count
        )
        return output

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, **flags: Any
    ) -> Gemma4AudioModelOutput:
        """Features of clips.

        Args:
            input_features: (clips, frames, mel bands).
            input_features_mask: (clips, frames), True where a frame is real; None: all are.

        Returns:
            pooler_output (clips, tokens, width) and attention_mask (clips, tokens), True where a token is real.
        """
        self.require("audio_tower", "audio")
        flags.pop("return_dict", None)
        output: Gemma4AudioModelOutput = self.audio_tower(input_features, input_features_mask, **flags)
        output.pooler_output = self.embed_audio(output.last_hidden_state)
        return output

    def require(self, part: str, kind: str) -> None:
        """Raise InputError unless this model has the part that reads this kind of media."""
        if not hasattr(self, part):
            config = "audio_config" if kind == "audio" else "vision_config"
            raise InputError(
                f"{ARGUMENTS[kind]} was passed, but this model takes no {kind}: its {config} is null. Leave it out, or "
                "load a checkpoint that has one."
            )

    # ------------------------------------------------------------------ media among the tokens

    def get_placeholder_mask(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens stand for images, videos and clips, each (rows, tokens) bool; by ids, or by their embeddings."""
        ids = (self.config.image_token_id, self.config.video_token_id, self.config.audio_token_id)
        if input_ids is not None:
            return input_ids == ids[0], input_ids == ids[1], input_ids == ids[2]
        if inputs_embeds is None:
            raise ShapeError("pass input_ids or inputs_embeds; both are None.")
        table = self.get_input_embeddings()
        marks = table(torch.tensor(ids, device=inputs_embeds.device))
        return tuple((inputs_embeds == mark).all(dim=-1) for mark in marks)

    def text_ids(self, input_ids: Tensor) -> Tensor:
        """Ids with the marks of media turned into padding, as the text stack looks them up."""
        image, video, audio = self.get_placeholder_mask(input_ids)
        return input_ids.masked_fill(image | video | audio, self.config.text_config.pad_token_id or 0)

    def features(self, media: Media) -> dict[str, list[Tensor]]:
        """{kind: one (tokens, width) tensor an item} of what was passed, encoded unless that was done before."""
        encoded = dict(media.encoded or {})
        for kind, argument in ARGUMENTS.items():
            if encoded.get(kind) is not None and getattr(media, argument) is not None:
                raise InputError(f"{argument} and mm_encoder_outputs[{kind!r}] were both passed: pass one of the two.")
        if media.pixel_values is not None:
            encoded["image"] = self.get_image_features(media.pixel_values, media.image_position_ids)
        if media.pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(
                media.pixel_values_videos, media.video_position_ids, media.num_frames_per_video
            )
        if media.input_features is not None:
            encoded["audio"] = self.get_audio_features(media.input_features, media.input_features_mask)
        return {kind: feature_items(output) for kind, output in encoded.items() if output is not None}

    def merge(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        per_layer_inputs: Tensor | None,
        mm_token_type_ids: Tensor | None,
        media: Media,
        *,
        must_be_complete: bool = True,
    ) -> tuple[Prompt, dict[str, list[Tensor]]]:
        """Put features in the places of their marks.

        Args:
            input_ids, inputs_embeds, per_layer_inputs, mm_token_type_ids: As in `forward`.
            media: What was passed besides.
            must_be_complete: Refuse marks for which nothing was passed.

        Returns:
            What enters the text stack, and the features by kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("the model needs either token ids or embeddings of them: pass exactly one of the two.")
        if input_ids is not None and per_layer_inputs is not None:
            raise ShapeError("per_layer_inputs go with inputs_embeds; with input_ids they are looked up: drop one.")
        if input_ids is not None:
            check_token_ids(input_ids, self.config.text_config.vocab_size)
        features = self.features(media)
        ids = None
        if input_ids is not None:
            ids = self.text_ids(input_ids)
            embeddings = self.get_input_embeddings()(ids)
        else:
            assert inputs_embeds is not None, "one of the two is there"
            embeddings = inputs_embeds
        if features or ids is not None:
            places = dict(zip(ARGUMENTS, self.get_placeholder_mask(input_ids, inputs_embeds), strict=True))
            for kind, argument in ARGUMENTS.items():
                if kind in features:
                    embeddings = place_features(embeddings, places[kind], features[kind], kind=kind)
                elif ids is not None and must_be_complete:
                    refuse_empty_places(places[kind], kind=kind, argument=argument)
            if mm_token_type_ids is None and ("image" in features or "video" in features):
                mm_token_type_ids = places["image"] * IMAGE_TYPE + places["video"] * VIDEO_TYPE
        has_table = bool(self.config.text_config.hidden_size_per_layer_input)
        sees_blocks = self.config.text_config.use_bidirectional_attention == "vision"
        blocks = None if not sees_blocks else picture_places(mm_token_type_ids, *embeddings.shape[:2])
        return Prompt(embeddings, ids if has_table else None, per_layer_inputs, blocks), features

    def _reach(self, embeddings: Tensor, features: dict[str, list[Tensor]]) -> Tensor:
        """The same embeddings; in distributed training they depend, times nothing, on towers that had nothing to do.

        Processes wait for the gradient of every weight, and a batch of text alone would let them wait for ever.
        """
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return embeddings
        idle = [] if {"image", "video"} & features.keys() else ["vision_tower", "embed_vision"]
        idle += [] if "audio" in features else ["audio_tower", "embed_audio"]
        for part in filter(None, (getattr(self, name, None) for name in idle)):
            for weight in part.parameters():
                embeddings = embeddings + 0.0 * weight.flatten()[0].to(embeddings)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Any = None,
        input_features_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_position_ids: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        kept: slice | Tensor | None = None,
        return_dict: bool | None = None,
        **flags: Any,
    ) -> Gemma4ModelOutput | tuple[Any, ...]:
        """Encode media, put their features among the tokens and run the text stack.

        Args:
            input_ids: (rows, new) token ids, with one mark for every feature; or inputs_embeds (rows, new, width).
            pixel_values, image_position_ids, pixel_values_videos, video_position_ids, num_frames_per_video,
                input_features, input_features_mask, mm_encoder_outputs: See `Media`.
            attention_mask, position_ids, past_key_values, per_layer_inputs, use_cache, kept: As in
                `Gemma4TextModel.forward`.
            mm_token_type_ids: (rows, new) or of those before, too: 0 text, 1 image, 2 video, 3 audio; None: as ids say.
            **flags: output_attentions, output_hidden_states, output_router_logits, return_shared_kv_states.

        Raises:
            PlaceholderError: Marks and features do not agree.
            InputError: A medium that this model does not take.
        """
        media = Media(
            pixel_values,
            pixel_values_videos,
            input_features,
            input_features_mask,
            image_position_ids,
            video_position_ids,
            num_frames_per_video,
            mm_encoder_outputs,
        )
        # A token that the model wrote itself may be a mark: what follows a prompt is not looked at.
        begins = past_key_values is None or past_key_values.length == 0
        prompt, features = self.merge(
            input_ids, inputs_embeds, per_layer_inputs, mm_token_type_ids, media, must_be_complete=begins
        )
        if prompt.ids is not None:
            prompt.per_layer = self.language_model.get_per_layer_inputs(prompt.ids)
        decoded = self.language_model(
            inputs_embeds=self._reach(prompt.embeddings, features),
            per_layer_inputs=prompt.per_layer,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            blocks=prompt.blocks,
            kept=kept,
            **flags,
        )
        fields: dict[str, Any] = {**dict(decoded.items()), **hidden_features(features)}
        output = Gemma4ModelOutput(**fields)
        return output.to_tuple() if return_dict is False else output


class Gemma4ForConditionalGeneration(Gemma4WithTokenHead):
    """Text, pictures, video and sound in; text out."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4Config
    config: Gemma4Config
    model_class: ClassVar[type[Gemma4Model]] = Gemma4Model
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = WHOLE_NAMES

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        self.model.init_module(module)

    def get_decoder(self) -> Gemma4TextModel:
        text: Gemma4TextModel = self.model.language_model
        return text

    def get_image_features(self, *args: Any, **kwargs: Any) -> Gemma4FeatureOutput:
        """See `Gemma4Model.get_image_features`."""
        output: Gemma4FeatureOutput = self.model.get_image_features(*args, **kwargs)
        return output

    def get_video_features(self, *args: Any, **kwargs: Any) -> Gemma4FeatureOutput:
        """See `Gemma4Model.get_video_features`."""
        output: Gemma4FeatureOutput = self.model.get_video_features(*args, **kwargs)
        return output

    def get_audio_features(self, *args: Any, **kwargs: Any) -> Gemma4AudioModelOutput:
        """See `Gemma4Model.get_audio_features`."""
        output: Gemma4AudioModelOutput = self.model.get_audio_features(*args, **kwargs)
        return output

    def prefill(
        self,
        input_ids: Tensor,
        cache: Cache,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int = 1,
        prefill_chunk_size: int | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **flags: Any,
    ) -> Gemma4CausalLMOutput:
        """Encode media and read the prompt; long ones in pieces that never cut a picture.

        Args:
            input_ids: (rows, prompt) token ids; (rows, 0) with inputs_embeds.
            cache: Empty; filled with the prompt.
            logits_to_keep: How many of the last positions to score.
            prefill_chunk_size: Read longer prompts in pieces of about so many tokens.

        The other arguments are those of `forward`.
        """
        media = Media(
            pixel_values,
            pixel_values_videos,
            input_features,
            input_features_mask,
            image_position_ids,
            video_position_ids,
            num_frames_per_video,
            mm_encoder_outputs,
        )
        ids = input_ids if inputs_embeds is None else None
        prompt, features = self.model.merge(ids, inputs_embeds, per_layer_inputs, mm_token_type_ids, media)
        output = self.read_prompt(prompt, cache, attention_mask, logits_to_keep, prefill_chunk_size, **flags)
        output.image_hidden_states, output.audio_hidden_states = hidden_features(features).values()
        return output

    def embed_drafted(self, input_ids: Tensor) -> Tensor:
        """(rows, 1, width) embeddings of drafted tokens (rows, 1), as the decoder reads them."""
        return super().embed_drafted(self.model.text_ids(input_ids))

    def step(self, input_ids: Tensor, cache: Cache, **flags: Any) -> Gemma4CausalLMOutput:
        """Decode steps: (rows, new) token ids to logits (rows, new, vocabulary)."""
        return super().step(self.model.text_ids(input_ids), cache, **flags)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Any = None,
        input_features_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        per_layer_inputs: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
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
            labels, logits_to_keep, num_items_in_batch, loss_positions_only: As in `Gemma4ForCausalLM.forward`.

        The other arguments are those of `Gemma4Model.forward`.
        """
        kept = kept_columns(logits_to_keep, labels, loss_positions_only)
        decoded = self.model(
            input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            attention_mask=attention_mask,
            input_features_mask=input_features_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_position_ids=image_position_ids,
            video_position_ids=video_position_ids,
            num_frames_per_video=num_frames_per_video,
            per_layer_inputs=per_layer_inputs,
            mm_encoder_outputs=mm_encoder_outputs,
            kept=kept,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_shared_kv_states=return_shared_kv_states,
        )
        output = self.with_loss(self.headed(decoded), labels, kept, num_items_in_batch)
        return output.to_tuple() if return_dict is False else output
