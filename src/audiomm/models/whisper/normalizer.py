"""Text normalisers for scoring transcripts: what counts as the same words when error rates are computed.

The rules are those of the Whisper paper's appendix C (arXiv:2212.04356) as openai/whisper applies them.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from ...base.errors import InputError
from ...base.hub import read_json
from .english_numbers import EnglishNumberNormalizer

__all__ = [
    "BasicTextNormalizer",
    "EnglishNumberNormalizer",
    "EnglishSpellingNormalizer",
    "EnglishTextNormalizer",
    "graphemes",
    "remove_symbols",
    "remove_symbols_and_diacritics",
]

_SPELLING_FILE = Path(__file__).parents[2] / "data" / "english_spelling.json"

#: Letters that Unicode does not take apart into a letter and a mark.
_PLAIN_LETTERS = {
    "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "ß": "ss", "ẞ": "SS",
    "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "th", "ł": "l", "Ł": "L",
}  # fmt: skip

_FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")

#: Applied in this order: whole words first, then perfect tenses, then the general endings.
_CONTRACTIONS = {
    r"\bwon't\b": "will not",
    r"\bcan't\b": "can not",
    r"\blet's\b": "let us",
    r"\bain't\b": "aint",
    r"\by'all\b": "you all",
    r"\bwanna\b": "want to",
    r"\bgotta\b": "got to",
    r"\bgonna\b": "going to",
    r"\bi'ma\b": "i am going to",
    r"\bimma\b": "i am going to",
    r"\bwoulda\b": "would have",
    r"\bcoulda\b": "could have",
    r"\bshoulda\b": "should have",
    r"\bma'am\b": "madam",
}
_TITLES = {
    "mr": "mister", "mrs": "missus", "st": "saint", "dr": "doctor", "prof": "professor", "capt": "captain",
    "gov": "governor", "ald": "alderman", "gen": "general", "sen": "senator", "rep": "representative",
    "pres": "president", "rev": "reverend", "hon": "honorable", "asst": "assistant", "assoc": "associate",
    "lt": "lieutenant", "col": "colonel", "jr": "junior", "sr": "senior", "esq": "esquire",
}  # fmt: skip
_ENDINGS = {
    r"'d been\b": " had been",
    r"'s been\b": " has been",
    r"'d gone\b": " had gone",
    r"'s gone\b": " has gone",
    r"'d done\b": " had done",
    r"'s got\b": " has got",
    r"n't\b": " not",
    r"'re\b": " are",
    r"'s\b": " is",
    r"'d\b": " would",
    r"'ll\b": " will",
    r"'t\b": " not",
    r"'ve\b": " have",
    r"'m\b": " am",
}
_REPLACEMENTS = [
    (re.compile(pattern), text)
    for pattern, text in [
        *_CONTRACTIONS.items(),
        *((rf"\b{short}\b", f"{full} ") for short, full in _TITLES.items()),
        *_ENDINGS.items(),
    ]
]


class BasicTextNormalizer:
    """Lower case, no brackets, no punctuation; for any language.

    Attributes:
        remove_diacritics: Strip accents too, and write letters like "ß" and "ø" plainly.
        split_letters: Put a space between all letters, for languages written without spaces.
    """

    def __init__(self, remove_diacritics: bool = False, split_letters: bool = False) -> None:
        self.remove_diacritics = remove_diacritics
        self.split_letters = split_letters

    def __call__(self, text: str) -> str:
        """The normalised text."""
        text = _without_brackets(_checked(text).lower())
        text = (remove_symbols_and_diacritics(text) if self.remove_diacritics else remove_symbols(text)).lower()
        if self.split_letters:
            text = " ".join(graphemes(text))
        return re.sub(r"\s+", " ", text)


class EnglishSpellingNormalizer:
    """British spellings to American ones, word by word.

    Attributes:
        mapping: Spelling to spelling; the packaged table when none is given.
    """

    def __init__(self, english_spelling_mapping: Mapping[str, str] | None = None) -> None:
        self.mapping = _packaged_spelling() if english_spelling_mapping is None else english_spelling_mapping

    def __call__(self, text: str) -> str:
        """The text in American spelling, one space between words."""
        return " ".join(self.mapping.get(word, word) for word in text.split())


class EnglishTextNormalizer:
    """English text for scoring: contractions, titles, numbers, spelling and punctuation evened out.

    Attributes:
        standardize_numbers: Spelled-out numbers to figures.
        standardize_spellings: British spelling to American.
    """

    def __init__(self, english_spelling_mapping: Mapping[str, str] | None = None) -> None:
        """Take a table of spellings, or the packaged one.

        Args:
            english_spelling_mapping: British spelling to American, as in a checkpoint's normalizer.json.
        """
        self.standardize_numbers = EnglishNumberNormalizer()
        self.standardize_spellings = EnglishSpellingNormalizer(english_spelling_mapping)

    def __call__(self, text: str) -> str:
        """The normalised text."""
        text = _without_brackets(_checked(text).lower())
        text = _FILLERS.sub("", text)
        text = re.sub(r"\s+'", "'", text)
        for pattern, replacement in _REPLACEMENTS:
            text = pattern.sub(replacement, text)
        text = re.sub(r"(\d),(\d)", r"\1\2", text)
        text = re.sub(r"\.([^0-9]|$)", r" \1", text)
        text = remove_symbols_and_diacritics(text, keep=".%$¢€£")
        text = self.standardize_spellings(self.standardize_numbers(text))
        # What is left of the symbols counts only beside a number.
        text = re.sub(r"[.$¢€£]([^0-9])", r" \1", text)
        text = re.sub(r"([^0-9])%", r"\1 ", text)
        return re.sub(r"\s+", " ", text)


def remove_symbols(text: str) -> str:
    """Marks, symbols and punctuation replaced by spaces, after NFKC; accents on letters stay."""
    return "".join(
        " " if unicodedata.category(character)[0] in "MSP" else character
        for character in unicodedata.normalize("NFKC", text)
    )


def remove_symbols_and_diacritics(text: str, keep: str = "") -> str:
    """Symbols and punctuation replaced by spaces, accents dropped; characters of `keep` stay."""
    return "".join(_plain(character, keep) for character in unicodedata.normalize("NFKD", text))


def graphemes(text: str) -> list[str]:
    """What a reader takes for single characters: letters with their marks, Hangul syllables, joined emoji.

    Source: Unicode Standard Annex 29, extended grapheme clusters, with the classes read off the general category.
    """
    clusters: list[str] = []
    for character in text:
        if clusters and _belongs_to(clusters[-1], character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"a normaliser takes a string, not {type(text).__name__}; call it once per text.")
    return text


def _without_brackets(text: str) -> str:
    """Remarks like <noise>, [music] and (coughs) removed."""
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text)
    return re.sub(r"\(([^)]+?)\)", "", text)


def _plain(character: str, keep: str) -> str:
    if character in keep:
        return character
    if character in _PLAIN_LETTERS:
        return _PLAIN_LETTERS[character]
    category = unicodedata.category(character)
    if category == "Mn":
        return ""
    return " " if category[0] in "MSP" else character


@functools.cache
def _packaged_spelling() -> Mapping[str, str]:
    return read_json(_SPELLING_FILE)


#: Joiners and tags: invisible characters that stay with the one before them.
_JOINERS = frozenset({0x200C, 0x200D, 0xFF9E, 0xFF9F, *range(0xE0020, 0xE0080), *range(0x1F3FB, 0x1F400)})
#: Signs that stay with the character after them, such as the Arabic number sign.
_LEADERS = frozenset({*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0xD4E, 0x110BD, 0x110CD})
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


def _belongs_to(cluster: str, character: str) -> bool:
    """Whether a character continues the cluster before it."""
    last = cluster[-1]
    if last == "\r" and character == "\n":
        return True
    if _is_control(last) or _is_control(character):
        return False
    if _joins_hangul(last, character) or ord(last) in _LEADERS:
        return True
    if unicodedata.category(character)[0] == "M" or ord(character) in _JOINERS or character in "\u0e33\u0eb3":
        return True
    if ord(last) in _FLAG_LETTERS and ord(character) in _FLAG_LETTERS:
        return len(cluster) % 2 == 1
    return last == "\u200d" and unicodedata.category(cluster[0]) == "So" and unicodedata.category(character) == "So"


def _is_control(character: str) -> bool:
    code = ord(character)
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and code not in _JOINERS and code not in _LEADERS


def _hangul_part(character: str) -> str:
    """L, V or T for a leading, vowel or trailing letter, LV or LVT for a syllable, "" for anything else."""
    code = ord(character)
    if 0x1100 <= code <= 0x115F or 0xA960 <= code <= 0xA97C:
        return "L"
    if 0x1160 <= code <= 0x11A7 or 0xD7B0 <= code <= 0xD7C6:
        return "V"
    if 0x11A8 <= code <= 0x11FF or 0xD7CB <= code <= 0xD7FB:
        return "T"
    if 0xAC00 <= code <= 0xD7A3:
        return "LV" if (code - 0xAC00) % 28 == 0 else "LVT"
    return ""


def _joins_hangul(last: str, character: str) -> bool:
    before, after = _hangul_part(last), _hangul_part(character)
    if before == "L":
        return after in ("L", "V", "LV", "LVT")
    if before in ("LV", "V"):
        return after in ("V", "T")
    return before in ("LVT", "T") and after == "T"
