"""A program: what a function does to tensors at fixed addresses, compiled so that it warms in seconds.

torch.compile takes as long as there are layers, and looks at every call whether everything is as it was. Here the
layers' common part is found in the graph that was traced, as its repetition, and compiled once for all of them
(regional compilation, with weights as arguments); and a function that reads and writes the same tensors at every call
is traced once and replayed from then on, as a CUDA graph is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..base.errors import GenerationError

#: Stretches of fewer operations are not worth a program of their own.
FEWEST_NODES = 12

#: (graph, tensors like those it will get) -> what runs it: a backend of torch.compile.
Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Program:
    """Runs a function without arguments and result, from the second call on as compiled code alone.

    Args:
        function: Reads and writes tensors only.
        config: A `CompileConfig`, or a dictionary like it.
        is_settled: What the function reads and writes stays where it is, and all else that it looks at as it is; if
            not, torch.compile looks at every call whether that is so.
    """

    def __init__(self, function: Callable[[], None], config: Any, is_settled: bool) -> None:
        options = compile_options(config)
        self._is_regional = _fields(config).get("regional", True)
        self._backend = _backend(options)
        self._is_settled = is_settled
        self._parts: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._run = torch.compile(_apart(function), backend=self._take, **options)

    def __call__(self) -> None:
        if self._is_settled and len(self._parts) == 1:
            run, inputs = self._parts[0]
            run(*inputs)
        else:
            self._parts.clear()
            self._run()

    def _take(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """The backend: nothing is compiled before there are tensors to run with."""
        run: Callable[..., Any] | None = None

        def remembered(*inputs: Any) -> Any:
            nonlocal run
            if run is None:
                run, result = compile_parts(graph, inputs, self._backend, self._is_regional)
            else:
                result = run(*inputs)
            self._parts.append((run, inputs))
            return result

        return remembered


def compile_options(config: Any) -> dict[str, Any]:
    """Arguments for torch.compile from a config, a dictionary, or the config of another library with these fields.

    Raises:
        GenerationError: Fields that exclude each other.
    """
    values = _fields(config)
    names = ("fullgraph", "dynamic", "backend", "mode", "options")
    options = {name: values[name] for name in names if values.get(name) is not None}
    if "mode" in options and "options" in options:
        raise GenerationError(
            f"compile_config has mode={options['mode']!r} and options={options['options']!r}: torch.compile takes "
            "one of them. Leave the other out (None)."
        )
    return {"dynamic": False, **options}


def _fields(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else vars(config)


def _backend(options: dict[str, Any]) -> Backend:
    """What compiles a part; `options` keep what is left for the whole."""
    backend, mode, details = (options.pop(name, None) for name in ("backend", "mode", "options"))
    if backend not in (None, "inductor"):
        found: Any = torch._dynamo.lookup_backend(backend)
        return partial(_foreign, backend=found)
    # CUDA graphs are recorded around the whole function, not part by part.
    mode = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)
    details = dict(torch._inductor.list_mode_options(mode) if mode not in (None, "default") else details or {})
    return partial(_inductor, options=details)


def _inductor(graph: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch._inductor.compile(graph, list(examples), options=options)
    return compiled


def _foreign(graph: fx.GraphModule, examples: Sequence[Any], backend: Any) -> Callable[..., Any]:
    compiled: Callable[..., Any] = backend(graph, list(examples))
    return compiled


def _apart(function: Callable[[], None]) -> Callable[[], None]:
    """The function under a code object of its own: torch.compile keeps few programs for one."""

    def call() -> None:
        function()

    return FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


# ---------------------------------------------------------------------- parts of a graph


@dataclass
class Part:
    """A stretch of a graph that becomes a program of its own.

    Attributes:
        graph: Its operations, with what they read from elsewhere as arguments.
        reads, writes: Nodes of the whole graph: what these are, and those of the part that others read.
        is_exact: For each of `reads`, whether it counts which part of its memory it is: where some of it is written.
        key: The same for parts that do the same to other tensors.
    """

    graph: fx.GraphModule
    reads: list[fx.Node]
    writes: list[fx.Node]
    is_exact: list[bool]
    key: Hashable


def compile_parts(
    graph: fx.GraphModule, inputs: Sequence[Any], backend: Backend, is_regional: bool
) -> tuple[Callable[..., Any], Any]:
    """Compile a graph part by part, equal parts once, and run it.

    Args:
        graph: Straight code, as torch.compile hands it to its backends.
        inputs: What it is to be run with.
        backend: Compiles one part.
        is_regional: Whether there are to be parts.

    Returns:
        What runs it for inputs of the same kind, and the result of this run.
    """
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    output = next(node for node in graph.graph.nodes if node.op == "output")
    heads = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # Anything else than calls (modules, constants of the graph) is left to the backend as it is.
    is_straight = all(node.op in ("call_function", "call_method") for node in nodes)
    edges = repeats([_look(node) for node in nodes]) if is_straight and is_regional else [0, len(nodes)]
    if len(edges) <= 2:
        whole = backend(graph, list(inputs))
        return whole, whole(*inputs)
    values: dict[fx.Node, Any] = dict(zip(heads, inputs, strict=True))
    made: dict[Hashable, Callable[..., Any]] = {}
    steps: list[tuple[Callable[..., Any], list[fx.Node], list[fx.Node]]] = []
    for begin, end in pairwise(edges):
        part = cut(nodes[begin:end])
        given = [values[node] for node in part.reads]
        key = (part.key, *_kinds(given, part.is_exact))
        if key not in made:
            made[key] = backend(part.graph, given)
        steps.append((made[key], part.reads, part.writes))
        values.update(zip(part.writes, made[key](*given), strict=True))
    places = {node: place for place, node in enumerate(values)}
    plan = [(run, [places[node] for node in reads], [places[node] for node in writes]) for run, reads, writes in steps]
    results, size = fx.node.map_arg(output.args[0], lambda node: _Place(places[node])), len(places)

    def run_all(*inputs: Any) -> Any:
        found = [*inputs, *([None] * (size - len(inputs)))]
        for run, reads, writes in plan:
            for place, value in zip(writes, run(*[found[place] for place in reads]), strict=True):
                found[place] = value
        return _filled(results, found)

    return run_all, _filled(results, list(values.values()))


class _Place(int):
    """Where a value is found, told apart from numbers that are values."""


def _filled(results: Any, found: list[Any]) -> Any:
    if isinstance(results, (tuple, list)):
        return tuple(_filled(one, found) for one in results)
    return found[results] if isinstance(results, _Place) else results


def cut(nodes: list[fx.Node]) -> Part:
    """Make a part of consecutive nodes of a graph."""
    graph, copies, numbers = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, int]()
    inside = set(nodes)
    reads = list(dict.fromkeys(node for one in nodes for node in one.all_input_nodes if node not in inside))
    for number, node in enumerate(reads):
        copies[node] = graph.placeholder(f"read_{number}")
        numbers[node] = number
    key: list[Hashable] = []
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda one: _Place(numbers[one]))
        key.append((node.op, node.target, repr(arguments)))
        numbers[node] = len(numbers)
    writes = [node for node in nodes if any(user not in inside for user in node.users)]
    graph.output(tuple(copies[node] for node in writes))
    key.append(tuple(numbers[node] for node in writes))
    touched = {storage for node in nodes for storage in _touched(node)}
    is_exact = [not touched.isdisjoint(_storages(node)) for node in reads]
    return Part(fx.GraphModule({}, graph), reads, writes, is_exact, tuple(key))


def _touched(node: fx.Node) -> list[int]:
    """The memory that a node writes to, or looks at by places counted from its beginning."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    places = [node.kwargs["out"]] if "out" in node.kwargs else []
    if re.search(r"[^_]_$|^as_strided|^setitem|^i[a-z]+$", name) or node.kwargs.get("inplace"):
        places += node.args[:1]
    found: list[fx.Node] = []
    fx.node.map_arg(places, found.append)
    return [storage for one in found for storage in _storages(one)]


def _storages(node: fx.Node) -> list[int]:
    """The memory of the tensors that a node stands for, as numbers."""
    value = node.meta.get("example_value")
    many = value if isinstance(value, (tuple, list)) else (value,)
    return [one.untyped_storage()._cdata for one in many if isinstance(one, Tensor)]


def _kinds(values: list[Any], is_exact: list[bool]) -> tuple[Hashable, ...]:
    """What compiled code may count on besides the operations: types, layouts, and which tensors share memory."""
    storages: dict[int, int] = {}
    found: list[Hashable] = []
    for value, counts in zip(values, is_exact, strict=True):
        if not isinstance(value, Tensor):
            found.append(value)
            continue
        layout: Hashable = ()
        if value.layout == torch.strided:
            storage = storages.setdefault(value.untyped_storage().data_ptr(), len(storages))
            layout = (value.stride(), value.data_ptr() % 16, storage, value.storage_offset() if counts else 0)
        found.append((tuple(value.shape), value.dtype, value.device, type(value), value.requires_grad, layout))
    return tuple(found)


def _look(node: fx.Node) -> Hashable:
    """What a node does, but for which tensors it does it to."""
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda one: _Shape(_shape(one)))
    return node.op, node.target, repr(arguments), repr(_shape(node))


class _Shape(str):
    """A tensor's shape and type in the place of the tensor."""

    def __new__(cls, value: Any) -> _Shape:
        return super().__new__(cls, repr(value))


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    many = value if isinstance(value, (tuple, list)) else (value,)
    return [(tuple(one.shape), one.dtype) if isinstance(one, Tensor) else one for one in many]


def repeats(looks: Sequence[Hashable]) -> list[int]:
    """Where a sequence is to be cut so that what it repeats becomes parts of their own: 0, ..., its length."""
    numbers: dict[Hashable, int] = {}
    return _cuts(np.array([numbers.setdefault(look, len(numbers)) for look in looks], dtype=np.int64))


def _cuts(sequence: Any) -> list[int]:
    saved, first, length = 0, 0, 0
    for period in range(FEWEST_NODES, len(sequence) // 2 + 1):
        start, run = _longest_run(sequence[period:] == sequence[:-period])
        whole = run // period * period
        if whole > saved:
            saved, first, length = whole, start, period
    if saved == 0:
        return [0, len(sequence)]
    inner, last = _cuts(sequence[first : first + length]), first + saved + length
    found = {0, len(sequence)} | {begin + edge for begin in range(first, last, length) for edge in inner}
    found |= set(_cuts(sequence[:first])) | {last + edge for edge in _cuts(sequence[last:])}
    return sorted(found)


def _longest_run(flags: Any) -> tuple[int, int]:
    """Where the longest run of True begins, and how long it is."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    if len(begins) == 0:
        return 0, 0
    best = int((ends - begins).argmax())
    return int(begins[best]), int(ends[best] - begins[best])
