"""Gemma 3n: a decoder of text that also sees pictures and listens."""

from __future__ import annotations

from ...feature_extraction.image import SiglipImageProcessor
from ...feature_extraction.usm import Gemma3nAudioFeatureExtractor
from .audio import Gemma3nAudioEncoder, Gemma3nStreamingAudioEncoder
from .causal import Gemma3nForCausalLM
from .conditional import Gemma3nForConditionalGeneration
from .config import Gemma3nAudioConfig, Gemma3nConfig, Gemma3nTextConfig, Gemma3nVisionConfig
from .modeling import Gemma3nModel
from .processing import Gemma3nProcessor
from .text import Gemma3nPreTrainedModel, Gemma3nTextModel
from .tokenizer import GemmaTokenizer, GemmaTokenizerFast
from .vision import Gemma3nVisionModel

__all__ = [
    "Gemma3nAudioConfig",
    "Gemma3nAudioEncoder",
    "Gemma3nAudioFeatureExtractor",
    "Gemma3nConfig",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma3nModel",
    "Gemma3nPreTrainedModel",
    "Gemma3nProcessor",
    "Gemma3nStreamingAudioEncoder",
    "Gemma3nTextConfig",
    "Gemma3nTextModel",
    "Gemma3nVisionConfig",
    "Gemma3nVisionModel",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "SiglipImageProcessor",
]
