"""Safetensors in and out: single files, shards with an index, checks before anything is read, one copy in memory.

Weights are memory-mapped; each tensor is copied once, into the type and place it is asked for, so loading costs at
most one copy of the checkpoint. Pickled checkpoints are refused: reading them can run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointNotFoundError, CorruptCheckpointError, MissingShardError, SaveError, UnsafeCheckpointError
from .hub import Source, atomic_write, pointer_hint, read_json, write_json
from .staging import check_space

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5", "flax_model.msgpack")


@dataclass
class Checkpoint:
    """The files of one checkpoint and which tensor lies in which.

    Attributes:
        files: File of every tensor, by name.
        shapes: Shape of every tensor, by name.
    """

    name: str
    files: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def tensors(self, names: Iterator[str] | list[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, memory-mapped, file by file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, members in by_file.items():
            with _open(path) as handle:
                for name in members:
                    yield name, handle.get_tensor(name)

    @property
    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in set(self.files.values()))


@dataclass
class GivenWeights(Checkpoint):
    """A state dict in the place of files.

    Attributes:
        given: The tensors; they are copied, so that the model does not share them.
    """

    given: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Tensor]) -> GivenWeights:
        kinds = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
        return cls(
            "state_dict",
            files=dict.fromkeys(given, Path("state_dict")),
            shapes={name: tuple(tensor.shape) for name, tensor in given.items()},
            dtypes={name: kinds.get(tensor.dtype, str(tensor.dtype)) for name, tensor in given.items()},
            given=given,
        )

    def tensors(self, names: Iterator[str] | list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self.given[name].detach().clone()

    @property
    def bytes_on_disk(self) -> int:
        return sum(tensor.nbytes for tensor in self.given.values())


def find_checkpoint(source: Source, variant: str | None = None) -> Checkpoint:
    """The weights of a folder or hub repository, single or sharded; only headers are read.

    Raises:
        CheckpointNotFoundError: There are no weights.
        UnsafeCheckpointError: There are only pickled weights, or the index points outside the folder.
        MissingShardError: Files that the index names are missing.
        CorruptCheckpointError: A file or the index is broken.
    """
    weights, index = _with_variant(WEIGHTS_NAME, variant), _with_variant(INDEX_NAME, variant)
    path = source.find(weights)
    if path is not None:
        return _read_headers(str(source.name), {path.name: path})
    index_path = source.find(index)
    if index_path is not None:
        return _read_sharded(source, index_path)
    pickled = [name for name in _PICKLED if source.find(name) is not None]
    if pickled:
        raise UnsafeCheckpointError(
            f"{str(source.name)!r} holds only {', '.join(pickled)}, which cannot be read without the risk of running "
            f"code from the file. Ask for {weights}, or run `audiomm convert {source.name} OUTPUT`, which reads "
            "numbers and nothing else."
        )
    raise CheckpointNotFoundError(f"{str(source.name)!r} holds neither {weights} nor {index}: there are no weights.")


def _with_variant(filename: str, variant: str | None) -> str:
    """The variant stands before the last ending, as transformers writes it."""
    stem, _, ending = filename.rpartition(".")
    return filename if variant is None else f"{stem}.{variant}.{ending}"


def _read_sharded(source: Source, index_path: Path) -> Checkpoint:
    content = read_json(index_path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index_path}: weight_map is missing or empty; it names the file of each tensor.")
    shards = sorted(set(map(str, weight_map.values())))
    strange = [name for name in shards if Path(name).name != name or "\0" in name or not name.endswith(".safetensors")]
    if strange:
        raise UnsafeCheckpointError(
            f"{index_path} names {strange[0]!r}; only names of .safetensors files beside the index are accepted."
        )
    found = {name: source.find(name) for name in shards}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(shards)} weight files of {str(source.name)!r} are missing: {_some(missing)}. "
            "The download may be cut short; fetch these files again."
        )
    checkpoint = _read_headers(str(source.name), {name: path for name, path in found.items() if path is not None})
    found_in = {name: path.name for name, path in checkpoint.files.items()}
    misplaced = [
        f"{name} (said to be in {shard}, found in {found_in.get(name, 'none')})"
        for name, shard in weight_map.items()
        if found_in.get(name) != shard
    ]
    if misplaced:
        raise CorruptCheckpointError(
            f"{index_path}: {len(misplaced)} of {len(weight_map)} tensors are elsewhere: {_some(misplaced)}."
        )
    return checkpoint


def _read_headers(name: str, paths: dict[str, Path]) -> Checkpoint:
    checkpoint = Checkpoint(name)
    for path in paths.values():
        _refuse_duplicate_names(path)
        with _open(path) as handle:
            for tensor in sorted(handle.keys()):
                view = handle.get_slice(tensor)
                checkpoint.files[tensor] = path
                checkpoint.shapes[tensor] = tuple(view.get_shape())
                checkpoint.dtypes[tensor] = view.get_dtype()
    return checkpoint


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        hint = pointer_hint(path) or f"{error}. The download may be cut short; delete the file and fetch it again."
        raise CorruptCheckpointError(f"{path} ({size:,} bytes) is not a whole safetensors file: {hint}") from error


def _refuse_duplicate_names(path: Path) -> None:
    """A header that names a tensor twice is legal JSON and would silently mean the last one."""

    def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise CorruptCheckpointError(f"{path}: its header names {double!r} twice.")
        return dict(pairs)

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if 2 <= size <= min(100_000_000, os.fstat(file.fileno()).st_size - 8):
            try:
                json.loads(file.read(size), object_pairs_hook=distinct)
            except (ValueError, RecursionError) as error:
                raise CorruptCheckpointError(f"{path}: its header is not readable: {str(error)[:120]}.") from error


def save_weights(
    tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "50GB", variant: str | None = None
) -> list[str]:
    """Write tensors as one safetensors file, or as shards with an index when they are larger than `max_shard_size`.

    Returns:
        Names of the files written.

    Raises:
        SaveError: The disk is full or the folder cannot be written.
    """
    limit = parse_size(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensors[name].detach().contiguous()
        used += size
        total += size
    check_space(folder, total)
    base = _with_variant(WEIGHTS_NAME, variant)
    count = len(shards)
    stem = base.removesuffix(".safetensors")
    names = [base] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_tensors(shard, folder / name)
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        parameters = sum(tensor.numel() for tensor in tensors.values())
        content = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        write_json(folder / _with_variant(INDEX_NAME, variant), content)
    return names


def weight_files(folder: Path, variant: str | None = None) -> list[str]:
    """Names of the files that `save_weights` may have written into a folder."""
    single, index = _with_variant(WEIGHTS_NAME, variant), _with_variant(INDEX_NAME, variant)
    shards = folder.glob(f"{single.removesuffix('.safetensors')}-*-of-*.safetensors")
    return [single, index, *(path.name for path in shards)]


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file, atomically.

    Raises:
        SaveError: The disk is full or the place cannot be written; what stood there stays whole.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={"format": "pt"},
            )
        except SafetensorError as error:
            raise SaveError(f"{path} could not be written: {error}") from error


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or a number."""
    if isinstance(size, int) and size > 0:
        return size
    binary = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    units = {**binary, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    text = str(size).strip().upper() if isinstance(size, str) else ""
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit() and float(number) * factor >= 1:
            return int(float(number) * factor)
    raise SaveError(f"max_shard_size={size!r}: accepted are a number of bytes above 0 and texts like '5GB' or '200MB'.")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch type from its name ("bfloat16"), or None for None."""
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"dtype={dtype!r}: accepted are float32, bfloat16, float16, float64, 'auto' and None.")
    return found


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
