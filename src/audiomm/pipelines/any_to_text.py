"""Text out of text, pictures, video and sound: text-generation, image-text-to-text, audio-text-to-text, any-to-any.

One pipeline serves the four tasks, which differ in what they must be given. Interface and results are those of
transformers: a chat in gives the chat with the answer out, a text in gives the text with its continuation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ..auto import AutoModelForCausalLM
from ..base.errors import InputError
from ..generation.streamers import TextIteratorStreamer
from .base import Pipeline, batched, positive
from .request import flat

_KINDS = {"images": "image", "audio": "audio", "videos": "video"}
#: Options of a call by what takes them: the template, the processor, its text part; all others go to `generate`.
_TEMPLATE_OPTIONS = frozenset(
    {"tools", "documents", "chat_template", "enable_thinking", "load_audio_from_video", "sanitize_control_tokens"}
)
_PROCESSOR_OPTIONS = frozenset(
    {"allow_urls", "allowed_hosts", "sampling_rate", "images_kwargs", "audio_kwargs", "videos_kwargs", "text_kwargs"}
)
_TEXT_OPTIONS = frozenset({"add_special_tokens", "padding", "truncation"})
#: Options of transformers that change nothing here.
_SILENT_OPTIONS = frozenset({"clean_up_tokenization_spaces", "return_text", "timeout"})


@dataclass(frozen=True)
class Ask:
    """One question: a text or a chat, and the media beside it."""

    prompt: Any
    media: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass
class Wishes:
    """What a call asks for besides its prompts: options by who takes them, and what the results hold."""

    generate: dict[str, Any]
    template: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    continue_last: bool | None = None
    full_text: bool = True
    as_tokens: bool = False
    skip_special_tokens: bool = True


class AnsweringPipeline(Pipeline):
    """What pipelines of models that write answers have in common."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model and its processor, so that `pipeline(model=folder)` finds both."""
        self.model.save_pretrained(save_directory, **kwargs)
        (self.processor if self.processor is not None else self.tokenizer).save_pretrained(save_directory)

    def generated(self, inputs: Mapping[str, Any], kwargs: dict[str, Any]) -> Any:
        """What `generate` makes of the processor's output."""
        moved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        with torch.no_grad():
            return self.model.generate(**moved, **kwargs)


class AnyToTextPipeline(AnsweringPipeline):
    """Continues texts and answers chats.

        pipe = pipeline("any-to-any", model="google/gemma-3n-E2B-it")
        pipe(text="<image_soft_token> Describe this image.", images="cat.png", max_new_tokens=20)
        pipe([{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What?"}]}])

    Args:
        model: A model that writes, like Gemma3nForConditionalGeneration.
        tokenizer: Its tokenizer, for models of text alone.
        processor: Its processor.
        task: What the results are called after.
        assistant_model: A smaller model that drafts, or where to read one; the answers stay what they are.
        kw: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls.

    Raises:
        InputError: There is neither a processor nor a tokenizer.
    """

    task = "any-to-any"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        processor: Any = None,
        task: str | None = None,
        assistant_model: Any = None,
        **kw: Any,
    ):
        super().__init__(model, tokenizer=tokenizer, processor=processor, **kw)
        self.task = task or self.task
        if self.processor is None and self.tokenizer is None:
            raise InputError(f"{self.task}: the model needs a processor or a tokenizer; pass processor= or tokenizer=.")
        if assistant_model is not None:
            self.call_defaults["assistant_model"] = assistant_model
            self._read_assistant(AutoModelForCausalLM)

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, audio: Any = None, **kw: Any) -> Any:
        """Answer one prompt, or each of several.

        Args:
            text: A text, a chat ([{"role", "content"}, ...]), a dict with "text" and media, or a list or an iterator of
                those. Texts have a mark for each medium.
            images, videos, audio: Media for the marks, as the processor takes them; with a chat, for those of its
                parts that name none. With a list of prompts, a list with an entry (one medium or a list) for each.
            kw: batch_size: prompts that go through the model together. return_full_text=False: the answer alone.
                return_tensors=True: "generated_token_ids" in place of text. skip_special_tokens=False: control tokens
                in the text, too. continue_final_message: go on with the last message; None does so where that is the
                assistant's. tools, documents, chat_template, enable_thinking, load_audio_from_video: for the template.
                prefix: text before each text. allow_urls, allowed_hosts, images_kwargs, ..., processor_kwargs: for the
                processor. add_special_tokens, truncation, tokenizer_encode_kwargs: for the tokenizer. stop_sequence,
                generate_kwargs and all others: for `generate` (max_new_tokens, do_sample, streamer, ...).

        Returns:
            For one prompt a list with a dict for each answer (num_return_sequences): "generated_text", and, but for
            text-generation, "input_text". For several chats a list of those lists; for a list of texts one flat list
            of dicts, as in transformers. For an iterator an iterator that answers as it is read.

        Raises:
            InputError: There is no prompt, its media do not fit, or an option is wrong.
            GenerationError: `generate` was asked for something impossible.
        """
        return self._run(text, {"images": images, "audio": audio, "videos": videos}, kw, joined=True)

    def stream(self, text: Any = None, **kwargs: Any) -> Iterator[str]:
        """The answer to one prompt in pieces, as it is written; arguments as for `AnyToTextPipeline`'s call.

        Writing ends early when the reader closes the iterator.

        Raises:
            InputError: More than one prompt was given; and whatever a call raises.
        """
        decoder = self.processor if self.processor is not None else self.tokenizer
        skip = kwargs.get("skip_special_tokens", True)
        streamer = TextIteratorStreamer(decoder, skip_prompt=True, skip_special_tokens=skip)
        failures: list[BaseException] = []
        is_closed = threading.Event()
        media = {name: kwargs.pop(name, None) for name in _KINDS}
        kwargs["stopping_criteria"] = [*kwargs.get("stopping_criteria", ()), lambda *_, **__: is_closed.is_set()]

        def work() -> None:
            try:
                self._run(text, media, {**kwargs, "streamer": streamer})
            except BaseException as error:  # handed over to the reader
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            is_closed.set()
            thread.join()
        if failures:
            raise failures[0]

    # ------------------------------------------------------------------ what is asked

    def _run(self, text: Any, media: dict[str, Any], kw: dict[str, Any], joined: bool = False) -> Any:
        """Answers to one, several or a stream of prompts; `joined` makes one list of those to texts."""
        own = kw.get("generate_kwargs") or {}
        kw = {**{name: value for name, value in flat(self.call_defaults).items() if name not in own}, **kw}
        kw.pop("num_workers", None)
        size = kw.pop("batch_size", None)
        size = self.batch_size if size is None else positive("batch_size", size)
        wishes = self._wishes(kw)
        media = {name: value for name, value in media.items() if value is not None}
        if text is None and not media:
            raise InputError(f"{self.task} needs text=, images=, audio= or videos=; all are None.")
        if text is None or isinstance(text, (str, Mapping)) or _is_chat(text):
            return next(self._results([_ask(text, media)], size, wishes))
        if not isinstance(text, Iterable):
            raise InputError(f"text is a {type(text).__name__}; a text, a chat or a list of either is needed.")
        if not isinstance(text, (list, tuple)):
            if media:
                raise InputError(
                    f"{', '.join(media)} beside an iterator of prompts; pass dicts with 'text' and media in it."
                )
            return self._results((_ask(item, {}) for item in text), size, wishes)
        if not text:
            raise InputError("text is an empty list; pass at least one prompt.")
        for name, value in media.items():
            count = len(value) if isinstance(value, (list, tuple)) else 1
            if count != len(text) or not isinstance(value, (list, tuple)):
                raise InputError(f"{len(text)} prompts, but {name} has {count} entries; pass one (or a list) for each.")
        asks = [_ask(item, {name: value[at] for name, value in media.items()}) for at, item in enumerate(text)]
        results = list(self._results(asks, size, wishes))
        return list(chain.from_iterable(results)) if joined and isinstance(text[0], str) else results

    def _wishes(self, kw: dict[str, Any]) -> Wishes:
        """The options of a call, by who takes them."""
        own = kw.pop("generate_kwargs", None) or {}
        if not isinstance(own, Mapping):
            raise InputError(f"generate_kwargs is a {type(own).__name__}; a dict of options of generate() is needed.")
        twice = sorted(set(own) & set(kw))
        if twice:
            raise InputError(f"{', '.join(twice)}: passed both in generate_kwargs and directly; pass it once.")
        kw = {**own, **kw}
        mode = kw.pop("generation_mode", None)
        if mode not in (None, "text"):
            raise InputError(f"generation_mode={mode!r}: {type(self.model).__name__} writes 'text' only.")
        if kw.pop("handle_long_generation", None) is not None:
            raise InputError(
                "handle_long_generation: prompts are never cut silently; pass truncation=True, max_length=."
            )
        if "stop_sequence" in kw:
            stop = kw.pop("stop_sequence")
            kw["stop_strings"] = [stop] if isinstance(stop, str) else stop
        wishes = Wishes({})
        wishes.prefix = kw.pop("prefix", None) or ""
        wishes.continue_last = kw.pop("continue_final_message", None)
        wishes.full_text = kw.pop("return_full_text", None) is not False
        wishes.as_tokens = bool(kw.pop("return_tensors", None))
        wishes.skip_special_tokens = kw.pop("skip_special_tokens", None) is not False
        wishes.processor = {
            **(kw.pop("processor_kwargs", None) or {}),
            **(kw.pop("tokenizer_encode_kwargs", None) or {}),
        }
        if kw.get("truncation"):
            # As in transformers, one number limits the prompt and the whole.
            wishes.processor.setdefault("max_length", kw.get("max_length"))
        for name, value in kw.items():
            if name in _TEMPLATE_OPTIONS:
                wishes.template[name] = value
            elif name in _PROCESSOR_OPTIONS or name in _TEXT_OPTIONS:
                wishes.processor[name] = value
            elif name not in _SILENT_OPTIONS:
                wishes.generate[name] = value
        wishes.generate = self._with_defaults(wishes.generate)
        return wishes

    def _with_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options for `generate`, with the task's own where neither the call nor the model's file says anything."""
        given = kwargs.get("generation_config")
        known = {**self.model.generation_config.to_diff_dict(), **(given.to_diff_dict() if given else {}), **kwargs}
        added: dict[str, Any] = {}
        if "max_new_tokens" not in known and "max_length" not in known:
            added["max_new_tokens"] = 256
        if self.task == "text-generation":
            added |= {"do_sample": True} if "do_sample" not in known else {}
            if {**known, **added}["do_sample"] and "temperature" not in known:
                added["temperature"] = 0.7
        if "stop_strings" in kwargs and "tokenizer" not in kwargs:
            added["tokenizer"] = self.tokenizer
        return {**added, **kwargs}

    # ------------------------------------------------------------------ prompts to answers

    def _results(self, asks: Iterable[Ask], size: int, wishes: Wishes) -> Iterator[list[dict[str, Any]]]:
        for batch in batched(iter(asks), size):
            yield from self._answers(batch, wishes)

    def _answers(self, asks: list[Ask], wishes: Wishes) -> list[list[dict[str, Any]]]:
        """Answers for one batch of prompts."""
        if len({ask.is_chat for ask in asks}) > 1:
            raise InputError("chats and texts in one batch; pass them in separate calls, or batch_size=1.")
        inputs, goes_on = self._inputs(asks, wishes)
        output = self.generated(inputs, wishes.generate)
        sequences: torch.Tensor = getattr(output, "sequences", output)
        length = inputs["input_ids"].shape[1]
        each = len(sequences) // len(asks)
        results: list[list[dict[str, Any]]] = []
        for row, sequence in enumerate(sequences):
            ask = asks[row // each]
            # Padding in front is there for the neighbours in the batch.
            prompt, new = sequence[:length][inputs["attention_mask"][row // each] > 0], sequence[length:]
            found: dict[str, Any] = {} if self.task == "text-generation" else {"input_text": ask.prompt}
            if wishes.as_tokens:
                tokens = torch.cat([prompt.to(new.device), new]) if wishes.full_text else new
                found["generated_token_ids"] = tokens.tolist() if self.task == "text-generation" else tokens
            else:
                found["generated_text"] = self._answer(ask, prompt, new, goes_on, wishes)
            if self.task == "text-generation" and output is not sequences:
                found |= _scores_of(output, row)
            if row % each == 0:
                results.append([])
            results[-1].append(found)
        return results

    def _inputs(self, asks: list[Ask], wishes: Wishes) -> tuple[Any, bool]:
        """The model's inputs for a batch, and whether last messages are continued."""
        options: dict[str, Any] = {"padding": True, "padding_side": "left"} if len(asks) > 1 else {}
        options = {**options, **wishes.processor}
        if self.feature_extractor is not None:
            # A clip that is too long is an error here, not cut.
            options["audio_kwargs"] = {"truncation": False, **(options.get("audio_kwargs") or {})}
        if not asks[0].is_chat:
            return self._encode(
                [wishes.prefix + ask.prompt for ask in asks], [ask.media for ask in asks], options
            ), False
        options.pop("add_special_tokens", None)  # the template writes them
        chats = [_with_media(ask) for ask in asks]
        goes_on = all(chat[-1].get("role") in ("assistant", "model") for chat in chats)
        goes_on = goes_on if wishes.continue_last is None else wishes.continue_last
        reader = self.processor if self.processor is not None else self.tokenizer
        packed = "processor_kwargs" if self.processor is not None else "tokenizer_kwargs"
        return reader.apply_chat_template(
            chats,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **wishes.template,
            **{packed: options},
        ), goes_on

    def _encode(self, texts: list[str], media: list[dict[str, Any]], options: dict[str, Any]) -> Any:
        if self.processor is None:
            if any(media):
                raise InputError(f"{', '.join(media[0])} were passed, but this model reads text alone.")
            return self.tokenizer(texts, return_tensors="pt", **options)
        names = dict.fromkeys(name for row in media for name in row)
        rows = {name: [_as_list(row.get(name)) for row in media] for name in names}
        wanted = texts if any(texts) or not any(media) else None
        return self.processor(text=wanted, return_tensors="pt", **rows, **options)

    def _answer(self, ask: Ask, prompt: torch.Tensor, new: torch.Tensor, goes_on: bool, wishes: Wishes) -> Any:
        """What "generated_text" holds."""
        text = str(self.tokenizer.decode(new, skip_special_tokens=wishes.skip_special_tokens))
        if not wishes.full_text:
            return text
        if not ask.is_chat:
            return ask.prompt + text
        messages: Sequence[Any] = list(ask.prompt)
        if not goes_on:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if wishes.skip_special_tokens and hasattr(self.processor, "parse_response"):
                parsed = self.processor.parse_response(new, prefix=prompt, tools=wishes.template.get("tools"))
                # Without its marks the text of a thought or of a tool call is nothing that could be told apart.
                message = parsed if {"reasoning_content", "tool_calls"} & set(parsed) else message
            return [*messages, message]
        last = messages[-1]
        content = last["content"]
        if isinstance(content, str):
            content = content + text
        else:
            content = [*content[:-1], {**content[-1], "text": content[-1].get("text", "") + text}]
        return [*messages[:-1], {**last, "content": content}]


class TextGenerationPipeline(AnyToTextPipeline):
    """Continues texts and answers chats of text alone; samples unless the model's file or the call says otherwise.

    generator = pipeline("text-generation", model="google/gemma-3n-E2B-it")
    generator("Once upon a time", max_new_tokens=20, do_sample=False)
    """

    task = "text-generation"

    def __call__(self, text_inputs: Any, **kw: Any) -> Any:  # type: ignore[override]
        """Answer one text or chat, or each of several; `kw` and results as for `AnyToTextPipeline`, lists in lists."""
        return self._run(text_inputs, {}, kw)


class ImageTextToTextPipeline(AnyToTextPipeline):
    """Answers questions about pictures; the picture comes first.

    pipe = pipeline("image-text-to-text", model="google/gemma-3n-E2B-it")
    pipe("cat.png", "<image_soft_token> Describe this image.", max_new_tokens=20)
    """

    task = "image-text-to-text"

    def __call__(self, images: Any = None, text: Any = None, **kw: Any) -> Any:  # type: ignore[override]
        """Answer one prompt, or each of several; see `AnyToTextPipeline`. A chat may come first, alone."""
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        if text is None and (isinstance(first, Mapping) or _is_chat(first) or isinstance(images, Iterator)):
            text, images = images, None
        media = {"images": images, "videos": kw.pop("videos", None), "audio": kw.pop("audio", None)}
        return self._run(text, media, kw, joined=images is not None)


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _ask(item: Any, media: dict[str, Any]) -> Ask:
    """A prompt from a text, a chat, or a dict with "text" and media in it."""
    if isinstance(item, Mapping) and "role" not in item:
        named = {plural: item.get(plural, item.get(kind)) for plural, kind in _KINDS.items()}
        unknown = set(item) - {"text", *_KINDS, *_KINDS.values()}
        if unknown:
            raise InputError(
                f"a prompt has the keys {', '.join(sorted(unknown))}; known are text, images, audio, videos."
            )
        item, media = item.get("text"), {**media, **{name: one for name, one in named.items() if one is not None}}
    if item is None and media:
        item = ""
    if not isinstance(item, str) and not _is_chat(item):
        raise InputError(f"a prompt is {str(item)[:80]!r}; a text or a chat, a list of dicts with 'role', is needed.")
    return Ask(item, {name: value for name, value in media.items() if value is not None})


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _with_media(ask: Ask) -> list[dict[str, Any]]:
    """The messages of a chat with the media passed beside it in the parts that name none.

    Raises:
        InputError: There are more or fewer media than such parts.
    """
    waiting = {_KINDS[name]: _as_list(value) for name, value in ask.media.items()}
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


def _scores_of(output: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What `generate` gave for each step of a row ("scores", "logits"), as lists."""
    steps = {name: value for name, value in output.items() if isinstance(value, tuple) and value}
    return {
        name: torch.stack([step[row] for step in value]).tolist()
        for name, value in steps.items()
        if all(isinstance(step, torch.Tensor) for step in value)
    }
