"""What evaluation keeps of each batch, and how the parts of all batches and processes become whole arrays.

Only what somebody asks for is kept, and it goes to the host at once, so memory stays flat over a long evaluation when
there is no `compute_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .loss import IGNORE


@dataclass
class EvalPrediction:
    """What `compute_metrics` gets; `predictions, labels = prediction` reads it, too.

    Attributes:
        predictions, label_ids: Of all samples.
        inputs, losses: With include_for_metrics, and they are unpacked then as well.
    """

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.predictions, self.label_ids, *(x for x in (self.inputs, self.losses) if x is not None)))

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None


class EvalLoopOutput(NamedTuple):
    """What an evaluation loop returns."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    num_samples: int | None


@dataclass
class Kept:
    """What one process keeps of its batches, as host arrays.

    Attributes:
        losses: Loss of each batch.
        counts: Samples of each batch.
        predictions, labels, inputs: One entry a batch, or nothing.
    """

    losses: list[float | None] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    predictions: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)


def on_host(value: Any) -> Any:
    """Tensors inside tuples, lists and dicts as numpy arrays."""
    if isinstance(value, Tensor):
        value = value.detach()
        return (value.float() if value.is_floating_point() else value).cpu().numpy()
    if isinstance(value, dict):
        return {name: on_host(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(on_host(part) for part in value)
    return value


def as_tensors(value: Any) -> Any:
    """The arrays inside tuples and dicts as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: as_tensors(part) for name, part in value.items()}
    return tuple(as_tensors(part) for part in value) if isinstance(value, tuple) else value


def joined(parts: list[Any], padding: int = IGNORE) -> Any:
    """Batches one after another along the first dimension; shorter ones are padded in the others."""
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    if isinstance(parts[0], tuple):
        return tuple(joined([part[index] for part in parts], padding) for index in range(len(parts[0])))
    if isinstance(parts[0], dict):
        return {name: joined([part[name] for part in parts], padding) for name in parts[0]}
    if np.ndim(parts[0]) == 0:
        return np.asarray(parts)
    widest = np.max([part.shape[1:] for part in parts], axis=0)
    padded = [
        np.pad(
            part,
            [(0, 0), *((0, int(size) - have) for size, have in zip(widest, part.shape[1:], strict=True))],
            constant_values=padding,
        )
        if part.shape[1:] != tuple(widest)
        else part
        for part in parts
    ]
    return np.concatenate(padded)


def merged(kept_by_process: list[Kept]) -> Kept:
    """What all processes kept, in the order of the data: batch by batch, and within a batch process by process."""
    result = Kept()
    for number in range(len(kept_by_process[0].counts)):
        for kept in kept_by_process:
            if kept.counts[number] == 0:
                continue
            for name in ("losses", "counts", "predictions", "labels", "inputs"):
                values = getattr(kept, name)
                if values:
                    getattr(result, name).append(values[number])
    return result


def mean_loss(kept: Kept) -> float | None:
    """The mean of the batches' losses by their samples (transformers counts a smaller last batch as a whole one)."""
    known = [(loss, count) for loss, count in zip(kept.losses, kept.counts, strict=True) if loss is not None]
    if not known:
        return None
    return float(np.average([loss for loss, _ in known], weights=[count for _, count in known]))
