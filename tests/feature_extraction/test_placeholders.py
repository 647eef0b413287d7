"""Media told apart from lists of media, and marks in text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.chat import TYPED_END, TYPED_START
from audiomm.base.errors import PlaceholderError
from audiomm.feature_extraction.placeholders import (
    Rows,
    check_counts,
    expand,
    is_clip,
    is_image,
    is_video,
    marks,
    shifted,
)  # fmt: skip

PICTURE, CLIP, VIDEO = np.zeros((4, 4, 3)), np.zeros(9), np.zeros((2, 4, 4, 3))


@pytest.mark.parametrize(
    ("media", "is_one", "items", "counts"),
    [
        (PICTURE, is_image, 1, None),
        ("a.png", is_image, 1, None),
        (np.stack([PICTURE] * 3), is_image, 3, None),
        ([PICTURE, "b.png"], is_image, 2, None),
        ([[PICTURE, PICTURE], [], None, [PICTURE]], is_image, 3, [2, 0, 0, 1]),
        ([None, PICTURE], is_image, 1, [0, 1]),
        (CLIP, is_clip, 1, None),
        ([0.5, 0.25], is_clip, 1, None),
        ([[0.5, 0.25], [0.5]], is_clip, 2, None),
        (np.zeros((2, 9)), is_clip, 2, None),
        (torch.zeros(1, 9), is_clip, 1, None),
        ([[CLIP], [CLIP, CLIP]], is_clip, 3, [1, 2]),
        (VIDEO, is_video, 1, None),
        ([PICTURE, PICTURE], is_video, 1, None),
        ([VIDEO, "a.mp4"], is_video, 2, None),
        ([["a.mp4"], []], is_video, 1, [1, 0]),
        ([[PICTURE, PICTURE], [PICTURE]], is_video, 2, None),
    ],
)
def test_media_are_told_from_lists_of_media(media: Any, is_one: Any, items: int, counts: list[int] | None) -> None:
    rows = Rows.of(media, is_one)
    assert rows is not None and (len(rows.items), rows.counts) == (items, counts)


@pytest.mark.parametrize("media", [None, [], [[], []]])
def test_no_media_is_none(media: Any) -> None:
    assert Rows.of(media, is_image) is None


def test_marks_that_users_typed_do_not_count() -> None:
    text = f"<m> {TYPED_START}<m>{TYPED_END} <m>"
    assert marks(text, "<m>") == 2
    assert expand([text], {"<m>": ["A", "B"]})[0] == [f"A {TYPED_START}<m>{TYPED_END} B"]
    check_counts("images", "<m>", [text], Rows([PICTURE, PICTURE]))
    with pytest.raises(PlaceholderError, match="2 of the mark <m> but 3 images"):
        check_counts("images", "<m>", [text], Rows([PICTURE] * 3))


def test_marks_of_several_kinds_are_expanded_in_reading_order() -> None:
    texts, moved = expand(["a<i><s>b<i>", "<i>", "c"], {"<i>": ["1", "22", "333"], "<s>": ["-"]})
    assert texts == ["a1-b22", "333", "c"]
    spans = shifted([(0, 1), (7, 8), (8, 11)], moved[0])
    assert [texts[0][start:end] for start, end in spans] == ["a", "b", "22"]


def test_a_mark_that_begins_like_another_is_told_apart() -> None:
    assert expand(["<i><i2><i>"], {"<i>": ["a", "c"], "<i2>": ["b"]})[0] == ["abc"]
    assert expand(["<i"], {"<i": ["x"], "<i2": []})[0] == ["x"]
