"""WhisperProcessor: the feature extractor and the tokenizer of a Whisper model."""

from __future__ import annotations

from typing import Any, ClassVar

from ...feature_extraction.processor import ProcessorMixin
from ...feature_extraction.whisper import WhisperFeatureExtractor
from .tokenizer import WhisperTokenizer


class WhisperProcessor(ProcessorMixin):
    """Clips to features, texts to labels, ids to texts.

    Args:
        feature_extractor: A WhisperFeatureExtractor.
        tokenizer: A WhisperTokenizer.

    Raises:
        TypeError: A part is missing or of another class.
    """

    attributes: ClassVar[tuple[str, ...]] = ("feature_extractor", "tokenizer")
    feature_extractor_class: ClassVar[type[WhisperFeatureExtractor]] = WhisperFeatureExtractor
    tokenizer_class: ClassVar[type[WhisperTokenizer]] = WhisperTokenizer

    feature_extractor: WhisperFeatureExtractor
    tokenizer: WhisperTokenizer

    def __init__(self, feature_extractor: WhisperFeatureExtractor, tokenizer: WhisperTokenizer) -> None:
        super().__init__(feature_extractor, tokenizer)

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """The prefix after the start token as (position, id); see the tokenizer's method of this name."""
        return self.tokenizer.get_decoder_prompt_ids(task=task, language=language, no_timestamps=no_timestamps)

    def get_prompt_ids(self, text: str, return_tensors: str | None = "np") -> Any:
        """Ids that tell the model what was said before; see the tokenizer's method of this name."""
        return self.tokenizer.get_prompt_ids(text, return_tensors=return_tensors)
