"""Per-layer embeddings: ids without a row, scales, places of the table, and ids told from embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from audiomm.base.errors import ConfigError, ShapeError
from audiomm.layers.embedding import ScaledEmbedding, rounded_scales
from audiomm.layers.per_layer import PerLayerInputs, PerLayerTable, find_token_ids


def filled(table: nn.Embedding) -> nn.Embedding:
    with torch.no_grad():
        table.weight.normal_()
    return table


def test_ids_without_a_row_read_row_zero():
    table = filled(PerLayerTable(10, 3, 4))
    rows = table(torch.tensor([[9, 10, 4000, -1, 0]]))
    assert rows.shape == (1, 5, 3, 4)
    assert torch.equal(rows[0, 1:], rows[0, 4:].expand(4, -1, -1))
    assert torch.equal(rows[0, 0], table.weight[9].view(3, 4) * 2.0)


def test_scales_are_rounded_to_the_type_of_the_weights():
    assert rounded_scales(2048**0.5)[torch.bfloat16] == 45.25
    table = filled(ScaledEmbedding(5, 6, None, 2048**0.5)).bfloat16()
    assert torch.equal(table(torch.tensor([3]))[0], table.weight[3] * torch.tensor(45.25, dtype=torch.bfloat16))
    with torch.device("meta"):
        assert ScaledEmbedding(2, 2, None, 2.5).scales[torch.float32] == 2.5


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_a_table_elsewhere_answers_in_the_type_it_is_asked_for(placement):
    weight = torch.randn(8, 6)
    table = PerLayerTable(8, 2, 3, placement=placement)
    table.take_weight(weight, "cpu", torch.float32)
    assert (table.weight.data_ptr() == weight.data_ptr()) == (placement == "disk")  # kept where the file is mapped
    table.half().double()
    assert table.weight.dtype == torch.float32
    rows = table(torch.tensor([[1, 7]]), torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    scale = rounded_scales(3**0.5)[torch.bfloat16]
    assert torch.equal(rows[0, 1].flatten(), weight[7].bfloat16() * scale)


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="per_layer_embeddings='moon'"):
        PerLayerTable(2, 2, 2, placement="moon")


class Part(PerLayerInputs):
    def __init__(self) -> None:
        super().__init__()
        self.add_per_layer_modules(filled(PerLayerTable(9, 3, 4)), 16, 1e-6)


def test_both_parts_are_joined_and_spare_layers_left_out():
    part = Part()
    embeds, ids = torch.randn(2, 5, 16), torch.randint(0, 9, (2, 5))
    alone = part.project_per_layer_inputs(embeds)
    projected = (part.per_layer_model_projection(embeds) * 0.25).view(2, 5, 3, 4)
    norm = projected * (projected.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.allclose(alone, norm, atol=1e-5)
    tokens = part.get_per_layer_inputs(ids)
    spare = torch.cat((tokens, torch.randn(2, 5, 2, 4)), dim=2)
    assert torch.allclose(part.project_per_layer_inputs(embeds, spare), (norm + tokens) * 0.5**0.5, atol=1e-5)
    with pytest.raises(ShapeError, match=r"shape \(2, 4, 3, 4\); \(2, 5, 3, 4\)"):
        part.project_per_layer_inputs(embeds, tokens[:, :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_are_told_from_embeddings_and_others_are_of_no_token(dtype):
    table = filled(ScaledEmbedding(300, 16, None, 4.1)).to(dtype)
    with torch.no_grad():
        table.weight[200:] = table.weight[7]  # copies: the first of them counts
    ids = torch.tensor([[5, 7, 299], [250, 0, 199]])
    embeds = table(ids)
    embeds[1, 1] += 1.0
    assert find_token_ids(embeds, table).tolist() == [[5, 7, 7], [7, -1, 199]]
