"""Gemma 3n: a decoder of text that also sees pictures and listens."""

from __future__ import annotations

from .audio import Gemma3nAudioEncoder
from .causal import Gemma3nForCausalLM
from .config import Gemma3nAudioConfig, Gemma3nConfig, Gemma3nTextConfig, Gemma3nVisionConfig
from .modeling import Gemma3nForConditionalGeneration, Gemma3nModel
from .text import Gemma3nPreTrainedModel, Gemma3nTextModel
from .vision import Gemma3nVisionModel

__all__ = [
    "Gemma3nAudioConfig",
    "Gemma3nAudioEncoder",
    "Gemma3nConfig",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma3nModel",
    "Gemma3nPreTrainedModel",
    "Gemma3nTextConfig",
    "Gemma3nTextModel",
    "Gemma3nVisionConfig",
    "Gemma3nVisionModel",
]
