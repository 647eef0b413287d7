"""What every pipeline shares: the parts it holds, where they run, and one, many or a stream of inputs.

A single input gives one result, a list gives a list, and anything else that can be iterated over gives an iterator
which works through it lazily, as in transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from ..base.errors import InputError
from ..base.placement import as_device

T = TypeVar("T")


class Pipeline:
    """Base of the one-call doors.

    Args:
        model: The model; it is put on `device` and into evaluation mode.
        tokenizer: The tokenizer of the model.
        feature_extractor: The feature extractor of the model.
        processor: Holds a tokenizer and a feature extractor; used for those that are not given.
        device: Where to run: "cuda:1", a number (-1 is the CPU) or a torch.device. None is the first accelerator,
            or the CPU where there is none.
        dtype: Convert the model to this dtype.
        batch_size: How many inputs (or windows of a long one) go through the model together; 1 unless given.
        num_workers: Default of what calls say; see the pipeline for speech recognition. Others read as they go.
        call_defaults: Keywords for every call; those of the call itself come first.

    Raises:
        InputError: The device or the dtype does not exist here, or batch_size is below 1.
    """

    task = ""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        processor: Any = None,
        device: int | str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **call_defaults: Any,
    ) -> None:
        self.model: Any = model
        self.processor: Any = processor
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None)
        self.feature_extractor: Any = (
            feature_extractor if feature_extractor is not None else getattr(processor, "feature_extractor", None)
        )
        self.batch_size = positive("batch_size", 1 if batch_size is None else batch_size)
        self.num_workers = num_workers
        self.call_defaults = call_defaults
        self._place(device, dtype)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return next(self.model.parameters()).dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and everything that prepares its inputs, so that `pipeline(model=folder)` finds them."""
        for part in (self.model, self.tokenizer, self.feature_extractor):
            if part is not None:
                part.save_pretrained(save_directory, **(kwargs if part is self.model else {}))

    def _read_assistant(self, loader: Any) -> None:
        """Load the model that drafts, where `assistant_model` among the defaults of calls says where it is."""
        assistant = self.call_defaults.get("assistant_model")
        if isinstance(assistant, (str, os.PathLike)):
            assistant = loader.from_pretrained(assistant, dtype=self.dtype, device=self.device)
            self.call_defaults["assistant_model"] = assistant

    def _place(self, device: int | str | torch.device | None, dtype: str | torch.dtype | None) -> None:
        spread = getattr(self.model, "hf_device_map", None)
        if spread is not None and device is not None:
            raise InputError(
                f"device={device!r}: the model was loaded with device_map and stays where that put it; leave it out."
            )
        if dtype not in (None, "auto"):
            self.model.to(resolve_dtype(dtype))
        if spread is None:
            self.model.to(resolve_device(device))
        self.model.eval()

    def _each(
        self, inputs: Any, run: Callable[[Iterator[Any], int], Iterator[T]], batch_size: int | None
    ) -> T | list[T] | Iterator[T]:
        """Run a stream function on one input, on a list of them, or lazily on anything that can be iterated over."""
        size = self.batch_size if batch_size is None else positive("batch_size", batch_size)
        if is_single(inputs):
            return next(run(iter([inputs]), size))
        if isinstance(inputs, (list, tuple)):
            return list(run(iter(inputs), size))
        return run(_iterate(inputs), size)


def is_single(inputs: Any) -> bool:
    """True for what is one input: a path, bytes, an array, a dict, an open file; False for lists and streams.

    Raises:
        InputError: It is neither one input nor a collection of them.
    """
    if isinstance(inputs, (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, torch.Tensor, Mapping)):
        return True
    if hasattr(inputs, "read") or hasattr(inputs, "get_all_samples"):
        return True
    if hasattr(inputs, "__iter__") or (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")):
        return False
    raise InputError(
        f"inputs is a {type(inputs).__name__}; pass a path, bytes, an open file, an array, a dict with 'raw' and "
        "'sampling_rate', or a list or an iterator of those."
    )


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items, pulled as they are needed."""
    while batch := list(islice(items, size)):
        yield batch


def resolve_device(device: int | str | torch.device | None) -> torch.device:
    """The device meant by a number, a name or None.

    Raises:
        InputError: There is no such device here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    return as_device(device)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The floating dtype meant by a name like "bfloat16".

    Raises:
        InputError: It is not a floating dtype.
    """
    name = str(dtype).removeprefix("torch.")
    resolved = getattr(torch, name, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"dtype={name!r}: expected float32, bfloat16 or float16.")
    return resolved


def positive(name: str, value: int) -> int:
    """A whole number of at least 1.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r}: a whole number of at least 1 is needed.")
    return value


def _iterate(collection: Any) -> Iterator[Any]:
    if hasattr(collection, "__iter__"):
        return iter(collection)
    return (collection[index] for index in range(len(collection)))
