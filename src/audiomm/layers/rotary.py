"""Rotary position embedding: frequencies, tables of cosines and sines, and the rotation of pairs half a head apart.

Source: "RoFormer", arXiv:2104.09864. Frequencies are float32 whatever the model's dtype: in bfloat16 the angle of
position 4096 is off by more than a turn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float, *, rotated_share: float = 1.0, factor: float = 1.0) -> Tensor:
    """Angles per position, (head_dim / 2,) float32.

    Args:
        head_dim: Width of a head.
        theta: Base of the geometric series.
        rotated_share: Share of the pairs that turn; the others get frequency 0 ("proportional" rotary embedding). The
            exponents stay those of the whole head.
        factor: Positions are divided by this (linear scaling).
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (theta ** (pairs / head_dim)) / factor
    turning = int(rotated_share * head_dim // 2)
    frequencies[turning:] = 0.0
    return frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (rows, 1, length, head_dim), of positions (rows, length)."""
    angles = positions.to(torch.float32)[:, None, :, None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (rows, heads, length, head_dim) by the tables; dimension i pairs with i + head_dim / 2."""
    cosines, sines = tables
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines
