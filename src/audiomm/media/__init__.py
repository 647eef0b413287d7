"""The outside world to arrays."""

from .audio import audio_duration, load_audio

__all__ = ["audio_duration", "load_audio"]
