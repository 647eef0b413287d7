"""Log-mel features and the extractor's files: the same as the reference's, over random options and lengths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

#: The reference computes in float32 and is up to 4e-5 away from float64 where a bin is quiet; ours is within 1e-6.
CLOSE = 1e-4


def clip(generator: np.random.Generator, samples: int) -> np.ndarray:
    """Tones and noise that come and go."""
    time = np.arange(samples) / 16000
    wave = sum(np.sin(2 * np.pi * generator.uniform(60, 7000) * time + generator.uniform(0, 6)) for _ in range(4))
    envelope = np.interp(time, np.linspace(0, max(time[-1], 1e-3), 9), generator.uniform(0, 1, 9))
    return (0.2 * wave * envelope + 0.01 * generator.standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("seed", range(16))
def test_random_options_give_the_same_features(seed: int, reference: Any) -> None:
    choose = random.Random(seed)
    generator = np.random.default_rng(seed)
    options = {
        "feature_size": choose.choice([80, 128, 40]),
        "chunk_length": choose.choice([3, 5, 30]),
        "hop_length": choose.choice([160, 160, 200]),
        "n_fft": choose.choice([400, 400, 512]),
        "padding_value": choose.choice([0.0, 0.0, 0.1]),
    }
    theirs, ours = reference.WhisperFeatureExtractor(**options), audiomm.WhisperFeatureExtractor(**options)
    lengths = [choose.choice([401, 4000, 16000, 39999, 80000, 100001]) for _ in range(choose.choice([1, 2, 3]))]
    clips = [clip(generator, length) for length in lengths]
    call = {
        "sampling_rate": 16000,
        "return_tensors": "pt",
        "return_attention_mask": True,
        "do_normalize": choose.choice([None, True, False]),
        "padding": choose.choice(["max_length", "longest", True]),
        "truncation": choose.choice([True, True, False]),
        "max_length": choose.choice([None, 32000, 48000]),
        "pad_to_multiple_of": choose.choice([None, 4800]),
    }
    if call["padding"] == "max_length" and not call["truncation"]:
        call["padding"] = "longest"
    given = clips if len(clips) > 1 else clips[0]
    expected, found = theirs(given, **call), ours(given, **call)
    assert expected["input_features"].shape == found["input_features"].shape, (options, call, lengths)
    assert float((expected["input_features"] - found["input_features"]).abs().max()) <= CLOSE, (options, call, lengths)
    frames = found["input_features"].shape[-1]
    assert torch.equal(expected["attention_mask"][:, :frames].int(), found["attention_mask"]), (options, call, lengths)


@pytest.mark.parametrize("samples", [160, 399, 400, 401, 15999, 16000, 16001, 479999, 480000, 480001, 700000])
def test_lengths_around_the_edges_give_the_same_features(samples: int, reference: Any) -> None:
    theirs, ours = reference.WhisperFeatureExtractor(), audiomm.WhisperFeatureExtractor()
    wave = clip(np.random.default_rng(samples), samples)
    for options in ({}, {"truncation": False, "padding": "longest"}):
        if samples <= 200 and options:
            continue
        options |= {"sampling_rate": 16000, "return_tensors": "np"}
        expected, found = (extract(wave, **options) for extract in (theirs, ours))
        assert expected["input_features"].shape == found["input_features"].shape
        assert float(np.abs(expected["input_features"] - found["input_features"]).max()) <= CLOSE


@pytest.mark.parametrize("seed", range(3))
def test_features_are_nearer_to_float64_than_the_references(seed: int, reference: Any) -> None:
    theirs, ours = reference.WhisperFeatureExtractor(), audiomm.WhisperFeatureExtractor()
    wave = clip(np.random.default_rng(seed), 480000)
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(wave).double(), 400, 160, window=window, return_complex=True)
    power = torch.from_numpy(theirs.mel_filters).T @ spectrum[:, :-1].abs() ** 2
    exact = power.clamp(min=1e-10).log10()
    exact = (torch.maximum(exact, exact.max() - 8) + 4) / 4
    errors = [
        float((extract(wave, sampling_rate=16000, return_tensors="pt")["input_features"][0] - exact).abs().max())
        for extract in (theirs, ours)
    ]
    assert errors[1] <= 1e-6
    assert errors[1] <= errors[0]


def test_mel_filters_are_the_same(reference: Any) -> None:
    for bins in (80, 128):
        theirs, ours = (p.WhisperFeatureExtractor(feature_size=bins).mel_filters for p in (reference, audiomm))
        assert theirs.shape == ours.shape
        assert float(np.abs(theirs - ours).max()) <= 1e-12


def test_the_extractors_file_goes_both_ways(reference: Any, tmp_path: Path) -> None:
    options = {"feature_size": 128, "chunk_length": 20, "dither": 0.5, "return_attention_mask": True}
    theirs = reference.WhisperFeatureExtractor(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = audiomm.WhisperFeatureExtractor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = reference.WhisperFeatureExtractor.from_pretrained(tmp_path / "ours")
    for name, value in (options | {"n_samples": 320000, "nb_max_frames": 2000}).items():
        assert getattr(ours, name) == getattr(back, name) == getattr(theirs, name) == value
    first, second = (
        json.loads((tmp_path / side / "preprocessor_config.json").read_text()) for side in ("theirs", "ours")
    )
    assert {key: value for key, value in first.items() if second.get(key) != value} == {}
