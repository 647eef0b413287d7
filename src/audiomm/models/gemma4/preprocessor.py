"""Gemma4CausalLMPreprocessor: prompts and responses to fixed-length training batches, with keras-hub's interface.

The arguments and the names of what comes out are those of keras_hub's class of that name, as PyTorch tensors. Counts
are those of the features: each picture, frame and clip gets the tokens it has, not a number fixed beforehand, and no
block of media is ever cut.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ...base.encoding import plain_list
from ...base.errors import ConfigError, InputError, PlaceholderError
from ...base.hub import Source, read_json
from ...base.presets import FromPreset
from ...feature_extraction.base import PROCESSOR_FILE
from ...feature_extraction.image import Gemma4UnifiedImageProcessor
from ...feature_extraction.placeholders import Rows, check_counts, expand, is_clip, is_image, is_video, marks
from ...feature_extraction.raw_frames import Gemma4UnifiedAudioFeatureExtractor
from .packing import clips_made_before, clips_of, indices_of, media_of, pictures_made_before, pictures_of, shares
from .processing import Gemma4Processor, Gemma4UnifiedProcessor, time_stamp
from .tokenizer import VIDEO_TOKEN, GemmaTokenizer

#: Tokens that the text of an answer is without.
_LEFT_OUT = ("bos", "eos", "pad", "image", "eoi", "video", "audio", "boa", "eoa")


@dataclass
class _Batch:
    """One batch on its way: rows of ids, and the media in reading order."""

    prompts: list[str]
    responses: list[str] | None
    is_batch: bool
    media: dict[str, Rows | None] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)


class Gemma4CausalLMPreprocessor(FromPreset):
    """Prompts, responses and media to (x, y, sample_weight), and to inputs of generation.

    Three modes, by the converters given: text only, text with pictures or videos, text with audio; all may be mixed.

    Args:
        tokenizer: A GemmaTokenizer.
        image_converter: A Gemma4ImageProcessor; None refuses pictures.
        audio_converter: A Gemma4AudioFeatureExtractor or Gemma4AudioConverter; None refuses audio.
        video_converter: A Gemma4VideoProcessor; None refuses videos.
        sequence_length: Tokens of a packed row.
        add_start_token: Begin rows with `<bos>`; a prompt that begins with it gets no second one.
        add_end_token: End rows with `<eos>`, which counts as part of the response.
        max_images_per_prompt: Most pictures of a prompt; None is any number.
        num_vision_tokens_per_image: Most tokens of a picture; what ready-made pixel_values are taken to have when
            their positions do not tell.
        max_audio_clips_per_prompt: Most clips of a prompt; None is any number.
        num_audio_tokens_per_clip: Most tokens of a clip.
        audio_input_feat_size: Mel bands of the empty audio entries when there is no audio.
        num_frames_per_video: Frames taken of each video.
        num_vision_tokens_per_frame: Tokens of a frame when a prompt is expanded without a video.
        video_fps: Frames a second of videos that do not tell.
        pad_images_to: Give every picture this many tokens, the rest of them empty, as keras-hub does (280).

    Attributes:
        video_metadata: A dict for each prompt, {"frames_indices": [...], "fps": ...}: which frames of their source the
            frames passed are. None numbers them 0, 1, 2, ...

    Raises:
        ConfigError: The limits leave no room for text.
    """

    families: ClassVar[tuple[str, ...]] = ("gemma4",)

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        image_converter: Any = None,
        audio_converter: Any = None,
        video_converter: Any = None,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        max_images_per_prompt: int | None = 2,
        num_vision_tokens_per_image: int = 280,
        max_audio_clips_per_prompt: int | None = 1,
        num_audio_tokens_per_clip: int = 750,
        audio_input_feat_size: int = 128,
        num_frames_per_video: int = 32,
        num_vision_tokens_per_frame: int = 70,
        video_fps: float = 24.0,
        pad_images_to: int | None = None,
    ) -> None:
        for name, value in (("sequence_length", sequence_length), ("num_frames_per_video", num_frames_per_video)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: a whole number above 0 is needed.")
        if not video_fps > 0:
            raise ConfigError(f"video_fps={video_fps!r}: a number above 0 is needed.")
        pictures = (max_images_per_prompt or 0) * num_vision_tokens_per_image
        if image_converter is not None and sequence_length <= pictures:
            raise ConfigError(
                f"sequence_length={sequence_length} is not more than max_images_per_prompt={max_images_per_prompt} x "
                f"num_vision_tokens_per_image={num_vision_tokens_per_image} = {pictures}: there is no room for text."
            )
        self.tokenizer = tokenizer
        self.image_converter = image_converter
        self.audio_converter = audio_converter
        self.video_converter = video_converter
        self.sequence_length = sequence_length
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token
        self.max_images_per_prompt = max_images_per_prompt
        self.num_vision_tokens_per_image = num_vision_tokens_per_image
        self.max_audio_clips_per_prompt = max_audio_clips_per_prompt
        self.num_audio_tokens_per_clip = num_audio_tokens_per_clip
        self.audio_input_feat_size = audio_input_feat_size
        self.num_frames_per_video = num_frames_per_video
        self.num_vision_tokens_per_frame = num_vision_tokens_per_frame
        self.video_fps = video_fps
        self.pad_images_to = pad_images_to
        self.video_metadata: Any = None
        # keras-hub's converter pads every clip to its window; the extractor in it tells how long each one is.
        extractor = getattr(audio_converter, "extractor", audio_converter)
        self._audio_options = {} if extractor is audio_converter else {"max_length": audio_converter.num_samples}
        unified = isinstance(extractor, Gemma4UnifiedAudioFeatureExtractor) or isinstance(
            image_converter, Gemma4UnifiedImageProcessor
        )
        kind = Gemma4UnifiedProcessor if unified else Gemma4Processor
        self._processor = kind(extractor, image_converter, tokenizer, video_converter)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The preprocessor of a checkpoint's processor; options of the hub, and the constructor's arguments.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
            ConfigError: Its files cannot be understood.
        """
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in inspect.signature(cls.__init__).parameters}
        source = Source.take(pretrained_model_name_or_path, dict(kwargs))
        path = source.find(PROCESSOR_FILE)
        saved_by = read_json(path).get("processor_class") if path is not None else None
        kind = Gemma4UnifiedProcessor if saved_by == Gemma4UnifiedProcessor.__name__ else Gemma4Processor
        processor = kind.from_pretrained(pretrained_model_name_or_path, **kwargs)
        parts = {
            "tokenizer": processor.tokenizer,
            "image_converter": processor.image_processor,
            "audio_converter": processor.feature_extractor,
            "video_converter": processor.video_processor,
        }
        video = own.get("video_converter", processor.video_processor)
        if video is not None and video.num_frames is not None:
            parts |= {"num_frames_per_video": video.num_frames, "num_vision_tokens_per_frame": video.max_soft_tokens}
        return cls(**{**parts, **own})

    @property
    def text_only_model(self) -> bool:
        """Whether there are no converters."""
        return self.image_converter is None and self.audio_converter is None and self.video_converter is None

    # ------------------------------------------------------------------------------------------------ three doors

    def __call__(
        self,
        x: Mapping[str, Any],
        y: None = None,
        sample_weight: None = None,
        sequence_length: int | None = None,
        video_metadata: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """A training batch.

        Args:
            x: "prompts" and "responses" (text, or a list of texts each), and "images", "videos", "audio" for the marks
                in the prompts, one entry (a medium or a list of them) for each prompt (one prompt: also the medium
                itself); or, made before,
                "pixel_values" with "pixel_position_ids" (prompts, pictures, patches, ...) and "audio_mel" with
                "audio_mel_mask" (prompts, clips, frames, ...).
            y: Not used; labels are the responses.
            sample_weight: Not used.
            sequence_length: Tokens of a row for this call.
            video_metadata: As the attribute, for this call.

        Returns:
            (x, y, sample_weight). x holds token_ids int64, padding_mask bool and position_ids int64, all (prompts,
            length); with converters also pixel_values float32 (prompts, pictures or frames, patches, numbers),
            pixel_position_ids int64 (..., 2), vision_mask bool (prompts, length), vision_indices int64 (prompts, most
            vision tokens), the places of vision tokens filled up with 0, and audio_mel float32 (prompts, clips, frames,
            bands), audio_mel_mask, audio_mask and audio_indices likewise. y are the next tokens, int64; sample_weight
            is True where y belongs to the response or its end, bool. One prompt without a list gives entries without
            the first axis.

        Raises:
            PlaceholderError: Marks and media do not agree, or a row has no room for its media.
            InputError: An input cannot be used, or there are more media than allowed.
        """
        batch = self._read(x, needs_responses=True)
        length = (sequence_length or self.sequence_length) + 1
        ids, in_response = self._packed(batch, length, self.add_end_token, video_metadata)
        labels, weights = ids[:, 1:], in_response[:, 1:]
        inputs = self._inputs(batch, ids[:, :-1], with_positions=True)
        if batch.is_batch:
            return inputs, labels, weights
        return {name: value[0] for name, value in inputs.items()}, labels[0], weights[0]

    def generate_preprocess(
        self, x: Any, sequence_length: int | None = None, video_metadata: Any = None
    ) -> dict[str, Tensor]:
        """Inputs of generation: as a call's x, without labels and without the end token.

        Args:
            x: A prompt, a list of prompts, or a dict as for a call; responses are optional and are continued.
            sequence_length: Tokens of a row for this call.
            video_metadata: As the attribute, for this call.

        Raises:
            PlaceholderError, InputError: As for a call.
        """
        batch = self._read(x if isinstance(x, Mapping) else {"prompts": x}, needs_responses=False)
        ids, _ = self._packed(batch, sequence_length or self.sequence_length, False, video_metadata)
        inputs = self._inputs(batch, ids, with_positions=not self.text_only_model)
        return inputs if batch.is_batch else {name: value[0] for name, value in inputs.items()}

    def generate_postprocess(self, x: Mapping[str, Any]) -> str | list[str]:
        """Text of {"token_ids", "padding_mask"} without padding, `<bos>`, `<eos>` and the marks of media.

        `<|image>` stays, as with keras-hub, and so do the marks of turns, thoughts and tools: they tell whose words
        follow.

        Raises:
            InputError: An entry is missing.
        """
        if "token_ids" not in x or "padding_mask" not in x:
            raise InputError(f"generate_postprocess needs 'token_ids' and 'padding_mask'; got {sorted(x)}.")
        ids, mask = plain_list(x["token_ids"]), plain_list(x["padding_mask"])
        is_batch = bool(ids) and isinstance(ids[0], list)
        rows = zip(ids, mask, strict=True) if is_batch else [(ids, mask)]
        tokenizer = self.tokenizer
        dropped = {getattr(tokenizer, f"{name}_token_id") for name in _LEFT_OUT}
        texts = [
            tokenizer.decode([token for token, real in zip(*row, strict=True) if real and token not in dropped])
            for row in rows
        ]
        return texts if is_batch else texts[0]

    # ------------------------------------------------------------------------------------------------ reading

    def _read(self, x: Any, needs_responses: bool) -> _Batch:
        """The input in one form.

        Raises:
            InputError: Texts are missing, or responses are not as many as prompts, or media are not allowed.
        """
        if not isinstance(x, Mapping):
            raise InputError(f"a dictionary with 'prompts' and 'responses' is needed; got a {type(x).__name__}.")
        prompts, responses = plain_list(x.get("prompts")), plain_list(x.get("responses"))
        if prompts is None or (responses is None and needs_responses):
            needed = "'prompts' and 'responses' are" if needs_responses else "'prompts' are"
            raise InputError(f"{needed} needed; got {sorted(x)}.")
        is_batch = not isinstance(prompts, str)
        batch = _Batch(
            prompts=list(prompts) if is_batch else [prompts],
            responses=None if responses is None else list(responses) if is_batch else [responses],
            is_batch=is_batch,
        )
        if batch.responses is not None and len(batch.responses) != len(batch.prompts):
            raise InputError(f"{len(batch.prompts)} prompts but {len(batch.responses)} responses; pass one for each.")
        for text in (*batch.prompts, *(batch.responses or [])):
            if not isinstance(text, str):
                raise TypeError(f"prompts and responses are text, not {type(text).__name__}.")
        kinds = (("image", "images", is_image), ("video", "videos", is_video), ("audio", "audio", is_clip))
        for kind, name, is_one in kinds:
            batch.media[kind] = media_of(x.get(name), is_batch, len(batch.prompts), is_one)
        if batch.media["image"] is None and x.get("pixel_values") is not None:
            batch.features |= pictures_made_before(x, is_batch)
        if batch.media["audio"] is None and x.get("audio_mel") is not None:
            batch.features |= clips_made_before(x, is_batch)
        self._check_limits(batch)
        return batch

    def _check_limits(self, batch: _Batch) -> None:
        for kind, plural, converter, limit in (
            ("image", "pictures", self.image_converter, "max_images_per_prompt"),
            ("audio", "clips", self.audio_converter, "max_audio_clips_per_prompt"),
        ):
            rows, allowed = batch.media[kind], getattr(self, limit)
            most = 0 if rows is None else max(rows.counts or [0])
            if converter is not None and allowed is not None and most > allowed:
                raise InputError(f"a prompt has {most} {plural}; {limit}={allowed}.")

    # ------------------------------------------------------------------------------------------------ packing

    def _packed(self, batch: _Batch, length: int, add_end: bool, video_metadata: Any) -> tuple[Tensor, Tensor]:
        """Ids and whether each belongs to the response, (prompts, length)."""
        prompts = self._expanded(batch, video_metadata)
        ids, weights = [], []
        for number, prompt in enumerate(prompts):
            bos = self.tokenizer.bos_token
            begin = [self.tokenizer.bos_token_id] if self.add_start_token or prompt.startswith(bos) else []
            first = self._ids(prompt.removeprefix(bos))
            second = None if batch.responses is None else self._ids(batch.responses[number])
            end = [self.tokenizer.eos_token_id] if add_end else []
            kept = shares([len(first), len(second or [])], length - len(begin) - len(end))
            self._check_media_kept(first, kept[0], number, length)
            answer = [*(second or [])[: kept[1]], *end]
            row = [*begin, *first[: kept[0]], *answer]
            missing = length - len(row)
            ids.append(row + [self.tokenizer.pad_token_id] * missing)
            is_answer = second is not None
            weights.append([False] * (len(row) - len(answer)) + [is_answer] * len(answer) + [False] * missing)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(weights, dtype=torch.bool)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_media_kept(self, ids: list[int], kept: int, row: int, length: int) -> None:
        media = {self.tokenizer.image_token_id, self.tokenizer.video_token_id, self.tokenizer.audio_token_id}
        last = max((place for place, token in enumerate(ids) if token in media), default=-1)
        if last + 1 >= kept and last >= 0 and kept < len(ids):
            raise PlaceholderError(
                f"prompt {row}: its media need {last + 2} of {length} tokens but only {kept} are left for the prompt. "
                "Raise sequence_length, or shorten the response."
            )

    def _expanded(self, batch: _Batch, video_metadata: Any) -> list[str]:
        """The prompts with as many tokens for each medium as it has features; fills `batch.features`."""
        processor = self._processor
        replacements: dict[Any, list[str]] = {}
        if batch.media["image"] is not None:
            self._require("image_converter", "images")
            check_counts("images", processor.image_token or "", batch.prompts, batch.media["image"])
            made = self.image_converter(batch.media["image"].items, return_tensors="pt")
            batch.features["image"] = made
            counts = [int(count) for count in made["num_soft_tokens_per_image"]]
            replacements[processor.image_token] = [self._image_text(count) for count in counts]
        elif "pixels" in batch.features:
            self._require("image_converter", "pixel_values")
            replacements[processor.image_token] = self._ready_made_texts(batch)
        if batch.media["video"] is not None:
            self._require("video_converter", "videos")
            check_counts("videos", processor.video_token or "", batch.prompts, batch.media["video"])
            replacements[processor.video_token] = self._video_texts(batch, video_metadata)
        if batch.media["audio"] is not None:
            self._require("audio_converter", "audio")
            check_counts("clips", processor.audio_token or "", batch.prompts, batch.media["audio"])
            made = processor._audio_features(batch.media["audio"].items, self._audio_options, None)
            batch.features["audio"] = made
            replacements[processor.audio_token] = [
                processor.audio_text(made, index) for index in range(len(batch.media["audio"].items))
            ]
        elif "mel" in batch.features:
            self._require("audio_converter", "audio_mel")
            replacements[processor.audio_token] = self._ready_made_clips(batch)
        for mark in (processor.image_token, processor.video_token, processor.audio_token):
            if mark is not None and mark not in replacements and not self.text_only_model:
                replacements |= self._without_media(mark, batch.prompts)
        return expand(batch.prompts, replacements)[0]

    def _require(self, converter: str, media: str) -> None:
        if getattr(self, converter) is None:
            mode = "is text-only" if self.text_only_model else f"has no {converter}"
            raise InputError(f"this preprocessor {mode}, but {media} were passed. Pass {converter}= when making it.")

    def _without_media(self, mark: str, prompts: list[str]) -> dict[str, list[str]]:
        """Marks for which nothing was passed: an error, except a video's, whose place is kept as keras-hub does."""
        count = sum(marks(prompt, mark) for prompt in prompts)
        if count == 0:
            return {}
        if mark != self._processor.video_token or self.video_converter is None:
            raise PlaceholderError(f"the prompts hold {count} of the mark {mark}, but nothing was passed for it.")
        times = [place / self.video_fps for place in range(self.num_frames_per_video)]
        return {mark: [self._frames_text(times, self.num_vision_tokens_per_frame)] * count}

    def _image_text(self, count: int) -> str:
        if count > self.num_vision_tokens_per_image:
            raise InputError(
                f"a picture has {count} tokens but num_vision_tokens_per_image={self.num_vision_tokens_per_image}. "
                "Raise it, or lower the image_converter's max_soft_tokens."
            )
        tokens = self._processor.image_token or ""
        return f"{self.tokenizer.boi_token}{tokens * (self.pad_images_to or count)}{self.tokenizer.eoi_token}"

    def _ready_made_texts(self, batch: _Batch) -> list[str]:
        """A text for each mark; what the positions do not tell is the number of tokens told to the constructor."""
        places = batch.features["places"]
        if places.shape[0] != len(batch.prompts):
            raise InputError(f"{len(batch.prompts)} prompts but pixel_values for {places.shape[0]}.")
        pooled = getattr(self.image_converter, "pooling_kernel_size", 3) ** 2
        texts = []
        for prompt, pictures in zip(batch.prompts, places, strict=True):
            count = marks(prompt, self._processor.image_token or "")
            if count > len(pictures):
                raise PlaceholderError(f"a prompt holds {count} marks of pictures but pixel_values of {len(pictures)}.")
            for picture in pictures[:count]:
                patches = int((picture >= 0).all(dim=-1).sum())
                exact = patches % pooled == 0
                texts.append(self._image_text(patches // pooled if exact else self.num_vision_tokens_per_image))
        return texts

    def _ready_made_clips(self, batch: _Batch) -> list[str]:
        """A text for each mark of a clip; prompts may hold all tokens of their clips already, as keras-hub wants it."""
        mark, masks, texts = self._processor.audio_token or "", batch.features["mel_mask"], []
        if len(masks) != len(batch.prompts):
            raise InputError(f"{len(batch.prompts)} prompts but audio_mel for {len(masks)}.")
        for prompt, clips in zip(batch.prompts, masks, strict=True):
            real = {"input_features_mask": [clip for clip in clips if clip.any()]}
            written = [self._processor.audio_text(real, index) for index in range(len(real["input_features_mask"]))]
            found, tokens = marks(prompt, mark), sum(marks(text, mark) for text in written)
            if found not in (len(written), tokens):
                raise PlaceholderError(
                    f"a prompt holds {found} of the mark {mark} but audio_mel of {len(written)} clips, {tokens} tokens."
                )
            texts += written if found == len(written) else [mark] * found
        return texts

    def _video_texts(self, batch: _Batch, video_metadata: Any) -> list[str]:
        """A text for each video; frames that are passed with metadata are all taken, others are picked."""
        rows = batch.media["video"]
        videos = rows.items if rows is not None else []
        told = self.video_metadata if video_metadata is None else video_metadata
        if told is None:
            options: dict[str, Any] = {"num_frames": self.num_frames_per_video}
        else:
            told = [told] if isinstance(told, Mapping) else list(told)
            options = {"video_metadata": [{"fps": self.video_fps, **one} for one in told], "do_sample_frames": False}
        made = self._processor._video_features(videos, options)
        batch.features["video"] = made
        texts = []
        for index, metadata in enumerate(made["video_metadata"]):
            frames = int(made["num_frames_per_video"][index])
            known = told is not None or metadata.fps is not None
            times = metadata.timestamps if known else [place / self.video_fps for place in range(frames)]
            texts.append(self._frames_text(times, int(made["num_soft_tokens_per_video"][index])))
        return texts

    def _frames_text(self, times: Sequence[float], tokens: int) -> str:
        block = f"{self.tokenizer.boi_token}{VIDEO_TOKEN * tokens}{self.tokenizer.eoi_token}"
        return " ".join(f"{time_stamp(seconds)} {block}" for seconds in times)

    # ------------------------------------------------------------------------------------------------ what comes out

    def _inputs(self, batch: _Batch, ids: Tensor, with_positions: bool) -> dict[str, Tensor]:
        """The entries of x for rows of ids (prompts, length)."""
        tokenizer = self.tokenizer
        inputs = {"token_ids": ids, "padding_mask": ids != tokenizer.pad_token_id}
        if with_positions:
            inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids).clone()
        if self.text_only_model:
            return inputs
        vision_mask = (ids == tokenizer.image_token_id) | (ids == tokenizer.video_token_id)
        audio_mask = ids == tokenizer.audio_token_id
        pixels, places = pictures_of(
            batch.prompts,
            (self._processor.image_token or "", self._processor.video_token or ""),
            batch.features,
            self._empty_room(),
        )
        mel, mel_mask = clips_of(
            batch.features,
            batch.media["audio"].counts or [] if batch.media["audio"] is not None else [0] * len(batch.prompts),
            self.audio_input_feat_size,
        )
        return inputs | {
            "pixel_values": pixels,
            "pixel_position_ids": places,
            "vision_mask": vision_mask,
            "vision_indices": indices_of(vision_mask, self._vision_slots()),
            "audio_mel": mel,
            "audio_mel_mask": mel_mask,
            "audio_mask": audio_mask,
            "audio_indices": indices_of(audio_mask, 0),
        }

    def _empty_room(self) -> tuple[int, int]:
        """Patches and numbers of a patch in the empty entries of a batch without pictures; keras-hub's."""
        return (1, 48) if self.image_converter is None else (0, 3 * self.image_converter.patch_size**2)

    def _vision_slots(self) -> int:
        """Width of `vision_indices`: the same for every batch, as far as the limits tell."""
        if self.video_converter is not None:
            return int(self.num_frames_per_video * self.video_converter.max_soft_tokens)
        if self.image_converter is not None:
            return (self.max_images_per_prompt or 0) * self.num_vision_tokens_per_image
        return 0
