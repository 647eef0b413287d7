"""The quick decode step of Whisper: one token a row through flat lists of tensors, without calling a module.

`WhisperWithTokenHead.step` is the slow, obvious twin; both give the same logits. What is saved: a call of Python code
for every module, three products in one where they read the same input, and on a CPU the fused attention kernel, which
is made for many queries. Idea: gpt-fast's decode function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.quantization import has_bfloat16_products
from ...layers.attention import added_mask, attend, read_by_products
from ...layers.cache import Cache
from ...layers.masks import attention_mask
from ...layers.projection import Projection, has_additions
from ...layers.quantized import Int8Linear
from ...layers.quick import NoQuickStep, require_projection
from ...layers.rounded import is_rounded, read_rounded, store
from .layers import WhisperDecoderLayer, activation

#: Cross-attention pairs of so many layers are computed at once as take this many bytes a window.
_CROSS_BYTES = 64 * 2**20

#: Up to so many rows a launch on a GPU takes longer than what `_taken_in` multiplies twice.
_FEW_ROWS = 8

Norm = Callable[[Tensor], Tensor]


class _Layer(NamedTuple):
    """What one decoder layer computes with."""

    own_norm: Norm
    own_inputs: Projection
    own_output: Projection
    cross_norm: Norm
    cross_query: Projection
    cross_output: Projection
    last_norm: Norm
    widen: Projection
    narrow: Projection
    #: (3, 1, width) the sums of the first one, two and three biases of the maps whose outputs are added to the state;
    #: and (inputs, width) the matrices of these. None where a map is in 8 bits.
    ahead: tuple[Tensor, list[Tensor]] | None


class WhisperStep:
    """Runs one token a row of a model as it stands.

    Args:
        model: The model; its decoder has no dropout to apply and no hooks.
        layers: Of the decoder.
        cross: For groups of layers, encoder output to the keys and values of each layer of the group.
        head: Hidden state to logits.
        by_products: Attend by matrix products and not by the fused kernel.
    """

    def __init__(
        self, model: Any, layers: list[_Layer], cross: list[Projection], head: Projection, by_products: bool
    ) -> None:
        decoder = model.get_decoder()
        self._decoder, self._layers, self._cross, self._head = decoder, layers, cross, head
        self._embeddings = decoder.embed_tokens.weight.detach()
        self._last_norm = _norm(decoder.layer_norm)
        self._act = activation(decoder.config.activation_function)
        attention = decoder.layers[0].self_attn
        self._heads, self._head_dim, self._scale = attention.heads, attention.head_dim, attention.scale
        self._width = decoder.config.d_model
        self.by_products = by_products
        dtype = self._embeddings.dtype
        #: Whether steps read keys and values quickest as `Cache(for_products=True)` keeps them.
        self.attends_by_products = by_products and dtype != torch.float32
        # Of models in 8 bits they need not be more exact than bfloat16, which is half to read.
        is_rough = by_products and isinstance(model.proj_out, Int8Linear) and has_bfloat16_products()
        #: The type that keys and values of the audio are read quickest in; None: that of the model.
        self.cross_dtype = torch.bfloat16 if is_rough else None

    @classmethod
    def of(cls, model: Any) -> WhisperStep:
        """The quick step of a model.

        Raises:
            NoQuickStep: Only calling its modules does what they do now.
        """
        decoder = model.get_decoder()
        if model.training or not _is_plain(decoder, model.proj_out):
            raise NoQuickStep
        layers = [_layer(layer) for layer in decoder.layers]
        by_products = decoder.embed_tokens.weight.device.type == "cpu"
        return cls(model, layers, _cross_projections(decoder), require_projection(model.proj_out), by_products)

    def hear(self, encoded: Tensor, cache: Cache) -> None:
        """Put the keys and values of the encoder's output (audios, positions, d_model) into an empty cache."""
        index = 0
        # On a CPU what a window and a layer bring stays in the processor's caches, and what a batch brings does not.
        parts = encoded.split(1) if self.by_products else (encoded,)
        for project in self._cross:
            rooms: list[tuple[Tensor, Tensor]] = []
            for number, part in enumerate(parts):
                pairs = project(part).unflatten(-1, (-1, 2, self._heads, self._head_dim))
                if not rooms:
                    layers = range(index, index + pairs.shape[2])
                    rooms = [cache.cross_room(layer, pairs[0, :, 0, 0], len(encoded)) for layer in layers]
                for room, pair in zip(rooms, pairs.unbind(2), strict=True):
                    for kept, heard in zip(room, pair.permute(2, 0, 3, 1, 4), strict=True):
                        store(kept.narrow(0, number * len(part), len(part)), heard)
            index += len(rooms)

    def __call__(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """One token a row (rows, 1) to logits (rows, vocabulary) of the next one, float32.

        Raises:
            ShapeError: The decoder has no place for one more token.
        """
        rows, width, heads, head_dim = input_ids.shape[0], self._width, self._heads, self._head_dim
        decoder, scale, act = self._decoder, self._scale, self._act
        slots = cache.reserve(1, None, rows, input_ids.device)
        mask = attention_mask(1, slots.queries, slots.keys, past=slots.past)
        assert not isinstance(mask, str), "one query needs no causality"
        places = decoder._embed_positions(slots.past, 1, slots.queries, None)
        hidden = functional.embedding(input_ids, self._embeddings)
        if decoder.embed_scale != 1.0:
            hidden = hidden * decoder.embed_scale
        hidden = (hidden + places).view(rows, width)
        read = _read_by_kernel
        if self.by_products:
            read = read_by_products
            kept = torch.float32 if cache.for_products else hidden.dtype
            mask = None if mask is None else added_mask(mask, heads, kept)
        read_cross = read_rounded if is_rounded(cache.cross_dtype) else read
        # On a GPU biases are added ahead of a layer, and states go into its products: two launches less.
        is_ahead = not self.by_products and rows <= _FEW_ROWS and not torch.compiler.is_compiling()
        for layer, stored, cross in zip(self._layers, cache.layers, cache.cross_pairs, strict=True):
            if is_ahead and layer.ahead is not None and cross is not None:
                hidden = self._run_ahead(layer, layer.ahead, hidden, stored, cross, mask, read_cross)
                continue
            mapped = layer.own_inputs(layer.own_norm(hidden)).view(rows, 3, heads, head_dim)
            keys, values = stored.append(mapped[:, 1:].transpose(0, 1).unsqueeze(3))
            hidden = hidden + layer.own_output(read(mapped[:, 0], keys, values, mask, scale=scale))
            if cross is not None:
                queries = layer.cross_query(layer.cross_norm(hidden)).view(rows, heads, head_dim)
                hidden = hidden + layer.cross_output(read_cross(queries, *cross, None, scale=scale))
            hidden = hidden + layer.narrow(act(layer.widen(layer.last_norm(hidden))))
        return self._head(self._last_norm(hidden)).float()

    def _run_ahead(
        self,
        layer: _Layer,
        ahead: tuple[Tensor, list[Tensor]],
        hidden: Tensor,
        stored: Any,
        cross: tuple[Tensor, Tensor],
        mask: Tensor | None,
        read_cross: Callable[..., Tensor],
    ) -> Tensor:
        """One layer: the state (rows, width) with the biases of the next one, two and three additions, then these."""
        biases, (own, other, narrow) = ahead
        rows, heads, head_dim, scale = len(hidden), self._heads, self._head_dim, self._scale
        rest = hidden + biases
        mapped = layer.own_inputs(layer.own_norm(hidden)).view(rows, 3, heads, head_dim)
        keys, values = stored.append(mapped[:, 1:].transpose(0, 1).unsqueeze(3))
        hidden, rest = _taken_in(rest, _read_by_kernel(mapped[:, 0], keys, values, mask, scale=scale), own)
        queries = layer.cross_query(layer.cross_norm(hidden)).view(rows, heads, head_dim)
        hidden, rest = _taken_in(rest, read_cross(queries, *cross, None, scale=scale), other)
        return rest[0].addmm_(self._act(layer.widen(layer.last_norm(hidden))), narrow)


def _taken_in(states: Tensor, made: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Add what a matrix (inputs, width) makes of (rows, inputs) to states (n, rows, width); the first, and the rest."""
    count = len(states)
    states.baddbmm_(made.expand(count, -1, -1), matrix.expand(count, -1, -1))
    return states[0], states[1:]


def _read_by_kernel(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    return attend(queries.unsqueeze(2), keys, values, mask, scale=scale).flatten(1)


def _norm(norm: nn.LayerNorm) -> Norm:
    shape, weight, bias, epsilon = list(norm.normalized_shape), norm.weight.detach(), norm.bias.detach(), norm.eps

    def normalise(hidden: Tensor) -> Tensor:
        return torch.layer_norm(hidden, shape, weight, bias, epsilon)

    return normalise


def _layer(layer: WhisperDecoderLayer) -> _Layer:
    own, cross = layer.self_attn, layer.encoder_attn
    return _Layer(
        _norm(layer.self_attn_layer_norm),
        require_projection(own.q_proj, own.k_proj, own.v_proj),
        require_projection(own.out_proj),
        _norm(layer.encoder_attn_layer_norm),
        require_projection(cross.q_proj),
        require_projection(cross.out_proj),
        _norm(layer.final_layer_norm),
        require_projection(layer.fc1),
        require_projection(layer.fc2),
        _ahead(own.out_proj, cross.out_proj, layer.fc2),
    )


def _ahead(*linears: nn.Module) -> tuple[Tensor, list[Tensor]] | None:
    plain = [linear for linear in linears if type(linear) is nn.Linear and linear.bias is not None]
    if len(plain) < len(linears):
        return None
    biases = torch.stack([linear.bias.detach().float() for linear in plain]).cumsum(0)
    return biases[:, None].to(plain[0].bias.dtype), [linear.weight.detach().t() for linear in plain]


def _cross_projections(decoder: Any) -> list[Projection]:
    config, layers = decoder.config, list(decoder.layers)
    bytes_each = 2 * config.max_source_positions * config.d_model * decoder.embed_tokens.weight.element_size()
    # See `hear`: on a CPU one layer at a time.
    count = 1 if decoder.embed_tokens.weight.device.type == "cpu" else max(1, _CROSS_BYTES // bytes_each)
    groups = [layers[start : start + count] for start in range(0, len(layers), count)]
    attentions = [[layer.encoder_attn for layer in group] for group in groups]
    return [
        require_projection(*(part for one in group for part in (one.k_proj, one.v_proj)), many_rows=True)
        for group in attentions
    ]


def _is_plain(decoder: nn.Module, head: nn.Module) -> bool:
    """Whether calling the modules does nothing but what their classes say, on one device."""
    kinds = (nn.Linear, Int8Linear, nn.LayerNorm, nn.Embedding)
    for module in (*decoder.modules(), head):
        if has_additions(module):
            return False
        if not any(True for _ in module.children()) and type(module) not in kinds:
            return False
    return len({tensor.device for tensor in (*decoder.parameters(), *head.parameters())}) == 1
