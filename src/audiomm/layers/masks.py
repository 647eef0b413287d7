"""One builder of attention masks, for every model and every cache.

The rule: a query at position q sees the key at position k when k is not empty (k >= 0), k <= q, and, where the layer
has a window, q - k < window. Answers are as small as they can be, so that kernels keep their fast path: None when
every key is seen, CAUSAL when plain causality is all there is, else a boolean tensor that is True where something may
be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import Slots

CAUSAL: Literal["causal"] = "causal"

Mask = Tensor | Literal["causal"] | None


def attention_mask(
    query_count: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    *,
    past: int = 0,
    window: int | None = None,
) -> Mask:
    """Who sees whom.

    Args:
        query_count: New tokens a row.
        query_positions: (rows, queries) positions, -1 for padding; None when they follow on from `past`.
        key_positions: (rows, keys) position of every key, -1 for an empty slot; None when they are 0, 1, 2, ...
        past: Tokens before the first query; used where positions are not given.
        window: How many tokens back a query looks, itself included; None is all.

    Returns:
        None (every key is seen), "causal" (queries and keys are the same tokens), or (rows, 1, queries, keys) bool.
    """
    total = past + query_count
    unwindowed = window is None or total <= window
    if key_positions is None and unwindowed:
        if query_count == 1:
            return None
        if past == 0:
            return CAUSAL
    device = None if key_positions is None else key_positions.device
    keys = torch.arange(total, device=device)[None] if key_positions is None else key_positions
    queries = torch.arange(past, total, device=device)[None] if query_positions is None else query_positions
    keys, queries = keys[:, None, None, :], queries[:, None, :, None]
    seen = (keys >= 0) & (keys <= queries)
    if window is not None:
        seen = seen & (queries - keys < window)
    # A padding query sees nothing, and a softmax over nothing is NaN: let it see everything, nobody reads its answer.
    return seen | (queries < 0)


def layer_masks(query_count: int, slots: Slots, windows: Iterable[int | None]) -> dict[int | None, Mask]:
    """One mask for each kind of layer of a decoder, by its window (None: full attention).

    Args:
        query_count: New tokens a row.
        slots: What `Cache.reserve` answered.
        windows: The windows that occur in the decoder.
    """
    return {
        window: attention_mask(query_count, slots.queries, slots.keys, past=slots.past, window=window)
        for window in set(windows)
    }
