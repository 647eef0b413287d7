"""Gemma 4: text, pictures, video and sound; dense, with per-layer embeddings, and with experts."""

from __future__ import annotations

from ...feature_extraction.image import Gemma4ImageProcessor, Gemma4UnifiedImageProcessor
from ...feature_extraction.raw_frames import Gemma4UnifiedAudioFeatureExtractor
from ...feature_extraction.usm import Gemma4AudioFeatureExtractor
from ...feature_extraction.video import Gemma4UnifiedVideoProcessor, Gemma4VideoProcessor
from .assistant import Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM
from .audio import Gemma4AudioModel, Gemma4StreamingAudioEncoder
from .config import Gemma4AudioConfig, Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig
from .heads import Gemma4ForCausalLM
from .modeling import Gemma4ForConditionalGeneration, Gemma4Model
from .preprocessor import Gemma4CausalLMPreprocessor
from .processing import Gemma4Processor, Gemma4UnifiedProcessor
from .text import Gemma4PreTrainedModel, Gemma4TextModel
from .tokenizer import GemmaTokenizer, GemmaTokenizerFast
from .unified import (
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedModel,
    Gemma4UnifiedTextModel,
)
from .variants import (
    Gemma4AssistantConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from .vision import Gemma4VisionModel

__all__ = [
    "Gemma4AssistantConfig",
    "Gemma4AssistantForCausalLM",
    "Gemma4AudioConfig",
    "Gemma4AudioFeatureExtractor",
    "Gemma4AudioModel",
    "Gemma4CausalLMPreprocessor",
    "Gemma4Config",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4ImageProcessor",
    "Gemma4Model",
    "Gemma4PreTrainedModel",
    "Gemma4Processor",
    "Gemma4StreamingAudioEncoder",
    "Gemma4TextConfig",
    "Gemma4TextModel",
    "Gemma4UnifiedAssistantConfig",
    "Gemma4UnifiedAssistantForCausalLM",
    "Gemma4UnifiedAudioConfig",
    "Gemma4UnifiedAudioFeatureExtractor",
    "Gemma4UnifiedConfig",
    "Gemma4UnifiedForCausalLM",
    "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedImageProcessor",
    "Gemma4UnifiedModel",
    "Gemma4UnifiedProcessor",
    "Gemma4UnifiedTextConfig",
    "Gemma4UnifiedTextModel",
    "Gemma4UnifiedVideoProcessor",
    "Gemma4UnifiedVisionConfig",
    "Gemma4VideoProcessor",
    "Gemma4VisionConfig",
    "Gemma4VisionModel",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
]
