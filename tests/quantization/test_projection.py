"""Projections: linear maps joined into one product, with names, values and files as they were."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from audiomm.layers.projection import Keeper, projection
from audiomm.layers.quantized import Int8Linear, quantise_weight


def three_linears() -> list[nn.Linear]:
    return [nn.Linear(24, 16), nn.Linear(24, 40, bias=False), nn.Linear(24, 8)]


def as_int8(linear: nn.Linear) -> Int8Linear:
    return Int8Linear(*quantise_weight(linear.weight.detach()), None if linear.bias is None else linear.bias.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_one_product_gives_the_outputs_of_all_members_side_by_side(dtype: torch.dtype, rows: int) -> None:
    linears = [linear.to(dtype) for linear in three_linears()]
    hidden = torch.randn(rows, 2, 24, dtype=dtype)
    wanted = torch.cat([linear(hidden) for linear in linears], dim=-1)
    made = projection(*linears)
    assert made is not None
    torch.testing.assert_close(made(hidden), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


@pytest.mark.parametrize("outputs", [[16, 40, 8], [4, 10, 2]], ids=["widening", "narrowing"])
def test_members_become_slices_of_one_tensor_and_training_them_is_seen(outputs: list[int]) -> None:
    linears = [nn.Linear(24, size, bias=size < 40) for size in outputs]
    begin, end = outputs[0], outputs[0] + outputs[1]
    before = {i: linear.weight.detach().clone() for i, linear in enumerate(linears)}
    made = projection(*linears)
    assert made is not None
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    assert all(torch.equal(linear.weight, before[i]) for i, linear in enumerate(linears))
    places = [linear.weight.data_ptr() for linear in linears]
    projection(*linears)
    assert [linear.weight.data_ptr() for linear in linears] == places, "nothing moves a second time"
    hidden = torch.randn(2, 24)
    linears[1](hidden).sum().backward()
    torch.optim.SGD(linears[1].parameters(), lr=0.5).step()
    joined = projection(*linears)
    assert joined is not None
    torch.testing.assert_close(joined(hidden)[:, begin:end], linears[1](hidden))


def test_the_layout_of_trained_weights_stays_as_optimizers_made_their_moments() -> None:
    """A fused optimizer runs over plain memory: a weight laid out otherwise than its moments would be spoilt."""
    torch.manual_seed(0)
    linears, alone = three_linears(), three_linears()
    for one, other in zip(linears, alone, strict=True):
        other.load_state_dict(one.state_dict())
    groups = [[weight for linear in group for weight in linear.parameters()] for group in (linears, alone)]
    optimizers = [torch.optim.AdamW(group, lr=0.1, fused=True) for group in groups]
    for step in range(4):
        hidden = torch.randn(3, 24)
        for group, optimizer in zip((linears, alone), optimizers, strict=True):
            optimizer.zero_grad()
            sum(linear(hidden).square().sum() for linear in group).backward()
            optimizer.step()
        if step == 1:
            projection(*linears)
    for one, other in zip(*groups, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)


def test_slices_of_a_turned_tensor_are_copied_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(*three_linears())
    projection(*model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        wanted = projection(*model)(torch.ones(1, 24))
        with torch.no_grad():
            model[0].weight.add_(1.0)
        made = projection(*other)
        assert torch.equal(made(torch.ones(1, 24)), wanted)
        assert not torch.equal(projection(*model)(torch.ones(1, 24)), wanted)
        with torch.no_grad():
            model[0].weight.copy_(other[0].weight)


@pytest.mark.parametrize(("width", "out", "copied"), [(768, 800, True), (800, 768, True), (800, 832, False)])
def test_only_weights_of_narrow_models_are_packed_into_a_second_copy(
    width: int, out: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[torch.Size] = []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, _: packed.append(weight.shape))
    projection(nn.Linear(width, out, dtype=torch.bfloat16))
    assert packed == ([torch.Size((out, width))] if copied else [])


def test_weights_joined_under_inference_mode_can_still_be_trained() -> None:
    linears = three_linears()
    with torch.inference_mode():
        projection(*linears)
    linears[0](torch.randn(2, 24)).sum().backward()
    assert linears[0].weight.grad is not None


def test_int8_members_give_bit_for_bit_what_each_gives_alone() -> None:
    members = [as_int8(linear) for linear in three_linears()]
    hidden = torch.randn(5, 24)
    wanted = torch.cat([member(hidden) for member in members], dim=-1)
    made = projection(*members)
    assert made is not None
    assert torch.equal(made(hidden), wanted)
    assert torch.equal(torch.cat([member(hidden) for member in members], dim=-1), wanted)


def hooked() -> nn.Linear:
    linear = nn.Linear(24, 8)
    linear.register_forward_hook(lambda module, args, output: output)
    return linear


def replaced() -> nn.Linear:
    linear = nn.Linear(24, 8)
    linear.forward = lambda hidden: hidden[..., :8]  # type: ignore[method-assign]
    return linear


class Adapted(nn.Linear):
    """A subclass, which may do anything."""


@pytest.mark.parametrize(
    "odd",
    [hooked, replaced, lambda: Adapted(24, 8), lambda: nn.Linear(23, 8), lambda: nn.Linear(24, 8).double(),
     lambda: as_int8(nn.Linear(24, 8)), lambda: nn.Linear(24, 8, device="meta"), lambda: nn.Identity()],
)  # fmt: skip
def test_there_is_no_product_with_a_member_that_is_more_or_other_than_a_linear_map(odd) -> None:
    assert projection(nn.Linear(24, 8), odd()) is None


def test_a_keeper_builds_once_and_again_when_the_model_has_changed() -> None:
    model, keeper, built = nn.Sequential(*three_linears()), Keeper[int](), []

    def build() -> int:
        built.append(1)
        return len(built)

    assert [keeper.get(model, build) for _ in range(3)] == [1, 1, 1]
    changes = [
        lambda: model[0].weight.detach().add_(1.0),
        lambda: model.bfloat16(),
        lambda: setattr(model[1], "weight", nn.Parameter(torch.zeros(40, 24))),
        lambda: model.train(False),
        lambda: model[2].register_forward_hook(lambda *_: None),
        lambda: model.append(nn.Linear(2, 2)),
    ]
    seen = []
    for number, change in enumerate(changes, start=2):
        change()
        seen.append(keeper.get(model, build) == number)
    assert all(seen), seen


def test_copies_and_pickles_of_a_keeper_are_empty() -> None:
    keeper = Keeper[int]()
    keeper.get(nn.Linear(2, 2), lambda: 7)
    for other in (copy.deepcopy(keeper), pickle.loads(pickle.dumps(keeper))):
        assert other.get(nn.Linear(2, 2), lambda: 8) == 8


def test_threads_that_ask_at_once_get_the_same_build() -> None:
    model, keeper, got = nn.Linear(2, 2), Keeper[object](), []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        got.append(keeper.get(model, object))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
