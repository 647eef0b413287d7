"""The conformer of the audio towers of Gemma 3n and Gemma 4: chunked local attention, light convolution, half steps.

Both families use these blocks with other numbers and other weight names; what they share is here, and each tower puts
it together. Everything is causal but for the few rows by which the subsampling looks ahead, so a recording can be
encoded while it goes on: a block given a state carries on where the last piece ended.

Sources: Conformer, arXiv:2005.08100; relative positions, Transformer-XL, arXiv:1901.02860; Universal Speech Model,
arXiv:2303.01037.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import InputError
from .clipped_linear import ClippedLinear
from .norm import RMSNorm

#: Makes a linear layer without bias from its widths.
LinearFactory = Callable[[int, int], nn.Linear]

#: Clamps at this or more change no number of a healthy model, except in float16.
_NO_BOUND = 1e10
_LONGEST_PERIOD = 1e4


def plain_linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear layer without bias."""
    return nn.Linear(width_in, width_out, bias=False)


def bounded(hidden: Tensor, limit: float) -> Tensor:
    """`hidden` clamped to +-limit, or to the largest number of its type; skipped where that cannot change anything."""
    if limit >= _NO_BOUND and hidden.dtype != torch.float16:
        return hidden
    limit = min(limit, torch.finfo(hidden.dtype).max)
    return hidden.clamp(-limit, limit)


def relative_sinusoids(first: int, count: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of the distances first, first - 1, ... as (count, width), float32: sines, then cosines.

    Distances below 0 give rows of zeros: the published models have none, other chunk sizes may.
    """
    distances = first - torch.arange(count, device=device, dtype=torch.float32)
    half = width // 2
    exponents = torch.arange(half, device=device, dtype=torch.float32) / max(half - 1, 1)
    angles = distances[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1) * (distances >= 0)[:, None]


@dataclass
class LayerState:
    """What a conformer layer remembers of a stream: keys and values of the last tokens, inputs of the convolution."""

    keys: Tensor
    values: Tensor
    seen: Tensor
    conv: Tensor


@dataclass
class StageState:
    """What a subsampling stage remembers: rows its convolution still needs, and the totals of its norm."""

    rows: Tensor | None = None
    totals: tuple[Tensor, Tensor, Tensor] | None = None


class LocalAttention(nn.Module):
    """Attention of every token to itself and the few before it, computed in chunks.

    Weight names of queries, keys and values are the checkpoint's; the projection of the relative positions bears
    another name in each family, which gives it in `position_projection`.

    Args:
        width: Of the hidden states.
        heads: Attention heads.
        chunk: Queries computed at once.
        past: Tokens before a chunk that it is given.
        reach: Tokens back that a query may attend to, at most `past`.
        cap: Scores are kept within +-cap by a tanh.
        key_scale: Factor on the keys.
        farthest: Distance that stands for the first token of a window in the sinusoids.
        masked_score: Score of what is not to be seen.
        linear: Makes the projections.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        chunk: int,
        past: int,
        reach: int,
        cap: float,
        key_scale: float = 1.0,
        farthest: int | None = None,
        masked_score: float = torch.finfo(torch.float32).min,
        linear: LinearFactory = plain_linear,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = width, heads, width // heads
        self.chunk, self.past, self.reach = chunk, past, reach
        self.cap, self.key_scale, self.masked_score = cap, key_scale, masked_score
        self.farthest = past if farthest is None else farthest
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.per_dim_scale = nn.Parameter(torch.zeros(self.head_dim))

    def position_projection(self) -> nn.Linear:
        """The layer that turns sinusoids into keys."""
        raise TypeError(f"{type(self).__name__} does not say where its position projection is.")

    def nothing_before(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and what of them may be seen, before anything was heard."""
        empty = torch.zeros(rows, self.past, self.heads, self.head_dim, device=device)
        return empty, empty, torch.zeros(rows, self.past, dtype=torch.bool, device=device)

    def forward(self, hidden: Tensor, valid: Tensor, state: LayerState | None = None) -> Tensor:
        """Attended values.

        Args:
            hidden: (rows, tokens, width).
            valid: bool (rows, tokens), True where a token may be attended to.
            state: Of a stream; carried on.

        Returns:
            (rows, tokens, width), of the dtype of `hidden`; float32 inside.
        """
        shape = (self.heads, self.head_dim)
        scale = self.head_dim**-0.5 / math.log(2.0) * functional.softplus(self.per_dim_scale.float())
        queries = self.q_proj(hidden).float().unflatten(-1, shape) * scale
        keys = self.k_proj(hidden).float().unflatten(-1, shape) * self.key_scale
        values = self.v_proj(hidden).float().unflatten(-1, shape)
        if state is None:
            before = self.nothing_before(hidden.shape[0], hidden.device)
        else:
            before = (state.keys, state.values, state.seen)
        keys, values, seen = (torch.cat(pair, dim=1) for pair in zip(before, (keys, values, valid), strict=True))
        if state is not None:
            last = keys.shape[1] - self.past
            state.keys, state.values, state.seen = keys[:, last:], values[:, last:], seen[:, last:]
        sinusoids = relative_sinusoids(self.farthest, self.past + 1, self.width, hidden.device).to(hidden.dtype)
        positions = self.position_projection()(sinusoids).float().unflatten(-1, shape)
        chunk = self.chunk if state is None else min(self.chunk, hidden.shape[1])
        return self._attend(queries, keys, values, seen, positions, chunk).to(hidden.dtype)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, positions: Tensor, chunk: int
    ) -> Tensor:
        """Chunk by chunk; `keys`, `values` and `seen` begin `past` tokens before the first query."""
        rows, tokens = queries.shape[:2]
        chunks, context = -(-tokens // chunk), chunk + self.past
        missing = chunks * chunk - tokens
        queries = functional.pad(queries, (0, 0, 0, 0, 0, missing)).unflatten(1, (chunks, chunk))
        queries = queries.permute(0, 3, 1, 2, 4)  # (rows, heads, chunks, chunk, head_dim)
        keys = functional.pad(keys, (0, 0, 0, 0, 0, missing)).unfold(1, context, chunk)
        values = functional.pad(values, (0, 0, 0, 0, 0, missing)).unfold(1, context, chunk)
        seen = functional.pad(seen, (0, missing)).unfold(1, context, chunk)[:, None, :, None]
        by_distance = queries.flatten(2, 3) @ positions.permute(1, 2, 0)
        scores = queries @ keys.permute(0, 2, 1, 3, 4)
        scores = scores + self._along_keys(by_distance.unflatten(2, (chunks, chunk)), context)
        scores = self.cap * torch.tanh(scores / self.cap)
        offsets = torch.arange(context, device=scores.device) - torch.arange(chunk, device=scores.device)[:, None]
        in_reach = (offsets >= self.past - self.reach) & (offsets <= self.past)
        weights = scores.masked_fill(~(seen & in_reach), self.masked_score).softmax(dim=-1)
        attended = weights @ values.permute(0, 2, 1, 4, 3)
        return attended.permute(0, 2, 3, 1, 4).reshape(rows, chunks * chunk, self.width)[:, :tokens]

    @staticmethod
    def _along_keys(by_distance: Tensor, context: int) -> Tensor:
        """(..., chunk, distances) to (..., chunk, context): query w meets its first distance at key w."""
        chunk, distances = by_distance.shape[-2:]
        widened = functional.pad(by_distance, (0, context + 1 - distances)).flatten(-2)
        return widened[..., : chunk * context].unflatten(-1, (chunk, context))


class HalfStepFeedForward(nn.Module):
    """x + weight * norm(W2 silu(W1 norm(x))), a feed-forward part that counts half; names are the checkpoint's.

    Args:
        width: Of the hidden states; four times as wide inside.
        residual_weight: Factor on the step, one half as published.
        limit: Bound on what goes into the norms.
        linear: Makes the two maps.
    """

    def __init__(self, width: int, residual_weight: float, limit: float, linear: LinearFactory = plain_linear) -> None:
        super().__init__()
        self.residual_weight, self.limit = residual_weight, limit
        self.pre_layer_norm = RMSNorm(width)
        self.ffw_layer_1 = linear(width, 4 * width)
        self.ffw_layer_2 = linear(4 * width, width)
        self.post_layer_norm = RMSNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, tokens, width) -> the same."""
        inner = functional.silu(self.ffw_layer_1(self.pre_layer_norm(bounded(hidden, self.limit))))
        step: Tensor = self.post_layer_norm(bounded(self.ffw_layer_2(inner), self.limit))
        return hidden + self.residual_weight * step


class LightConv(nn.Module):
    """Gate, causal depthwise convolution, silu, map, added to the input; names are the checkpoint's.

    Source: "Pay Less Attention with Lightweight and Dynamic Convolutions", arXiv:1901.10430.
    """

    def __init__(
        self, width: int, kernel: int, limit: float, eps: float = 1e-6, linear: LinearFactory = plain_linear
    ) -> None:
        super().__init__()
        self.limit, self.history = limit, kernel - 1
        self.pre_layer_norm = RMSNorm(width, eps)
        self.linear_start = linear(width, 2 * width)
        self.depthwise_conv1d = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        self.conv_norm = RMSNorm(width, eps)
        self.linear_end = linear(width, width)

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        """(rows, tokens, width) -> the same; a state is carried on."""
        gated = functional.glu(self.linear_start(self.pre_layer_norm(hidden)), dim=-1).transpose(1, 2)
        before = gated.new_zeros(*gated.shape[:2], self.history) if state is None else state.conv
        gated = torch.cat([before, gated], dim=-1)
        if state is not None:
            state.conv = gated[..., gated.shape[-1] - self.history :]
        mixed = bounded(self.depthwise_conv1d(gated).transpose(1, 2), self.limit)
        mapped: Tensor = self.linear_end(functional.silu(self.conv_norm(mixed)))
        return hidden + mapped


def fresh_layer(attention: LocalAttention, conv: LightConv) -> LayerState:
    """The state of a layer at the start of one stream."""
    weight = conv.depthwise_conv1d.weight
    past = attention.nothing_before(1, weight.device)
    return LayerState(*past, conv=weight.new_zeros(1, weight.shape[0], conv.history))


def initialise_part(module: nn.Module, deviation: float) -> None:
    """Initial values of the own weights of one part of a tower, for training from scratch."""
    if isinstance(module, ClippedLinear):
        module.open_bounds()
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        module.weight.normal_(std=deviation)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, RMSNorm | nn.LayerNorm) and module.weight is not None:
        module.weight.fill_(1.0)
    elif isinstance(module, LocalAttention):
        module.per_dim_scale.zero_()


class SubsampleStage(nn.Module):
    """Convolution over time and frequency with strides, norm over channels, ReLU; names are the checkpoint's.

    Args:
        channels: In and out.
        kernel, stride: (time, frequency).
        padding: Rows of zeros (before, after) in time; one column on either side in frequency.
        norm: Of (rows, time, frequency, channels).
    """

    def __init__(
        self,
        channels: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(*channels, kernel, stride, padding=(0, 1), bias=False)
        self.norm = norm

    def normalise(self, hidden: Tensor, state: StageState | None) -> Tensor:
        """(rows, time, frequency, channels) -> the same."""
        normed: Tensor = self.norm(hidden)
        return normed

    def forward(self, rows: Tensor, state: StageState | None = None, last: bool = True) -> Tensor:
        """(batch, channels, time, frequency) -> (batch, channels out, fewer, fewer).

        Args:
            rows: The whole recording, or the next rows of a stream.
            state: Of the stream; carried on.
            last: Whether these are the last rows; only then the padding at the end is added.
        """
        before, after = self.padding
        if state is None or state.rows is None:
            rows = functional.pad(rows, (0, 0, before, 0))
        else:
            rows = torch.cat([state.rows, rows], dim=2)
        if last:
            rows = functional.pad(rows, (0, 0, 0, after))
        height, stride = self.conv.kernel_size[0], self.conv.stride[0]
        count = max(0, (rows.shape[2] - height) // stride + 1)
        if state is not None:
            state.rows = rows[:, :, count * stride :]
        if count == 0:
            frequencies = (rows.shape[3] + 2 - self.conv.kernel_size[1]) // self.conv.stride[1] + 1
            return rows.new_zeros(rows.shape[0], self.conv.out_channels, 0, frequencies)
        hidden = self.conv(rows.to(self.conv.weight.dtype)).permute(0, 2, 3, 1)
        return functional.relu(self.normalise(hidden, state)).permute(0, 3, 1, 2)


class Frames(Protocol):
    """Samples to log-mel frames, piece by piece."""

    def push(self, samples: Any) -> Tensor: ...

    def finish(self) -> Tensor: ...


class Tower(Protocol):
    """An audio tower that can encode a recording piece by piece."""

    @property
    def device(self) -> torch.device: ...

    def fresh_stream(self) -> Any: ...

    def encode_piece(self, frames: Tensor, state: Any, last: bool) -> Tensor: ...


class AudioStream:
    """A recording encoded while it goes on: samples in, soft tokens out, equal to those of the whole at once.

    Args:
        tower: The audio tower.
        frames: The stream of its features.
    """

    def __init__(self, tower: Tower, frames: Frames) -> None:
        self.tower, self.frames = tower, frames
        self.finished = False
        self._state = tower.fresh_stream()

    def push(self, samples: Any) -> Tensor:
        """Soft tokens that became whole.

        Args:
            samples: Mono, as an array, a tensor or a list of numbers; as few or as many as there are.

        Returns:
            (1, tokens, width) of the tower's output, 0 tokens if none did.

        Raises:
            InputError: The stream is over, or these are no samples.
        """
        self._require_open()
        return self._encode(self.frames.push(samples), last=False)

    def finish(self) -> Tensor:
        """The soft tokens that the end of the recording completes; afterwards the stream is over.

        Raises:
            InputError: It was over before, or too short for a single frame.
        """
        self._require_open()
        tokens = self._encode(self.frames.finish(), last=True)
        self.finished = True
        return tokens

    def _require_open(self) -> None:
        if self.finished:
            raise InputError("the stream is over, finish() was called: make a new one for the next recording.")

    @torch.no_grad()
    def _encode(self, frames: Tensor, last: bool) -> Tensor:
        return self.tower.encode_piece(frames[None].to(self.tower.device), self._state, last)
