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
    attended = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask if isinstance(mask, Tensor) else None,
        dropout_p=dropout,
        is_causal=mask == CAUSAL if isinstance(mask, str) else False,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return _unfold(attended, folds) if folds > 1 else attended


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
