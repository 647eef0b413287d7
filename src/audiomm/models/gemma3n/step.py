"""Gemma 3n's decode step without modules: one token a row through plain tensors, in as few operations as torch has.

The quick twin of `Gemma3nWithHead.step`, for inference. The streams lie side by side as (rows, streams, width) and stay
in float32 from layer to layer; queries, keys, values and the learned residual's first half come from one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.cache import Cache
from ...layers.embedding import ScaledEmbedding
from ...layers.gated_mlp import quick_mlp
from ...layers.heads import HeadReader, Heads, OneToken, StepHeads
from ...layers.language_head import quick_logits
from ...layers.norm import RMSNorm, Roomy, quick_added_norm, quick_norm, quick_norm_product, roomy, weight_of
from ...layers.per_layer import PerLayerTable, quick_per_layer
from ...layers.projection import is_plain
from ...layers.quick import NoQuickStep, product, product_into, require_parts, straight
from .blocks import (
    CoefficientLinear,
    Gemma3nTextAltUp,
    Gemma3nTextAttention,
    Gemma3nTextDecoderLayer,
    Gemma3nTextLaurelBlock,
    Gemma3nTextMLP,
)
from .text import SMALLEST_SQUARE, Gemma3nTextModel

#: What a text stack consists of, besides linears.
PARTS = (Gemma3nTextModel, Gemma3nTextDecoderLayer, Gemma3nTextAttention, Gemma3nTextMLP, Gemma3nTextAltUp,
         Gemma3nTextLaurelBlock, CoefficientLinear, RMSNorm, ScaledEmbedding, PerLayerTable)  # fmt: skip

#: From so many weights on it pays to pick the rows of a matrix that are needed.
LARGE = 2**20


class QuickStep:
    """One token a row: ids (rows, 1) and a cache to logits (rows, vocabulary) float32.

    Args:
        stack: The decoder.
        head: Its language-model head.
        media: Rows of token ids that stand for media, as `Gemma3nModel.media_rows` tells them.

    Raises:
        NoQuickStep: A part of the model must be called as a module.
    """

    def __init__(self, stack: Gemma3nTextModel, head: nn.Linear, media: tuple[Tensor, Tensor] | None = None) -> None:
        require_parts(stack, *PARTS, apart=(PerLayerTable,))
        config = stack.config
        eps, self.table = config.rms_norm_eps, stack.embed_tokens.weight.detach()
        self.scale, self.dtype = stack.embed_tokens.scales[self.table.dtype], self.table.dtype
        self.media = None if media is None else (media[0], media[1].to(self.dtype))
        self.per_layer = quick_per_layer(stack, len(self.table))
        blocks: Any = stack.layers
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.heads = StepHeads(
            [_heads(layer.self_attn) for layer in blocks],
            windows,
            stack.frequencies(self.table.device),
            {window: window for window in windows},
            owners=config.first_shared_layer,
            eps=eps,
            dtype=self.dtype,
        )
        self.layers = [QuickLayer(*pair) for pair in zip(blocks, self.heads.readers, strict=True)]
        self.spread = product(*stack.altup_projections)
        self.unspread = [product(projection) for projection in stack.altup_unembed_projections]
        self.eps, self.active = eps, config.altup_active_idx
        # The norm of the streams' sum is that of their mean, but for eps.
        self.norm = quick_norm(weight_of(stack.norm), eps * config.altup_num_inputs**2)
        self.score = quick_logits(head, config.final_logit_softcapping)

    def __call__(self, input_ids: Tensor, cache: Cache) -> Tensor:
        with straight():
            return self._score(input_ids, cache)

    def _score(self, input_ids: Tensor, cache: Cache) -> Tensor:
        ids = input_ids.reshape(-1)
        token = self.heads.begin(cache, len(ids), ids.device)
        hidden = self.table.index_select(0, ids).mul_(self.scale)
        if self.media is not None:
            places = self.media[0].index_select(0, ids)
            hidden = torch.where((places > 0)[:, None], self.media[1].index_select(0, places), hidden)
        own = self.per_layer(ids, hidden)
        others = self.spread(hidden).view(len(ids), -1, hidden.shape[1])
        first = hidden.float()[:, None]
        room = Room.of((first, _resized(others, first)), self.active, self.eps, self.dtype)
        for layer, small in zip(self.layers, own, strict=True):
            layer(room, token, small)
        return self.score(self.norm(self._gathered(room.states)))

    def _gathered(self, states: Tensor) -> Tensor:
        """The sum of all streams, the others brought to the size of the first: (rows, width)."""
        parts = states.to(self.dtype).unbind(1)
        others = [project(part) for part, project in zip(parts[1:], self.unspread, strict=True)]
        first = states[:, :1]
        return _resized(torch.stack(others, dim=1), first).sum(dim=1, keepdim=True).add_(first)[:, 0]


def _resized(others: Tensor, first: Tensor) -> Tensor:
    """Streams (rows, streams, width) brought to the length of the first (rows, 1, width), in float32."""
    smallest = (SMALLEST_SQUARE * others.shape[2]) ** 0.5
    lengths = torch.linalg.vector_norm(others, 2, -1, True, dtype=torch.float32).clamp_(min=smallest)
    return others * (torch.linalg.vector_norm(first, 2, -1, True) / lengths)


class Room(NamedTuple):
    """Where the layers of a step write, one after the other; all float32, with room for the norms where it is of use.

    Attributes:
        states: (rows, streams, width) what goes from layer to layer.
        active: (rows, width) the stream of `states` that attention works on.
        others: All streams but the first.
        predicted: As `states`, before the layer's work.
        before: The active stream of `predicted`.
        gated: (rows, width) what attention and then the feed-forward block add to.
        product: What they add, before its norm; None where products are written to rows of their own.
    """

    states: Tensor
    active: Roomy
    others: Tensor
    predicted: Tensor
    before: Roomy
    gated: Roomy
    product: Roomy | None

    @classmethod
    def of(cls, streams: tuple[Tensor, Tensor], active: int, eps: float, dtype: torch.dtype) -> Room:
        """Room for a step that begins with the first stream and the others, (rows, streams, width) each."""
        first, others = streams
        rows, count, width = others.shape
        states, predicted = (roomy(rows, 1 + count, width, eps=eps, like=first) for _ in range(2))
        torch.cat(streams, dim=1, out=states[0])
        return cls(
            states=states[0],
            active=_stream(states, active),
            others=states[0].narrow(1, 1, count),
            predicted=predicted[0],
            before=_stream(predicted, active),
            gated=roomy(rows, width, eps=2 * eps, like=first),
            product=roomy(rows, width, eps=eps, like=first) if dtype == torch.float32 else None,
        )


def _stream(states: Roomy, number: int) -> Roomy:
    part, whole = states
    return part.select(1, number), None if whole is None else whole.select(1, number)


class QuickLayer:
    """One layer of `QuickStep`.

    Args:
        layer: The layer it stands for.
        read: Its attention, between the projections.
    """

    def __init__(self, layer: Gemma3nTextDecoderLayer, read: HeadReader) -> None:
        attention, laurel, altup = layer.self_attn, layer.laurel, layer.altup
        eps, root = layer.input_layernorm.eps, math.sqrt(2.0)
        names = ("q_proj", "k_proj", "v_proj")
        inputs = [getattr(attention, name) for name in names if hasattr(attention, name)]
        self.project = product(*inputs, laurel.linear_left)
        self.sizes = sum(linear.out_features for linear in inputs), laurel.linear_left.out_features
        self.read, self.output, self.right = read, product_into(attention.o_proj), product_into(laurel.linear_right)
        self.streams = altup.streams
        self.route = _route(altup, altup.router_norm.eps)
        self.predicts = altup.prediction_coefs.weight.detach().float().t()
        self.input_norm = quick_norm(weight_of(layer.input_layernorm), eps)
        self.add_attended = quick_added_norm(weight_of(layer.post_attention_layernorm), eps)
        self.add_learned = quick_added_norm(weight_of(laurel.post_laurel_norm), eps)
        # From here to the correction states are root(2) as large as they are meant to be: the sum of attention and
        # learned residual is never halved in power, norms see it by eps alone, and the correction's shares make up.
        self.mlp_norm = quick_norm(weight_of(layer.pre_feedforward_layernorm), 2 * eps)
        self.mlp = quick_mlp(layer.mlp) if layer.mlp.deviations is None else _sparse(layer.mlp, layer.mlp.deviations)
        self.add_made = quick_added_norm(weight_of(layer.post_feedforward_layernorm), eps, times=root)
        self.route_made, self.root = _route(altup, 2 * altup.router_norm.eps), root
        self.corrects = altup.correction_coefs.weight.detach().float().t() / root
        self.ones = torch.full((altup.streams,), 1 / root, device=self.corrects.device)
        self.gate, self.back = product(layer.per_layer_input_gate), product_into(layer.per_layer_projection)
        self.output_scale = altup.correct_output_scale.detach().float() if altup.scales_output else None
        self.add_own = quick_added_norm(weight_of(layer.post_per_layer_input_norm), eps)

    def __call__(self, room: Room, token: OneToken, own: Tensor) -> None:
        """Bring the states a layer further; `own` is the layer's per-layer embedding (rows, small width)."""
        states, predicted, streams = room.states, room.predicted, self.streams
        mixtures = torch.mm(self.route(*room.active), self.predicts).view(-1, streams, streams)
        torch.baddbmm(states, mixtures, states, out=predicted)
        self._attend(room, token)
        made = room.gated[0]
        self.add_made(made, *self.mlp(self.mlp_norm(*room.gated), room.product))
        shares = torch.addmm(self.ones, self.route_made(*room.gated), self.corrects)
        change = torch.sub(made, room.before[0], alpha=self.root)
        torch.addcmul(predicted, change.unsqueeze(1), shares.unsqueeze(2), out=states)
        scaled = room.active[0]
        if self.output_scale is not None:
            scaled = scaled * self.output_scale
        if own.dtype != scaled.dtype:
            scaled = scaled.to(own.dtype)
        inner = functional.gelu(self.gate(scaled), approximate="tanh").mul_(own)
        # The first stream goes without.
        made, whole = self.back(inner, room.product)
        self.add_own(room.others, made.unsqueeze(1), None if whole is None else whole.unsqueeze(1))

    def _attend(self, room: Room, token: OneToken) -> None:
        active, place = room.before[0], room.product
        normed = self.input_norm(*room.before)
        projected, left = self.project(normed).split_with_sizes(self.sizes, 1)
        gated = torch.add(active, normed, out=room.gated[0])
        self.add_attended(gated, *self.output(self.read(projected, token), place))
        self.add_learned(gated, *self.right(left, place))


def _heads(attention: Gemma3nTextAttention) -> Heads:
    key_norm = weight_of(attention.k_norm) if hasattr(attention, "k_norm") else None
    return Heads(attention.heads, attention.kv_heads, weight_of(attention.q_norm), key_norm)


def _route(altup: Gemma3nTextAltUp, eps: float) -> Callable[..., Tensor]:
    """The router: (rows, width) float32, and their room, to (rows, streams) between -1 and 1."""
    matrix = altup.modality_router.weight.detach().float()
    score = quick_norm_product(weight_of(altup.router_norm).float() * altup._input_scale, eps, matrix)
    return lambda hidden, whole: score(hidden, whole).tanh_()


def _sparse(mlp: Gemma3nTextMLP, deviations: float) -> Callable[[Tensor, Roomy | None], Roomy]:
    """`quick_mlp` where only gates beyond so many deviations above their mean go through.

    On a CPU a single token reads those rows of `up` alone that a gate lets through, one in twenty as trained. (Columns
    of `down` would have to lie side by side for that: a second copy, or a weight that optimizers take for another.)
    """
    gelu, weight = functional.gelu, mlp.up_proj.weight
    is_float = type(mlp.up_proj) is nn.Linear and type(mlp.down_proj) is nn.Linear
    if weight.device.type != "cpu" or not is_float or weight.numel() < LARGE:
        gate_up, down = product(mlp.gate_proj, mlp.up_proj), product_into(mlp.down_proj)

        def run(hidden: Tensor, place: Roomy | None) -> Roomy:
            gate, up = gate_up(hidden).chunk(2, -1)
            return down(gelu(_strong(gate, deviations), approximate="tanh").mul_(up), place)

        return run
    if not (is_plain(mlp.up_proj) and is_plain(mlp.down_proj)):
        raise NoQuickStep
    gates, rows, down = product(mlp.gate_proj), weight.detach(), product_into(mlp.down_proj)

    def run_one(hidden: Tensor, place: Roomy | None) -> Roomy:
        if len(hidden) > 1 or torch.compiler.is_compiling():
            return mlp.forward(hidden), None
        strong = _strong(gates(hidden), deviations)
        chosen = strong[0].nonzero()[:, 0]
        inner = gelu(strong.index_select(1, chosen), approximate="tanh")
        inner.mul_(functional.linear(hidden, rows.index_select(0, chosen)))
        return down(torch.zeros_like(strong).index_copy_(1, chosen, inner), place)

    return run_one


def _strong(gate: Tensor, deviations: float) -> Tensor:
    """What of each gate is beyond so many deviations above the mean of all, (rows, gates)."""
    precise = gate.float()
    deviation, mean = torch.std_mean(precise, dim=-1, correction=0, keepdim=True)
    return functional.relu(precise - mean.add_(deviation, alpha=deviations)).to(gate.dtype)
