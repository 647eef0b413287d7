"""Any way of feeding tokens to any cache gives what full attention over all tokens gives."""

from __future__ import annotations

import pytest
import torch

from audiomm import GenerationError
from audiomm.layers import attention
from audiomm.layers.attention import attend, attend_eager
from audiomm.layers.cache import Cache, LayerSpec, PassThrough
from audiomm.layers.embedding import sinusoids
from audiomm.layers.masks import CAUSAL, attention_mask

ROWS, HEADS, KV_HEADS, WIDTH, LENGTH = 2, 4, 2, 8, 9


def qkv(length: int = LENGTH):
    generator = torch.Generator().manual_seed(3)
    shapes = [(ROWS, HEADS, length, WIDTH), (ROWS, KV_HEADS, length, WIDTH), (ROWS, KV_HEADS, length, WIDTH)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def reference(queries, keys, values, valid, window):
    """Full attention, one query at a time."""
    answer = torch.zeros_like(queries)
    for row in range(ROWS):
        for head in range(HEADS):
            for place in range(queries.shape[2]):
                seen = [k for k in range(place + 1) if valid[row, k] and (window is None or place - k < window)]
                if not valid[row, place]:
                    continue
                key, value = keys[row, head // 2, seen], values[row, head // 2, seen]
                answer[row, head, place] = (key @ queries[row, head, place] * 0.5).softmax(0) @ value
    return answer


def run(cache, chunks, valid, window, eager, data):
    queries, keys, values = data
    positions = None if bool(valid.all()) else (valid.long().cumsum(1) - 1).masked_fill(~valid, -1)
    pieces, start = [], 0
    for count in chunks:
        part = slice(start, start + count)
        # Padding is told at the first pass; later tokens count on from there.
        given = positions[:, part] if positions is not None and start == 0 else None
        slots = cache.reserve(count, given, ROWS, torch.device("cpu"))
        mask = attention_mask(count, slots.queries, slots.keys, past=slots.past, window=window)
        pair = cache.update(0, keys[:, :, part], values[:, :, part])
        if eager:
            pieces.append(attend_eager(queries[:, :, part], *pair, mask, scale=0.5)[0])
        else:
            pieces.append(attend(queries[:, :, part], *pair, mask, scale=0.5))
        start += count
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("chunks", [[9], [5, 4], [4, 1, 1, 1, 1, 1], [3, 2, 3, 1]])
def test_chunks_through_a_cache_equal_full_attention(chunks, fixed, padding, window, eager):
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid[1, :padding] = False
    data = qkv()
    cache = Cache([LayerSpec(KV_HEADS, WIDTH)], rows=ROWS, length=12 if fixed else None, fixed=fixed)
    found = run(cache, chunks, valid, window, eager, data)
    # With padding the window counts real tokens, as positions do; the padding lies before all of them.
    expected = reference(*data, valid, window)
    assert torch.allclose(
        found[valid[:, None].expand(-1, HEADS, -1)], expected[valid[:, None].expand(-1, HEADS, -1)], atol=1e-5
    )
    assert torch.isfinite(found).all()


def test_without_a_cache_it_is_plain_causal_attention():
    data = qkv()
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    found = run(PassThrough(), [LENGTH], valid, None, False, data)
    assert torch.allclose(found, reference(*data, valid, None), atol=1e-5)


def test_masks_are_left_out_where_kernels_are_faster_without():
    assert attention_mask(1, None, None, past=7) is None
    assert attention_mask(5, None, None) == CAUSAL
    assert attention_mask(5, None, None, window=5) == CAUSAL
    assert attention_mask(5, None, None, window=4).shape == (1, 1, 5, 5)
    assert attention_mask(2, None, None, past=3).tolist() == [[[[True] * 4 + [False], [True] * 5]]]


@pytest.mark.parametrize("fixed", [False, True])
def test_reordered_repeated_and_cropped_rows_hold_what_they_should(fixed):
    _, keys, values = qkv(4)
    cache = Cache([LayerSpec(KV_HEADS, WIDTH)], rows=ROWS, length=8 if fixed else None, fixed=fixed)
    positions = torch.tensor([[0, 1, 2, 3], [-1, 0, 1, 2]])
    cache.reserve(4, positions, ROWS, torch.device("cpu"))
    cache.update(0, keys, values)
    cache.repeat(3)
    cache.reorder(torch.tensor([5, 5, 0, 1, 2, 3]))
    stored = cache.to_legacy_cache()[0][0]
    assert torch.equal(stored, keys[[1, 1, 0, 0, 0, 1]])
    assert cache.positions[:, :4].tolist() == positions[[1, 1, 0, 0, 0, 1]].tolist()
    slots = cache.reserve(1, None, 6, torch.device("cpu"))
    assert slots.queries[:, 0].tolist() == [3, 3, 4, 4, 4, 3]
    cache.update(0, keys[[0, 0, 0, 1, 1, 1], :, :1], values[[0, 0, 0, 1, 1, 1], :, :1])
    cache.crop(4)
    assert cache.length == 4
    assert torch.equal(cache.to_legacy_cache()[0][0], stored)
    cache.reset()
    assert cache.length == 0
    assert cache.cross(0) is None


def test_a_fixed_cache_keeps_its_addresses_and_says_when_it_is_full():
    _, keys, values = qkv(3)
    cache = Cache([LayerSpec(KV_HEADS, WIDTH)], rows=ROWS, length=4, fixed=True)
    address = cache.layers[0].keys.data_ptr()
    cache.set_cross(0, keys, values)
    cross = cache.cross(0)[0].data_ptr()
    for _ in range(2):
        cache.reserve(3, None, ROWS, torch.device("cpu"))
        cache.update(0, keys, values)
        assert cache.layers[0].keys.data_ptr() == address
        with pytest.raises(GenerationError, match="holds 4 tokens and 6 are needed"):
            cache.reserve(3, None, ROWS, torch.device("cpu"))
        cache.reset()
        cache.set_cross(0, keys + 1, values)
        assert cache.cross(0)[0].data_ptr() == cross
    with pytest.raises(GenerationError, match="needs to know how many slots"):
        Cache([LayerSpec(KV_HEADS, WIDTH)], fixed=True)


def test_rows_of_one_audio_share_its_keys():
    queries, keys, values = qkv()
    beams = (
        torch.cat([queries, queries * 0.5, queries + 1])
        .view(3, ROWS, HEADS, LENGTH, WIDTH)
        .transpose(0, 1)
        .flatten(0, 1)
    )
    shared = attend(beams, keys, values, scale=0.5)
    copied = attend(beams, keys.repeat_interleave(3, 0), values.repeat_interleave(3, 0), scale=0.5)
    eager, weights = attend_eager(beams, keys, values, scale=0.5)
    assert torch.allclose(shared, copied, atol=1e-6)
    assert torch.allclose(shared, eager, atol=1e-6)
    assert weights.shape == (3 * ROWS, HEADS, LENGTH, LENGTH)


def test_sinusoids_are_sines_then_cosines():
    table = sinusoids(50, 6)
    place = torch.arange(50.0)
    for index, timescale in enumerate([1.0, 100.0, 10000.0]):
        assert torch.allclose(table[:, index], (place / timescale).sin(), atol=1e-5)
        assert torch.allclose(table[:, 3 + index], (place / timescale).cos(), atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("seen", [None, "2-D", "for all heads", "a head each"])
@pytest.mark.parametrize("length", [1, 3])
def test_heads_that_share_keys_read_them_as_if_each_had_its_own(monkeypatch, length, seen, copied):
    monkeypatch.setattr(attention, "copies_shared_keys", lambda device: copied)
    queries, keys, values = qkv()
    queries = queries[:, :, :length]
    sizes = {"2-D": (length, LENGTH), "for all heads": (ROWS, 1, length, LENGTH)}
    mask = None if seen is None else torch.rand(sizes.get(seen, (ROWS, HEADS, length, LENGTH))) < 0.7
    if mask is not None:
        mask[..., 0] = True
    found = attend(queries, keys, values, mask, scale=0.5)
    wanted, _ = attend_eager(queries, keys, values, mask, scale=0.5)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-6)
