"""Checks of what a tokenizer is called with: options that fit together, text that is text, encodings to pad."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .encoding import plain_list
from .errors import InputError

_LOGGER = logging.getLogger("audiomm.base.tokenizer")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> str:
    """`value` if it is one of the choices.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
    return str(value)


def truncation_strategy(truncation: bool | str | None, padding: bool | str, max_length: int | None) -> str | None:
    """The way to cut ("longest_first", "only_first", "only_second"), or None for not at all.

    Raises:
        InputError: An option is not known, or `max_length` would do nothing.
    """
    one_of("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
    if truncation is True:
        return "longest_first"
    if truncation in (False, None, "do_not_truncate"):
        if max_length is None or padding == "max_length":
            return None
        if truncation is None and not padding:
            _LOGGER.warning("max_length=%s cuts the text; pass truncation=True to say so.", max_length)
            return "longest_first"
        raise InputError(
            f"max_length={max_length} has no effect with truncation={truncation!r} and padding={padding!r}: "
            "pass truncation=True to cut, or padding='max_length' to fill up."
        )
    return one_of("truncation", truncation, ("longest_first", "only_first", "only_second"))


def as_batch(text: Any, pair: Any, split_into_words: bool) -> tuple[list[Any], list[Any] | None, bool]:
    """Texts and pairs as lists, and whether a list was passed.

    Raises:
        TypeError: Something is not text.
        InputError: There are not as many pairs as texts.
    """
    one = _is_words if split_into_words else _is_text
    wanted = "a list of words, or a list of those" if split_into_words else "a string or a list of strings"
    is_batch = not one(text) or (split_into_words and text == [])
    for name, value in (("text", text), ("text_pair", pair)):
        items = value if is_batch else [value]
        if name == "text_pair" and value is None:
            continue
        if not isinstance(items, (list, tuple)):
            raise TypeError(f"{name} must be {wanted}, not {type(items).__name__}.")
        for number, item in enumerate(items):
            if not one(item):
                raise TypeError(f"{name} must be {wanted}; item {number} is {type(item).__name__}.")
    if not is_batch:
        return [text], None if pair is None else [pair], False
    if pair is not None and len(pair) != len(text):
        raise InputError(f"{len(text)} texts but {len(pair)} text pairs; pass one pair for each text.")
    return list(text), None if pair is None else list(pair), True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def as_columns(encodings: Any) -> dict[str, Any]:
    """Lists by key, from one dictionary or a list of them.

    Raises:
        TypeError: Something is not a dictionary.
        InputError: The list is empty or its dictionaries hold different keys.
    """
    if isinstance(encodings, Mapping):
        return {name: plain_list(value) for name, value in encodings.items()}
    if not isinstance(encodings, (list, tuple)) or not all(isinstance(item, Mapping) for item in encodings):
        raise TypeError(f"pad takes an encoding, or a list of encodings, not {type(encodings).__name__}.")
    if not encodings:
        raise InputError("pad got an empty list; there is nothing to fill up.")
    for number, item in enumerate(encodings):
        if set(item) != set(encodings[0]):
            raise InputError(f"encoding {number} holds {sorted(item)} but the first holds {sorted(encodings[0])}.")
    return {name: [plain_list(item[name]) for item in encodings] for name in encodings[0]}
