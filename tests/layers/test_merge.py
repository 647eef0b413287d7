"""Features on their places: order, lengths, gradients, and counts that do not agree."""

from __future__ import annotations

import pytest
import torch

from audiomm.base.errors import PlaceholderError
from audiomm.layers.merge import check_places, place_features, refuse_empty_places

PLACES = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()


def test_features_go_to_their_places_in_order():
    features = torch.arange(6.0)[:, None].expand(-1, 3).reshape(3, 2, 3)
    merged = place_features(torch.full((2, 6, 3), -1.0), PLACES, features, kind="image")
    assert merged[..., 0].tolist() == [[-1, 0, 1, -1, 2, 3], [-1, -1, -1, -1, 4, 5]]


def test_items_of_different_lengths_and_types_fit():
    items = [torch.ones(3, 2, dtype=torch.float64), torch.full((1, 2), 2.0), torch.full((2, 2), 3.0)]
    merged = place_features(torch.zeros(2, 6, 2, dtype=torch.bfloat16), PLACES, items, kind="audio")
    assert merged.dtype == torch.bfloat16
    assert merged[..., 1].tolist() == [[0, 1, 1, 0, 1, 2], [0, 0, 0, 0, 3, 3]]


def test_gradients_reach_features_and_the_embeddings_that_stay():
    embeddings, features = torch.zeros(2, 6, 2, requires_grad=True), torch.zeros(3, 2, 2, requires_grad=True)
    place_features(embeddings, PLACES, features, kind="image").sum().backward()
    assert torch.equal(features.grad, torch.ones(3, 2, 2))
    assert torch.equal(embeddings.grad[..., 0].bool(), ~PLACES)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 2], "tokens: 6, features: 4. Row 1 .* holds 2 image places.*from item 2 on there are none left"),
        ([2, 2, 2, 2], "4 image items were passed and the 2 rows have places for 3"),
        ([3, 3], "Row 0 of the batch holds 4 image places.*items of 3 features each"),
        ([2, 3, 1], "Row 0 .*items of 2, 3 features"),
        ([], "Row 0 .*none left"),
    ],
)
def test_counts_that_do_not_agree_are_told_by_row(lengths, message):
    with pytest.raises(PlaceholderError, match=message):
        check_places(PLACES, lengths, kind="image")


def test_places_without_anything_for_them_are_refused():
    with pytest.raises(PlaceholderError, match="row 1 of the batch holds 2 audio places, but input_features was not"):
        refuse_empty_places(PLACES & torch.tensor([[False], [True]]), kind="audio", argument="input_features")
    refuse_empty_places(torch.zeros(2, 3, dtype=torch.bool), kind="audio", argument="input_features")
