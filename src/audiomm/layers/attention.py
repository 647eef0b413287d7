"""attend(): the one gate to scaled_dot_product_attention, with an eager twin that can also return the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .masks import CAUSAL, Mask


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask = None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention by torch's fused kernels.

    Args:
        queries: (rows, heads, queries, head_dim). When there are n times as many rows as the keys have, n adjacent
            rows share one row of keys (beams over one audio); no mask is possible then.
        keys, values: (rows, kv_heads, keys, head_dim); heads may be a multiple of kv_heads.
        mask: None, "causal" or a boolean tensor that broadcasts to (rows, heads, queries, keys), True where seen.
        scale: Factor on the dot products.
        dropout: Probability of dropping an attention weight.

    Returns:
        (rows, heads, queries, head_dim), of the queries' dtype.
    """
    rows = queries.shape[0]
    folds = rows // keys.shape[0]
    if folds > 1:
        queries = _fold(queries, folds)
    shape, each = queries.shape, queries.shape[1] // keys.shape[1]
    given = mask if isinstance(mask, Tensor) else None
    one_for_all = given is None or given.dim() == 2 or given.shape[-3] == 1
    # Where heads share keys, fused kernels want more than one query and, but for the CPU's, no mask.
    if each > 1 and shape[2] == 1 and one_for_all and not isinstance(mask, str):
        queries = queries.reshape(shape[0], -1, each, shape[3])
    elif each > 1 and given is not None and copies_shared_keys(queries.device):
        keys, values = keys.repeat_interleave(each, dim=1), values.repeat_interleave(each, dim=1)
    attended = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=given,
        dropout_p=dropout,
        is_causal=mask == CAUSAL if isinstance(mask, str) else False,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    ).reshape(*shape[:3], values.shape[-1])
    return _unfold(attended, folds) if folds > 1 else attended


def copies_shared_keys(device: torch.device) -> bool:
    """Whether it is quicker there to copy keys for every head that reads them than to go without a fused kernel."""
    return device.type != "cpu"


def read_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """`attend` for one query a row, as two matrix products: on a CPU the fused kernel leaves most of its time unused.

    Args:
        queries: (rows, heads, head_dim). n adjacent rows may share one row of keys, then without a mask.
        keys, values: (rows, heads, keys, head_dim), each of its own dtype: products are taken in it.
        mask: What to add to the scores, from `added_mask`.
        scale: Factor on the dot products.

    Returns:
        (rows, heads x head_dim), of the queries' dtype.
    """
    rows, heads, width = queries.shape
    stored = keys.shape[0]
    if stored == rows:
        folded = queries.reshape(rows * heads, 1, width)
    else:
        folded = queries.view(stored, -1, heads, width).transpose(1, 2).reshape(stored * heads, -1, width)
    keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    folded = folded.to(keys.dtype)
    # With beta=0 the first argument is not looked at.
    added, beta = (folded.narrow(2, 0, 1), 0) if mask is None else (mask, 1)
    scores = torch.baddbmm(added, folded, keys, beta=beta, alpha=scale)
    attended = torch.bmm(scores.softmax(dim=-1).to(values.dtype), values).to(queries.dtype)
    if stored != rows:
        attended = attended.view(stored, heads, -1, width).transpose(1, 2)
    return attended.reshape(rows, heads * width)


def added_mask(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A mask (rows, 1, 1, keys) of bool as numbers to add to scores (rows x heads, 1, keys): 0, or minus infinity."""
    numbers = torch.where(mask, 0.0, -torch.inf).to(dtype)
    return numbers.expand(-1, heads, -1, -1).flatten(0, 1)


def attend_eager(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask = None,
    *,
    scale: float,
    dropout: float = 0.0,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow, obvious twin of `attend`.

    Args:
        head_mask: (heads,) or broadcastable to (rows, heads, queries, keys): factor on the weights of each head.

    Returns:
        The attended values, as `attend` gives them, and the weights (rows, heads, queries, keys).
    """
    folds = queries.shape[0] // keys.shape[0]
    groups = queries.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(folds, dim=0).repeat_interleave(groups, dim=1)
    values = values.repeat_interleave(folds, dim=0).repeat_interleave(groups, dim=1)
    scores = (queries @ keys.transpose(-1, -2)) * scale
    if isinstance(mask, str):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    dropped = functional.dropout(weights, dropout) if dropout else weights
    if head_mask is not None:
        dropped = dropped * (head_mask.view(1, -1, 1, 1) if head_mask.dim() == 1 else head_mask)
    return dropped @ values, weights


def _fold(queries: Tensor, folds: int) -> Tensor:
    """(rows x folds, heads, length, head_dim) -> (rows, heads, folds x length, head_dim)."""
    _, heads, length, width = queries.shape
    return queries.view(-1, folds, heads, length, width).transpose(1, 2).reshape(-1, heads, folds * length, width)


def _unfold(attended: Tensor, folds: int) -> Tensor:
    """The way back from `_fold`."""
    rows, heads, _, width = attended.shape
    return attended.view(rows, heads, folds, -1, width).transpose(1, 2).reshape(rows * folds, heads, -1, width)


def attend_one(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` of one token a row in a decode step, with no factor on the scores.

    Args:
        queries: (rows, heads, 1, head_dim).
        keys, values: (rows, kv_heads, keys, head_dim).
        mask: (rows, 1, 1, keys), added to the scores; None sees all.

    Returns:
        (rows, heads x head_dim).
    """
    rows, heads, _, width = queries.shape
    # The queries that read the same keys line up as if they were tokens, and the keys are read once.
    queries = queries.reshape(rows, keys.shape[1], -1, width)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
    return attended.reshape(rows, heads * width)
