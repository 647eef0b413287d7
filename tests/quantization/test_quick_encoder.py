"""Whisper's encoder run straight against the walk through its layers, its slow twin."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from audiomm import WhisperModel
from audiomm.models.whisper import encoder_quick
from audiomm.models.whisper.encoder_quick import QuickEncoder


@pytest.fixture
def case(tiny_whisper_config) -> SimpleNamespace:
    config = tiny_whisper_config(d_model=48, encoder_ffn_dim=96, max_source_positions=70, init_std=0.15)
    encoder = WhisperModel(config).eval().encoder
    for weight in encoder.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return SimpleNamespace(encoder=encoder, features=torch.randn(3, 8, 140))


def walked(encoder, features):
    """Through the modules: hidden states are asked for, which the straight run has none of."""
    with torch.no_grad():
        return encoder(features, output_hidden_states=True).last_hidden_state


def straight(encoder, features):
    with torch.no_grad():
        assert isinstance(encoder._quick_encoder(features), QuickEncoder)
        return encoder(features).last_hidden_state


def rounded(encoder):
    from audiomm.layers.quantized import Int8Linear

    encoder = copy.deepcopy(encoder)
    for layer in encoder.layers:
        for parent, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "out_proj")), (layer, ("fc1", "fc2"))):
            for name in names:
                linear = getattr(parent, name)
                made = Int8Linear.empty_like(linear)
                made.take_weight(linear.weight, "cpu", torch.float32)
                if linear.bias is not None:
                    made.bias.data.copy_(linear.bias.data)
                setattr(parent, name, made)
    return encoder


def distance(made, wanted):
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


def test_float32_is_the_same_to_rounding(case):
    assert distance(straight(case.encoder, case.features), walked(case.encoder, case.features)) < 2e-6


def test_bfloat16_is_as_near_to_float32_as_the_walk_is(case):
    exact, coarse = walked(case.encoder, case.features), case.encoder.bfloat16()
    made = straight(coarse, case.features)
    assert made.dtype == torch.bfloat16
    assert distance(made, exact) <= 1.25 * distance(walked(coarse, case.features), exact) + 1e-4


def test_eight_bits_are_as_near_to_float32_as_the_walk_with_exact_attention_is(case):
    exact, coarse = walked(case.encoder, case.features), rounded(case.encoder)
    error = distance(straight(coarse, case.features), exact)
    assert 1e-5 < error <= 1.25 * distance(walked(coarse, case.features), exact)
    assert error < 0.02


def test_heads_of_large_scores_read_exactly(case, monkeypatch):
    with torch.no_grad():
        for layer in case.encoder.layers:
            layer.self_attn.q_proj.weight *= 20.0
            layer.self_attn.k_proj.weight *= 20.0
    exact, coarse = walked(case.encoder, case.features), rounded(case.encoder)
    error = distance(straight(coarse, case.features), exact)
    assert error <= 1.25 * distance(walked(coarse, case.features), exact)
    monkeypatch.setattr(encoder_quick, "_SAFE_EXPONENT", 1e9)
    assert straight(coarse, case.features).isnan().any(), "powers of two of such scores overflow"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_window_comes_out_the_same_bits_in_any_batch(case, kind):
    encoder = rounded(case.encoder) if kind == "int8" else case.encoder.to(getattr(torch, kind))
    together = straight(encoder, case.features)
    assert torch.equal(together[1:2], straight(encoder, case.features[1:2]))
    assert torch.equal(together.flip(0), straight(encoder, case.features.flip(0)))


def test_blocks_shorter_than_a_window_change_nothing_but_rounding(case, monkeypatch):
    for encoder in (case.encoder, rounded(case.encoder)):
        whole = straight(encoder, case.features)
        monkeypatch.setattr(encoder_quick, "_BLOCK", 32)
        assert distance(straight(encoder, case.features), whole) < 5e-3
        monkeypatch.undo()


def test_changed_weights_are_seen(case):
    straight(case.encoder, case.features)
    with torch.no_grad():
        case.encoder.conv1.weight *= 1.5
        case.encoder.layers[1].self_attn.k_proj.weight *= 0.5
        case.encoder.layer_norm.bias += 1.0
    assert distance(straight(case.encoder, case.features), walked(case.encoder, case.features)) < 2e-6
    case.encoder.double().float()
    assert distance(straight(case.encoder, case.features), walked(case.encoder, case.features)) < 2e-6


def test_gradients_adapters_hooks_and_eager_attention_take_the_walk(case):
    features, encoder = case.features, case.encoder
    assert encoder._quick_encoder(features) is None, "the weights may be asked for gradients"
    with torch.no_grad():
        assert encoder._quick_encoder(features) is not None
        handle = encoder.layers[0].fc1.register_forward_hook(lambda module, args, output: output + 1.0)
        assert encoder._quick_encoder(features) is None
        handle.remove()
        assert encoder._quick_encoder(features) is not None
        encoder.set_attn_implementation("eager")
        assert encoder._quick_encoder(features) is None
        encoder.set_attn_implementation("sdpa")
        assert encoder.train()._quick_encoder(features) is None
        assert encoder.eval().half()._quick_encoder(features) is None


def test_other_activations_take_the_walk(tiny_whisper_config):
    encoder = WhisperModel(tiny_whisper_config(activation_function="relu")).eval().encoder
    with torch.no_grad():
        assert encoder._quick_encoder(torch.randn(1, 8, 40)) is None


def test_nothing_of_it_is_saved_or_copied(case, tmp_path):
    before = set(case.encoder.state_dict())
    straight(case.encoder, case.features)
    assert set(case.encoder.state_dict()) == before
    other = copy.deepcopy(case.encoder)
    with torch.no_grad():
        other.layers[0].fc1.weight.zero_()
    assert distance(straight(case.encoder, case.features), walked(case.encoder, case.features)) < 2e-6
    torch.save(case.encoder, tmp_path / "whole.pt")
    back = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(straight(back, case.features), straight(case.encoder, case.features))
