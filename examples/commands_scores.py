"""The table of the commands model's card: error rates on voices new to it, languages, times, false alarms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import commands_voices as cv
import commands_words as cw
import digit_strings as ds
import numpy as np
import soundfile
import torch
from commands_batches import Teachers, Window, WindowMaker
from commands_checkpoint import EOT, ES, FIRST_TIME, WORD_TOKEN
from commands_voices import Clip, Voice
from digit_scores import TEST_TAKES, edits, test_strings

from audiomm import WhisperFeatureExtractor, WhisperForConditionalGeneration

BATCH = 8
PROMPT_NAMES = {  # files of recorded voices (Asterisk's prompts, saytime, KLettres): what they say
    **{f"digits/{index}": word for index, word in enumerate([*cw.DIGITS, *cw.TEENS])},
    **{f"digits/{10 * index}": word for index, word in enumerate(cw.TENS, 2)},
    **{f"digits/mon-{index}": month for index, month in enumerate(cw.MONTHS)},
    **{f"digits/day-{index}": day for index, day in enumerate([cw.WEEKDAYS[-1], *cw.WEEKDAYS[:-1]])},
    **{f"digits/h-{index}": word for index, word in enumerate(cw.ORDINALS[:20], 1)},
    "digits/h-30": "thirtieth", "digits/hundred": "hundred", "digits/thousand": "thousand", "digits/oclock": "o'clock",
    "digits/a-m": "AM", "digits/p-m": "PM", "digits/today": "today", "digits/tomorrow": "tomorrow",
    "digits/yesterday": "yesterday", "hello": "hello", "minutes": "minutes", "seconds": "seconds", "goodbye": "goodbye",
    **{f"letters/{letter.lower()}": letter for letter in cw.LETTERS},
    **{f"alpha/{name}": letter for letter in cw.LETTERS for name in (letter, letter.lower())},
    **{f"{index}": word for index, word in enumerate([*cw.DIGITS, *cw.TEENS, "twenty"])},
    "30": "thirty", "40": "forty", "50": "fifty", "oclock": "o'clock", "and": "and", "second": "second",
    "hours": "hours",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ test material
def joined(clips: Sequence[Clip], rng: np.random.Generator) -> Window:
    """Clips one after the other with gaps of 0.04 to 0.4 s."""
    now, pieces, words = float(rng.uniform(0, 0.6)), [], []
    for clip in clips:
        pieces.append((int(now * ds.RATE), clip.wave))
        words += [(number, now + start, now + end) for number, start, end in clip.marks]
        now += len(clip.samples) / ds.RATE + float(rng.uniform(0.04, 0.4))
    wave = np.zeros(int((now + rng.uniform(0, 0.5)) * ds.RATE), np.float32)
    for at, piece in pieces:
        wave[at : at + len(piece)] += piece[: len(wave) - at]
    return Window(wave, words, content=len(wave) / ds.RATE)


def every_word(voice: Voice, rng: np.random.Generator) -> list[Window]:
    """Each word once, six in a string, in random order."""
    numbers = [number for number in voice.words if cw.WORDS[number] not in cw.ONLY_IN_PHRASES]
    rng.shuffle(numbers)
    return [joined([voice.words[n][0] for n in numbers[at : at + 6]], rng) for at in range(0, len(numbers), 6)]


def word_by_word(voice: Voice, count: int, rng: np.random.Generator, seed: int) -> list[Window]:
    """Phrases whose words are spoken one by one, as far as the voice has them."""
    draw, result = random.Random(seed), []
    while len(result) < count:
        numbers = [cw.NUMBER_OF[word] for word in cw.english(draw)]
        if all(number in voice.words for number in numbers):
            result.append(joined([voice.words[number][0] for number in numbers], rng))
    return result


def running(voice: Voice, count: int, rng: np.random.Generator) -> list[Window]:
    """Phrases in one breath."""
    return [joined([clip], rng) for clip in voice.phrases[:count]]


def prompts(folder: Path) -> Voice:
    """A recorded voice from a folder of prompts, a word a file."""
    voice = Voice()
    for name, word in PROMPT_NAMES.items():
        for path in folder.glob(f"{name}.*"):
            wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
            clip = cv.as_clip(wave.mean(1), rate, [word], None)
            if clip is not None:
                voice.words[cw.NUMBER_OF[word]] = [clip]
    return voice


def without_speech() -> list[Window]:
    """200 clips of 1 to 30 s: noise, hum, tones, notes, clicks, pulsing sounds, white noise, digital silence."""
    maker = WindowMaker(Teachers({}, {}, {}), 3)
    rng, waves = maker.rng, []
    for index in range(180):
        size, level = int(rng.uniform(1, 30) * ds.RATE), np.float32(10 ** rng.uniform(-4, -0.7))
        wave = maker.noise_like(size) if index % 6 else rng.standard_normal(size).astype(np.float32)
        if index % 3 == 0:
            wave = wave * maker._pulses(size)
        waves.append(wave * level)
    waves += [np.zeros(int(seconds * ds.RATE), np.float32) for seconds in np.linspace(1, 30, 20)]
    return [Window(wave.astype(np.float32), content=len(wave) / ds.RATE) for wave in waves]


# ----------------------------------------------------------------------------------------------------------- measures
def features_of(windows: list[Window]) -> Iterator[tuple[list[Window], torch.Tensor]]:
    extractor = WhisperFeatureExtractor()
    for start in range(0, len(windows), BATCH):
        part = windows[start : start + BATCH]
        waves = [window.wave for window in part]
        yield part, torch.as_tensor(extractor(waves, sampling_rate=ds.RATE, return_tensors="pt").input_features)


def transcripts(model: WhisperForConditionalGeneration, windows: list[Window], **options: object) -> list[list[int]]:
    """Greedy transcripts as ids of words and timestamps; the language is detected unless it is given."""
    result: list[list[int]] = []
    with torch.no_grad():
        for _, features in features_of(windows):
            ids = model.generate(features, **options).tolist()
            result += [[t for t in row if WORD_TOKEN <= t < EOT or t >= FIRST_TIME] for row in ids]
    return result


def words_of(ids: list[int]) -> list[int]:
    return [token - WORD_TOKEN for token in ids if token < EOT]


def score(model: WhisperForConditionalGeneration, windows: list[Window], **options: object) -> tuple[str, list[str]]:
    """A row of the table (words, error rate, errors of the times), and the most frequent errors."""
    wrong, total = 0, sum(len(window.digits) for window in windows)
    errors: list[float] = []
    bad: list[str] = []
    for window, ids in zip(windows, transcripts(model, windows, **options), strict=True):
        said = [item[0] for item in window.digits]
        if options.get("task") == "translate":
            said = [number - cw.SPANISH_NUMBERS[0] if number in cw.SPANISH_NUMBERS else number for number in said]
        written = words_of(ids)
        count = edits(said, written)
        wrong += count
        if count:
            bad.append(f"{' '.join(cw.WORDS[n] for n in said)} -> {' '.join(cw.WORDS[n] for n in written)}")
        found = [(token - FIRST_TIME) / ds.FRAMES_PER_SECOND for token in ids if token >= FIRST_TIME]
        true = [time for _, begin, end in window.digits for time in (begin, end)]
        if len(found) == len(true):
            errors += [abs(left - right) for left, right in zip(found, true, strict=True)]
    middle, most = (np.percentile(errors, share) * 1000 if errors else float("nan") for share in (50, 95))
    return f"{total:5d} | {wrong / max(total, 1):6.1%} | {middle:4.0f} ms, 95 % below {most:.0f} ms", bad


def spanish_share(model: WhisperForConditionalGeneration, windows: list[Window]) -> tuple[int, int]:
    """How many windows are taken for Spanish, of how many."""
    found = []
    with torch.no_grad():
        for _, features in features_of(windows):
            found += model.detect_language(features).tolist()
    return sum(token == ES for token in found), len(found)


def at_8_khz(windows: list[Window]) -> list[Window]:
    """The same as over a telephone: nothing above 3.8 kHz."""
    result = []
    for window in windows:
        spectrum = np.fft.rfft(window.wave)
        spectrum[int(3800 / (ds.RATE / 2) * len(spectrum)) :] = 0
        wave = np.fft.irfft(spectrum, len(window.wave)).astype(np.float32)
        result.append(Window(wave, window.digits, content=window.content))
    return result


def test_sets(data: Path, hold_out: str | None, folders: Sequence[Path]) -> dict[str, list[Window]]:
    """English windows by name: digits of recorded speakers, then everything from voices never trained on."""
    rng = np.random.default_rng(7)
    everyone = ds.read_recordings(data, TEST_TAKES)
    known = {name: digits for name, digits in everyone.items() if name != hold_out}
    sets: dict[str, list[Window]] = {"digits, known speakers, test takes": test_strings(known, 60, 11)}
    sets["digits, known speakers, 10 dB noise"] = test_strings(known, 40, 12, noise_db=10.0)
    sets["digits, known speakers, full 30 s"] = test_strings(known, 8, 13, full=True)
    if hold_out:
        unknown = ds.read_recordings(data, range(50), [hold_out])
        sets[f"digits, {hold_out}, never trained on"] = test_strings(unknown, 100, 14)
        sets[f"digits, {hold_out}, full 30 s"] = test_strings(unknown, 8, 15, full=True)
    for folder in folders:
        voice, name = prompts(folder), f"prompts of {folder.name}"
        if all(number in voice.words for number in range(10)):
            digits = [[clip.wave for clip in voice.words.pop(number)] for number in range(10)]
            sets[f"digits, {name}"] = test_strings({name: digits}, 60, 16)
        sets[f"other words, {name}"] = every_word(voice, rng)
    english, _ = cv.synthetic_voices(4, 5, held_out=True)
    for program in ("espeak", "flite", "festival"):
        voices = [voice for name, voice in english.items() if name.startswith(program)]
        if voices:
            each = 48 // len(voices)
            sets[f"{program}: every word"] = [window for voice in voices for window in every_word(voice, rng)]
            parts = [word_by_word(voice, each, rng, 17 + index) for index, voice in enumerate(voices)]
            sets[f"{program}: phrases word by word"] = [window for part in parts for window in part]
            spoken = [window for voice in voices for window in running(voice, each, rng)]
            sets |= {f"{program}: phrases in one breath": spoken} if spoken else {}
    return sets


def evaluate(model_folder: Path, data: Path, hold_out: str | None, prompts: Sequence[Path], errors: int = 0) -> None:
    """Print the table; with `errors` also so many wrong strings of each row."""
    model = WhisperForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    sets = test_sets(data, hold_out, prompts)
    narrow = [window for name, part in sets.items() if "phrases" in name for window in part][::3]
    sets["phrases, unseen voices, at 8 kHz"] = at_8_khz(narrow)
    print("| what | words | WER | error of the times |\n|---|---|---|---|")
    for name, windows in sets.items():
        row, bad = score(model, windows)
        print(f"| {name} | {row} |", *bad[:errors], sep="\n    ", flush=True)
    _, spanish = cv.synthetic_voices(4, 5, held_out=True)
    rng = np.random.default_rng(8)
    said = [window for voice in spanish.values() for window in running(voice, 12, rng) + every_word(voice, rng)]
    for task in ("transcribe", "translate"):
        row, bad = score(model, said, task=task)
        print(f"| Spanish digits, unseen voices, {task} | {row} |", *bad[:errors], sep="\n    ", flush=True)
    print("| Spanish taken for Spanish | {} of {} | | |".format(*spanish_share(model, said)), flush=True)
    others = [window for name, windows in sets.items() if "phrases" in name or "digits" in name for window in windows]
    print("| English taken for Spanish | {} of {} | | |".format(*spanish_share(model, others[::3])), flush=True)
    quiet = without_speech()
    for times in (True, False):
        empty = sum(not words_of(ids) for ids in transcripts(model, quiet, return_timestamps=times))
        print(f"| empty without speech, timestamps {times} | {empty} of {len(quiet)} | | |", flush=True)
