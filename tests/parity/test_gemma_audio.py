"""What the Gemma models hear: features and audio towers, the same as the reference's, over random settings and lengths.

Batches of unequal clips are compared clip by clip where the reference's own answer depends on the batch (Gemma 3n).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor
from audiomm.models.gemma3n.audio import Gemma3nAudioEncoder
from audiomm.models.gemma3n.config import Gemma3nAudioConfig
from audiomm.models.gemma4.audio import Gemma4AudioModel
from audiomm.models.gemma4.config import Gemma4AudioConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-4
EXTRACTORS = pytest.mark.parametrize("kind", [Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor])


def clip(generator: np.random.Generator, samples: int) -> np.ndarray:
    """Tones and noise that come and go."""
    time = np.arange(samples) / 16000
    wave = sum(np.sin(2 * np.pi * generator.uniform(60, 7000) * time + generator.uniform(0, 6)) for _ in range(4))
    envelope = np.interp(time, np.linspace(0, max(time[-1], 1e-3), 9), generator.uniform(0, 1, 9))
    return (0.1 * wave * envelope + 0.02 * generator.standard_normal(samples)).astype(np.float32)


def random_settings(choose: random.Random) -> dict[str, Any]:
    size = choose.choice([128, 64, 40])
    return {
        "feature_size": size,
        "frame_length_ms": choose.choice([20.0, 25.0, 32.0]),
        "hop_length_ms": choose.choice([10.0, 8.0]),
        "min_frequency": choose.choice([0.0, 125.0]),
        "max_frequency": choose.choice([7600.0, 8000.0]),
        "preemphasis": choose.choice([0.0, 0.9, 0.97]),
        "preemphasis_htk_flavor": choose.choice([True, False]),
        "fft_overdrive": choose.choice([True, False]),
        "input_scale_factor": choose.choice([1.0, 0.5]),
        "mel_floor": choose.choice([1e-5, 1e-3]),
        "per_bin_mean": choose.choice([None, [0.1 * band for band in range(size)]]),
        "per_bin_stddev": choose.choice([None, [1.0 + 0.01 * band for band in range(size)]]),
        "padding_value": choose.choice([0.0, 0.0, 0.01]),
        "padding_side": choose.choice(["right", "right", "left"]),
    }


def random_call(choose: random.Random) -> dict[str, Any]:
    return choose.choice(
        [
            {},
            {"pad_to_multiple_of": None},
            {"pad_to_multiple_of": 1000},
            {"padding": "max_length", "max_length": 20_000},
            {"max_length": 7000},
            {"max_length": 7000, "truncation": False},
        ]
    )


@EXTRACTORS
@pytest.mark.parametrize("seed", range(10))
def test_random_settings_give_the_same_features(kind: Any, seed: int, reference: Any) -> None:
    choose, generator = random.Random(seed), np.random.default_rng(seed)
    settings, call = random_settings(choose), random_call(choose)
    mine, theirs = kind(**settings), getattr(reference, kind.__name__)(**settings)
    sound = clip(generator, choose.randint(2000, 16_000))
    found, wanted = (each([sound], return_tensors="pt", **call) for each in (mine, theirs))
    assert torch.equal(found["input_features_mask"], wanted["input_features_mask"])
    torch.testing.assert_close(found["input_features"], wanted["input_features"], atol=CLOSE, rtol=0)


@EXTRACTORS
@pytest.mark.parametrize("seed", range(3))
def test_batches_give_the_same_features_where_the_padding_counts(kind: Any, seed: int, reference: Any) -> None:
    choose, generator = random.Random(seed), np.random.default_rng(seed)
    settings = random_settings(choose)
    mine, theirs = kind(**settings), getattr(reference, kind.__name__)(**settings)
    mine.batch_invariant = False
    sounds = [clip(generator, choose.randint(1500, 9000)) for _ in range(4)]
    found, wanted = (each(sounds, return_tensors="pt") for each in (mine, theirs))
    assert torch.equal(found["input_features_mask"], wanted["input_features_mask"])
    torch.testing.assert_close(found["input_features"], wanted["input_features"], atol=CLOSE, rtol=0)


@EXTRACTORS
def test_each_reads_the_others_file(kind: Any, reference: Any, tmp_path: Any) -> None:
    settings = {"feature_size": 4, "per_bin_mean": [1.0, 2.0, 3.0, 4.0], "preemphasis": 0.5, "fft_overdrive": True}
    mine, theirs = kind(**settings), getattr(reference, kind.__name__)(**settings)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    sound = clip(np.random.default_rng(0), 5000)
    readers = (kind.from_pretrained(tmp_path / "theirs"), type(theirs).from_pretrained(tmp_path / "mine"))
    found, wanted = (reader([sound], return_tensors="pt")["input_features"] for reader in readers)
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=0)


# ---------------------------------------------------------------------------------------------------------- towers

GEMMA3N = {
    "hidden_size": 48, "conf_num_hidden_layers": 3, "conf_num_attention_heads": 4, "input_feat_size": 32,
    "sscp_conv_channel_size": [8, 4],
}  # fmt: skip
GEMMA4 = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "subsampling_conv_channels": [32, 4],
    "output_proj_dims": 40,
}  # fmt: skip


@torch.no_grad()
def towers(family: str, reference: Any, **overrides: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same random tower here and in the reference; norms, scales and bounds are random too."""
    if family == "gemma3n":
        settings = GEMMA3N | overrides
        mine, theirs = Gemma3nAudioEncoder(Gemma3nAudioConfig(**settings)), reference.Gemma3nAudioConfig(**settings)
        theirs = reference.models.gemma3n.modeling_gemma3n.Gemma3nAudioEncoder(theirs)
    else:
        settings = GEMMA4 | overrides
        mine, theirs = Gemma4AudioModel(Gemma4AudioConfig(**settings)), reference.Gemma4AudioConfig(**settings)
        theirs = reference.models.gemma4.modeling_gemma4.Gemma4AudioModel(theirs)
    generator = torch.Generator().manual_seed(4)
    state = theirs.state_dict()
    for name, weight in state.items():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith(("_min", "_max")):
            state[name] = (1.5 + 0.2 * noise) * (-1 if name.endswith("_min") else 1)
        else:
            state[name] = 0.15 * noise + (1.0 if "norm" in name else 0.0)
    assert set(state) == set(mine.state_dict())
    mine.load_state_dict(state)
    theirs.load_state_dict(state)
    return mine.eval(), theirs.eval()


def arguments(family: str, frames: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    if family == "gemma3n":
        return {"audio_mel": frames, "audio_mel_mask": ~valid}
    return {"input_features": frames, "attention_mask": valid}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma3n", {}),
        ("gemma3n", {"conf_attention_chunk_size": 6, "conf_attention_context_left": 5, "conf_reduction_factor": 2}),
        ("gemma3n", {"gradient_clipping": 1.5, "conf_conv_kernel_size": 3, "conf_attention_logit_cap": 5.0}),
        ("gemma3n", {"sscp_conv_kernel_size": [[5, 3], [3, 3]], "conf_residual_weight": 0.3}),
        ("gemma4", {}),
        ("gemma4", {"use_clipped_linears": False, "attention_logit_cap": 5.0}),
        ("gemma4", {"attention_chunk_size": 8, "attention_context_left": 6}),
        ("gemma4", {"attention_chunk_size": 5, "attention_context_left": 9, "conv_kernel_size": 3}),
        ("gemma4", {"gradient_clipping": 1.5, "residual_weight": 0.3, "rms_norm_eps": 1e-3}),
    ],
)
@torch.no_grad()
def test_towers_give_the_same_tokens(family: str, overrides: dict[str, Any], reference: Any) -> None:
    mine, theirs = towers(family, reference, **overrides)
    for frames, shortest in ((1, 1), (7, 3), (64, 9), (150, 77)):
        features = torch.randn(2, frames, 32)
        call = arguments(family, features, torch.arange(frames) < torch.tensor([[frames], [shortest]]))
        found, wanted = mine(**call), theirs(**call)
        assert list(found) == list(wanted)
        torch.testing.assert_close(found[0], wanted[0], atol=CLOSE, rtol=0)
        assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
@torch.no_grad()
def test_towers_in_bfloat16_are_as_close_to_the_truth_as_the_reference(family: str, reference: Any) -> None:
    mine, theirs = towers(family, reference)
    frames = torch.randn(2, 100, 32)
    call = arguments(family, frames, torch.ones(2, 100, dtype=torch.bool))
    exact = mine(**call)[0]
    errors = [float((tower.bfloat16()(**call)[0].float() - exact).norm() / exact.norm()) for tower in (mine, theirs)]
    assert errors[0] < 1.1 * errors[1] and errors[0] < 0.05


@torch.no_grad()
def test_hidden_states_of_gemma4_are_the_references(reference: Any) -> None:
    mine, theirs = towers("gemma4", reference)
    frames = torch.randn(1, 60, 32)
    found, wanted = mine(frames, output_hidden_states=True), theirs(frames, output_hidden_states=True)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 4
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_gradients_are_the_references(family: str, reference: Any) -> None:
    mine, theirs = towers(family, reference)
    frames = torch.randn(2, 60, 32)
    call = arguments(family, frames, torch.arange(60) < torch.tensor([[60], [31]]))
    weight = torch.randn(1, 1, 40 if family == "gemma4" else 48)
    for tower in (mine, theirs):
        output = tower(**call)
        valid = ~output[1] if family == "gemma3n" else output[1]
        (output[0] * weight)[valid].sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=2e-3, rtol=2e-3, msg=name)
