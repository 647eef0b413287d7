"""What a tokenizer returns: the dictionary of ids and masks, and the padding and tensor making behind it.

The keys and the attribute access are those of transformers' BatchEncoding; padding works on plain lists, so that
nothing of it is kept in the tokenizer between calls (threads may share one).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Encoding

from .errors import InputError

#: What is written where a sequence is filled up; `input_ids` take the pad token's id.
_FILL: dict[str, Any] = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}

TensorKind = Literal["pt", "np"]


class BatchEncoding(dict[str, Any]):
    """Ids and masks by name; `batch.input_ids` reads the same as `batch["input_ids"]`.

    Attributes:
        encodings: The `tokenizers.Encoding` of every text, before padding; empty when made from plain data.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encodings: Sequence[Encoding] = (),
        tensor_type: TensorKind | None = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data or {})
        self.__dict__["encodings"] = list(encodings)
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    @property
    def data(self) -> dict[str, Any]:
        """This dictionary itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} in this BatchEncoding, only {', '.join(self) or 'nothing'}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self.encodings[key]
        return super().__getitem__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.encodings)

    def to(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> BatchEncoding:
        """Move tensors to a device and cast the floating ones to a dtype; ids and masks keep theirs.

        Raises:
            TypeError: An argument is neither a device nor a dtype.
        """
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, (str, int, torch.device)):
                device = argument
            else:
                raise TypeError(f"to() takes a device and a dtype, not {type(argument).__name__}.")
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None, **kwargs)
        return self

    def convert_to_tensors(self, tensor_type: TensorKind | None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Replace lists by tensors ("pt") or arrays ("np"), in place.

        Raises:
            InputError: The rows of one key differ in length, or `tensor_type` is unknown.
        """
        if tensor_type is not None:
            for name, value in self.items():
                self[name] = _to_tensor(name, [value] if prepend_batch_axis else value, tensor_type)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The token strings of one text."""
        return list(self.encodings[batch_index].tokens)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of one text, the number of the word it belongs to; None for special tokens."""
        return list(self.encodings[batch_index].word_ids)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token, 0 for the text, 1 for its pair, None for special tokens."""
        return list(self.encodings[batch_index].sequence_ids)

    def char_to_token(self, batch_index: int, char_index: int) -> int | None:
        """The token that holds a character of one text; None when no token does."""
        return self.encodings[batch_index].char_to_token(char_index)


def pad_rows(
    rows: Mapping[str, list[Any]],
    *,
    name: str,
    pad_id: int,
    length: int,
    side: str,
) -> dict[str, list[Any]]:
    """Fill every row of the known keys up to `length`; longer rows and unknown keys stay as they are.

    Args:
        rows: Lists of sequences by key.
        name: The key that takes `pad_id` (the ids).
        pad_id: Id written where `name` is filled up.
        length: Length in tokens.
        side: "right" or "left".
    """
    fills = {**_FILL, name: pad_id}
    padded = {}
    for key, sequences in rows.items():
        if key not in fills:
            padded[key] = sequences
            continue
        missing = [[fills[key]] * max(length - len(row), 0) for row in sequences]
        pairs = zip(sequences, missing, strict=True)
        padded[key] = [[*row, *fill] if side == "right" else [*fill, *row] for row, fill in pairs]
    return padded


def cut_to_fit(first: Encoding, second: Encoding | None, cut: str, budget: int, side: str) -> None:
    """Shorten a text, or a text and its pair, in place.

    Args:
        first: The text.
        second: Its pair, or None.
        cut: "longest_first", "only_first" or "only_second".
        budget: Tokens that may be left of both together.
        side: The end that is cut off, "right" or "left".

    Raises:
        InputError: The text that is to be cut is too short for that.
    """
    lengths = [len(first), 0 if second is None else len(second)]
    if sum(lengths) <= budget:
        return
    if cut == "only_second" and second is None:
        raise InputError("truncation='only_second' needs text_pair.")
    if cut == "longest_first":
        longer = 0 if lengths[0] > lengths[1] else 1
        shorter = min(lengths[1 - longer], budget // 2) if second is not None else 0
        kept = [0, 0]
        kept[longer], kept[1 - longer] = budget - shorter, shorter
    else:
        kept = [budget - lengths[1], lengths[1]] if cut == "only_first" else [lengths[0], budget - lengths[0]]
    if min(kept) < 0:
        raise InputError(
            f"truncation={cut!r} cannot fit {lengths[0]} + {lengths[1]} tokens into {budget}; use 'longest_first'."
        )
    first.truncate(kept[0], direction=side)
    if second is not None:
        second.truncate(kept[1], direction=side)


def plain_list(value: Any) -> Any:
    """`value` with tensors and arrays, also those inside lists, turned into Python lists and numbers."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(not isinstance(item, int) for item in value):
        return [plain_list(item) for item in value]
    return list(value) if isinstance(value, (tuple, range)) else value


def token_ids_of(token_ids: Any) -> list[int] | list[list[int]]:
    """Token ids from a number, list, array or tensor of them; a nested list for a batch.

    Raises:
        TypeError: Something in there is not an integer.
        InputError: An id is negative.
    """
    ids = plain_list(token_ids)
    if isinstance(ids, int) and not isinstance(ids, bool):
        ids = [ids]
    if isinstance(ids, list) and ids and all(isinstance(row, list) for row in ids):
        return [_check_row(row) for row in ids]
    return _check_row(ids)


def _check_row(row: Any) -> list[int]:
    if not isinstance(row, list) or isinstance(row, (str, bytes)):
        raise TypeError(
            "token ids must be an int or a list, array or tensor of ints (or a batch of those), "
            f"not {type(row).__name__}."
        )
    for token_id in row:
        if not isinstance(token_id, int):
            raise TypeError(f"token ids must be integers, got {token_id!r} ({type(token_id).__name__}).")
        if token_id < 0:
            raise InputError(
                f"token id {token_id} is negative. Labels hold -100 where the loss skips them: "
                "replace those by the pad token's id before decoding."
            )
    return row


def _to_tensor(name: str, value: Any, tensor_type: TensorKind) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(value) if tensor_type == "pt" else np.asarray(value)
    if tensor_type not in ("pt", "np"):
        raise InputError(f"return_tensors={tensor_type!r} is not known; use 'pt' (torch), 'np' (numpy) or None.")
    value = plain_list(value)
    if value == []:
        value = np.zeros((0, 0), dtype=np.int64)
    elif isinstance(value, list) and all(isinstance(row, list) for row in value) and any(value):
        lengths = sorted({len(row) for row in value})
        if len(lengths) > 1:
            raise InputError(
                f"the rows of {name!r} have {lengths[0]} to {lengths[-1]} entries and cannot be one tensor. "
                "Pass padding=True (and truncation=True with max_length to cut)."
            )
    try:
        array = np.asarray(value, dtype=np.int64 if _all_integers(value) else None)
        return torch.from_numpy(array) if tensor_type == "pt" else array
    except (TypeError, ValueError) as error:
        raise InputError(f"{name!r} cannot be made a tensor: {error}") from error


def _all_integers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.issubdtype(value.dtype, np.integer))
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return all(_all_integers(item) for item in value)
    return isinstance(value, int)
