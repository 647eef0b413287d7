"""Every road through the experts gives what the plain loop gives, for any routing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiomm.layers import experts as module
from audiomm.layers.experts import Experts, Router

COUNT, WIDTH, INNER, ACTIVE = 6, 16, 8, 2

needs_grouped_products = pytest.mark.skipif(
    not hasattr(module.functional, "grouped_mm"), reason="torch has grouped products from 2.10 on"
)


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    block = Experts(COUNT, WIDTH, INNER)
    with torch.no_grad():
        block.gate_up_proj.normal_(std=0.5)
        block.down_proj.normal_(std=0.5)
    return block


def routing(kind: str, tokens: int):
    generator = torch.Generator().manual_seed(tokens)
    if kind == "random":
        chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:ACTIVE] for _ in range(tokens)])
    elif kind == "some empty":
        chosen = torch.stack([torch.tensor([4, 1])[torch.randperm(2, generator=generator)] for _ in range(tokens)])
    elif kind == "all to one pair":
        chosen = torch.tensor([[5, 0]]).expand(tokens, 2)
    else:
        chosen = torch.full((tokens, 1), 3)
    return torch.rand(chosen.shape, generator=generator), chosen


@pytest.mark.parametrize("kind", ["random", "some empty", "all to one pair", "all to one"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 37])
def test_grouped_and_gathered_products_equal_the_loop(experts, kind, tokens):
    weights, chosen = routing(kind, tokens)
    hidden = torch.randn(tokens, WIDTH)
    wanted = experts.looped(hidden, weights, chosen)
    assert wanted.abs().max() > 0.1
    roads = [experts.forward, experts._gathered]
    if hasattr(module.functional, "grouped_mm"):
        roads.append(experts._grouped)
    for road in roads:
        assert torch.allclose(road(hidden, weights, chosen), wanted, atol=1e-5)


def test_low_precision_stays_close(experts):
    weights, chosen = routing("random", 33)
    hidden = torch.randn(33, WIDTH)
    wanted = experts.looped(hidden, weights, chosen)
    low = Experts(COUNT, WIDTH, INNER).to(torch.bfloat16)
    low.load_state_dict(experts.state_dict())
    found = low(hidden.bfloat16(), weights, chosen)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_gradients_equal_those_of_the_loop(experts):
    weights, chosen = routing("random", 20)
    hidden = torch.randn(20, WIDTH)
    grads = []
    for road in (experts.forward, experts.looped):
        experts.zero_grad()
        road(hidden, weights, chosen).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in experts.parameters()])
    for found, wanted in zip(*grads, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


@needs_grouped_products
def test_without_grouped_products_the_loop_serves(experts, monkeypatch):
    weights, chosen = routing("random", 9)
    hidden = torch.randn(9, WIDTH)
    wanted = experts(hidden, weights, chosen)
    monkeypatch.delattr(module.functional, "grouped_mm")
    assert torch.allclose(experts(hidden, weights, chosen), wanted, atol=1e-5)


@needs_grouped_products
def test_nothing_on_the_fast_roads_waits_for_the_device(experts, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the host was asked to wait")

    for name in ("nonzero", "item", "tolist", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for tokens in (1, 9):
        weights, chosen = torch.rand(tokens, ACTIVE), torch.arange(tokens * ACTIVE).view(tokens, ACTIVE) % COUNT
        experts(torch.randn(tokens, WIDTH), weights, chosen)


@needs_grouped_products
@pytest.mark.parametrize(("tokens", "budget"), [(1, 10), (4, 12)])
def test_experts_that_are_read_in_place_cost_few_launches(experts, launches, tokens, budget):
    weights, chosen = routing("random", tokens)
    hidden = torch.randn(tokens, WIDTH)
    with torch.no_grad(), launches.Launches() as count:
        experts._grouped(hidden, weights, chosen)
    assert count.waits == []
    assert count.total <= budget, dict(count.names)


def test_a_router_weighs_the_best_experts_by_their_share_and_scale():
    torch.manual_seed(1)
    router = Router(WIDTH, COUNT, ACTIVE, 1e-6)
    with torch.no_grad():
        router.proj.weight.normal_()
        router.scale.uniform_(0.5, 2)
        router.per_expert_scale.uniform_(0.5, 2)
    hidden = torch.randn(7, WIDTH)
    probabilities, weights, chosen = router(hidden)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scores = (normed * router.scale * WIDTH**-0.5) @ router.proj.weight.T
    assert torch.allclose(probabilities, scores.softmax(-1), atol=1e-6)
    for row in range(7):
        best = probabilities[row].argsort(descending=True)[:ACTIVE]
        assert chosen[row].tolist() == best.tolist()
        share = probabilities[row, best] / probabilities[row, best].sum()
        assert torch.allclose(weights[row], share * router.per_expert_scale[best], atol=1e-6)
    assert router.to(torch.bfloat16)(hidden.bfloat16())[0].dtype == torch.float32


class BytesMade(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in before:
                self.total += one.untyped_storage().nbytes()
        return result


def test_a_decode_step_takes_no_more_memory_with_more_experts():
    made = []
    for count in (8, 64):
        block = Experts(count, 64, 32)
        weights, chosen = torch.rand(1, 2), torch.tensor([[3, 5]])
        with torch.no_grad(), BytesMade() as memory:
            block(torch.randn(1, 64), weights, chosen)
        made.append(memory.total)
    assert made[0] == made[1]
    assert made[1] < 64 * 3 * 64 * 32 * 4 / 4  # far below the weights of all experts
