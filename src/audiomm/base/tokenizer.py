"""Text to token ids and back, for every family: a thin layer over the `tokenizers` library.

Names, arguments and files are those of transformers' fast tokenizers. A call keeps no state in the tokenizer:
truncation and padding happen outside the backend, so threads may share one.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tokenizers import Encoding, Tokenizer
from typing_extensions import Self

from .chat import TYPED_START
from .encoding import BatchEncoding, TensorKind, cut_to_fit, pad_rows, plain_list, token_ids_of
from .errors import ConfigError, InputError
from .hub import Source
from .tokenizer_chat import ChatTemplates, encode_typed
from .tokenizer_files import TOKENIZER_FILE, added_token, read_backend, read_settings, token_text, write_tokenizer
from .tokenizer_inputs import as_batch, as_columns, one_of, truncation_strategy

_LOGGER = logging.getLogger("audiomm.base.tokenizer")

#: `model_max_length` of a tokenizer that does not say one.
NO_LENGTH_LIMIT = int(1e30)

#: Fewer texts than this are encoded one after the other: starting threads would cost more.
_THREADED_BATCH = 64

#: Options of from_pretrained that other loaders know and that mean nothing for a tokenizer.
_IGNORED_OPTIONS = frozenset(
    {"use_fast", "trust_remote_code", "proxies", "resume_download", "config", "dtype", "torch_dtype", "use_auth_token"}
)

#: Names of ours that the backend calls differently.
_ENCODING_ATTRIBUTES = {"token_type_ids": "type_ids", "offset_mapping": "offsets"}

_SIDES = ("right", "left")
_PLAIN_CLASS = "PreTrainedTokenizerFast"


class PreTrainedTokenizer(ChatTemplates):
    """Tokenizer of a checkpoint.

    Attributes:
        padding_side: "right" or "left": where `padding` writes pad tokens.
        truncation_side: "right" or "left": the end that `truncation` cuts off.
        model_max_length: Longest sequence the model takes, in tokens; what truncation=True cuts to.
        chat_template: Jinja text that turns messages into a prompt, several of them by name, or None.
        clean_up_tokenization_spaces: Kept from the checkpoint; byte-level vocabularies need no clean-up.
        init_kwargs: The settings the tokenizer was made from, unknown ones included; saved again.
        name_or_path: Where it was loaded from.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    default_padding_side: ClassVar[str] = "right"

    def __init__(
        self,
        tokenizer_object: Tokenizer | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, given itself or as a tokenizer.json.

        Args:
            tokenizer_object: The tokenizer; copied, so that it stays as it is.
            tokenizer_file: Path of a tokenizer.json, when no object is given.
            settings: What tokenizer_config.json may hold: special tokens, padding_side, model_max_length, ...

        Raises:
            InputError: Neither a tokenizer nor a file is given, or a side is neither "right" nor "left".
            ConfigError: The file is not a tokenizer, or `model_max_length` is no length.
        """
        if tokenizer_object is None and tokenizer_file is None:
            raise InputError(f"{type(self).__name__} needs tokenizer_object= or tokenizer_file=.")
        self.__dict__["_named"] = {}
        self._extra: list[str] = []
        self._tokenizer = copy.deepcopy(tokenizer_object) if tokenizer_object else read_backend(str(tokenizer_file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.init_kwargs = dict(settings)
        self.name_or_path = str(settings.get("name_or_path", ""))
        self.chat_template = _templates(settings.get("chat_template"))
        length = settings.get("model_max_length") or NO_LENGTH_LIMIT
        if isinstance(length, bool) or not isinstance(length, (int, float)) or length < 1:
            raise ConfigError(f"model_max_length={length!r} must be a number of tokens, 1 or more.")
        self.model_max_length = int(length)
        self.padding_side = one_of("padding_side", settings.get("padding_side") or self.default_padding_side, _SIDES)
        self.truncation_side = one_of("truncation_side", settings.get("truncation_side") or "right", _SIDES)
        self.clean_up_tokenization_spaces = bool(settings.get("clean_up_tokenization_spaces", False))
        self._name_special_tokens(settings)

    def _name_special_tokens(self, settings: Mapping[str, Any]) -> None:
        """Take over added tokens and special tokens from the settings; those the vocabulary lacks are added."""
        listed = settings.get("added_tokens_decoder", {})
        added = {token_text(token): (int(number), token) for number, token in listed.items()}
        missing = [token for text, (_, token) in added.items() if self._tokenizer.token_to_id(text) is None]
        # All of a kind at once: each call builds the search tree of added tokens anew.
        for is_special, group in itertools.groupby(map(added_token, missing), key=lambda token: token.special):
            self.add_tokens(list(group), special_tokens=is_special)
        for text, (number, _) in added.items():
            if self._tokenizer.token_to_id(text) != number:
                found = self._tokenizer.token_to_id(text)
                _LOGGER.warning("added token %r is said to be id %s but is %s.", text, number, found)
        named = {name: token_text(settings[name]) for name in settings if name.endswith("_token")}
        extra = settings.get("extra_special_tokens") or []
        if isinstance(extra, Mapping):
            named.update({name: token_text(token) for name, token in extra.items()})
            extra = []
        extra = [*(settings.get("additional_special_tokens") or []), *extra]
        self.add_special_tokens({name: token for name, token in named.items() if isinstance(token, str) and token})
        self.add_special_tokens({"additional_special_tokens": extra})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a tokenizer from a folder, the hub or the models that ship with this package.

        Args:
            pretrained_model_name_or_path: A folder, a hub id ("openai/whisper-tiny") or a bundled model's name.
            kwargs: Hub options (revision, token, cache_dir, local_files_only, subfolder, force_download); everything
                else overrides the checkpoint's settings, for example `padding_side="left"`.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint, or it holds no tokenizer.
            ConfigError: A file is not readable.
        """
        source = Source.take(pretrained_model_name_or_path, kwargs)
        overrides = {name: value for name, value in kwargs.items() if name not in _IGNORED_OPTIONS}
        settings = {**read_settings(source), "name_or_path": str(pretrained_model_name_or_path), **overrides}
        return cls(**cls._vocabulary(source, settings), **settings)

    @classmethod
    def _vocabulary(cls, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments that hold the vocabulary; families with other files than tokenizer.json extend this."""
        return {} if "tokenizer_object" in settings else {"tokenizer_file": source.require(TOKENIZER_FILE)}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json; transformers loads them too.

        Returns:
            The paths written.

        Raises:
            SaveError: The folder cannot be written.
        """
        return tuple(write_tokenizer(save_directory, self._tokenizer, self._settings()))

    def _settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json; None removes a setting."""
        kept = {name: value for name, value in self.init_kwargs.items() if not name.endswith("_token")}
        kept |= {name: self.init_kwargs[name] for name in self.init_kwargs if isinstance(self.init_kwargs[name], bool)}
        name = type(self).__name__
        settings = {
            **kept,
            **self.special_tokens_map,
            "additional_special_tokens": self._extra,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "tokenizer_class": kept.get("tokenizer_class", _PLAIN_CLASS) if name == "PreTrainedTokenizer" else name,
        }
        return settings

    # ------------------------------------------------------------------------------------------------ text to ids

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        text_pair: str | Sequence[Any] | None = None,
        text_target: str | Sequence[Any] | None = None,
        text_pair_target: str | Sequence[Any] | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Ids and masks of one text or a batch of them.

        Args:
            text: A string, or a list of strings for a batch.
            text_pair: Second texts, one for each of `text`.
            text_target: What the model shall answer. Returned as `labels` when `text` is given too.
            text_pair_target: Second texts of `text_target`.
            options: See `encode_texts`.

        Raises:
            TypeError: Something is not text, or an option is not known.
            InputError: The options contradict each other, or the result cannot be one tensor.
        """
        if text is None and text_target is None:
            raise InputError("pass text= or text_target=; both are None.")
        source = None if text is None else self.encode_texts(text, text_pair, **options)
        if text_target is None:
            return source  # type: ignore[return-value]
        target = self.encode_texts(text_target, text_pair_target, **options)
        if source is None:
            return target
        source["labels"] = target["input_ids"]
        return source

    def encode_texts(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: TensorKind | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool = False,
        sanitize_control_tokens: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """What a call of the tokenizer does, with every option by name.

        Args:
            text: A string, or a list of strings for a batch.
            text_pair: Second texts, one for each of `text`.
            add_special_tokens: Put the model's special tokens around the text.
            padding: True or "longest" fills up to the longest of the batch, "max_length" up to `max_length`.
            truncation: True or "longest_first" cuts to `max_length`, from the longer text of a pair; "only_first" and
                "only_second" cut one of the pair. None cuts if `max_length` is given and padding is off.
            max_length: Length in tokens, special ones included; None is the model's `model_max_length`.
            is_split_into_words: Lists of strings are words of one text, not texts.
            pad_to_multiple_of: Round the padded length up to a multiple.
            padding_side: Overrides the tokenizer's own.
            return_tensors: "pt", "np" or None for lists. With tensors a single text becomes a batch of one.
            return_token_type_ids: Add 0 for tokens of the text, 1 for its pair.
            return_attention_mask: Add 1 for tokens, 0 for padding; None is what the model takes.
            return_special_tokens_mask: Add 1 for special tokens.
            return_offsets_mapping: Add (start, end) of each token in the text, in characters.
            return_length: Add the number of tokens.
            split_special_tokens: Encode special tokens written in the text as plain text.
            sanitize_control_tokens: Do so for those that `chat.mark_typed` has marked, and for no other.
            verbose: Accepted for compatibility.

        Raises:
            TypeError: Something is not text.
            InputError: The options contradict each other, or the result cannot be one tensor.
        """
        texts, pairs, is_batch = as_batch(text, text_pair, is_split_into_words)
        cut = truncation_strategy(truncation, padding, max_length)
        limit = None if cut is None else self._limit(max_length)
        if limit and pad_to_multiple_of and padding not in (False, "do_not_pad") and limit % pad_to_multiple_of:
            raise InputError(
                f"max_length={limit} is not a multiple of pad_to_multiple_of={pad_to_multiple_of}: padding would go "
                f"beyond it. Use {limit // pad_to_multiple_of * pad_to_multiple_of}."
            )
        backend = self._literal() if split_special_tokens else self._tokenizer
        if sanitize_control_tokens and any(TYPED_START in text for text in texts):
            if pairs is not None or is_split_into_words:
                raise InputError("sanitize_control_tokens=True takes whole texts, without text_pair.")
            encodings = [self._sanitized(text, add_special_tokens, limit) for text in texts]
        else:
            encodings = self._encode(backend, texts, pairs, is_split_into_words, add_special_tokens, cut, limit)
        wanted = {
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        columns = self._columns(encodings, wanted)
        lengths = [len(row) for row in columns["input_ids"]]
        length = self._padded_length(padding, lengths, max_length, pad_to_multiple_of)
        if length is not None:
            columns = self._fill(columns, "input_ids", length, padding_side)
        if return_length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        if not is_batch:
            # The length stays a list, as in transformers, unless it becomes a tensor of one entry anyway.
            kept = "length" if return_tensors is None else None
            columns = {name: rows if name == kept else rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, encodings, return_tensors, prepend_batch_axis=not is_batch)

    def _columns(self, encodings: list[Encoding], wanted: dict[str, bool | None]) -> dict[str, Any]:
        """The ids and whatever else is wanted, by name; None leaves it to `model_input_names`."""
        columns: dict[str, Any] = {"input_ids": [encoding.ids for encoding in encodings]}
        for name, is_wanted in wanted.items():
            if is_wanted or (is_wanted is None and name in self.model_input_names):
                attribute = _ENCODING_ATTRIBUTES.get(name, name)
                columns[name] = [getattr(encoding, attribute) for encoding in encodings]
        return columns

    def encode(self, text: str | Sequence[str], text_pair: Any = None, **options: Any) -> Any:
        """The ids of one text: a list, or a (1, tokens) tensor with `return_tensors`; options as for a call.

        Raises:
            TypeError: `text` is not a string.
        """
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of one text in the vocabulary's own spelling.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"tokenize takes one string, not {type(text).__name__}.")
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def _encode(
        self,
        backend: Tokenizer,
        texts: list[Any],
        pairs: list[Any] | None,
        split_into_words: bool,
        special: bool,
        cut: str | None,
        limit: int | None,
    ) -> list[Encoding]:
        def run(items: list[Any], add: bool) -> list[Encoding]:
            if len(items) >= _THREADED_BATCH:
                return list(backend.encode_batch(items, is_pretokenized=split_into_words, add_special_tokens=add))
            # A pair is one tuple in a batch, two arguments in a single call.
            return [
                backend.encode(  # type: ignore[misc]
                    *(item if isinstance(item, tuple) else (item,)),
                    is_pretokenized=split_into_words,
                    add_special_tokens=add,
                )
                for item in items
            ]

        if limit is None or cut is None:
            items = texts if pairs is None else list(zip(texts, pairs, strict=True))
            return run(items, special)
        reserved = backend.num_special_tokens_to_add(pairs is not None) if special else 0
        if limit < reserved:
            raise InputError(f"max_length={limit} has no room for the {reserved} special tokens of this tokenizer.")
        firsts = run(texts, False)
        seconds: list[Encoding | None] = [None] * len(firsts) if pairs is None else list(run(pairs, False))
        for first, second in zip(firsts, seconds, strict=True):
            cut_to_fit(first, second, cut, limit - reserved, self.truncation_side)
        together = zip(firsts, seconds, strict=True)
        return [backend.post_process(first, second, add_special_tokens=special) for first, second in together]

    def _sanitized(self, text: str, special: bool, limit: int | None) -> Encoding:
        encoding = encode_typed(self._tokenizer, self._literal(), text)
        if limit is not None:
            reserved = self._tokenizer.num_special_tokens_to_add(False) if special else 0
            cut_to_fit(encoding, None, "longest_first", max(limit - reserved, 0), self.truncation_side)
        return self._tokenizer.post_process(encoding, None, add_special_tokens=special)

    def _literal(self) -> Tokenizer:
        """A twin of the backend that reads special tokens as plain text; made once, the first time it is needed."""
        twin = self.__dict__.get("_literal_tokenizer")
        if twin is None:
            twin = copy.deepcopy(self._tokenizer)
            twin.encode_special_tokens = True
            self.__dict__["_literal_tokenizer"] = twin
        return twin

    def _limit(self, max_length: int | None) -> int | None:
        if max_length is None:
            return self.model_max_length if self.model_max_length < NO_LENGTH_LIMIT else None
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0:
            raise InputError(f"max_length={max_length!r} must be a whole number of tokens, 0 or more.")
        return max_length

    # ------------------------------------------------------------------------------------------------ padding

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: TensorKind | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Fill up sequences encoded before, as a collator does.

        Args:
            encoded_inputs: One encoding, a batch ({"input_ids": [[...], ...]}) or a list of encodings.
            padding: True or "longest", "max_length", or False.
            max_length: Length in tokens for padding="max_length".
            pad_to_multiple_of: Round the length up to a multiple.
            padding_side: Overrides the tokenizer's own.
            return_attention_mask: Add the mask if it is missing; None is what the model takes.
            return_tensors: "pt", "np" or None for lists.
            verbose: Accepted for compatibility.

        Raises:
            TypeError: `encoded_inputs` is not made of dictionaries.
            InputError: There is no `input_ids`, no pad token, or the result cannot be one tensor.
        """
        columns = as_columns(encoded_inputs)
        name = self.model_input_names[0]
        if name not in columns:
            raise InputError(f"pad needs {name!r} in every encoding; got {sorted(columns)}.")
        is_batch = not (columns[name] and isinstance(columns[name][0], int))
        if not is_batch:
            columns = {key: [value] for key, value in columns.items()}
        wanted = return_attention_mask is None and "attention_mask" in self.model_input_names
        if (wanted or return_attention_mask) and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in columns[name]]
        length = self._padded_length(padding, [len(row) for row in columns[name]], max_length, pad_to_multiple_of)
        if length is not None:
            columns = self._fill(columns, name, length, padding_side)
        if not is_batch:
            columns = {key: rows[0] for key, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors)

    def _padded_length(
        self, padding: bool | str, lengths: list[int], max_length: int | None, multiple: int | None
    ) -> int | None:
        """The length to fill up to, in tokens; None for no padding."""
        if padding in (False, "do_not_pad"):
            return None
        if padding == "max_length":
            length = self._limit(max_length)
            if length is None:
                raise InputError("padding='max_length' needs max_length=: this tokenizer has no model_max_length.")
        else:
            length = max(lengths, default=0)
        if multiple:
            length = -(-length // multiple) * multiple
        return length

    def _fill(self, columns: dict[str, Any], name: str, length: int, side: str | None) -> dict[str, Any]:
        pad_id = self.pad_token_id
        if pad_id is None and any(len(row) < length for row in columns[name]):
            raise InputError(
                "padding needs a pad token and this tokenizer has none. "
                "Set one: tokenizer.pad_token = tokenizer.eos_token."
            )
        side = one_of("padding_side", side or self.padding_side, _SIDES)
        return pad_rows(columns, name=name, pad_id=pad_id or 0, length=length, side=side)

    # ------------------------------------------------------------------------------------------------ ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> Any:
        """Text of token ids; a list of texts for a batch of them. Ids outside the vocabulary are passed over.

        Args:
            token_ids: An int, or a list, array or tensor of ints; nested for a batch.
            skip_special_tokens: Leave special tokens out.
            clean_up_tokenization_spaces: Accepted for compatibility; byte-level vocabularies keep their own spaces.
            options: Further options of the family's tokenizer.

        Raises:
            TypeError: An id is not an integer, or an option is not known.
            InputError: An id is negative.
        """
        ids = token_ids_of(token_ids)
        if ids and isinstance(ids[0], list):
            return [self._decode(row, skip_special_tokens, **options) for row in ids]
        return self._decode(ids, skip_special_tokens, **options)  # type: ignore[arg-type]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[Any]:
        """The texts of several sequences of ids; options as for `decode`."""
        return [self.decode(ids, skip_special_tokens, **options) for ids in plain_list(sequences)]

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> Any:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


PreTrainedTokenizerFast = PreTrainedTokenizer
PreTrainedTokenizerBase = PreTrainedTokenizer


def _templates(value: Any) -> str | dict[str, str] | None:
    """A chat template as text, several by name, or None, from either form that tokenizer_config.json knows."""
    if isinstance(value, list):
        return {str(item["name"]): str(item["template"]) for item in value}
    return value
