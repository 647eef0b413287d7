"""Arrays to model inputs, and their union with text."""

from .base import BatchFeature, FeatureExtractionMixin, SequenceFeatureExtractor
from .processor import ProcessorMixin
from .whisper import WhisperFeatureExtractor

__all__ = [
    "BatchFeature",
    "FeatureExtractionMixin",
    "ProcessorMixin",
    "SequenceFeatureExtractor",
    "WhisperFeatureExtractor",
]
