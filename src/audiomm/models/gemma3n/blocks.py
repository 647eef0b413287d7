"""The blocks of Gemma 3n's decoder: alternating updates, learned residual, sparse feed-forward, attention, layer.

Module names are the checkpoint's. Four parallel streams of states run through the layers, here side by side as
(rows, length, streams, width): attention and feed-forward work on one of them, and cheap learned mixtures predict and
correct the others. Mixing is done in float32 and rounded once, as in the training code. Sources: AltUp,
arXiv:2301.13310; LAuReL, arXiv:2411.07501; Spark Transformer (statistical top-k), arXiv:2506.06644.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import attend, attend_eager
from ...layers.cache import Cache, PassThrough
from ...layers.gated_mlp import GatedMLP
from ...layers.masks import Mask
from ...layers.norm import RMSNorm
from ...layers.rotary import apply_rotary
from .config import Gemma3nTextConfig

#: Keys and values (rows, kv_heads, slots, head_dim) that later layers read.
Pair = tuple[Tensor, Tensor]

#: Cosines and sines.
Tables = tuple[Tensor, Tensor]


class CoefficientLinear(nn.Linear):
    """A small matrix of mixing coefficients, kept within +-limit: when it is loaded, and while it is trained."""

    def __init__(self, inputs: int, outputs: int, limit: float | None) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.limit = math.inf if limit is None else limit

    def take_weight(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Keep a checkpoint's tensor; called while loading."""
        self.weight = nn.Parameter(tensor.clamp(-self.limit, self.limit).to(device=device, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) float32 -> (..., outputs) float32."""
        weight = self.weight.float()
        return functional.linear(inputs, weight.clamp(-self.limit, self.limit) if self.training else weight)


class Gemma3nTextAltUp(nn.Module):
    """Predicts all streams before a layer from what they were, and corrects them by what the layer made of one."""

    def __init__(self, config: Gemma3nTextConfig) -> None:
        super().__init__()
        self.streams, self.active = config.altup_num_inputs, config.altup_active_idx
        self.scales_output = config.altup_correct_scale
        limit, width = config.altup_coef_clip, config.hidden_size
        self.correct_output_scale = nn.Parameter(torch.zeros(width))
        self.correction_coefs = CoefficientLinear(self.streams, self.streams, limit)
        self.prediction_coefs = CoefficientLinear(self.streams, self.streams**2, limit)
        self.modality_router = nn.Linear(width, self.streams, bias=False)
        self.router_norm = RMSNorm(width, config.rms_norm_eps)
        self._input_scale = 1.0 / width

    def route(self, hidden: Tensor) -> Tensor:
        """(rows, length, width) -> (rows, length, streams) float32 between -1 and 1."""
        normed = self.router_norm(hidden) * self._input_scale
        return functional.linear(normed.float(), self.modality_router.weight.float()).tanh()

    def predict(self, states: Tensor) -> Tensor:
        """(rows, length, streams, width) -> the same: each stream plus a mixture of all."""
        coefficients = self.prediction_coefs(self.route(states[:, :, self.active]))
        flat = states.float().flatten(0, 1)
        mixed = torch.baddbmm(flat, coefficients.view(-1, self.streams, self.streams), flat)
        return mixed.view(states.shape).to(states.dtype)

    def correct(self, predicted: Tensor, made: Tensor) -> Tensor:
        """Move every stream of `predicted` by its share of `made` (rows, length, width) minus the active stream."""
        shares = self.correction_coefs(self.route(made)) + 1.0
        change = made.float() - predicted[:, :, self.active].float()
        corrected = torch.addcmul(predicted.float(), change[:, :, None], shares[..., None])
        return corrected.to(predicted.dtype)

    def scale_output(self, hidden: Tensor) -> Tensor:
        """What the per-layer embedding's gate reads of the active stream (rows, length, width)."""
        return hidden * self.correct_output_scale if self.scales_output else hidden


class Gemma3nTextLaurelBlock(nn.Module):
    """A learned residual of low rank beside attention."""

    def __init__(self, config: Gemma3nTextConfig) -> None:
        super().__init__()
        self.linear_left = nn.Linear(config.hidden_size, config.laurel_rank, bias=False)
        self.linear_right = nn.Linear(config.laurel_rank, config.hidden_size, bias=False)
        self.post_laurel_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, length, width) -> (rows, length, width)."""
        learned: Tensor = self.post_laurel_norm(self.linear_right(self.linear_left(hidden)))
        return hidden + learned


class Gemma3nTextMLP(GatedMLP):
    """A gated feed-forward block that, in sparse layers, lets only the strongest gates of each token through.

    Which those are is guessed from mean and deviation as if the gates were normally distributed: no sorting.
    """

    def __init__(self, config: Gemma3nTextConfig, layer: int) -> None:
        super().__init__(config.hidden_size, config.intermediate_size[layer])
        share = config.activation_sparsity_pattern[layer]
        # Deviations above the mean beyond which a share of 1 - `share` lies.
        self.deviations = NormalDist().inv_cdf(share) if share > 0 else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(rows, length, width) -> (rows, length, width)."""
        if self.deviations is None:
            return super().forward(hidden)
        gate = self.gate_proj(hidden).float()
        deviation, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
        gate = functional.relu(gate - (mean + deviation * self.deviations)).to(hidden.dtype)
        output: Tensor = self.down_proj(functional.gelu(gate, approximate="tanh") * self.up_proj(hidden))
        return output


class Gemma3nTextAttention(nn.Module):
    """Grouped-query attention with normed queries, keys and values; later layers have queries only."""

    def __init__(self, config: Gemma3nTextConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps)
        if config.kv_source(layer) == layer:
            self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
            self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
            self.k_norm = RMSNorm(self.head_dim, eps)
            self.v_norm = RMSNorm(self.head_dim, eps, scaled=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias)

    def forward(
        self,
        hidden: Tensor,
        tables: Tables,
        mask: Mask,
        cache: Cache | PassThrough,
        shared: Pair | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None, Pair]:
        """Attend.

        Args:
            hidden: (rows, new, width).
            shared: The pair to read; None in a layer that makes its own.

        Returns:
            (rows, new, width), the weights (rows, heads, new, slots) or None, and the pair that was read.
        """
        queries = self.q_norm(self.q_proj(hidden).unflatten(-1, (self.heads, self.head_dim)))
        queries = apply_rotary(queries.transpose(1, 2), tables)
        pair = self._pair(hidden, tables, cache) if shared is None else shared
        dropout = self.config.attention_dropout if self.training else 0.0
        # Queries and keys are of unit mean square: their products are not scaled down.
        weights = None
        if output_attentions or self.config.attn_implementation == "eager":
            attended, weights = attend_eager(queries, *pair, mask, scale=1.0, dropout=dropout)
        else:
            attended = attend(queries, *pair, mask, scale=1.0, dropout=dropout)
        output = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output, weights if output_attentions else None, pair

    def _pair(self, hidden: Tensor, tables: Tables, cache: Cache | PassThrough) -> Pair:
        shape = (self.kv_heads, self.head_dim)
        keys = self.k_norm(self.k_proj(hidden).unflatten(-1, shape)).transpose(1, 2)
        values = self.v_norm(self.v_proj(hidden).unflatten(-1, shape)).transpose(1, 2)
        return cache.update(self.layer, apply_rotary(keys, tables), values)


class Gemma3nTextDecoderLayer(nn.Module):
    """Predict the streams, attend and feed forward on one of them, correct all, add the layer's own embedding."""

    def __init__(self, config: Gemma3nTextConfig, layer: int) -> None:
        super().__init__()
        width, eps, small = config.hidden_size, config.rms_norm_eps, config.hidden_size_per_layer_input
        self.self_attn = Gemma3nTextAttention(config, layer)
        self.mlp = Gemma3nTextMLP(config, layer)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        self.altup = Gemma3nTextAltUp(config)
        self.laurel = Gemma3nTextLaurelBlock(config)
        self.per_layer_input_gate = nn.Linear(width, small, bias=False)
        self.per_layer_projection = nn.Linear(small, width, bias=False)
        self.post_per_layer_input_norm = RMSNorm(width, eps)

    def forward(
        self,
        states: Tensor,
        per_layer_input: Tensor,
        tables: Tables,
        mask: Mask,
        cache: Cache | PassThrough,
        shared: Pair | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None, Pair]:
        """One layer.

        Args:
            states: (rows, new, streams, width).
            per_layer_input: (rows, new, small width), this layer's embedding of every token.
            tables, mask, cache, shared, output_attentions: As in `Gemma3nTextAttention`.

        Returns:
            The states, the attention weights or None, and the keys and values that were read.
        """
        predicted = self.altup.predict(states)
        active = predicted[:, :, self.altup.active]
        normed = self.input_layernorm(active)
        attended, weights, pair = self.self_attn(normed, tables, mask, cache, shared, output_attentions)
        attended = self.post_attention_layernorm(attended)
        gated = (active + attended + self.laurel(normed)) / math.sqrt(2.0)
        fed = self.mlp(self.pre_feedforward_layernorm(gated))
        made = gated + self.post_feedforward_layernorm(fed)
        corrected = self.altup.correct(predicted, made)
        gate = self.per_layer_input_gate(self.altup.scale_output(corrected[:, :, self.altup.active]))
        own = self.per_layer_projection(functional.gelu(gate, approximate="tanh") * per_layer_input)
        own = self.post_per_layer_input_norm(own)
        # The first stream goes without.
        states = torch.cat((corrected[:, :, :1], corrected[:, :, 1:] + own[:, :, None]), dim=2)
        return states, weights, pair
