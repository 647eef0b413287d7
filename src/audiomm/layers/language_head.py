"""From states to scores of tokens: which positions are scored, the soft cap of Gemma, and the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import ShapeError

#: Label that the loss leaves out.
IGNORED_LABEL = -100


def token_logits(hidden: Tensor, head: nn.Linear, cap: float | None, keep: int | Tensor = 0) -> Tensor:
    """Scores of the next token, float32.

    The cap is taken in float32: in bfloat16 scores near it come out equal, and the choice between them is lost.

    Args:
        hidden: (rows, length, width).
        head: Width to vocabulary.
        cap: Largest score; scores approach it smoothly. None is no cap.
        keep: How many of the last positions to score, 0 for all, or the indices (kept,) of some.

    Returns:
        (rows, kept, vocabulary).
    """
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    logits: Tensor = head(hidden[:, kept]).float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def shifted_loss(
    logits: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
) -> Tensor | None:
    """Cross-entropy of each position's scores against the label one further.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), -100 where no loss is wanted; None gives None.
        num_items_in_batch: What to divide the sum by, when a batch comes in several pieces; None is the number of
            labels of this piece.

    Raises:
        ShapeError: Scores and labels are of different lengths.
    """
    if labels is None:
        return None
    if logits.shape[:2] != labels.shape:
        raise ShapeError(
            f"labels are of shape {tuple(labels.shape)} and the scores of shape {tuple(logits.shape)}: with labels, "
            "score all positions (logits_to_keep=0) and pass one label for each token."
        )
    return label_loss(logits, following_labels(labels), num_items_in_batch)


def following_labels(labels: Tensor) -> Tensor:
    """(rows, length) the label after each position, -100 at the last."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def label_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of each position's scores (rows, length, vocabulary) against its own label (rows, length)."""
    scores, wanted = logits.flatten(0, 1).float(), labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return functional.cross_entropy(scores, wanted, ignore_index=IGNORED_LABEL)
    total = functional.cross_entropy(scores, wanted, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)
