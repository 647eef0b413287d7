"""Tables of embeddings and positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def empty_embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """A table without initial values, which its model gives it.

    nn.Embedding draws its own, and on the meta device that imports a second of torch's machinery for nothing.
    """
    return nn.Embedding(rows, width, padding_idx, _weight=torch.empty(rows, width))


def sinusoids(length: int, channels: int, max_timescale: float = 10000.0) -> Tensor:
    """Fixed sinusoidal positions, sines in the first half of the channels and cosines in the second.

    Returns:
        (length, channels) float32.

    Source: "Attention Is All You Need", arXiv:1706.03762, laid out as in Whisper, arXiv:2212.04356.
    """
    step = math.log(max_timescale) / max(channels // 2 - 1, 1)
    inverse = torch.exp(-step * torch.arange(channels // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)
