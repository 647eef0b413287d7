"""Gemma 4's audio tower: shapes and names, batches, streams, bounds, files, training and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audiomm.base.errors import ConfigError, EmptyAudioError, ShapeError
from audiomm.feature_extraction.usm import Gemma4AudioFeatureExtractor
from audiomm.layers.clipped_linear import ClippedLinear
from audiomm.models.gemma4.audio import Gemma4AudioModel, Gemma4StreamingAudioEncoder
from audiomm.models.gemma4.config import Gemma4AudioConfig


def config(**overrides) -> Gemma4AudioConfig:
    values = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "subsampling_conv_channels": [32, 4],
        "output_proj_dims": 20,
    }  # fmt: skip
    return Gemma4AudioConfig(**(values | overrides))


@pytest.fixture
def extractor() -> Gemma4AudioFeatureExtractor:
    return Gemma4AudioFeatureExtractor(feature_size=32)


@pytest.fixture
def tower() -> Gemma4AudioModel:
    """Two layers in which every weight and every bound matters."""
    model = Gemma4AudioModel(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
        for module in model.modules():
            if isinstance(module, ClippedLinear):
                for name, bound in (("input_min", -1.9), ("input_max", 1.7), ("output_min", -1.5), ("output_max", 1.6)):
                    getattr(module, name).fill_(bound)
    return model


@pytest.fixture
def sound() -> np.ndarray:
    return (0.1 * np.random.default_rng(1).standard_normal(24_000)).astype(np.float32)


@torch.no_grad()
def encoded(tower, extractor, clips):
    batch = extractor(clips, return_tensors="pt")
    return tower(batch["input_features"], batch["input_features_mask"])


def test_four_frames_make_a_token_as_the_configuration_says(tower):
    for frames in (1, 2, 3, 4, 5, 8, 9, 41):
        output = tower(torch.randn(1, frames, 32))
        assert output.last_hidden_state.shape == (1, tower.config.audio_tokens(frames), 20)
        assert output.attention_mask.all() and output.attention_mask.shape == (1, tower.config.audio_tokens(frames))
    assert list(output) == ["last_hidden_state", "attention_mask"]


def test_real_tokens_of_a_clip_of_any_length_are_as_many_as_the_configuration_says(tower, extractor, sound):
    for length in (161, 320, 321, 799, 800, 801, 16_000, 23_999):
        output = encoded(tower, extractor, sound[:length])
        frames = (length + 160 - 321) // 160 + 1
        assert int(output.attention_mask.sum()) == tower.config.audio_tokens(frames)


def test_the_published_tower_has_the_published_number_of_weights():
    with torch.device("meta"):
        tower = Gemma4AudioModel(Gemma4AudioConfig())
    assert round(tower.num_parameters() / 1e6, 1) == 304.8
    assert {name.split(".")[0] for name in tower.state_dict()} == {"subsample_conv_projection", "layers", "output_proj"}


def test_clips_of_any_length_give_in_a_batch_what_they_give_alone(tower, extractor, sound):
    lengths = (24_000, 20_837, 161, 641, 1153, 9000, 16_000)
    batch = encoded(tower, extractor, [sound[:length] for length in lengths])
    for row, length in enumerate(lengths):
        alone = encoded(tower, extractor, sound[:length])
        tokens, wanted = (out.last_hidden_state[n][out.attention_mask[n]] for out, n in ((batch, row), (alone, 0)))
        assert len(tokens) == len(wanted)
        torch.testing.assert_close(tokens, wanted, atol=2e-5, rtol=0)


def test_what_lies_in_the_padding_does_not_matter(tower):
    frames = torch.randn(1, 30, 32)
    mask = torch.arange(30)[None] < 17
    wanted = tower(frames[:, :17]).last_hidden_state
    for garbage in (0.0, 1e4):
        output = tower(frames.masked_fill(~mask[:, :, None], garbage), mask.long())
        torch.testing.assert_close(output.last_hidden_state[output.attention_mask][None], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("piece_ms", [10, 40, 200, 1000])
def test_a_stream_gives_the_tokens_of_the_whole(tower, extractor, sound, piece_ms):
    output = encoded(tower, extractor, sound)
    whole = output.last_hidden_state[output.attention_mask]
    stream = Gemma4StreamingAudioEncoder(tower, extractor)
    size = 16 * piece_ms
    parts = [stream.push(sound[start : start + size])[0] for start in range(0, len(sound), size)]
    if piece_ms <= 40:
        assert sum(map(len, parts)) >= len(whole) - 2, "a token comes 30 ms after its own 40 ms"
    found = torch.cat([*parts, stream.finish()[0]])
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_stream_too_short_for_a_frame_says_so(tower, extractor, sound):
    stream = Gemma4StreamingAudioEncoder(tower, extractor)
    assert stream.push(sound[:160]).shape == (1, 0, 20)
    with pytest.raises(EmptyAudioError, match="after 160 samples.*at least 161"):
        stream.finish()


def test_bounds_bind_and_are_open_before_training(tower):
    frames = torch.randn(1, 40, 32)
    bound = tower(frames).last_hidden_state
    for module in tower.modules():
        if isinstance(module, ClippedLinear):
            module.open_bounds()
    assert (tower(frames).last_hidden_state - bound).abs().max() > 0.05
    fresh = Gemma4AudioModel(config())
    assert fresh.layers[0].self_attn.q_proj.input_max.item() == math.inf
    assert not any("input_max" in name for name in Gemma4AudioModel(config(use_clipped_linears=False)).state_dict())


def test_hidden_states_are_what_went_into_each_layer_and_the_result(tower):
    output = tower(torch.randn(1, 40, 32), output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(1, 10, 24), (1, 10, 24), (1, 10, 20)]
    assert output.hidden_states[-1] is output.last_hidden_state


def test_saved_weights_come_back(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    again = Gemma4AudioModel.from_pretrained(tmp_path)
    frames = torch.randn(1, 40, 32)
    assert torch.equal(again(frames).last_hidden_state, tower(frames).last_hidden_state)


def test_checkpointed_gradients_are_the_plain_ones(tower):
    frames = torch.randn(2, 40, 32)
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    tower.train()
    gradients = []
    for on in (False, True):
        tower._set_checkpointing(on)
        tower.zero_grad()
        tower(frames, mask).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
    assert tower.is_gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_close(tower, extractor, sound, dtype):
    exact = encoded(tower, extractor, sound).last_hidden_state
    half = encoded(tower.to(dtype), extractor, sound).last_hidden_state
    assert half.dtype == dtype and torch.isfinite(half).all()
    error = (half.float() - exact).norm() / exact.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_shapes_that_do_not_fit_are_refused(tower):
    with pytest.raises(ShapeError, match=r"input_features has shape \(1, 40, 80\)"):
        tower(torch.zeros(1, 40, 80))
    with pytest.raises(ShapeError, match="at least 1 frame"):
        tower(torch.zeros(1, 0, 32))
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(1, 39\)"):
        tower(torch.zeros(1, 40, 32), torch.ones(1, 39, dtype=torch.bool))
    with pytest.raises(ConfigError, match="attention_context_right=1"):
        Gemma4AudioModel(config(attention_context_right=1))
