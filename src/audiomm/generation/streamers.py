"""Streamers: objects that take tokens while they are generated and hand on text as soon as it is certain.

Names and behaviour are those of transformers: `put` is called with the prompt first and then with each token, `end`
once. Text is held back until a word is complete, as later tokens may change how it is written.
"""

from __future__ import annotations

import asyncio
import sys
import unicodedata
from queue import Queue
from typing import Any

from torch import Tensor

from ..base.errors import GenerationError


class BaseStreamer:
    """Base of all streamers."""

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, length) or a token (1,), on the CPU."""
        raise GenerationError(f"{type(self).__name__} does not define put(value).")

    def end(self) -> None:
        """Take notice that generation is over, with or without an error."""
        raise GenerationError(f"{type(self).__name__} does not define end().")


class TextStreamer(BaseStreamer):
    """Write text to standard output, word by word.

    Args:
        tokenizer: Anything with decode(ids, **decode_kwargs).
        skip_prompt: Leave the prompt out.
        **decode_kwargs: Passed on to decode, skip_special_tokens=True for example.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._tokens: list[int] = []
        self._written = 0
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """Take tokens of one sequence and hand on what text is certain.

        Raises:
            GenerationError: There is more than one sequence.
        """
        if value.dim() > 1 and value.shape[0] > 1:
            raise GenerationError(
                f"{type(self).__name__} takes one sequence, but tokens of {value.shape[0]} were put: generate with a "
                "batch of 1 and num_return_sequences=1."
            )
        was_prompt, self._prompt_is_next = self._prompt_is_next, False
        if was_prompt and self.skip_prompt:
            return
        self._tokens.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self._tokens, **self.decode_kwargs)
        if text.endswith("\n"):
            ready = text[self._written :]
            self._tokens, self._written = [], 0
        elif text and _is_wide(text[-1]):
            ready = text[self._written :]
            self._written += len(ready)
        else:
            ready = text[self._written : text.rfind(" ") + 1]
            self._written += len(ready)
        self.on_finalized_text(ready)

    def end(self) -> None:
        """Hand on the rest, and get ready for the next sequence."""
        rest = self.tokenizer.decode(self._tokens, **self.decode_kwargs)[self._written :] if self._tokens else ""
        self._tokens, self._written = [], 0
        self._prompt_is_next = True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of certain text (possibly empty), lastly with `stream_end`."""
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def _is_wide(character: str) -> bool:
    """True for Chinese characters, which are words of their own with no space between them."""
    return unicodedata.name(character, "").startswith(("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH"))


class TextIteratorStreamer(TextStreamer):
    """An iterator over pieces of text, for a reader in another thread than generate().

    Args:
        tokenizer: Anything with decode(ids, **decode_kwargs).
        skip_prompt: Leave the prompt out.
        timeout: How long to wait for a piece, in seconds; None is for ever.
        **decode_kwargs: Passed on to decode.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(None, timeout=self.timeout)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        """The next piece; raises queue.Empty after `timeout` seconds without one."""
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


class AsyncTextIteratorStreamer(TextStreamer):
    """An asynchronous iterator over pieces of text; make it inside the running event loop that reads it.

    Args:
        tokenizer: Anything with decode(ids, **decode_kwargs).
        skip_prompt: Leave the prompt out.
        timeout: How long to wait for a piece, in seconds; None is for ever.
        **decode_kwargs: Passed on to decode.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.timeout = timeout
        self.loop = asyncio.get_running_loop()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, text)
        if stream_end:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, None)

    def __aiter__(self) -> AsyncTextIteratorStreamer:
        return self

    async def __anext__(self) -> str:
        """The next piece; raises TimeoutError after `timeout` seconds without one."""
        piece = await asyncio.wait_for(self.text_queue.get(), timeout=self.timeout)
        if piece is None:
            raise StopAsyncIteration
        return piece
