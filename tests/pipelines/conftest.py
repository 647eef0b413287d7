"""A pipeline whose model says what a test tells it to: everything around the model is real or a few lines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audiomm.pipelines import AutomaticSpeechRecognitionPipeline

RATE = 16000


class FakeExtractor:
    """One bin, a frame each 10 ms that holds the loudest sample; windows of 30 s."""

    sampling_rate = RATE
    chunk_length = 30
    n_samples = 30 * RATE
    hop_length = 160
    nb_max_frames = 3000
    feature_size = 1

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, samples: np.ndarray, *, truncation: bool = True, padding: str = "max_length", **_: Any) -> Any:
        self.calls.append(len(samples))
        frames = len(samples) // 160
        length = 3000 if padding == "max_length" else frames
        features = torch.zeros(1, 1, length)
        peaks = torch.as_tensor(np.array(samples[: frames * 160])).reshape(-1, 160).abs().amax(dim=1)
        features[0, 0, : min(frames, length)] = peaks[:length]
        mask = (torch.arange(length) < frames).int()[None]
        return {"input_features": features, "attention_mask": mask}


class FakeTokenizer:
    """Token n is the word " wn"."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f" w{token}" for token in tokens)

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|en|>": 900, "<|fr|>": 901}[token]

    def _decode_asr(self, outputs: Any, *, return_timestamps: Any, return_language: Any, time_precision: float) -> Any:
        self.merged = outputs
        tokens = [int(token) for output in outputs for token in output["tokens"][0] if token < 900]
        text = self.decode(tokens)
        if return_timestamps == "word":
            times = [float(time) for output in outputs for time in output["token_timestamps"][0]]
            words = [
                {"text": f" w{token}", "timestamp": (time, time + 0.5)}
                for token, time in zip(tokens, times, strict=True)
            ]
            return text, {"chunks": words}
        if return_timestamps:
            return text, {"chunks": [{"text": text, "timestamp": (0.5, None)}]}
        return text, {}


class FakeModel(nn.Module):
    """Hears a segment for each second in which there is sound; its token is the number of that second."""

    def __init__(self, **generation: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="whisper", max_source_positions=1500, vocab_size=51865)
        self.generation_config = SimpleNamespace(**generation)
        self.calls: list[dict[str, Any]] = []

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def generate(self, features: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        self.calls.append({"shape": tuple(features.shape), "lengths": attention_mask.sum(1).tolist(), **kwargs})
        if "monitor_progress" in kwargs:
            kwargs["monitor_progress"](torch.tensor([[0, int(n)] for n in attention_mask.sum(1)]))
        segments = []
        for number in range(features.shape[0]):
            row = features[number : number + 1, :, :][0, 0]
            segments.append([self._segment(second) for second in self._sounds(row)])
        tokens = [[int(token) for segment in row for token in segment["tokens"]] for row in segments]
        longest = max(map(len, tokens))
        sequences = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        return {"sequences": sequences, "segments": segments, "languages": ["fr"] * features.shape[0]}

    def stream_recordings(
        self, features: Any, attention_mask: torch.Tensor, more: Any, batch_size: int, **kwargs: Any
    ) -> Any:
        """As generate() for as many recordings as there is room for, then for the next ones."""
        done = 0
        while done < features.shape[0]:
            while features.shape[0] - done < batch_size and more() is not None:
                pass
            lengths = torch.tensor([len(clip) // 160 for clip in features.clips[done:]])
            rows = torch.cat([features[row : row + 1, :, :] for row in range(done, features.shape[0])])
            found = self.generate(rows, torch.arange(rows.shape[2])[None] < lengths[:, None], **kwargs)
            for place, segments in enumerate(found["segments"]):
                yield done + place, {"segments": segments, "language": found["languages"][place]}
            done += len(rows)

    @staticmethod
    def _sounds(row: torch.Tensor) -> list[int]:
        seconds = row[: len(row) // 100 * 100].reshape(-1, 100).amax(dim=1)
        return (seconds > 0.4).nonzero()[:, 0].tolist()

    @staticmethod
    def _segment(second: int) -> dict[str, Any]:
        return {
            "start": torch.tensor(float(second)),
            "end": torch.tensor(second + 1.0),
            "tokens": torch.tensor([second]),
            "token_timestamps": torch.tensor([second + 0.25]),
            "avg_logprob": -0.25,
        }


def sound(seconds: float, *loud: int) -> np.ndarray:
    """Silence, with sound in the seconds that are named."""
    samples = np.zeros(round(seconds * RATE), dtype=np.float32)
    for second in loud:
        samples[second * RATE : (second + 1) * RATE] = 0.5
    return samples


@pytest.fixture
def make_pipe() -> Any:
    def make(generation: dict[str, Any] | None = None, **kwargs: Any) -> AutomaticSpeechRecognitionPipeline:
        kwargs.setdefault("device", "cpu")
        return AutomaticSpeechRecognitionPipeline(
            FakeModel(**(generation or {})), feature_extractor=FakeExtractor(), tokenizer=FakeTokenizer(), **kwargs
        )

    return make


@pytest.fixture
def pipe(make_pipe: Any) -> AutomaticSpeechRecognitionPipeline:
    return make_pipe()


@pytest.fixture
def make_sound() -> Any:
    return sound
