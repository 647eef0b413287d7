"""audiomm: models that listen, in PyTorch.

The names below are the public face. They are looked up when first used, so that `import audiomm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# module (below this package) -> the public names it gives
_PUBLIC = {
    "auto": (
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoImageProcessor",
        "AutoModel",
        "AutoModelForAudioClassification",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForPreTraining",
        "AutoModelForSpeechSeq2Seq",
        "AutoProcessor",
        "AutoTokenizer",
        "AutoVideoProcessor",
    ),
    "base.config": ("PreTrainedConfig",),
    "base.errors": (
        "AudioDecodeError",
        "AudioError",
        "AudioLayoutError",
        "AudioLimitError",
        "AudiommError",
        "CheckpointError",
        "CheckpointMismatchError",
        "CheckpointNotFoundError",
        "ConfigError",
        "CorruptCheckpointError",
        "EmptyAudioError",
        "GenerationError",
        "InputError",
        "MissingExtra",
        "MissingShardError",
        "NonFiniteAudioError",
        "NumericalError",
        "PlaceholderError",
        "SampleRateError",
        "SaveError",
        "ShapeError",
        "TruncatedAudioError",
        "UnsafeCheckpointError",
    ),
    "base.modeling": ("PreTrainedModel",),
    "base.outputs": ("GenerateOutput", "ModelOutput"),
    "base.tokenizer": ("BatchEncoding", "PreTrainedTokenizer", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast"),
    "base.transcript": ("Segment", "Transcript", "Word"),
    "feature_extraction": ("BatchFeature", "FeatureExtractionMixin", "ProcessorMixin", "WhisperFeatureExtractor"),
    "generation": (
        "AsyncTextIteratorStreamer",
        "CompileConfig",
        "GenerationConfig",
        "GenerationMixin",
        "LogitsProcessor",
        "LogitsProcessorList",
        "StoppingCriteria",
        "StoppingCriteriaList",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
    "layers.cache": ("Cache",),
    "media": ("load_audio",),
    "models.gemma3n": (
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
        "SiglipImageProcessor",
    ),
    "models.gemma4": (
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
    ),
    "models.whisper": (
        "BasicTextNormalizer",
        "EnglishTextNormalizer",
        "WhisperConfig",
        "WhisperForAudioClassification",
        "WhisperForCausalLM",
        "WhisperForConditionalGeneration",
        "WhisperModel",
        "WhisperPreTrainedModel",
        "WhisperProcessor",
        "WhisperTokenizer",
        "WhisperTokenizerFast",
    ),
    "pipelines": (
        "AnyToTextPipeline",
        "AudioClassificationPipeline",
        "AutomaticSpeechRecognitionPipeline",
        "PromptedSpeechRecognitionPipeline",
        "pipeline",
    ),
    "pipelines.live": ("LiveTranscriber", "LiveUpdate"),
    "pipelines.live_prompted": ("LiveText", "PromptedLiveTranscriber"),
    "pipelines.transcribe": ("transcribe",),
    "presets": ("Gemma3nAudioConverter", "Gemma3nBackbone", "Gemma4Backbone", "WhisperBackbone"),
    "training": (
        "DataCollatorForCausalLM",
        "DataCollatorSpeechSeq2SeqWithPadding",
        "EarlyStoppingCallback",
        "EvalPrediction",
        "LoraConfig",
        "PredictionOutput",
        "ResumeError",
        "Seq2SeqTrainer",
        "Seq2SeqTrainingArguments",
        "Trainer",
        "TrainerCallback",
        "TrainerControl",
        "TrainerState",
        "TrainingArguments",
        "add_lora",
        "default_data_collator",
        "freeze",
        "get_last_checkpoint",
        "load_lora",
        "merge_lora",
        "remove_lora",
        "save_lora",
        "set_seed",
        "trainable_report",
    ),
}

_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
