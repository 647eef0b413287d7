"""Gemma 3n's decode step where a GPU has kernels for its streams: what is small around each product is one of them.

The twin of `step.QuickStep` for such devices. The operations are spelled out here, and are what the kernels are tried
beside, as those of `layers.fused` are. Streams lie one after the other, (streams, rows, width), in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers import fused
from ...layers.gated_mlp import GatedMLP
from ...layers.heads import HeadReader, OneToken
from ...layers.norm import weight_of
from ...layers.quick import product
from .blocks import Gemma3nTextAltUp, Gemma3nTextDecoderLayer, Gemma3nTextMLP
from .step import QuickStep, correction, first_product, prediction
from .text import Gemma3nTextModel


class Mixture(NamedTuple):
    """How a stream decides how streams are mixed; float32.

    Attributes:
        router: (streams, width): what its norm is multiplied by, for the hyperbolic tangent of that.
        matrix: (streams, streams x inputs): what that is multiplied by, for the coefficients.
        kept: (streams, inputs): the coefficients where that is nothing.
    """

    router: Tensor
    matrix: Tensor
    kept: Tensor

    def of(self, stream: Tensor, eps: float) -> Tensor:
        """(rows, width) to coefficients (streams, inputs, rows, 1)."""
        normed = functional.rms_norm(stream, stream.shape[-1:], None, eps)
        routes = (normed[:, None] * self.router).sum(dim=-1).tanh()
        mixture = (routes[..., None] * self.matrix).sum(dim=1) + self.kept.flatten()
        return mixture.t().reshape(*self.kept.shape, -1, 1)


def predicted(states: Tensor, mixture: Mixture, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mix all streams as the first one says.

    Args:
        states: (streams, rows, width) float32.
        weight: (width,) of the norm after that.

    Returns:
        Streams like `states`, and the norm of the first, (rows, width) of the dtype of the weight.
    """
    if fused.is_on_gpu(states):
        return _kernels().predicted(states, mixture, weight, eps)
    made = (mixture.of(states[0], eps) * states).sum(dim=1)
    return made, functional.rms_norm(made[0], weight.shape, weight.float(), eps).to(weight.dtype)


def gathered(
    first: Tensor, normed: Tensor, attended: Tensor, learned: Tensor, weights: Tensor, eps: float, factor: float
) -> tuple[Tensor, Tensor]:
    """Add to the first stream its norm and the norms of what attention and the learned residual made of this.

    Args:
        first: (rows, width) float32.
        normed, attended, learned: (rows, width).
        weights: (3, width) of the norms of what was made, and of the norm after that.
        factor: What the sum is multiplied by.

    Returns:
        The sum, (rows, width) float32, and its norm, of the dtype of the others.
    """
    if fused.is_on_gpu(first):
        return _kernels().gathered(first, normed, attended, learned, weights, eps, factor)
    shape, scales = weights.shape[1:], weights.float()
    made = [functional.rms_norm(part.float(), shape, scales[i], eps) for i, part in enumerate((attended, learned))]
    total = (first + normed.float() + made[0] + made[1]) * factor
    return total, functional.rms_norm(total, shape, scales[2], eps).to(normed.dtype)


def corrected(
    predicted: Tensor, gated: Tensor, made: Tensor, mixture: Mixture, weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Mix all streams and what a layer's work came to, as the latter says.

    Args:
        predicted: (streams, rows, width) float32.
        gated: (rows, width) float32, which the norm of `made` (rows, width) is added to.
        weight: (width,) of that norm.
        scale: (width,).

    Returns:
        Streams like `predicted`, and the first times the scale, (rows, width) of the dtype of `made`.
    """
    if fused.is_on_gpu(predicted):
        return _kernels().corrected(predicted, gated, made, mixture, weight, scale, eps)
    new = gated + functional.rms_norm(made.float(), weight.shape, weight.float(), eps)
    states = (mixture.of(new, eps) * torch.cat((predicted, new[None]))).sum(dim=1)
    return states, (states[0] * scale.float()).to(made.dtype)


def make_step(stack: Gemma3nTextModel, head: nn.Linear, media: tuple[Tensor, Tensor] | None = None) -> QuickStep:
    """The quick step for the device of a decoder; see `QuickStep`, whose arguments these are."""
    kind = FusedStep if has_kernels(stack.embed_tokens.weight) else QuickStep
    return kind(stack, head, media)


class FusedStep(QuickStep):
    """`QuickStep` in fewer launches: 15.5 a layer."""

    def make_layer(self, layer: Gemma3nTextDecoderLayer, read: HeadReader) -> Any:
        return FusedLayer(layer, read)

    def run(self, first: Tensor, others: Tensor, token: OneToken, own: tuple[Tensor, ...]) -> Tensor:
        states = torch.cat((first[None], others))
        for layer, small in zip(self.layers, own, strict=True):
            states = layer(token, small, states)
        return states


class FusedLayer:
    """One layer of `FusedStep`.

    Args:
        layer: The layer it stands for.
        read: Its attention, between the projections.
    """

    def __init__(self, layer: Gemma3nTextDecoderLayer, read: HeadReader) -> None:
        attention, laurel, altup = layer.self_attn, layer.laurel, layer.altup
        self.eps = layer.input_layernorm.eps
        self.project, self.sizes = first_product(layer)
        self.read, self.output, self.right = read, product(attention.o_proj), product(laurel.linear_right)
        self.predicting, self.correcting = _mixture(altup, *prediction(altup)), _mixture(altup, *correction(altup))
        self.input_weight = weight_of(layer.input_layernorm)
        added = layer.post_attention_layernorm, laurel.post_laurel_norm, layer.pre_feedforward_layernorm
        self.added_weights = torch.stack([weight_of(norm) for norm in added])
        self.feed_forward = _feed_forward(layer.mlp)
        self.fed_weight = weight_of(layer.post_feedforward_layernorm)
        scale = altup.correct_output_scale.detach()
        self.output_scale = scale if altup.scales_output else torch.ones_like(scale)
        self.gate, self.back = product(layer.per_layer_input_gate), product(layer.per_layer_projection)
        self.own_weight = weight_of(layer.post_per_layer_input_norm)

    def __call__(self, token: OneToken, own: Tensor, states: Tensor) -> Tensor:
        """Bring the states, (streams, rows, width), a layer further; `own` (rows, small) is its own embedding."""
        eps = self.eps
        before, normed = predicted(states, self.predicting, self.input_weight, eps)
        projected, left = self.project(normed).split_with_sizes(self.sizes, 1)
        attended, learned = self.output(self.read(projected, token)), self.right(left)
        gated, normed = gathered(before[0], normed, attended, learned, self.added_weights, eps, math.sqrt(0.5))
        made = self.feed_forward(normed)
        states, scaled = corrected(before, gated, made, self.correcting, self.fed_weight, self.output_scale, eps)
        added = self.back(fused.gelu_times(self.gate(scaled), own))
        # The first stream goes without.
        fused.norm_added(states[1:].flatten(0, 1), added, self.own_weight, eps)
        return states


def _mixture(altup: Gemma3nTextAltUp, kept: Tensor, matrix: Tensor) -> Mixture:
    router = altup.modality_router.weight.detach().float() * weight_of(altup.router_norm).float() * altup._input_scale
    return Mixture(router, matrix, kept)


def _feed_forward(mlp: Gemma3nTextMLP | GatedMLP) -> Callable[[Tensor], Tensor]:
    gate_up, down = product(mlp.gate_proj, mlp.up_proj), product(mlp.down_proj)
    deviations = getattr(mlp, "deviations", None)

    def run(hidden: Tensor) -> Tensor:
        gate, up = gate_up(hidden).chunk(2, 1)
        return down(fused.gelu_times(gate, up) if deviations is None else fused.strong_gelu_times(gate, up, deviations))

    return run


# ---------------------------------------------------------------------- kernels


def has_kernels(like: Tensor) -> bool:
    """Whether there are kernels for all of this; see `fused.has_kernels`."""
    return fused.has_kernels(like) and _are_right(like.device, like.dtype)


@cache
def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    return fused.agree(device, _trials(device, dtype))


def _trials(device: torch.device, dtype: torch.dtype) -> Iterator[fused.Trial]:
    maker = torch.Generator().manual_seed(0)

    def some(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=maker, dtype=torch.float32, device="cpu").to(device, dtype)

    rows, scales = [some(3, 40, dtype=dtype) for _ in range(3)], [some(40, dtype=dtype) for _ in range(2)]
    yield predicted, (some(4, 3, 40), Mixture(some(4, 40), some(4, 16), some(4, 4)), scales[0], 1e-6)
    yield gathered, (some(3, 40), *rows, some(3, 40, dtype=dtype), 1e-6, 0.5)
    correcting = Mixture(some(4, 40), some(4, 20), some(4, 5))
    yield corrected, (some(4, 3, 40), some(3, 40), rows[0], correcting, *scales, 1e-6)


@cache
def _kernels() -> Any:
    from . import kernels

    return kernels
