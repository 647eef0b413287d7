"""keras-hub's converters: their arguments, what they return, and that they agree with the extractors."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from audiomm.base.errors import ConfigError
from audiomm.feature_extraction import WhisperFeatureExtractor
from audiomm.feature_extraction.audio_converter import (
    Gemma3nAudioConverter,
    Gemma4AudioConverter,
    WhisperAudioConverter,
)
from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor

SETTINGS = {
    "feature_size": 128, "sampling_rate": 16000, "padding_value": 0.0, "return_attention_mask": True,
    "frame_length_ms": 32.0, "hop_length_ms": 10.0, "min_frequency": 125.0, "max_frequency": 7600.0,
    "preemphasis": 0.97, "preemphasis_htk_flavor": True, "fft_overdrive": True, "dither": 0.0,
    "input_scale_factor": 1.0, "mel_floor": 1e-5, "per_bin_mean": None, "per_bin_stddev": None,
    "padding_side": "right",
}  # fmt: skip


def test_gemma3n_has_the_seventeen_arguments_in_their_order_and_no_default():
    parameters = list(inspect.signature(Gemma3nAudioConverter).parameters.values())[:17]
    assert [parameter.name for parameter in parameters] == list(SETTINGS)
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


def test_gemma3n_gives_one_clip_without_a_batch_axis_and_a_batch_with_one(speech):
    converter = Gemma3nAudioConverter(**SETTINGS)
    features, mask = converter(speech)
    wanted = Gemma3nAudioFeatureExtractor()([speech, speech[:9000]], return_tensors="pt")
    assert features.shape == (168, 128) and mask.dtype == torch.int32 and mask.tolist() == [1] * 168
    assert torch.equal(features, wanted["input_features"][0])
    features, mask = converter([speech, speech[:9000]])
    assert torch.equal(features, wanted["input_features"])
    assert torch.equal(mask.bool(), wanted["input_features_mask"])
    assert converter(speech[None], return_attention_mask=False)[1] is None
    assert converter.window.shape == (512,) and converter.mel_filters.shape == (513, 128)


def test_a_seed_makes_the_noise_of_a_clip_its_own(speech):
    converter = Gemma3nAudioConverter(**SETTINGS | {"dither": 0.01, "seed": 3})
    alone, _ = converter(speech)
    batch, _ = converter([speech[:9000], speech])
    assert torch.equal(batch[1], alone)
    other, _ = Gemma3nAudioConverter(**SETTINGS | {"dither": 0.01, "seed": 4})(speech)
    assert not torch.equal(other, alone)


def test_gemma4_always_gives_the_whole_window(speech):
    converter = Gemma4AudioConverter(max_audio_length=3, mel_floor=1e-3)
    features = converter(speech)
    assert features.shape == converter.audio_shape() == (300, 128)
    wanted = Gemma4AudioFeatureExtractor()(speech, return_tensors="pt")
    real = wanted["input_features_mask"][0]
    assert torch.equal(features[: len(real)][real], wanted["input_features"][0][real])
    np.testing.assert_allclose(features[-1], np.log(1e-3), atol=1e-6)
    assert converter([speech, speech[:9000]]).shape == (2, 300, 128)


def test_a_clip_longer_than_the_window_is_cut_with_a_warning(speech, caplog):
    assert Gemma4AudioConverter(max_audio_length=1)(speech).shape == (100, 128)
    assert "27251 samples (1.70 s)" in caplog.text


def test_whisper_gives_time_before_bands(speech):
    converter = WhisperAudioConverter(max_audio_length=2)
    wanted = WhisperFeatureExtractor(chunk_length=2)(speech, return_tensors="pt", sampling_rate=16000)
    assert torch.equal(converter(speech), wanted["input_features"][0].T)
    assert converter([speech, speech[:100]]).shape == (2, *converter.audio_shape()) == (2, 200, 80)


@pytest.mark.parametrize(
    ("converter", "extractor"),
    [
        (Gemma3nAudioConverter(**SETTINGS | {"feature_size": 40}), Gemma3nAudioFeatureExtractor(feature_size=40)),
        (Gemma4AudioConverter(num_mels=40, mel_floor=1e-3), Gemma4AudioFeatureExtractor(feature_size=40)),
        (WhisperAudioConverter(num_mels=40), WhisperFeatureExtractor(feature_size=40)),
    ],
)
def test_configurations_and_presets_give_the_same_converter(converter, extractor, tmp_path):
    again = type(converter).from_config(converter.get_config())
    assert again.get_config() == converter.get_config()
    extractor.save_pretrained(tmp_path)
    preset = type(converter).from_preset(tmp_path)
    assert preset.get_config() == converter.get_config()


def test_what_a_converter_cannot_do_is_refused():
    with pytest.raises(TypeError, match="does not know color"):
        Gemma4AudioConverter(color="red")
    with pytest.raises(ConfigError, match="dtype='float16'"):
        WhisperAudioConverter(dtype="float16")
    with pytest.raises(ConfigError, match="num_fft_bins=500"):
        Gemma4AudioConverter(num_fft_bins=500)
