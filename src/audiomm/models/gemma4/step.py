"""Gemma 4's decode step without modules: one token a row through plain tensors, in as few operations as torch has.

The quick twin of `Gemma4WithTokenHead.step`, for inference. Queries, keys and values come from one product, are normed
together and turned together; gate and up come from one product; what all layers need of a token's position and of its
per-layer embeddings is made once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import fused
from ...layers.cache import Cache
from ...layers.embedding import ScaledEmbedding
from ...layers.experts import Experts, Router, quick_experts, quick_norms, quick_routing
from ...layers.gated_mlp import GatedMLP, gelu_times, quick_mlp
from ...layers.heads import HeadReader, Heads, OneToken, StepHeads
from ...layers.int8_experts import Int8Experts
from ...layers.language_head import quick_logits
from ...layers.norm import RMSNorm, Roomy, quick_added_norm, quick_norm, roomy, weight_of
from ...layers.per_layer import PerLayerTable, quick_per_layer
from ...layers.quick import product, product_into, require_parts, straight
from .text import Gemma4TextAttention, Gemma4TextDecoderLayer, Gemma4TextModel

#: What a text stack consists of, besides linears.
PARTS = (Gemma4TextModel, Gemma4TextDecoderLayer, Gemma4TextAttention, GatedMLP, RMSNorm, ScaledEmbedding,
         PerLayerTable, Router, Experts, Int8Experts)  # fmt: skip


class QuickStep:
    """One token a row: ids (rows, 1) and a cache to logits (rows, vocabulary) float32.

    Args:
        stack: The decoder.
        head: Its language-model head.
        text_ids: What the decoder reads for ids (rows, 1), where that may be others; None reads them as they are.

    Raises:
        NoQuickStep: A part of the model must be called as a module.
    """

    def __init__(
        self, stack: Gemma4TextModel, head: nn.Linear, text_ids: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        require_parts(stack, *PARTS, apart=(PerLayerTable,))
        config = stack.config
        layers = range(config.num_hidden_layers)
        eps, self.table = config.rms_norm_eps, stack.embed_tokens.weight.detach()
        every = torch.arange(len(self.table), device=self.table.device)
        self.text_ids = None if text_ids is None else text_ids(every)
        self.scale = stack.embed_tokens.scales[self.table.dtype]
        has_table = bool(config.hidden_size_per_layer_input)
        self.per_layer = quick_per_layer(stack, len(self.table)) if has_table else None
        kinds = [config.kind_of(layer) for layer in layers]
        blocks: Any = stack.layers
        attentions = [layer.self_attn for layer in blocks]
        self.heads = StepHeads(
            [_heads(attention) for attention in attentions],
            kinds,
            stack.frequencies(self.table.device),
            {kind: config.window_of(layer) for layer, kind in enumerate(kinds)},
            owners=config.first_shared_layer,
            eps=eps,
            dtype=self.table.dtype,
            keys_are_values=[layer for layer in layers if hasattr(attentions[layer], "k_proj")
                             and not hasattr(attentions[layer], "v_proj")],
        )  # fmt: skip
        self.layers = [QuickLayer(*pair) for pair in zip(blocks, self.heads.readers, strict=True)]
        self.eps, self.is_precise = eps, self.table.dtype == torch.float32
        self.norm = quick_norm(weight_of(stack.norm), eps)
        self.score = quick_logits(head, config.final_logit_softcapping)
        self._experts = [layer.experts for layer in blocks if layer.has_experts]

    def waits(self, tokens: int) -> bool:
        """Whether so many tokens make the host wait for the device."""
        return any(experts.waits(tokens) for experts in self._experts)

    def __call__(self, input_ids: Tensor, cache: Cache) -> Tensor:
        with straight():
            return self._score(input_ids, cache)

    def _score(self, input_ids: Tensor, cache: Cache) -> Tensor:
        ids = input_ids.reshape(-1)
        if self.text_ids is not None:
            ids = self.text_ids.index_select(0, ids)
        token = self.heads.begin(cache, len(ids), ids.device)
        embedded, place = self.table.index_select(0, ids), None
        state: Roomy = embedded, None
        if self.is_precise:
            state, place = (roomy(*embedded.shape, eps=self.eps, like=embedded) for _ in range(2))
        torch.mul(embedded, self.scale, out=state[0])
        own = [None] * len(self.layers) if self.per_layer is None else self.per_layer(ids, state[0])
        for layer, small in zip(self.layers, own, strict=True):
            layer(state, place, token, small)
        return self.score(self.norm(*state))


class QuickLayer:
    """One layer of `QuickStep`.

    Args:
        layer: The layer it stands for.
        read: Its attention, between the projections.
    """

    def __init__(self, layer: Gemma4TextDecoderLayer, read: HeadReader) -> None:
        attention, eps = layer.self_attn, layer.input_layernorm.eps
        names = ("q_proj", "k_proj", "v_proj")
        self.project = product(*(getattr(attention, name) for name in names if hasattr(attention, name)))
        self.read, self.output = read, product_into(attention.o_proj)
        self.input_norm = quick_norm(weight_of(layer.input_layernorm), eps)
        self.add_attended = quick_added_norm(weight_of(layer.post_attention_layernorm), eps)
        self.feed_forward = _mixture(layer) if layer.has_experts else _plain(layer)
        self.gate = self.back = None
        last = layer.post_feedforward_layernorm
        if hasattr(layer, "per_layer_input_gate"):
            self.add_made = quick_added_norm(weight_of(last), eps)
            self.gate, self.back = product(layer.per_layer_input_gate), product_into(layer.per_layer_projection)
            self.join = gelu_times(weight_of(last))
            last = layer.post_per_layer_input_norm
        self.scalar = layer.layer_scalar.detach()
        self.add_last = _scaled_sum(weight_of(last), self.scalar, eps)

    def __call__(self, state: Roomy, place: Roomy | None, token: OneToken, own: Tensor | None) -> None:
        """Bring the state, (rows, width), a layer further.

        Args:
            state: What came out of the layer before; written over.
            place: Where products may be written, of the same sizes.
            token: What all layers are told.
            own: The layer's per-layer embedding.
        """
        hidden = state[0]
        attended = self.read(self.project(self.input_norm(*state)), token)
        self.add_attended(hidden, *self.output(attended, place))
        made = self.feed_forward(state, place)
        if own is not None and self.gate is not None and self.back is not None:
            self.add_made(hidden, *made)
            made = self.back(self.join(self.gate(hidden), own), place)
        self.add_last(hidden, *made)


def _heads(attention: Gemma4TextAttention) -> Heads:
    key_norm = attention.k_norm if hasattr(attention, "k_norm") else None
    return Heads(
        attention.q_proj.out_features // attention.head_dim,
        attention.groups,
        weight_of(attention.q_norm),
        None if key_norm is None else weight_of(key_norm),
    )


def _scaled_sum(weight: Tensor, scalar: Tensor, eps: float) -> Callable[..., Tensor]:
    """A function that writes scalar * (hidden + RMSNorm(made)) to hidden; it takes both, and the room of what was made.

    One of the two is scaled by the norm's weight, the other while adding.
    """
    scaled = weight * scalar
    if fused.has_kernels(weight):
        return lambda hidden, made, whole=None: fused.norm_added(hidden, made, scaled, eps, scalar=scalar)
    norm = quick_norm(scaled, eps)
    return lambda hidden, made, whole=None: torch.addcmul(norm(made, whole), hidden, scalar, out=hidden)


def _plain(layer: Gemma4TextDecoderLayer) -> Callable[[Roomy, Roomy | None], Roomy]:
    norm, mlp = layer.pre_feedforward_layernorm, quick_mlp(layer.mlp)
    normed = quick_norm(weight_of(norm), norm.eps)
    return lambda state, place: mlp(normed(*state), place)


def _mixture(layer: Gemma4TextDecoderLayer) -> Callable[[Roomy, Roomy | None], Roomy]:
    """The feed-forward block with experts beside it: its three norms read the same, and are taken together."""
    first, second, router = layer.pre_feedforward_layernorm, layer.pre_feedforward_layernorm_2, layer.router
    weights = (weight_of(first), weight_of(second), router.scale.detach() * router.factor)
    norms = quick_norms(torch.stack(weights), first.eps)
    mlp, route, experts = quick_mlp(layer.mlp), quick_routing(router), quick_experts(layer.experts)
    made_norm = quick_norm(weight_of(layer.post_feedforward_layernorm_1), first.eps)
    add_routed = quick_added_norm(weight_of(layer.post_feedforward_layernorm_2), first.eps)

    def run(state: Roomy, place: Roomy | None) -> Roomy:
        plain, mixed, scored = norms(state[0])
        made = made_norm(*mlp(plain, place))
        return add_routed(made, experts(mixed, *route(scored))), None

    return run
