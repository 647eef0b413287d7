"""load_image turns anything that is a picture into RGB levels, and refuses what is none."""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from audiomm.base.errors import (
    ImageDecodeError,
    ImageError,
    ImageFileNotFoundError,
    ImageLimitError,
    InputError,
    MissingExtra,
)
from audiomm.media.image import load_image

PICTURE = np.random.RandomState(0).randint(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(picture: np.ndarray = PICTURE, kind: str = "PNG", **options: object) -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG whose header tells these sizes, with next to no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "form", ["str", "path", "bytes", "bytearray", "file", "data uri", "base64", "dict path", "dict bytes", "pil"]
)
def test_every_form_of_a_file_gives_the_same_pixels(form, tmp_path):
    content = encoded()
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    from PIL import Image

    forms = {
        "str": str(path),
        "path": path,
        "bytes": content,
        "bytearray": bytearray(content),
        "file": io.BytesIO(content),
        "data uri": "data:image/png;base64," + base64.b64encode(content).decode(),
        "base64": base64.b64encode(content).decode(),
        "dict path": {"path": str(path), "bytes": None},
        "dict bytes": {"bytes": content, "path": None},
        "pil": Image.fromarray(PICTURE),
    }
    np.testing.assert_array_equal(load_image(forms[form]), PICTURE)


@pytest.mark.parametrize("form", ["array", "tensor", "int64", "shares of white", "levels", "read-only", "reversed"])
def test_every_form_of_pixels_gives_the_same_pixels(form):
    frozen = PICTURE.copy()
    frozen.setflags(write=False)
    forms = {
        "array": PICTURE,
        "tensor": torch.from_numpy(PICTURE).permute(2, 0, 1),
        "int64": PICTURE.astype(np.int64),
        "shares of white": PICTURE / 255,
        "levels": PICTURE.astype(np.float32),
        "read-only": frozen,
        "reversed": PICTURE[::-1].copy()[::-1],
    }
    np.testing.assert_array_equal(load_image(forms[form]), PICTURE)


def test_grey_is_repeated_and_opacity_is_dropped():
    grey = PICTURE[..., 0]
    for form in (grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(load_image(form), np.repeat(grey[..., None], 3, axis=-1))
    np.testing.assert_array_equal(load_image(np.concatenate((PICTURE, PICTURE[..., :1]), -1)), PICTURE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_pictures_of_every_mode_are_brought_to_rgb(mode):
    image = pytest.importorskip("PIL.Image")
    levels = {"I": 65535, "I;16": 65535, "F": 1.0}
    white = image.new("RGB", (5, 4), "white")
    white = image.new(mode, (5, 4), levels[mode]) if mode in levels else white.convert(mode)
    assert load_image(white).shape == (4, 5, 3)
    assert load_image(white).min() == 255


def test_files_are_turned_upright_by_their_mark():
    image = pytest.importorskip("PIL.Image")
    mark = image.Exif()
    mark[0x0112] = 6  # to be turned a quarter clockwise
    turned = encoded(exif=mark.tobytes())
    np.testing.assert_array_equal(load_image(turned), np.rot90(PICTURE, -1))


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 40, 3)])
def test_unclear_layouts_need_to_be_told(shape):
    pixels = np.zeros(shape, np.uint8)
    with pytest.raises(ImageError, match="both the first and the last axis can be the channels"):
        load_image(pixels)
    assert load_image(pixels, input_data_format="channels_last").shape == shape
    assert load_image(pixels, input_data_format="channels_first").shape == (*shape[1:], 3)


def test_one_pixel_is_a_picture():
    one = load_image(encoded(np.full((1, 1, 3), 7, np.uint8)))
    assert one.tolist() == [[[7, 7, 7]]]


def test_long_pictures_are_read_and_huge_ones_are_refused_before_they_are_decoded():
    assert load_image(encoded(np.zeros((20_000, 2, 3), np.uint8))).shape == (20_000, 2, 3)
    with pytest.raises(ImageLimitError, match=r"20000 x 4400 = 88,000,000 pixels; 80,000,000 are allowed"):
        load_image(declared(20_000, 4_400))
    with pytest.raises(ImageLimitError, match="more pixels than Pillow decodes"):
        load_image(declared(20_000, 20_000))
    with pytest.raises(ImageLimitError, match=r"\(max_pixels=\)"):
        load_image(PICTURE, max_pixels=599)


@pytest.mark.parametrize("place", [10, 18, 30, 45, 100, 700])
def test_a_broken_byte_is_told(place):
    content = bytearray(encoded())
    content[place] ^= 0xFF
    with pytest.raises(ImageDecodeError, match="picture file"):
        load_image(bytes(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_file_is_told(kind):
    content = encoded(kind=kind)
    with pytest.raises(ImageDecodeError):
        load_image(content[: len(content) // 2])


def test_what_is_no_picture_file_is_told(tmp_path):
    with pytest.raises(ImageDecodeError, match="is not a picture file that can be read"):
        load_image(b"hello world, hello")
    with pytest.raises(ImageDecodeError, match=r"empty \(0 bytes\)"):
        load_image(b"")
    with pytest.raises(ImageDecodeError, match=r"empty file \(0 bytes\)"):
        (tmp_path / "empty.png").touch()
        load_image(tmp_path / "empty.png")
    with pytest.raises(ImageFileNotFoundError, match="no such file. Pass the path of a picture file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageDecodeError, match="is not a file"):
        load_image(tmp_path)


def test_formats_that_run_other_programs_are_not_read():
    with pytest.raises(ImageDecodeError, match="is not a picture file"):
        load_image(encoded(kind="EPS"))


def test_data_uris_and_sizes_are_checked():
    with pytest.raises(ImageDecodeError, match="is not of the form 'data:image/png;base64"):
        load_image("data:image/png,abc")
    with pytest.raises(ImageLimitError, match="more than the 10 bytes allowed"):
        load_image(io.BytesIO(encoded()), max_bytes=10)


def test_urls_are_off():
    with pytest.raises(InputError, match="URLs are not fetched"):
        load_image("https://example.com/picture.png")
    with pytest.raises(InputError, match="is not among allowed_hosts"):
        load_image("https://example.com/picture.png", allowed_hosts=["pictures.example.org"])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), bool), "pixels of type bool"),
        (torch.zeros(4, 4, dtype=torch.bool), "pixels of type torch.bool"),
        (np.zeros((4, 4), complex), "pixels of type complex128"),
        (np.full((4, 4), 300), "16-bit pixels are to be divided by 257"),
        (np.full((4, 4), -1), "pixels from -1 to -1"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.full((4, 4), -0.5), "normalised already"),
        (np.full((4, 4), 256.0), "float pixels from 256 to 256"),
        (np.zeros((0, 4), np.uint8), "has no pixels"),
        (np.zeros((6, 6, 5), np.uint8), "is not a picture"),
        (np.zeros((2, 4, 4, 3), np.uint8), "is not one picture"),
    ],
)
def test_pixels_that_cannot_be_understood_are_refused(pixels, message):
    with pytest.raises(ImageError, match=message):
        load_image(pixels)


def test_other_things_are_type_errors():
    for thing in (None, 5, [1, 2], object()):
        with pytest.raises(TypeError, match="is not a picture"):
            load_image(thing)
    with pytest.raises(TypeError, match="needs 'bytes', 'path' or 'image'"):
        load_image({"array": PICTURE})
    with pytest.raises(InputError, match="input_data_format='sideways'"):
        load_image(PICTURE, input_data_format="sideways")


def test_files_without_pillow_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"pillow: pip install 'audiomm\[vision\]'"):
        load_image(b"\x89PNG")
    assert load_image(PICTURE).shape == PICTURE.shape
