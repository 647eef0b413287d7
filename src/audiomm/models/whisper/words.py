"""From tokens to words: what word timestamps and the joining of chunks are counted in.

The rules are those of openai/whisper: tokens are first grouped into whole characters, then into words at spaces and
punctuation; in languages written without spaces every group is a word.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from ...base.languages import UNSPACED_LANGUAGES

PREPEND_PUNCTUATIONS = "\"'“¿([{-"
APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"

_BROKEN = "\ufffd"


@dataclass(frozen=True)
class TokenWord:
    """A word and the tokens it is made of.

    Attributes:
        text: The word with the space before it.
        tokens: Its token ids.
        indices: Their positions in the sequence that was split.
    """

    text: str
    tokens: tuple[int, ...]
    indices: tuple[int, ...]

    def __add__(self, other: TokenWord) -> TokenWord:
        return TokenWord(self.text + other.text, self.tokens + other.tokens, self.indices + other.indices)


def split_words(
    backend: Tokenizer, tokens: Sequence[int], language: str | None, first_special_id: int
) -> list[TokenWord]:
    """Words of a token sequence, punctuation still apart.

    Args:
        backend: What decodes the ids.
        tokens: Token ids.
        language: Language code; None counts as one with spaces.
        first_special_id: Ids from here on (end of text, times, ...) are words of their own.
    """
    characters = _split_characters(backend, tokens)
    if language in UNSPACED_LANGUAGES:
        return characters
    words: list[TokenWord] = []
    for piece in characters:
        starts_word = piece.tokens[0] >= first_special_id or piece.text.startswith(" ")
        # A piece that is blank counts as punctuation: the empty string is in every string.
        if words and not starts_word and piece.text.strip() not in string.punctuation:
            words[-1] = words[-1] + piece
        else:
            words.append(piece)
    return words


def merge_punctuations(
    words: Sequence[TokenWord],
    prepended: str = PREPEND_PUNCTUATIONS,
    appended: str = APPEND_PUNCTUATIONS,
) -> list[TokenWord]:
    """Join opening marks with the word after them and closing marks with the word before.

    Args:
        words: Words as `split_words` gives them.
        prepended: Marks that belong to the next word, when a space stands before them.
        appended: Marks that belong to the previous word, unless that ends in a space.
    """
    merged = list(words)
    following = len(merged) - 1
    for current in range(len(merged) - 2, -1, -1):
        mark = merged[current]
        if mark.text.startswith(" ") and mark.text.strip() in prepended:
            merged[following] = mark + merged[following]
            merged[current] = replace(mark, text="", tokens=(), indices=())
        else:
            following = current
    previous = 0
    for current in range(1, len(merged)):
        mark = merged[current]
        if not merged[previous].text.endswith(" ") and mark.text in appended:
            merged[previous] = merged[previous] + mark
            merged[current] = replace(mark, text="", tokens=(), indices=())
        else:
            previous = current
    return [word for word in merged if word.text]


def _split_characters(backend: Tokenizer, tokens: Sequence[int]) -> list[TokenWord]:
    """Groups of tokens that end where a character ends; bytes that are no character form groups of their own."""
    full = backend.decode(list(tokens), skip_special_tokens=False)
    groups: list[TokenWord] = []
    pending: list[int] = []
    offset = 0
    for index, token in enumerate(tokens):
        pending.append(token)
        text = backend.decode(pending, skip_special_tokens=False)
        place = offset + text.find(_BROKEN)
        if _BROKEN not in text or place >= len(full) or full[place] == _BROKEN or index == len(tokens) - 1:
            groups.append(TokenWord(text, tuple(pending), tuple(range(index + 1 - len(pending), index + 1))))
            offset += len(text)
            pending = []
    return groups
