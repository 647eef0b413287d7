"""The pipeline on a small trained Whisper; what transformers answers on it is compared in tests/golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm.pipelines import pipeline


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy(golden: Path) -> Any:
    return pipeline(
        "automatic-speech-recognition",
        model=golden / "checkpoints" / "whisper-toy",
        tokenizer=golden / "tokenizers" / "whisper-multilingual",
        device="cpu",
        num_beams=1,
    )


@pytest.fixture(scope="module")
def long_tones(golden: Path) -> np.ndarray:
    return soundfile.read(golden / "data" / "toy_long.flac", dtype="float32")[0]


def test_times_of_long_audio_are_those_of_its_segments(toy: Any, long_tones: np.ndarray) -> None:
    chunks = toy(long_tones, return_timestamps=True, language="de")["chunks"]
    assert len(chunks) == 28
    assert chunks[20] == {"timestamp": (48.5, 49.5), "text": " my morning"}
    assert chunks[-1] == {"timestamp": (67.5, 69.0), "text": " it!"}
    times = [time for chunk in chunks for time in chunk["timestamp"]]
    assert times == sorted(times)


def test_long_audio_needs_no_timestamps(toy: Any, long_tones: np.ndarray) -> None:
    with_times = toy(long_tones, return_timestamps=True, language="de")
    assert toy(long_tones, language="de") == {"text": with_times["text"]}


def test_samples_that_fill_no_frame_make_no_second_window(toy: Any, long_tones: np.ndarray) -> None:
    window = toy(long_tones[:480_000], language="de")
    assert toy(long_tones[:480_159], language="de") == window
    assert toy(long_tones[:480_160], language="de") != window


def test_a_batch_of_all_lengths_hears_what_each_hears_alone(toy: Any, long_tones: np.ndarray) -> None:
    items = [long_tones[:80000], long_tones, long_tones[:560123], long_tones[:480000]]
    alone = [toy(item, return_timestamps=True, return_language=True) for item in items]
    assert toy(items, batch_size=4, return_timestamps=True, return_language=True) == alone
    assert list(toy(iter(items), batch_size=3, return_timestamps=True, return_language=True)) == alone


def test_no_time_is_beyond_the_end(toy: Any, long_tones: np.ndarray) -> None:
    for seconds in (3.7, 20.0, 33.3):
        transcript = toy.transcribe(long_tones[: round(seconds * 16000)], return_timestamps=True, language="de")
        for segment in transcript.segments:
            assert 0 <= segment.start <= segment.end <= transcript.duration_seconds


def test_five_beams_unless_told_otherwise(long_tones: np.ndarray, toy: Any) -> None:
    beams = pipeline(
        "automatic-speech-recognition",
        model=toy.model,
        tokenizer=toy.tokenizer,
        feature_extractor=toy.feature_extractor,
        device="cpu",
    )
    samples = long_tones[:80000]
    assert beams(samples, language="de") == toy(samples, language="de", num_beams=5)
