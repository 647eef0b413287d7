"""The image processors bring pictures to what the vision towers read, and say so when they cannot."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.errors import CheckpointNotFoundError, ConfigError, ImageError, ImageFileNotFoundError, InputError
from audiomm.feature_extraction.image import (
    SOFT_TOKEN_BUDGETS,
    Gemma4ImageProcessor,
    Gemma4UnifiedImageProcessor,
    SiglipImageProcessor,
    SiglipImageProcessorFast,
    aspect_preserving_size,
    grid_tokens,
    soft_token_count,
)

SIZE = {"height": 64, "width": 48}


def picture(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def gemma3n() -> SiglipImageProcessor:
    return SiglipImageProcessor(SIZE, resample=2, do_normalize=False)


# ---------------------------------------------------------------------- one size


def test_a_picture_comes_out_at_the_size_in_shares_of_white() -> None:
    batch = gemma3n()(picture(), return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 64, 48) and batch.pixel_values.dtype == torch.float32
    levels = batch.pixel_values * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)  # whole levels: the size was changed before the scale
    assert batch.pixel_values.min() >= 0.0 and batch.pixel_values.max() <= 1.0


def test_a_picture_of_that_size_keeps_its_pixels() -> None:
    same = picture(64, 48)
    pixels = gemma3n()(same, return_tensors="pt").pixel_values[0]
    assert torch.equal((pixels * 255).round().to(torch.uint8), torch.from_numpy(same).permute(2, 0, 1))


def test_normalising_follows_mean_and_deviation() -> None:
    plain = gemma3n()(picture(), return_tensors="pt").pixel_values
    mean, deviation = [0.1, 0.4, 0.6], [0.2, 0.3, 0.7]
    normalised = SiglipImageProcessor(SIZE, resample=2, image_mean=mean, image_std=deviation)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    assert torch.allclose(normalised(picture(), return_tensors="pt").pixel_values, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["one", "list", "nested", "four axes", "tensor", "shares of white", "grey"])
def test_every_form_of_pictures_is_read(form: str) -> None:
    one = picture()
    forms = {
        "one": (one, 1),
        "list": ([one, picture(9, 9)], 2),
        "nested": ([[one, one], [], [one]], 3),
        "four axes": (np.stack([one, one]), 2),
        "tensor": (torch.from_numpy(one).permute(2, 0, 1), 1),
        "shares of white": (one / 255, 1),
        "grey": (np.repeat(one[..., :1], 3, -1)[..., 0], 1),
    }
    images, count = forms[form]
    pixels = gemma3n()(images, return_tensors="pt").pixel_values
    assert pixels.shape == (count, 3, 64, 48)
    if form != "grey":
        assert torch.equal(pixels[0], gemma3n()(one, return_tensors="pt").pixel_values[0])


def test_a_batch_is_its_pictures() -> None:
    pictures = [picture(50, 70), picture(200, 31, 1), picture(1, 1, 2)]
    for processor in (gemma3n(), Gemma4ImageProcessor(max_soft_tokens=70)):
        options = {"input_data_format": "channels_last", "return_tensors": "pt"}
        together = processor(pictures, **options)
        for index, image in enumerate(pictures):
            assert torch.equal(together.pixel_values[index], processor(image, **options).pixel_values[0])


def test_floats_that_are_not_rescaled_stay_what_they_are() -> None:
    pixels = np.linspace(-1, 1, 64 * 48 * 3, dtype=np.float32).reshape(64, 48, 3)
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    assert torch.equal(gemma3n()(pixels, **options).pixel_values[0], torch.from_numpy(pixels).permute(2, 0, 1))
    with pytest.raises(ImageError, match="normalised already"):
        gemma3n()(pixels)


def test_results_come_as_tensors_arrays_or_lists() -> None:
    assert isinstance(gemma3n()(picture(), return_tensors="np").pixel_values, np.ndarray)
    rows = gemma3n()([picture(), picture(9, 9)], do_resize=False).pixel_values
    assert [tuple(row.shape) for row in rows] == [(3, 50, 70), (3, 9, 9)]
    with pytest.raises(InputError, match="cannot become one tensor"):
        gemma3n()([picture(), picture(9, 9)], do_resize=False, return_tensors="pt")
    assert SiglipImageProcessorFast is SiglipImageProcessor


# ---------------------------------------------------------------------- patches


def test_sizes_keep_the_shape_within_the_budget() -> None:
    assert aspect_preserving_size(768, 768) == (768, 768)
    assert aspect_preserving_size(3, 900) == (48, 13_440)
    assert aspect_preserving_size(1, 20_000) == (48, 13_440)
    assert aspect_preserving_size(20_000, 1, max_soft_tokens=70) == (70 * 48, 48)
    assert aspect_preserving_size(1, 1, max_soft_tokens=70) == (8 * 48, 8 * 48)
    # The published shares of pictures by shape and budget.
    for shape, counts in {(1, 1): (64, 121, 256, 529, 1089), (3, 4): (63, 130, 266, 540, 1064)}.items():
        sides = (shape[0] * 1000, shape[1] * 1000)
        assert tuple(soft_token_count(*sides, max_soft_tokens=budget) for budget in SOFT_TOKEN_BUDGETS) == counts
    assert grid_tokens(48, 13_440, 48) == 280
    with pytest.raises(ImageError, match="has none"):
        aspect_preserving_size(0, 5)
    with pytest.raises(InputError, match="both must be multiples of 48"):
        grid_tokens(50, 96, 48)


@pytest.mark.parametrize("budget", SOFT_TOKEN_BUDGETS)
def test_no_size_breaks_the_budget(budget: int) -> None:
    random = np.random.RandomState(0)
    for _ in range(300):
        height, width = (int(2 ** random.uniform(0, 14)) for _ in range(2))
        rows, columns = aspect_preserving_size(height, width, max_soft_tokens=budget)
        assert rows % 48 == columns % 48 == 0
        assert 1 <= rows * columns // 48**2 <= budget


def test_patches_put_together_are_the_picture() -> None:
    processor = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
    image = picture(48, 72)
    batch = processor(image, do_resize=False, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 630, 48) and batch.num_soft_tokens_per_image.tolist() == [24]
    together = torch.zeros(48, 72, 3)
    for patch, (x, y) in zip(batch.pixel_values[0], batch.image_position_ids[0].tolist(), strict=True):
        if x >= 0:
            together[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = patch.view(4, 4, 3)
    assert torch.equal((together * 255).round().to(torch.uint8), torch.from_numpy(image))
    real = (batch.image_position_ids[0] >= 0).all(-1)
    assert int(real.sum()) == 12 * 18 and not batch.pixel_values[0][~real].any()
    assert (batch.image_position_ids[0][~real] == -1).all()


def test_the_budget_can_be_set_for_a_call() -> None:
    processor = Gemma4ImageProcessor(patch_size=4)
    batch = processor([picture(), picture(30, 300)], max_soft_tokens=70, return_tensors="pt")
    counts = [soft_token_count(50, 70, 4, 70), soft_token_count(30, 300, 4, 70)]
    assert batch.num_soft_tokens_per_image.tolist() == counts
    assert batch.pixel_values.shape == (2, 630, 48)
    assert processor.max_soft_tokens == 280


def test_the_12b_reads_squares_as_large_as_a_soft_token() -> None:
    small = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)(picture(), return_tensors="pt")
    merged = Gemma4UnifiedImageProcessor(patch_size=4, max_soft_tokens=70)(picture(), return_tensors="pt")
    assert merged.pixel_values.shape == (1, 70, 12 * 12 * 3)
    assert merged.num_soft_tokens_per_image.tolist() == small.num_soft_tokens_per_image.tolist()
    count = int(merged.num_soft_tokens_per_image[0])
    assert int((merged.image_position_ids[0] >= 0).all(-1).sum()) == count
    assert torch.equal(merged.pixel_values[0, 0].view(12, 12, 3)[:4, :4].flatten(), small.pixel_values[0, 0])


@pytest.mark.parametrize("side", [(1, 1), (1, 20_000), (20_000, 1)])
def test_pictures_of_one_pixel_and_of_twenty_thousand_work(side: tuple[int, int]) -> None:
    options = {"input_data_format": "channels_last", "return_tensors": "pt"}
    assert gemma3n()(picture(*side), **options).pixel_values.shape == (1, 3, 64, 48)
    batch = Gemma4ImageProcessor(max_soft_tokens=70)(picture(*side), **options)
    assert 1 <= int(batch.num_soft_tokens_per_image[0]) <= 70


def test_pictures_that_do_not_fit_unresized_are_refused() -> None:
    processor = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
    with pytest.raises(ImageError, match=r"70 x 50 pixels with do_resize=False: both sides must be multiples of 12"):
        processor(picture(), do_resize=False)
    with pytest.raises(ImageError, match="70 squares of 12 x 12 are the most"):
        processor(picture(120, 120), do_resize=False)


# ---------------------------------------------------------------------- wrong calls and settings


@pytest.mark.parametrize("processor", [gemma3n(), Gemma4ImageProcessor()], ids=["siglip", "gemma4"])
def test_wrong_calls_are_refused(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no pictures"):
        processor([])
    with pytest.raises(TypeError, match="NoneType is not a picture"):
        processor([picture(), None])
    with pytest.raises(TypeError, match=r"got 'junk'; its settings are do_convert_rgb"):
        processor(picture(), junk=1)
    with pytest.raises(InputError, match="data_format='channels_last'"):
        processor(picture(), data_format="channels_last")
    with pytest.raises(ImageFileNotFoundError, match="no such file"):
        processor(str(tmp_path / "nowhere.png"))
    with pytest.raises(InputError, match="URLs are not fetched"):
        processor("https://example.com/picture.png")
    with pytest.raises(InputError, match="return_tensors='tf'"):
        processor(picture(), return_tensors="tf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 0, "width": 4}}, r"size\['height'\]=0"),
        ({"size": {"shortest_edge": 4}}, "'height': pixels"),
        ({"size": 48}, "size=48"),
        ({"resample": 1}, "resample=1: accepted are 2"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "other than 0"),
        ({"do_center_crop": True}, "has no such step"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiglipImageProcessor(**settings)
    with pytest.raises(ConfigError, match=message):
        SiglipImageProcessor()(picture(), **settings)


def test_budgets_that_were_not_published_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_soft_tokens=100: accepted are 70, 140, 280, 560, 1120"):
        Gemma4ImageProcessor()(picture(), max_soft_tokens=100)
    with pytest.raises(ConfigError, match="patch_size=0"):
        Gemma4ImageProcessor(patch_size=0)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "processor",
    [gemma3n(), Gemma4ImageProcessor(max_soft_tokens=140, patch_size=8)],
    ids=["siglip", "gemma4"],
)
def test_settings_survive_being_saved(processor: Any, tmp_path: Path) -> None:
    (path,) = processor.save_pretrained(tmp_path)
    assert Path(path).name == "preprocessor_config.json"
    assert json.loads(Path(path).read_text())["image_processor_type"] == type(processor).__name__
    assert type(processor).from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert type(processor).from_pretrained(tmp_path, resample=3).resample == 3


def test_settings_are_found_in_the_processor_s_file_first(tmp_path: Path) -> None:
    section = {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 560, "do_resize": True}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": section}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": 70}))
    assert Gemma4ImageProcessor.from_pretrained(tmp_path).max_soft_tokens == 560


def test_a_file_shared_with_a_feature_extractor_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = {
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "image_processor_type": "SiglipImageProcessorFast",
        "sampling_rate": 16000,
        "size": SIZE,
        "resample": 2,
        "do_center_crop": None,
        "device": None,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(shared))
    with caplog.at_level(logging.WARNING):
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == SIZE
    assert not caplog.text


def test_a_file_of_another_class_is_told_and_a_missing_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointNotFoundError, match="holds neither preprocessor_config.json nor a processor_config"):
        Gemma4ImageProcessor.from_pretrained(tmp_path)
    gemma3n().save_pretrained(tmp_path)
    Gemma4ImageProcessor.from_pretrained(tmp_path)
    assert "was written by SiglipImageProcessor and is being read by Gemma4ImageProcessor" in caplog.text
