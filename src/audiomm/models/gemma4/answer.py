"""What Gemma 4 writes, read back: thoughts, tool calls and the text of an answer.

The format is the one its chat template writes: `<|channel>thought ...<channel|>` for thoughts and
`<|tool_call>call:NAME{key:value,...}<tool_call|>` for calls, whose strings stand between `<|"|>` marks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.tool_schema import tool_schemas

_TURN = "<|turn>model\n"
_THOUGHT = re.compile(r"<\|channel>(?:thought)?\n?(.*?)(?:<channel\|>|\Z)", re.DOTALL)
_CALL = re.compile(r"<\|tool_call>\s*call:\s*([^\s{]+)\s*(\{.*?\})?\s*(?:<tool_call\|>|\Z)", re.DOTALL)
#: What ends an answer: the turn, the text, or the wait for a tool.
_END = re.compile(r"<turn\|>|<eos>|<\|tool_response>|<\|turn>|<pad>")
_QUOTE = '<|"|>'
_BARE = re.compile(r"[^,\[\]{}:]*")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?\Z")


def parse_answer(text: str, prefix: str = "", tools: Sequence[Any] | None = None) -> dict[str, Any]:
    """One answer as a message.

    Args:
        text: What was generated, special tokens included.
        prefix: The prompt; what its last, open turn of the model holds belongs to the answer.
        tools: Schemas or functions; arguments are brought to the types they declare.

    Returns:
        {"role", "content"} and, where there are any, "reasoning_content" and "tool_calls".
    """
    opened = prefix.rpartition(_TURN)[2] if _TURN in prefix else ""
    # A prompt whose last turn is closed opens none.
    text = text if _END.search(opened) and "<|tool_response>" not in opened else opened + text
    text = text.rpartition("<tool_response|>")[2]
    end = _END.search(text)
    text = text[: end.start()] if end else text
    thoughts = [thought.strip() for thought in _THOUGHT.findall(text)]
    text = _THOUGHT.sub("", text)
    schemas = {schema["function"]["name"]: schema["function"] for schema in tool_schemas(tools or [])}
    calls = [_call(name, written, schemas.get(name)) for name, written in _CALL.findall(text)]
    message: dict[str, Any] = {"role": "assistant", "content": _CALL.sub("", text).strip()}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    if calls:
        message["tool_calls"] = calls
    return message


def _call(name: str, written: str, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool call; arguments that cannot be read stay the text they are."""
    try:
        arguments: Any = _Reader(written or "{}").read()
    except ValueError:
        arguments = written
    declared = ((schema or {}).get("parameters") or {}).get("properties") or {}
    if isinstance(arguments, dict):
        arguments = {key: _typed(value, declared.get(key) or {}) for key, value in arguments.items()}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class _Reader:
    """Reads one value of the call format."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def read(self) -> Any:
        value = self._value()
        if self.text[self.place :].strip():
            raise ValueError(f"text after the arguments: {self.text[self.place :]!r}")
        return value

    def _value(self) -> Any:
        self._skip_space()
        if self.text.startswith("{", self.place):
            return self._mapping()
        if self.text.startswith("[", self.place):
            return self._items()
        if self.text.startswith(_QUOTE, self.place):
            return self._quoted(_QUOTE)
        if self.text.startswith('"', self.place):
            return self._quoted('"')
        return _bare_value(self._bare())

    def _mapping(self) -> dict[str, Any]:
        self.place += 1
        found: dict[str, Any] = {}
        while not self._closes("}"):
            self._skip_space()
            quoted = self.text.startswith(_QUOTE, self.place)
            key = self._quoted(_QUOTE) if quoted else self._bare().strip("\"' ")
            self._expect(":")
            found[key] = self._value()
        return found

    def _items(self) -> list[Any]:
        self.place += 1
        found = []
        while not self._closes("]"):
            found.append(self._value())
        return found

    def _closes(self, bracket: str) -> bool:
        """Whether the bracket comes next; steps over it, or over a comma before the next item."""
        self._skip_space()
        if self.text.startswith(",", self.place):
            self.place += 1
            self._skip_space()
        if self.text.startswith(bracket, self.place):
            self.place += 1
            return True
        if self.place >= len(self.text):
            raise ValueError(f"no closing {bracket}")
        return False

    def _quoted(self, quote: str) -> str:
        start = self.place + len(quote)
        end = self.text.find(quote, start)
        if end < 0:
            raise ValueError("a string does not end")
        self.place = end + len(quote)
        return self.text[start:end]

    def _bare(self) -> str:
        match = _BARE.match(self.text, self.place)
        if match is None or not match.group():
            raise ValueError(f"no value at {self.place}")
        self.place = match.end()
        return match.group().strip()

    def _expect(self, sign: str) -> None:
        self._skip_space()
        if not self.text.startswith(sign, self.place):
            raise ValueError(f"no {sign!r} at {self.place}")
        self.place += 1

    def _skip_space(self) -> None:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1


def _bare_value(word: str) -> Any:
    if word in ("true", "false", "null", "none", "None"):
        return {"true": True, "false": False}.get(word)
    if _NUMBER.match(word):
        return float(word) if any(sign in word for sign in ".eE") else int(word)
    return word


def _typed(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value` as the schema's type, where it can be read as that without loss."""
    kinds = schema.get("type")
    kinds = [kind.lower() for kind in ([kinds] if isinstance(kinds, str) else kinds or [])]
    if "string" in kinds and not isinstance(value, str) and value is not None:
        return json.dumps(value)
    if isinstance(value, float) and "integer" in kinds and "number" not in kinds and value.is_integer():
        return int(value)
    if isinstance(value, str) and "string" not in kinds:
        read = _bare_value(value.strip())
        if isinstance(read, bool):
            return read if "boolean" in kinds else value
        if isinstance(read, (int, float)) and {"integer", "number"} & set(kinds) and math.isfinite(read):
            return read
        if {"object", "array"} & set(kinds):
            try:
                return json.loads(value)
            except ValueError:
                return value
    return value
