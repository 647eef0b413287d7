"""Features of long recordings that are computed when they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiomm import WhisperFeatureExtractor
from audiomm.pipelines.features import RecordingFeatures

RATE = 16000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80, chunk_length=2)


def recording(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that gets louder and falls silent, so that the loudest value of most stretches is not that of the whole."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(round(seconds * RATE)) * np.linspace(1e-6, 0.3, round(seconds * RATE)) ** 2
    samples[len(samples) // 3 : len(samples) // 2] = 0
    return samples.astype(np.float32)


@pytest.mark.parametrize("seconds", [2.013, 5.0, 7.7712])
def test_a_stretch_has_the_features_that_it_has_in_the_whole(
    extractor: WhisperFeatureExtractor, seconds: float
) -> None:
    samples = recording(seconds)
    whole = extractor(
        samples, sampling_rate=RATE, truncation=False, padding="longest", return_tensors="pt",
        return_attention_mask=True,
    )  # fmt: skip
    features = RecordingFeatures(extractor, [samples], True, CPU, torch.float32)
    assert features.shape == whole["input_features"].shape
    assert torch.equal(features.mask, whole["attention_mask"])
    for start, stop in ((0, 200), (1, 150), (37, 237), (features.shape[2] - 120, features.shape[2]), (0, 10**6)):
        found = features[0:1, :, start:stop]
        torch.testing.assert_close(found, whole["input_features"][:, :, start:stop], atol=2e-6, rtol=0)


def test_rows_do_not_depend_on_each_other_and_end_in_zeros(extractor: WhisperFeatureExtractor) -> None:
    short, long = recording(3.0), recording(5.0, seed=1)
    features = RecordingFeatures(extractor, [short, long], True, CPU, torch.float32)
    alone = RecordingFeatures(extractor, [short], True, CPU, torch.float32)
    assert features.shape == (2, 80, 500)
    assert features.mask.sum(dim=1).tolist() == [300, 500]
    assert torch.equal(features[0:1, :, 100:300], alone[0:1, :, 100:300])
    assert not features[0:1, :, 300:500].any()
    assert features[0:2, :, 250:260].shape == (2, 80, 10)


def test_windows_are_padded_with_silence_as_ever(extractor: WhisperFeatureExtractor) -> None:
    clips = [recording(1.5), recording(2.0), recording(0.123)]
    features = RecordingFeatures(extractor, clips, False, CPU, torch.float32)
    expected = extractor(clips, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    torch.testing.assert_close(features[0:3, :, :], expected["input_features"], atol=1e-6, rtol=0)
    assert torch.equal(features.mask, expected["attention_mask"])


def test_what_is_read_has_the_models_type(extractor: WhisperFeatureExtractor) -> None:
    features = RecordingFeatures(extractor, [recording(3.0)], True, CPU, torch.bfloat16)
    assert features[0:1, :, 0:200].dtype == torch.bfloat16
    assert features.dim() == 3
