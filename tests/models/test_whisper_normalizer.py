"""The normalisers that transcripts are scored with; expectations follow from the rules of the Whisper paper."""

from __future__ import annotations

import pytest

from audiomm.base.errors import InputError
from audiomm.models.whisper.normalizer import (
    BasicTextNormalizer,
    EnglishNumberNormalizer,
    EnglishSpellingNormalizer,
    EnglishTextNormalizer,
    graphemes,
)


@pytest.mark.parametrize(
    ("spoken", "written"),
    [
        ("two", "2"),
        ("one", "one"),
        ("forty two", "42"),
        ("three hundred and six", "306"),
        ("three hundred men and six women", "300 men and 6 women"),
        ("seven thousand two hundred", "7200"),
        ("four million and two", "4000002"),
        ("twelve hundred", "1200"),
        ("nineteen eighty four", "1984"),
        ("nineteen oh five", "1905"),
        ("twenty twenty six", "2026"),
        ("six five nine", "659"),
        ("two and a half", "2.5"),
        ("two and a half million", "2500000"),
        ("a cat and a half", "a cat and a half"),
        ("three point one four", "3.14"),
        ("zero point five", "0.5"),
        ("0.5 million", "500000"),
        ("1.234 thousand", "1234"),
        ("2.3456 thousand", "2.3456 1000"),
        ("the point is", "the point is"),
        ("one two seven point zero point zero point two", "127.0.0.2"),
        ("double oh seven", "007"),
        ("triple nine", "999"),
        ("double trouble", "double trouble"),
        ("double", "double"),
        ("minus five", "-5"),
        ("plus 3", "+3"),
        ("five minus", "5 minus"),
        ("minus", "minus"),
        ("fifty per cent", "50%"),
        ("fifty percent", "50%"),
        ("five per head", "5 per head"),
        ("per cent", "per cent"),
        ("percent", "percent"),
        ("ten dollars", "$10"),
        ("dollars", "dollars"),
        ("nine pounds and five cents", "£9.05"),
        ("zero dollars", "$0"),
        ("thirty euros", "€30"),
        ("five cents", "¢5"),
        ("thirty second", "32nd"),
        ("first", "1st"),
        ("twentieth", "20th"),
        ("two hundredth", "200th"),
        ("nineteen sixties", "1960s"),
        ("two millions", "2000000s"),
        ("hundreds", "100s"),
        ("sixes", "6s"),
        ("ones", "ones"),
        ("7 th", "7th"),
        ("abc123", "abc 123"),
        ("$20 million", "$20000000"),
        ("5 and 6", "5 and 6"),
        ("one hundred and", "100 and"),
        ("", ""),
    ],
)
def test_spelled_out_numbers_become_figures(spoken, written):
    assert EnglishNumberNormalizer()(spoken) == written


def test_spelling_becomes_american_by_the_packaged_table_or_ones_own():
    assert EnglishSpellingNormalizer()("the colour  of organised grey") == "the color of organized gray"
    assert EnglishSpellingNormalizer({"colour": "hue"})("colour grey") == "hue grey"
    assert EnglishSpellingNormalizer({})("colour") == "colour"


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("He's been there; she'd gone.", "he has been there she had gone"),
        ("I won't, can't and shouldn't", "i will not can not and should not"),
        ("Let's go, y'all, they're late", "let us go you all they are late"),
        ("Mr. and Mrs. Park met Dr. Who", "mister and missus park met doctor who"),
        ("1,000 people [laughs] (quietly) um <noise> paid", "1000 people paid"),
        ("It costs $3.50. Really.", "it costs $3.50 really"),
        ("50% of naïve cafés", "50% of naive cafes"),
        ("100 %", "100 "),
        ("well-known   spaces\n", "well known spaces"),
        ("I'm it 's", "i am it is"),
        ("Straße, Łódź", "strasse lodz"),
    ],
)
def test_english_text_is_evened_out(text, normalized):
    normalizer = EnglishTextNormalizer()
    assert normalizer(text) == normalized
    assert normalizer(normalized).strip() == normalized.strip()


def test_english_takes_a_checkpoints_spellings():
    assert EnglishTextNormalizer({"foo": "bar"})("Foo colour") == "bar colour"


@pytest.mark.parametrize(
    ("options", "text", "normalized"),
    [
        ({}, "Ça va? (oui) [bruit] <x>", "ça va "),
        ({"remove_diacritics": True}, "Ça va, Ærøskøbing!", "ca va aeroskobing "),
        ({"split_letters": True}, "今日は、晴れ", "今 日 は 晴 れ"),
        ({"split_letters": True}, "ab ñ", "a b ñ"),
        ({"split_letters": True, "remove_diacritics": True}, "한국", "한 국"),
        ({}, "ﬁne ２", "fine 2"),
        ({}, "", ""),
    ],
)
def test_basic_text_is_lower_case_without_marks(options, text, normalized):
    import unicodedata

    result = BasicTextNormalizer(**options)(text)
    assert unicodedata.normalize("NFC", result) == normalized


@pytest.mark.parametrize(
    ("text", "clusters"),
    [
        ("abc", ["a", "b", "c"]),
        ("e\u0301a", ["e\u0301", "a"]),
        ("\u1112\u1161\u11ab\u1100", ["\u1112\u1161\u11ab", "\u1100"]),
        ("가\u11a8각\u11a8각\u1161", ["가\u11a8", "각\u11a8", "각", "\u1161"]),
        ("\r\n\n", ["\r\n", "\n"]),
        ("👩\u200d🔬🇫🇷🇩🇪", ["👩\u200d🔬", "🇫🇷", "🇩🇪"]),
        ("\u0600\u0661", ["\u0600\u0661"]),
        ("น\u0e33", ["น\u0e33"]),
        ("", []),
    ],
)
def test_graphemes_keep_together_what_is_read_as_one(text, clusters):
    assert graphemes(text) == clusters


@pytest.mark.parametrize("normalizer", [BasicTextNormalizer(), EnglishTextNormalizer()])
def test_a_list_is_refused(normalizer):
    with pytest.raises(InputError, match="not list"):
        normalizer(["a", "b"])
