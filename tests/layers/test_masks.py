"""Masks are as small as they can be, and say what the definition says."""

from __future__ import annotations

import pytest
import torch

from audiomm.layers.cache import Slots
from audiomm.layers.masks import CAUSAL, attention_mask, block_ends, layer_masks


def definition(queries, keys, window, ends=None):
    ends = queries if ends is None else ends
    rows = [
        [[0 <= k <= e and (window is None or q - k < window) for k in key] for q, e in zip(query, end, strict=True)]
        for query, key, end in zip(queries, keys, ends, strict=True)
    ]
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("past", [0, 4])
def test_a_mask_follows_its_definition(window, past):
    queries, keys = [[*range(past, past + 5)]], [[*range(past + 5)]]
    mask = attention_mask(5, None, None, past=past, window=window)
    wanted = definition(queries, keys, window)
    if isinstance(mask, str):
        assert past == 0
        mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert torch.equal(mask, wanted)
    padded_queries, padded_keys = [[-1, *queries[0][:-1]]], [[-1, *keys[0][:-1]]]
    mask = attention_mask(5, torch.tensor(padded_queries), torch.tensor(padded_keys), window=window)
    assert torch.equal(mask, definition(padded_queries, padded_keys, window))


def test_no_mask_is_built_where_kernels_are_faster_without():
    plain = Slots(0, None, None)
    assert layer_masks(6, plain, [None, 6, 3])[None] == CAUSAL
    assert layer_masks(6, plain, [None, 6, 3])[6] == CAUSAL
    assert layer_masks(1, Slots(9, None, None), [None, 20]) == {None: None, 20: None}
    assert layer_masks(6, plain, [None], kept=slice(-1, None)) == {None: None}
    assert layer_masks(6, plain, [None], blocks=torch.ones(1, 6, dtype=torch.bool)) == {None: CAUSAL}


def test_ends_are_those_of_the_run_a_token_is_in():
    blocks = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert block_ends(blocks, torch.arange(3, 10)[None]).tolist() == [[3, 6, 6, 6, 7, 9, 9], [4, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("kept", [slice(-1, None), slice(-3, None), torch.tensor([1, 4, 5])])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_some_queries_are_rows_of_the_mask_of_all(kept, window, padded):
    blocks = torch.tensor([[0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    positions = torch.tensor([[-1, 0, 1, 2, 3, 4, 5]]) if padded else None
    for chosen in (None, blocks):
        slots = Slots(0, positions, positions)
        some = layer_masks(7, slots, [window], blocks=chosen, kept=kept)[window]
        explicit = positions if padded else torch.arange(7)[None]
        ends = None if chosen is None or window is None else block_ends(chosen, explicit)
        whole = attention_mask(7, explicit, explicit, window=window, ends=ends)[:, :, kept]
        assert torch.equal(torch.ones_like(whole) if some is None else some, whole)
