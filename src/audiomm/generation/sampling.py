"""Picking a token from scores: the best, or one drawn at random, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None


def exponential_noise(like: Tensor, generators: Generators = None) -> Tensor:
    """Draws from the exponential distribution in the shape of `like`, one generator for all rows or one a row."""
    noise = torch.empty_like(like)
    if generators is None or isinstance(generators, Generator):
        return noise.exponential_(1.0, generator=generators)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(1.0, generator=generator)
    return noise


def pick_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the highest score in each row, and that score: NaN or -inf where no token could be picked.

    Args:
        scores: (rows, vocabulary).
    """
    tokens = scores.argmax(dim=-1)
    return tokens, scores.gather(-1, tokens[:, None])[:, 0]


def pick_random(scores: Tensor, generators: Generators = None) -> tuple[Tensor, Tensor]:
    """One token a row with the probabilities softmax(scores), and the highest score: NaN or -inf as in `pick_best`.

    Probabilities divided by exponential noise are largest at each token exactly as often as its probability says;
    the same draw as torch.multinomial makes, so the same seed gives the same token.

    Args:
        scores: (rows, vocabulary).
        generators: One for all rows, one a row, or None for torch's own.
    """
    probabilities = scores.softmax(dim=-1)
    tokens = (probabilities / exponential_noise(probabilities, generators)).argmax(dim=-1)
    best = scores.amax(dim=-1)
    # No probabilities can be made of infinite scores.
    return tokens, torch.where(best == torch.inf, torch.nan, best)
