"""What the commands model can write: its words, how each is spoken, and phrases people say with them.

English numbers to 9999, times, dates, letters and everyday commands, and the ten Spanish digits. Every spoken word is
one token; a phrase is a list of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable


def listed(text: str) -> list[str]:
    return text.split()


DIGITS = listed("zero one two three four five six seven eight nine")
TEENS = listed("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
MONTHS = listed("January February March April May June July August September October November December")
WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FIRSTS = listed("first second third fourth fifth sixth seventh eighth ninth")
ORDINALS = [*FIRSTS, "tenth", "eleventh", "twelfth", *(f"{teen}th" for teen in TEENS[3:]), "twentieth", "thirtieth"]
LETTERS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
TIMES = listed("o'clock AM PM half past quarter to at noon midnight in today tomorrow yesterday")
SMALL = listed("hundred thousand and oh the of")
COMMANDS = listed(
    "yes no okay please thanks hello goodbye stop start go pause play resume cancel repeat next previous back up down "
    "left right forward on off open close turn set call send read save delete search show louder quieter volume light "
    "lights door window music radio timer alarm temperature heating kitchen bedroom message phone camera home help "
    "weather minutes hours seconds degrees percent"
)
SPANISH = listed("cero uno dos tres cuatro cinco seis siete ocho nueve")
ENGLISH = [*DIGITS, *TEENS, *TENS, *SMALL, *TIMES, *MONTHS, *WEEKDAYS, *ORDINALS, *LETTERS, *COMMANDS]
WORDS = tuple(dict.fromkeys([*ENGLISH, *SPANISH]))
NUMBER_OF = {word: index for index, word in enumerate(WORDS)}
SPANISH_NUMBERS = tuple(NUMBER_OF[word] for word in SPANISH)
ENGLISH_NUMBERS = tuple(range(len(WORDS) - len(SPANISH)))

#: Written to spoken, where a synthesizer would not say the written form as it is meant.
SPOKEN = {"A": "ay", "AM": "ay em", "PM": "pee em"} | {letter: letter.lower() for letter in LETTERS[1:]}
#: Words that sound like others ("AM" like two letters): heard alone nobody can tell which, so only phrases teach them.
ONLY_IN_PHRASES = ("to", "oh", "AM", "PM")
OTHER_WORDS = listed(
    "house water people garden because letter morning animal country picture answer paper never table river mountain "
    "children always together school under between another important money summer doctor orange purple computer what "
    "where when which about world simple question yellow travel garage bottle chicken strong language"
)

Phrase = list[str]


def digits(draw: random.Random) -> Phrase:
    """A telephone number or another string of digits."""
    zero = draw.choice(["zero", "oh"])
    return [
        zero if digit == "zero" and draw.random() < 0.8 else digit
        for digit in draw.choices(DIGITS, k=draw.randint(2, 8))
    ]


def below_hundred(value: int) -> Phrase:
    if value < 20:
        return [[*DIGITS, *TEENS][value]]
    return [TENS[value // 10 - 2], *([DIGITS[value % 10]] if value % 10 else [])]


def number(draw: random.Random, highest: int = 9999) -> Phrase:
    """A number up to 9999 (fewer digits are as likely as more), with or without "and"."""
    value = draw.randrange(10 ** draw.randint(1, 4))
    value = min(value, highest)
    words: Phrase = []
    if value >= 1000:
        words += [*below_hundred(value // 1000), "thousand"]
    if value % 1000 >= 100:
        words += [DIGITS[value % 1000 // 100], "hundred"]
    if value % 100 or not value:
        words += ["and"] if words and draw.random() < 0.3 else []
        words += below_hundred(value % 100)
    return words


def year(draw: random.Random) -> Phrase:
    rest = draw.randrange(100)
    tail = ["hundred"] if not rest else ["oh", *below_hundred(rest)] if rest < 10 else below_hundred(rest)
    return [*below_hundred(draw.choice([18, 19, 20])), *tail]


def time(draw: random.Random) -> Phrase:
    """A time of day."""
    hour, kind = below_hundred(draw.randint(1, 12)), draw.random()
    if kind < 0.2:
        words = ["half", "past", *hour]
    elif kind < 0.35:
        words = ["quarter", draw.choice(["past", "to"]), *hour]
    elif kind < 0.5:
        words = [*draw.choice([["five"], ["ten"], ["twenty"], ["twenty", "five"]]), draw.choice(["past", "to"]), *hour]
    elif kind < 0.65:
        words = [*hour, "o'clock"]
    elif kind < 0.7:
        return [draw.choice(["noon", "midnight"])]
    else:
        minute = draw.randint(1, 59)
        words = [*hour, *(["oh"] if minute < 10 else []), *below_hundred(minute)]
    return words + ([draw.choice(["AM", "PM"])] if draw.random() < 0.4 else [])


def date(draw: random.Random) -> Phrase:
    """A day of a month, with or without its weekday and year."""
    day, month = draw.randint(1, 31), draw.choice(MONTHS)
    ordinal = [ORDINALS[day - 1]] if day <= 20 else ["thirtieth"] if day == 30 else below_hundred(day)[:1]
    ordinal += [FIRSTS[day % 10 - 1]] if day in range(21, 40) and day != 30 else []
    words = ["the", *ordinal, "of", month] if draw.random() < 0.5 else [month, *ordinal]
    if draw.random() < 0.35:
        words = [draw.choice(WEEKDAYS), *words]
    return words + (year(draw) if draw.random() < 0.25 else [])


def spelling(draw: random.Random) -> Phrase:
    """Letters, sometimes followed by digits, as of a name or a number plate."""
    return [*draw.choices(LETTERS, k=draw.randint(2, 7)), *draw.choices(DIGITS, k=draw.choice([0, 0, 0, 2, 3]))]


def command(draw: random.Random) -> Phrase:
    """Something to say to a machine."""
    amount = below_hundred(draw.randint(1, 60))
    some = lambda text: draw.choice(text.split())  # noqa: E731 (a name for one line)
    forms: list[Callable[[], Phrase]] = [
        lambda: ["turn", some("on off up down"), "the", some("light lights radio music heating volume")],
        lambda: ["turn", "the", some("light lights radio music heating camera"), some("on off")],
        lambda: [some("open close"), "the", some("door window")],
        lambda: ["set", *draw.choice([[], ["the"]]), "timer", some("to at"), *amount, some("minutes seconds hours")],
        lambda: ["set", "the", "alarm", some("to at"), *time(draw)],
        lambda: ["set", "the", "temperature", "to", *amount, "degrees"],
        lambda: ["set", "the", "volume", "to", *amount, "percent"],
        lambda: [some("play stop pause resume repeat"), *draw.choice([[], ["the"]]), some("music radio message")],
        lambda: [
            some("send read delete save show repeat"),
            "the",
            *draw.choice([["next"], ["previous"], []]),
            "message",
        ],
        lambda: [some("call show search"), *draw.choice([["home"], digits(draw), ["the", "weather"]])],
        lambda: ["go", some("left right up down back forward home")],
        lambda: [
            some("next previous back forward louder quieter stop start go cancel help"),
            *draw.choice([[], ["please"]]),
        ],
        lambda: [some("yes no okay hello goodbye thanks"), *draw.choice([[], ["please"], ["thanks"]])],
        lambda: ["lights", some("on off"), "in", "the", some("kitchen bedroom")],
        lambda: ["weather", some("today tomorrow"), "at", *time(draw)],
        lambda: ["in", *amount, some("minutes hours seconds")],
    ]
    return draw.choice(forms)()


KINDS: dict[str, Callable[[random.Random], Phrase]] = {
    "digits": digits, "number": number, "time": time, "date": date, "letters": spelling, "command": command,
}  # fmt: skip


def english(draw: random.Random) -> Phrase:
    """A phrase of any kind."""
    return draw.choice(list(KINDS.values()))(draw)


def spanish(draw: random.Random) -> Phrase:
    """A string of Spanish digits."""
    return draw.choices(SPANISH, k=draw.randint(2, 7))


def spoken(word: str) -> str:
    """What a synthesizer is asked to say for a word."""
    return SPOKEN.get(word, word)
