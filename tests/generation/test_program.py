"""Compiled programs: layers are compiled once for all, what was traced is replayed, and results stay what they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from audiomm.base.errors import GenerationError
from audiomm.generation import CompileConfig
from audiomm.generation.program import Program, compile_options, repeats

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WIDTH = 8


class Counting:
    """A backend that runs graphs as they are, and remembers how many nodes each has."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.sizes.append(len(list(graph.graph.nodes)))
        return graph.forward


class Stack:
    """Layers that read and write buffers: each has a weight and a cache of its own."""

    def __init__(self, layers: int, *, odd: int | None = None, shares_storage: bool = False) -> None:
        make = torch.Generator().manual_seed(layers)
        whole = torch.randn(layers, WIDTH, WIDTH, generator=make) / WIDTH**0.5
        self.weights = list(whole.unbind()) if shares_storage else [one.clone() for one in whole]
        caches = torch.zeros(layers, 4, WIDTH)
        self.caches = list(caches.unbind()) if shares_storage else [one.clone() for one in caches]
        self.state = torch.randn(2, WIDTH, generator=make)
        self.out = torch.zeros(2, WIDTH)
        self.place = torch.zeros(1, dtype=torch.long)
        self.odd = odd

    def run(self) -> None:
        hidden = self.state * 2.0
        for index, (weight, cache) in enumerate(zip(self.weights, self.caches, strict=True)):
            mapped = torch.mm(hidden, weight)
            gate, up = mapped.chunk(2, -1)
            mixed = torch.cat((gate.sigmoid() * up, up.tanh()), dim=-1)
            cache.index_copy_(0, self.place, mixed[:1])
            read = cache.sum(dim=0, keepdim=True)
            lifted = (mixed + read).div_(2.0)
            hidden = hidden + (lifted.sin() if index == self.odd else lifted.cos())
        self.out.copy_(hidden)
        self.place.add_(1)


def twice(stack: Stack, config: Any, calls: int = 4) -> tuple[Program, list[Tensor]]:
    """What a program writes at each of some calls."""
    program, found = Program(stack.run, config, is_settled=True), []
    for _ in range(calls):
        program()
        found.append(stack.out.clone())
    return program, found


def as_it_is(stack: Stack, calls: int = 4) -> list[Tensor]:
    found = []
    for _ in range(calls):
        stack.run()
        found.append(stack.out.clone())
    return found


@pytest.mark.parametrize("shares_storage", [False, True], ids=["apart", "slices of one"])
def test_layers_are_compiled_once_for_all(shares_storage):
    few, many = Counting(), Counting()
    for layers, backend in ((4, few), (12, many)):
        wanted = as_it_is(Stack(layers, shares_storage=shares_storage))
        _, got = twice(Stack(layers, shares_storage=shares_storage), {"backend": backend})
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    if not shares_storage:
        assert len(many.sizes) == len(few.sizes) <= 4
        assert sum(many.sizes) == sum(few.sizes)


def test_a_layer_that_is_another_is_compiled_on_its_own():
    backend = Counting()
    wanted = as_it_is(Stack(12, odd=7))
    _, got = twice(Stack(12, odd=7), {"backend": backend})
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert 2 < len(backend.sizes) <= 7


def test_a_graph_without_repetition_is_compiled_as_a_whole():
    backend = Counting()
    stack = Stack(1)
    _, got = twice(stack, {"backend": backend})
    torch.testing.assert_close(got, as_it_is(Stack(1)), rtol=0, atol=0)
    assert len(backend.sizes) == 1


def test_a_step_is_compiled_as_a_whole_where_that_is_asked_for():
    backend = Counting()
    _, got = twice(Stack(6), CompileConfig(backend=backend, mode=None, regional=False))
    torch.testing.assert_close(got, as_it_is(Stack(6)), rtol=0, atol=0)
    assert len(backend.sizes) == 1


def test_a_settled_program_is_replayed_without_a_look():
    program, _ = twice(Stack(6), {"backend": "eager"}, calls=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        program()
    torch._dynamo.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        program()


def test_a_program_that_is_not_settled_sees_what_has_changed():
    stack, other = Stack(6), Stack(6)
    program = Program(stack.run, {"backend": "eager"}, is_settled=False)
    program()
    other.run()
    for one in (stack, other):
        one.weights[2] = one.weights[2] * 3.0
    program()
    other.run()
    assert torch.equal(stack.out, other.out)


def test_many_programs_do_not_use_up_what_torch_keeps_of_one_function():
    for layers in range(1, 12):
        with torch._dynamo.config.patch(error_on_recompile=True):
            _, got = twice(Stack(layers), {"backend": "eager"}, calls=2)
        torch.testing.assert_close(got, as_it_is(Stack(layers), 2), rtol=0, atol=0)


def test_a_function_that_breaks_the_graph_runs_all_the_same():
    stack, other = Stack(4), Stack(4)

    def broken() -> None:
        stack.run()
        torch._dynamo.graph_break()
        stack.run()

    program = Program(broken, {"backend": "eager"}, is_settled=True)
    for _ in range(2):
        program()
        other.run()
        other.run()
        assert torch.equal(stack.out, other.out)


def test_repetitions_are_found_in_what_repeats_itself_too():
    group = [*"abcdefghijklm"] * 3 + [*"nopqrstuvwxyz"]
    edges = repeats(["start", *group, *group, *group, "end"])
    assert edges[0] == 0
    assert edges[-1] == 2 + 3 * len(group)
    lengths = [end - begin for begin, end in pairwise(edges)]
    assert lengths.count(13) >= 10
    assert repeats(["a", "b", "a", "b"]) == [0, 4]
    assert repeats([]) == [0, 0]


def test_options_are_those_of_torch_compile():
    assert compile_options(CompileConfig(mode=None)) == {"fullgraph": False, "dynamic": False, "backend": "inductor"}
    with pytest.raises(GenerationError, match="mode='default' and options="):
        compile_options({"mode": "default", "options": {"max_autotune": True}})


@pytest.mark.slow
@pytest.mark.parametrize("shares_storage", [False, True], ids=["apart", "slices of one"])
def test_inductor_gives_what_the_function_gives(shares_storage):
    wanted = as_it_is(Stack(6, shares_storage=shares_storage))
    _, got = twice(Stack(6, shares_storage=shares_storage), CompileConfig())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
