"""Puts the features of pictures, sounds and films on their places among the token embeddings, and counts first.

Features are handed out in order: all places of row 0, then those of row 1. A total that happens to fit can still give
one row's picture to another, so the count is checked row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.errors import PlaceholderError


def place_features(embeddings: Tensor, places: Tensor, features: Tensor | Sequence[Tensor], *, kind: str) -> Tensor:
    """Replace the embeddings at `places` by `features`, in order.

    Args:
        embeddings: (rows, length, width) token embeddings.
        places: (rows, length) bool, True at the places of this kind.
        features: (items, tokens, width), or one (tokens, width) an item where these differ in length.
        kind: What an item is called in an error: "image", "audio", "video".

    Returns:
        (rows, length, width), of the dtype of the embeddings.

    Raises:
        PlaceholderError: The places of a row are not those of whole items, or items are left over.
    """
    lengths = [len(item) for item in features]
    check_places(places, lengths, kind=kind)
    together = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
    return embeddings.masked_scatter(places[..., None], together.to(embeddings))


def check_places(places: Tensor, lengths: Sequence[int], *, kind: str) -> None:
    """Compare the places in each row of (rows, length) with the tokens of the items, in order; see `place_features`.

    Raises:
        PlaceholderError: The places of a row are not those of whole items, or items are left over.
    """
    counts = places.sum(dim=1).tolist()
    word = kind.capitalize()
    total = f"{word} features and {kind} tokens do not match, tokens: {sum(counts)}, features: {sum(lengths)}"
    item = 0
    for row, count in enumerate(counts):
        left, first = count, item
        while left > 0 and item < len(lengths):
            left -= lengths[item]
            item += 1
        if left:
            size = _sizes(lengths[first:item])
            raise PlaceholderError(
                f"{total}. Row {row} of the batch holds {count} {kind} places, which is not a number of whole items: "
                f"from item {first} on there {size}. Each item needs as many places in the text as it has features; "
                "the processor makes them."
            )
    if item < len(lengths):
        raise PlaceholderError(
            f"{total}. {len(lengths)} {kind} items were passed and the {len(counts)} rows have places for {item}: add "
            "a mark to the text for each item, or pass fewer."
        )


def refuse_empty_places(places: Tensor, *, kind: str, argument: str) -> None:
    """Complain about places in (rows, length) for which nothing was passed.

    Raises:
        PlaceholderError: There is one.
    """
    counts = places.sum(dim=1).tolist()
    row = next((row for row, count in enumerate(counts) if count), None)
    if row is not None:
        raise PlaceholderError(
            f"row {row} of the batch holds {counts[row]} {kind} places, but {argument} was not passed: pass it, or "
            "take the marks out of the text."
        )


def _sizes(lengths: Sequence[int]) -> str:
    if not lengths:
        return "are none left"
    if len(set(lengths)) == 1:
        return f"are items of {lengths[0]} features each"
    return f"are items of {', '.join(map(str, lengths[:6]))} features"
