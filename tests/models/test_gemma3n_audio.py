"""Gemma 3n's audio encoder: shapes and names, batches, streams, files, training and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiomm.base.errors import ConfigError, EmptyAudioError, ShapeError
from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor
from audiomm.models.gemma3n.audio import Gemma3nAudioEncoder, Gemma3nStreamingAudioEncoder
from audiomm.models.gemma3n.config import Gemma3nAudioConfig


def config(**overrides) -> Gemma3nAudioConfig:
    values = {
        "hidden_size": 24, "conf_num_hidden_layers": 2, "conf_num_attention_heads": 3, "input_feat_size": 32,
        "sscp_conv_channel_size": (8, 4),
    }  # fmt: skip
    return Gemma3nAudioConfig(**(values | overrides))


@pytest.fixture
def extractor() -> Gemma3nAudioFeatureExtractor:
    return Gemma3nAudioFeatureExtractor(feature_size=32)


@pytest.fixture
def encoder() -> Gemma3nAudioEncoder:
    """Two layers in which every weight matters."""
    model = Gemma3nAudioEncoder(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return model


@pytest.fixture
def sound() -> np.ndarray:
    return (0.1 * np.random.default_rng(1).standard_normal(24_000)).astype(np.float32)


@torch.no_grad()
def encoded(encoder, extractor, clips):
    batch = extractor(clips, return_tensors="pt")
    return encoder(batch["input_features"], ~batch["input_features_mask"])


def test_sixteen_frames_make_a_token_as_the_configuration_says(encoder):
    for frames in (1, 15, 16, 17, 33, 64, 97):
        output = encoder(torch.randn(1, frames, 32))
        assert output.last_hidden_state.shape == (1, encoder.config.audio_tokens(frames), 24)
        assert output.audio_mel_mask.shape == (1, encoder.config.audio_tokens(frames))
        assert not output.audio_mel_mask.any()
    assert list(output) == ["last_hidden_state", "audio_mel_mask"]


def test_the_published_encoder_has_the_published_number_of_weights():
    with torch.device("meta"):
        encoder = Gemma3nAudioEncoder(Gemma3nAudioConfig())
    assert encoder.num_parameters() == 681_348_640
    assert len(encoder.state_dict()) == 269


def test_clips_of_any_length_give_in_a_batch_what_they_give_alone(encoder, extractor, sound):
    lengths = (24_000, 20_837, 513, 641, 1153, 9000, 16_000)
    batch = encoded(encoder, extractor, [sound[:length] for length in lengths])
    for row, length in enumerate(lengths):
        alone = encoded(encoder, extractor, sound[:length])
        tokens = batch.last_hidden_state[row][~batch.audio_mel_mask[row]]
        assert len(tokens) == alone.last_hidden_state.shape[1]
        torch.testing.assert_close(tokens, alone.last_hidden_state[0], atol=2e-5, rtol=0)
        assert not batch.last_hidden_state[row][batch.audio_mel_mask[row]].any()


def test_any_right_padding_of_frames_changes_nothing(encoder, extractor, sound):
    frames = extractor(sound[:5000], return_tensors="pt")["input_features"]
    wanted = encoder(frames).last_hidden_state
    for more in (1, 2, 7, 40):
        padded = torch.nn.functional.pad(frames, (0, 0, 0, more))
        mask = torch.arange(padded.shape[1])[None] >= frames.shape[1]
        output = encoder(padded, mask)
        torch.testing.assert_close(output.last_hidden_state[~output.audio_mel_mask][None], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("piece_ms", [10, 40, 200, 1000])
def test_a_stream_gives_the_tokens_of_the_whole(encoder, extractor, sound, piece_ms):
    whole = encoded(encoder, extractor, sound).last_hidden_state
    stream = Gemma3nStreamingAudioEncoder(encoder, extractor)
    size = 16 * piece_ms
    parts = [stream.push(sound[start : start + size]) for start in range(0, len(sound), size)]
    if piece_ms <= 200:
        assert sum(part.shape[1] for part in parts) >= whole.shape[1] - 2, "tokens come before the end"
    found = torch.cat([*parts, stream.finish()], dim=1)
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_stream_too_short_for_a_frame_says_so(encoder, extractor, sound):
    stream = Gemma3nStreamingAudioEncoder(encoder, extractor)
    assert stream.push(sound[:512]).shape == (1, 0, 24)
    with pytest.raises(EmptyAudioError, match="after 512 samples.*at least 513"):
        stream.finish()


def test_hidden_states_are_what_went_into_each_layer_and_the_result(encoder):
    output = encoder(torch.randn(1, 64, 32), output_hidden_states=True)
    assert [state.shape[1] for state in output.hidden_states] == [16, 16, 4]
    assert output.hidden_states[-1] is output.last_hidden_state


def test_saved_weights_come_back(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = Gemma3nAudioEncoder.from_pretrained(tmp_path)
    frames = torch.randn(1, 40, 32)
    assert torch.equal(again(frames).last_hidden_state, encoder(frames).last_hidden_state)


def test_a_fresh_encoder_starts_as_the_reference_starts():
    weights = Gemma3nAudioEncoder(config(hidden_size=96)).state_dict()
    assert not weights["conformer.0.attention.attn.per_dim_scale"].any()
    assert (weights["subsample_conv_projection.conv_0.norm.weight"] == 1).all()
    assert (weights["conformer.1.norm.weight"] == 1).all()
    assert abs(float(weights["conformer.0.lconv1d.linear_start.weight"].std()) - 0.02) < 0.001


def test_checkpointed_gradients_are_the_plain_ones(encoder):
    frames = torch.randn(2, 40, 32)
    mask = torch.arange(40) >= torch.tensor([[40], [23]])
    encoder.train()
    gradients = []
    for on in (False, True):
        encoder._set_checkpointing(on)
        encoder.zero_grad()
        encoder(frames, mask).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    assert encoder.is_gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_close(encoder, extractor, sound, dtype):
    exact = encoded(encoder, extractor, sound).last_hidden_state
    half = encoded(encoder.to(dtype), extractor, sound).last_hidden_state
    assert half.dtype == dtype and torch.isfinite(half).all()
    error = (half.float() - exact).norm() / exact.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_shapes_that_do_not_fit_are_refused(encoder):
    with pytest.raises(ShapeError, match=r"audio_mel has shape \(1, 40, 80\)"):
        encoder(torch.zeros(1, 40, 80))
    with pytest.raises(ShapeError, match="at least 1 frame"):
        encoder(torch.zeros(1, 0, 32))
    with pytest.raises(ShapeError, match=r"audio_mel_mask has shape \(1, 39\)"):
        encoder(torch.zeros(1, 40, 32), torch.zeros(1, 39, dtype=torch.bool))
    with pytest.raises(ConfigError, match="conf_attention_context_right=1"):
        Gemma3nAudioEncoder(config(conf_attention_context_right=1))
