"""From states to scores of tokens: which positions are scored, the soft cap of Gemma, the loss, and who has a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import GenerationError, ShapeError
from .cache import Cache, LayerSpec
from .embedding import check_token_ids
from .per_layer import PerLayerTable
from .quick import WithQuickStep, product

#: Label that the loss leaves out.
IGNORED_LABEL = -100


class DecoderAnswers(WithQuickStep):
    """What a model with a head answers by asking its decoder: embeddings, the head, and what a cache is to keep."""

    lm_head: nn.Linear

    def get_input_embeddings(self) -> nn.Embedding:
        table: nn.Embedding = self.get_decoder().get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.get_decoder().set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_per_layer_input_embeddings(self) -> PerLayerTable:
        """The table of the per-layer embeddings' token part."""
        table: PerLayerTable = self.get_decoder().embed_tokens_per_layer
        return table

    def set_per_layer_input_embeddings(self, value: PerLayerTable) -> None:
        self.get_decoder().embed_tokens_per_layer = value

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]:
        """The inputs of a forward call: transformers' name, which PEFT looks up when it wraps a causal model.

        Raises:
            GenerationError: It is replaced, as prompt tuning does; `generate` would leave its tokens out.
        """
        return lambda input_ids, **inputs: {"input_ids": input_ids, **inputs}

    @prepare_inputs_for_generation.setter
    def prepare_inputs_for_generation(self, value: Any) -> None:
        raise GenerationError(
            "generate() cannot put virtual tokens in front of a prompt: of PEFT's methods, use those that change "
            "layers, like LoRA."
        )

    def cache_specs(self) -> list[LayerSpec]:
        """What each decoder layer that has keys and values of its own keeps while generating."""
        specs: list[LayerSpec] = self.get_decoder().cache_specs()
        return specs

    def make_cache(self, batch: int, *, max_length: int | None = None, fixed: bool = False) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        cache: Cache = self.get_decoder().make_cache(batch, max_length=max_length, fixed=fixed)
        return cache


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


def quick_logits(head: nn.Module, cap: float | None) -> Callable[[Tensor], Tensor]:
    """`token_logits` of decode steps, (rows, width) -> (rows, vocabulary) float32."""
    project = product(head)

    def score(hidden: Tensor) -> Tensor:
        logits = project(hidden).float()
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    return score


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
    """(rows, length) the label after each position, -100 at the last.

    Raises:
        ShapeError: The labels are no (rows, length).
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        shape = tuple(getattr(labels, "shape", ()))
        raise ShapeError(f"labels are a {type(labels).__name__} of shape {shape}: (rows, tokens) is needed.")
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def loss_columns(labels: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
    """The columns (kept,) that some label follows: all that the loss needs to be scored.

    Raises:
        ShapeError: There are no labels, or columns are asked for in another way, too.
    """
    if labels is None or not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ShapeError("loss_positions_only=True scores what labels ask for: pass labels, and no logits_to_keep.")
    return (following_labels(labels) != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]


def label_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of each position's scores (rows, length, vocabulary) against its own label (rows, length).

    Raises:
        InputError: A label is none of the vocabulary.
    """
    if labels.numel():
        check_token_ids(labels, logits.shape[-1], "labels", ignored=IGNORED_LABEL, wait=False)
    scores, wanted = logits.flatten(0, 1).float(), labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return functional.cross_entropy(scores, wanted, ignore_index=IGNORED_LABEL)
    total = functional.cross_entropy(scores, wanted, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device)
