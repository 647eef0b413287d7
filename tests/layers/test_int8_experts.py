"""Experts in 8 bits: near the exact ones, and no token sees the tokens beside it."""

from __future__ import annotations

import copy

import pytest
import torch

from audiomm.layers.experts import Experts
from audiomm.layers.int8_experts import Int8Experts

COUNT, WIDTH, INNER, ACTIVE = 6, 32, 24, 2


@pytest.fixture(scope="module")
def exact() -> Experts:
    torch.manual_seed(0)
    experts = Experts(COUNT, WIDTH, INNER).requires_grad_(False)
    # Experts of different sizes: scales of their own are needed.
    sizes = 10.0 ** torch.linspace(-2, 1, COUNT)[:, None, None]
    experts.gate_up_proj.normal_(std=0.3)
    experts.down_proj.copy_(torch.randn(COUNT, WIDTH, INNER) * sizes)
    return experts


def rounded(experts: Experts) -> Int8Experts:
    made = Int8Experts.empty_like(experts)
    made.take_gate_up_proj(experts.gate_up_proj, "cpu", torch.float32)
    made.take_down_proj(experts.down_proj, "cpu", torch.float32)
    return made


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:ACTIVE] for _ in range(tokens)])
    return torch.rand(chosen.shape, generator=generator), chosen


def difference(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((made.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)).max())


@pytest.mark.parametrize("tokens", [1, 4, 5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_within_three_percent_of_the_exact_experts(exact, tokens, dtype):
    hidden = torch.randn(tokens, WIDTH) * 10.0 ** torch.randint(-3, 4, (tokens, 1))
    wanted = exact(hidden, *routing(tokens))
    made = rounded(exact).to(dtype)(hidden.to(dtype), *routing(tokens))
    assert made.dtype == dtype
    assert 1e-4 < difference(made, wanted) < 0.03


def test_it_is_the_loop_over_weights_and_tokens_that_are_rounded_row_by_row(exact):
    made, hidden, (weights, chosen) = rounded(exact), torch.randn(9, WIDTH), routing(9)

    def near(rows):
        step = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / step).round() * step

    wanted = torch.zeros(9, WIDTH)
    for token in range(9):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, up = (near(exact.gate_up_proj[expert]) @ near(hidden[token])).chunk(2)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
            wanted[token] += weight * (near(exact.down_proj[expert]) @ near(inner))
    torch.testing.assert_close(made(hidden, weights, chosen), wanted, rtol=2e-3, atol=2e-3)


def test_a_token_comes_out_the_same_bits_alone_and_in_any_batch(exact):
    made, hidden, (weights, chosen) = rounded(exact), torch.randn(33, WIDTH), routing(33)
    together = made(hidden, weights, chosen)
    alone = torch.cat([made(*(part[row : row + 1] for part in (hidden, weights, chosen))) for row in range(33)])
    assert torch.equal(together, alone)
    order = torch.randperm(33)
    assert torch.equal(made(hidden[order], weights[order], chosen[order]), together[order])


def test_all_tokens_may_go_to_one_expert_and_tokens_of_zeros_stay_zeros(exact):
    made, chosen = rounded(exact), torch.tensor([[5, 5]] * 4)
    hidden = torch.randn(4, WIDTH)
    hidden[2] = 0
    found = made(hidden, torch.ones(4, 2), chosen)
    assert difference(found[[0, 1, 3]], exact(hidden, torch.ones(4, 2), chosen)[[0, 1, 3]]) < 0.03
    assert not found[2].any()


def test_casting_and_copying_keep_the_scales_exact(exact):
    made = rounded(exact)
    cast = copy.deepcopy(made).bfloat16()
    for name in ("gate_up_proj", "gate_up_scale", "down_proj", "down_scale"):
        assert torch.equal(getattr(cast, name), getattr(made, name))
    assert sum(buffer.nbytes for buffer in cast.buffers()) < sum(weight.nbytes for weight in exact.parameters()) / 3


def test_on_other_devices_floating_point_products_give_the_same(exact, monkeypatch):
    made, hidden = rounded(exact), torch.randn(5, WIDTH)
    wanted = made(hidden, *routing(5))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(torch, "_int_mm", None)
    torch.testing.assert_close(made(hidden, *routing(5)), wanted, rtol=1e-4, atol=1e-4)
