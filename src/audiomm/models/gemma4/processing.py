"""Gemma4Processor: text, pictures, clips and videos to what Gemma 4 reads; answers back to messages.

A picture, a frame or a clip costs as many tokens as it has features: the processor asks the extractors and writes that
many, each frame of a video behind the time at which it was seen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...base.encoding import plain_list
from ...base.errors import AudioLimitError, ConfigError, InputError
from ...feature_extraction.image import Gemma4ImageProcessor, Gemma4UnifiedImageProcessor
from ...feature_extraction.multimodal import MultimodalProcessor
from ...feature_extraction.raw_frames import Gemma4UnifiedAudioFeatureExtractor
from ...feature_extraction.usm import Gemma4AudioFeatureExtractor
from ...feature_extraction.video import Gemma4UnifiedVideoProcessor, Gemma4VideoProcessor
from .answer import parse_answer
from .chat import CHAT_TEMPLATE
from .config import Gemma4AudioConfig
from .tokenizer import VIDEO_TOKEN, GemmaTokenizer
from .variants import Gemma4UnifiedAudioConfig

logger = logging.getLogger("audiomm.models.gemma4")

#: Frames a second of a video that does not tell, as transformers takes it.
_FALLBACK_FPS = 24.0


class Gemma4Processor(MultimodalProcessor):
    """Text with media to inputs of Gemma 4; the call and the chats are `MultimodalProcessor`'s.

    A mark is `<|image|>`, `<|audio|>` or `<|video|>`.

    Args:
        feature_extractor: A Gemma4AudioFeatureExtractor; None for a model that does not listen (26B-A4B, 31B).
        image_processor: A Gemma4ImageProcessor.
        tokenizer: A GemmaTokenizer.
        video_processor: A Gemma4VideoProcessor, or None.
        chat_template: jinja2 text; None is the tokenizer's.
        image_seq_length: Kept from the checkpoint; pictures cost what they cost.
        audio_seq_length: Most tokens that a clip may have.
        audio_ms_per_token: Milliseconds a token of a clip lasts.

    Raises:
        TypeError: A part is missing or of another class.
        ConfigError: The vocabulary lacks the tokens that stand for media.
    """

    attributes: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_processor", "tokenizer", "video_processor")
    optional: ClassVar[frozenset[str]] = frozenset({"feature_extractor", "image_processor", "video_processor"})
    settings: ClassVar[dict[str, Any]] = {"image_seq_length": 280, "audio_seq_length": 750, "audio_ms_per_token": 40}
    feature_extractor_class: ClassVar[type[Any]] = Gemma4AudioFeatureExtractor
    image_processor_class: ClassVar[type[Any]] = Gemma4ImageProcessor
    video_processor_class: ClassVar[type[Any]] = Gemma4VideoProcessor
    tokenizer_class: ClassVar[type[GemmaTokenizer]] = GemmaTokenizer
    audio_config_class: ClassVar[type[Any]] = Gemma4AudioConfig
    text_defaults: ClassVar[dict[str, Any]] = {"padding": True}
    counted_names: ClassVar[frozenset[str]] = frozenset({"num_soft_tokens_per_image", "num_soft_tokens_per_video"})
    fallback_template: ClassVar[str] = CHAT_TEMPLATE

    tokenizer: GemmaTokenizer
    image_seq_length: int
    audio_seq_length: int
    audio_ms_per_token: int

    def __init__(
        self,
        feature_extractor: Any = None,
        image_processor: Any = None,
        tokenizer: GemmaTokenizer | None = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 280,
        audio_seq_length: int = 750,
        audio_ms_per_token: int = 40,
    ) -> None:
        super().__init__(
            feature_extractor,
            image_processor,
            tokenizer,
            video_processor,
            chat_template=chat_template,
            image_seq_length=image_seq_length,
            audio_seq_length=audio_seq_length,
            audio_ms_per_token=audio_ms_per_token,
        )
        needed = {"image_processor": ("image", "boi", "eoi"), "feature_extractor": ("audio", "boa", "eoa")}
        for part, names in needed.items():
            missing = [name for name in names if getattr(self.tokenizer, f"{name}_token", None) is None]
            if missing and getattr(self, part) is not None:
                raise ConfigError(f"the tokenizer has no {', '.join(f'{name}_token' for name in missing)} for {part}.")
        self._audio_counts = self.audio_config_class()

    @property
    def boi_token(self) -> str | None:
        """What begins a picture."""
        return getattr(self.tokenizer, "boi_token", None)

    @property
    def eoi_token(self) -> str | None:
        """What ends a picture."""
        return getattr(self.tokenizer, "eoi_token", None)

    @property
    def boa_token(self) -> str | None:
        """What begins a clip."""
        return getattr(self.tokenizer, "boa_token", None)

    @property
    def eoa_token(self) -> str | None:
        """What ends a clip."""
        return getattr(self.tokenizer, "eoa_token", None)

    def image_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of image `index`."""
        count = int(features["num_soft_tokens_per_image"][index])
        return f"{self.boi_token}{self.tokenizer.image_token * count}{self.eoi_token}"

    def audio_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of clip `index`.

        Raises:
            InputError: The clip is too short for one token, or the extractor was told to leave its mask out.
            AudioLimitError: It has more tokens than a clip may have.
        """
        if "input_features_mask" not in features:
            raise InputError(
                "return_attention_mask=False leaves out input_features_mask, which tells how many tokens a clip has; "
                "do not pass it."
            )
        count = self.audio_count(int(features["input_features_mask"][index].sum()))
        if count == 0:
            raise InputError(f"clip {index} is too short: it has no {self.audio_ms_per_token} ms for a single token.")
        if count > self.audio_seq_length:
            raise AudioLimitError(
                f"clip {index} lasts {count * self.audio_ms_per_token / 1000:.1f} s and has {count} tokens; at most "
                f"{self.audio_seq_length} are accepted. Cut it into pieces: the speech recognition pipeline does so at "
                "pauses."
            )
        return f"{self.boa_token}{self.tokenizer.audio_token * count}{self.eoa_token}"

    def audio_count(self, frames: int) -> int:
        """Tokens of a clip of `frames` feature frames."""
        return int(self._audio_counts.audio_tokens(frames))

    def video_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of video `index`: its frames behind their times, "00:08 <|image>..."."""
        count = int(features["num_soft_tokens_per_video"][index])
        metadata = features["video_metadata"][index]
        if metadata.fps is None and metadata.seconds is None:
            logger.warning(
                "video %d does not tell how many frames it has a second; %s is taken, and the times in the prompt "
                "follow from that. Pass videos_kwargs={'video_metadata': [{'fps': ...}]}.",
                index,
                _FALLBACK_FPS,
            )
            metadata.fps = _FALLBACK_FPS
        block = f"{self.boi_token}{VIDEO_TOKEN * count}{self.eoi_token}"
        return " ".join(f"{time_stamp(seconds)} {block}" for seconds in metadata.timestamps)

    def parse_response(
        self,
        response: Any,
        schema: None = None,
        *,
        prefix: Any = None,
        tools: Sequence[Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """A generated answer as a message.

        Args:
            response: Text, or ids; a list of texts, or of ids, for a batch. Only what was generated, not the prompt.
            schema: Accepted for compatibility; the format is the family's.
            prefix: The prompt, or one for each answer: an answer that continues a thought or a call begun there is
                read together with it.
            tools: As for `apply_chat_template`; arguments of calls are then brought to the types they declare.

        Returns:
            {"role": "assistant", "content": text}, and if there are any "reasoning_content" (the thoughts) and
            "tool_calls" [{"type": "function", "function": {"name", "arguments"}}]; a list of those for a batch.

        Raises:
            InputError: There are not as many prefixes as answers.
        """
        texts, is_batch = self._answers(response)
        prefixes, many = self._answers(prefix) if prefix is not None and len(prefix) else ([""], False)
        if many and len(prefixes) != len(texts):
            raise InputError(f"{len(texts)} answers but {len(prefixes)} prefixes; pass one for each, or a single one.")
        prefixes = prefixes if many else prefixes * len(texts)
        parsed = [parse_answer(text, before, tools) for text, before in zip(texts, prefixes, strict=True)]
        return parsed if is_batch else parsed[0]

    def _answers(self, answers: Any) -> tuple[list[str], bool]:
        """Texts, and whether several were passed."""
        answers = plain_list(answers)
        if isinstance(answers, str):
            return [answers], False
        if answers and isinstance(answers[0], (str, list)):
            return [text if isinstance(text, str) else self.decode(text) for text in answers], True
        return [self.decode(answers)], False


class Gemma4UnifiedProcessor(Gemma4Processor):
    """The processor of the 12B, which reads raw samples and merged patches; arguments as Gemma4Processor."""

    feature_extractor_class: ClassVar[type[Any]] = Gemma4UnifiedAudioFeatureExtractor
    image_processor_class: ClassVar[type[Any]] = Gemma4UnifiedImageProcessor
    video_processor_class: ClassVar[type[Any]] = Gemma4UnifiedVideoProcessor
    audio_config_class: ClassVar[type[Any]] = Gemma4UnifiedAudioConfig


def time_stamp(seconds: float) -> str:
    """Minutes and seconds as they stand before a frame: "00:08", "61:05"."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"
