"""A jinja2 that runs templates of strangers: no way to the interpreter, and no way to fill the memory or the day.

jinja2's own sandbox (3.1.6 or newer) keeps a template from Python's insides but not from `'x' * 1000000000`. Here every
road by which text grows (operators, methods, filters, blocks) is measured before it is walked, and loops and calls draw
on one budget a render. Filters, globals and the `generation` block are those that chat templates of transformers use.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, sandbox, visitor
from jinja2.parser import Parser

from .errors import ConfigError, InputError, UnsafeCheckpointError

#: Longest text a template may make, in characters: some million tokens.
MAX_CHARACTERS = 1 << 22
#: Turns of loops and calls of functions and filters in one render; calls count for several.
MAX_STEPS = 1 << 18
_STEPS_OF_A_CALL = 4
#: What an item of a list counts beside its own text, so that looking at a great many ends soon.
_ITEM_CHARACTERS = 16
#: Integers a template may compute with.
MAX_BITS = 4096

#: Around what a `{% generation %}` block wrote; Unicode promises that these two are no characters.
BLOCK_START, BLOCK_END = "\ufdd0", "\ufdd1"

_steps_left: ContextVar[int] = ContextVar("steps_left", default=MAX_STEPS)

_GROWING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
_GROWING_FILTERS = frozenset({"center", "indent", "wordwrap", "batch", "slice"})
_FORMAT_WIDTH = re.compile(r"\d{5,}")


class TemplateLimitError(jinja2.TemplateError):
    """A template asked for more than it may have."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text a template makes of plain data (see `plain`).

    Raises:
        ConfigError: The template is not valid jinja2, or fails on the data.
        UnsafeCheckpointError: It reaches for Python's insides, or would use too much time or memory.
        InputError: It refuses the data (`raise_exception`).
    """
    token = _steps_left.set(MAX_STEPS)
    try:
        return _compiled(template).render(variables)
    except (jinja2.exceptions.SecurityError, TemplateLimitError, MemoryError, RecursionError) as error:
        raise UnsafeCheckpointError(f"the chat template was stopped: {error or type(error).__name__}.") from error
    except _RefusedError as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid jinja2: line {error.lineno}: {error.message}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ConfigError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error
    finally:
        _steps_left.reset(token)


@functools.lru_cache(maxsize=32)
def variables_of(template: str) -> frozenset[str]:
    """Names that a template reads and does not set: what may be passed to it.

    Raises:
        ConfigError: The template is not valid jinja2.
    """
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(template)))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid jinja2: line {error.lineno}: {error.message}") from error


def plain(value: Any) -> Any:
    """`value` rebuilt from dicts, lists, strings and numbers; anything else becomes its type's name, "<ndarray>".

    A template never needs an image's pixels, and an object's methods are no business of a stranger's template.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols], finalize=_measured
        )
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        # The names of the last two cannot be written in a template.
        self.filters |= {"tojson": _limited("tojson", _tojson), "counted ": _counted, "joined ": _joined}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "namespace": _Namespace,
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Pieces of output as one text; templates, macros and set blocks end here."""
        kept: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            _require(size <= MAX_CHARACTERS, f"it writes more than {MAX_CHARACTERS} characters")
            kept.append(piece)
        return "".join(kept)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Meter().visit(tree)

    def call_binop(self, context: Any, operator_name: str, left: Any, right: Any) -> Any:
        """`left operator right`, after a look at how large the result will be."""
        _spend(1)
        if operator_name == "%" and isinstance(left, str):
            _check_format(left, (right,))
        elif operator_name in ("*", "+"):
            _check_sizes(operator_name, left, right)
        elif operator_name == "**" and isinstance(left, int) and isinstance(right, int):
            _require(left.bit_length() * max(right, 0) <= MAX_BITS, f"{left} ** {right} is too large")
        return super().call_binop(context, operator_name, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what the template calls, counted, after a look at how large the result will be."""
        _spend(_STEPS_OF_A_CALL)
        # jinja2 hands out str.format in a wrapper of its own
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_method(owner, name, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


class _Meter(visitor.NodeTransformer):
    """Puts the budget into loops and the measure into `~`, which the sandbox does not intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted ", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(values, "joined ", [], [], None, None, lineno=node.lineno)


class _GenerationBlock(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, between BLOCK_START and BLOCK_END."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_framed"), [], [], body).set_lineno(lineno)

    def _framed(self, caller: Callable[[], str]) -> str:
        return f"{BLOCK_START}{caller()}{BLOCK_END}"


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace may not hold {name!r}")


# ------------------------------------------------------------------------------------------------ measures


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise TemplateLimitError(complaint)


def _spend(steps: int) -> None:
    left = _steps_left.get() - steps
    _require(left >= 0, f"it takes more than {MAX_STEPS} steps")
    _steps_left.set(left)


def _size(value: Any, limit: int = MAX_CHARACTERS) -> int:
    """About how many characters `value` has when written out; what is beyond `limit` is not looked at."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple)):
        return 0
    total = 2
    for item in value:
        total += _ITEM_CHARACTERS + _size(item, limit - total)
        if total > limit:
            break
    return total


def _measured(value: Any) -> Any:
    """`value`, if writing it out stays within the limit."""
    if not isinstance(value, str):
        _require(_size(value) <= MAX_CHARACTERS, f"a value has more than {MAX_CHARACTERS} characters")
    return value


def _check_sizes(operator_name: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require(left.bit_length() + right.bit_length() <= MAX_BITS, "it computes with integers that are too large")
    elif operator_name == "*":
        sequence, count = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(sequence, Sized) and isinstance(count, int):
            _require(len(sequence) * count <= MAX_CHARACTERS, f"it repeats {len(sequence)} items {count} times")
    elif isinstance(left, Sized) and isinstance(right, Sized):
        _require(len(left) + len(right) <= MAX_CHARACTERS, f"it joins {len(left)} and {len(right)} items")


def _check_format(text: str, values: Iterable[Any]) -> None:
    _require(not _FORMAT_WIDTH.search(text), "a format asks for too wide a field")
    for value in values:
        items = value if isinstance(value, (list, tuple)) else [value]
        _require(all(not isinstance(item, int) or abs(item) < 1 << 53 for item in items), "a number is too large")
        _require("*" not in text or all(not isinstance(item, int) or item < 10_000 for item in items),
                 "a format asks for too wide a field")  # fmt: skip
        _measured(value)


def _check_method(owner: str, name: str, values: tuple[Any, ...]) -> None:
    grown = len(owner)
    if name in ("format", "format_map"):
        _check_format(owner, values)
    elif name == "replace" and len(values) >= 2 and all(isinstance(value, str) for value in values[:2]):
        grown += owner.count(values[0]) * len(values[1])
    elif name == "join" and values:
        items = values[0] if isinstance(values[0], (list, tuple)) else []
        grown = _size(items) + len(items) * len(owner)
    elif name in _GROWING_METHODS:
        grown *= max((value for value in values if isinstance(value, int)), default=1)
        grown = max([grown, *(value for value in values if isinstance(value, int))])
    _require(grown <= MAX_CHARACTERS, f"{name}() would make more than {MAX_CHARACTERS} characters")


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that costs a step for every 64 characters of its arguments and looks at how large its result will be."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[first:]
        others += kwargs.values()
        _spend(1 + sum(_size(_measured(argument)) for argument in (value, *others)) // 64)
        if name in ("replace", "format") and isinstance(value, str):
            _check_method(value, name, tuple(others))
        elif name == "join":
            _check_method(next((sep for sep in others if isinstance(sep, str)), ""), name, (value,))
        elif name in _GROWING_FILTERS:
            factor = max((abs(other) for other in others if isinstance(other, int)), default=80)
            _require(_size(value) * factor <= 64 * MAX_CHARACTERS and factor <= MAX_CHARACTERS,
                     f"the filter {name} would make too much")  # fmt: skip
        return function(*args, **kwargs)

    return limited


def _counted(values: Iterable[Any]) -> Iterable[Any]:
    """What a loop runs over, each turn drawn from the budget."""
    if isinstance(values, Sized):
        _spend(len(values))
        return values
    return _counting(values)


def _counting(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(1)
        yield value


def _joined(values: list[Any]) -> str:
    """`a ~ b`."""
    texts = [str(_measured(value)) for value in values]
    _spend(1)
    _require(sum(map(len, texts)) <= MAX_CHARACTERS, f"it joins more than {MAX_CHARACTERS} characters")
    return "".join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as people write it: jinja2's own filter would escape HTML."""
    _require(indent is None or operator.index(indent) <= 64, f"tojson(indent={indent}) is too wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)
