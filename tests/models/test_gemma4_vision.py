"""The vision tower of Gemma 4: pictures of every shape, in any batch and order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audiomm.base.errors import ShapeError
from audiomm.feature_extraction.image import Gemma4ImageProcessor
from audiomm.models.gemma4.config import Gemma4VisionConfig
from audiomm.models.gemma4.vision import Gemma4VisionModel

TINY = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64}  # fmt: skip


def tower(**overrides: Any) -> Gemma4VisionModel:
    """A small tower in which every weight and every bound matters."""
    model = Gemma4VisionModel(Gemma4VisionConfig(**(TINY | overrides))).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("_min", "_max")):
                tensor.copy_((-1.5 if name.endswith("min") else 1.5) + 0.1 * noise)
            elif "norm" in name or "std_" in name:
                tensor.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            else:
                tensor.copy_(noise if "table" in name else 1.3 * noise / tensor[0].numel() ** 0.5)
    return model


def grid(rows: int, columns: int, length: int | None = None) -> Tensor:
    """(patches, 2) places of a grid, padded to `length`."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack((x, y), -1).reshape(-1, 2)
    return torch.cat((places, torch.full(((length or len(places)) - len(places), 2), -1)))


def patches(count: int, length: int) -> Tensor:
    return torch.rand(count, length, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", [{}, {"use_clipped_linears": True}, {"standardize": True}])
@torch.no_grad()
def test_a_picture_in_a_mixed_batch_is_seen_as_if_alone(options: dict[str, Any]) -> None:
    model = tower(**options)
    shapes = [(6, 9), (9, 6), (3, 3), (6, 9), (3, 18)]
    positions = torch.stack([grid(*shape, 60) for shape in shapes])
    pixels = patches(5, 60)
    together = model(pixels, positions).last_hidden_state
    counts = [rows * columns // 9 for rows, columns in shapes]
    assert together.shape == (sum(counts), 24)
    for index, (part, (rows, columns)) in enumerate(zip(together.split(counts), shapes, strict=True)):
        alone = model(pixels[index : index + 1, : rows * columns], grid(rows, columns)[None])
        assert torch.allclose(part, alone.last_hidden_state, atol=1e-4)


@torch.no_grad()
def test_padding_and_the_order_of_the_patches_change_nothing() -> None:
    model, pixels, positions = tower(), patches(1, 60), grid(6, 9, 60)[None]
    expected = model(pixels, positions).last_hidden_state
    noisy = torch.where(positions[..., :1] >= 0, pixels, torch.full_like(pixels, torch.nan))
    assert torch.equal(model(noisy, positions).last_hidden_state, expected)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(pixels[:, order], positions[:, order]).last_hidden_state, expected)


@torch.no_grad()
def test_where_a_patch_lies_matters_in_both_directions() -> None:
    model, pixels = tower(), patches(1, 54)
    upright = model(pixels, grid(6, 9)[None]).last_hidden_state
    lying = model(pixels, grid(9, 6)[None]).last_hidden_state
    assert not torch.allclose(upright, lying, atol=1e-2)


@torch.no_grad()
def test_soft_tokens_are_averages_of_squares_row_by_row() -> None:
    model = tower(num_hidden_layers=1, standardize=True)
    picture = torch.arange(36.0)[:, None].expand(36, 24)
    y, x = np.divmod(np.arange(36), 6)
    expected = [picture[(y // 3 == row) & (x // 3 == column), 0].mean() for row in range(2) for column in range(2)]
    pooled = model._pooled(picture, 6, 6)
    scaled = (torch.stack(expected)[:, None] * 24**0.5 - model.std_bias) * model.std_scale
    assert torch.allclose(pooled, scaled, atol=1e-3)


@torch.no_grad()
def test_bounds_of_clipped_layers_count() -> None:
    model = tower(use_clipped_linears=True)
    pixels, positions = patches(1, 54), grid(6, 9)[None]
    bounded = model(pixels, positions).last_hidden_state
    for name, tensor in model.state_dict().items():
        if name.endswith(("_min", "_max")):
            tensor.mul_(torch.inf)
    assert not torch.allclose(model(pixels, positions).last_hidden_state, bounded, atol=1e-2)


@torch.no_grad()
def test_what_the_processor_makes_is_read() -> None:
    model = tower()
    images = [np.zeros((60, 133, 3), np.uint8), np.full((150, 41, 3), 255, np.uint8)]
    batch = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)(images, return_tensors="pt")
    soft = model(batch.pixel_values, batch.image_position_ids).last_hidden_state
    assert soft.shape == (int(batch.num_soft_tokens_per_image.sum()), 24)


@torch.no_grad()
def test_eager_attention_and_fused_attention_agree_and_eager_tells_its_weights() -> None:
    model, positions = tower(), torch.stack([grid(6, 9, 54), grid(3, 3, 54)])
    fused = model(patches(2, 54), positions).last_hidden_state
    told = model(patches(2, 54), positions, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(told.last_hidden_state, fused, atol=1e-4)
    assert [tuple(weights.shape) for weights in told.attentions] == [(2, 3, 54, 54)] * 2
    assert torch.allclose(told.attentions[0][1, :, :9, :9].sum(-1), torch.ones(3, 9))
    assert not told.attentions[0][1, :, 9:].any()
    assert [tuple(state.shape) for state in told.hidden_states] == [(2, 54, 24), (2, 54, 24), (7, 24)]
    model.set_attn_implementation("eager")
    assert torch.allclose(model(patches(2, 54), positions).last_hidden_state, fused, atol=1e-4)
    (only,) = model(patches(2, 54), positions, return_dict=False)
    assert torch.allclose(only, fused, atol=1e-4)


@torch.no_grad()
def test_half_precision_stays_finite() -> None:
    model, positions = tower(), grid(6, 9)[None]
    model.patch_embedder.position_embedding_table.mul_(8e3)  # a residual stream near the end of float16's range
    expected = model(patches(1, 54), positions).last_hidden_state
    seen = model.half()(patches(1, 54), positions).last_hidden_state
    assert expected.abs().max() > 65504
    assert seen.dtype == torch.float16 and seen.isfinite().all()


def test_gradients_are_the_same_under_checkpointing() -> None:
    model, positions = tower().train(), grid(6, 9)[None]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(patches(1, 54), positions).last_hidden_state.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
        assert gradient.abs().max() > 0, name


@torch.no_grad()
def test_the_tower_survives_being_saved(tmp_path: Path) -> None:
    model = tower(use_clipped_linears=True, standardize=True)
    model.save_pretrained(tmp_path)
    again = Gemma4VisionModel.from_pretrained(tmp_path)
    assert torch.equal(
        again(patches(1, 54), grid(6, 9)[None]).last_hidden_state,
        model(patches(1, 54), grid(6, 9)[None]).last_hidden_state,
    )


def test_the_published_towers_have_their_weights() -> None:
    large = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
             "head_dim": 72, "intermediate_size": 4304, "standardize": True}  # fmt: skip
    with torch.device("meta"):
        small = Gemma4VisionModel(Gemma4VisionConfig(use_clipped_linears=True))
        big = Gemma4VisionModel(Gemma4VisionConfig(**large))
    assert (small.num_parameters(), len(small.state_dict())) == (167_364_608, 658)
    assert (big.num_parameters(), len(big.state_dict())) == (569_548_080, 355)
    assert small.state_dict()["encoder.layers.15.mlp.down_proj.linear.weight"].shape == (768, 3072)
    assert small.state_dict()["encoder.layers.0.self_attn.q_proj.input_min"].shape == ()


@pytest.mark.parametrize(
    ("pixels", "positions", "message"),
    [
        (torch.zeros(54, 48), grid(6, 9)[None], "Gemma4ImageProcessor makes it"),
        (torch.zeros(1, 54, 47), grid(6, 9)[None], r"\(pictures, patches, 48\) is needed"),
        (torch.zeros(1, 0, 48), torch.zeros(1, 0, 2, dtype=torch.int64), r"\(pictures, patches, 48\) is needed"),
        (torch.zeros(1, 54, 48), grid(6, 9), r"\(1, 54, 2\), a place for every patch"),
        (torch.zeros(1, 54, 48), grid(6, 9)[None] + 60, "goes up to 68; places below 64 are known"),
        (torch.zeros(1, 63, 48), grid(7, 9)[None], "multiples of 3"),
        (torch.zeros(2, 54, 48), torch.stack([grid(6, 9), grid(6, 9) * 0]), "of picture 1 has 54 places"),
        (torch.zeros(1, 54, 48), torch.full((1, 54, 2), -1), "has 0 places"),
    ],
)
def test_wrong_inputs_are_refused(pixels: Tensor, positions: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        tower()(pixels, positions)
