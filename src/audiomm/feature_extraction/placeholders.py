"""Marks of media in text, `<|image|>` and its like: counted, compared with the media passed, and expanded.

A mark stands for one medium; in what the model reads, it becomes as many tokens as the medium has features. Whatever
does not agree is an error with the numbers in it, for a model that gets other counts answers about something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..base.chat import TYPED_END, TYPED_START
from ..base.errors import PlaceholderError
from ..media.samples import has_channels_last


@dataclass
class Rows:
    """Media of one kind in a batch of texts.

    Attributes:
        items: All of them, in order.
        counts: How many belong to each text; None leaves that to the marks in the texts.
    """

    items: list[Any]
    counts: list[int] | None = None

    @classmethod
    def of(cls, media: Any, is_one: Callable[[Any], bool]) -> Rows | None:
        """From one medium, a list of them, or a list of lists (one a text); None when there is none.

        Args:
            media: What the caller passed.
            is_one: Whether something is a single medium.
        """
        if media is None or (isinstance(media, (list, tuple)) and not media):
            return None
        if is_one(media):
            return cls([media])
        rows = list(media)
        if any(row is None or not is_one(row) for row in rows):
            lists = [[] if row is None else [row] if is_one(row) else list(row) for row in rows]
            items = [item for row in lists for item in row]
            return cls(items, [len(row) for row in lists]) if items else None
        return cls(rows)


def is_image(value: Any) -> bool:
    """One picture: an array of up to three axes, a path, bytes, a dict, or an object with a size; not a list."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim <= 3
    return not isinstance(value, (list, tuple))


def is_clip(value: Any) -> bool:
    """One clip: samples along one axis or with channels, a list of numbers, a path, bytes or a dict."""
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], (int, float, np.number))
    if isinstance(value, (np.ndarray, torch.Tensor)):
        # Channels behind samples are no batch either: the extractor says what to do about them.
        return value.ndim <= 1 or (value.ndim == 2 and (value.shape[0] == 1 or has_channels_last(value.shape)))
    return True


def is_video(value: Any) -> bool:
    """One video: frames along the first of four axes, a list of pictures, a path, bytes or a dict."""
    if isinstance(value, (list, tuple)):
        return bool(value) and not isinstance(value[0], (str, bytes, Mapping, list, tuple)) and _is_frame(value[0])
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim <= 4
    return True


def _is_frame(value: Any) -> bool:
    return value.ndim == 3 if isinstance(value, (np.ndarray, torch.Tensor)) else hasattr(value, "size")


@dataclass
class Expansion:
    """Where one mark stood in a text and where what took its place stands; characters."""

    start: int
    end: int
    new_end: int


def marks(text: str, mark: str) -> int:
    """How often `mark` stands in `text`, those that a user typed in a chat not counted."""
    return len(_pattern([mark]).findall(_without_typed(text)))


def check_counts(kind: str, mark: str, texts: Sequence[str], media: Rows | None) -> None:
    """Compare the marks in each text with the media passed.

    Raises:
        PlaceholderError: They differ.
    """
    found = [marks(text, mark) for text in texts]
    passed = 0 if media is None else len(media.items)
    if media is not None and media.counts is not None:
        if len(media.counts) != len(texts):
            raise PlaceholderError(
                f"{len(texts)} texts but lists of {kind} for {len(media.counts)}: pass one list for each text (an "
                "empty one where there is none), or one flat list in reading order."
            )
        for row, (count, wanted) in enumerate(zip(media.counts, found, strict=True)):
            if count != wanted:
                raise PlaceholderError(
                    f"text {row} holds {wanted} of the mark {mark} but {count} {kind} were passed for it; they must "
                    "agree."
                )
    if sum(found) != passed:
        each = f" ({', '.join(map(str, found))} in each)" if len(found) > 1 else ""
        raise PlaceholderError(
            f"the text holds {sum(found)} of the mark {mark}{each} but {passed} {kind} were passed; they must agree."
        )


def expand(texts: Sequence[str], replacements: Mapping[str, Iterable[str]]) -> tuple[list[str], list[list[Expansion]]]:
    """Put the text of each medium in place of its mark, in reading order.

    Args:
        texts: With as many marks as there are replacements.
        replacements: {mark: what takes the place of its occurrences, over all texts}.

    Returns:
        (texts, where the marks of each stood).
    """
    queues: dict[str, Iterator[str]] = {mark: iter(items) for mark, items in replacements.items()}
    pattern = _pattern(list(queues))
    expanded, places = [], []
    for text in texts:
        pieces: list[str] = []
        moved: list[Expansion] = []
        last = grown = 0
        for match in pattern.finditer(text) if queues else ():
            replacement = next(queues[match.group()])
            pieces += [text[last : match.start()], replacement]
            grown += len(replacement) - len(match.group())
            moved.append(Expansion(match.start(), match.end(), match.end() + grown))
            last = match.end()
        expanded.append("".join([*pieces, text[last:]]))
        places.append(moved)
    return expanded, places


def _pattern(found: Sequence[str]) -> re.Pattern[str]:
    """Any of the marks, where no user typed it."""
    ordered = sorted(found, key=len, reverse=True)
    return re.compile(f"(?<!{TYPED_START})(?:{'|'.join(map(re.escape, ordered))})")


def _without_typed(text: str) -> str:
    return re.sub(f"{TYPED_START}.*?{TYPED_END}", "", text) if TYPED_START in text else text


def shifted(spans: Sequence[tuple[int, int]], moved: Sequence[Expansion]) -> list[tuple[int, int]]:
    """Places in a text (in characters) after its marks were expanded."""

    def shift(place: int) -> int:
        before = [expansion for expansion in moved if expansion.end <= place]
        return place + (before[-1].new_end - before[-1].end if before else 0)

    return [(shift(start), shift(end)) for start, end in spans]
