"""The loss of a batch as the Trainer needs it: from the model, smoothed, or by the user's function; and its weight.

A model's loss is a mean over label tokens. Batches that are accumulated or spread over processes hold different numbers
of them, so a mean of means is not the mean: the Trainer weights each batch by its label tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base.modeling import PreTrainedModel
from ..layers.language_head import DecoderAnswers

IGNORE = -100


def label_tokens(labels: Any, shifted: bool) -> Tensor | None:
    """How many labels a model's loss averages over, as a 0-dimensional tensor; None where that cannot be told.

    Args:
        labels: The batch's labels; IGNORE marks what does not count.
        shifted: Whether each position predicts the next label, so that the first label of a row is nobody's target.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() == 0:
        return None
    counted = labels[:, 1:] if shifted and labels.dim() == 2 else labels
    return (counted != IGNORE).sum()


def smoothed_loss(logits: Tensor, labels: Tensor, epsilon: float, shifted: bool) -> Tensor:
    """Cross entropy with the share `epsilon` of each target spread evenly over the vocabulary.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length); IGNORE marks what does not count.
        epsilon: Between 0 and 1.
        shifted: As in `label_tokens`.

    Source: "Rethinking the Inception Architecture", arXiv:1512.00567.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, label_smoothing=epsilon
    )


def is_shifted(model: Any, labels: Any) -> bool:
    """Whether a model compares the scores of each position with the label after it, as Gemma does and Whisper not."""
    model = without_adapters(model)
    if isinstance(model, PreTrainedModel):
        return isinstance(model, DecoderAnswers)
    config = getattr(model, "config", None)
    is_sequence = isinstance(labels, Tensor) and labels.dim() == 2
    return is_sequence and not getattr(config, "is_encoder_decoder", False) and hasattr(model, "generate")


def without_adapters(model: Any) -> Any:
    """The model inside PEFT's wrapper, if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def finite(*values: Tensor | float) -> bool:
    """True when none of the values is NaN or infinite; reads them from the device."""
    return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)
