"""keras-hub's doors: names that lead to the hub's checkpoints, and Whisper's backbone under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm import presets
from audiomm.base.errors import CheckpointNotFoundError, InputError, ShapeError
from audiomm.base.presets import PRESETS, hub_id_of
from audiomm.feature_extraction.usm import Gemma4AudioFeatureExtractor
from audiomm.feature_extraction.whisper import WhisperFeatureExtractor
from audiomm.models.whisper.config import WhisperConfig
from audiomm.models.whisper.modeling import WhisperModel

SIZES = {
    "vocabulary_size": 60, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24, "num_mels": 8,
    "max_encoder_sequence_length": 40, "max_decoder_sequence_length": 12,
}  # fmt: skip


@pytest.fixture
def backbone() -> presets.WhisperBackbone:
    return presets.WhisperBackbone(**SIZES).eval()


def inputs(frames: int = 40, tokens: int = 5) -> dict[str, Any]:
    features = np.random.default_rng(0).normal(size=(2, frames, 8)).astype(np.float32)
    return {"encoder_features": features, "decoder_token_ids": np.arange(2 * tokens).reshape(2, tokens)}


def test_the_names_of_all_three_families_are_known() -> None:
    assert hub_id_of("whisper_tiny_en") == "openai/whisper-tiny.en"
    assert hub_id_of("whisper_large_multi_v2") == "openai/whisper-large-v2"
    assert hub_id_of("gemma3n_e2b_it") == "google/gemma-3n-E2B-it"
    assert hub_id_of("gemma4_instruct_26b_a4b") == "google/gemma-4-26B-A4B-it"
    assert hub_id_of("gemma4_31b", ("gemma4",)) == "google/gemma-4-31B"
    assert hub_id_of("hf://openai/whisper-base") == "openai/whisper-base"
    assert hub_id_of("gemma4_instruct_4b_assistant") == "google/gemma-4-E4B-it-assistant"
    assert len(PRESETS) == 26


def test_a_class_lists_the_presets_of_its_family() -> None:
    assert len(presets.WhisperBackbone.presets) == 10
    assert presets.Gemma4Backbone.presets["gemma4_2b"]["hub_id"] == "google/gemma-4-E2B"
    assert set(presets.Backbone.presets) == set(PRESETS)
    assert "gemma3n_e4b" in presets.CausalLM.presets and "whisper_tiny_en" not in presets.CausalLM.presets


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("whisper_tiny", "no preset 'whisper_tiny'.*Did you mean 'whisper_tiny_"),
        ("gemma4_2b", "'gemma4_2b' is a preset of gemma4, but one of whisper is needed"),
        ("kaggle://keras/whisper/keras/whisper_tiny_en/3", "own form are not read"),
    ],
)
def test_names_that_lead_nowhere_are_told(name: str, words: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=words):
        presets.WhisperBackbone.from_preset(name)


def test_doors_are_not_built() -> None:
    for door in (presets.Backbone, presets.AudioConverter, presets.Gemma4Tokenizer):
        with pytest.raises(TypeError, match="from_preset"):
            door()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Whisper's folder."""
    config = WhisperConfig(
        vocab_size=60, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_goes_through_every_door(checkpoint: Path) -> None:
    model = presets.Backbone.from_preset(checkpoint)
    assert type(model) is WhisperModel
    fresh = presets.Backbone.from_preset(checkpoint, load_weights=False)
    assert fresh.config == model.config
    assert not torch.equal(fresh.encoder.conv1.weight, model.encoder.conv1.weight)
    backbone = presets.WhisperBackbone.from_preset(checkpoint)
    assert torch.equal(backbone.model.encoder.conv1.weight, model.encoder.conv1.weight)
    converter = presets.AudioConverter.from_preset(checkpoint, max_audio_length=2)
    assert isinstance(converter, presets.WhisperAudioConverter) and converter.num_mels == 8


@pytest.mark.parametrize(
    "door",
    ["Gemma4Backbone", "Gemma3nCausalLM", "Gemma4Tokenizer", "Gemma4ImageConverter", "Gemma4VideoConverter",
     "Gemma4CausalLMPreprocessor", "Gemma3nAudioConverter", "Gemma4AudioConverter", "Gemma3nTokenizer"],
)  # fmt: skip
def test_a_folder_of_another_family_is_refused(checkpoint: Path, door: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is a checkpoint of whisper, but one of gemma"):
        getattr(presets, door).from_preset(checkpoint)


@pytest.mark.parametrize("door", ["WhisperBackbone", "Backbone", "AudioConverter", "WhisperAudioConverter"])
def test_a_folder_in_keras_hubs_own_form_is_told(tmp_path: Path, door: str) -> None:
    config = {"class_name": "WhisperBackbone", "registered_name": "keras_hub>WhisperBackbone", "config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointNotFoundError, match="keras-hub's own form are not read"):
        getattr(presets, door).from_preset(tmp_path)


def test_the_converter_is_that_of_the_family(tmp_path: Path) -> None:
    Gemma4AudioFeatureExtractor(feature_size=16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma4"}')
    converter = presets.AudioConverter.from_preset(tmp_path)
    assert isinstance(converter, presets.Gemma4AudioConverter) and converter.num_mels == 16
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_text"}')
    with pytest.raises(InputError, match="family 'gemma4_text'"):
        presets.AudioConverter.from_preset(tmp_path)
    assert set(presets.Gemma3nAudioConverter.presets) == {name for name in PRESETS if name.startswith("gemma3n")}
    with pytest.raises(CheckpointNotFoundError, match="preset of whisper"):
        presets.Gemma4AudioConverter.from_preset("whisper_tiny_en")


def test_the_backbone_is_the_model_under_other_names(backbone: presets.WhisperBackbone) -> None:
    given = inputs()
    out = backbone(given)
    features = torch.from_numpy(given["encoder_features"]).transpose(1, 2)
    same = backbone.model(input_features=features, decoder_input_ids=torch.from_numpy(given["decoder_token_ids"]))
    torch.testing.assert_close(out["encoder_sequence_output"], same.encoder_last_hidden_state)
    torch.testing.assert_close(out["decoder_sequence_output"], same.last_hidden_state)


def test_the_backbone_takes_any_number_of_frames_and_a_mask(backbone: presets.WhisperBackbone) -> None:
    out = backbone(inputs(frames=12))
    assert out["encoder_sequence_output"].shape == (2, 6, 16)
    masked = backbone({**inputs(frames=12), "decoder_padding_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]})
    torch.testing.assert_close(masked["decoder_sequence_output"][:, :4], out["decoder_sequence_output"][:, :4])


@pytest.mark.parametrize("shape", [(2, 42, 8), (2, 8, 40), (40, 8)])
def test_features_of_another_shape_are_refused(backbone: presets.WhisperBackbone, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="2 to 40 frames, 8 mel bands"):
        backbone({**inputs(), "encoder_features": np.zeros(shape, np.float32)})


def test_a_missing_input_is_named(backbone: presets.WhisperBackbone) -> None:
    with pytest.raises(InputError, match="needs decoder_token_ids"):
        backbone({"encoder_features": np.zeros((1, 4, 8))})


def test_the_constructors_arguments_come_back(backbone: presets.WhisperBackbone) -> None:
    assert backbone.get_config() == {**SIZES, "dropout": 0.0}
    half = presets.WhisperBackbone(**SIZES, dtype="bfloat16")
    assert half.model.encoder.conv1.weight.dtype == torch.bfloat16
    backbone.model.config.decoder_layers = 1
    with pytest.raises(InputError, match="2 encoder layers and 1 decoder layers"):
        backbone.get_config()
