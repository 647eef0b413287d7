"""Tiny random Gemma 4 models in which every weight matters, and prompts of text, pictures and sound for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audiomm.models.gemma4 import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}
KINDS = {
    "dense": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING] * 3 + [FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "per-layer": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "experts": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}


@torch.no_grad()
def widen(model, seed=0):
    """Random weights at which all parts count."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2:
            is_table = "embed_tokens" in name
            tensor.copy_(noise * (0.15 if is_table else 1.2 / tensor.shape[-1] ** 0.5))
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.2 * noise)
    return model.eval()


def make(kind, **overrides):
    return widen(Gemma4ForCausalLM(Gemma4TextConfig(**{**TEXT, **KINDS[kind], **overrides})))


def tokens(rows=2, length=20, seed=1):
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


#: Ids of the media's marks.
IMAGE, VIDEO, AUDIO = 90, 91, 92
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO, "boi_token_id": 93,
         "eoi_token_id": 94, "boa_token_id": 95, "eoa_token_index": 89}  # fmt: skip
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3,
          "num_key_value_heads": 3, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}  # fmt: skip
SOUND = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "subsampling_conv_channels": [32, 4],
         "attention_chunk_size": 6, "attention_context_left": 7, "output_proj_dims": 20}  # fmt: skip


def whole(kind: str, **overrides: Any) -> Gemma4ForConditionalGeneration:
    """A model with eyes and ears on one of the text stacks."""
    text = {**TEXT, **KINDS[kind], **overrides}
    config = Gemma4Config(text_config=text, vision_config=VISION, audio_config=SOUND, **MARKS)
    return widen(Gemma4ForConditionalGeneration(config))


def unified() -> Gemma4UnifiedForConditionalGeneration:
    text = {name: value for name, value in TEXT.items() if "per_layer" not in name} | KINDS["dense"]
    sizes = {"patch_size": 4, "mm_embed_dim": 24, "mm_posemb_size": 10, "output_proj_dims": 24}
    config = Gemma4UnifiedConfig(text_config=text, vision_config=sizes, audio_config={"audio_embed_dim": 20}, **MARKS)
    return widen(Gemma4UnifiedForConditionalGeneration(config))


def grid(columns: int, rows: int, room: int) -> torch.Tensor:
    """(room, 2) column and row of each patch of a grid, -1 behind it."""
    places = [[column, row] for row in range(rows) for column in range(columns)]
    return torch.tensor(places + [[-1, -1]] * (room - len(places)))


def media(kind: str = "towers") -> dict[str, torch.Tensor]:
    """Two images of 2 and 4 tokens, one video of two frames of 2, two clips of 6 and 4 tokens."""
    generator = torch.Generator().manual_seed(5)
    if kind == "unified":
        room, values, cells = 4, 3 * 12 * 12, [(2, 1), (2, 2)]
        features, real = torch.randn(2, 6, 20, generator=generator), torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool()
    else:
        room, values, cells = 36, 3 * 4 * 4, [(6, 3), (6, 6)]
        features, real = (
            torch.randn(2, 24, 32, generator=generator),
            torch.tensor([[1] * 24, [1] * 16 + [0] * 8]).bool(),
        )
    return {
        "pixel_values": torch.rand(2, room, values, generator=generator),
        "image_position_ids": torch.stack([grid(*cell, room) for cell in cells]),
        "pixel_values_videos": torch.rand(2, room, values, generator=generator),
        "video_position_ids": torch.stack([grid(*cells[0], room)] * 2),
        "num_frames_per_video": torch.tensor([2]),
        "input_features": features,
        "input_features_mask": real,
    }


def prompt() -> dict[str, torch.Tensor]:
    """Two rows of 27 tokens: an image, a clip and a video; and a larger image and a shorter clip behind padding."""
    first = [
        2,
        5,
        93,
        *[IMAGE] * 2,
        94,
        7,
        95,
        *[AUDIO] * 6,
        89,
        9,
        93,
        VIDEO,
        VIDEO,
        94,
        8,
        93,
        VIDEO,
        VIDEO,
        94,
        3,
        4,
    ]
    second = [2, 93, *[IMAGE] * 4, 94, 11, 12, 95, *[AUDIO] * 4, 89, 6, 7]
    gap = len(first) - len(second)
    ids = torch.tensor([first, [0] * gap + second])
    types = (ids == IMAGE) * 1 + (ids == VIDEO) * 2 + (ids == AUDIO) * 3
    mask = torch.tensor([[1] * len(first), [0] * gap + [1] * len(second)])
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Makers of models and inputs, and the sizes they are made of."""
    return SimpleNamespace(
        TEXT=TEXT, KINDS=KINDS, make=make, widen=widen, tokens=tokens, whole=whole, unified=unified, media=media,
        prompt=prompt,
    )  # fmt: skip
