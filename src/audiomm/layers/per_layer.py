"""Per-layer embeddings (PLE) of Gemma 3n and 4: every layer reads a small vector of its own for every token.

A vector is the sum of two parts: a row of a large table, looked up by token id, and a projection of the embeddings
that enter the decoder, which know of pictures and sounds. The table is most of a small model's weights and only a few
rows of it are read a step, so it may stay in the computer's memory or on disk. Source: the model cards of Gemma 3n
and Gemma 4; the placement is that of google's mobile runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import ConfigError, ShapeError
from .embedding import ScaledEmbedding, rounded_scales
from .norm import RMSNorm, quick_norm, weight_of
from .quick import product

#: Where the table may be: beside the model, in the computer's memory, or memory-mapped in the checkpoint's file.
PLACEMENTS = ("device", "cpu", "disk")


class PerLayerTable(ScaledEmbedding):
    """The token part: one row of layers x width numbers a token id, times sqrt(width).

    Away from the model the table is read only: it is not trained, and neither moved nor cast with the model. Rows
    that are read are cast to the type the caller asks for.

    Args:
        rows: Token ids that have a row; all others read row 0.
        layers: Layers of the decoder.
        width: Numbers a layer gets.
        padding_idx: The row that is not trained.
        placement: "device", "cpu" or "disk".

    Raises:
        ConfigError: Another placement.
    """

    def __init__(
        self, rows: int, layers: int, width: int, padding_idx: int | None = None, placement: str = "device"
    ) -> None:
        if placement not in PLACEMENTS:
            raise ConfigError(f"per_layer_embeddings={placement!r}: accepted are {', '.join(PLACEMENTS)}.")
        super().__init__(rows, layers * width, padding_idx, scale=width**0.5)
        self.layers, self.width, self.placement = layers, width, placement

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(...) int64 -> (..., layers, width) on the device of `ids`."""
        known = ids.where((ids >= 0) & (ids < self.num_embeddings), 0)
        if self.placement == "device":
            rows = functional.embedding(known, self.weight, self.padding_idx)
        else:
            rows = functional.embedding(known.to(self.weight.device), self.weight).to(ids.device)
        rows = rows if dtype is None else rows.to(dtype)
        return (rows * self.scales[rows.dtype]).unflatten(-1, (self.layers, self.width))

    def take_weight(self, tensor: Tensor, device: Any, dtype: torch.dtype) -> None:
        """Keep a checkpoint's memory-mapped tensor where `placement` says; called while loading."""
        beside = self.placement == "device"
        if self.placement != "disk":
            tensor = tensor.to(device=device if beside else "cpu", dtype=dtype, copy=not beside)
        self.weight = nn.Parameter(tensor, requires_grad=beside)

    def _apply(self, fn: Any, recurse: bool = True) -> PerLayerTable:
        # What model.to(), .half() and .cuda() go through.
        if self.placement == "device" or self.weight.is_meta:
            return super()._apply(fn, recurse)
        return self


class PerLayerInputs(nn.Module):
    """What a text model with per-layer embeddings has besides: three modules with the checkpoint's names."""

    embed_tokens_per_layer: PerLayerTable
    per_layer_model_projection: nn.Linear
    per_layer_projection_norm: RMSNorm

    def add_per_layer_modules(self, table: PerLayerTable, hidden_size: int, eps: float) -> None:
        """Called in the model's __init__."""
        self.embed_tokens_per_layer = table
        self.per_layer_model_projection = nn.Linear(hidden_size, table.layers * table.width, bias=False)
        self.per_layer_projection_norm = RMSNorm(table.width, eps)
        self._projection_scale = hidden_size**-0.5
        self._half = rounded_scales(2.0**-0.5)

    def get_per_layer_inputs(self, input_ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """The token part, (rows, length, layers, width), of ids (rows, length).

        `inputs_embeds` is accepted for the sake of calls written for transformers; ids are needed all the same.
        """
        return self.embed_tokens_per_layer(input_ids, self.per_layer_model_projection.weight.dtype)

    def project_per_layer_inputs(self, inputs_embeds: Tensor, per_layer_inputs: Tensor | None = None) -> Tensor:
        """What the layers read: the token part, where it is given, joined with the projection of the embeddings.

        Args:
            inputs_embeds: (rows, length, hidden_size), pictures and sounds in their places.
            per_layer_inputs: (rows, length, layers or more, width) from `get_per_layer_inputs`.

        Returns:
            (rows, length, layers, width).

        Raises:
            ShapeError: The token part does not fit the embeddings.
        """
        table = self.embed_tokens_per_layer
        projected = self.per_layer_model_projection(inputs_embeds) * self._projection_scale
        projected = self.per_layer_projection_norm(projected.unflatten(-1, (table.layers, table.width)))
        if per_layer_inputs is None:
            return projected
        tokens = per_layer_inputs[..., : table.layers, :]
        if tokens.shape != projected.shape:
            raise ShapeError(
                f"per_layer_inputs is of shape {tuple(per_layer_inputs.shape)}; {tuple(projected.shape)} (rows, "
                "tokens, layers, width) is needed: take it from get_per_layer_inputs(input_ids)."
            )
        return (projected + tokens.to(projected)) * self._half[projected.dtype]


def quick_per_layer(inputs: PerLayerInputs, vocabulary: int) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """What the layers read in a decode step: a function of token ids (rows,) and their embeddings (rows, width).

    It gives one (rows, width of the layer's own) tensor a layer.

    Args:
        inputs: The text model.
        vocabulary: Ids are below this.
    """
    table, linear = inputs.embed_tokens_per_layer, inputs.per_layer_model_projection
    project = product(linear)
    norm, dtype = inputs.per_layer_projection_norm, linear.weight.dtype
    half, shape = inputs._half[dtype], (table.layers, table.width)
    # The projection's factor goes into the norm, where it cancels but for eps.
    scaled = quick_norm(weight_of(norm) * half, norm.eps / inputs._projection_scale**2)
    beside, rows = table.placement == "device", table.num_embeddings
    weight, factor = table.weight.detach(), table.scales[dtype] * half

    def read(ids: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        projected = scaled(project(embeddings).view(-1, *shape))
        if not beside:
            return torch.add(projected, table.forward(ids, dtype), alpha=half).unbind(1)
        known = ids if vocabulary <= rows else ids * (ids < rows)
        tokens = weight.index_select(0, known).view(projected.shape)
        return torch.add(projected, tokens, alpha=factor).unbind(1)

    return read


def find_token_ids(inputs_embeds: Tensor, table: ScaledEmbedding) -> Tensor:
    """The ids whose rows of a token table (rows, length, width) embeddings are, -1 where they are of no token.

    For callers who have embeddings only: pictures, sounds and trained prompts are of no token. The first column is
    sorted once, so that only the few rows that agree with it are compared in full.
    """
    weight = table.weight.detach()
    scale = table.scales[weight.dtype]
    firsts, order = (weight[:, 0] * scale).sort()
    wanted = inputs_embeds.detach().flatten(0, -2).to(weight)
    low = torch.searchsorted(firsts, wanted[:, 0].contiguous()).tolist()
    high = torch.searchsorted(firsts, wanted[:, 0].contiguous(), right=True).tolist()
    found = torch.full((len(wanted),), -1, dtype=torch.long, device=weight.device)
    for place, (begin, end) in enumerate(zip(low, high, strict=True)):
        candidates = order[begin:end].sort().values
        same = (weight[candidates] * scale == wanted[place]).all(dim=-1)
        if bool(same.any()):
            found[place] = candidates[same.int().argmax()]
    return found.view(inputs_embeds.shape[:-1])
