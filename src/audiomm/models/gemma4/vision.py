"""The vision tower of Gemma 4: a transformer over patches at their places in the picture, pooled to soft tokens.

Pictures come padded to one number of patches; here the padding is taken off again, and pictures of equally many
patches are run together, so that no attention mask is needed. Weight names are the checkpoint's. Source: the "Gemma 3"
report, arXiv:2503.19786, and "NaViT", arXiv:2307.06304, for patches that keep the picture's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...base.errors import ShapeError
from ...base.modeling import PreTrainedModel
from ...base.outputs import BaseModelOutput
from ...layers.attention import attend, attend_eager
from ...layers.clipped_linear import ClippedLinear
from ...layers.gated_mlp import GatedMLP
from ...layers.norm import RMSNorm
from ...layers.regions import recorder
from ...layers.rotary import apply_rotary, rotary_frequencies, rotary_tables
from .config import Gemma4VisionConfig

Tables = tuple[Tensor, Tensor]


class Gemma4VisionPatchEmbedder(nn.Module):
    """Patches to hidden states: a linear map, and a learned vector for the column and one for the row."""

    def __init__(self, config: Gemma4VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.ones(2, config.position_embedding_size, config.hidden_size))

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Pixels (pictures, patches, 3 * patch_size^2) in [0, 1], positions (pictures, patches, 2) as (x, y)."""
        centred = (2.0 * (pixels.to(torch.float32) - 0.5)).to(self.input_proj.weight.dtype)
        columns, rows = self.position_embedding_table
        embedded: Tensor = self.input_proj(centred)
        return embedded + (columns[positions[..., 0]] + rows[positions[..., 1]])


class Gemma4VisionAttention(nn.Module):
    """Every patch looks at every patch; the first half of a head turns with the column, the second with the row."""

    def __init__(self, config: Gemma4VisionConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        clipped = config.use_clipped_linears
        self.q_proj = ClippedLinear(config.hidden_size, heads * width, clipped=clipped)
        self.k_proj = ClippedLinear(config.hidden_size, kv_heads * width, clipped=clipped)
        self.v_proj = ClippedLinear(config.hidden_size, kv_heads * width, clipped=clipped)
        self.o_proj = ClippedLinear(heads * width, config.hidden_size, clipped=clipped)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)
        self.v_norm = RMSNorm(width, config.rms_norm_eps, scaled=False)

    def forward(self, hidden: Tensor, across: Tables, down: Tables, want_weights: bool) -> tuple[Tensor, Tensor | None]:
        """(pictures, patches, width) -> the same, and the attention weights if they are wanted."""
        shape = (*hidden.shape[:2], -1, self.config.head_dim)
        queries = _turned(self.q_norm(self.q_proj(hidden).view(shape)), across, down)
        keys = _turned(self.k_norm(self.k_proj(hidden).view(shape)), across, down)
        values = self.v_norm(self.v_proj(hidden).view(shape)).transpose(1, 2)
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if want_weights or self.config.attn_implementation == "eager":
            seen, weights = attend_eager(queries, keys, values, scale=1.0, dropout=dropout)
        else:
            seen = attend(queries, keys, values, scale=1.0, dropout=dropout)
        output: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return output, weights


def _turned(heads: Tensor, across: Tables, down: Tables) -> Tensor:
    """(pictures, patches, heads, head_dim) -> (pictures, heads, patches, head_dim), each half turned by its axis."""
    first, second = heads.transpose(1, 2).chunk(2, dim=-1)
    return torch.cat((apply_rotary(first, across), apply_rotary(second, down)), dim=-1)


class Gemma4VisionMLP(GatedMLP):
    """The gated feed-forward block on clipped linear maps."""

    def __init__(self, config: Gemma4VisionConfig) -> None:
        nn.Module.__init__(self)  # not GatedMLP's: its maps are plain ones
        width, hidden, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(width, hidden, clipped=clipped)
        self.up_proj = ClippedLinear(width, hidden, clipped=clipped)
        self.down_proj = ClippedLinear(hidden, width, clipped=clipped)


class Gemma4VisionEncoderLayer(nn.Module):
    """Attention and feed-forward block, each between two norms."""

    def __init__(self, config: Gemma4VisionConfig) -> None:
        super().__init__()
        self.self_attn = Gemma4VisionAttention(config)
        self.mlp = Gemma4VisionMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, across: Tables, down: Tables, want_weights: bool) -> tuple[Tensor, Tensor | None]:
        """(pictures, patches, width) -> the same, and the attention weights if they are wanted."""
        seen, weights = self.self_attn(self.input_layernorm(hidden), across, down, want_weights)
        hidden = hidden + self.post_attention_layernorm(seen)
        changed = self.mlp(self.pre_feedforward_layernorm(hidden))
        return hidden + self.post_feedforward_layernorm(changed), weights


class Gemma4VisionEncoder(nn.Module):
    """The stack of layers over pictures without padding."""

    def __init__(self, config: Gemma4VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Gemma4VisionEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        #: (head_dim / 4,) float32 angles a place, where they were needed last.
        self._frequencies: Tensor | None = None

    def frequencies(self, device: torch.device) -> Tensor:
        """(head_dim / 4,) float32 angles a place."""
        if self._frequencies is None or self._frequencies.device != device:
            rotary: dict[str, Any] = self.config.rope_parameters or {}
            self._frequencies = rotary_frequencies(self.config.head_dim // 2, rotary["rope_theta"]).to(device)
        return self._frequencies

    def forward(
        self, hidden: Tensor, positions: Tensor, want_weights: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What comes out, what went into each layer, and the attention weights if they are wanted."""
        frequencies = self.frequencies(positions.device)
        across = rotary_tables(positions[..., 0], frequencies, hidden.dtype)
        down = rotary_tables(positions[..., 1], frequencies, hidden.dtype)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        for layer in self.layers:
            states.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden, seen = checkpoint(layer, hidden, across, down, want_weights, use_reentrant=False)
            else:
                hidden, seen = layer(hidden, across, down, want_weights)
            if want_weights:
                weights.append(seen)
        return hidden, states, weights


class Gemma4VisionModel(PreTrainedModel):
    """The vision tower: patches of pictures, or of frames, to soft tokens."""

    config_class = Gemma4VisionConfig
    base_model_prefix: ClassVar[str] = "model.vision_tower"
    main_input_name: ClassVar[str] = "pixel_values"
    ignored_weights: ClassVar[tuple[str, ...]] = (r"model\.", r"lm_head\.")
    no_split_modules: ClassVar[tuple[str, ...]] = ("Gemma4VisionPatchEmbedder", "Gemma4VisionEncoderLayer")
    config: Gemma4VisionConfig
    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: Gemma4VisionConfig) -> None:
        super().__init__(config)
        self.patch_embedder = Gemma4VisionPatchEmbedder(config)
        self.encoder = Gemma4VisionEncoder(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        if isinstance(module, ClippedLinear):
            module.open_bounds()
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=self.config.initializer_range)
        elif isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        elif isinstance(module, Gemma4VisionPatchEmbedder):
            module.position_embedding_table.fill_(1.0)
        elif isinstance(module, Gemma4VisionModel) and self.config.standardize:
            module.std_bias.zero_()
            module.std_scale.fill_(1.0)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_position_ids: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Soft tokens of a batch of pictures.

        Args:
            pixel_values: (pictures, patches, 3 * patch_size^2) in [0, 1], as Gemma4ImageProcessor makes it.
            pixel_position_ids: int64 (pictures, patches, 2), (x, y) of each patch, -1 for padding. The places of a
                picture are all of a grid, in any order, and its sides are multiples of `pooling_kernel_size`.
            output_attentions: Also the attention weights of each layer.
            output_hidden_states: Also what went into each layer.
            return_dict: False returns a tuple.

        Returns:
            last_hidden_state (soft tokens of all pictures, width): those of the first picture, row by row, then those
            of the second, and so on. hidden_states and attentions have zeros where a picture has fewer patches than
            the largest one; the last of the hidden states is last_hidden_state.

        Raises:
            ShapeError: The shapes do not fit, or the places of a picture are no grid.
        """
        self._check(pixel_values, pixel_position_ids)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_weights = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        order, grids = _grids(pixel_position_ids, self.config.pooling_kernel_size)
        soft: list[Tensor] = [pixel_values] * len(grids)
        parts: list[tuple[list[int], list[Tensor], list[Tensor]]] = []
        for patches in dict.fromkeys(rows * columns for rows, columns in grids):
            chosen = [index for index, (rows, columns) in enumerate(grids) if rows * columns == patches]
            places = torch.tensor(chosen, device=order.device)[:, None], order[chosen, :patches]
            positions = pixel_position_ids[places]
            record = None if want_states or want_weights else recorder()
            if record is None:
                hidden, states, weights = self._encoded(pixel_values[places], positions, want_weights)
            else:
                states, weights = [], []
                given = pixel_values[places], positions
                (hidden,) = record(self, "encoder", lambda *given: self._encoded(*given)[:1], *given)
            parts.append((chosen, states if want_states else [], weights))
            for index, picture in zip(chosen, hidden, strict=True):
                soft[index] = self._pooled(picture, *grids[index])
        together = torch.cat(soft)
        output = BaseModelOutput(
            last_hidden_state=together,
            hidden_states=(*_padded([part[:2] for part in parts]), together) if want_states else None,
            attentions=_padded([(part[0], part[2]) for part in parts]) if want_weights else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _encoded(
        self, pixels: Tensor, positions: Tensor, want_weights: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Pictures of as many patches each; see `Gemma4VisionEncoder`."""
        made: tuple[Tensor, list[Tensor], list[Tensor]] = self.encoder(
            self.patch_embedder(pixels, positions), positions, want_weights
        )
        return made

    def _pooled(self, picture: Tensor, rows: int, columns: int) -> Tensor:
        """(patches, width) -> (soft tokens, width): averages of squares of patches, scaled, in float32 inside."""
        side = self.config.pooling_kernel_size
        grid = picture.to(torch.float32).view(rows // side, side, columns // side, side, -1)
        pooled = grid.mean(dim=(1, 3)).flatten(0, 1) * self.config.hidden_size**0.5
        if self.config.standardize:
            pooled = (pooled - self.std_bias.to(pooled)) * self.std_scale.to(pooled)
        if picture.dtype == torch.float16:
            # A few soft tokens leave float16's range; the norm behind the tower makes their size meaningless.
            pooled = pooled.clamp(-65504.0, 65504.0)
        return pooled.to(picture.dtype)

    def _check(self, pixels: Tensor, positions: Tensor) -> None:
        width = 3 * self.config.patch_size**2
        if pixels.dim() != 3 or pixels.shape[-1] != width or 0 in pixels.shape[:2]:
            raise ShapeError(
                f"pixel_values is of shape {tuple(pixels.shape)}; (pictures, patches, {width}) is needed. "
                "Gemma4ImageProcessor makes it."
            )
        if tuple(positions.shape) != (*pixels.shape[:2], 2):
            raise ShapeError(
                f"pixel_position_ids is of shape {tuple(positions.shape)}; {(*pixels.shape[:2], 2)}, a place for every "
                "patch, is needed."
            )
        limit = self.config.position_embedding_size
        if int(positions.max()) >= limit:
            raise ShapeError(f"pixel_position_ids goes up to {int(positions.max())}; places below {limit} are known.")


def _grids(positions: Tensor, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The order that puts each picture's patches row by row with the padding last, and each picture's grid.

    Args:
        positions: int64 (pictures, patches, 2), (x, y), -1 for padding.
        side: Both sides of a grid must be multiples of this.

    Returns:
        (pictures, patches) indices, and (rows, columns) of each picture.

    Raises:
        ShapeError: The places of a picture are not those of a grid, each once, or a side is no such multiple.
    """
    real = (positions >= 0).all(dim=-1)
    columns, rows = (positions.amax(dim=1) + 1).unbind(dim=-1)
    places = positions[..., 1] * columns[:, None] + positions[..., 0]
    sorted_places, order = places.masked_fill(~real, torch.iinfo(places.dtype).max).sort(dim=1, stable=True)
    expected = torch.arange(positions.shape[1], device=positions.device)
    count = real.sum(dim=1)
    whole = (count == rows * columns) & ((sorted_places == expected) | (expected >= count[:, None])).all(dim=1)
    fits = whole & (count > 0) & (rows % side == 0) & (columns % side == 0)
    if not bool(fits.all()):
        picture = int((~fits).nonzero()[0])
        raise ShapeError(
            f"pixel_position_ids of picture {picture} has {int(count[picture])} places up to (x, y) = "
            f"({int(columns[picture]) - 1}, {int(rows[picture]) - 1}); every place of a grid once, both sides "
            f"multiples of {side}, and -1 for padding, are needed."
        )
    return order, list(zip(rows.tolist(), columns.tolist(), strict=True))


def _padded(parts: Sequence[tuple[list[int], list[Tensor]]]) -> tuple[Tensor, ...]:
    """One tensor a layer from groups of pictures, zeros where a picture is smaller than the largest.

    Args:
        parts: For each group its pictures' indices, and a tensor a layer, (pictures, patches, width) or (pictures,
            heads, patches, patches).
    """
    longest = max(tensors[0].shape[-2] for _, tensors in parts)
    count = sum(len(chosen) for chosen, _ in parts)
    layers = []
    for tensors in zip(*(tensors for _, tensors in parts), strict=True):
        first = tensors[0]
        last = longest if first.dim() == 4 else first.shape[-1]
        whole = first.new_zeros(count, *first.shape[1:-2], longest, last)
        for (chosen, _), tensor in zip(parts, tensors, strict=True):
            missing = (0, last - tensor.shape[-1], 0, longest - tensor.shape[-2])
            whole[chosen] = functional.pad(tensor, missing)
        layers.append(whole)
    return tuple(layers)
