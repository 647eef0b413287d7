"""Model files of whisper.cpp (ggml-*.bin): header, mel filters, vocabulary, and tensors, quantised or not.

All numbers are little-endian. A block of a quantised type is 32 numbers: a half-precision step, for types ending in _1
a half-precision offset, for five bits 32 high bits, then the low bits two to a byte, first half of the block in the low
nibbles. Source: the format as whisper.cpp documents and reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..base.errors import CorruptCheckpointError
from .foreign import ByteReader, Foreign, rename, size_of, to_tensor
from .openai_whisper import RULES, sizes

MAGIC = 0x67676D6C
#: What other files that begin alike are.
_OTHER_MAGICS = {
    0x46554747: "a gguf file, which whisper.cpp does not use for Whisper",
    0x67676D66: "an old ggmf file",
    0x67676A74: "an old ggjt file",
}
_HEADER = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_text_ctx", "n_text_state",
           "n_text_head", "n_text_layer", "n_mels", "ftype")  # fmt: skip
#: The version of the quantised types is kept in the thousands of the file's type; 2 has half-precision steps.
_VERSION_FACTOR, _VERSION = 1000, 2
_BLOCK = 32
#: Bounds that no Whisper comes near.
_MOST_TOKENS, _LONGEST_NAME, _LONGEST_TOKEN, _LARGEST_AXIS = 10_000_000, 1_000, 10_000, 100_000_000


class _Quantised(NamedTuple):
    name: str
    bits: int
    has_offset: bool


_FLOATS = {0: "<f4", 1: "<f2"}
_QUANTISED = {
    2: _Quantised("q4_0", 4, False),
    3: _Quantised("q4_1", 4, True),
    6: _Quantised("q5_0", 5, False),
    7: _Quantised("q5_1", 5, True),
    8: _Quantised("q8_0", 8, False),
}


def read_ggml(path: Path) -> Foreign:
    """Read a model file of whisper.cpp.

    Raises:
        CorruptCheckpointError: It is cut short, of another format, or uses a type that is not known here.
    """
    reader = ByteReader(path)
    _check_magic(reader)
    dims = dict(zip(_HEADER, reader.numbers("11i", "the header"), strict=True))
    version = dims["ftype"] // _VERSION_FACTOR
    _skip_filters(reader, dims["n_mels"])
    tokens = _read_tokens(reader)
    stored: dict[str, Tensor] = {}
    while not reader.at_end:
        name, tensor = _read_tensor(reader, version)
        if name in stored:
            raise CorruptCheckpointError(f"{path}: the tensor {name!r} is there twice.")
        stored[name] = tensor
    # Files made of fine-tuned models hold the length of their texts here; how many positions there are, the table says.
    weights = rename(stored, RULES, "model.")
    dims["n_text_ctx"] = size_of(weights, "model.decoder.embed_positions.weight", 0, str(path))
    return Foreign(path.name, weights, sizes(dims, weights, str(path)), tokens=tokens)


def _check_magic(reader: ByteReader) -> None:
    magic = int(reader.numbers("I", "the magic number")[0])
    if magic != MAGIC:
        kind = _OTHER_MAGICS.get(magic, "another kind of file")
        raise CorruptCheckpointError(f"{reader.path} begins with 0x{magic:08x}, not with ggml's 0x{MAGIC:08x}: {kind}.")


def _skip_filters(reader: ByteReader, mels: int) -> None:
    """Step over the mel filters, which follow from their number."""
    rows = reader.count("i", 4_096, "the number of mel filters")
    columns = reader.count("i", 65_536, "the length of mel filters")
    if rows != mels:
        raise CorruptCheckpointError(f"{reader.path}: {rows} mel filters for a model of n_mels={mels}.")
    reader.array("<f4", rows * columns, "the mel filters")


def _read_tokens(reader: ByteReader) -> list[bytes]:
    count = reader.count("i", _MOST_TOKENS, "the number of tokens")
    lengths = ((reader.count("I", _LONGEST_TOKEN, "the length of a token"), index) for index in range(count))
    return [reader.raw(length, f"token {index}") for length, index in lengths]


def _read_tensor(reader: ByteReader, version: int) -> tuple[str, Tensor]:
    start = reader.place
    axes = reader.count("i", 4, "the number of a tensor's axes")
    length = reader.count("i", _LONGEST_NAME, "the length of a tensor's name")
    kind = int(reader.numbers("i", "a tensor's type")[0])
    # The fastest axis stands first.
    shape = [reader.count("i", _LARGEST_AXIS, "a tensor's axis") for _ in range(axes)][::-1]
    name = reader.text(length, "a tensor's name")
    total = math.prod(shape)
    if kind in _FLOATS:
        return name, to_tensor(reader.array(_FLOATS[kind], total, name).reshape(shape))
    quantised = _QUANTISED.get(kind)
    if quantised is None:
        known = ", ".join(("f32", "f16", *(each.name for each in _QUANTISED.values())))
        raise CorruptCheckpointError(f"{reader.path}: {name!r} (byte {start:,}) is of type {kind}; read are {known}.")
    if version != _VERSION:
        raise CorruptCheckpointError(
            f"{reader.path}: its {quantised.name} numbers are of version {version}; read is version {_VERSION}. "
            "Quantise the model again with a whisper.cpp of May 2023 or later."
        )
    if not shape or shape[-1] % _BLOCK:
        raise CorruptCheckpointError(f"{reader.path}: rows of {name!r} {shape} do not divide into blocks of {_BLOCK}.")
    return name, to_tensor(_dequantised(reader, quantised, total // _BLOCK, name).reshape(shape))


def _dequantised(reader: ByteReader, kind: _Quantised, blocks: int, name: str) -> np.ndarray[Any, Any]:
    """float32 numbers of quantised blocks."""
    fields: list[Any] = [("step", "<f2")]
    fields += [("offset", "<f2")] if kind.has_offset else []
    fields += [("high", "<u4")] if kind.bits == 5 else []
    fields.append(("whole", "i1", (_BLOCK,)) if kind.bits == 8 else ("low", "u1", (_BLOCK // 2,)))
    layout = np.dtype(fields)
    stored = reader.array("u1", layout.itemsize * blocks, name).view(layout)
    step = stored["step"].astype(np.float32)[:, None]
    if kind.bits == 8:
        return stored["whole"].astype(np.float32) * step
    low = stored["low"]
    levels = np.concatenate((low & 15, low >> 4), axis=1).astype(np.int16)
    if kind.bits == 5:
        levels |= ((stored["high"][:, None] >> np.arange(_BLOCK, dtype=np.uint32) & 1) << 4).astype(np.int16)
    if kind.has_offset:
        return levels.astype(np.float32) * step + stored["offset"].astype(np.float32)[:, None]
    return (levels - (1 << kind.bits - 1)).astype(np.float32) * step
