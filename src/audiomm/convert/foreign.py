"""What every reader of a foreign format hands over: weights under the hub's names, sizes, and where text comes from."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import CheckpointError, CorruptCheckpointError
from ..base.hub import Source


@dataclass
class Foreign:
    """One checkpoint, read.

    Attributes:
        name: Of the file or folder, for messages and to tell large-v1 and large-v2 apart.
        weights: By the names that transformers gives them, in the type they are stored in.
        config: Content of config.json.
        generation: Content of generation_config.json, as far as the checkpoint says; None when it says nothing.
        tokens: Bytes of the text tokens in order of id, where the file holds a vocabulary.
        source: The folder or repository whose tokenizer files belong to the model.
        model: The class that has these weights.
    """

    name: str
    weights: dict[str, Tensor]
    config: dict[str, Any]
    generation: dict[str, Any] | None = None
    tokens: list[bytes] | None = None
    source: Source | None = None
    model: str = "WhisperForConditionalGeneration"


class ByteReader:
    """Numbers, texts and arrays of a binary file one after the other; the end of the file is an error, not a zero.

    Arrays lie in the file's memory map: nothing is read before it is used.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.place = path, path.stat().st_size, 0
        if not self.size:
            raise CorruptCheckpointError(f"{path} is empty (0 bytes).")
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @property
    def at_end(self) -> bool:
        return self.place == self.size

    def numbers(self, form: str, what: str) -> tuple[Any, ...]:
        """Little-endian numbers in the notation of `struct`."""
        values: tuple[Any, ...] = struct.unpack_from(
            f"<{form}", self._map, self._take(struct.calcsize(f"<{form}"), what)
        )
        return values

    def count(self, form: str, limit: int, what: str) -> int:
        """One number from 0 to `limit`."""
        start = self.place
        value = int(self.numbers(form, what)[0])
        if not 0 <= value <= limit:
            raise CorruptCheckpointError(
                f"{self.path}: byte {start:,} says {value:,} for {what}; accepted are 0 to {limit:,}."
            )
        return value

    def raw(self, length: int, what: str) -> bytes:
        start = self._take(length, what)
        return self._map[start : start + length]

    def text(self, length: int, what: str) -> str:
        try:
            return self.raw(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpointError(f"{self.path}: {what} before byte {self.place:,} is not UTF-8.") from error

    def array(self, kind: str, count: int, what: str) -> np.ndarray[Any, Any]:
        """`count` numbers of a numpy type such as "<f2"."""
        dtype = np.dtype(kind)
        start = self._take(dtype.itemsize * count, what)
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def _take(self, length: int, what: str) -> int:
        if self.place + length > self.size:
            raise CorruptCheckpointError(
                f"{self.path} ends at byte {self.size:,}, in {what}: {self.place + length - self.size:,} more bytes "
                "are needed. The download may be cut short; fetch the file again."
            )
        start, self.place = self.place, self.place + length
        return start


def to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The array as a tensor, over the same memory where numbers lie at addresses that a processor likes."""
    return torch.from_numpy(np.require(array, requirements=("C", "ALIGNED", "WRITEABLE")))


def rename(weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...], prefix: str) -> dict[str, Tensor]:
    """The weights with every rule's first text replaced by its second, in order, and a prefix before."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in rules:
            name = name.replace(old, new)
        renamed[prefix + name] = tensor
    return renamed


def size_of(weights: Mapping[str, Tensor], name: str, axis: int, where: str) -> int:
    """Length of one axis of a weight that gives the model its size.

    Raises:
        CheckpointError: There is no such weight.
    """
    tensor = weights.get(name)
    if tensor is None or tensor.dim() <= axis:
        raise CheckpointError(f"{where}: {name} is missing among its {len(weights):,} tensors; is it a Whisper model?")
    return int(tensor.shape[axis])
