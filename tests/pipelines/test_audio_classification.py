"""pipeline("audio-classification"): classes with scores, likeliest first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiomm import EmptyAudioError, InputError, WhisperFeatureExtractor, WhisperForAudioClassification, pipeline

RATE = 16000


@pytest.fixture
def pipe(tiny_whisper_config, tmp_path):
    config = tiny_whisper_config(num_mel_bins=80, max_source_positions=50, id2label={0: "rise", 1: "fall", 2: "hold"})
    torch.manual_seed(2)
    WhisperForAudioClassification(config).save_pretrained(tmp_path)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(tmp_path)
    return pipeline("audio-classification", model=str(tmp_path))


def clip(seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(RATE // 2).astype(np.float32)


def test_scores_are_the_models_softmax_with_its_labels(pipe):
    result = pipe(clip(0))
    assert {one["label"] for one in result} == {"rise", "fall", "hold"}
    assert sum(one["score"] for one in result) == pytest.approx(1, abs=1e-5)
    assert [one["score"] for one in result] == sorted((one["score"] for one in result), reverse=True)
    features = pipe.feature_extractor(clip(0), sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = pipe.model(features).logits.softmax(-1)[0]
    assert {one["label"]: one["score"] for one in result} == pytest.approx(
        {"rise": float(expected[0]), "fall": float(expected[1]), "hold": float(expected[2])}, abs=1e-5
    )


def test_many_inputs_give_what_each_gives_alone(pipe):
    inputs = [clip(seed) for seed in range(3)]
    together = pipe(inputs, batch_size=2, top_k=1)
    lazily = list(pipe(iter(inputs), batch_size=3, top_k=1))
    for one, two, samples in zip(together, lazily, inputs, strict=True):
        alone = pipe({"array": samples, "sampling_rate": RATE}, top_k=1)
        assert len(one) == 1
        assert one[0]["label"] == two[0]["label"] == alone[0]["label"]
        assert one[0]["score"] == pytest.approx(alone[0]["score"], abs=1e-5)


def test_other_functions_and_all_classes(pipe):
    logits = {one["label"]: one["score"] for one in pipe(clip(1), function_to_apply="none", top_k=None)}
    sigmoids = {one["label"]: one["score"] for one in pipe(clip(1), function_to_apply="sigmoid", top_k=None)}
    for label, value in logits.items():
        assert sigmoids[label] == pytest.approx(float(torch.tensor(value).sigmoid()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"function_to_apply": "tanh"}, "'softmax', 'sigmoid', 'none'"),
        ({"colour": 1}, "'colour'"),
    ],
)
def test_wrong_arguments_are_named(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(clip(0), **options)


def test_nothing_to_classify_and_nothing_to_classify_with(pipe, tiny_whisper):
    with pytest.raises(EmptyAudioError, match="holds no samples"):
        pipe(np.zeros(0, np.float32))
    with pytest.raises(InputError, match="names no classes"):
        pipeline("audio-classification", model=tiny_whisper, feature_extractor=pipe.feature_extractor)
    with pytest.raises(InputError, match="has no model of its own"):
        pipeline("audio-classification")
