"""Rows of a cache that come and go: what a row reads is its own, whatever the others hold and wherever it lies."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from audiomm.layers.cache import Cache, LayerSpec

SPECS = [LayerSpec(2, 4, cross_length=3), LayerSpec(2, 4, cross_length=3)]


def filled(texts: list[list[float]], fixed: bool = False, kind: str | None = None) -> Cache:
    """A cache whose row i holds the numbers of texts[i] as keys, and twice them as values; padded at the left."""
    rows, length = len(texts), max(map(len, texts))
    cache = Cache(SPECS, rows=rows, length=12, fixed=fixed)
    if kind is not None:
        cache.keep_cross_in(kind)
    numbers = torch.tensor([[0.0] * (length - len(text)) + text for text in texts])
    gaps = torch.tensor([[length - len(text)] for text in texts])
    positions = (torch.arange(length) - gaps).clamp(min=-1)
    cache.reserve(length, positions, rows, numbers.device)
    for layer in range(len(SPECS)):
        pairs = numbers[:, None, :, None].expand(-1, 2, -1, 4) + layer
        cache.update(layer, pairs.clone(), 2 * pairs)
        heard = torch.tensor([text[0] for text in texts])[:, None, None, None].expand(-1, 2, 3, 4)
        cache.set_cross(layer, heard.clone(), -heard)
    return cache


def step(cache: Cache, numbers: list[float]) -> None:
    rows = len(numbers)
    cache.reserve(1, None, rows, torch.device("cpu"))
    for layer in range(len(SPECS)):
        pairs = torch.tensor(numbers)[:, None, None, None].expand(-1, 2, 1, 4) + layer
        cache.update(layer, pairs, 2 * pairs)


def held(cache: Cache, layer: int = 1) -> list[list[float]]:
    """The numbers that each row holds, by position, which begin at 0 and have no gap."""
    keys, values, positions = cache.view(layer)
    assert torch.equal(values, 2 * keys)
    found = []
    for row, places in zip(keys[:, 0, :, 0], positions, strict=True):
        order = places.argsort()[(places < 0).sum() :]
        assert places[order].tolist() == list(range(len(order)))
        found.append((row[order] - layer).tolist())
    return found


def heard(cache: Cache) -> list[float]:
    pair = cache.cross(1)
    assert pair is not None
    assert torch.equal(pair[1], -pair[0])
    return pair[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fixed", [False, True])
def test_who_enters_takes_a_row_and_the_others_go_on(fixed: bool) -> None:
    cache = filled([[1, 2, 3], [4, 5], [6, 7, 8]], fixed)
    step(cache, [10, 11, 12])
    places = addresses(cache) if fixed else []
    cache.enter(torch.tensor([2, 0]), filled([[20, 21], [30]]))
    assert held(cache) == [[30], [4, 5, 11], [20, 21]]
    assert heard(cache) == [30, 4, 20]
    step(cache, [40, 41, 42])
    assert held(cache) == [[30, 40], [4, 5, 11, 41], [20, 21, 42]]
    assert not fixed or addresses(cache) == places


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("count", [3, -1])
def test_rows_move_together_and_hold_what_they_held(fixed: bool, count: int) -> None:
    cache = filled([[1, 2], [4, 5, 6]], fixed)
    step(cache, [10, 11])
    cache.enter(torch.tensor([1]), filled([[20, 21]]))
    # The first column is nobody's any more.
    cache.shift(count)
    assert cache.length == 4 + count
    assert held(cache) == [[1, 2, 10], [20, 21]]
    step(cache, [30, 31])
    assert held(cache) == [[1, 2, 10, 30], [20, 21, 31]]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_kept_in_8_bits_enters_as_it_is(fixed: bool, kind: str) -> None:
    cache, other = filled([[1, 2, 3], [4, 5]], fixed, kind), filled([[7]], False, kind)
    before = [pair[0].view(torch.int8)[0].clone() for pair in cache.cross_pairs if pair is not None]
    cache.enter(torch.tensor([1]), other)
    for mine, theirs, first in zip(cache.cross_pairs, other.cross_pairs, before, strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine[1].view(torch.int8)[1], theirs[1].view(torch.int8)[0])
        assert torch.equal(mine[0].view(torch.int8)[0], first)


def test_an_empty_fixed_cache_takes_rows_and_lets_others_rest() -> None:
    cache = Cache(SPECS, rows=3, length=12, fixed=True)
    cache.shift(4)
    cache.enter(torch.tensor([1]), filled([[7, 8, 9]]))
    cache.leave(torch.tensor([0, 2]))
    step(cache, [1, 2, 3])
    assert held(cache) == [[1], [7, 8, 9, 2], [3]]
    slots = cache.reserve(1, None, 3, torch.device("cpu"))
    assert slots.queries is not None
    # Who rests reads positions that exist, however long the others go on.
    assert slots.queries[:, 0].tolist() == [1, 4, 1]
    assert heard(cache) == [0, 7, 0]


def test_growing_rows_become_more() -> None:
    cache = filled([[1, 2, 3], [4, 5]])
    cache.widen(2)
    cache.enter(torch.tensor([2, 3]), filled([[20, 21], [30]]))
    step(cache, [6, 7, 8, 9])
    assert held(cache) == [[1, 2, 3, 6], [4, 5, 7], [20, 21, 8], [30, 9]]
    assert heard(cache) == [1, 4, 20, 30]
    cache.keep([0, 3])
    assert held(cache) == [[1, 2, 3, 6], [30, 9]]


def addresses(cache: Cache) -> list[int]:
    tensors: list[Tensor] = [layer.keys for layer in cache.layers if layer.keys is not None]
    tensors += [pair[0] for pair in cache.cross_pairs if pair is not None]
    return [tensor.data_ptr() for tensor in tensors]


def read(cache: Cache, texts: list[list[float]]) -> None:
    """Read more tokens in each row: the numbers of each text."""
    numbers = torch.tensor(texts)
    cache.reserve(numbers.shape[1], None, len(texts), numbers.device)
    for layer in range(len(cache.specs)):
        pairs = numbers[:, None, :, None].expand(-1, 2, -1, 4) + layer
        cache.update(layer, pairs.clone(), 2 * pairs)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_rows_take_back_as_many_tokens_as_each_likes(fixed: bool, seed: int) -> None:
    random, window, most = Random(seed), 5, 260
    specs = [LayerSpec(2, 4), LayerSpec(2, 4, window=window)]
    # Row 1 is padded at the left, and row 3 soon holds nothing that counts.
    texts = [[float(row * 1000 + number) for number in range(3 - row % 2)] for row in range(4)]
    cache = Cache(specs, rows=4, length=most, fixed=fixed)
    positions = torch.tensor([[0, 1, 2], [-1, 0, 1], [0, 1, 2], [-1, 0, 1]])
    numbers = torch.tensor([[0.0] * (3 - len(text)) + text for text in texts])
    cache.reserve(3, positions, 4, numbers.device)
    for layer in range(2):
        pairs = numbers[:, None, :, None].expand(-1, 2, -1, 4) + layer
        cache.update(layer, pairs.clone(), 2 * pairs)
    while (longest := 1 + max(map(len, texts[:3]))) < most:
        drafts = random.randint(0, min(most - longest, random.choice([3, 12, 32])))
        new = [[float(row * 1000 + len(text) + place) for place in range(drafts + 1)] for row, text in enumerate(texts)]
        read(cache, new)
        # A fast row, a slow one, and one like neither: now this one, now that.
        taken = [drafts + 1, 1, random.randint(1, drafts + 1)]
        turn = longest // 40 % 3
        taken = taken[turn:] + taken[:turn]
        texts[:3] = [text + more[:count] for text, more, count in zip(texts, new, taken, strict=False)]
        texts[3] = []
        room = min(most - 1 - max(map(len, texts[:3])), 32) + 1
        cache.take_back(torch.tensor([*(drafts + 1 - count for count in taken), cache.length]), room)
        assert held(cache, 0)[:3] == texts[:3] and held(cache, 0)[3] == []
        keys, values, places = cache.view(1)
        assert torch.equal(values, 2 * keys)
        for row, text in enumerate(texts[:3]):
            found = {int(place): float(key) - 1 for place, key in zip(places[row], keys[row, 0, :, 0], strict=True)}
            # What the next token sees.
            for place in range(max(0, len(text) - window + 1), len(text)):
                assert found[place] == text[place]
        if fixed:
            assert cache.length + room <= most
