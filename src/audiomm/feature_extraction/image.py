"""Pictures to what the vision towers read: one fixed size (Gemma 3n), or patches that keep the shape (Gemma 4).

Arguments and file layouts are those of transformers. Sizes are changed in whole levels, by torch's antialiased kernels
on the CPU: that is bit for bit what torchvision's resize of uint8 tensors gives, and a float resize is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ..base.errors import ConfigError, ImageError, InputError
from ..media.fetch import FetchLimits
from ..media.image import MAX_PIXELS, as_levels, read_pixels
from .base import BatchFeature, FeatureExtractionMixin, require_positive

#: Pillow's numbers of the two ways of changing a size that are offered.
_KERNELS = {2: "bilinear", 3: "bicubic"}
#: Steps of transformers' processors that no checkpoint of the families here asks for.
_UNKNOWN_STEPS = ("do_center_crop", "do_pad", "do_pan_and_scan")
#: Soft tokens a picture may be given, published with Gemma 4.
SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)


def aspect_preserving_size(
    height: int, width: int, patch_size: int = 16, max_soft_tokens: int = 280, pooling_kernel_size: int = 3
) -> tuple[int, int]:
    """Height and width, in pixels, that a picture is brought to: its shape kept, its area as near the budget as can be.

    Both are multiples of `patch_size * pooling_kernel_size`; small pictures are enlarged. A picture so thin that one
    side would vanish keeps one row (or column) of soft tokens, at most `max_soft_tokens` of them.

    Raises:
        ImageError: The picture has no pixels.
    """
    if height < 1 or width < 1:
        raise ImageError(f"a picture of {width} x {height} pixels has none.")
    side = patch_size * pooling_kernel_size
    factor = math.sqrt(max_soft_tokens * side**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if rows == 0:
        rows, columns = 1, min(width // height, max_soft_tokens)
    elif columns == 0:
        rows, columns = min(height // width, max_soft_tokens), 1
    return rows * side, columns * side


def grid_tokens(height: int, width: int, side: int) -> int:
    """Soft tokens of a picture that has been brought to its size: squares of `side` x `side` pixels.

    Raises:
        InputError: Height or width is no multiple of `side`.
    """
    if height < 1 or width < 1 or height % side or width % side:
        raise InputError(f"a picture of {width} x {height} pixels: both must be multiples of {side}; resize it first.")
    return (height // side) * (width // side)


def soft_token_count(
    height: int, width: int, patch_size: int = 16, max_soft_tokens: int = 280, pooling_kernel_size: int = 3
) -> int:
    """Soft tokens that a picture of this size, in pixels, takes in the prompt of Gemma 4."""
    target = aspect_preserving_size(height, width, patch_size, max_soft_tokens, pooling_kernel_size)
    return grid_tokens(*target, patch_size * pooling_kernel_size)


def flat_images(images: Any) -> list[Any]:
    """One picture, a batch (list, or array of four axes), or lists of lists of pictures, as one flat list."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_images(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def check_data_format(data_format: Any) -> None:
    """Refuse another order of axes than the models'.

    Raises:
        InputError: It is another one.
    """
    wanted = getattr(data_format, "value", data_format)
    if wanted not in (None, "channels_first"):
        raise InputError(f"data_format={wanted!r}: accepted is 'channels_first', which the models read.")


class ImageProcessingMixin(FeatureExtractionMixin):
    """What the processors of pictures and of videos share: their settings, resizing, and the scale of the levels.

    Args:
        do_convert_rgb: Kept for the file's sake: grey, palette and other pictures are brought to RGB in any case.
        do_resize: Bring pictures to the size the model reads.
        resample: 2 is bilinear, 3 bicubic (Pillow's numbers).
        do_rescale: Multiply levels by `rescale_factor`.
        rescale_factor: 1/255 makes levels shares of white.
        do_normalize: Subtract `image_mean`, then divide by `image_std`, channel by channel.
        image_mean, image_std: Three numbers each.
        **extra: Unknown keys, kept and written back.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        resample: int = 3,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **extra: Any,
    ) -> None:
        super().__init__(**extra)
        if resample not in _KERNELS:
            raise ConfigError(f"resample={resample!r}: accepted are 2 (bilinear) and 3 (bicubic).")
        for step in _UNKNOWN_STEPS:
            if extra.get(step):
                raise ConfigError(f"{step}={extra[step]!r}: {type(self).__name__} has no such step; pass False.")
        if not isinstance(rescale_factor, (int, float)) or not 0 < rescale_factor < math.inf:
            raise ConfigError(f"rescale_factor={rescale_factor!r}: a number above 0 is needed.")
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _three("image_mean", image_mean)
        self.image_std = _three("image_std", image_std)
        if min(abs(value) for value in self.image_std) == 0.0:
            raise ConfigError(f"image_std={self.image_std}: numbers other than 0 are needed.")

    def with_settings(self, **settings: Any) -> Self:
        """This processor with other settings; itself when there are none, or all are None.

        Raises:
            TypeError: There is no setting of that name.
            ConfigError: A value is mistyped or out of range.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        known = self.setting_names()
        unknown = sorted(set(settings) - known - set(_UNKNOWN_STEPS))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}() got {', '.join(map(repr, unknown))}; its settings are "
                f"{', '.join(sorted(known))}."
            )
        return type(self)(**{**self.to_dict(), **settings}) if settings else self

    @staticmethod
    def pictures(images: Any, data_format: str | None = None) -> list[Any]:
        """The pictures of a call as one flat list.

        Raises:
            InputError: There are none, or another order of axes than the models' is wanted.
        """
        check_data_format(data_format)
        found = flat_images(images)
        if not found:
            raise InputError("there are no pictures: the list is empty.")
        return found

    def read(self, image: Any, input_data_format: str | None, limits: FetchLimits | None = None) -> Tensor:
        """A picture as (3, height, width): uint8, or float32 when it holds floats and is not to be rescaled."""
        pixels = read_pixels(image, input_data_format, MAX_PIXELS, limits)
        return as_levels(pixels) if self.do_rescale else pixels

    def resized(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """(..., 3, h, w) -> (..., 3, height, width), the dtype kept; the input itself when it has that size."""
        if tuple(pixels.shape[-2:]) == (height, width):
            return pixels
        batch = pixels if pixels.ndim == 4 else pixels[None]
        result = functional.interpolate(
            batch, size=(height, width), mode=_KERNELS[self.resample], antialias=True, align_corners=False
        )
        return result if pixels.ndim == 4 else result[0]

    def scaled(self, pixels: Tensor) -> Tensor:
        """Levels as the float32 numbers that the model reads; one rounding, as rescaling and normalising are fused."""
        numbers = pixels.to(torch.float32)
        if not self.do_normalize:
            return numbers * self.rescale_factor if self.do_rescale else numbers
        levels = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        mean = (torch.tensor(self.image_mean) * levels).view(3, 1, 1)
        std = (torch.tensor(self.image_std) * levels).view(3, 1, 1)
        return (numbers - mean) / std


class SiglipImageProcessor(ImageProcessingMixin):
    """Pictures at one fixed size, their shape not kept; Gemma 3n's checkpoints name it.

    Args:
        size: {"height": pixels, "width": pixels}; Gemma 3n's is 768 x 768.
        **settings: Those of `ImageProcessingMixin`; Gemma 3n's are resample=2 and do_normalize=False.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    processor_section: ClassVar[str] = "image_processor"
    type_key: ClassVar[str] = "image_processor_type"

    def __init__(self, size: Mapping[str, int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.size = {"height": 224, "width": 224} if size is None else _height_and_width(size)

    def __call__(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: str | torch.device | None = None,
        disable_grouping: bool | None = None,
        limits: FetchLimits | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Make `pixel_values`.

        Args:
            images: One picture in any form `audiomm.media.image.load_image` reads, a batch, or lists of lists (the
                pictures of each prompt), which are put into one batch.
            return_tensors: "pt", "np", or None for a list.
            input_data_format: "channels_first" or "channels_last" for arrays in which both could be.
            data_format: Accepted is "channels_first", which is what comes out.
            device: Where the result goes.
            disable_grouping: No effect.
            limits: What may be fetched where a picture is named by a URL; nothing, unless told.
            **settings: Settings for this call only, by the constructor's names.

        Returns:
            pixel_values float32 (pictures, 3, height, width).

        Raises:
            ImageError: A picture cannot be used; its subclasses say why.
            InputError: There are no pictures.
            TypeError: A setting is not known, or something is no picture.
        """
        pictures = self.pictures(images, data_format)
        own = self.with_settings(**settings)
        height, width = own.size["height"], own.size["width"]
        rows = []
        for picture in pictures:
            pixels = own.read(picture, input_data_format, limits)
            rows.append(own.scaled(own.resized(pixels, height, width) if own.do_resize else pixels))
        return BatchFeature({"pixel_values": [row.to(device) for row in rows]}, return_tensors)

    preprocess = __call__


class PatchProcessingMixin(ImageProcessingMixin):
    """What Gemma 4's processors of pictures and videos share: sizes by a budget of soft tokens, cut into patches.

    Args:
        patch_size: Pixels a side of a patch.
        max_soft_tokens: Soft tokens a picture (a frame) takes at most: 70, 140, 280, 560 or 1120.
        pooling_kernel_size: Patches a side of a soft token.
        **settings: Those of `ImageProcessingMixin`.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    def __init__(
        self, patch_size: int = 16, max_soft_tokens: int = 280, pooling_kernel_size: int = 3, **settings: Any
    ) -> None:
        super().__init__(**{"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0), **settings})
        require_positive(patch_size=patch_size, pooling_kernel_size=pooling_kernel_size)
        if max_soft_tokens not in SOFT_TOKEN_BUDGETS:
            accepted = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise ConfigError(f"max_soft_tokens={max_soft_tokens!r}: accepted are {accepted}.")
        self.patch_size = patch_size
        self.max_soft_tokens = max_soft_tokens
        self.pooling_kernel_size = pooling_kernel_size

    @property
    def patch_side(self) -> int:
        """Pixels a side of what the model takes as one patch."""
        return self.patch_size

    @property
    def max_patches(self) -> int:
        """Patches that every picture is padded to."""
        return self.max_soft_tokens * (self.patch_size * self.pooling_kernel_size // self.patch_side) ** 2

    def fitted(self, pixels: Tensor) -> Tensor:
        """(..., 3, h, w) at the size the budget allows, both sides multiples of patch and pooling.

        Raises:
            ImageError: Nothing is to be resized, and the size does not fit.
        """
        height, width = pixels.shape[-2:]
        if self.do_resize:
            target = aspect_preserving_size(
                height, width, self.patch_size, self.max_soft_tokens, self.pooling_kernel_size
            )
            return self.resized(pixels, *target)
        side = self.patch_size * self.pooling_kernel_size
        if height % side or width % side or height * width > self.max_soft_tokens * side**2:
            raise ImageError(
                f"a picture of {width} x {height} pixels with do_resize=False: both sides must be multiples of {side} "
                f"(patch_size * pooling_kernel_size), and {self.max_soft_tokens} squares of {side} x {side} are the "
                "most (max_soft_tokens)."
            )
        return pixels

    def patches(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Cut pictures into patches, row by row.

        Args:
            numbers: (pictures, 3, height, width).

        Returns:
            Patches (pictures, max_patches, patch_side * patch_side * 3), each row by row with the colours innermost,
            zeros for padding; and their places (pictures, max_patches, 2) int64 as (x, y), -1 for padding.
        """
        side = self.patch_side
        count, channels, height, width = numbers.shape
        rows, columns = height // side, width // side
        grid = numbers.reshape(count, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack((x, y), dim=-1).reshape(1, rows * columns, 2).expand(count, -1, -1)
        missing = self.max_patches - rows * columns
        flat = grid.reshape(count, rows * columns, side * side * channels)
        return functional.pad(flat, (0, 0, 0, missing)), functional.pad(places, (0, 0, 0, missing), value=-1)

    def soft_tokens(self, pixels: Tensor) -> int:
        """Soft tokens of a fitted picture."""
        return grid_tokens(int(pixels.shape[-2]), int(pixels.shape[-1]), self.patch_size * self.pooling_kernel_size)


class Gemma4ImageProcessor(PatchProcessingMixin):
    """Pictures as patches that keep their shape, up to a budget of soft tokens.

    Args:
        do_normalize: Off: the model itself brings pixels to [-1, 1].
        **settings: Those of `PatchProcessingMixin`.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_position_ids", "num_soft_tokens_per_image"]
    processor_section: ClassVar[str] = "image_processor"
    type_key: ClassVar[str] = "image_processor_type"

    def __init__(self, do_normalize: bool = False, **settings: Any) -> None:
        super().__init__(do_normalize=do_normalize, **settings)

    def __call__(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: str | torch.device | None = None,
        disable_grouping: bool | None = None,
        limits: FetchLimits | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Make patches and their places.

        Args:
            images: One picture in any form `audiomm.media.image.load_image` reads, a batch, or lists of lists (the
                pictures of each prompt), which are put into one batch.
            return_tensors: "pt", "np", or None, which leaves the counts a list.
            input_data_format: "channels_first" or "channels_last" for arrays in which both could be.
            data_format: Accepted is "channels_first"; patches have no such order.
            device: Where the result goes.
            disable_grouping: No effect.
            limits: What may be fetched where a picture is named by a URL; nothing, unless told.
            **settings: Settings for this call only, by the constructor's names (max_soft_tokens=...).

        Returns:
            pixel_values float32 (pictures, patches, patch_size * patch_size * 3), image_position_ids int64 (pictures,
            patches, 2) with -1 for padding, and num_soft_tokens_per_image (pictures,).

        Raises:
            ImageError: A picture cannot be used; its subclasses say why.
            ConfigError: A setting is out of range.
            InputError: There are no pictures.
            TypeError: A setting is not known, or something is no picture.
        """
        pictures = self.pictures(images, data_format)
        own = self.with_settings(**settings)
        cut, counts = [], []
        for picture in pictures:
            pixels = own.fitted(own.read(picture, input_data_format, limits))
            cut.append(own.patches(own.scaled(pixels)[None]))
            counts.append(own.soft_tokens(pixels))
        features = {
            "pixel_values": torch.cat([patches for patches, _ in cut]).to(device),
            "image_position_ids": torch.cat([places for _, places in cut]).to(device),
            "num_soft_tokens_per_image": counts,
        }
        return BatchFeature(features, return_tensors)

    preprocess = __call__


class UnifiedPatches(PatchProcessingMixin):
    """Patches as large as a soft token, 48 x 48 pixels as published: the 12B pools nothing."""

    @property
    def patch_side(self) -> int:
        """Pixels a side of what the model takes as one patch."""
        return self.patch_size * self.pooling_kernel_size


class Gemma4UnifiedImageProcessor(UnifiedPatches, Gemma4ImageProcessor):
    """Pictures for the 12B, which reads squares of pixels as large as a soft token."""


def _three(name: str, values: Any) -> list[float]:
    """Three numbers as a list."""
    numbers = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values] * 3
    if len(numbers) != 3 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
        raise ConfigError(f"{name}={values!r}: three numbers are needed.")
    return [float(value) for value in numbers]


def _height_and_width(size: Any) -> dict[str, int]:
    if not isinstance(size, Mapping) or {name for name, value in size.items() if value is not None} != {
        "height",
        "width",
    }:
        raise ConfigError(f"size={size!r}: {{'height': pixels, 'width': pixels}} is needed.")
    require_positive(**{f"size[{name!r}]": size[name] for name in ("height", "width")})
    return {"height": int(size["height"]), "width": int(size["width"])}


#: Names under which older checkpoints were saved.
SiglipImageProcessorFast = SiglipImageProcessor
Gemma4ImageProcessorFast = Gemma4ImageProcessor
