"""Pictures, videos and the vision towers of Gemma 3n and Gemma 4 beside the reference's, on random weights.

The reference changes sizes with torchvision, to the last bit as is done here, or with Pillow where there is none,
nearly so; it takes its MobileNetV5 from timm.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.feature_extraction import image as images
from audiomm.feature_extraction import video as videos
from audiomm.models.gemma3n.vision import Gemma3nVisionConfig, Gemma3nVisionModel
from audiomm.models.gemma4.vision import Gemma4VisionConfig, Gemma4VisionModel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-4
#: One level. Pillow rounds between the two directions of a resize, so that pixels of noise come out levels apart.
LEVEL = 1.0 / 255


@pytest.fixture(scope="module")
def videos_too(torchvision: Any, reference: Any) -> Any:
    """The reference, able to handle videos."""
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    return reference


@pytest.fixture(scope="module")
def picture_class(torchvision: Any, reference: Any) -> Callable[[str], Any]:
    """Finds the reference's processors of pictures by name, those that use Pillow where there is no torchvision."""

    def find(kind: str) -> Any:
        if torchvision is not None:
            return getattr(reference, kind)
        family = {"SiglipImageProcessor": "siglip", "Gemma4ImageProcessor": "gemma4"}.get(kind)
        if family is None:
            pytest.skip(f"{kind} needs torchvision, which is not installed")
        module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
        return getattr(module, f"{kind}Pil")

    return find


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(ours: Any, reference: Any, level: float = 0.0) -> None:
    """Equal to the last bit; or, with `level`, less than half of it apart in the mean and nowhere ten times."""
    assert set(reference) <= set(ours)
    for name in reference:
        if name != "video_metadata":
            assert ours[name].shape == reference[name].shape, name
            apart = (ours[name] - reference[name]).double().abs()
            assert float(apart.max()) <= 10 * level and float(apart.mean()) <= level / 2, name


# ---------------------------------------------------------------------- pictures and videos


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 64, "width": 64}, "resample": 2, "do_normalize": False},
        {"size": {"height": 96, "width": 48}},
        {"size": {"height": 64, "width": 64}, "do_rescale": False},
        {"size": {"height": 64, "width": 64}, "image_mean": [0.1, 0.4, 0.6], "image_std": [0.2, 0.3, 0.7]},
    ],
)
@pytest.mark.parametrize("shape", [(50, 133), (300, 41), (64, 64), (5, 9)])
def test_pictures_of_one_size_are_bit_equal(
    torchvision: Any, picture_class: Callable[[str], Any], settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    image = picture(*shape)
    ours = images.SiglipImageProcessor(**settings)
    level = LEVEL * (1 if ours.do_rescale else 255) / (min(ours.image_std) if ours.do_normalize else 1)
    expected = picture_class("SiglipImageProcessor")(**settings)(image, return_tensors="pt")
    assert_same(ours(image, return_tensors="pt"), expected, level if torchvision is None else 0.0)


@pytest.mark.parametrize("kind", ["Gemma4ImageProcessor", "Gemma4UnifiedImageProcessor"])
@pytest.mark.parametrize("budget", [70, 280])
def test_patches_are_bit_equal(torchvision: Any, picture_class: Callable[[str], Any], kind: str, budget: int) -> None:
    batch = [picture(50, 133), picture(300, 41), picture(7, 5), picture(1, 190), picture(768, 768)]
    ours = getattr(images, kind)(max_soft_tokens=budget)(batch, return_tensors="pt", input_data_format="channels_last")
    reference = picture_class(kind)(max_soft_tokens=budget)
    expected = reference(batch, return_tensors="pt", input_data_format="channels_last")
    assert_same(ours, expected, LEVEL if torchvision is None else 0.0)


def test_sizes_are_the_reference_s_for_a_thousand_pictures(reference: Any) -> None:
    module = importlib.import_module("transformers.models.gemma4.image_processing_pil_gemma4")
    random = np.random.RandomState(0)
    for budget in images.SOFT_TOKEN_BUDGETS:
        for _ in range(200):
            height, width = (int(2 ** random.uniform(0, 12)) for _ in range(2))
            expected = module.get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
            assert images.aspect_preserving_size(height, width, 16, budget, 3) == tuple(expected), (height, width)


@pytest.mark.parametrize("kind", ["Gemma4VideoProcessor", "Gemma4UnifiedVideoProcessor"])
@pytest.mark.parametrize("settings", [{"num_frames": 4}, {"num_frames": 7}, {"do_sample_frames": False}])
def test_videos_are_bit_equal(videos_too: Any, kind: str, settings: dict[str, Any]) -> None:
    batch = [np.stack([picture(40, 64, seed) for seed in range(11)]), np.stack([picture(90, 30, s) for s in range(8)])]
    told = [{"total_num_frames": 11, "fps": 8.0}, {"total_num_frames": 8, "fps": 3.0}]
    options = {"video_metadata": told, "return_metadata": True, "return_tensors": "pt"}
    ours = getattr(videos, kind)(patch_size=8, **settings)(batch, **options)
    reference = getattr(videos_too, kind)(patch_size=8, **settings)(batch, **options)
    assert_same(ours, reference)
    if "num_frames" in settings:
        for one, other in zip(ours["video_metadata"], reference["video_metadata"], strict=True):
            assert one.frames_indices == other.frames_indices.tolist()
            assert one.timestamps == pytest.approx(other.timestamps)


SETTINGS = {
    "SiglipImageProcessor": {"size": {"height": 32, "width": 48}, "resample": 2},
    "Gemma4ImageProcessor": {"max_soft_tokens": 140, "patch_size": 8},
    "Gemma4VideoProcessor": {"max_soft_tokens": 140, "num_frames": 5},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_read_from_either_side(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "Video" in kind:
        reference_class = getattr(request.getfixturevalue("videos_too"), kind)
    else:
        reference_class = request.getfixturevalue("picture_class")(kind)
    reference = reference_class(**SETTINGS[kind])
    reference.save_pretrained(tmp_path / "there")
    ours = getattr(videos if "Video" in kind else images, kind).from_pretrained(tmp_path / "there")
    expected = {name: value for name, value in ours.to_dict().items() if value is not None}
    assert expected == {
        name: value.removesuffix("Pil") if name == "image_processor_type" else value
        for name, value in json.loads(reference.to_json_string()).items()
    }
    ours.save_pretrained(tmp_path / "here")
    assert reference_class.from_pretrained(tmp_path / "here").to_dict() == reference.to_dict()


# ---------------------------------------------------------------------- Gemma 3n's tower

COMMON = {"act_layer": None, "noskip": False, "se_ratio": 0.0, "stride": 1}
INVERTED = COMMON | {"block_type": "uir", "dw_kernel_size_start": 0, "dw_kernel_size_mid": 0, "dw_kernel_size_end": 0}
EDGE = COMMON | {"block_type": "er", "exp_kernel_size": 3, "pw_kernel_size": 1, "force_in_chs": 0, "out_chs": 16,
                 "exp_ratio": 2.0}  # fmt: skip
ATTENTION = COMMON | {"block_type": "mqa", "dw_kernel_size": 3, "num_heads": 2}
STAGES = [
    [EDGE | {"stride": 2}, EDGE],
    [
        INVERTED | {"out_chs": 24, "stride": 2, "exp_ratio": 6.0, "dw_kernel_size_start": 3, "dw_kernel_size_mid": 5},
        INVERTED | {"out_chs": 24, "exp_ratio": 4.0, "dw_kernel_size_start": 5},
    ],
    [
        INVERTED | {"out_chs": 32, "stride": 2, "exp_ratio": 3.0, "dw_kernel_size_start": 5, "dw_kernel_size_mid": 5},
        INVERTED | {"out_chs": 32, "exp_ratio": 1.0},
        ATTENTION | {"out_chs": 32, "key_dim": 8, "value_dim": 8, "kv_stride": 2},
        INVERTED | {"out_chs": 32, "exp_ratio": 2.0},
    ],
    [
        INVERTED | {"out_chs": 40, "stride": 2, "exp_ratio": 2.0, "dw_kernel_size_start": 5, "dw_kernel_size_mid": 5},
        ATTENTION | {"out_chs": 40, "key_dim": 8, "value_dim": 16, "kv_stride": 1},
        INVERTED | {"out_chs": 40, "exp_ratio": 2.0},
    ],
]


@torch.no_grad()
def randomised(model: torch.nn.Module, seed: int = 3) -> Any:
    """Values at which every weight and every bound matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("_min", "_max")):
            tensor.copy_((2.0 if "input" in name else 3.0) * (-1 if name.endswith("min") else 1) + 0.2 * noise)
        elif name.endswith("gamma"):
            tensor.copy_(0.3 + 0.05 * noise)
        elif "norm" in name or "bn" in name or "std_" in name:
            tensor.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
        elif tensor.dim() < 2 or "table" in name:
            tensor.copy_(0.3 * noise)
        else:
            tensor.copy_(1.3 * noise / tensor[0].numel() ** 0.5)
    return model.eval()


def tower_3n(theirs: Any, **overrides: Any) -> tuple[Any, Gemma3nVisionModel]:
    """The reference's small tower, and ours with its weights."""
    arguments = {"block_args": STAGES, "stem_size": 16, "msfa_output_resolution": 4} | overrides
    # The reference changes the arguments it is given.
    copied = json.loads(json.dumps(arguments))
    reference = randomised(theirs.AutoModel.from_config(theirs.Gemma3nVisionConfig(model_args=copied)))
    ours = Gemma3nVisionModel(Gemma3nVisionConfig(model_args=arguments)).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (100, 76), (256, 128)])
@torch.no_grad()
def test_mobilenet_sees_what_the_reference_sees(timm: Any, reference: Any, size: tuple[int, int]) -> None:
    theirs, ours = tower_3n(reference)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixels, do_pooling=False, output_hidden_states=True)
    seen = ours(pixels, do_pooling=False, output_hidden_states=True)
    assert torch.allclose(seen.last_hidden_state, expected.last_hidden_state, atol=CLOSE)
    for one, other in zip(seen.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(one, other, atol=CLOSE)


def test_the_published_mobilenet_has_the_names_and_shapes_of_the_reference(timm: Any) -> None:
    with torch.device("meta"):
        reference = timm.create_model("mobilenetv5_300m_enc")
        ours = Gemma3nVisionModel(Gemma3nVisionConfig())
    expected = {f"timm_model.{name}": value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected


# ---------------------------------------------------------------------- Gemma 4's tower

TINY_4 = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
          "num_key_value_heads": 3, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64}  # fmt: skip


def grid(rows: int, columns: int, length: int) -> torch.Tensor:
    """(length, 2) places of a grid, padded."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack((x, y), -1).reshape(-1, 2)
    return torch.cat((places, torch.full((length - rows * columns, 2), -1)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@torch.no_grad()
def test_the_tower_of_gemma_4_sees_what_the_reference_sees(
    reference: Any, tmp_path: Path, clipped: bool, standardize: bool, attention: str
) -> None:
    config = reference.Gemma4VisionConfig(**TINY_4, use_clipped_linears=clipped, standardize=standardize)
    module = importlib.import_module("transformers.models.gemma4.modeling_gemma4")
    theirs = randomised(module.Gemma4VisionModel(config))
    theirs.set_attn_implementation(attention)
    theirs.save_pretrained(tmp_path / "there")
    ours = Gemma4VisionModel.from_pretrained(tmp_path / "there", attn_implementation=attention)
    positions = torch.stack([grid(6, 9, 90), grid(9, 6, 90), grid(3, 27, 90), grid(3, 3, 90)])
    pixels = torch.rand(4, 90, 48, generator=torch.Generator().manual_seed(2))
    expected = theirs(pixels, positions, output_hidden_states=True).last_hidden_state
    seen = ours(pixels, positions, output_hidden_states=True)
    assert torch.allclose(seen.last_hidden_state, expected, atol=CLOSE)
    ours.save_pretrained(tmp_path / "here")
    again = module.Gemma4VisionModel.from_pretrained(tmp_path / "here").eval()
    assert torch.allclose(again(pixels, positions).last_hidden_state, expected, atol=CLOSE)


@torch.no_grad()
def test_what_goes_into_the_layers_is_the_reference_s_where_there_are_patches(reference: Any) -> None:
    module = importlib.import_module("transformers.models.gemma4.modeling_gemma4")
    theirs = randomised(module.Gemma4VisionModel(reference.Gemma4VisionConfig(**TINY_4)))
    theirs.set_attn_implementation("eager")
    ours = Gemma4VisionModel(Gemma4VisionConfig(**TINY_4)).eval()
    ours.load_state_dict(theirs.state_dict())
    positions = torch.stack([grid(6, 9, 63), grid(3, 3, 63)])
    pixels = torch.rand(2, 63, 48, generator=torch.Generator().manual_seed(2))
    expected = theirs(pixels, positions, output_hidden_states=True, output_attentions=True)
    seen = ours(pixels, positions, output_hidden_states=True, output_attentions=True)
    for picture_index, count in enumerate((54, 9)):
        for one, other in zip(seen.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
            assert torch.allclose(one[picture_index, :count], other[picture_index, :count], atol=CLOSE)
        for one, other in zip(seen.attentions, expected.attentions, strict=True):
            ours_part = one[picture_index, :, :count, :count]
            assert torch.allclose(ours_part, other[picture_index, :, :count, :count], atol=CLOSE)
    assert torch.equal(seen.hidden_states[-1], seen.last_hidden_state)
