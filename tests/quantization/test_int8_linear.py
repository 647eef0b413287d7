"""Int8Linear: how far it is from the map it was made of, and what a row owes to the rows beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from audiomm.layers.quantized import Int8Linear, quantise_weight


def pair(width: int = 96, out: int = 80, bias: bool = True) -> tuple[nn.Linear, Int8Linear]:
    linear = nn.Linear(width, out, bias=bias)
    return linear, Int8Linear(*quantise_weight(linear.weight.detach()), linear.bias.detach() if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_within_one_and_a_half_percent_of_the_exact_ones(bias: bool, dtype: torch.dtype) -> None:
    linear, rounded = pair(bias=bias)
    hidden = torch.randn(3, 7, 96)
    wanted, made = linear(hidden), rounded.to(dtype)(hidden.to(dtype))
    assert made.dtype == dtype
    assert (made.float() - wanted).norm() / wanted.norm() < 0.015


def test_a_row_comes_out_the_same_bits_in_any_batch_and_beside_any_row() -> None:
    _, rounded = pair()
    hidden = torch.randn(33, 96)
    loud = hidden.clone()
    loud[1::2] *= 1e4
    together, beside_loud = rounded(hidden), rounded(loud)
    alone = torch.cat([rounded(row[None]) for row in hidden])
    assert torch.equal(together, alone)
    assert torch.equal(beside_loud[0::2], alone[0::2])


def test_rows_large_and_small_are_rounded_by_scales_of_their_own() -> None:
    linear, rounded = pair(bias=False)
    hidden = torch.randn(2, 96) * torch.tensor([[1e-3], [1e3]])
    wanted, made = linear(hidden), rounded(hidden)
    assert ((made - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 0.02


def test_a_row_of_zeros_gives_the_bias_and_weights_of_zero_give_zero() -> None:
    linear, _ = pair()
    with torch.no_grad():
        linear.weight[3] = 0.0
    rounded = Int8Linear(*quantise_weight(linear.weight.detach()), linear.bias.detach())
    assert torch.equal(rounded(torch.zeros(2, 96)), linear.bias.detach().expand(2, -1))
    assert torch.equal(rounded(torch.randn(4, 96))[:, 3], linear.bias.detach()[3].expand(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_do_not_become_numbers(bad: float) -> None:
    _, rounded = pair()
    hidden = torch.randn(3, 96)
    clean = rounded(hidden)
    hidden[1, 5] = bad
    made = rounded(hidden)
    assert made[1].isnan().all()
    assert torch.equal(made[[0, 2]], clean[[0, 2]])


def test_weights_are_rounded_in_pieces_as_they_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 8, dtype=torch.bfloat16)
    whole = quantise_weight(weight)
    monkeypatch.setattr("audiomm.layers.quantized._PIECE", 7)
    pieces = quantise_weight(weight)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def test_casting_the_model_keeps_the_scales_exact() -> None:
    _, rounded = pair()
    cast = copy.deepcopy(rounded).bfloat16()
    assert cast.weight.dtype == torch.int8
    assert torch.equal(cast.scale, rounded.scale)
    assert cast.bias is not None
    assert cast.bias.dtype == torch.bfloat16
