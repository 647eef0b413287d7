"""Whisper: speech recognition, speech translation, and language identification."""

from __future__ import annotations

from ...feature_extraction.whisper import WhisperFeatureExtractor
from .config import WhisperConfig
from .generation import WhisperForConditionalGeneration
from .heads import WhisperForAudioClassification, WhisperForCausalLM
from .modeling import WhisperDecoder, WhisperEncoder, WhisperModel, WhisperPreTrainedModel
from .normalizer import BasicTextNormalizer, EnglishTextNormalizer
from .processing import WhisperProcessor
from .tokenizer import WhisperTokenizer, WhisperTokenizerFast

__all__ = [
    "BasicTextNormalizer",
    "EnglishTextNormalizer",
    "WhisperConfig",
    "WhisperDecoder",
    "WhisperEncoder",
    "WhisperFeatureExtractor",
    "WhisperForAudioClassification",
    "WhisperForCausalLM",
    "WhisperForConditionalGeneration",
    "WhisperModel",
    "WhisperPreTrainedModel",
    "WhisperProcessor",
    "WhisperTokenizer",
    "WhisperTokenizerFast",
]
