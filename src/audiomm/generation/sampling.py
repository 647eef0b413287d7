"""Drawing tokens at random, without waiting for the device."""

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


#: From so many scores on the CPU looks at the best of each block first; so many scores are a block.
MANY_SCORES, BLOCK = 1 << 17, 256


def has_many(scores: Tensor) -> bool:
    """Whether `best_in_blocks` is quicker than `max`, which does not use what a CPU has for many numbers at a time."""
    return scores.device.type == "cpu" and scores.numel() >= MANY_SCORES and scores.shape[-1] >= BLOCK


def best_in_blocks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores.max(dim=-1)` of (rows, vocabulary), the same numbers and ids: the best block first, then within it."""
    rows, size = scores.shape
    whole = size // BLOCK
    bests = scores[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(dim=-1)
    bests = torch.cat((bests, scores[:, -BLOCK:].amax(dim=-1, keepdim=True)), dim=1)
    first = (bests.argmax(dim=-1) * BLOCK).clamp_(max=size - BLOCK)
    block = scores.unfold(1, BLOCK, 1)[torch.arange(rows, device=scores.device), first]
    best, place = block.max(dim=-1)
    return best, first + place


def pick_random(scores: Tensor, generators: Generators = None) -> tuple[Tensor, Tensor]:
    """One token a row with the probabilities softmax(scores), and the highest score of the row.

    That score is NaN or -inf where no token could be picked.

    Probabilities divided by exponential noise are largest at each token exactly as often as its probability says;
    the same draw as torch.multinomial makes, so the same seed gives the same token.

    Args:
        scores: (rows, vocabulary).
        generators: One for all rows, one a row, or None for torch's own.
    """
    probabilities = scores.softmax(dim=-1)
    ratios = probabilities / exponential_noise(probabilities, generators)
    tokens = best_in_blocks(ratios)[1] if has_many(ratios) else ratios.argmax(dim=-1)
    best = scores.amax(dim=-1)
    # No probabilities can be made of infinite scores.
    return tokens, torch.where(best == torch.inf, torch.nan, best)
