"""Anything that is a picture to RGB pixels.

Pictures are files, bytes, data URIs, PIL images, arrays or tensors; only files need Pillow. Sizes are read from the
header and checked before a pixel is decoded: a PNG of a few kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ImageDecodeError, ImageError, ImageLimitError, InputError, MissingExtra
from .fetch import IMAGE, FetchLimits, describe, fetch

#: Most pixels of a picture unless the caller says otherwise; 240 MB as RGB.
MAX_PIXELS = 80_000_000

Layout = Literal["channels_first", "channels_last"]

#: What an axis of colours may count: grey, RGB, RGB and opacity.
_CHANNELS = (1, 3, 4)
_ACCEPTED = "a path, bytes, a binary file object, a data URI, a PIL image, a numpy array or a torch tensor"
# Pillow knows many more; those run other programs (EPS) or have been a way in for broken files too often.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
#: What Pillow raises for files that are not as they should be.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(
    image: Any,
    *,
    input_data_format: str | None = None,
    max_pixels: int = MAX_PIXELS,
    allow_urls: bool = False,
    allowed_hosts: Collection[str] | None = None,
    max_bytes: int = 1 << 28,
    timeout_seconds: float = 60.0,
) -> np.ndarray:
    """Read a picture of any form.

    Args:
        image: A path, bytes, a binary file object, a data URI, a URL (see `allow_urls`), a PIL image, a dict with
            "bytes" or "path", or pixels as `to_pixels` takes them. Files need Pillow, `pip install 'audiomm[vision]'`;
            they are turned upright by their EXIF mark, and of an animation the first picture counts.
        input_data_format: "channels_first" or "channels_last" for an array in which both could be.
        max_pixels: More pixels are an error.
        allow_urls: Fetch http(s) addresses from any public host.
        allowed_hosts: Fetch http(s) addresses from these hosts, private ones too, and no other.
        max_bytes: Of a download, a data URI or a file object.
        timeout_seconds: For a download.

    Returns:
        uint8 (height, width, 3), RGB.

    Raises:
        ImageFileNotFoundError: There is no such file (also a FileNotFoundError).
        ImageDecodeError: Not a picture file, or a broken one.
        ImageLimitError: Too many pixels or bytes.
        ImageError: Pixels that cannot be understood.
        MissingExtra: The file needs Pillow.
        TypeError: Not a picture at all.
    """
    limits = FetchLimits(allow_urls, allowed_hosts, max_bytes, timeout_seconds)
    pixels = as_levels(read_pixels(image, input_data_format, max_pixels, limits))
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def read_pixels(
    image: Any,
    input_data_format: str | None = None,
    max_pixels: int = MAX_PIXELS,
    limits: FetchLimits | None = None,
) -> Tensor:
    """`image` as (3, height, width) on the CPU: uint8 levels, or float32 if floating pixels were passed.

    Raises:
        ImageError: Its subclasses are those of `load_image`.
        MissingExtra: The file needs Pillow.
        TypeError: Not a picture at all.
    """
    if isinstance(image, Mapping):
        image = _unpacked(image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return to_pixels(image, input_data_format, max_pixels)
    if _is_pil(image):
        return _from_pil("the picture", image, max_pixels)
    if isinstance(image, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(image, "read"):
        return _from_file(describe(image), fetch(image, limits, IMAGE), max_pixels)
    raise TypeError(f"{type(image).__name__} is not a picture: {_ACCEPTED} is needed.")


def to_pixels(
    values: np.ndarray | Tensor, input_data_format: str | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """An array of pixels as (3, height, width) on the CPU.

    Args:
        values: (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels; grey
            is repeated, opacity is dropped. Whole numbers are levels from 0 to 255.
        input_data_format: "channels_first" or "channels_last"; None is enough where only one axis can be channels.
        max_pixels: More pixels are an error.

    Returns:
        uint8 for whole numbers, float32 with the values passed for floating ones.

    Raises:
        ImageError: No pixels, an unclear layout, or values that are no levels.
        ImageLimitError: Too many pixels.
    """
    if len(values.shape) > 1 and math.prod(values.shape) > 4 * max_pixels:  # before anything is copied
        height, width = sorted(values.shape)[-2:]
        check_pixel_count(height, width, max_pixels, f"an array of shape {tuple(values.shape)}")
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiu":
            raise ImageError(f"pixels of type {values.dtype}: whole numbers from 0 to 255, or floats, are needed.")
        if values.dtype != np.uint8:
            values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
        values = torch.from_numpy(values if values.flags.writeable and min(values.strides) > 0 else values.copy())
    values = values.detach().cpu()
    if values.is_complex() or values.dtype == torch.bool:
        raise ImageError(f"pixels of type {values.dtype}: whole numbers from 0 to 255, or floats, are needed.")
    planes = _channels_first(values, input_data_format)
    check_pixel_count(planes.shape[1], planes.shape[2], max_pixels, f"an array of shape {tuple(values.shape)}")
    planes = planes[:3] if planes.shape[0] == 4 else planes.expand(3, -1, -1)
    if planes.is_floating_point():
        planes = planes.to(torch.float32)
        if not bool(torch.isfinite(planes).all()):
            raise ImageError("the pixels hold NaN or infinity.")
        return planes
    if planes.dtype != torch.uint8:
        low, high = (int(bound) for bound in torch.aminmax(planes))
        if low < 0 or high > 255:
            raise ImageError(
                f"pixels from {low} to {high}: whole numbers are levels from 0 to 255. 16-bit pixels are to be divided "
                "by 257."
            )
    return planes.to(torch.uint8)


def as_levels(pixels: Tensor) -> Tensor:
    """Pixels as uint8 levels: floats up to 1 are shares of white, larger ones are levels already.

    Raises:
        ImageError: Floats below 0 or above 255.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = (float(bound) for bound in torch.aminmax(pixels))
    if low < 0.0 or high > 255.0:
        raise ImageError(
            f"float pixels from {low:g} to {high:g}: accepted are 0 to 1, or levels from 0 to 255. Pixels that were "
            "normalised already are to be passed to the model directly."
        )
    return (pixels * 255.0 if high <= 1.0 else pixels).round().to(torch.uint8)


def check_pixel_count(height: int, width: int, max_pixels: int, where: str) -> None:
    """Refuse a picture without pixels, or with too many.

    Raises:
        ImageError: There are none.
        ImageLimitError: There are more than `max_pixels`.
    """
    if height < 1 or width < 1:
        raise ImageError(f"{where} has no pixels ({width} x {height}).")
    if height * width > max_pixels:
        raise ImageLimitError(
            f"{where} has {width} x {height} = {width * height:,} pixels; {max_pixels:,} are allowed (max_pixels=). "
            "Make it smaller first."
        )


def layout_of(shape: tuple[int, ...], input_data_format: str | None) -> Layout:
    """Which axis of the last three is the channels.

    Raises:
        ImageError: None can be, both can be, or `input_data_format` is not one of the two.
    """
    told = getattr(input_data_format, "value", input_data_format)
    if told not in (None, "channels_first", "channels_last"):
        raise InputError(f"input_data_format={told!r}: accepted are 'channels_first', 'channels_last' and None.")
    first, last = shape[-3] in _CHANNELS, shape[-1] in _CHANNELS
    if told is None and first and last:
        raise ImageError(
            f"an array of shape {shape}: both the first and the last axis can be the channels. Pass "
            "input_data_format='channels_last' (as Pillow's arrays) or 'channels_first' (as torchvision's tensors)."
        )
    layout: Layout = "channels_first" if told == "channels_first" or (told is None and first) else "channels_last"
    if not (first if layout == "channels_first" else last):
        raise ImageError(
            f"an array of shape {shape}{f' as {layout}' if told else ''} is not a picture: 1, 3 or 4 channels in the "
            "first or last of three axes are needed, or two axes for grey."
        )
    return layout


def _channels_first(values: Tensor, input_data_format: str | None) -> Tensor:
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3:
        raise ImageError(f"an array of shape {tuple(values.shape)} is not one picture: 2 or 3 axes are needed.")
    if layout_of(tuple(values.shape), input_data_format) == "channels_first":
        return values
    return values.permute(2, 0, 1)


def _unpacked(image: Mapping[Any, Any]) -> Any:
    """What a row of a datasets column holds."""
    for key in ("bytes", "path", "image"):
        if image.get(key) is not None:
            return image[key]
    raise TypeError(f"a dict of a picture needs 'bytes', 'path' or 'image'; this one has {sorted(map(str, image))}.")


def _is_pil(image: Any) -> bool:
    return all(hasattr(image, name) for name in ("convert", "mode", "size", "__array_interface__"))


def _from_file(name: str, source: Any, max_pixels: int) -> Tensor:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("reading picture files", "pillow", "vision") from error
    Image.init()
    formats = [kind for kind in _FORMATS if kind in Image.OPEN]
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
            check_pixel_count(opened.height, opened.width, max_pixels, name)
            upright = ImageOps.exif_transpose(opened)
            return _from_pil(name, upright, max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageLimitError(f"{name} has more pixels than Pillow decodes: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageDecodeError(f"{name} is not a picture file that can be read ({', '.join(formats)}).") from error
    except InputError:
        raise
    except _BROKEN as error:
        raise ImageDecodeError(f"{name} is a broken picture file: {error}.") from error


def _from_pil(name: str, image: Any, max_pixels: int) -> Tensor:
    width, height = image.size
    check_pixel_count(height, width, max_pixels, name)
    try:
        if image.mode == "I" or image.mode.startswith("I;16"):
            levels = np.asarray(image).astype(np.int64)
            if levels.min() < 0 or levels.max() > 65535:
                raise ImageError(f"{name} has grey levels from {levels.min()} to {levels.max()}: more than 16 bits.")
            return to_pixels(((levels + 128) // 257).astype(np.uint8), max_pixels=max_pixels)
        if image.mode == "F":
            return to_pixels(np.array(image), max_pixels=max_pixels)
        return to_pixels(np.array(image.convert("RGB")), "channels_last", max_pixels)
    except InputError:
        raise
    except _BROKEN as error:
        raise ImageDecodeError(f"{name} cannot be decoded: {error}.") from error
