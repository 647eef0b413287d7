"""Text out of text, pictures, video and sound: text-generation, image-text-to-text, audio-text-to-text, any-to-any.

One pipeline serves the four tasks, which differ in what they must be given. Interface and results are those of
transformers: a chat in gives the chat with the answer out, a text in gives the text with its continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..base.errors import InputError
from ..generation.streamers import TextIteratorStreamer
from .base import Pipeline, batched

#: Tokens of an answer when neither the call nor the model's generation config says how many.
DEFAULT_NEW_TOKENS = 256

_PROMPT_OPTIONS = ("tools", "documents", "chat_template", "enable_thinking", "processor_kwargs")
_CALL_OPTIONS = ("allow_urls", "allowed_hosts", "images_kwargs", "audio_kwargs", "videos_kwargs", "text_kwargs")


@dataclass(frozen=True)
class Ask:
    """One question: a text or a chat, and the media beside it."""

    prompt: Any
    media: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


class AnyToTextPipeline(Pipeline):
    """Continues texts and answers chats.

        pipe = pipeline("image-text-to-text", model="google/gemma-3n-E2B-it")
        pipe(images="cat.png", text="<image_soft_token> Describe this image.", max_new_tokens=20)
        pipe([{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What?"}]}])

    Args:
        model: A model that writes, like Gemma3nForConditionalGeneration.
        tokenizer: Its tokenizer, for models of text alone.
        processor: Its processor.
        task: What the results are called after.
        kwargs: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls.

    Raises:
        InputError: There is neither a processor nor a tokenizer.
    """

    task = "any-to-any"

    def __init__(self, model: Any, tokenizer: Any = None, processor: Any = None, task: str | None = None, **kw: Any):
        super().__init__(model, tokenizer=tokenizer, processor=processor, **kw)
        self.task = task or self.task
        if self.processor is None and self.tokenizer is None:
            raise InputError(f"{self.task}: the model needs a processor or a tokenizer; pass processor= or tokenizer=.")

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        *,
        batch_size: int | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool = True,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one prompt, or each of a list.

        Args:
            text: A text, a chat ([{"role", "content"}, ...]), or a list of either. Texts have a mark for each medium.
            images, audio, videos: Media for the marks, as the processor takes them; with a chat, for those of its
                parts that name none.
            batch_size: Prompts that go through the model together.
            return_full_text: Give the prompt back, too; True unless given.
            return_tensors: Give "generated_token_ids" in place of text.
            continue_final_message: Go on with the last message instead of answering it; None does so where that is the
                assistant's.
            skip_special_tokens: Leave control tokens out of the text.
            num_workers: Accepted for compatibility.
            kwargs: tools, documents, chat_template, enable_thinking for the template; allow_urls, allowed_hosts,
                images_kwargs, ... for the processor; generate_kwargs and all others for `generate` (max_new_tokens,
                do_sample, streamer, ...).

        Returns:
            For one prompt a list with a dict for each answer (num_return_sequences): "generated_text", and, but for
            text-generation, "input_text". A list of those lists for a list of prompts.

        Raises:
            InputError: There is no prompt, or its media do not fit.
            GenerationError: `generate` was asked for something impossible.
        """
        asked = {**self.call_defaults, **kwargs}
        asked = {**(asked.pop("generate_kwargs", None) or {}), **asked}
        asked.update(asked.pop("processing_kwargs", None) or {})
        prompt_options = {name: asked.pop(name) for name in _PROMPT_OPTIONS if name in asked}
        call_options = {name: asked.pop(name) for name in _CALL_OPTIONS if name in asked}
        asks, is_list = self._asks(text, {"images": images, "audio": audio, "videos": videos})
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise InputError(f"batch_size={size!r}: a whole number of at least 1 is needed.")

        def results() -> Iterator[list[dict[str, Any]]]:
            for batch in batched(iter(asks), size):
                yield from self._answers(
                    batch,
                    prompt_options,
                    call_options,
                    asked,
                    continue_final_message,
                    (return_full_text is not False, return_tensors, skip_special_tokens),
                )

        answers = list(results())
        return answers if is_list else answers[0]

    def stream(self, text: Any = None, **kwargs: Any) -> Iterator[str]:
        """The answer to one prompt in pieces, as it is written; arguments as for a call.

        Raises:
            InputError: More than one prompt was given; and whatever a call raises.
        """
        import threading

        decoder = self.processor if self.processor is not None else self.tokenizer
        streamer = TextIteratorStreamer(decoder, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self(text, streamer=streamer, **kwargs)
            except BaseException as error:  # handed over to the reader
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]

    def _asks(self, text: Any, media: dict[str, Any]) -> tuple[list[Ask], bool]:
        """The prompts, each with its media, and whether they were a list."""
        media = {name: value for name, value in media.items() if value is not None}
        if isinstance(text, Mapping) or (isinstance(text, str) and not text and not media):
            raise InputError(f"text is {text!r}; a text, a chat (a list of messages) or a list of either is needed.")
        if text is None:
            if not media:
                raise InputError(f"{self.task} needs text=, images=, audio= or videos=; all are None.")
            return [Ask("", media)], False
        if isinstance(text, str) or _is_chat(text):
            return [Ask(text, media)], False
        prompts = list(text)
        if not prompts:
            raise InputError("text is an empty list; pass at least one prompt.")
        for name, value in media.items():
            if not isinstance(value, (list, tuple)) or len(value) != len(prompts):
                count = len(value) if isinstance(value, (list, tuple)) else 1
                raise InputError(
                    f"{len(prompts)} prompts, but {name} has {count} entries; pass one (or a list) for each."
                )
        return [
            Ask(prompt, {name: value[at] for name, value in media.items()}) for at, prompt in enumerate(prompts)
        ], True

    def _answers(
        self,
        asks: list[Ask],
        prompt_options: dict[str, Any],
        call_options: dict[str, Any],
        generate_kwargs: dict[str, Any],
        continue_last: bool | None,
        output: tuple[bool, bool, bool],
    ) -> list[list[dict[str, Any]]]:
        """Answers for one batch of prompts."""
        if len({ask.is_chat for ask in asks}) > 1:
            raise InputError("chats and texts in one batch; pass them in separate calls, or batch_size=1.")
        inputs, goes_on = self._inputs(asks, prompt_options, call_options, continue_last)
        generated = self._generate(inputs, generate_kwargs)
        length = inputs["input_ids"].shape[1]
        new = generated[:, length:]
        each = len(new) // len(asks)
        full, as_tensors, skip = output
        texts = [self._decode(row, skip) for row in new]
        results = []
        for number, ask in enumerate(asks):
            rows = range(number * each, (number + 1) * each)
            if as_tensors:
                found = [{"generated_token_ids": (generated if full else new)[row].tolist()} for row in rows]
            else:
                found = [{"generated_text": _with_answer(ask, texts[row], goes_on, full)} for row in rows]
            if self.task != "text-generation":
                found = [{"input_text": ask.prompt, **one} for one in found]
            results.append(found)
        return results

    def _inputs(
        self, asks: list[Ask], prompt_options: dict[str, Any], call_options: dict[str, Any], continue_last: bool | None
    ) -> tuple[Any, bool]:
        """The model's inputs for a batch, and whether last messages are continued."""
        if not asks[0].is_chat:
            return self._encode([ask.prompt for ask in asks], [ask.media for ask in asks], call_options), False
        chats = [_with_media(ask) for ask in asks]
        goes_on = all(chat[-1].get("role") in ("assistant", "model") for chat in chats)
        goes_on = goes_on if continue_last is None else continue_last
        options = dict(prompt_options)
        template_of = self.processor if self.processor is not None else self.tokenizer
        packed = "processor_kwargs" if self.processor is not None else "tokenizer_kwargs"
        options[packed] = {"padding": len(chats) > 1, **call_options, **(options.pop("processor_kwargs", None) or {})}
        return template_of.apply_chat_template(
            chats,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        ), goes_on

    def _encode(self, texts: list[str], media: list[dict[str, Any]], call_options: dict[str, Any]) -> Any:
        if self.processor is None:
            if any(media):
                raise InputError(f"{', '.join(media[0])} were passed, but this model reads text alone.")
            return self.tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
        names = dict.fromkeys(name for row in media for name in row)
        rows = {name: [_as_list(row.get(name)) for row in media] for name in names}
        return self.processor(
            text=texts if any(texts) else None, padding=len(texts) > 1, return_tensors="pt", **rows, **call_options
        )

    def _generate(self, inputs: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """The sequences, prompt included."""
        moved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        config = self.model.generation_config
        if not {"max_new_tokens", "max_length"} & set(kwargs) and not (config.max_new_tokens or config.max_length):
            kwargs = {"max_new_tokens": DEFAULT_NEW_TOKENS, **kwargs}
        if "stop_strings" in kwargs:
            kwargs = {"tokenizer": self.tokenizer, **kwargs}
        with torch.no_grad():
            generated = self.model.generate(**moved, **kwargs)
        sequences: torch.Tensor = getattr(generated, "sequences", generated)
        return sequences

    def _decode(self, row: torch.Tensor, skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens))


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _with_media(ask: Ask) -> list[dict[str, Any]]:
    """The messages of a chat with the media passed beside it in the parts that name none.

    Raises:
        InputError: There are more or fewer media than such parts.
    """
    waiting = {name.rstrip("s"): _as_list(value) for name, value in ask.media.items()}
    given = {kind: len(items) for kind, items in waiting.items()}
    messages = []
    for message in ask.prompt:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in waiting and not any(name in part for name in (kind, "url", "path", "base64")):
                    if not waiting[kind]:
                        raise InputError(f"the chat has more {kind} parts than the {given[kind]} that were passed.")
                    part = {**part, kind: waiting[kind].pop(0)}
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    for kind, left in waiting.items():
        if left:
            raise InputError(
                f"{given[kind]} {kind} inputs were passed, but {len(left)} of them have no place: the chat needs a "
                f'{{"type": "{kind}"}} part for each.'
            )
    return messages


def _with_answer(ask: Ask, text: str, goes_on: bool, full: bool) -> Any:
    """What "generated_text" holds."""
    if not full:
        return text
    if not ask.is_chat:
        return ask.prompt + text
    messages: Sequence[Any] = list(ask.prompt)
    if not goes_on:
        return [*messages, {"role": "assistant", "content": text}]
    last = messages[-1]
    content = last["content"]
    if isinstance(content, str):
        content = content + text
    else:
        content = [*content[:-1], {**content[-1], "text": content[-1].get("text", "") + text}]
    return [*messages[:-1], {**last, "content": content}]
