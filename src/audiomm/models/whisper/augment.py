"""SpecAugment: hide spans of frames and of mel bins while training.

Source: arXiv:1904.08779.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spec_augment(
    features: Tensor,
    *,
    time_probability: float,
    time_length: int,
    time_minimum: int,
    bin_probability: float,
    bin_length: int,
    bin_minimum: int,
    frame_counts: Tensor | None = None,
) -> Tensor:
    """A copy of the features with random spans set to zero; drawn with torch's generator.

    Args:
        features: (batch, bins, frames) log-mel features; left as they are.
        time_probability: Share of the frames to hide, before spans overlap.
        time_length: Frames of one span.
        time_minimum: Least number of spans an item.
        bin_probability, bin_length, bin_minimum: The same for mel bins.
        frame_counts: (batch,) frames that hold audio; spans start within them. None is all.
    """
    batch, bins, frames = features.shape
    if time_probability > 0:
        counts = torch.full((batch,), frames, device=features.device) if frame_counts is None else frame_counts
        hidden = _spans(batch, frames, time_probability, time_length, time_minimum, counts.to(features.device))
        features = features.masked_fill(hidden[:, None, :], 0.0)
    if bin_probability > 0:
        counts = torch.full((batch,), bins, device=features.device)
        hidden = _spans(batch, bins, bin_probability, bin_length, bin_minimum, counts)
        features = features.masked_fill(hidden[:, :, None], 0.0)
    return features


def _spans(batch: int, size: int, probability: float, length: int, minimum: int, counts: Tensor) -> Tensor:
    """(batch, size) bool, True in spans of `length` that start at distinct random places before counts - length."""
    device = counts.device
    wanted = (probability * counts / length + torch.rand(batch, device=device)).long().clamp(min=minimum)
    places = (counts - length + 1).clamp(min=0)
    wanted = torch.minimum(wanted, places)
    indices = torch.arange(size, device=device)
    order = torch.rand(batch, size, device=device).masked_fill(indices >= places[:, None], 2.0)
    starts = order.argsort(dim=1).argsort(dim=1) < wanted[:, None]
    covered = torch.nn.functional.pad(starts.float()[:, None], (length - 1, 0))
    return torch.nn.functional.max_pool1d(covered, length, stride=1)[:, 0] > 0
