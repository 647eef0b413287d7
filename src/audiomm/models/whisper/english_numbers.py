"""Spelled-out English numbers to figures: "twenty-one dollars and five cents" becomes "$21.05".

The rules, and where they stop (no "ninth", no fractions but "and a half"), are those of openai/whisper's
EnglishNumberNormalizer, so that error rates stay comparable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_ONES = {
    name: value
    for value, name in enumerate(
        [
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ],
        start=1,
    )
}
_ZEROS = frozenset({"o", "oh", "zero"})
_TENS = {
    name: value
    for value, name in zip(
        range(20, 100, 10), ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], strict=True
    )
}
_MULTIPLIERS = {"hundred": 100} | {
    name: 1000**power
    for power, name in enumerate(
        [
            "thousand",
            "million",
            "billion",
            "trillion",
            "quadrillion",
            "quintillion",
            "sextillion",
            "septillion",
            "octillion",
            "nonillion",
            "decillion",
        ],
        start=1,
    )
}
_IRREGULAR_ORDINALS = {
    "zeroth": (0, "th"),
    "first": (1, "st"),
    "second": (2, "nd"),
    "third": (3, "rd"),
    "fifth": (5, "th"),
    "twelfth": (12, "th"),
}
_ONES_ENDED = (
    {("sixes" if name == "six" else name + "s"): (value, "s") for name, value in _ONES.items()}
    | {
        name + ("h" if name.endswith("t") else "th"): (value, "th")
        for name, value in _ONES.items()
        if value > 3 and value not in (5, 12)
    }
    | _IRREGULAR_ORDINALS
)
_TENS_ENDED = {name[:-1] + "ies": (value, "s") for name, value in _TENS.items()} | {
    name[:-1] + "ieth": (value, "th") for name, value in _TENS.items()
}
_MULTIPLIERS_ENDED = {name + "s": (value, "s") for name, value in _MULTIPLIERS.items()} | {
    name + "th": (value, "th") for name, value in _MULTIPLIERS.items()
}
_SIGNS = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
_CURRENCIES = {
    "pound": "£",
    "pounds": "£",
    "euro": "€",
    "euros": "€",
    "dollar": "$",
    "dollars": "$",
    "cent": "¢",
    "cents": "¢",
}
_PREFIXES = frozenset({*_SIGNS.values(), *_CURRENCIES.values()})
_REPEATS = {"double": 2, "triple": 3}
_DIGIT_WORDS = frozenset({*_ONES, *_TENS, *_ZEROS})
_FIGURES = re.compile(r"^\d+(\.\d+)?$")


class EnglishNumberNormalizer:
    """Writes spelled-out numbers as figures, keeping suffixes (1960s, 32nd), currencies and per cent.

    The text is expected in lower case and without symbols other than those of numbers.
    """

    def __call__(self, text: str) -> str:
        """The text with its numbers in figures."""
        return _tidy(" ".join(_Reader(_prepare(text).split()).read()))


def _prepare(text: str) -> str:
    """Write "and a half" as decimals after a number, and set numbers and letters apart."""
    parts = re.split(r"\band\s+a\s+half\b", text)
    pieces = []
    for number, part in enumerate(parts):
        if not part.strip():
            continue
        pieces.append(part)
        if number < len(parts) - 1:
            last = part.rsplit(maxsplit=2)[-1]
            pieces.append("point five" if last in _DIGIT_WORDS or last in _MULTIPLIERS else "and a half")
    text = " ".join(pieces)
    text = re.sub(r"([a-z])([0-9])", r"\1 \2", text)
    text = re.sub(r"([0-9])([a-z])", r"\1 \2", text)
    return re.sub(r"([0-9])\s+(st|nd|rd|th|s)\b", r"\1\2", text)


def _tidy(text: str) -> str:
    """Join dollars and cents, and write a lonely 1 as "one"."""
    text = re.sub(
        r"([€£$])([0-9]+) (?:and )?¢([0-9]{1,2})\b", lambda match: f"{match[1]}{match[2]}.{int(match[3]):02d}", text
    )
    text = re.sub(r"[€£$]0.([0-9]{1,2})\b", lambda match: f"¢{int(match[1])}", text)
    return re.sub(r"\b1(s?)\b", r"one\1", text)


@dataclass(frozen=True)
class _Place:
    """A word and its neighbours; "" where there is none."""

    word: str
    previous: str
    following: str

    def leads_to_number(self) -> bool:
        return self.following in _ACTIONS or bool(_FIGURES.match(self.following))


class _Reader:
    """Reads words one by one; `value` is the number under way: an int that may grow, or text that is appended to."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.value: int | str | None = None
        self.prefix = ""
        self.written: list[str] = []
        self.skipping = False

    def read(self) -> list[str]:
        for position, word in enumerate(self.words):
            if self.skipping:
                self.skipping = False
                continue
            previous = self.words[position - 1] if position else ""
            following = self.words[position + 1] if position + 1 < len(self.words) else ""
            self.take(word, previous, following)
        self.flush()
        return self.written

    def write(self, result: int | str) -> None:
        """Put a finished piece out, with the sign or currency that waits for it."""
        self.written.append(f"{self.prefix}{result}")
        self.prefix, self.value = "", None

    def flush(self) -> None:
        if self.value is not None:
            self.write(self.value)

    def write_word(self, word: str) -> None:
        self.flush()
        self.write(word)

    def take(self, word: str, previous: str, following: str) -> None:
        bare = word[1:] if word[0] in _PREFIXES else word
        if _FIGURES.match(bare):
            self.take_figures(word, bare)
        elif word in _ACTIONS:
            action, value = _ACTIONS[word]
            action(self, value, _Place(word, previous, following))
        else:
            self.write_word(word)

    def take_figures(self, word: str, bare: str) -> None:
        if isinstance(self.value, str) and self.value.endswith("."):
            self.value += word  # decimals after "point", or the parts of an address like 127.0.0.1
            return
        self.flush()
        if bare != word:
            self.prefix = word[0]
        number = Fraction(bare)
        self.value = number.numerator if number.denominator == 1 else bare

    def take_zero(self, _: None, place: _Place) -> None:
        self.value = f"{self.value or ''}0"

    def take_ones(self, ones: int, place: _Place) -> None:
        self.value = self.with_ones(ones, place.previous)

    def take_ones_ended(self, ended: tuple[int, str], place: _Place) -> None:
        self.write(f"{self.with_ones(ended[0], place.previous)}{ended[1]}")

    def take_tens(self, tens: int, place: _Place) -> None:
        self.value = self.with_tens(tens)

    def take_tens_ended(self, ended: tuple[int, str], place: _Place) -> None:
        self.write(f"{self.with_tens(ended[0])}{ended[1]}")

    def take_multiplier(self, multiplier: int, place: _Place) -> None:
        self.value = self.times(multiplier, zero_stands_alone=True)

    def take_multiplier_ended(self, ended: tuple[int, str], place: _Place) -> None:
        self.write(f"{self.times(ended[0], zero_stands_alone=False)}{ended[1]}")

    def take_sign(self, sign: str, place: _Place) -> None:
        self.flush()
        if place.leads_to_number():
            self.prefix = sign
        else:
            self.write(place.word)

    def take_currency(self, symbol: str, place: _Place) -> None:
        if self.value is None:
            self.write(place.word)
        else:
            self.prefix = symbol
            self.flush()

    def take_percent(self, _: None, place: _Place) -> None:
        if self.value is not None:
            self.write(f"{self.value}%")
        else:
            self.write(place.word)

    def take_per(self, _: None, place: _Place) -> None:
        if self.value is not None and place.following == "cent":
            self.write(f"{self.value}%")
            self.skipping = True
        else:
            self.write_word(place.word)

    def take_and(self, _: None, place: _Place) -> None:
        if place.previous not in _MULTIPLIERS or not place.leads_to_number():
            self.write_word(place.word)

    def take_point(self, _: None, place: _Place) -> None:
        if place.following in _DIGIT_WORDS or _FIGURES.match(place.following):
            self.value = f"{self.value or ''}."
        elif not place.leads_to_number():
            self.write_word(place.word)

    def take_repeat(self, times: int, place: _Place) -> None:
        if place.following in _ONES or place.following in _ZEROS:
            self.value = f"{self.value or ''}{str(_ONES.get(place.following, 0)) * times}"
            self.skipping = True
        else:
            self.write_word(place.word)

    def with_ones(self, ones: int, previous: str) -> int | str:
        """The number under way continued by one to nineteen: added to round tens or hundreds, appended otherwise."""
        if self.value is None:
            return ones
        if isinstance(self.value, str) or previous in _ONES:
            if previous in _TENS and ones < 10:
                return f"{str(self.value)[:-1]}{ones}"
            return f"{self.value}{ones}"
        return self.value + ones if self.value % (10 if ones < 10 else 100) == 0 else f"{self.value}{ones}"

    def with_tens(self, tens: int) -> int | str:
        if self.value is None:
            return tens
        if isinstance(self.value, int) and self.value % 100 == 0:
            return self.value + tens
        return f"{self.value}{tens}"

    def times(self, multiplier: int, zero_stands_alone: bool) -> int:
        """The number under way times hundred, thousand, ...; only what is below a thousand is multiplied."""
        if self.value is None:
            return multiplier
        if isinstance(self.value, str) or (self.value == 0 and zero_stands_alone):
            product = _product(self.value, multiplier)
            if product is not None:
                return product
            self.write(self.value)
            return multiplier
        return self.value // 1000 * 1000 + self.value % 1000 * multiplier


#: What to do at each word that has to do with numbers, and the value that goes with it.
_ACTIONS: dict[str, tuple[Callable[[_Reader, Any, _Place], None], Any]] = {
    **dict.fromkeys(_ZEROS, (_Reader.take_zero, None)),
    **{word: (_Reader.take_ones, value) for word, value in _ONES.items()},
    **{word: (_Reader.take_ones_ended, value) for word, value in _ONES_ENDED.items()},
    **{word: (_Reader.take_tens, value) for word, value in _TENS.items()},
    **{word: (_Reader.take_tens_ended, value) for word, value in _TENS_ENDED.items()},
    **{word: (_Reader.take_multiplier, value) for word, value in _MULTIPLIERS.items()},
    **{word: (_Reader.take_multiplier_ended, value) for word, value in _MULTIPLIERS_ENDED.items()},
    **{word: (_Reader.take_sign, sign) for word, sign in _SIGNS.items()},
    **{word: (_Reader.take_currency, symbol) for word, symbol in _CURRENCIES.items()},
    **{word: (_Reader.take_repeat, times) for word, times in _REPEATS.items()},
    "percent": (_Reader.take_percent, None),
    "per": (_Reader.take_per, None),
    "and": (_Reader.take_and, None),
    "point": (_Reader.take_point, None),
}


def _product(value: int | str, multiplier: int) -> int | None:
    """A decimal times a multiplier, if that is whole; None otherwise or if the text is no number."""
    try:
        product = Fraction(value) * multiplier
    except ValueError:
        return None
    return product.numerator if product.denominator == 1 else None
