"""The vision tower of Gemma 3n: MobileNetV5 in every size, dtype and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from audiomm.base.errors import ConfigError, InputError, ShapeError
from audiomm.layers.attention import attend_eager
from audiomm.models.gemma3n.config import Gemma3nVisionConfig
from audiomm.models.gemma3n.vision import Conv2d, Gemma3nVisionModel, MultiQueryAttention

INVERTED = {"block_type": "uir", "stride": 1, "dw_kernel_size_start": 0, "dw_kernel_size_mid": 0, "exp_ratio": 2.0}
ATTENTION = {"block_type": "mqa", "stride": 1, "num_heads": 2, "key_dim": 8, "value_dim": 8}
STAGES = [
    [{"block_type": "er", "out_chs": 16, "stride": 2, "exp_ratio": 2.0}],
    [INVERTED | {"out_chs": 16, "stride": 2, "dw_kernel_size_start": 3, "dw_kernel_size_mid": 5}],
    [
        INVERTED | {"out_chs": 24, "stride": 2, "dw_kernel_size_start": 5, "dw_kernel_size_mid": 5},
        ATTENTION | {"out_chs": 24, "kv_stride": 2},
    ],
    [
        INVERTED | {"out_chs": 32, "stride": 2, "dw_kernel_size_mid": 5},
        ATTENTION | {"out_chs": 32},
        INVERTED | {"out_chs": 32},
    ],
]


def tower(**overrides: Any) -> Gemma3nVisionModel:
    """A small tower in which every weight matters."""
    arguments = {"block_args": STAGES, "stem_size": 16, "msfa_output_resolution": 4} | overrides
    model = Gemma3nVisionModel(Gemma3nVisionConfig(model_args=arguments)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in sorted(model.state_dict().items()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 4:
                weight.copy_(1.2 * noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_((0.0 if name.endswith("bias") else 0.8) + 0.2 * noise)
    return model


def pixels(count: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_published_tower_has_its_294_million_weights() -> None:
    with torch.device("meta"):
        model = Gemma3nVisionModel(Gemma3nVisionConfig())
    weights = model.state_dict()
    assert (len(weights), model.num_parameters()) == (548, 294_126_912)
    shapes = {
        "conv_stem.conv.bias": (64,),
        "blocks.0.2.conv_exp.weight": (512, 128, 3, 3),
        "blocks.1.0.dw_mid.conv.weight": (768, 1, 5, 5),
        "blocks.2.8.pw_exp.conv.weight": (640, 640, 1, 1),
        "blocks.2.35.attn.key.down_conv.weight": (640, 1, 3, 3),
        "blocks.2.36.layer_scale.gamma": (640,),
        "blocks.3.37.attn.query.proj.weight": (1536, 1280, 1, 1),
        "msfa.ffn.pw_exp.conv.weight": (3840, 1920, 1, 1),
        "msfa.norm.weight": (2048,),
    }
    for name, shape in shapes.items():
        assert weights[f"timm_model.{name}"].shape == shape


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (100, 76), (32, 32), (1, 1)])
def test_every_size_of_picture_gives_the_same_number_of_places(size: tuple[int, int]) -> None:
    output = tower()(pixels(2, *size), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 2048, 4, 4)
    assert output.last_hidden_state.isfinite().all()
    first = output.hidden_states[0]
    assert first.shape == (2, 16, -(-size[0] // 2), -(-size[1] // 2)) and len(output.hidden_states) == 5


@torch.no_grad()
def test_a_picture_in_a_batch_is_seen_as_if_alone() -> None:
    model, batch = tower(), pixels(3)
    together = model(batch).last_hidden_state
    for index in range(3):
        assert torch.allclose(model(batch[index : index + 1]).last_hidden_state[0], together[index], atol=1e-4)


@torch.no_grad()
def test_a_convolution_with_a_stride_pads_as_the_checkpoint_was_trained() -> None:
    # One weight marks which neighbour is read: with 3 x 3 on even sizes nothing is added before the first pixel.
    conv = Conv2d(1, 1, 3, 2)
    conv.weight.zero_()
    conv.weight[0, 0, 0, 0] = 1.0
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(image).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]
    odd = torch.arange(25.0).view(1, 1, 5, 5)
    assert conv(odd).flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 6.0, 8.0, 0.0, 16.0, 18.0]


@torch.no_grad()
def test_shared_keys_are_attended_as_by_separate_heads() -> None:
    attention = MultiQueryAttention(24, 24, {"num_heads": 3, "key_dim": 8, "value_dim": 16, "kv_stride": 2})
    hidden = torch.randn(2, 24, 6, 4)
    queries = attention.query(hidden).flatten(2).view(2, 3, 8, 24).transpose(2, 3)
    keys = attention.key(hidden).flatten(2).transpose(1, 2)[:, None]
    values = attention.value(hidden).flatten(2).transpose(1, 2)[:, None]
    seen, _ = attend_eager(queries, keys, values, scale=8**-0.5)
    expected = attention.output(seen.transpose(2, 3).reshape(2, 48, 6, 4))
    assert torch.allclose(attention(hidden), expected, atol=1e-5)


@torch.no_grad()
def test_half_precision_stays_finite_where_its_own_range_would_not_do() -> None:
    model = tower()
    for name, weight in model.state_dict().items():
        if name.endswith("conv_stem.conv.weight") or "conv_exp" in name:
            weight.mul_(6e4).clamp_(-6e4, 6e4)  # the norm behind it takes that back
    batch = pixels()
    expected = model(batch).last_hidden_state
    seen = model.half()(batch).last_hidden_state
    assert seen.dtype == torch.float16 and seen.isfinite().all()
    assert torch.nn.functional.cosine_similarity(seen.float().flatten(), expected.flatten(), 0) > 0.999
    stem = model.timm_model.conv_stem.conv
    plain = torch.nn.functional.conv2d(batch.half(), stem.weight, stem.bias, 2)
    assert not plain.isfinite().all()


@torch.no_grad()
def test_bfloat16_is_near() -> None:
    model, batch = tower(), pixels()
    expected = model(batch).last_hidden_state
    seen = model.bfloat16()(batch).last_hidden_state
    assert seen.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(seen.float().flatten(), expected.flatten(), 0) > 0.99


def test_gradients_are_the_same_under_checkpointing() -> None:
    model = tower().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(pixels()).last_hidden_state.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
        assert gradient.abs().max() > 0, name


@torch.no_grad()
def test_the_tower_loads_from_its_own_files_and_from_a_whole_checkpoint(tmp_path: Path) -> None:
    model, batch = tower(), pixels()
    model.save_pretrained(tmp_path / "alone")
    alone = Gemma3nVisionModel.from_pretrained(tmp_path / "alone")
    assert torch.equal(alone(batch).last_hidden_state, model(batch).last_hidden_state)
    weights = {f"model.vision_tower.{name}": w for name, w in load_file(tmp_path / "alone/model.safetensors").items()}
    weights["model.language_model.norm.weight"] = torch.ones(4)
    (tmp_path / "whole").mkdir()
    save_file(weights, tmp_path / "whole/model.safetensors", metadata={"format": "pt"})
    whole = Gemma3nVisionModel.from_pretrained(tmp_path / "whole", config=model.config)
    assert torch.equal(whole(batch).last_hidden_state, model(batch).last_hidden_state)


@torch.no_grad()
def test_outputs_are_picked_as_in_transformers() -> None:
    model = tower()
    output = model(pixels(), output_hidden_states=[1, -1])
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [(16, 16, 16), (32, 2, 2)]
    (only,) = model(pixels(), return_dict=False)
    assert torch.equal(only, output.last_hidden_state)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64), (1, 64, 64, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\(pictures, 3, height, width\) is needed"):
        tower()(torch.zeros(shape))


def test_what_the_tower_does_not_have_is_refused() -> None:
    for option in ("do_pooling", "output_attentions"):
        with pytest.raises(InputError, match="neither attention weights nor a pooled output"):
            tower()(pixels(), **{option: True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_args": [[{"block_type": "cn", "out_chs": 8}]] * 2}, "block_type must be one of er, uir, mqa"),
        ({"block_args": [[INVERTED | {"out_chs": 8, "se_ratio": 0.25}]] * 2}, "without se_ratio"),
        ({"block_args": [[INVERTED | {"out_chs": 8}]]}, "holds 1 stages"),
        ({"drop_path_rate": 0.1}, "accepted are block_args, stem_size and msfa_output_resolution"),
    ],
)
def test_encoders_that_are_not_built_here_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gemma3nVisionModel(Gemma3nVisionConfig(model_args=arguments))


def test_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size=64: the vision tower gives 2048"):
        Gemma3nVisionModel(Gemma3nVisionConfig(hidden_size=64))
