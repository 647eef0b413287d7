"""flax_model.msgpack: the tree of parameters that Flax writes, read with msgpack and nothing else.

Arrays are an extension type of (shape, type name, bytes); those above 1 GiB are cut into pieces. Linear layers are
(in, out) there, convolutions (length, in, out). Source: the layout of flax.serialization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import CorruptCheckpointError, MissingExtra
from .foreign import to_tensor

_ARRAY, _SCALAR = 1, 3
_PIECES = "__msgpack_chunked_array__"
_TYPES = ("float16", "float32", "float64", "bfloat16")
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def read_flax(path: Path) -> dict[str, Tensor]:
    """The tensors of a flax_model.msgpack, under the names and in the layout of the hub's PyTorch files.

    Raises:
        MissingExtra: The package msgpack is missing.
        CorruptCheckpointError: The file is cut short, or not of that form.
    """
    try:
        import msgpack
    except ImportError as error:
        raise MissingExtra("reading Flax weights", "msgpack", "convert") from error

    def extension(code: int, data: bytes) -> Any:
        if code not in (_ARRAY, _SCALAR):
            raise CorruptCheckpointError(f"{path}: an entry is of the extension type {code}; arrays are {_ARRAY}.")
        shape, kind, numbers = msgpack.unpackb(data, raw=False)
        return _tensor(shape, kind, numbers, path)

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=extension, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole msgpack file of Flax: {str(error)[:160]}"
        ) from error
    if not isinstance(tree, dict):
        raise CorruptCheckpointError(f"{path} holds a {type(tree).__name__}, not a tree of parameters.")
    root = tree["params"] if isinstance(tree.get("params"), dict) else tree
    return dict(_hub_weight(names, tensor, path) for names, tensor in _leaves(root, (), path))


def _tensor(shape: list[int], kind: str, data: bytes, path: Path) -> Tensor:
    if kind not in _TYPES:
        raise CorruptCheckpointError(f"{path}: an array is of type {kind!r}; read are {', '.join(_TYPES)}.")
    stored = np.frombuffer(bytearray(data), dtype=np.int16 if kind == "bfloat16" else np.dtype(kind).newbyteorder("<"))
    if stored.size != math.prod(shape):
        raise CorruptCheckpointError(f"{path}: an array of shape {shape} has {stored.size:,} numbers.")
    tensor = to_tensor(stored.reshape(shape))
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


def _leaves(tree: dict[str, Any], names: tuple[str, ...], path: Path) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for name, value in tree.items():
        below = (*names, str(name))
        if isinstance(value, dict) and value.get(_PIECES):
            yield below, _joined(value, path)
        elif isinstance(value, dict):
            yield from _leaves(value, below, path)
        elif isinstance(value, Tensor):
            yield below, value
        else:
            raise CorruptCheckpointError(f"{path}: {'/'.join(below)} is a {type(value).__name__}, not an array.")


def _joined(value: dict[str, Any], path: Path) -> Tensor:
    """An array that was cut; its shape and pieces are dictionaries with the keys "0", "1", ..."""
    try:
        shape = [int(value["shape"][str(axis)]) for axis in range(len(value["shape"]))]
        pieces = [value["chunks"][str(place)].reshape(-1) for place in range(len(value["chunks"]))]
        return torch.cat(pieces).reshape(shape)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CorruptCheckpointError(f"{path}: the pieces of an array do not fit together: {error}") from error


def _hub_weight(names: tuple[str, ...], tensor: Tensor, path: Path) -> tuple[str, Tensor]:
    *parents, leaf = names
    if leaf not in _LEAVES:
        raise CorruptCheckpointError(f"{path}: {'/'.join(names)} ends in none of {', '.join(_LEAVES)}.")
    if leaf == "kernel":
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    return ".".join((*parents, _LEAVES[leaf])), tensor
