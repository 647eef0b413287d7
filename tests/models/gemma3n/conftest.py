"""Tiny random Gemma 3n models in which every weight matters, and prompts of text, pictures and sound for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from audiomm.models.gemma3n import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
)

#: Ids: text below 250, then the marks around media, then the media's own 16 + 16.
IMAGE, AUDIO, VOCABULARY = 257, 273, 288
#: Places of a picture and of a clip.
PLACES = 4

TEXT = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": 256, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6,
    "max_position_embeddings": 256, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 3, "laurel_rank": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
    "activation_sparsity_pattern": [0.9] + [0.0] * 5,
}  # fmt: skip
AUDIO_SIZES = {
    "vocab_size": 16, "vocab_offset": 272, "input_feat_size": 16, "hidden_size": 24, "conf_attention_chunk_size": 6,
    "conf_attention_context_left": 7, "conf_num_attention_heads": 3, "conf_num_hidden_layers": 1,
    "sscp_conv_channel_size": [6, 4],
}  # fmt: skip


def stage(kind: str, **values: Any) -> dict[str, Any]:
    return {"block_type": kind, "stride": 1, "noskip": False, "se_ratio": 0.0} | values


def residual(channels: int, **values: Any) -> dict[str, Any]:
    sizes = {"exp_ratio": 2.0, "dw_kernel_size_start": 0, "dw_kernel_size_mid": 0, "dw_kernel_size_end": 0}
    return stage("uir", out_chs=channels, **(sizes | values))


#: A vision tower of one block a stage: 32 x 32 pixels are 2 x 2 tokens.
VISION_SIZES = {
    "vocab_size": 16,
    "vocab_offset": 256,
    "model_args": {
        "stem_size": 8,
        "msfa_output_resolution": 2,
        "block_args": [
            [stage("er", out_chs=8, stride=2, exp_kernel_size=3, pw_kernel_size=1, exp_ratio=2.0, force_in_chs=0)],
            [residual(8, stride=2, dw_kernel_size_mid=3)],
            [residual(8, stride=2, dw_kernel_size_mid=3)],
            [residual(16, stride=2, dw_kernel_size_mid=3)],
        ],
    },
}


def whole_config(**overrides: Any) -> Gemma3nConfig:
    values = {
        "text_config": Gemma3nTextConfig(**TEXT),
        "vision_config": Gemma3nVisionConfig(**VISION_SIZES),
        "audio_config": Gemma3nAudioConfig(**AUDIO_SIZES),
        "audio_soft_tokens_per_image": PLACES, "vision_soft_tokens_per_image": PLACES,
        "boi_token_id": 250, "eoi_token_id": 256, "image_token_id": IMAGE,
        "boa_token_id": 251, "eoa_token_id": 272, "audio_token_id": AUDIO,
    }  # fmt: skip
    return Gemma3nConfig(**(values | overrides))


@torch.no_grad()
def scatter(model: torch.nn.Module, seed: int) -> None:
    """Weights that leave nothing out: no norm is one, no scale zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_((0.0 if "per_dim" in name or name.endswith("bias") else 1.0) + 0.3 * noise)


@pytest.fixture(scope="session")
def text_config() -> Callable[..., Gemma3nTextConfig]:
    """Makes configs of a text decoder of six layers, 32 wide, the last three of which share keys and values."""
    return lambda **overrides: Gemma3nTextConfig(**(TEXT | overrides))


@pytest.fixture(scope="session")
def config() -> Callable[..., Gemma3nConfig]:
    """Makes configs of a whole model; its pictures and clips take four places."""
    return whole_config


@pytest.fixture(scope="session")
def text_model() -> Callable[..., Gemma3nForCausalLM]:
    """Makes text models, in eval mode."""

    def make(seed: int = 3, **overrides: Any) -> Gemma3nForCausalLM:
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**(TEXT | overrides))).eval()
        scatter(model, seed)
        return model

    return make


@pytest.fixture
def model() -> Gemma3nForConditionalGeneration:
    """A whole model, in eval mode."""
    made = Gemma3nForConditionalGeneration(whole_config()).eval()
    scatter(made, 5)
    return made


@pytest.fixture(scope="session")
def ids() -> Callable[..., torch.Tensor]:
    """Makes (rows, length) token ids of text."""
    return lambda rows=2, length=15, seed=1: torch.randint(
        3, 250, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def media_prompt(clip_frames: int = 60, seed: int = 2) -> dict[str, torch.Tensor]:
    """One row each of picture then sound, text only (left-padded), and sound alone (left-padded)."""
    generator = torch.Generator().manual_seed(seed)
    image, clip = [250, *[IMAGE] * PLACES, 256], [251, *[AUDIO] * PLACES, 272]
    rows = [[2, 11, *image, 21, *clip, 31, 32], [2, *range(40, 52)], [2, 60, *clip, 61, 62, 63, 64]]
    length = max(map(len, rows))
    padded = [[0] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    valid = torch.ones(2, clip_frames, dtype=torch.bool)
    valid[1, clip_frames - 20 :] = False
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.rand(1, 3, 32, 32, generator=generator),
        "input_features": torch.randn(2, clip_frames, AUDIO_SIZES["input_feat_size"], generator=generator),
        "input_features_mask": valid,
    }


@pytest.fixture
def prompt() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes a batch of three rows with different media."""
    return media_prompt
