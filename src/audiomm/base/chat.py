"""Messages of a chat: brought into one form, searched for media, and rendered by a checkpoint's chat template.

The form is that of transformers: {"role": ..., "content": text or parts}, where a part is {"type": "text" | "image" |
"audio" | "video", ...} with the medium under "url", "path" or the type's own name. The parts of OpenAI's interface
(`image_url`, `input_audio`, `audio_url`, `video_url`, `input_text`) are read too.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .tool_schema import tool_schemas

logger = logging.getLogger("audiomm.base.chat")

#: Around a control token that a user typed: it is encoded as the plain text it is. Not characters in Unicode.
TYPED_START, TYPED_END = "\ufdd2", "\ufdd3"

#: Keys of a part that may hold its medium, by type.
_SOURCES = {
    "image": ("image", "url", "path", "base64"),
    "audio": ("audio", "url", "path", "base64"),
    "video": ("video", "url", "path"),
}
#: Keys that show that a part is meant to hold a medium.
_MEDIA_KEYS = ("image", "audio", "video", "url", "path", "base64", "file", "array")
#: Types of parts in other interfaces and what they are called here.
_ALIASES = {
    "image_url": "image",
    "input_image": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
    "input_video": "video",
    "input_text": "text",
    "output_text": "text",
}
#: Names under which a message's thoughts are passed; templates read the first.
_THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")
#: Roles whose text comes from outside: control tokens in it are never obeyed unless the caller says so.
_OUTSIDE_ROLES = ("user", "tool")

_CONTINUE_HERE = "\ufdd4"
_TOKEN_SHAPE = re.compile(r"<[^<>\s]+>")


@dataclass
class Media:
    """What the parts of one conversation hold, in reading order; each item as it was passed, not yet loaded."""

    image: list[Any] = field(default_factory=list)
    audio: list[Any] = field(default_factory=list)
    video: list[Any] = field(default_factory=list)


def conversations_of(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A list of conversations in one form, and whether several were passed.

    Keys whose value is None are left out (OpenAI's interface writes `content: null`); the caller's messages stay as
    they are.

    Raises:
        InputError: A conversation is empty, or a message has no role, or its content cannot be read.
        TypeError: Something is not a list of messages.
    """
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(f"a conversation is a list of messages, not {type(conversation).__name__}.")
    is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
    conversations = list(conversation) if is_batch else [conversation]
    for number, messages in enumerate(conversations):
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"conversation {number} is a {type(messages).__name__}, not a list of messages.")
        if not messages:
            raise InputError(f"conversation {number} is empty; pass at least one message.")
    return [[_message(message, number) for number, message in enumerate(chat)] for chat in conversations], is_batch


def _message(message: Any, number: int) -> dict[str, Any]:
    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    if not isinstance(message, Mapping):
        raise TypeError(f"message {number} is a {type(message).__name__}, not a dict with 'role' and 'content'.")
    kept = {key: value for key, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise InputError(f"message {number} has role {kept.get('role')!r}; a name like 'user' is needed.")
    content = kept.get("content", "")
    if isinstance(content, (list, tuple)):
        kept["content"] = [_part(part, number) for part in content]
    elif not isinstance(content, str) and not (kept["role"] == "tool" and isinstance(content, Mapping)):
        raise InputError(f"message {number}: content is a {type(content).__name__}; text or a list of parts is needed.")
    thoughts = next((kept[name] for name in _THOUGHT_NAMES if name in kept), None)
    if thoughts is not None:
        kept = {"thinking": thoughts, **kept, "reasoning_content": thoughts}
    return kept


def _part(part: Any, number: int) -> dict[str, Any]:
    """One part of a message's content under the names used here."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InputError(
            f"message {number}: a part of the content is {type(part).__name__}; a dict with 'type' is needed, for "
            "example {'type': 'text', 'text': 'Hello'}."
        )
    kind = _ALIASES.get(part["type"])
    if kind is None:
        return dict(part)
    inner = part.get(part["type"], part.get(f"{kind}_url"))
    if kind == "text":
        return {"type": "text", "text": part.get("text", inner or "")}
    if isinstance(inner, Mapping) and "data" in inner:
        return {"type": kind, kind: _from_base64(inner["data"], number)}
    if isinstance(inner, Mapping):
        inner = inner.get("url")
    return {"type": kind} if inner is None else {"type": kind, "url": inner}


def _from_base64(text: Any, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(f"message {number}: 'data' is not valid base64: {error}.") from error


def find_media(messages: Sequence[Mapping[str, Any]]) -> Media:
    """The images, clips and videos in one conversation, in reading order. A part without any is left to the caller.

    Raises:
        InputError: A part holds its medium twice ("url" and "path"), or is of a type that would be dropped.
    """
    found = Media()
    for number, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part["type"]
            if kind not in _SOURCES and any(part.get(name) is not None for name in _MEDIA_KEYS):
                raise InputError(
                    f"message {number}: a part of type {kind!r} holds {', '.join(map(repr, part))}, which no template "
                    f"shows: the types with media are {', '.join(map(repr, _SOURCES))}."
                )
            held = [name for name in _SOURCES.get(kind, ()) if part.get(name) is not None]
            if len(held) > 1:
                raise InputError(f"message {number}: a part of type {kind!r} holds {' and '.join(held)}; pass one.")
            if held:
                medium = part[held[0]]
                medium = _from_base64(medium, number) if held[0] == "base64" else medium
                getattr(found, kind).append(medium)
    return found


def with_sound_of_videos(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with the sound of each video as a part of its own, right behind the video.

    An empty {"type": "audio"} part that stands there already takes the sound.
    """
    filled = []
    for message in messages:
        content = message.get("content")
        parts: list[Any] = []
        for part in content if isinstance(content, list) else ():
            is_place = part["type"] == "audio" and not any(part.get(name) is not None for name in _SOURCES["audio"])
            before = parts[-1] if parts else {}
            if is_place and before.get("type") == "audio" and "of_video" in before:
                continue
            parts.append(part)
            source = next((part[name] for name in _SOURCES["video"] if part.get(name) is not None), None)
            if part["type"] == "video" and source is not None:
                parts.append({"type": "audio", "audio": source, "of_video": True})
        filled.append({**message, "content": parts} if isinstance(content, list) else dict(message))
    return filled


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt a template makes of one conversation, and where the assistant's own words are in it.

    Args:
        template: jinja2 text.
        messages: From `conversations_of`.
        tools: JSON schemas of tools, or functions with type hints and a docstring.
        documents: {"title", "text"} for templates that know them.
        add_generation_prompt: End with the opening of the assistant's turn.
        continue_final_message: Leave the last message open so that the model goes on with it; a string names the key
            of the message to continue instead of "content".
        variables: Whatever else the template reads (bos_token, enable_thinking, ...).

    Returns:
        (text, [(start, end) in characters for each `{% generation %}` block]).

    Raises:
        InputError: The template refuses the messages, or there is nothing to continue.
        ConfigError, UnsafeCheckpointError: The template is broken, or dangerous; see `sandbox.render`.
    """
    if continue_final_message and add_generation_prompt:
        raise InputError(
            "add_generation_prompt=True opens a new turn and continue_final_message goes on with the last; pass one."
        )
    from .sandbox import plain, render  # jinja2 is imported for chats only

    data = plain(list(messages))
    key = continue_final_message if isinstance(continue_final_message, str) else "content"
    if continue_final_message:
        _mark_end(data[-1], key)
    text = render(
        template,
        {
            "messages": data,
            "tools": None if tools is None else plain(tool_schemas(tools)),
            "documents": plain(documents),
            "add_generation_prompt": add_generation_prompt,
            **plain(variables),
        },
    )
    if continue_final_message:
        text, mark, rest = text.rpartition(_CONTINUE_HERE)
        if not mark:
            raise InputError(f"continue_final_message: the template leaves out {key!r} of the last message.")
        # A template that trims the text took the space behind the mark, and meant the spaces before it too.
        text = text if rest.startswith(" ") else text.rstrip()
    return _without_blocks(text)


def _mark_end(message: dict[str, Any], key: str) -> None:
    """Put a mark at the end of the text that is to be continued."""
    content = message.get(key)
    if isinstance(content, list):
        texts = [part for part in content if isinstance(part.get("text"), str)]
        if texts:
            texts[-1]["text"] += _CONTINUE_HERE + " "
            return
    elif isinstance(content, str):
        for name in _THOUGHT_NAMES if key in _THOUGHT_NAMES else (key,):
            message[name] = content + _CONTINUE_HERE + " "
        return
    raise InputError(f"continue_final_message: the last message has no text under {key!r}.")


def _without_blocks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` without the marks of generation blocks, and the places between them."""
    from .sandbox import BLOCK_END, BLOCK_START

    if BLOCK_START not in text:
        return text, []
    pieces, spans, starts, length = [], [], [], 0
    for piece in re.split(f"([{BLOCK_START}{BLOCK_END}])", text):
        if piece == BLOCK_START:
            starts.append(length)
        elif piece == BLOCK_END:
            if starts:
                spans.append((starts.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def mark_typed(messages: list[dict[str, Any]], tokens: Iterable[str], everything: bool = False) -> list[dict[str, Any]]:
    """`messages` with the control tokens that come from outside put between TYPED marks.

    A tokenizer called with `sanitize_control_tokens=True` encodes what is between the marks as plain text, so that who
    types "<|image|>" or "<end_of_turn>" gets those letters and no control.

    Args:
        messages: From `conversations_of`.
        tokens: The control tokens.
        everything: Mark them in what system and assistant say too, not only in what users and tools say.
    """
    mark = typed_marker(tokens)
    return [
        {name: value if name == "role" else mark(value) for name, value in message.items()}
        if everything or message["role"] in _OUTSIDE_ROLES
        else message
        for message in messages
    ]


def typed_marker(tokens: Iterable[str]) -> Callable[[Any], Any]:
    """A function that puts control tokens in all strings of nested data between TYPED marks."""
    known = frozenset(tokens)
    # Thousands of "<unused17>" would make a slow pattern: what has their shape is looked up instead.
    others = sorted((token for token in known if token and not _TOKEN_SHAPE.fullmatch(token)), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, others), _TOKEN_SHAPE.pattern]))
    marks = str.maketrans("", "", TYPED_START + TYPED_END)

    def framed(match: re.Match[str]) -> str:
        return f"{TYPED_START}{match.group()}{TYPED_END}" if match.group() in known else match.group()

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(framed, value.translate(marks))
        if isinstance(value, Mapping):
            # A part's type and its medium are no text of the prompt.
            kept = ("type", *_SOURCES.get(str(value.get("type")), ()))
            return {mark(key): item if key in kept else mark(item) for key, item in value.items()}
        return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    return mark


def without_typed(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in `text` (characters) after the TYPED marks have been taken out of it."""

    def place(at: int) -> int:
        return at - text.count(TYPED_START, 0, at) - text.count(TYPED_END, 0, at)

    return [(place(start), place(end)) for start, end in spans]


def resolve_template(templates: str | Mapping[str, str] | None, wanted: str | None, has_tools: bool) -> str:
    """The template to use: the one passed (text, or the name of one of several), else the tokenizer's own.

    Raises:
        InputError: There is none, or several and none is called "default".
    """
    if isinstance(templates, Mapping):
        if wanted is not None and wanted not in templates:
            return wanted
        name = wanted or ("tool_use" if has_tools and "tool_use" in templates else "default")
        if name not in templates:
            raise InputError(f"there are the chat templates {', '.join(templates)}; name one with chat_template=.")
        return templates[name]
    template = wanted if wanted is not None else templates
    if template is None:
        raise InputError(
            "there is no chat template: this checkpoint was not tuned on chats, or its chat_template.jinja is missing. "
            "Pass chat_template=, or plain text."
        )
    return template
