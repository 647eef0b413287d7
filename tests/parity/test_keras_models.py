"""Backbones and audio converters against keras-hub's: the same weights, the same clips.

keras-hub is a reference of this test only; what is left out differs on purpose (see `audiomm.presets`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm import presets
from audiomm.feature_extraction.usm import Gemma4AudioFeatureExtractor

# keras turns torch's tensors into arrays in a way that numpy warns of.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

GEMMA3N = {
    "feature_size": 64, "sampling_rate": 16_000, "padding_value": 0.0, "return_attention_mask": True,
    "frame_length_ms": 32.0, "hop_length_ms": 10.0, "min_frequency": 125.0, "max_frequency": 7600.0,
    "preemphasis": 0.97, "preemphasis_htk_flavor": True, "fft_overdrive": True, "dither": 0.0,
    "input_scale_factor": 1.0, "mel_floor": 1e-5, "per_bin_mean": None, "per_bin_stddev": None, "padding_side": "right",
}  # fmt: skip


@pytest.fixture(scope="module")
def keras_hub() -> Any:
    """The reference package; without it the test is skipped."""
    return pytest.importorskip("keras_hub")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["per-layer", "dense", "experts"])
def test_a_folder_of_gemma4_is_the_same_model_in_both(
    keras_hub: Any, gemmas: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Theirs takes 128 bands and no other number.
    monkeypatch.setitem(gemmas._SIZES_4.SOUND, "subsampling_conv_channels", [128, 4])
    processor = gemmas.processor_4()
    processor.feature_extractor = Gemma4AudioFeatureExtractor()
    gemmas.gemma4_model(processor, kind).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = presets.Gemma4Backbone.from_preset(tmp_path).eval()
    theirs = keras_hub.models.Gemma4Backbone.from_preset(str(tmp_path))
    options = {"sequence_length": 120, "max_images_per_prompt": 1, "num_vision_tokens_per_image": 70}
    preprocessor = presets.Gemma4CausalLMPreprocessor.from_preset(tmp_path, **options)
    images = np.random.default_rng(0).integers(0, 256, (2, 84, 120, 3)).astype(np.uint8)
    for mark, media in (("", {}), ("<|image|>", {"images": images}), ("<|audio|>", {"audio": noise(2, 16_000)})):
        batch = {"prompts": [f"the {mark} hello", f"{mark} he"], "responses": ["the hello", "o"], **media}
        x = preprocessor(batch)[0]
        call = {"input_ids": x["token_ids"], "attention_mask": x["padding_mask"].long()}
        if "images" in media:
            call |= {"pixel_values": x["pixel_values"][:, 0], "image_position_ids": x["pixel_position_ids"][:, 0]}
        if "audio" in media:
            call |= {"input_features": x["audio_mel"][:, 0], "input_features_mask": x["audio_mel_mask"][:, 0]}
        if kind != "per-layer":
            call["mm_token_type_ids"] = x["vision_mask"].long() + 3 * x["audio_mask"].long()
        wanted = theirs({name: value.numpy() for name, value in x.items()}, training=False)
        with torch.no_grad():
            found = ours(**call).last_hidden_state
        real = x["padding_mask"]
        assert torch.allclose(found[real], torch.as_tensor(wanted)[real], atol=1e-3), mark


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        ({}, {}),
        ({"padding_side": "left", "padding_value": 0.5}, {"max_length": 9000, "padding": "max_length"}),
        ({"sampling_rate": 8000, "max_frequency": 3800.0, "fft_overdrive": False}, {"pad_to_multiple_of": None}),
        ({"preemphasis": 0.0, "input_scale_factor": 32768.0, "hop_length_ms": 12.5}, {"padding": False}),
        ({"per_bin_mean": [0.5] * 64, "per_bin_stddev": [2.0] * 64}, {"max_length": 5000}),
    ],
)
@pytest.mark.parametrize("shape", [(7000,), (2, 7000)])
def test_clips_become_the_same_frames_of_gemma3n(
    keras_hub: Any, settings: dict[str, Any], call: dict[str, Any], shape: tuple[int, ...]
) -> None:
    features, mask = presets.Gemma3nAudioConverter(**{**GEMMA3N, **settings})(noise(*shape), **call)
    wanted = keras_hub.layers.Gemma3nAudioConverter(**{**GEMMA3N, **settings})(noise(*shape), **call)
    frames = features.shape[-2]
    expected, expected_mask = (np.asarray(part) for part in wanted)
    # Theirs has one frame more where the padded length is a frame and a whole number of steps.
    assert expected.shape[-2] - frames in (0, 1) and features.dim() == expected.ndim
    assert np.allclose(features.numpy(), expected[..., :frames, :], atol=0.02)
    assert np.array_equal(mask.numpy(), expected_mask[..., :frames])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("WhisperAudioConverter", {"max_audio_length": 2}),
        ("WhisperAudioConverter", {"num_mels": 128, "max_audio_length": 1, "stride": 200, "num_fft_bins": 512}),
        ("Gemma4AudioConverter", {"max_audio_length": 2, "mel_floor": 1e-3}),
        ("Gemma4AudioConverter", {"max_audio_length": 1, "num_mels": 40, "frame_length": 400, "stride": 100}),
    ],
)
@pytest.mark.parametrize("shape", [(20_001,), (2, 9000)])
def test_clips_become_the_same_windows(
    keras_hub: Any, name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    ours, theirs = getattr(presets, name)(**settings), getattr(keras_hub.layers, name)(**settings)
    found, wanted = ours(noise(*shape)).numpy(), np.asarray(theirs(noise(*shape)))
    assert found.shape == wanted.shape and np.allclose(found, wanted, atol=5e-3)
    own = {key: value for key, value in theirs.get_config().items() if key not in ("name", "trainable", "dtype")}
    assert ours.get_config() == own
