"""Gemma 4's text stack: attention with two head sizes, feed-forward blocks with or without experts, and the decoder.

Argument and output names are those of transformers; weight names are the checkpoint's. Source: the model cards of
Gemma 4 and the "Gemma 3" report, arXiv:2503.19786, whose sliding and full layers it keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...base.config import PreTrainedConfig
from ...base.errors import ConfigError, ShapeError
from ...base.hub import Source
from ...base.modeling import PreTrainedModel
from ...base.outputs import ModelOutput
from ...layers.attention import attend, attend_eager
from ...layers.cache import Cache, LayerSpec, PassThrough, Slots
from ...layers.conformer import bounded
from ...layers.continued import positions_behind
from ...layers.embedding import ScaledEmbedding
from ...layers.experts import Experts, Router
from ...layers.gated_mlp import GatedMLP
from ...layers.int8_experts import Int8Experts
from ...layers.masks import Mask, layer_masks, packed_masks, ready_masks
from ...layers.norm import RMSNorm
from ...layers.per_layer import PLACEMENTS, PerLayerInputs, PerLayerTable, find_token_ids
from ...layers.quantized import Int8Linear
from ...layers.rotary import apply_rotary, rotary_frequencies, rotary_tables
from .config import FULL, Gemma4TextConfig
from .weights import NOT_TEXT, TEXT_NAMES, UNUSED

Pair = tuple[Tensor, Tensor]

#: As `kept`: no states are wanted, only what the cache keeps.
CACHE_ONLY = slice(0, 0)

#: Widest head that CUDA's fused kernels take together with grouped queries; wider ones fall to one that builds the
#: whole score matrix, unless the keys are repeated.
_WIDEST_GROUPED_HEAD = 256


@dataclass
class Gemma4TextOutput(ModelOutput):
    """A decoder's answer.

    Attributes:
        shared_kv_states: {kind of layer: (keys, values)} of the last layer of each kind that has its own, if asked.
        router_logits: One (tokens, experts) tensor a layer if asked; probabilities, as in transformers.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    shared_kv_states: dict[str, Pair] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class Gemma4TextAttention(nn.Module):
    """Grouped-query attention with normed queries, keys and values and no scaling of the scores.

    Layers from `first_shared_layer` on have queries only and read the keys and values of an earlier layer.
    """

    def __init__(self, config: Gemma4TextConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim, self.groups = config.head_dim_of(layer), config.key_value_heads_of(layer)
        heads, width, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias)
        if layer < config.first_shared_layer:
            self.k_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.v_norm = RMSNorm(self.head_dim, config.rms_norm_eps, scaled=False)
            if not (config.attention_k_eq_v and config.kind_of(layer) == FULL):
                self.v_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def pair(self, hidden: Tensor, tables: Pair) -> Pair:
        """Keys and values (rows, heads, length, head_dim) of (rows, length, width)."""
        projected = self._heads(self.k_proj(hidden))
        values = self._heads(self.v_proj(hidden)) if hasattr(self, "v_proj") else projected
        return apply_rotary(self.k_norm(projected), tables), self.v_norm(values)

    def read(
        self, hidden: Tensor, tables: Pair, pair: Pair, mask: Mask, weights_wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What (rows, length, width) reads from keys and values, and the weights if they are wanted."""
        queries = apply_rotary(self.q_norm(self._heads(self.q_proj(hidden))), tables)
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if weights_wanted or self.config.attn_implementation == "eager":
            attended, weights = attend_eager(queries, *pair, mask, scale=1.0, dropout=dropout)
        else:
            keys, values = pair
            repeats = queries.shape[1] // keys.shape[1]
            if repeats > 1 and self.head_dim > _WIDEST_GROUPED_HEAD and queries.shape[2] > 1 and keys.is_cuda:
                keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
            attended = attend(queries, keys, values, mask, scale=1.0, dropout=dropout)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), weights if weights_wanted else None


class Gemma4TextDecoderLayer(nn.Module):
    """Attention, feed-forward (and experts beside it), per-layer embedding; each normed before and after."""

    def __init__(self, config: Gemma4TextConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Gemma4TextAttention(config, layer)
        self.mlp = GatedMLP(width, config.intermediate_size_of(layer))
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        self.layer_scalar: Tensor
        self.register_buffer("layer_scalar", torch.ones(1))
        self.has_experts = config.enable_moe_block
        if self.has_experts:
            count, active, inner = config.num_experts, config.top_k_experts, config.moe_intermediate_size
            assert count is not None and active is not None and inner is not None, "the configuration checks these"
            self.router = Router(width, count, active, eps)
            self.experts = Experts(count, width, inner)
            self.post_feedforward_layernorm_1 = RMSNorm(width, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(width, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(width, eps)
        if config.hidden_size_per_layer_input:
            self.per_layer_input_gate = nn.Linear(width, config.hidden_size_per_layer_input, bias=False)
            self.per_layer_projection = nn.Linear(config.hidden_size_per_layer_input, width, bias=False)
            self.post_per_layer_input_norm = RMSNorm(width, eps)

    def forward(
        self,
        hidden: Tensor,
        per_layer: Tensor | None,
        tables: Pair,
        mask: Mask,
        cache: Cache | PassThrough,
        owner: int | None,
        pair: Pair | None = None,
        weights_wanted: bool = False,
    ) -> tuple[Tensor, Pair, Tensor | None, Tensor | None]:
        """One layer.

        Args:
            hidden: (rows, new tokens, width).
            per_layer: (rows, new tokens, width of the per-layer embeddings), this layer's own.
            tables: Cosines and sines of the tokens' positions.
            mask: Who sees whom.
            cache: Holds the earlier tokens' keys and values.
            owner: This layer's number in the cache; None when it reads `pair`, of an earlier layer.

        Returns:
            The new hidden states; the keys and values read; attention weights, if wanted, and the probabilities of
            the experts, if there are any.
        """
        normed = self.input_layernorm(hidden)
        if owner is not None:
            pair = cache.update(owner, *self.self_attn.pair(normed, tables))
        assert pair is not None, "a layer without keys is given another's"
        attended, weights = self.self_attn.read(normed, tables, pair, mask, weights_wanted)
        hidden = hidden + self.post_attention_layernorm(bounded(attended, math.inf))
        made, routed = self._feed_forward(hidden)
        hidden = hidden + self.post_feedforward_layernorm(made)
        if per_layer is not None:
            gate = functional.gelu(self.per_layer_input_gate(hidden), approximate="tanh")
            hidden = hidden + self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer))
        return bounded(hidden * self.layer_scalar, math.inf), pair, weights, routed

    def _feed_forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        # In float16 an answer may be too large; the norm behind it makes its size meaningless.
        made = bounded(self.mlp(self.pre_feedforward_layernorm(hidden)), math.inf)
        if not self.has_experts:
            return made, None
        tokens = hidden.flatten(0, 1)
        probabilities, weights, chosen = self.router(tokens)
        routed = self.experts(self.pre_feedforward_layernorm_2(tokens), weights, chosen).view_as(hidden)
        routed = bounded(routed, math.inf)
        return self.post_feedforward_layernorm_1(made) + self.post_feedforward_layernorm_2(routed), probabilities


class Gemma4PreTrainedModel(PreTrainedModel):
    """What all models of Gemma 4 with a text stack share: initial weights, and names in checkpoints."""

    config_class: ClassVar[type[PreTrainedConfig]] = Gemma4TextConfig
    base_model_prefix: ClassVar[str] = "model"
    no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma4TextDecoderLayer",)
    quantized_linear: ClassVar[Any] = Int8Linear
    quantized_parts: ClassVar[dict[type[nn.Module], Any]] = {Experts: Int8Experts}
    float_linears: ClassVar[tuple[str, ...]] = (
        r"router\.proj$",
        r"per_layer_model_projection$",
        r"input_proj$",
        r"patch_dense$",
    )
    ignored_weights: ClassVar[tuple[str, ...]] = UNUSED

    @classmethod
    def _load_config(
        cls, source: Source, config: Any, attn_implementation: str | None, overrides: dict[str, Any]
    ) -> Any:
        placement = overrides.pop("per_layer_embeddings", None)
        config = super()._load_config(source, config, attn_implementation, overrides)
        if placement is not None:
            if placement not in PLACEMENTS:
                raise ConfigError(f"per_layer_embeddings={placement!r}: accepted are {', '.join(PLACEMENTS)}.")
            config.get_text_config().per_layer_embeddings = placement
        return config

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary, per-layer embeddings too, which is what transformers does."""
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for stack in self.modules():
            if isinstance(stack, Gemma4TextModel) and stack.config.hidden_size_per_layer_input:
                stack.resize_per_layer_table(table.num_embeddings)
        return table

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        deviation = self.config.get_text_config().initializer_range
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=deviation)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=deviation)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        elif isinstance(module, Router):
            module.scale.fill_(1.0)
            module.per_expert_scale.fill_(1.0)
        elif isinstance(module, Experts):
            module.gate_up_proj.normal_(std=deviation)
            module.down_proj.normal_(std=deviation)
        elif isinstance(module, Gemma4TextDecoderLayer):
            module.layer_scalar.fill_(1.0)


class Gemma4TextModel(PerLayerInputs, Gemma4PreTrainedModel):
    """Token embeddings, per-layer embeddings where the model has them, and a stack of layers."""

    config: Gemma4TextConfig
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, *NOT_TEXT, r"lm_head\.")
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = TEXT_NAMES

    def __init__(self, config: Gemma4TextConfig) -> None:
        super().__init__(config)
        width, padding = config.hidden_size, config.pad_token_id
        padding = padding if padding is not None and padding < config.vocab_size else None
        self.embed_tokens = ScaledEmbedding(config.vocab_size, width, padding, scale=width**0.5)
        if config.hidden_size_per_layer_input:
            rows, layers = config.vocab_size_per_layer_input, config.num_hidden_layers
            known = padding if padding is not None and padding < rows else None
            placement = getattr(config, "per_layer_embeddings", "device")
            table = PerLayerTable(rows, layers, config.hidden_size_per_layer_input, known, placement)
            self.add_per_layer_modules(table, width, config.rms_norm_eps)
        self.layers = nn.ModuleList([Gemma4TextDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self._frequencies = {config.kind_of(i): self._rotary(i) for i in range(config.num_hidden_layers)}
        self.gradient_checkpointing = False
        self.post_init()

    def _rotary(self, layer: int) -> Tensor:
        rope = self.config.rope_parameters[self.config.kind_of(layer)]  # type: ignore[index]
        share = rope.get("partial_rotary_factor", 1.0) if rope["rope_type"] == "proportional" else 1.0
        # Not a buffer: frequencies stay float32 and are made on the CPU whatever is done to the model.
        with torch.device("cpu"):
            return rotary_frequencies(
                self.config.head_dim_of(layer), rope["rope_theta"], rotated_share=share, factor=rope.get("factor", 1.0)
            )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if not isinstance(value, ScaledEmbedding):
            value = ScaledEmbedding.of(value, self.config.hidden_size**0.5)
        self.embed_tokens = value

    @torch.no_grad()
    def resize_per_layer_table(self, rows: int) -> None:
        """Give the per-layer embeddings `rows` rows; new ones are the mean of the old."""
        old = self.embed_tokens_per_layer
        known = old.padding_idx if old.padding_idx is not None and old.padding_idx < rows else None
        with torch.device("meta"):
            table = PerLayerTable(rows, old.layers, old.width, known, old.placement)
        weight = old.weight[:rows]
        mean = old.weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        weight = torch.cat((weight, mean.expand(rows - len(weight), -1)))
        table.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        self.embed_tokens_per_layer = table
        self.config.vocab_size_per_layer_input = rows

    def cache_specs(self) -> list[LayerSpec]:
        """What each layer that owns keys and values keeps while generating."""
        config = self.config
        return [
            LayerSpec(config.key_value_heads_of(i), config.head_dim_of(i), window=config.window_of(i))
            for i in range(config.first_shared_layer)
        ]

    def make_cache(self, batch: int, *, max_length: int | None = None, fixed: bool = False) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        length = max_length or self.config.max_position_embeddings
        return Cache(self.cache_specs(), rows=batch, length=length, fixed=fixed, device=self.device, dtype=self.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        use_cache: bool | None = None,
        blocks: Tensor | None = None,
        kept: slice | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_shared_kv_states: bool = False,
        return_dict: bool | None = None,
    ) -> Gemma4TextOutput | tuple[Any, ...]:
        """Decode tokens that follow those in the cache.

        Args:
            input_ids: (rows, new) token ids; or inputs_embeds (rows, new, width), scaled already.
            attention_mask: (rows, past + new), 0 for padding; or (rows, 1, new, past + new), True or 0.0 where a token
                is seen; or a dict of such, by kind of layer; None when there is no padding.
            position_ids: (rows, new); follow from mask and cache when None. Where they begin anew in a row, and there
                is neither mask nor cache, a sequence begins that sees nothing of those before.
            past_key_values: The cache of an earlier call.
            per_layer_inputs: (rows, new, layers, width), from `get_per_layer_inputs`, with inputs_embeds; without it
                the tokens whose embeddings these are get looked up.
            use_cache: Keep keys and values for a next call; config.use_cache when None.
            blocks: (rows, new) bool, True for tokens of a picture, which see each other in sliding layers.
            kept: Columns that are wanted in `last_hidden_state`; None is all. Layers that share keys and values run
                on these alone, which changes nothing in them; with CACHE_ONLY they do not run.

        Raises:
            ShapeError: Both or none of input_ids and inputs_embeds, or per_layer_inputs beside input_ids.
        """
        config = self.config
        states_wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights_wanted = bool(config.output_attentions if output_attentions is None else output_attentions)
        hidden, per_layer = self._embed(input_ids, inputs_embeds, per_layer_inputs)
        cache = self._cache(past_key_values, config.use_cache if use_cache is None else use_cache)
        rows, count = hidden.shape[:2]
        if attention_mask is None and position_ids is not None and isinstance(cache, PassThrough):
            attention_mask = packed_masks(position_ids, self._kinds(), blocks)
        slots = cache.reserve(count, new_positions(attention_mask, count, cache), rows, hidden.device)
        masks = self._masks(attention_mask, count, slots, blocks)
        if position_ids is None:
            position_ids = slots.queries
        if position_ids is None:
            position_ids = torch.arange(slots.past, slots.past + count, device=hidden.device)[None]
        tables = self.tables(position_ids.clamp(min=0), hidden.dtype)
        early = kept is not None and not states_wanted and not weights_wanted
        states: list[Tensor] = []
        weights: list[Tensor] = []
        routed: list[Tensor] = []
        pairs: dict[str, Pair] = {}
        for index, layer in enumerate(self.layers):
            if early and kept is not None and index == config.first_shared_layer:
                if isinstance(kept, slice) and kept == CACHE_ONLY:
                    break
                # From here on no layer writes keys, so only what is wanted in the end needs to pass.
                masks = self._masks(attention_mask, count, slots, blocks, kept)
                tables = {kind: (cos[:, :, kept], sin[:, :, kept]) for kind, (cos, sin) in tables.items()}
                hidden, per_layer, kept = hidden[:, kept], None if per_layer is None else per_layer[:, kept], None
            states.append(hidden)
            kind, own = config.kind_of(index), index < config.first_shared_layer
            arguments = (
                None if per_layer is None else per_layer[:, :, index],
                tables[kind],
                masks[config.window_of(index)],
                cache,
                index if own else None,
                None if own else pairs[kind],
                weights_wanted,
            )
            if self.gradient_checkpointing and self.training:
                hidden, pair, weight, route = checkpoint(layer, hidden, *arguments, use_reentrant=False)
            else:
                hidden, pair, weight, route = layer(hidden, *arguments)
            # The last layer of its kind that has its own pair is the one later layers read.
            pairs[kind] = pair
            weights += [] if weight is None else [weight]
            routed += [] if route is None else [route]
        hidden = self.norm(hidden)
        output = Gemma4TextOutput(
            last_hidden_state=hidden if kept is None else hidden[:, kept],
            past_key_values=cache if isinstance(cache, Cache) else None,
            hidden_states=(*states, hidden) if states_wanted else None,
            attentions=tuple(weights) if weights_wanted else None,
            shared_kv_states=pairs if return_shared_kv_states else None,
            router_logits=tuple(routed) if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _embed(
        self, input_ids: Tensor | None, embeddings: Tensor | None, per_layer: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What enters the first layer, and what each layer reads besides."""
        if (input_ids is None) == (embeddings is None):
            raise ShapeError("the decoder needs either token ids or embeddings of them: pass exactly one of the two.")
        has_table = bool(self.config.hidden_size_per_layer_input)
        if embeddings is None:
            if per_layer is not None:
                raise ShapeError("per_layer_inputs go with inputs_embeds; with input_ids they are looked up: drop one.")
            embeddings = self.embed_tokens(input_ids)
            per_layer = self.get_per_layer_inputs(input_ids) if has_table and input_ids is not None else None
        elif has_table and per_layer is None:
            per_layer = self.get_per_layer_inputs(find_token_ids(embeddings, self.embed_tokens))
        return embeddings, self.project_per_layer_inputs(embeddings, per_layer) if has_table else None

    def _kinds(self) -> dict[int | None, str]:
        """What layers of each window are called."""
        config = self.config
        return {config.window_of(index): config.kind_of(index) for index in range(config.num_hidden_layers)}

    def _masks(
        self,
        attention_mask: Any,
        count: int,
        slots: Slots,
        blocks: Tensor | None,
        kept: slice | Tensor | None = None,
    ) -> dict[int | None, Mask]:
        """The mask of each kind of layer, by its window; of the queries in some columns, or of all."""
        kinds = self._kinds()
        ready: dict[int | None, Mask] = {**ready_masks(attention_mask, kinds, kept)}
        return ready | layer_masks(count, slots, kinds.keys() - ready.keys(), blocks=blocks, kept=kept)

    def _cache(self, past: Cache | None, use_cache: bool) -> Cache | PassThrough:
        if past is not None:
            return past
        # Recomputing a layer in the backward pass would store its keys twice.
        wanted = use_cache and not (self.gradient_checkpointing and self.training)
        return Cache(self.cache_specs()) if wanted else PassThrough()

    def tables(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Pair]:
        """Cosines and sines of positions (rows, new) for each kind of layer."""
        frequencies = self.frequencies(positions.device)
        return {kind: rotary_tables(positions, each, dtype) for kind, each in frequencies.items()}

    def frequencies(self, device: torch.device) -> dict[str, Tensor]:
        """Angles a position, (head_dim / 2,) float32, for each kind of layer."""
        for kind, each in self._frequencies.items():
            if each.device != device:
                self._frequencies[kind] = each.to(device)
        return self._frequencies


def new_positions(mask: Any, count: int, cache: Cache | PassThrough) -> Tensor | None:
    """(rows, count) positions of the newest tokens of a padding mask (rows, total), -1 where it is 0.

    Args:
        cache: What holds the tokens before them; it forgets those that the mask hides.

    Raises:
        ShapeError: The mask has another number of dimensions than two or four, or covers fewer tokens than are new.
    """
    if mask is None or isinstance(mask, dict) or mask.dim() == 4:
        return None
    if mask.dim() != 2 or mask.shape[1] < count:
        raise ShapeError(
            f"attention_mask is of shape {tuple(mask.shape)}; (rows, earlier and new tokens), at least {count} "
            "columns, or (rows, 1, new, earlier and new) is needed."
        )
    return positions_behind(cache, mask.bool(), count)
