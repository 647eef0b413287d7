"""Naming what a clip is: the classes of a model with a classification head, likeliest first.

The interface is that of transformers' AudioClassificationPipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import EmptyAudioError, InputError
from .base import Pipeline, batched
from .clips import LOAD_OPTIONS, Clip, read_clip

FUNCTIONS = ("softmax", "sigmoid", "none")

#: Classes named when nobody says how many.
DEFAULT_TOP_K = 5


class AudioClassificationPipeline(Pipeline):
    """Classifies audio clips.

        pipe = pipeline("audio-classification", model="a-fine-tuned-whisper")
        pipe("clip.flac", top_k=3)   # [{"score": 0.93, "label": "en"}, ...]

    Args:
        model: A model with a classification head, like WhisperForAudioClassification.
        feature_extractor: Its feature extractor.
        device: Where to run; None is the first accelerator, or the CPU.
        kwargs: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls.

    Raises:
        InputError: The model has no classes, or the feature extractor is missing.
    """

    task = "audio-classification"

    def __init__(
        self,
        model: Any,
        feature_extractor: Any = None,
        device: int | str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(model, "classifier"):
            raise InputError(
                f"model is a {type(model).__name__}, which names no classes; load it with "
                "AutoModelForAudioClassification."
            )
        super().__init__(model, feature_extractor=feature_extractor, device=device, **kwargs)
        if self.feature_extractor is None:
            raise InputError(f"feature_extractor: {type(model).__name__} needs one; pass feature_extractor=.")

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Classify one input, a list of them, or lazily whatever an iterator gives.

        Args:
            inputs: As for speech recognition: paths, bytes, open files, arrays, dicts of samples and rate.
            batch_size: How many clips go through the model together.
            num_workers: Accepted for compatibility.
            kwargs: top_k: how many classes, likeliest first; 5 unless given, None is all. function_to_apply:
                "softmax" (default), "sigmoid" or "none". channel, layout, max_seconds, on_truncated, allow_urls,
                allowed_hosts: for `load_audio`.

        Returns:
            [{"score", "label"}] for one input; a list or an iterator of those for several. Audio beyond the model's
            window is not heard: pass it in pieces.

        Raises:
            AudioError: An input cannot be used; the message names it.
            InputError: An argument is wrong.
        """
        asked = {**self.call_defaults, **kwargs}
        top_k = asked.pop("top_k", DEFAULT_TOP_K)
        function = asked.pop("function_to_apply", None) or "softmax"
        load_options = {name: asked.pop(name) for name in LOAD_OPTIONS if name in asked}
        if asked:
            raise InputError(f"{sorted(asked)[0]!r} is not an argument of audio classification.")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise InputError(f"top_k={top_k!r}: a whole number of at least 1, or None for all classes, is needed.")
        if function not in FUNCTIONS:
            raise InputError(f"function_to_apply={function!r}: accepted are {', '.join(map(repr, FUNCTIONS))}.")

        def results(stream: Iterator[Any], size: int) -> Iterator[list[dict[str, Any]]]:
            rate = self.feature_extractor.sampling_rate
            clips = (read_clip(item, number, rate, **load_options) for number, item in enumerate(stream))
            for batch in batched(clips, size):
                for scores in _applied(self._scores(batch), function):
                    yield self._named(scores, top_k)

        return self._each(inputs, results, batch_size)

    @torch.no_grad()
    def _scores(self, clips: list[Clip]) -> Tensor:
        """(clips, classes) float32 logits."""
        extractor = self.feature_extractor
        waves: list[np.ndarray] = []
        for clip in clips:
            if not len(clip.samples):
                raise EmptyAudioError(f"{clip.name} holds no samples, so there is nothing to classify.")
            waves.append(clip.samples)
        place = self.device if self.device.type == "cuda" else None
        batch = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt", device=place)
        features = batch["input_features"]
        logits: Tensor = self.model(features.to(self.device, self.dtype)).logits
        return logits.float().cpu()

    def _named(self, scores: Tensor, top_k: int | None) -> list[dict[str, Any]]:
        names = self.model.config.id2label or {index: f"LABEL_{index}" for index in range(len(scores))}
        values, indices = scores.sort(descending=True, stable=True)
        count = len(scores) if top_k is None else min(top_k, len(scores))
        return [
            {"score": score, "label": names[index]}
            for score, index in zip(values[:count].tolist(), indices[:count].tolist(), strict=True)
        ]


def _applied(logits: Tensor, function: str) -> Tensor:
    if function == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if function == "sigmoid" else logits
