"""Gemma 3n's text decoder: token and per-layer embeddings, the stack of layers, and the sharing of keys and values.

Argument and output names are those of transformers. Source: the model card of Gemma 3n; see `blocks` for the papers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...base.errors import ConfigError, InputError, ShapeError
from ...base.hub import Source
from ...base.modeling import PreTrainedModel
from ...base.outputs import DecoderOutput
from ...layers.cache import Cache, LayerSpec, PassThrough, Slots
from ...layers.continued import positions_behind
from ...layers.embedding import ScaledEmbedding, check_token_ids
from ...layers.masks import Mask, layer_masks, packed_masks, ready_masks
from ...layers.norm import RMSNorm
from ...layers.per_layer import PLACEMENTS, PerLayerInputs, PerLayerTable
from ...layers.quantized import Int8Linear
from ...layers.regions import is_inside
from ...layers.rotary import rotary_frequencies, rotary_tables
from .blocks import Gemma3nTextAltUp, Gemma3nTextDecoderLayer, Pair, Tables
from .config import Gemma3nConfig, Gemma3nTextConfig
from .weights import NOT_TEXT, TEXT_NAMES, UNUSED

logger = logging.getLogger("audiomm.models.gemma3n")

#: Smallest mean square that a stream is brought to the size of the first one from.
SMALLEST_SQUARE = 1e-5


@dataclass(frozen=True)
class View:
    """What the layers are told besides the states; masks and rotary tables go by the layer's window.

    Attributes:
        masks: Who sees whom.
        tables: Cosines and sines of the new tokens.
        per_layer: (rows, new, layers, small width) embeddings of the layers' own.
    """

    masks: dict[int | None, Mask]
    tables: dict[int | None, Tables]
    per_layer: Tensor


class Gemma3nPreTrainedModel(PreTrainedModel):
    """What all Gemma 3n models share.

    `from_pretrained` takes two more arguments. `per_layer_embeddings` says where the table of per-layer embeddings,
    half of E2B's weights, is kept: "device" (beside the model), "cpu" (in the computer's memory) or "disk" (mapped, so
    that only rows of tokens that occur are read); away from the device it is not trained. `modalities` names what
    the model is to take in, ("text", "audio") for one without the tower of pictures, whose weights are not read.
    """

    base_model_prefix: ClassVar[str] = "model"
    no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma3nTextDecoderLayer",)
    quantized_linear: ClassVar[Any] = Int8Linear
    float_linears: ClassVar[tuple[str, ...]] = (r"modality_router$", r"per_layer_model_projection$")
    ignored_weights: ClassVar[tuple[str, ...]] = UNUSED

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.weight.normal_(std=deviation)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=deviation)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        elif isinstance(module, Gemma3nTextAltUp):
            module.correct_output_scale.zero_()

    @classmethod
    def _load_config(
        cls, source: Source, config: Any, attn_implementation: str | None, overrides: dict[str, Any]
    ) -> Any:
        placement, modalities = overrides.pop("per_layer_embeddings", None), overrides.pop("modalities", None)
        config = super()._load_config(source, config, attn_implementation, overrides)
        if placement is not None:
            if placement not in PLACEMENTS:
                raise ConfigError(f"per_layer_embeddings={placement!r}: accepted are {', '.join(PLACEMENTS)}.")
            config.get_text_config().per_layer_embeddings = placement
        if modalities is not None:
            if not isinstance(config, Gemma3nConfig):
                raise ConfigError(f"modalities={modalities!r}: {cls.__name__} takes text only; leave it out.")
            config.restrict(modalities)
        return config


class Gemma3nTextModel(PerLayerInputs, Gemma3nPreTrainedModel):
    """The decoder without a head."""

    config_class = Gemma3nTextConfig
    config: Gemma3nTextConfig
    ignored_weights: ClassVar[tuple[str, ...]] = (*UNUSED, *NOT_TEXT, r"lm_head\.")
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = TEXT_NAMES

    def __init__(self, config: Gemma3nTextConfig) -> None:
        super().__init__(config)
        width, layers = config.hidden_size, config.num_hidden_layers
        padding = config.pad_token_id
        padding = padding if padding is not None and padding < config.vocab_size else None
        self.embed_tokens = ScaledEmbedding(config.vocab_size, width, padding, scale=width**0.5)
        self.layers = nn.ModuleList([Gemma3nTextDecoderLayer(config, index) for index in range(layers)])
        self.norm = RMSNorm(width, config.rms_norm_eps)
        rows = config.vocab_size_per_layer_input
        table = PerLayerTable(
            rows,
            layers,
            config.hidden_size_per_layer_input,
            padding if padding is not None and padding < rows else None,
            getattr(config, "per_layer_embeddings", "device"),
        )
        self.add_per_layer_modules(table, width, config.rms_norm_eps)
        others = range(1, config.altup_num_inputs)
        self.altup_projections = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in others])
        self.altup_unembed_projections = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in others])
        #: The kind of layers, by their window.
        self._kinds = {config.window(layer): kind for layer, kind in enumerate(config.layer_types)}
        # Not buffers: these would be cast with the model, and a position's angle needs all of float32.
        self._frequencies: dict[torch.device, dict[int | None, Tensor]] = {}
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if not isinstance(value, ScaledEmbedding):
            value = ScaledEmbedding.of(value, self.config.hidden_size**0.5)
        self.embed_tokens = value

    def cache_specs(self) -> list[LayerSpec]:
        """What each layer that has keys and values of its own keeps while generating."""
        config = self.config
        heads, width = config.num_key_value_heads, config.head_dim
        return [LayerSpec(heads, width, window=config.window(layer)) for layer in range(config.first_shared_layer)]

    def make_cache(self, batch: int, *, max_length: int | None = None, fixed: bool = False) -> Cache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""
        length = max_length or self.config.max_position_embeddings
        return Cache(self.cache_specs(), rows=batch, length=length, fixed=fixed, device=self.device, dtype=self.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        last_positions: int | Tensor = 0,
    ) -> DecoderOutput | tuple[Any, ...]:
        """Decode tokens that follow those in the cache.

        Args:
            input_ids: (rows, new) token ids; or inputs_embeds (rows, new, hidden_size).
            per_layer_inputs: (rows, new, layers, hidden_size_per_layer_input) from `get_per_layer_inputs`, to go with
                inputs_embeds; without it the layers get only what can be told from the embeddings.
            attention_mask: (rows, past + new), 0 for padding; or (rows, 1, new, past + new), True or 0.0 where a token
                is seen; or a dict of such, by kind of layer.
            position_ids: (rows, new); follows from the mask and the cache when None. Where they begin anew in a row,
                and there is neither mask nor cache, a sequence begins that sees nothing of those before.
            past_key_values: What an earlier call returned, or `make_cache`.
            use_cache: Keep keys and values for a next call; config.use_cache when None.
            last_positions: How many of the last positions the caller will read, 0 for all, or the columns (kept,) that
                it will. The layers that share keys and values then leave the others out, which changes nothing of
                what is read.

        Returns:
            last_hidden_state (rows, new or what will be read, hidden_size); hidden_states are of shape (streams, rows,
            new, hidden_size).

        Raises:
            ShapeError: Both or none of input_ids and inputs_embeds, or per_layer_inputs beside input_ids.
            InputError: past_key_values is no cache.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        embeds, per_layer = self._embed(input_ids, inputs_embeds, per_layer_inputs)
        cache = self._cache(past_key_values, config.use_cache if use_cache is None else use_cache)
        rows, count = embeds.shape[:2]
        if attention_mask is None and position_ids is not None and isinstance(cache, PassThrough):
            attention_mask = packed_masks(position_ids, self._kinds)
        slots = cache.reserve(count, _positions(attention_mask, count, cache), rows, embeds.device)
        tables = self._tables(position_ids, slots, count, embeds)
        if isinstance(last_positions, int):
            read: slice | Tensor = slice(-last_positions, None)
            is_whole = not 0 < last_positions < count
        else:
            read, is_whole = last_positions, not len(last_positions)
        kept = None if is_whole or output_hidden_states or output_attentions else read
        views = [View(self._masks(attention_mask, count, slots), tables, per_layer)]
        if kept is not None:
            late = {window: (c[:, :, kept], s[:, :, kept]) for window, (c, s) in tables.items()}
            views.append(View(self._masks(attention_mask, count, slots, kept), late, per_layer[:, kept]))
        states, collected, weights = self._run(
            self._spread(embeds), views, cache, kept, output_attentions, output_hidden_states
        )
        output = DecoderOutput(
            last_hidden_state=self._gather(states if kept is not None else states[:, read]),
            past_key_values=cache if isinstance(cache, Cache) else None,
            hidden_states=tuple(collected) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _run(
        self,
        states: Tensor,
        views: list[View],
        cache: Cache | PassThrough,
        kept: slice | Tensor | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """All layers: the states after the last, those before each and after the last, and the attention weights.

        `views` holds what the layers that make keys and values are told, and, with `kept`, what the others are, which
        then run on these columns only.
        """
        config, view = self.config, views[0]
        collected: list[Tensor] = []
        weights: list[Tensor] = []
        pairs: dict[int, Pair] = {}
        for index, layer in enumerate(self.layers):
            source, window = config.kv_source(index), config.window(index)
            if kept is not None and index == config.first_shared_layer:
                view, states = views[1], states[:, kept]
            if output_hidden_states:
                collected.append(states.permute(2, 0, 1, 3))
            own = view.per_layer[:, :, index]
            arguments = (own, view.tables[window], view.masks[window], cache, pairs.get(source), output_attentions)
            # The pair goes through checkpointing as an argument and a result, so that its gradient is whole.
            if self.gradient_checkpointing and self.training:
                states, weight, pair = checkpoint(layer, states, *arguments, use_reentrant=False)
            else:
                states, weight, pair = layer(states, *arguments)
            if source == index:
                pairs[index] = pair
            if weight is not None:
                weights.append(weight)
        if output_hidden_states:
            collected.append(states.permute(2, 0, 1, 3))
        return states, collected, weights

    # ------------------------------------------------------------------ ends of the stack

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, per_layer_inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("the decoder needs either input_ids or inputs_embeds: pass exactly one of the two.")
        if input_ids is not None:
            if per_layer_inputs is not None:
                raise ShapeError("per_layer_inputs follow from input_ids: pass them with inputs_embeds only.")
            check_token_ids(input_ids, self.embed_tokens.num_embeddings)
            embeds = self.embed_tokens(input_ids)
            per_layer_inputs = self.get_per_layer_inputs(input_ids)
        else:
            assert inputs_embeds is not None, "one of the two was passed"
            embeds = inputs_embeds
        return embeds, self.project_per_layer_inputs(embeds, per_layer_inputs)

    def _spread(self, embeds: Tensor) -> Tensor:
        """(rows, length, width) -> (rows, length, streams, width), all of the size of the first."""
        size = _size(embeds)
        others = [_resized(projection(embeds), size) for projection in self.altup_projections]
        return torch.stack((embeds, *others), dim=2)

    def _gather(self, states: Tensor) -> Tensor:
        """(rows, length, streams, width) -> (rows, length, width): the normed mean of the streams."""
        size = _size(states[:, :, 0])
        others = [
            _resized(projection(states[:, :, index]), size)
            for index, projection in enumerate(self.altup_unembed_projections, start=1)
        ]
        normed: Tensor = self.norm(torch.stack((states[:, :, 0], *others)).mean(dim=0))
        return normed

    # ------------------------------------------------------------------ what attention is told

    def _cache(self, past: Any, use_cache: bool) -> Cache | PassThrough:
        if isinstance(past, Cache):
            return past
        if past is not None:
            raise InputError(
                f"past_key_values is a {type(past).__name__}: pass what an earlier call returned, or make_cache()."
            )
        # Recomputing a layer in the backward pass would store its keys twice.
        wanted = use_cache and not (self.gradient_checkpointing and self.training)
        return Cache(self.cache_specs()) if wanted else PassThrough()

    def _masks(
        self, attention_mask: Any, count: int, slots: Slots, kept: slice | Tensor | None = None
    ) -> dict[int | None, Mask]:
        """The mask of each kind of layer, by its window; of the queries in some columns, or of all."""
        ready: dict[int | None, Mask] = {**ready_masks(attention_mask, self._kinds, kept)}
        return ready | layer_masks(count, slots, self._kinds.keys() - ready.keys(), kept=kept)

    def _tables(
        self, position_ids: Tensor | None, slots: Slots, count: int, embeds: Tensor
    ) -> dict[int | None, Tables]:
        device = embeds.device
        if position_ids is None:
            position_ids = slots.queries
        if position_ids is None:
            position_ids = torch.arange(slots.past, slots.past + count, device=device)[None]
        positions = position_ids.clamp(min=0)
        return {
            window: rotary_tables(positions, frequencies, embeds.dtype)
            for window, frequencies in self.frequencies(device).items()
        }

    def frequencies(self, device: torch.device) -> dict[int | None, Tensor]:
        """Angles a position, (head_dim / 2,) float32, for each kind of layers, by its window."""
        if device not in self._frequencies:
            self._frequencies[device] = self._rotary(device)
        return self._frequencies[device]

    def _rotary(self, device: torch.device) -> dict[int | None, Tensor]:
        found = {}
        for window, kind in self._kinds.items():
            entry = self.config.rope_parameters[kind]
            factor = entry["factor"] if entry["rope_type"] == "linear" else 1.0
            frequencies = rotary_frequencies(self.config.head_dim, entry["rope_theta"], factor=factor)
            found[window] = frequencies.to(device)
        return found


def _size(hidden: Tensor) -> Tensor:
    """Root mean square over the last dimension, float32."""
    return hidden.float().square().mean(dim=-1, keepdim=True).sqrt()


def _resized(hidden: Tensor, size: Tensor) -> Tensor:
    """`hidden` (..., width) brought to root mean square `size` (..., 1), of its own dtype."""
    values = hidden.float()
    square = values.square().mean(dim=-1, keepdim=True).clamp(min=SMALLEST_SQUARE)
    return (values * size * square.rsqrt()).to(hidden.dtype)


def _positions(mask: Any, count: int, cache: Cache | PassThrough) -> Tensor | None:
    """(rows, count) positions of the newest tokens of a padding mask (rows, total), -1 where it is 0.

    Args:
        cache: What holds the tokens before them; it forgets those that the mask hides.

    Raises:
        ShapeError: The mask has another number of dimensions than two or four.
    """
    if mask is None or isinstance(mask, dict) or mask.dim() == 4:
        return None
    if mask.dim() != 2 or mask.shape[1] < count:
        raise ShapeError(
            f"attention_mask is of shape {tuple(mask.shape)} for {count} new tokens; (rows, past + new tokens) or "
            "(rows, 1, new, past + new) is needed."
        )
    real = mask.bool()
    if count > 1 and not (torch.compiler.is_compiling() or is_inside()) and bool(real.all()):
        return None  # nothing is padded, so the fast kernels will do
    return positions_behind(cache, real, count)
