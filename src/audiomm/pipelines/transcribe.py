"""audiomm.transcribe(): one call from audio to a Transcript, with the defaults of openai-whisper."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..base.errors import InputError
from . import pipeline


def transcribe(
    audio: Any,
    model: Any = None,
    *,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Transcribe recordings.

        audiomm.transcribe("talk.mp3").text

    Args:
        audio: A path, bytes, an open file, samples at 16 kHz, a dict of "array" and "sampling_rate", or a list of
            those.
        model: A folder, a hub id, the name of a bundled model, or a model; None is the bundled one. To transcribe more
            than once load it once: `WhisperForConditionalGeneration.from_pretrained(...).transcribe(...)`.
        device: Where to run; None is the first accelerator or the CPU, and for a model where it is.
        dtype: Of the model; None keeps the checkpoint's.
        **options: Of the model's `transcribe`: task, language, word_timestamps, beam_size, initial_prompt, ...

    Returns:
        A Transcript; a list of them for a list.

    Raises:
        InputError: The model is none that transcribes.
        AudioError: A recording cannot be used.
        GenerationError: Options that do not exist, do not fit together, or do not fit the model.
    """
    if device is None and model is not None and not isinstance(model, (str, os.PathLike)):
        device = getattr(model, "device", None)
    pipe = pipeline("automatic-speech-recognition", model=model, device=device, dtype=dtype)
    if not hasattr(pipe.model, "transcribe"):
        raise InputError(
            f"model is a {type(pipe.model).__name__}, which has no transcribe(); use "
            "pipeline('automatic-speech-recognition', model=...)."
        )
    # The pipeline holds a tokenizer and a feature extractor, as a processor does.
    return pipe.model.transcribe(audio, **{"processor": pipe, **options})
