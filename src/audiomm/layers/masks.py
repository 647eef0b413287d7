"""One builder of attention masks, for every model and every cache.

The rule: a query at position q sees the key at position k when k is not empty (k >= 0), k <= q, and, where the layer
has a window, q - k < window. Tokens of a block (a picture) see on to the end of their block. Answers are as small as
they can be, so that kernels keep their fast path: None when every key is seen, CAUSAL when plain causality is all
there is, else a boolean tensor that is True where something may be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

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
    ends: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:
    """Who sees whom.

    Args:
        query_count: New tokens a row.
        query_positions: (rows, queries) positions, -1 for padding; None when they follow on from `past`.
        key_positions: (rows, keys) position of every key, -1 for an empty slot; None when they are 0, 1, 2, ...
        past: Tokens before the first query; used where positions are not given.
        window: How many tokens back a query looks, itself included; None is all.
        ends: (rows, queries) position of the last key a query sees; None when that is its own (see `block_ends`).
        device: Where the mask is built when no positions are given.

    Returns:
        None (every key is seen), "causal" (queries and keys are the same tokens), or (rows, 1, queries, keys) bool.
    """
    total = past + query_count
    unwindowed = window is None or total <= window
    if key_positions is None and query_positions is None and unwindowed and ends is None:
        if query_count == 1:
            return None
        if past == 0:
            return CAUSAL
    given = query_positions if key_positions is None else key_positions
    device = device if given is None else given.device
    keys = torch.arange(total, device=device)[None] if key_positions is None else key_positions
    queries = torch.arange(past, total, device=device)[None] if query_positions is None else query_positions
    keys, queries = keys[:, None, None, :], queries[:, None, :, None]
    seen = (keys >= 0) & (keys <= (queries if ends is None else ends[:, None, :, None]))
    if window is not None:
        seen = seen & (queries - keys < window)
    # A padding query sees nothing; torch's kernels answer with zeros (since 2.5), as transformers does.
    return seen


def block_ends(blocks: Tensor, positions: Tensor) -> Tensor:
    """(rows, queries) positions up to which tokens see when those of one block see each other.

    Args:
        blocks: (rows, queries) bool, True for tokens of a picture; a run of them is one block.
        positions: (rows, queries) of the same tokens.
    """
    count = blocks.shape[1]
    goes_on = functional.pad(blocks[:, 1:] & blocks[:, :-1], (0, 1))
    places = torch.arange(count, device=blocks.device).masked_fill(goes_on, count)
    last = places.flip(1).cummin(dim=1).values.flip(1)
    return positions.expand(blocks.shape).gather(1, last)


def layer_masks(
    query_count: int,
    slots: Slots,
    windows: Iterable[int | None],
    *,
    blocks: Tensor | None = None,
    kept: slice | Tensor | None = None,
) -> dict[int | None, Mask]:
    """One mask for each kind of layer of a decoder, by its window (None: full attention).

    Args:
        query_count: New tokens a row.
        slots: What `Cache.reserve` answered.
        windows: The windows that occur in the decoder.
        blocks: (rows, queries) bool, True for tokens of a picture, which see each other in layers with a window.
        kept: Which of the queries the masks are for, as an index of columns; None is all.
    """
    return {window: _layer_mask(query_count, slots, window, blocks, kept) for window in set(windows)}


def packed_masks(
    position_ids: Tensor, kinds: Mapping[int | None, str], blocks: Tensor | None = None
) -> dict[str, Tensor] | None:
    """Masks by kind of layer for rows that hold several sequences, which do not see each other.

    Args:
        position_ids: (rows, tokens); a sequence begins where they do not go on by one.
        kinds: What each window's kind of layer is called.
        blocks: As for `layer_masks`.

    Returns:
        (rows, 1, tokens, tokens) bool for each kind; None where every row is one sequence.
    """
    begins = functional.pad(position_ids.diff(dim=1) != 1, (1, 0))
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    sequence, places = begins.cumsum(dim=1), torch.arange(begins.shape[1], device=begins.device)[None]
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    found = {}
    for window, kind in kinds.items():
        ends = None if blocks is None or window is None else block_ends(blocks, places)
        found[kind] = same & attention_mask(begins.shape[1], places, places, window=window, ends=ends)  # type: ignore[operator]
    return found


def ready_masks(
    given: Any, kinds: Mapping[int | None, str], kept: slice | Tensor | None = None
) -> dict[int | None, Tensor]:
    """The masks that the caller of a decoder made: (rows, 1, queries, keys) bool for kinds of layers, by window.

    Args:
        given: `attention_mask` as passed: (rows, 1, queries, keys), True or 0.0 where a key is seen; a dict of such by
            kind of layer, where None stands for the kind's own rule; a padding mask, or nothing, is no such mask.
        kinds: What each window's kind of layer is called.
        kept: Which of the queries the masks are for, as an index of columns; None is all.
    """
    if isinstance(given, Tensor) and given.dim() == 4:
        given = dict.fromkeys(kinds.values(), given)
    if not isinstance(given, dict):
        return {}
    found = {}
    for window, kind in kinds.items():
        mask = given.get(kind)
        if mask is not None:
            mask = mask if kept is None else mask[:, :, kept]
            found[window] = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return found


def _layer_mask(
    count: int, slots: Slots, window: int | None, blocks: Tensor | None, kept: slice | Tensor | None
) -> Mask:
    past, keys = slots.of(window)
    blocks = None if window is None else blocks
    last_only = isinstance(kept, slice) and kept == slice(-1, None)
    if last_only and blocks is None and slots.queries is None and keys is None:
        # The last token alone: what a decode step asks for.
        return attention_mask(1, None, None, past=past + count - 1, window=window, device=slots.device)
    if blocks is None and kept is None:
        return attention_mask(count, slots.queries, keys, past=past, window=window, device=slots.device)
    queries = slots.queries
    if queries is None:
        queries = torch.arange(past, past + count, device=slots.device)[None]
    ends = None if blocks is None else block_ends(blocks, queries)
    if kept is not None:
        queries = queries[:, kept]
        ends = None if ends is None else ends[:, kept]
    return attention_mask(count, queries, keys, past=past, window=window, ends=ends, device=slots.device)


def step_masks(slots: Slots, windows: Iterable[int | None], dtype: torch.dtype) -> dict[int | None, Tensor | None]:
    """Who one new token a row sees, for each kind of layer of a decoder: what is added to the scores, or None.

    Attention would make the same of a boolean mask, in every layer. No key comes after the newest token. A window
    without positions is not looked at: its keys are the last of those that are kept.
    """
    found: dict[int | None, Tensor | None] = {}
    for window in set(windows):
        keys = slots.of(window)[1]
        if keys is None or slots.queries is None:
            found[window] = None
            continue
        first = 0 if window is None else (slots.queries - (window - 1)).clamp_(min=0)
        found[window] = torch.where((keys >= first)[:, None, None], 0.0, -torch.inf).to(dtype)
    return found
