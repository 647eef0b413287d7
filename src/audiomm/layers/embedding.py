"""Tables of embeddings and positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..base.errors import InputError, ShapeError

_WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def empty_embedding(rows: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """A table without initial values, which its model gives it.

    nn.Embedding draws its own, and on the meta device that imports a second of torch's machinery for nothing.
    """
    return nn.Embedding(rows, width, padding_idx, _weight=torch.empty(rows, width))


class ScaledEmbedding(nn.Embedding):
    """A table whose rows are multiplied by a number that is first rounded to the type of the weights.

    Gemma was trained with its sqrt(width) rounded to bfloat16: 45.25 where 45.2548 is meant.
    """

    def __init__(self, rows: int, width: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(rows, width, padding_idx, _weight=torch.empty(rows, width))
        self.scales = rounded_scales(scale)

    @classmethod
    def of(cls, table: nn.Embedding, scale: float) -> ScaledEmbedding:
        """A scaled table that shares the weight of a plain one."""
        with torch.device("meta"):
            scaled = ScaledEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, scale)
        scaled.weight = table.weight
        return scaled

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        return super().forward(ids) * self.scales[self.weight.dtype]


def rounded_scales(scale: float) -> dict[torch.dtype, float]:
    """`scale` as each floating-point type of weights can hold it."""
    value = torch.tensor(scale, dtype=torch.float64, device="cpu")
    return {dtype: value.to(dtype).item() for dtype in _WEIGHT_TYPES}


def check_token_ids(
    ids: Tensor, rows: int, name: str = "input_ids", *, ignored: int | None = None, wait: bool = True
) -> None:
    """Refuse a prompt with ids that a table of `rows` embeddings has no row for.

    Args:
        ids: (rows, tokens).
        rows: Of the table.
        name: Of the argument.
        ignored: An id that may be there all the same.
        wait: Read ids on any device, which waits for it; but no single tokens, as that would hold up every step.
            False reads all that is on the CPU, and nothing else.

    Raises:
        ShapeError: There are no tokens, or not (rows, tokens) of them.
        InputError: These are no ids, or one is not of the vocabulary.
    """
    if not isinstance(ids, Tensor):
        raise InputError(
            f"{name} is a {type(ids).__name__}: a tensor of token ids is needed, as the tokenizer gives it with "
            "return_tensors='pt'; its answer is passed as model(**answer)."
        )
    if ids.dim() != 2 or 0 in ids.shape:
        raise ShapeError(f"{name} is of shape {tuple(ids.shape)}; (rows, tokens), at least one, is needed.")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{name} is of dtype {ids.dtype}: token ids are whole numbers, of dtype torch.int64.")
    is_traced = ids.is_meta or type(ids) is not Tensor or torch.compiler.is_compiling()
    if is_traced or (ids.shape[1] == 1 if wait else ids.device.type != "cpu"):
        return
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= rows:
        raise InputError(
            f"{name} holds {low if low < 0 else high}: ids of this model are 0 to {rows - 1}. Were they made by the "
            "tokenizer of another model?"
        )


def sinusoids(length: int, channels: int, max_timescale: float = 10000.0) -> Tensor:
    """Fixed sinusoidal positions, sines in the first half of the channels and cosines in the second.

    Returns:
        (length, channels) float32.

    Source: "Attention Is All You Need", arXiv:1706.03762, laid out as in Whisper, arXiv:2212.04356.
    """
    step = math.log(max_timescale) / max(channels // 2 - 1, 1)
    inverse = torch.exp(-step * torch.arange(channels // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)
