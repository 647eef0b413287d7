"""Gemma 4: text, pictures, video and sound; dense, with per-layer embeddings, and with experts."""

from __future__ import annotations

from .config import (
    Gemma4AssistantConfig,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
)
from .heads import Gemma4ForCausalLM
from .modeling import Gemma4ForConditionalGeneration, Gemma4Model
from .text import Gemma4PreTrainedModel, Gemma4TextModel
from .unified import (
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedModel,
)

__all__ = [
    "Gemma4AssistantConfig",
    "Gemma4AudioConfig",
    "Gemma4Config",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4Model",
    "Gemma4PreTrainedModel",
    "Gemma4TextConfig",
    "Gemma4TextModel",
    "Gemma4UnifiedAssistantConfig",
    "Gemma4UnifiedAudioConfig",
    "Gemma4UnifiedConfig",
    "Gemma4UnifiedForCausalLM",
    "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedModel",
    "Gemma4UnifiedTextConfig",
    "Gemma4UnifiedVisionConfig",
    "Gemma4VisionConfig",
]
