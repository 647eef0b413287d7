"""The vocabulary of a tokenizer: tokens and their ids, and the special ones by name (bos, eos, pad, ...).

The names and the `_id` twins are those of transformers. A name is either one of the seven standard ones or one that
a model brings along (`audio_token`, `boi_token`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .encoding import plain_list, token_ids_of
from .errors import InputError
from .tokenizer_files import added_token, token_text

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: What is worked out from the vocabulary once and forgotten when it changes.
_DERIVED = ("_literal_tokenizer", "_marked_special", "_language_tokens", "_control_tokens")


class _Token:
    """Attribute that reads and sets a special token's text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Vocabulary | None, owner: type | None = None) -> Any:
        return self if tokenizer is None else tokenizer._named.get(self.name)

    def __set__(self, tokenizer: Vocabulary, value: str | AddedToken | None) -> None:
        tokenizer._name_token(self.name, value)


class _TokenId:
    """Attribute that reads and sets a special token by its id."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Vocabulary | None, owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._named.get(self.name)
        return None if token is None else tokenizer._tokenizer.token_to_id(token)

    def __set__(self, tokenizer: Vocabulary, value: int | None) -> None:
        token = None if value is None else tokenizer._tokenizer.id_to_token(value)
        if value is not None and token is None:
            raise InputError(f"{self.name}_id={value} is not an id of this vocabulary of {tokenizer._size()} tokens.")
        tokenizer._name_token(self.name, token)


class Vocabulary:
    """Tokens, ids and special tokens over a `tokenizers.Tokenizer`; base class of the tokenizer."""

    _tokenizer: Tokenizer
    _named: dict[str, str]
    _extra: list[str]

    bos_token = _Token("bos_token")
    eos_token = _Token("eos_token")
    unk_token = _Token("unk_token")
    sep_token = _Token("sep_token")
    pad_token = _Token("pad_token")
    cls_token = _Token("cls_token")
    mask_token = _Token("mask_token")
    bos_token_id = _TokenId("bos_token")
    eos_token_id = _TokenId("eos_token")
    unk_token_id = _TokenId("unk_token")
    sep_token_id = _TokenId("sep_token")
    pad_token_id = _TokenId("pad_token")
    cls_token_id = _TokenId("cls_token")
    mask_token_id = _TokenId("mask_token")

    def __getattr__(self, name: str) -> Any:
        named = self.__dict__.get("_named", {})
        if name in named:
            return named[name]
        if name.endswith("_token_id") and name[:-3] in named:
            return self._tokenizer.token_to_id(named[name[:-3]])
        hint = f" Its special tokens are {', '.join(named)}." if name.endswith(("_token", "_token_id")) else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_named", {}) and name not in STANDARD_NAMES:
            self._name_token(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set: {"bos_token": "<bos>", ...}."""
        return {name: self._named[name] for name in self._names() if name in self._named}

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own."""
        return list(self._extra)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: list[str | AddedToken]) -> None:
        self.add_special_tokens({"additional_special_tokens": tokens})

    extra_special_tokens = additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int | None]:
        """Ids of the special tokens without a name."""
        return [self._tokenizer.token_to_id(token) for token in self._extra]

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once: the named ones first, then the others."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`, in the same order."""
        ids = (self._tokenizer.token_to_id(token) for token in self.all_special_tokens)
        return [token_id for token_id in ids if token_id is not None]

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], replace_extra_special_tokens: bool = True, **_: Any
    ) -> int:
        """Name special tokens, adding to the vocabulary those it lacks.

        Args:
            special_tokens_dict: {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"], ...}.
            replace_extra_special_tokens: Whether the given list takes the place of the present one or extends it.

        Returns:
            How many tokens are new in the vocabulary. If any, resize the model's embedding.

        Raises:
            InputError: A key is not the name of a special token.
            TypeError: A token is neither a string nor an AddedToken.
        """
        new = 0
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, (list, tuple)):
                new += self._add([added_token(token, special=True) for token in value], special=True)
                kept = [] if replace_extra_special_tokens else self._extra
                self._extra = list(dict.fromkeys([*kept, *(token_text(token) for token in value)]))
            elif name.endswith("_token") and not isinstance(value, (list, tuple)):
                new += self._add([added_token(value, special=True)], special=True)
                self._named[name] = token_text(value)
            else:
                raise InputError(
                    f"{name!r} does not name a special token: use {', '.join(STANDARD_NAMES)}, a name of your own that "
                    "ends in '_token' (with one token), or 'additional_special_tokens' (with a list)."
                )
        return new

    def add_tokens(self, new_tokens: str | AddedToken | list[str | AddedToken], special_tokens: bool = False) -> int:
        """Add tokens that text is never split inside of.

        Returns:
            How many are new in the vocabulary. If any, resize the model's embedding.

        Raises:
            TypeError: A token is neither a string nor an AddedToken.
        """
        tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        return self._add([added_token(token, special=special_tokens) for token in tokens], special=special_tokens)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` underneath."""
        return self._tokenizer

    @property
    def is_fast(self) -> bool:
        """True: every tokenizer here has the compiled backend."""
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return self._size()

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name_or_path!r}, {len(self)} tokens, {self.special_tokens_map})"

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def vocab(self) -> dict[str, int]:
        """The same as `get_vocab()`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return dict(sorted(self._tokenizer.get_added_tokens_decoder().items()))

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens with their ids, in the order of ids."""
        return {token.content: number for number, token in self.added_tokens_decoder.items()}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens; an unknown one becomes the unknown token's id, or None where there is none.

        Raises:
            TypeError: A token is not a string.
        """
        if isinstance(tokens, str):
            number = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if number is None else number
        if not isinstance(tokens, Sequence) or not all(isinstance(token, str) for token in tokens):
            raise TypeError(f"tokens must be a string or a list of strings, not {tokens!r:.100}.")
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str | None] | None:
        """Tokens of ids; None for an id outside the vocabulary.

        Raises:
            TypeError: An id is not an integer.
            InputError: An id is negative.
        """
        numbers: list[Any] = token_ids_of(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        tokens = [self._tokenizer.id_to_token(number) for number in numbers if number not in skipped]
        return tokens[0] if isinstance(plain_list(ids), int) and tokens else tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens in the vocabulary's own spelling."""
        decoder = self._tokenizer.decoder
        return str(decoder.decode(tokens)) if decoder is not None else " ".join(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens are put around a text, or a pair of texts."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def _add(self, tokens: list[AddedToken], special: bool) -> int:
        before = self._size()
        if special:
            present = self._special_ids()
            tokens = [token for token in tokens if self._tokenizer.token_to_id(token.content) not in present]
        if not tokens:
            return 0
        if special:
            self._tokenizer.add_special_tokens(tokens)
        else:
            self._tokenizer.add_tokens(tokens)
        for derived in _DERIVED:
            self.__dict__.pop(derived, None)
        return self._size() - before

    def _special_ids(self) -> frozenset[int]:
        """Ids that the vocabulary itself marks as special, named or not."""
        ids = self.__dict__.get("_marked_special")
        if ids is None:
            added = self._tokenizer.get_added_tokens_decoder()
            ids = frozenset(number for number, token in added.items() if token.special)
            self.__dict__["_marked_special"] = ids
        return ids

    def _name_token(self, name: str, value: str | AddedToken | None) -> None:
        if value is None:
            self._named.pop(name, None)
            return
        token = token_text(value)
        if not isinstance(token, str):
            raise TypeError(f"{name} must be a string, an AddedToken or None, not {type(value).__name__}.")
        if self._tokenizer.token_to_id(token) is None:
            raise InputError(
                f"{name}={token!r} is not in the vocabulary. Add it first: add_special_tokens({{{name!r}: {token!r}}})."
            )
        self._add([added_token(value, special=True)], special=True)
        self._named[name] = token

    def _names(self) -> list[str]:
        return [*STANDARD_NAMES, *(name for name in self._named if name not in STANDARD_NAMES)]

    def _size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))
