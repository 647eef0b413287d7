"""Python functions as tools of a chat: their JSON schema from type hints and a Google-style docstring.

The schema is the one chat templates expect: {"type": "function", "function": {"name", "description", "parameters"}}.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Any: None}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+)$")
_CHOICES = re.compile(r"\(choices:\s*\[(.*?)\]\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Every tool as a schema; dicts are taken as they are.

    Raises:
        InputError: A tool is neither a schema nor a function that explains itself.
    """
    return [tool if isinstance(tool, dict) else function_schema(tool) for tool in tools]


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of one function.

    Raises:
        InputError: It has no docstring, or an argument has no type hint or is not described under "Args:".
    """
    if not callable(function):
        raise InputError(f"a tool is a JSON schema or a function, not {type(function).__name__}.")
    name = getattr(function, "__name__", type(function).__name__)
    documentation = inspect.getdoc(function)
    if not documentation:
        raise InputError(f"the tool {name} has no docstring; a model cannot know what it is for.")
    description, explained, returned = _read_docstring(documentation)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument not in hints or argument not in explained:
            missing = "type hint" if argument not in hints else "line under 'Args:' in its docstring"
            raise InputError(f"the tool {name}: argument {argument!r} has no {missing}.")
        properties[argument] = {**_hint_schema(hints[argument]), **explained[argument]}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    schema = {"name": name, "description": description, "parameters": parameters}
    if "return" in hints:
        schema["return"] = _hint_schema(hints["return"]) | ({"description": returned} if returned else {})
    return {"type": "function", "function": schema}


def _read_docstring(text: str) -> tuple[str, dict[str, dict[str, Any]], str]:
    """(description, {argument: {"description", "enum"}}, what is returned)."""
    pieces = _SECTION.split(text)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    listed = next((sections[name] for name in ("Args", "Arguments", "Parameters") if name in sections), "")
    arguments: dict[str, list[str]] = {}
    current: list[str] = []
    indent = min((len(line) - len(line.lstrip()) for line in listed.splitlines() if line.strip()), default=0)
    for line in filter(str.strip, listed.splitlines()):
        match = _ARGUMENT.match(line) if len(line) - len(line.lstrip()) == indent else None
        if match:
            current = arguments[match.group(1)] = [match.group(2).strip()]
        else:
            current.append(line.strip())
    explained: dict[str, dict[str, Any]] = {}
    for argument, lines in arguments.items():
        words = " ".join(lines)
        choices = _CHOICES.search(words)
        named = {"enum": [choice.strip(" \"'") for choice in choices.group(1).split(",")]} if choices else {}
        explained[argument] = {**named, "description": _CHOICES.sub("", words).strip()}
    returned = " ".join(sections.get("Returns", "").split())
    return pieces[0].strip(), explained, returned.split(": ", 1)[-1]


def _hint_schema(hint: Any) -> dict[str, Any]:
    """JSON schema of one type hint."""
    if hint in _TYPES:
        return {"type": _TYPES[hint]} if _TYPES[hint] else {}
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        others = [_hint_schema(kind) for kind in inner if kind is not type(None)]
        plain = all(set(other) == {"type"} and isinstance(other["type"], str) for other in others)
        if len(others) == 1:
            schema = others[0]
        elif plain:
            schema = {"type": sorted(other["type"] for other in others)}
        else:
            schema = {"anyOf": others}
        return schema | ({"nullable": True} if type(None) in inner else {})
    if origin is Literal:
        kinds = sorted({str(_TYPES[type(value)]) for value in inner})
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if hint in (list, tuple) or origin in (list, tuple):
        item = next((kind for kind in inner if kind is not Ellipsis), None)
        return {"type": "array"} | ({"items": _hint_schema(item)} if item is not None else {})
    if hint is dict or origin is dict:
        values = _hint_schema(inner[1]) if len(inner) == 2 else {}
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    raise InputError(f"a tool's argument has type {hint!r}; JSON knows numbers, strings, booleans, lists and dicts.")
