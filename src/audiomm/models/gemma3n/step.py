"""Gemma 3n's decode step without modules: one token a row through plain tensors, in as few operations as torch has.

The quick twin of `Gemma3nWithHead.step`, for inference. The streams lie one after the other as (streams, rows, width),
what is added to them beside them, and stay in float32 from layer to layer. Predicting and correcting them is one small
matrix a row each; queries, keys, values and the learned residual's first half come from one product.
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
from ...layers.norm import (
    RMSNorm,
    Roomy,
    both_added,
    measured_added,
    measured_product,
    quick_added_norm,
    quick_measure,
    quick_norm,
    roomy,
    weight_of,
)
from ...layers.per_layer import PerLayerTable, quick_per_layer
from ...layers.projection import Projection, is_plain
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

#: Gates that vary less are all the same.
SMALLEST_VARIANCE = 1e-30

#: From so many weights on it pays to pick the rows of a matrix that are needed.
LARGE = 2**20


class QuickStep:
    """One token a row: ids (rows, 1) and a cache to logits (rows, vocabulary) float32.

    Args:
        stack: The decoder.
        head: Its language-model head.
        media: Rows of token ids that stand for media, as `Gemma3nModel.media_rows` tells them.

    Raises:
        NoQuickStep: A part of the model must be called as a module, or attention does not work on the first stream.
    """

    def __init__(self, stack: Gemma3nTextModel, head: nn.Linear, media: tuple[Tensor, Tensor] | None = None) -> None:
        require_parts(stack, *PARTS, apart=(PerLayerTable,))
        config = stack.config
        if config.altup_active_idx:
            raise NoQuickStep
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
        self.layers = [self.make_layer(*pair) for pair in zip(blocks, self.heads.readers, strict=True)]
        self.spread = product(*stack.altup_projections)
        self.unspread = [product(projection) for projection in stack.altup_unembed_projections]
        self.measure = quick_measure(config.hidden_size, eps, self.table.device)
        self.eps = eps
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
        others = self.spread(hidden).view(len(ids), -1, hidden.shape[1]).transpose(0, 1)
        first = hidden.float()
        states = self.run(first, _resized(others, first), token, own)
        return self.score(self.norm(self._gathered(states)))

    def make_layer(self, layer: Gemma3nTextDecoderLayer, read: HeadReader) -> Any:
        """What `run` calls for a layer, whose heads are read so."""
        return QuickLayer(layer, read)

    def run(self, first: Tensor, others: Tensor, token: OneToken, own: tuple[Tensor, ...]) -> Tensor:
        """The first stream (rows, width), and all others (streams - 1, rows, width), through the layers: all streams.

        Args:
            token: What all layers are told.
            own: Of each layer its per-layer embedding, (rows, small width).
        """
        room, states = Room.of(first, others, self.eps, self.dtype)
        measure = self.measure(states[:, 0])
        for layer, small in zip(self.layers, own, strict=True):
            states, measure = layer(room, token, small, states, measure)
        return states.transpose(0, 1)

    def _gathered(self, states: Tensor) -> Tensor:
        """The sum of all streams, the others brought to the size of the first: (rows, width)."""
        parts = states[1:].to(self.dtype).unbind(0)
        others = [project(part) for part, project in zip(parts, self.unspread, strict=True)]
        return _resized(torch.stack(others), states[0]).sum(dim=0).add_(states[0])


def _resized(others: Tensor, first: Tensor) -> Tensor:
    """Streams (streams, rows, width) brought to the length of the first (rows, width), in float32."""
    smallest = (SMALLEST_SQUARE * others.shape[2]) ** 0.5
    lengths = torch.linalg.vector_norm(others, 2, -1, True, dtype=torch.float32).clamp_(min=smallest)
    return others * (torch.linalg.vector_norm(first, 2, -1, True) / lengths)


class Room(NamedTuple):
    """Where the layers of a step write, one after the other; float32, with room for the norms where it is of use.

    A place may be None, and all are while torch.compile traces, which finds better ones: then what comes out is new.

    Attributes:
        states: (rows, streams, width) what goes from layer to layer; attention works on the first stream.
        first, others: (rows, width) of the first stream, (streams - 1, rows, width) of all others.
        own_and_first: (2, rows, width) what a layer's own embedding adds, before its norm, and the first stream.
        predicted: (rows, streams, width) the states before the layer's work.
        before: (rows, width) the first stream of these.
        gated: (rows, width) what attention and then the feed-forward block add to.
        all_predicted: (rows, streams + 1, width) what is predicted and what is gated.
        made: (2, rows, width) what attention and the learned residual add, before their norms; of the model's type
            where norms are kernels. The first is that of the feed-forward block, too.
        places: (rows, width) each: both of `made`, and the first of `own_and_first`.
    """

    states: Tensor | None = None
    first: Tensor | None = None
    others: Tensor | None = None
    own_and_first: Roomy | None = None
    predicted: Tensor | None = None
    before: Roomy | None = None
    gated: tuple[Tensor | None, Tensor | None] = (None, None)
    all_predicted: Tensor | None = None
    made: Roomy | None = None
    places: tuple[Roomy | None, ...] = (None, None, None)

    @classmethod
    def of(cls, first: Tensor, others: Tensor, eps: float, dtype: torch.dtype) -> tuple[Room, Tensor]:
        """Room for a step that begins with the first stream (rows, width) and the others (streams, rows, width).

        The states come with it.
        """
        parts = first[None], others
        if torch.compiler.is_compiling():
            return cls(), torch.cat(parts).transpose(0, 1)
        count, rows, width = others.shape
        states, predicted = (roomy(2 + count, rows, width, eps=eps, like=first) for _ in range(2))
        made = roomy(2, rows, width, eps=eps, like=first, dtype=dtype)
        if predicted[1] is not None:
            # See `QuickLayer`: the norms of what is gated have twice the eps.
            predicted[1][-1].mul_(math.sqrt(2.0))
        streams, by_row = states[0][1:], predicted[0].transpose(0, 1)
        torch.cat(parts, out=streams)
        room = cls(
            states=streams.transpose(0, 1),
            first=streams[0],
            others=streams[1:],
            own_and_first=_part(states, slice(0, 2)),
            predicted=by_row[:, :-1],
            before=_part(predicted, 0),
            gated=_part(predicted, -1),
            all_predicted=by_row,
            made=made,
            places=(_part(made, 0), _part(made, 1), _part(states, 0)),
        )
        return room, streams.transpose(0, 1)


def _part(rows: Roomy, place: int | slice) -> Roomy:
    part, whole = rows
    return part[place], None if whole is None else whole[place]


class QuickLayer:
    """One layer of `QuickStep`.

    Args:
        layer: The layer it stands for.
        read: Its attention, between the projections.
    """

    def __init__(self, layer: Gemma3nTextDecoderLayer, read: HeadReader) -> None:
        attention, laurel, altup = layer.self_attn, layer.laurel, layer.altup
        eps, root, device = layer.input_layernorm.eps, math.sqrt(2.0), altup.correct_output_scale.device
        self.project, self.sizes = first_product(layer)
        self.read, self.output, self.right = read, product_into(attention.o_proj), product_into(laurel.linear_right)
        width = layer.input_layernorm.width
        self.measure = quick_measure(width, eps, device)
        self.route = _route(altup)
        self.predict = _mixer(*prediction(altup))
        self.input_norm = quick_norm(weight_of(layer.input_layernorm), eps)
        norms = layer.post_attention_layernorm, laurel.post_laurel_norm
        self.add_both = both_added(*(weight_of(norm) for norm in norms))
        # From here to the correction states are root(2) as large as they are meant to be: the sum of attention and
        # learned residual is never halved in power, norms see it by eps alone, and the correction's shares make up.
        self.mlp_norm = quick_norm(weight_of(layer.pre_feedforward_layernorm), 2 * eps)
        self.mlp = quick_mlp(layer.mlp) if layer.mlp.deviations is None else _sparse(layer.mlp, layer.mlp.deviations)
        self.add_fed = quick_added_norm(weight_of(layer.post_feedforward_layernorm), eps, times=root)
        self.measure_gated = quick_measure(width, 2 * eps, device)
        self.correct = _mixer(*correction(altup, 1 / root))
        self.gate, self.output_scale = _gate(layer)
        self.back = product_into(layer.per_layer_projection)
        self.add_own = measured_added(weight_of(layer.post_per_layer_input_norm))

    def __call__(
        self, room: Room, token: OneToken, own: Tensor, states: Tensor, measure: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bring the states a layer further.

        Args:
            room: Where to write.
            token: What all layers are told.
            own: The layer's per-layer embedding, (rows, small width).
            states: (rows, streams, width); written over.
            measure: `quick_measure` of the first stream.

        Returns:
            States and measure for the next layer.
        """
        first, _ = _first_and_others(room, states)
        predicted = self.predict(self.route(first, measure), states, room.predicted)
        gated = self._attend(room, token, room.before or (predicted[:, 0], None))
        self.add_fed(gated[0], *self.mlp(self.mlp_norm(*gated), room.places[0]))
        routes = self.route(gated[0], self.measure_gated(*gated))
        if room.all_predicted is None:
            states = self.correct(routes, predicted, None, gated[0])
        else:
            states = self.correct(routes, room.all_predicted, room.states)
        first, others = _first_and_others(room, states)
        scaled = first if self.output_scale is None else first * self.output_scale
        if own.dtype != scaled.dtype:
            scaled = scaled.to(own.dtype)
        inner = functional.gelu(self.gate(scaled), approximate="tanh").mul_(own)
        made = _written(self.back(inner, room.places[2]), room.places[2])
        if room.own_and_first is None:
            own_measure, measure = self.measure(made), self.measure(first)
        else:
            own_measure, measure = self.measure(*room.own_and_first).unbind(0)
        # The first stream goes without.
        self.add_own(others, made, own_measure)
        return states, measure

    def _attend(self, room: Room, token: OneToken, before: Roomy) -> Roomy:
        """What the feed-forward block reads and adds to: the first stream, its attention and its learned residual."""
        normed = self.input_norm(*before)
        projected, left = self.project(normed).split_with_sizes(self.sizes, 1)
        gated = torch.add(before[0], normed, out=room.gated[0])
        one, other, _ = room.places
        parts = _written(self.output(self.read(projected, token), one), one), _written(self.right(left, other), other)
        self.add_both(gated, parts, room.made, self.measure)
        return gated, room.gated[1]


def _first_and_others(room: Room, states: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the states (rows, streams, width) and all others, (streams - 1, rows, width)."""
    if room.first is not None and room.others is not None:
        return room.first, room.others
    streams = states.transpose(0, 1)
    return streams[0], streams[1:]


def _written(made: Roomy, place: Roomy | None) -> Tensor:
    """What was made, in its place if there is one."""
    if place is None or made[0] is place[0]:
        return made[0]
    return place[0].copy_(made[0])


def prediction(altup: Gemma3nTextAltUp) -> tuple[Tensor, Tensor]:
    """How the streams are predicted from what they were: `kept` and `matrix` of `_mixer`."""
    matrix = altup.prediction_coefs.weight.detach().float().t().contiguous()
    return torch.eye(altup.streams, dtype=matrix.dtype, device=matrix.device), matrix


def correction(altup: Gemma3nTextAltUp, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """How they are corrected by what was made, which comes after them: `kept` and `matrix` of `_mixer`.

    Every stream moves by its share of the difference between `factor` times what was made and the first stream.
    """
    streams, coefficients = altup.streams, altup.correction_coefs.weight.detach().float().t()
    matrix = coefficients.new_zeros(streams, streams, streams + 1)
    matrix[:, :, 0], matrix[:, :, -1] = -coefficients, coefficients * factor
    kept = torch.eye(streams, streams + 1, dtype=matrix.dtype, device=matrix.device)
    kept[:, 0] -= 1.0
    kept[:, -1] = factor
    return kept, matrix.flatten(1)


def _mixer(kept: Tensor, matrix: Tensor) -> Callable[..., Tensor]:
    """A function that mixes streams: each row's coefficients are `kept` (n, m) and what its routes make of a matrix.

    Args:
        kept: (n, m) float32.
        matrix: (routes, n x m) float32.

    Returns:
        From routes (rows, routes), streams (rows, m, width), where to write and, where this is None, a last stream
        (rows, width) apart, to streams (rows, n, width).
    """
    flat, shape = kept.flatten(), (-1, *kept.shape)

    def mix(routes: Tensor, streams: Tensor, place: Tensor | None, last: Tensor | None = None) -> Tensor:
        if place is not None:
            return torch.bmm(torch.addmm(flat, routes, matrix).view(shape), streams, out=place)
        # Spelled out for torch.compile, which takes it together with what is around it.
        mixtures = ((routes.unsqueeze(2) * matrix).sum(dim=1) + flat).view(shape)
        mixed = (mixtures[:, :, : streams.shape[1], None] * streams.unsqueeze(1)).sum(dim=2)
        return mixed if last is None else mixed + mixtures[:, :, -1:] * last.unsqueeze(1)

    return mix


def first_product(layer: Gemma3nTextDecoderLayer) -> tuple[Projection, tuple[int, int]]:
    """What reads a layer's normed first stream, in one product, and its outputs: of attention, of the residual."""
    left = layer.laurel.linear_left
    names = ("q_proj", "k_proj", "v_proj")
    inputs = [getattr(layer.self_attn, name) for name in names if hasattr(layer.self_attn, name)]
    return product(*inputs, left), (sum(linear.out_features for linear in inputs), left.out_features)


def _heads(attention: Gemma3nTextAttention) -> Heads:
    key_norm = weight_of(attention.k_norm) if hasattr(attention, "k_norm") else None
    return Heads(attention.heads, attention.kv_heads, weight_of(attention.q_norm), key_norm)


def _route(altup: Gemma3nTextAltUp) -> Callable[[Tensor, Tensor], Tensor]:
    """The router: (rows, width) float32 and their measure to (rows, streams) between -1 and 1."""
    weight = weight_of(altup.router_norm).float() * altup._input_scale
    score = measured_product(weight, altup.modality_router.weight.detach().float())
    return lambda hidden, measure: score(hidden, measure).tanh_()


def _gate(layer: Gemma3nTextDecoderLayer) -> tuple[Projection, Tensor | None]:
    """The gate of a layer's own embedding, and what its input is to be scaled by: a plain gate takes that in.

    It is small, and this a copy.
    """
    gate, altup = layer.per_layer_input_gate, layer.altup
    if not altup.scales_output:
        return product(gate), None
    scale = altup.correct_output_scale.detach()
    if type(gate) is not nn.Linear or gate.bias is not None or not is_plain(gate):
        return product(gate), scale.float()
    scaled = nn.Linear(gate.in_features, gate.out_features, bias=False, device="meta")
    scaled.weight = nn.Parameter(gate.weight.detach() * scale, requires_grad=False)
    return product(scaled), None


def _sparse(mlp: Gemma3nTextMLP, deviations: float) -> Callable[[Tensor, Roomy | None], Roomy]:
    """`quick_mlp` where only gates beyond so many deviations above their mean go through.

    On a CPU a single token reads those rows of `up` alone that a gate lets through, one in twenty as trained. (Columns
    of `down` would have to lie side by side for that: a second copy, or a weight that optimizers take for another.)
    """
    gelu, weight = functional.gelu, mlp.up_proj.weight
    shift = torch.full((len(weight),), -deviations, dtype=torch.float32, device=weight.device)
    is_float = type(mlp.up_proj) is nn.Linear and type(mlp.down_proj) is nn.Linear
    if weight.device.type != "cpu" or not is_float or weight.numel() < LARGE:
        gate_up, down = product(mlp.gate_proj, mlp.up_proj), product_into(mlp.down_proj)

        def run(hidden: Tensor, place: Roomy | None) -> Roomy:
            gate, up = gate_up(hidden).chunk(2, -1)
            return down(gelu(_strong(gate, shift), approximate="tanh").mul_(up), place)

        return run
    if not (is_plain(mlp.up_proj) and is_plain(mlp.down_proj)):
        raise NoQuickStep
    gates, rows, down = product(mlp.gate_proj), weight.detach(), product_into(mlp.down_proj)

    def run_one(hidden: Tensor, place: Roomy | None) -> Roomy:
        if len(hidden) > 1 or torch.compiler.is_compiling():
            return mlp.forward(hidden), None
        strong = _strong(gates(hidden), shift)
        chosen = strong[0].nonzero()[:, 0]
        inner = gelu(strong.index_select(1, chosen), approximate="tanh")
        inner.mul_(functional.linear(hidden, rows.index_select(0, chosen)))
        return down(torch.zeros_like(strong).index_copy_(1, chosen, inner), place)

    return run_one


def _strong(gate: Tensor, deviations: Tensor) -> Tensor:
    """What of each gate is beyond some deviations above the mean of all, (rows, gates).

    Args:
        gate: (rows, gates).
        deviations: (gates,) how many, times minus one.
    """
    precise = gate.float()
    beyond, _, inverse = torch.native_layer_norm(precise, deviations.shape, None, deviations, SMALLEST_VARIANCE)
    return beyond.relu_().div_(inverse).to(gate.dtype)
