"""tf_model.h5: the weights of transformers' former TensorFlow models, read with h5py.

A dataset's path ends in the name that TensorFlow gave the variable: `.../encoder/layers.0/fc1/kernel:0`. Linear layers
are (in, out) there, convolutions (length, in, out). Links and datasets that point out of the file are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import CorruptCheckpointError, MissingExtra, UnsafeCheckpointError
from .foreign import to_tensor

_STACKS = ("encoder", "decoder")
_LEAVES = {"kernel": "weight", "embeddings": "weight", "weight": "weight", "gamma": "weight",
           "beta": "bias", "bias": "bias"}  # fmt: skip


def read_tensorflow(path: Path) -> dict[str, Tensor]:
    """The tensors of a tf_model.h5, under the names and in the layout of the hub's PyTorch files.

    Raises:
        MissingExtra: The package h5py is missing.
        CorruptCheckpointError: The file is cut short, or holds other weights.
        UnsafeCheckpointError: It points to other files.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("reading TensorFlow weights", "h5py", "convert") from error

    weights: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise UnsafeCheckpointError(f"{path}: the numbers of {name!r} are said to lie in other files.")
        if item.dtype.kind != "f":
            return  # counters of the optimiser
        hub_name, tensor = _hub_weight(name, item[()], path)
        weights[hub_name] = tensor

    try:
        with h5py.File(path, "r") as file:
            _refuse_links(file, path, h5py)
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:  # a RecursionError, of groups in a ring, is a RuntimeError
        if isinstance(error, (UnsafeCheckpointError, CorruptCheckpointError)):
            raise
        raise CorruptCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole HDF5 file: {str(error)[:160]}"
        ) from error
    return weights


def _refuse_links(group: Any, path: Path, h5py: Any) -> None:
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, (h5py.ExternalLink, h5py.SoftLink)):
            raise UnsafeCheckpointError(
                f"{path}: {name!r} is a link, here or into another file; weights are plain data."
            )
        if isinstance(group[name], h5py.Group):
            _refuse_links(group[name], path, h5py)


def _hub_weight(dataset: str, array: Any, path: Path) -> tuple[str, Tensor]:
    parts = dataset.removesuffix(":0").replace("_._", ".").split("/")
    *parents, leaf = parts
    stack = next((place for place, part in enumerate(parents) if part in _STACKS), None)
    if leaf not in _LEAVES or (stack is None and "proj_out" not in parents):
        raise CorruptCheckpointError(f"{path}: {dataset!r} is no weight of transformers' TensorFlow Whisper.")
    tensor = to_tensor(array)
    if leaf == "kernel":
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    name = f"proj_out.{_LEAVES[leaf]}" if stack is None else ".".join(("model", *parents[stack:], _LEAVES[leaf]))
    return name, tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor
