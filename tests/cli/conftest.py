"""Sound files, and a pipeline for the commands that hears one segment in each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from audiomm.base.transcript import Segment, Transcript, Word
from audiomm.cli import models
from audiomm.media.audio import load_audio

RATE = 16000


class FakePipeline:
    """Hears " Grüße" from 0.5 s to the end; remembers its calls."""

    def __init__(self, multilingual: bool = True) -> None:
        self.model = SimpleNamespace(
            generation_config=SimpleNamespace(is_multilingual=multilingual), config=SimpleNamespace(vocab_size=51865)
        )
        self.feature_extractor = SimpleNamespace(sampling_rate=RATE)
        self.tokenizer = SimpleNamespace(timestamp_begin=100, decode=lambda tokens, **_: "".join(map(chr, tokens)))
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.loaded_with: dict[str, Any] = {}

    def transcribe(self, inputs: Any, **kwargs: Any) -> Any:
        self.calls.append((inputs, kwargs))
        if isinstance(inputs, Iterator):
            return (replace(self._one(one["array"], kwargs), extra={"number": one["number"]}) for one in inputs)
        return self._one(inputs, kwargs)

    @staticmethod
    def _one(audio: Any, kwargs: dict[str, Any]) -> Transcript:
        duration = len(load_audio(audio)) / RATE
        words = (Word(" Grüße", 0.5, duration),) if kwargs["return_timestamps"] == "word" else None
        return Transcript(" Grüße", (Segment(" Grüße", 0.5, duration, words=words),), "de", duration)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    pipe = FakePipeline()

    def load(task: str, **kwargs: Any) -> FakePipeline:
        assert task == "automatic-speech-recognition"
        pipe.loaded_with = kwargs
        return pipe

    monkeypatch.setattr(models, "pipeline", load)
    return pipe


@pytest.fixture
def wav(tmp_path: Path) -> str:
    return make_wav(tmp_path / "talk.wav", 1.25)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    path = tmp_path / "broken.wav"
    path.write_text("this is not audio")
    return str(path)


@pytest.fixture
def make_wav_file(tmp_path: Path) -> Any:
    return lambda name, seconds=1.0: make_wav(tmp_path / name, seconds)


def make_wav(path: Path, seconds: float) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(round(seconds * RATE)) / 9).astype(np.float32) / 2, RATE)
    return str(path)
