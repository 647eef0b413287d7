"""Chats through a tokenizer: its template applied to messages, and text in which typed control tokens stay text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer

from .chat import (
    TYPED_END,
    TYPED_START,
    conversations_of,
    mark_typed,
    render_chat,
    resolve_template,
    typed_marker,
    without_typed,
)
from .encoding import plain_list
from .errors import InputError
from .tool_schema import tool_schemas
from .vocabulary import Vocabulary

_TYPED = re.compile(f"{TYPED_START}(.*?){TYPED_END}", re.DOTALL)


class ChatTemplates(Vocabulary):
    """The part of a tokenizer that knows chats."""

    chat_template: str | dict[str, str] | None

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template to use: the text or name passed, else the tokenizer's own.

        Raises:
            InputError: There is none, or several and none is called "default".
        """
        return resolve_template(self.chat_template, chat_template, bool(tools))

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Messages as one prompt: its ids, or its text.

        Args:
            conversation: [{"role", "content"}, ...], or a list of those for a batch.
            tools: JSON schemas, or functions with type hints and a docstring.
            documents: {"title", "text"} for templates that know them.
            chat_template: jinja2 text, or the name of one of the tokenizer's; None is its own.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: Leave the last message open so that the model goes on with it.
            tokenize: Return ids; False returns the text.
            sanitize_control_tokens: Encode control tokens written in messages as plain text: None does so for what
                users and tools say, True for everything, False for nothing.
            padding: As for a call, with `truncation`, `max_length` and `return_tensors`.
            truncation: See padding.
            max_length: See padding.
            return_tensors: See padding.
            return_dict: Return ids and masks by name; False returns only the ids.
            return_assistant_tokens_mask: Add `assistant_masks`, 1 for what the template's generation blocks wrote.
            tokenizer_kwargs: Further options of the call.
            variables: Whatever else the template reads.

        Raises:
            InputError: The template refuses the messages, or options contradict each other.
            ConfigError, UnsafeCheckpointError: The template is broken, or dangerous.
        """
        conversations, is_batch = conversations_of(conversation)
        template = self.get_chat_template(chat_template, tools)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True.")
        if tokenize and sanitize_control_tokens is not False:
            tokens = self.control_tokens()
            conversations = [mark_typed(chat, tokens, bool(sanitize_control_tokens)) for chat in conversations]
            if sanitize_control_tokens:
                mark = typed_marker(tokens)
                tools = None if tools is None else mark(tool_schemas(tools))
                documents, variables = mark(documents), mark(variables)
        rendered = [
            render_chat(
                template,
                chat,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens_map, **variables},
            )
            for chat in conversations
        ]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if is_batch else texts[0]
        options = {
            "add_special_tokens": False,
            "sanitize_control_tokens": sanitize_control_tokens is not False,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
        }
        encoding = self(  # type: ignore[operator]
            texts if is_batch else texts[0], return_tensors=return_tensors, **{**options, **(tokenizer_kwargs or {})}
        )
        if return_assistant_tokens_mask:
            places = [without_typed(*row) for row in rendered]
            encoding["assistant_masks"] = assistant_masks(encoding.encodings, places, encoding["attention_mask"])
        return encoding if return_dict else encoding["input_ids"]

    def control_tokens(self) -> list[str]:
        """The texts that the vocabulary reads as special tokens wherever they stand."""
        found: list[str] | None = self.__dict__.get("_control_tokens")
        if found is None:
            added = self._tokenizer.get_added_tokens_decoder().values()
            found = [token.content for token in added if token.special and not token.content.isspace()]
            self.__dict__["_control_tokens"] = found
        return list(found)


def assistant_masks(encodings: Sequence[Encoding], spans: Sequence[Sequence[tuple[int, int]]], attention: Any) -> Any:
    """1 for the tokens that lie in one of the spans of their text, 0 for others and for padding.

    Args:
        encodings: Of the texts, not padded.
        spans: Of each text, in characters.
        attention: The attention mask, (texts, tokens), or (tokens,) for one text; list, array or tensor.

    Returns:
        The same form as `attention`.
    """
    rows = plain_list(attention)
    is_batch = not rows or isinstance(rows[0], list)
    masks = []
    for encoding, places, row in zip(encodings, spans, rows if is_batch else [rows], strict=True):
        inside = iter([
            int(any(start < last and end > first for first, last in places)) for start, end in encoding.offsets
        ])  # fmt: skip
        masks.append([next(inside) if real else 0 for real in row])
    result = masks if is_batch else masks[0]
    if isinstance(attention, torch.Tensor):
        return torch.tensor(result, device=attention.device)
    return np.array(result) if isinstance(attention, np.ndarray) else result


def encode_typed(backend: Tokenizer, literal: Tokenizer, text: str) -> Encoding:
    """Ids of `text`, what stands between the TYPED marks taken as plain text; no special tokens are put around it.

    Args:
        backend: The tokenizer.
        literal: Its twin that reads special tokens as plain text.
        text: May hold marks; offsets are those of the text without them.

    Raises:
        InputError: A typed control token comes out as that control token all the same.
    """
    encodings = []
    for number, piece in enumerate(_TYPED.split(text)):
        piece = piece.replace(TYPED_START, "").replace(TYPED_END, "")
        typed = number % 2 == 1
        encoding = (literal if typed else backend).encode(piece, add_special_tokens=False)
        if typed and backend.token_to_id(piece) in encoding.ids:
            raise InputError(f"{piece!r} cannot be written as plain text: this vocabulary has no other token for it.")
        encodings.append(encoding)
    return Encoding.merge(encodings, growing_offsets=True)
