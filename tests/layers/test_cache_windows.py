"""Layers with a window keep few tokens, and answer as if they kept all: growing or in rings, padded, cropped."""

from __future__ import annotations

import pytest
import torch

from audiomm import GenerationError
from audiomm.layers import storage
from audiomm.layers.attention import attend, attend_eager
from audiomm.layers.cache import Cache, LayerSpec, PassThrough
from audiomm.layers.masks import layer_masks

HEADS, KV_HEADS, WIDTH, LENGTH = 2, 1, 4, 40
CHUNKS = {
    "at once": [40],
    "token by token": [1] * 40,
    "prompt, then steps": [17] + [1] * 23,
    "pieces": [13, 13, 13, 1],
    "steps of drafts": [5, 3, 2, 3, 1, 3, 3, 2, 3, 3, 3, 3, 3, 3],
}


@pytest.fixture(autouse=True)
def short_spare(monkeypatch):
    monkeypatch.setattr(storage, "SPARE", 3)


def draw(rows: int, length: int = LENGTH):
    generator = torch.Generator().manual_seed(7)
    shapes = [(rows, heads, length, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def positions_of(padding: list[int], length: int = LENGTH):
    places = torch.arange(length).expand(len(padding), length) - torch.tensor(padding)[:, None]
    return places.clamp(min=-1)


def expected(data, padding, window, blocks=None):
    """Attention over everything, by a mask written out from the definition."""
    queries, keys, values = data
    places = positions_of(padding, queries.shape[2])
    late = places[:, None, :] <= places[:, :, None]
    if blocks is not None:
        numbers = (blocks & ~torch.nn.functional.pad(blocks[:, :-1], (1, 0))).cumsum(1)
        together = blocks[:, :, None] & blocks[:, None, :] & (numbers[:, :, None] == numbers[:, None, :])
        late = late | together
    mask = late & (places[:, None, :] >= 0)
    if window is not None:
        mask = mask & (places[:, :, None] - places[:, None, :] < window)
    return attend_eager(queries, keys, values, mask[:, None], scale=0.5)[0]


def run(cache, data, chunks, padding, windows, blocks=None, start=0):
    """{window: (rows, heads, tokens, width)} by feeding the tokens from `start` on in chunks."""
    queries, keys, values = data
    pieces: dict = {window: [] for window in windows}
    for count in chunks:
        part = slice(start, start + count)
        given = positions_of(padding)[:, part] if any(padding) and start == 0 else None
        slots = cache.reserve(count, given, len(queries), torch.device("cpu"))
        masks = layer_masks(count, slots, windows, blocks=None if blocks is None else blocks[:, part])
        for layer, window in enumerate(windows):
            pair = cache.update(layer, keys[:, :, part], values[:, :, part])
            pieces[window].append(attend(queries[:, :, part], *pair, masks[window], scale=0.5))
        start += count
    return {window: torch.cat(parts, dim=2) for window, parts in pieces.items()}


def assert_real_tokens_equal(found, wanted, padding):
    for row, pads in enumerate(padding):
        assert torch.allclose(found[row, :, pads:], wanted[row, :, pads:], atol=1e-5)


def make(windows, fixed, rows):
    specs = [LayerSpec(KV_HEADS, WIDTH, window=window) for window in windows]
    return Cache(specs, rows=rows, length=LENGTH + 4 if fixed else None, fixed=fixed)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("padding", [[0, 0], [0, 4], [2, 5]])
@pytest.mark.parametrize("fixed", [False, True])
def test_any_window_in_any_cache_equals_full_attention(fixed, padding, chunks):
    windows, data = [None, 1, 4, 9, 60], draw(2)
    if any(padding) and chunks[0] < max(padding):
        chunks = [8, *[1] * (LENGTH - 8)]
    found = run(make(windows, fixed, 2), data, chunks, padding, windows)
    for window in windows:
        assert_real_tokens_equal(found[window], expected(data, padding, window), padding)


@pytest.mark.parametrize(
    ("kind", "padding"),
    [("none", [0, 0]), ("growing", [0, 0]), ("growing", [0, 3]), ("fixed", [0, 0]), ("fixed", [0, 3])],
)
def test_tokens_of_a_picture_see_each_other_in_layers_with_a_window_only(kind, padding):
    windows, data = [None, 4, 30], draw(2)
    blocks = torch.zeros(2, LENGTH, dtype=torch.bool)
    blocks[0, 5:12], blocks[1, 9:11], blocks[1, 14:24], blocks[0, 26:39] = True, True, True, True
    cache = PassThrough() if kind == "none" else make(windows, kind == "fixed", 2)
    chunks = [40] if kind == "none" else [12, 12, 15, 1]
    found = run(cache, data, chunks, padding, windows, blocks)
    for window in windows:
        own = None if window is None else blocks
        assert_real_tokens_equal(found[window], expected(data, padding, window, own), padding)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_few_tokens_can_be_taken_back_and_written_anew(fixed):
    windows, padding = [None, 5], [0, 2]
    data, other = draw(2), [part.flip(2) for part in draw(2)]
    cache = make(windows, fixed, 2)
    run(cache, data, [11, 1, 1, 1, 1, 1, 1, 1, 1, 1], padding, windows)
    for taken in (3, 1, 2):
        before = cache.length
        run(cache, other, [taken], padding, windows, start=before)
        cache.crop(before)
        assert cache.length == before
        run(cache, data, [1], padding, windows, start=before)
    found = run(cache, data, [1] * (LENGTH - cache.length), padding, windows, start=cache.length)
    for window in windows:
        wanted = expected(data, padding, window)[:, :, -found[window].shape[2] :]
        assert torch.allclose(found[window], wanted, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_more_than_is_kept_cannot_be_taken_back(fixed):
    windows = [None, 5]
    cache = make(windows, fixed, 1)
    run(cache, draw(1), [30], [0], windows)
    with pytest.raises(GenerationError, match="12 of 30 tokens cannot be taken back: layers with a window of 5"):
        cache.crop(18)
    assert cache.length == 30
    cache.reset()
    run(cache, draw(1), [4], [0], windows)
    cache.crop(0)
    assert cache.length == 0


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_move_and_multiply_with_all_they_hold(fixed):
    windows, padding = [None, 4], [0, 3]
    data = draw(2)
    cache = make(windows, fixed, 2)
    run(cache, data, [15, 1, 1], padding, windows)
    cache.repeat(2)
    order = torch.tensor([3, 0, 1, 2])
    cache.reorder(order)
    rows = torch.tensor([0, 0, 1, 1])[order]
    moved = [part[rows] for part in data]
    found = run(cache, moved, [1] * 12, [0] * 4, windows, start=17)
    for window in windows:
        wanted = expected(data, padding, window)[rows][:, :, 17:29]
        assert torch.allclose(found[window], wanted, atol=1e-5)


def test_storage_of_a_window_stays_small():
    windows = [None, 6]
    growing, fixed = make(windows, False, 1), make(windows, True, 1)
    for cache in (growing, fixed):
        run(cache, draw(1), [25] + [1] * 15, [0], windows)
        assert cache.layers[0].keys.shape[2] >= LENGTH
        assert cache.layers[1].keys.shape[2] <= 6 - 1 + 2 * 3
    # What is kept is no view of what was dropped.
    kept = growing.layers[1].keys
    assert kept.untyped_storage().nbytes() <= 4 * 2 * kept[:, :, 0].numel() * (6 - 1 + 2 * 3)


def test_a_ring_keeps_its_addresses():
    windows = [None, 4]
    cache = make(windows, True, 1)
    data = draw(1)
    run(cache, data, [9], [0], windows)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    run(cache, data, [1] * 25, [0], windows, start=9)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


def test_a_cache_with_windows_has_no_tuple_form():
    cache = make([None, 4], False, 1)
    run(cache, draw(1), [5], [0], [None, 4])
    with pytest.raises(GenerationError, match="they drop tokens"):
        cache.to_legacy_cache()
