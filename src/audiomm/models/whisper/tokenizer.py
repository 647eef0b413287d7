"""Whisper's tokenizer: byte-level BPE with a prefix that says language, task and whether times are written.

Names and results are those of transformers' WhisperTokenizer. Ids of special tokens are looked up by their text, never
computed, so that vocabularies with other languages or in another order work too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer, processors

from ...base.encoding import token_ids_of
from ...base.errors import ConfigError, InputError
from ...base.hub import Source, make_folder, read_json, write_json
from ...base.languages import LANGUAGES, language_code
from ...base.tokenizer import PreTrainedTokenizer
from ...base.tokenizer_files import byte_level_bpe
from .merging import ChunkMerger
from .normalizer import BasicTextNormalizer, EnglishTextNormalizer
from .words import PREPEND_PUNCTUATIONS, TokenWord, merge_punctuations, split_words

TASKS = ("translate", "transcribe")

#: Seconds from one timestamp token to the next.
TIME_PRECISION_SECONDS = 0.02

_TIMESTAMP = re.compile(r"<\|(\d+\.\d+)\|>")
_LANGUAGE_TOKEN = re.compile(r"<\|[a-z]{2,3}(?:[-_][a-z]+)?\|>")
_SEGMENT_STEPS = 1500


class WhisperTokenizer(PreTrainedTokenizer):
    """Tokenizer of Whisper and its fine-tuned descendants.

    Attributes:
        language: Language of the text, as it was written by the caller; None writes no language token.
        task: "transcribe", "translate", or None for no task token.
        predict_timestamps: Whether the text holds times ("<|0.00|> Hello.<|1.20|>"); if not, the prefix says so.
        english_spelling_normalizer: British to American spelling, from the checkpoint; None uses the packaged one.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[Any] | None = None,
        normalizer_file: str | os.PathLike[str] | None = None,
        *,
        language: str | None = None,
        task: str | None = None,
        predict_timestamps: bool = False,
        tokenizer_object: Tokenizer | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """Make a tokenizer from a vocabulary, or from a ready `tokenizers.Tokenizer`.

        Args:
            vocab: Token to id, or the path of vocab.json.
            merges: Pairs of tokens in the order they are merged, or the path of merges.txt.
            normalizer_file: JSON object of British to American spellings, for `normalize`.
            language: Language of the text: "de", "german" or "<|de|>".
            task: "transcribe" or "translate".
            predict_timestamps: Whether the text holds times.
            tokenizer_object: A ready tokenizer instead of `vocab` and `merges`.
            tokenizer_file: A tokenizer.json instead of `vocab` and `merges`.
            settings: Everything else of tokenizer_config.json.

        Raises:
            InputError: Nothing to make a tokenizer from, or a language or task this vocabulary does not have.
            ConfigError: A file is not readable.
        """
        vocab, merges = vocab or settings.pop("vocab_file", None), merges or settings.pop("merges_file", None)
        if vocab is not None and tokenizer_object is None:
            tokenizer_object = byte_level_bpe(vocab, merges or [], bool(settings.get("add_prefix_space", False)))
        for name in ("unk_token", "bos_token", "eos_token"):
            settings.setdefault(name, "<|endoftext|>")
        super().__init__(tokenizer_object, tokenizer_file, **settings)
        self.english_spelling_normalizer = read_json(normalizer_file) if normalizer_file else None
        self.language = language.strip().lower() if isinstance(language, str) else language
        self.task = task
        self.predict_timestamps = predict_timestamps
        self.set_prefix_tokens()

    @classmethod
    def _vocabulary(cls, source: Source, settings: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        normalizer = settings.pop("normalizer_file", None) or source.find("normalizer.json")
        if normalizer is not None:
            found["normalizer_file"] = normalizer
        for name in ("vocab_file", "merges_file"):
            settings.pop(name, None)
        if settings.keys() & {"vocab", "tokenizer_object", "tokenizer_file"}:
            return found
        vocab, merges = None, None
        if source.find("tokenizer.json") is None:
            vocab, merges = source.find("vocab.json"), source.find("merges.txt")
        if vocab and merges:
            return {**found, "vocab": str(vocab), "merges": str(merges)}
        return {**found, **super()._vocabulary(source, settings)}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and, if the checkpoint had one, normalizer.json.

        Raises:
            SaveError: The folder cannot be written.
        """
        written = super().save_pretrained(save_directory, **kwargs)
        if self.english_spelling_normalizer is None:
            return written
        path = make_folder(save_directory) / "normalizer.json"
        write_json(path, self.english_spelling_normalizer)
        return (*written, str(path))

    def _settings(self) -> dict[str, Any]:
        own = {"language": self.language, "task": self.task, "predict_timestamps": self.predict_timestamps}
        return {**super()._settings(), **own}

    # ------------------------------------------------------------------------------------------------ prefix

    @property
    def prefix_tokens(self) -> list[int]:
        """Ids that every text begins with: start, language, task, no-timestamps; each but the first only if it is set.

        Raises:
            InputError: The language or task is not one of this vocabulary.
        """
        ids = [self._id("<|startoftranscript|>")]
        if self.language is not None:
            ids.append(self.language_id(self.language))
        if self.task is not None:
            ids.append(self.task_id(self.task))
        if not self.predict_timestamps:
            ids.append(self._id("<|notimestamps|>"))
        return ids

    def set_prefix_tokens(
        self,
        language: str | None = None,
        task: str | None = None,
        predict_timestamps: bool | None = None,
    ) -> None:
        """Change what every text begins with; None keeps what was set.

        Raises:
            InputError: The language or task is not one of this vocabulary; nothing is changed.
        """
        before = self.language, self.task, self.predict_timestamps
        self.language = before[0] if language is None else language.strip().lower()
        self.task = before[1] if task is None else task
        self.predict_timestamps = before[2] if predict_timestamps is None else predict_timestamps
        try:
            prefix = self.prefix_tokens
        except InputError:
            self.language, self.task, self.predict_timestamps = before
            raise
        tokens = [self._tokenizer.id_to_token(token_id) for token_id in prefix]
        end = self.eos_token or "<|endoftext|>"
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(f"{token}:0" for token in tokens), "$A:0", f"{end}:0"],
            pair=[*(f"{token}:0" for token in tokens), "$A:0", "$B:1", f"{end}:1"],
            special_tokens=[*zip(tokens, prefix, strict=True), (end, self._id(end))],
        )
        self.__dict__.pop("_literal_tokenizer", None)

    def language_id(self, language: str) -> int:
        """The id of a language's token; a code that only this vocabulary knows is found too.

        Raises:
            InputError: There is no such language, or this vocabulary has no token for it.
        """
        token = f"<|{language.strip().lower().removeprefix('<|').removesuffix('|>')}|>"
        if token in self.language_tokens:
            return self._id(token)
        code = language_code(language)
        token_id = self._tokenizer.token_to_id(f"<|{code}|>")
        if token_id is None:
            raise InputError(
                f"language={language!r}: this vocabulary of {len(self)} tokens has no <|{code}|>; "
                f"it knows {len(self.language_tokens)} languages"
                + (" (Cantonese came with large-v3)." if code == "yue" else ".")
            )
        return int(token_id)

    def task_id(self, task: str) -> int:
        """The id of a task's token.

        Raises:
            InputError: There is no such task.
        """
        if task not in TASKS:
            raise InputError(f"task={task!r} is not one of {', '.join(map(repr, TASKS))}.")
        return self._id(f"<|{task}|>")

    @property
    def language_tokens(self) -> dict[str, int]:
        """The language tokens of this vocabulary with their ids: {"<|en|>": 50259, ...}."""
        tokens = self.__dict__.get("_language_tokens")
        if tokens is None:
            known = {f"<|{code}|>": self._tokenizer.token_to_id(f"<|{code}|>") for code in LANGUAGES}
            added = self.get_added_vocab().items()
            known |= {token: number for token, number in added if _LANGUAGE_TOKEN.fullmatch(token)}
            tokens = {token: number for token, number in known.items() if number is not None}
            self.__dict__["_language_tokens"] = tokens
        return tokens

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """The prefix after the start token as (position, id), the form of `forced_decoder_ids`; changes nothing.

        Raises:
            InputError: The language or task is not one of this vocabulary.
        """
        language, task = language or self.language, task or self.task
        ids = [] if language is None else [self.language_id(language)]
        ids += [] if task is None else [self.task_id(task)]
        ids += [self._id("<|notimestamps|>")] if no_timestamps else []
        return list(enumerate(ids, start=1))

    def get_prompt_ids(self, text: str, return_tensors: str | None = "np") -> Any:
        """Ids that tell the model what was said before: <|startofprev|> and the text.

        Args:
            text: Earlier words, or words to expect; special tokens are not allowed in it.
            return_tensors: "np", "pt" or None for a list.

        Raises:
            InputError: The text holds a special token or a timestamp, or `return_tensors` is unknown.
        """
        if return_tensors not in ("np", "pt", None):
            raise InputError(f"return_tensors={return_tensors!r} is not known; use 'pt' (torch), 'np' (numpy) or None.")
        if not isinstance(text, str):
            raise TypeError(f"the prompt must be a string, not {type(text).__name__}.")
        ids = self._tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids
        for token_id in ids:
            if self._is_special(token_id) or self.is_timestamp(token_id):
                token = self._tokenizer.id_to_token(token_id)
                raise InputError(f"the prompt holds the special token {token!r} (id {token_id}); leave it out.")
        ids = [self._id("<|startofprev|>"), *ids]
        if return_tensors is None:
            return ids
        return torch.tensor(ids) if return_tensors == "pt" else np.asarray(ids)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Prefix, ids, the pair's ids, end of text."""
        return [*self.prefix_tokens, *token_ids_0, *(token_ids_1 or []), self._id(self.eos_token or "<|endoftext|>")]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a special token, 0 elsewhere."""
        if already_has_special_tokens:
            return [int(self._is_special(token_id)) for token_id in [*token_ids_0, *(token_ids_1 or [])]]
        return [1] * len(self.prefix_tokens) + [0] * (len(token_ids_0) + len(token_ids_1 or [])) + [1]

    # ------------------------------------------------------------------------------------------------ times

    @property
    def timestamp_begin(self) -> int:
        """Id of <|0.00|>: the one after <|notimestamps|>."""
        return self._id("<|notimestamps|>") + 1

    def timestamp_ids(self, time_precision: float = TIME_PRECISION_SECONDS) -> list[int]:
        """Ids of <|0.00|>, <|0.02|>, ... <|30.00|>, or of 1501 other multiples of `time_precision`, in seconds."""
        if time_precision != TIME_PRECISION_SECONDS:
            tokens = [f"<|{step * time_precision:.2f}|>" for step in range(_SEGMENT_STEPS + 1)]
            return self.convert_tokens_to_ids(tokens)  # type: ignore[return-value]
        return list(range(self.timestamp_begin, self.timestamp_begin + _SEGMENT_STEPS + 1))

    def is_timestamp(self, token_id: int) -> bool:
        """Whether an id stands for a time."""
        before = self._tokenizer.token_to_id("<|notimestamps|>")
        if before is None or not 0 < token_id - before <= _SEGMENT_STEPS + 1:
            return False
        # A checkpoint may leave the times out of its files, or have another token where one is expected.
        token = self._tokenizer.id_to_token(token_id)
        return token is None or _TIMESTAMP.fullmatch(token) is not None

    # ------------------------------------------------------------------------------------------------ decoding

    def _decode(
        self,
        ids: list[int],
        skip_special_tokens: bool,
        output_offsets: bool = False,
        time_precision: float = TIME_PRECISION_SECONDS,
        decode_with_timestamps: bool = False,
        normalize: bool = False,
        basic_normalize: bool = False,
        remove_diacritics: bool = False,
    ) -> Any:
        """One text; the options are those of transformers' `WhisperTokenizer.decode`.

        Args:
            ids: Token ids.
            skip_special_tokens: Leave out special tokens, and the prompt before <|startoftranscript|>.
            output_offsets: Return {"text", "offsets": [{"text", "timestamp": (start, end)}]}, times in seconds.
            time_precision: Seconds from one timestamp token to the next.
            decode_with_timestamps: Write the times into the text; it is not normalised then.
            normalize: Apply the English normaliser.
            basic_normalize: Apply the normaliser for all languages.
            remove_diacritics: Whether the basic normaliser strips accents.
        """
        if skip_special_tokens:
            ids = self._without_prompt(ids)
        if decode_with_timestamps:
            text = self._text_with_times(ids, skip_special_tokens, time_precision)
        else:
            text = self._text(ids, skip_special_tokens)
            if normalize:
                text = self.normalize(text)
            elif basic_normalize:
                text = self.basic_normalize(text, remove_diacritics)
        if output_offsets:
            return {"text": text, "offsets": self._offsets(ids, time_precision, skip_special_tokens)}
        return text

    def _text(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Text without times. A time ends a character: bytes on its two sides are never put together."""
        pieces, start = [], 0
        for position in [*(i for i, token_id in enumerate(ids) if self.is_timestamp(token_id)), len(ids)]:
            pieces.append(self._tokenizer.decode(ids[start:position], skip_special_tokens=skip_special_tokens))
            start = position + 1
        return "".join(pieces)

    def _without_prompt(self, ids: list[int]) -> list[int]:
        previous = self._tokenizer.token_to_id("<|startofprev|>")
        if not ids or previous is None or ids[0] != previous:
            return ids
        start = self._id("<|startoftranscript|>")
        return ids[ids.index(start) :] if start in ids else []

    def _text_with_times(self, ids: list[int], skip_special_tokens: bool, time_precision: float) -> str:
        """Text with <|seconds|> in it; times that fall back are taken for the next 30 s window, and counted on."""
        pieces: list[str | list[int]] = [[]]
        offset = latest = penultimate = 0.0
        for position, token_id in enumerate(ids):
            if not self.is_timestamp(token_id):
                pieces[-1].append(token_id)  # type: ignore[union-attr]
                continue
            seconds = (token_id - self.timestamp_begin) * time_precision
            if seconds < latest:
                if position < 2 or all(self.is_timestamp(before) for before in ids[position - 2 : position]):
                    # The window ended in a pair of times: the next one starts at the first of them.
                    latest = penultimate
                    offset += penultimate
                    del pieces[-2:]
                else:
                    offset += _SEGMENT_STEPS * time_precision
            penultimate, latest = latest, seconds
            pieces += [f"<|{seconds + offset:.2f}|>", []]
        return "".join(
            piece if isinstance(piece, str) else self._tokenizer.decode(piece, skip_special_tokens=skip_special_tokens)
            for piece in pieces
        )

    def _offsets(self, ids: list[int], time_precision: float, skip_special_tokens: bool) -> list[dict[str, Any]]:
        """Stretches of text between two times, with those times in seconds."""
        times = [i for i, token_id in enumerate(ids) if self.is_timestamp(token_id)]
        if len(times) < 2:
            return []
        ends = [i for i in times if i and self.is_timestamp(ids[i - 1])]
        if times[-1] + 1 not in ends:
            ends.append(times[-1] + 1)
        offsets, begin, elapsed, latest = [], times[0], 0, 0
        for end in ends:
            piece = ids[begin:end]
            if len(piece) > 1:
                first, last = piece[0] - self.timestamp_begin, piece[-1] - self.timestamp_begin
                if first < latest:
                    is_pair = begin >= 2 and self.is_timestamp(ids[begin - 2]) and self.is_timestamp(ids[begin - 1])
                    elapsed += latest if is_pair else _SEGMENT_STEPS
                latest = last
                start_seconds, end_seconds = ((steps + elapsed) * time_precision for steps in (first, last))
                text = self._text(piece, skip_special_tokens)
                offsets.append({"text": text, "timestamp": (start_seconds, end_seconds)})
            begin = end
        return offsets

    def normalize(self, text: str) -> str:
        """English text for scoring; see `EnglishTextNormalizer`."""
        return EnglishTextNormalizer(self.english_spelling_normalizer)(text)

    @staticmethod
    def basic_normalize(text: str, remove_diacritics: bool = False) -> str:
        """Text of any language for scoring; see `BasicTextNormalizer`."""
        return BasicTextNormalizer(remove_diacritics=remove_diacritics)(text)

    # ------------------------------------------------------------------------------------------------ words

    def split_to_word_tokens(self, tokens: Any, language: str | None = None) -> tuple[list[str], list[list[int]]]:
        """Words of a token sequence and the ids of each; punctuation marks are words of their own.

        Args:
            tokens: Token ids.
            language: Decides whether spaces separate words; None is the tokenizer's own language.
        """
        words = self._split_words(tokens, language)
        return [word.text for word in words], [list(word.tokens) for word in words]

    def combine_tokens_into_words(self, tokens: Any, language: str | None = None) -> list[TokenWord]:
        """Words of a token sequence with their ids and positions, punctuation joined to its word.

        Args:
            tokens: Token ids.
            language: Decides whether spaces separate words; None is the tokenizer's own language.
        """
        return merge_punctuations(self._split_words(tokens, language), prepended=PREPEND_PUNCTUATIONS + "¡")

    def _split_words(self, tokens: Any, language: str | None) -> list[TokenWord]:
        language = language or self.language
        code = None if language is None else str(self._tokenizer.id_to_token(self.language_id(language)))[2:-2]
        ids: list[Any] = token_ids_of(tokens)
        return split_words(self._tokenizer, ids, code, self.eos_token_id)

    def _decode_asr(
        self,
        model_outputs: Iterable[Mapping[str, Any]],
        *,
        return_timestamps: bool | str | None,
        return_language: bool | None,
        time_precision: float,
    ) -> tuple[str, dict[str, Any]]:
        """The transcript of overlapping chunks; see `ChunkMerger`.

        Args:
            model_outputs: One mapping per chunk: "tokens", "stride", "token_timestamps".
            return_timestamps: Falsy for text, True for timed chunks, "word" for timed words.
            return_language: Whether chunks tell their language.
            time_precision: Seconds from one timestamp token to the next.

        Raises:
            InputError: Words are asked for and `token_timestamps` are missing.
        """
        merger = ChunkMerger(self, return_timestamps, return_language, time_precision)
        for output in model_outputs:
            merger.add(output)
        return merger.finish()

    # ------------------------------------------------------------------------------------------------ helpers

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"this vocabulary of {len(self)} tokens has no {token}; is it a Whisper tokenizer?")
        return int(token_id)

    def _is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids()


WhisperTokenizerFast = WhisperTokenizer
