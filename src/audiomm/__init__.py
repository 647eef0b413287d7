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
        "AutoModel",
        "AutoModelForAudioClassification",
        "AutoModelForCausalLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoProcessor",
        "AutoTokenizer",
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
    "pipelines": ("AudioClassificationPipeline", "AutomaticSpeechRecognitionPipeline", "pipeline"),
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
