"""MultimodalProcessor: text, pictures, clips and videos in any order to what a model reads, and chats on top of it.

The call, the keys and `apply_chat_template` are those of transformers' processors. Three things differ on purpose: a
limit of tokens never reaches the audio extractor, counts of marks and media are compared text by text, and a URL is
fetched only where the caller allows it.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..base.chat import (
    conversations_of,
    find_media,
    mark_typed,
    render_chat,
    resolve_template,
    typed_marker,
    with_sound_of_videos,
    without_typed,
)
from ..base.errors import InputError, PlaceholderError
from ..base.sandbox import variables_of
from ..base.tokenizer import PreTrainedTokenizer
from ..base.tokenizer_chat import assistant_masks
from ..base.tool_schema import tool_schemas
from ..media.audio import load_audio
from ..media.fetch import FetchLimits
from .base import BatchFeature
from .placeholders import Rows, check_counts, expand, is_clip, is_image, is_video, marks, shifted
from .processor import ProcessorMixin

logger = logging.getLogger("audiomm.feature_extraction")

#: Options of a call that belong to one kind of input each.
_GROUPS = ("text_kwargs", "images_kwargs", "audio_kwargs", "videos_kwargs")
_TEXT_OPTIONS = frozenset(inspect.signature(PreTrainedTokenizer.encode_texts).parameters) - {"self", "text"}
_AUDIO_OPTIONS = frozenset({"sampling_rate", "device", "load_audio_backend"})
_FETCH_OPTIONS = frozenset({"allow_urls", "allowed_hosts"})
#: Options that transformers knows and that have no effect here.
_SILENT_OPTIONS = frozenset({"load_audio_backend"})


class MultimodalProcessor(ProcessorMixin):
    """Base of the processors of models that read text with media in it.

    A subclass says in `text_defaults` which options its texts take unless told, and in `image_text`, `audio_text` and
    `video_text` what takes the place of a mark.
    """

    text_defaults: ClassVar[dict[str, Any]] = {}
    #: Name of the entry that tells tokens of text (0), images (1), videos (2) and clips (3) apart.
    type_ids_name: ClassVar[str] = "mm_token_type_ids"
    #: Entries of extractors that only serve to count, and are not for the model.
    counted_names: ClassVar[frozenset[str]] = frozenset()
    #: Used where the checkpoint brings no chat template.
    fallback_template: ClassVar[str | None] = None

    image_processor: Any = None
    video_processor: Any = None

    def image_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of image `index`."""
        raise TypeError(f"{type(self).__name__} takes no images.")

    def audio_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of clip `index`."""
        raise TypeError(f"{type(self).__name__} takes no audio.")

    def video_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of video `index`."""
        raise TypeError(f"{type(self).__name__} takes no videos.")

    @property
    def image_token(self) -> str | None:
        """The mark of an image in text, and what one of its tokens is in the ids."""
        return getattr(self.tokenizer, "image_token", None)

    @property
    def audio_token(self) -> str | None:
        """The mark of a clip in text, and what one of its tokens is in the ids."""
        return getattr(self.tokenizer, "audio_token", None)

    @property
    def video_token(self) -> str | None:
        """The mark of a video in text, and what one of its tokens is in the ids."""
        return getattr(self.tokenizer, "video_token", None)

    @property
    def image_token_id(self) -> int | None:
        """Id of `image_token`."""
        return getattr(self.tokenizer, "image_token_id", None)

    @property
    def audio_token_id(self) -> int | None:
        """Id of `audio_token`."""
        return getattr(self.tokenizer, "audio_token_id", None)

    @property
    def video_token_id(self) -> int | None:
        """Id of `video_token`."""
        return getattr(self.tokenizer, "video_token_id", None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return."""
        parts = [self.tokenizer, *self._present().values()]
        names = [*(name for part in parts for name in part.model_input_names), self.type_ids_name]
        return [name for name in dict.fromkeys(names) if name not in self.counted_names]

    # ------------------------------------------------------------------------------------------------ the call

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """Inputs for the model.

        Args:
            images: One picture, a list in reading order, or a list of lists, one for each text. A picture is an array
                or tensor, a PIL image, a path or bytes.
            text: A text or a list of texts, with a mark (`image_token`, `audio_token`, `video_token`) for each medium.
                None writes marks for all images, or one text for each clip.
            videos: One video, a list or a list of lists: frames, or a path.
            audio: One clip, a list or a list of lists: samples, or paths and dicts as `load_audio` reads them.
            **options: return_tensors ("pt", "np" or None); the tokenizer's (padding, truncation, max_length in tokens,
                add_special_tokens, ...); sampling_rate of the clips; settings of the image and video processors; the
                same by group in text_kwargs=, images_kwargs=, audio_kwargs=, videos_kwargs=; allow_urls= and
                allowed_hosts= for media named by URLs, which are otherwise refused; return_mm_token_type_ids=False
                leaves the types out.

        Returns:
            input_ids, attention_mask and token types (texts, tokens), and what the extractors make of the media.

        Raises:
            PlaceholderError: The marks and the media do not agree, or truncation cuts media off.
            InputError: An input cannot be used; its subclasses say why.
            TypeError: An option is not known.
        """
        media = {
            "image": Rows.of(images, is_image),
            "video": Rows.of(videos, is_video),
            "audio": Rows.of(audio, is_clip),
        }
        encoded, _ = self._encode(text, media, options)
        return encoded

    def _encode(
        self, text: str | Sequence[str] | None, media: Mapping[str, Rows | None], options: Mapping[str, Any]
    ) -> tuple[BatchFeature, list[Any]]:
        """The inputs, and for each text where its marks stood."""
        groups, limits, return_tensors, with_types = self._split_options(options)
        texts = self._texts(text, media)
        for kind, plural in (("image", "images"), ("video", "videos"), ("audio", "clips")):
            self._check_part(kind, plural, media[kind])
            mark = getattr(self, f"{kind}_token")
            if mark is not None:
                check_counts(plural, mark, texts, media[kind])
        features, replacements = self._features(media, groups, limits)
        texts, moved = expand(texts, replacements)
        encoding = self._tokenized(texts, groups["text_kwargs"])
        self._check_kept(texts, encoding["input_ids"])
        data = {**encoding, **{name: value for name, value in features.items() if name not in self.counted_names}}
        if with_types:
            data[self.type_ids_name] = [self._types(row) for row in encoding["input_ids"]]
        metadata = data.pop("video_metadata", None)
        batch = BatchFeature(data, return_tensors)
        if metadata is not None and options.get("return_metadata"):
            batch["video_metadata"] = metadata
        batch.__dict__["encodings"] = encoding.encodings
        return batch, moved

    def _split_options(
        self, options: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], FetchLimits | None, Any, bool]:
        """(options by group, what may be fetched, return_tensors, whether token types are wanted)."""
        groups = {name: dict(options.get(name) or {}) for name in _GROUPS}
        flat = {**(options.get("common_kwargs") or {}), **options}
        groups["text_kwargs"] = {**self.text_defaults, **groups["text_kwargs"]}
        tensors, types = flat.pop("return_tensors", None), flat.pop("return_mm_token_type_ids", True)
        for group in groups.values():
            tensors = group.pop("return_tensors", tensors)
            types = group.pop("return_mm_token_type_ids", types)
        fetching = {name: flat.pop(name) for name in _FETCH_OPTIONS if flat.get(name)}
        known = self._known_options()
        for name in set(flat) - {*_GROUPS, "common_kwargs", "return_metadata", *_FETCH_OPTIONS}:
            takers = [group for group, names in known.items() if name in names]
            if not takers:
                raise TypeError(f"{type(self).__name__}() got an option {name!r} that none of its parts knows.")
            for taker in takers:
                groups[taker][name] = flat[name]
        for name in _SILENT_OPTIONS:
            groups["audio_kwargs"].pop(name, None)
        return groups, FetchLimits(**fetching) if fetching else None, tensors, bool(types)

    def _known_options(self) -> dict[str, frozenset[str]]:
        """The names of options that go to each group when they are passed flat."""
        known = {"text_kwargs": _TEXT_OPTIONS, "audio_kwargs": _AUDIO_OPTIONS}
        for group, part in (("images_kwargs", self.image_processor), ("videos_kwargs", self.video_processor)):
            if part is not None:
                call = inspect.signature(type(part).__call__).parameters
                settings = set(vars(part)) - part.derived
                known[group] = frozenset({*call, *settings}) - {"self", "images", "videos", "limits", "settings"}
        return known

    def _texts(self, text: str | Sequence[str] | None, media: Mapping[str, Rows | None]) -> list[str]:
        """The texts as a list; written from the media where there are none.

        Raises:
            InputError: There is neither text nor media.
            TypeError: Something is not text.
        """
        if text is not None and not hasattr(text, "__iter__"):
            raise TypeError(f"text must be a string or a list of strings, not {type(text).__name__}.")
        if text is not None and text != []:
            texts = [text] if isinstance(text, str) else list(text)
            for number, item in enumerate(texts):
                if not isinstance(item, str):
                    raise TypeError(
                        f"text must be a string or a list of strings; item {number} is {type(item).__name__}."
                    )
            return [self._with_marks(item) for item in texts] if any(media.values()) else texts
        images = media["image"]
        if images is not None:
            return [" ".join([str(self.image_token)] * count) for count in images.counts or [len(images.items)]]
        for kind in ("audio", "video"):
            rows = media[kind]
            if rows is not None:
                return [" ".join([getattr(self, f"{kind}_token")] * n) for n in rows.counts or [1] * len(rows.items)]
        raise InputError(f"{type(self).__name__} needs text=, images=, audio= or videos=; all are None.")

    def _with_marks(self, text: str) -> str:
        """`text` with the family's other spellings of a mark brought to the usual one."""
        return text

    def _check_part(self, kind: str, plural: str, rows: Rows | None) -> None:
        part = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}[kind]
        if rows is not None and (getattr(self, part, None) is None or getattr(self, f"{kind}_token") is None):
            raise InputError(
                f"{len(rows.items)} {plural} were passed, but this {type(self).__name__} has no {part}: the checkpoint "
                f"does not take {plural}."
            )

    def _features(
        self, media: Mapping[str, Rows | None], groups: Mapping[str, dict[str, Any]], limits: FetchLimits | None
    ) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """(what the extractors make, {mark: what takes its places})."""
        features: dict[str, Any] = {}
        texts: dict[str, list[str]] = {}
        fetching = {} if limits is None else {"limits": limits}
        for kind, items in ((kind, rows.items) for kind, rows in media.items() if rows is not None):
            if kind == "image":
                made = self.image_processor(items, return_tensors="pt", **fetching, **groups["images_kwargs"])
                text_of = self.image_text
            elif kind == "video":
                made = self._video_features(items, {**fetching, **groups["videos_kwargs"]})
                text_of = self.video_text
            else:
                made = self._audio_features(items, groups["audio_kwargs"], limits)
                text_of = self.audio_text
            texts[getattr(self, f"{kind}_token")] = [text_of(made, index) for index in range(len(items))]
            features |= made
        return features, texts

    def _video_features(self, videos: list[Any], options: dict[str, Any]) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self.video_processor(
            videos, return_tensors="pt", **{**options, "return_metadata": True}
        )
        return made

    def _audio_features(
        self, clips: list[Any], options: dict[str, Any], limits: FetchLimits | None
    ) -> Mapping[str, Any]:
        """Features of clips, those that are not samples read first.

        A limit in tokens must not come here: transformers hands `max_length` on as a number of samples.
        """
        rate = self.feature_extractor.sampling_rate
        fetching = {} if limits is None else {"allow_urls": limits.allow_urls, "allowed_hosts": limits.allowed_hosts}
        files = [isinstance(clip, (str, bytes, os.PathLike, Mapping)) or hasattr(clip, "read") for clip in clips]
        loaded = [
            load_audio(clip, rate, **fetching) if is_file else clip  # type: ignore[arg-type]
            for clip, is_file in zip(clips, files, strict=True)
        ]
        if all(files):
            options = {**options, "sampling_rate": rate}
        made: Mapping[str, Any] = self.feature_extractor(loaded, return_tensors="pt", **options)
        return made

    def _tokenized(self, texts: list[str], options: dict[str, Any]) -> Any:
        """Ids of the texts; a text that begins with `<bos>` gets no second one."""
        tokenizer = self.tokenizer
        begin = tokenizer.bos_token
        if begin is not None and options.get("add_special_tokens", True) and tokenizer.num_special_tokens_to_add():
            if all(text.startswith(begin) for text in texts):
                # Texts that stay as they are keep the places in them right.
                options = {**options, "add_special_tokens": False}
            else:
                texts = [text.removeprefix(begin) for text in texts]
        return tokenizer(texts, **options)

    def _check_kept(self, texts: list[str], rows: list[list[int]]) -> None:
        """Every media token of the texts is in the ids.

        Raises:
            PlaceholderError: Truncation cut some off.
        """
        for kind in ("image", "video", "audio"):
            mark, mark_id = getattr(self, f"{kind}_token"), getattr(self, f"{kind}_token_id")
            for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
                wanted, found = (marks(text, mark), row.count(mark_id)) if mark is not None else (0, 0)
                if wanted != found:
                    raise PlaceholderError(
                        f"text {number} has {found} {kind} tokens in its {len(row)} ids but needs {wanted}: max_length "
                        "(in tokens) cuts media off. Raise it, or pass truncation=False."
                    )

    def _types(self, ids: list[int]) -> list[int]:
        kinds = {self.image_token_id: 1, self.video_token_id: 2, self.audio_token_id: 3}
        return [kinds.get(token, 0) for token in ids]

    # ------------------------------------------------------------------------------------------------ chats

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Messages as a prompt, with the media in their parts.

        Args:
            conversation: [{"role", "content"}, ...], or a list of those for a batch. Content is text, or parts:
                {"type": "text", "text": ...} and {"type": "image" | "audio" | "video", and the medium under "url",
                "path" or the type's own name}; OpenAI's parts are read too.
            chat_template: jinja2 text, or the name of one of the checkpoint's; None is the checkpoint's own.
            tools: JSON schemas, or functions with type hints and a docstring.
            documents: {"title", "text"} for templates that know them.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: Leave the last message open so that the model goes on with it.
            return_assistant_tokens_mask: Add `assistant_masks`, 1 for what the template's generation blocks wrote.
            tokenize: Return the model's inputs; False returns the text.
            return_tensors: "pt", "np", or None ("auto") for lists.
            return_dict: Return all inputs; False returns only the ids.
            load_audio_from_video: Let the model hear the sound of video files too, right behind their frames.
            processor_kwargs: Options of the call, such as padding=True, images_kwargs= or allow_urls=.
            sanitize_control_tokens: Encode control tokens written in messages as plain text: None does so for what
                users and tools say, True for everything, False for nothing.
            **kwargs: What the template reads (enable_thinking=True); options of the call are taken here too.

        Raises:
            PlaceholderError: The template writes other marks than there are media.
            InputError: The template refuses the messages, a medium cannot be read, or is a URL that is not allowed.
            ConfigError, UnsafeCheckpointError: The template is broken, or dangerous.
        """
        template = resolve_template(self.chat_template or self.fallback_template, chat_template, bool(tools))
        variables, options = self._split_chat_options(template, kwargs, processor_kwargs)
        conversations, is_batch = conversations_of(conversation)
        if load_audio_from_video:
            conversations = [with_sound_of_videos(chat) for chat in conversations]
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True.")
        sanitize = tokenize and sanitize_control_tokens is not False
        chats = conversations
        if sanitize:
            tokens = self._typed_tokens(options)
            chats = [mark_typed(chat, tokens, bool(sanitize_control_tokens)) for chat in conversations]
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
                **{**self.tokenizer.special_tokens_map, **variables},
            )
            for chat in chats
        ]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if is_batch else texts[0]
        if self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token):
            options.setdefault("add_special_tokens", False)
        options |= {"sanitize_control_tokens": sanitize}
        options |= {} if return_tensors == "auto" else {"return_tensors": return_tensors}
        media = self._chat_media(conversations, options)
        inputs, moved = self._encode(texts, media, options)
        if return_assistant_tokens_mask:
            self._add_assistant_masks(inputs, rendered, moved)
        return inputs if return_dict else inputs["input_ids"]

    def _split_chat_options(
        self, template: str, kwargs: dict[str, Any], processor_kwargs: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what the template reads, options of the call)."""
        read = variables_of(template)
        known = {name for names in self._known_options().values() for name in names}
        known |= {*_GROUPS, *_FETCH_OPTIONS, "common_kwargs", "return_mm_token_type_ids", "return_metadata"}
        own = {name for name in kwargs if name in known and name not in read}
        variables = {name: value for name, value in kwargs.items() if name not in own}
        return variables, {**{name: kwargs[name] for name in own}, **(processor_kwargs or {})}

    def _typed_tokens(self, options: Mapping[str, Any]) -> list[str]:
        """Control tokens that have no power in what users write; marks of media that come beside the messages have."""
        beside = {"images": self.image_token, "audio": self.audio_token, "videos": self.video_token}
        allowed = {mark for name, mark in beside.items() if options.get(name) is not None}
        return [token for token in self.tokenizer.control_tokens() if token not in allowed]

    def _chat_media(self, conversations: list[list[dict[str, Any]]], options: dict[str, Any]) -> dict[str, Rows | None]:
        """The media of the messages, or those passed beside them, taken out of `options`."""
        found = [find_media(messages) for messages in conversations]
        media: dict[str, Rows | None] = {}
        for kind, name, is_one in (
            ("image", "images", is_image),
            ("video", "videos", is_video),
            ("audio", "audio", is_clip),
        ):
            lists = [getattr(row, kind) for row in found]
            beside = options.pop(name, None)
            if beside is not None and any(lists):
                raise InputError(f"{name} are in the messages and in processor_kwargs[{name!r}]; pass them once.")
            items = [item for row in lists for item in row]
            media[kind] = Rows(items, [len(row) for row in lists]) if items else Rows.of(beside, is_one)
        return media

    def _add_assistant_masks(
        self, inputs: BatchFeature, rendered: list[tuple[str, list[tuple[int, int]]]], moved: list[Any]
    ) -> None:
        places = []
        for (text, spans), expansions in zip(rendered, moved, strict=True):
            # Marks that were expanded move what is behind them on, those of typed tokens that are gone move it back.
            ends = zip(spans, without_typed(text, spans), shifted(spans, expansions), strict=True)
            places.append([(b[0] + c[0] - a[0], b[1] + c[1] - a[1]) for a, b, c in ends])
        inputs["assistant_masks"] = assistant_masks(inputs.__dict__["encodings"], places, inputs["attention_mask"])

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """The texts of generated ids; transformers' name for `batch_decode`."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)
