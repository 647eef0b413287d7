"""Padding masks of passes that go on from a cache: they may hide more of what it holds than they did before.

So they do in a chat of several rows: what stands behind the end of a row that was done before others is padding in the
next turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import GenerationError, ShapeError
from .cache import Cache, PassThrough
from .regions import is_inside


def positions_behind(cache: Cache | PassThrough, mask: Tensor, count: int) -> Tensor:
    """Positions (rows, count) of new tokens, -1 for padding; the cache forgets what the mask hides.

    Args:
        mask: (rows, held and new tokens) bool, False for padding.

    Raises:
        ShapeError: The mask is of another length.
        GenerationError: It shows tokens that the cache does not hold.
    """
    positions = (mask.long().cumsum(dim=1) - 1).masked_fill(~mask, -1)[:, -count:]
    # Compiled code must not depend on a count that changes every step.
    if torch.compiler.is_compiling() or is_inside() or not isinstance(cache, Cache) or not cache.length:
        return positions
    if mask.shape[1] != cache.length + count:
        raise ShapeError(
            f"attention_mask has {mask.shape[1]} columns, but there are {cache.length} tokens in past_key_values and "
            f"{count} new ones: pass {cache.length + count}, one for each."
        )
    if count == 1:
        # Steps are many, and ask nothing of the host.
        return positions
    seen, held = mask[:, : cache.length], cache.held() >= 0
    unheld = (seen & ~held).any(dim=1)
    if bool(unheld.any()):
        raise GenerationError(
            f"row {int(unheld.nonzero()[0])} of attention_mask shows tokens that past_key_values do not hold: what was "
            "padding before must be 0 again, and a batch that drafts have helped to write cannot go on from its cache."
        )
    if bool((held & ~seen).any()):
        cache.hide(seen)
    newest = cache.held().amax(dim=1, keepdim=True)
    return torch.where(positions < 0, positions, positions + newest + 1 - seen.sum(dim=1, keepdim=True))
