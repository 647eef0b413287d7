"""Voices that say the words and phrases of `commands_words`, with the time of every word.

espeak-ng (through its library, which tells when each word begins), festival, flite, RHVoice and SVOX Pico: whichever is
installed. A voice is a `Voice` of clips; samples are kept as 16-bit numbers, since there are some hundred voices.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import commands_words as cw
import digit_strings as ds
import numpy as np
import soundfile
import soxr

HELD_OUT_VARIANTS = ("f5", "m8", "Andrea", "Michael")
HELD_OUT_FLITE, HELD_OUT_FESTIVAL = "rms", "ked_diphone"
FLITE_VOICES, PICO_VOICES, PICO_SPANISH = ("kal", "awb", "slt"), ("en-US", "en-GB"), "es-ES"
RHVOICE_VOICES = ("alan", "bdl", "clb", "slt")  # not its voices whose licence forbids changes
FESTIVAL_VOICES = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
ACCENTS = ("en", "en-us", "en-us", "en-gb-x-rp", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-us-nyc")

Mark = tuple[int, float, float]  # number of the word, start and end in seconds


@dataclass
class Clip:
    """Samples at 16 kHz (int16) and the words in them."""

    samples: np.ndarray
    marks: list[Mark]

    @property
    def wave(self) -> np.ndarray:
        return self.samples.astype(np.float32) / 32768


@dataclass
class Voice:
    """Clips of one word each, by the word's number, and clips of whole phrases; or clips of other words."""

    words: dict[int, list[Clip]] = field(default_factory=dict)
    phrases: list[Clip] = field(default_factory=list)
    others: list[np.ndarray] = field(default_factory=list)


Voices = dict[str, Voice]
Speaker = Callable[[Sequence[Sequence[str]]], "list[Clip | None]"]


def as_clip(wave: np.ndarray, rate: int, words: Sequence[str], starts: Sequence[float] | None) -> Clip | None:
    """A trimmed clip; a word ends where the next one begins."""
    wave = soxr.resample(np.asarray(wave, np.float32), rate, ds.RATE)
    peak = np.abs(wave).max() if len(wave) else 0.0
    if peak < 0.01 or len(wave) < ds.HOP * 4:
        return None
    blocks = (wave[: len(wave) // ds.HOP * ds.HOP].reshape(-1, ds.HOP) ** 2).mean(1)
    loud = np.flatnonzero(blocks > blocks.max() * 10**-3.8)
    first, last = max(loud[0] - 1, 0) * ds.HOP, (loud[-1] + 2) * ds.HOP
    wave = wave[first:last] * min(1.0, 0.9 / peak)
    seconds = len(wave) / ds.RATE
    begin = [0.0] if starts is None else [max(start - first / ds.RATE, 0.0) for start in starts]
    ends = [*begin[1:], seconds]
    marks = [(cw.NUMBER_OF.get(word, -1), *span) for word, *span in zip(words, begin, ends, strict=True)]
    if any(end - start < 0.04 for _, start, end in marks):
        return None
    return Clip((wave * 32767).astype(np.int16), marks)


# ------------------------------------------------------------------------------------------------------- espeak-ng
class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    )  # fmt: skip


class Espeak:
    """The library of espeak-ng; one for the process."""

    _RETRIEVE, _RATE, _PITCH, _RANGE, _GAP, _WORD, _UTF8 = 2, 1, 3, 4, 7, 1, 1

    def __init__(self) -> None:
        self.library = ctypes.CDLL(find_library("espeak-ng") or "libespeak-ng.so.1")
        self.rate = self.library.espeak_Initialize(self._RETRIEVE, 0, None, 0)
        self.samples: list[np.ndarray] = []
        self.words: list[tuple[int, int]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self.callback = kind(self._take)
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: object, count: int, events: object) -> int:
        if samples and count:
            self.samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        place = 0
        while events[place].type:  # the list ends with a zero
            if events[place].type == self._WORD and events[place].text_position:
                self.words.append((events[place].text_position - 1, events[place].sample))
            place += 1
        return 0

    def choose(self, name: str, pitch: int, speed: int, spread: int, gap: int) -> bool:
        for option, value in ((self._RATE, speed), (self._PITCH, pitch), (self._RANGE, spread), (self._GAP, gap)):
            self.library.espeak_SetParameter(option, value, 0)
        return bool(self.library.espeak_SetVoiceByName(name.encode()) == 0)

    def say(self, words: Sequence[str]) -> Clip | None:
        """Speak a phrase. Words that it joins ("on the") share their time by their letters."""
        places, text = [], ""
        for word in words:
            places.append(len(text))
            text += cw.spoken(word) + " "
        self.samples, self.words = [], []
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 1, 0, self._UTF8, None, None)
        if not self.samples:
            return None
        known = dict(self.words)
        starts: list[float | None] = [known.get(place) for place in places]
        wave = np.concatenate(self.samples).astype(np.float32) / 32768
        if starts[0] is None:
            return None
        for index, start in enumerate(starts):
            if start is None:  # joined with the one before
                after = next((other for other in starts[index + 1 :] if other is not None), len(wave))
                before = starts[index - 1]
                here, next_ = len(cw.spoken(words[index - 1])), len(cw.spoken(words[index]))
                starts[index] = before + (after - before) * here / (here + next_)
        return as_clip(wave, self.rate, words, [start / self.rate for start in starts])


@cache
def espeak() -> Espeak:
    return Espeak()


def espeak_voices(
    language: str, count: int, phrases: Callable[[], list[list[str]]], draw: random.Random, held_out: bool
) -> Voices:
    """Random voices of espeak-ng: accents, variants, pitch, speed."""
    speaker = espeak()
    listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    variants = [line.split("!v/")[1].split()[0] for line in listing.splitlines() if "!v/" in line]
    variants = [variant for variant in variants if variant not in HELD_OUT_VARIANTS]
    plain = [name for name in (f"{sex}{i}" for sex in "mf" for i in range(1, 6)) if name not in HELD_OUT_VARIANTS]
    result: Voices = {}
    for index in range(count):
        accent = draw.choice(ACCENTS if language == "en" else ("es", "es-419"))
        variant = HELD_OUT_VARIANTS[index % 4] if held_out else draw.choice(plain if index % 2 else variants)
        slowest, quickest = (115, 220) if held_out else (105, 240)
        pitch, speed, spread = draw.randint(15, 85), draw.randint(slowest, quickest), draw.randint(20, 90)
        if not speaker.choose(f"{accent}+{variant}", pitch, speed, spread, 0):
            continue
        words = cw.ENGLISH_NUMBERS if language == "en" else cw.SPANISH_NUMBERS
        voice = collected(words, phrases(), lambda items: [speaker.say(item) for item in items])
        if voice:
            result[f"espeak-{accent}+{variant}-{pitch}-{speed}"] = voice
    return result


# -------------------------------------------------------------------------------------------------- other programs
def _read(path: Path, words: Sequence[str], starts: Sequence[float] | None = None) -> Clip | None:
    if not path.exists() or path.stat().st_size < 2000:
        return None
    wave, rate = soundfile.read(path, dtype="float32")
    return as_clip(wave, rate, words, starts)


def command_speaker(command: Callable[[str, str], list[str]], voice: Voice) -> Speaker:
    """A program that does not tell when each word of a phrase begins: that is found with the voice's own single words.

    Args:
        command: From a text and a file to the command that writes it.
        voice: Whose words are known by the time it says a phrase.
    """

    def one(item: Sequence[str]) -> Clip | None:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            text = " ".join(cw.spoken(word) for word in item)
            # RHVoice reads its text from the standard input, the others ignore it
            subprocess.run(command(text, file.name), input=text, text=True, capture_output=True, check=False)
            clip = _read(Path(file.name), item[:1])
        if clip is None or len(item) == 1:
            return clip
        singles = [voice.words.get(cw.NUMBER_OF[word]) for word in item]
        return aligned(clip, item, [clips[0] for clips in singles if clips])

    def speak(items: Sequence[Sequence[str]]) -> list[Clip | None]:
        with ThreadPoolExecutor(2) as threads:
            return [*threads.map(one, items)]

    return speak


def flite_command(name: str, stretch: float) -> Callable[[str, str], list[str]]:
    command = ["flite", "-voice", name, "--setf", f"duration_stretch={stretch}"]
    return lambda text, file: [*command, "-t", text, "-o", file]


def pico_command(name: str, stretch: float) -> Callable[[str, str], list[str]]:
    """SVOX Pico speaks higher or lower, too, when it speaks slower or quicker: it has one voice an accent."""
    marks = f'<speed level="{100 / stretch:.0f}"><pitch level="{100 * stretch**0.7:.0f}">{{}}</pitch></speed>'
    return lambda text, file: ["pico2wave", "-l", name, "-w", file, marks.format(text)]


def rhvoice_command(name: str, stretch: float) -> Callable[[str, str], list[str]]:
    return lambda text, file: ["RHVoice-test", "-p", name, "-r", f"{100 / stretch:.0f}", "-o", file]


def aligned(clip: Clip, words: Sequence[str], singles: Sequence[Clip]) -> Clip | None:
    """The clip of a phrase with its words' times: where a warped row of the single words fits best.

    Every 10 ms of the single words lie on the same 10 ms of the phrase as the ones before, on the next or on those
    after the next; phrases whose words are slower than alone, or missing, are given up.
    """
    if len(singles) != len(words):
        return None
    spectra = [_spectrum(single.samples) for single in singles]
    template, phrase = np.concatenate(spectra), _spectrum(clip.samples)
    if len(phrase) > 1.6 * len(template) or len(phrase) < 0.4 * len(template):
        return None
    distance = 1 - template @ phrase.T
    total = np.full(len(phrase) + 2, np.inf, np.float32)  # two columns before the first
    total[2] = distance[0, 0]
    steps = np.zeros(distance.shape, np.int8)
    for row in range(1, len(template)):
        ways = np.stack([total[2:] + 0.1, total[1:-1], total[:-2] + 0.1])
        steps[row] = ways.argmin(0)
        total[2:] = ways.min(0) + distance[row]
    place, path = len(phrase) - 1, np.zeros(len(template), int)
    if not np.isfinite(total[-1]) or total[-1] > 0.4 * len(template):
        return None
    for row in range(len(template) - 1, -1, -1):
        path[row] = place
        place -= int(steps[row, place])
    firsts = np.cumsum([0, *(len(spectrum) for spectrum in spectra[:-1])])
    starts = [0.0, *(float(path[first]) * ds.HOP / ds.RATE for first in firsts[1:])]
    seconds = len(clip.samples) / ds.RATE
    marks = [
        (cw.NUMBER_OF[word], start, end) for word, start, end in zip(words, starts, [*starts[1:], seconds], strict=True)
    ]
    return None if any(end - start < 0.04 for _, start, end in marks) else Clip(clip.samples, marks)


def _spectrum(samples: np.ndarray) -> np.ndarray:
    """Log spectra every 10 ms in 20 bands without their loudness, of length one."""
    wave = np.pad(samples.astype(np.float32) / 32768, (120, 400))
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[:: ds.HOP][: max(len(samples) // ds.HOP, 1)]
    power = np.abs(np.fft.rfft(frames * np.hanning(400).astype(np.float32), 512)) ** 2
    edges = np.unique(np.geomspace(4, 220, 21).astype(int))
    bands = np.log(np.add.reduceat(power, edges, axis=1) + 1e-5)
    loudness = bands.mean(1, keepdims=True)
    rows = np.concatenate([bands - loudness, 0.5 * (loudness - loudness.max())], 1)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)


def festival_speaker(name: str, stretch: float) -> Speaker:
    """festival, one run for all phrases; it writes the words' times beside the waves."""

    def speak(items: Sequence[Sequence[str]]) -> list[Clip | None]:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"(voice_{name})", f"(Parameter.set 'Duration_Stretch {stretch})"]
            for index, item in enumerate(items):
                text = " ".join(cw.spoken(word) for word in item)
                lines += [
                    f'(set! u (utt.synth (Utterance Text "{text}")))',
                    f'(utt.save.wave u "{folder}/{index}.wav" \'riff)',
                    f'(set! f (fopen "{folder}/{index}.txt" "w"))',
                    "(mapcar (lambda (w) (format f \"%f\\n\" (item.feat w 'word_start))) (utt.relation.items u 'Word))",
                    "(fclose f)",
                ]
            script = Path(folder, "all.scm")
            script.write_text("\n".join(lines))
            subprocess.run(["festival", "-b", str(script)], capture_output=True, check=False)
            return [festival_clip(Path(folder, str(index)), item) for index, item in enumerate(items)]

    return speak


def festival_clip(path: Path, item: Sequence[str]) -> Clip | None:
    times = path.with_suffix(".txt")
    starts = [float(line) for line in times.read_text().split()] if times.exists() else []
    sizes = [len(cw.spoken(word).split()) for word in item]
    if len(starts) != sum(sizes):
        return None
    return _read(path.with_suffix(".wav"), item, [starts[sum(sizes[:number])] for number in range(len(item))])


def collected(
    words: Sequence[int], phrases: list[list[str]], speak: Speaker, voice: Voice | None = None
) -> Voice | None:
    """A voice's words, phrases and other words; None if it cannot say half of the words."""
    voice = voice or Voice()
    singles = [cw.WORDS[number] for number in words]
    clips = speak([[word] for word in singles])
    for number, clip in zip(words, clips, strict=True):
        if clip is not None:
            voice.words[number] = [clip]
    if len(voice.words) < len(singles) / 2:
        return None
    voice.phrases = [clip for clip in (speak(phrases) if phrases else []) if clip is not None]
    if len(words) > len(cw.SPANISH):
        others = speak([[word] for word in cw.OTHER_WORDS])
        voice.others = [clip.samples for clip in others if clip is not None]
    return voice


def command_voice(words: Sequence[int], phrases: list[list[str]], command: Callable[[str, str], list[str]]) -> Voices:
    """The voice of a command, named by its program and options; nothing if the program is missing or mute."""
    program = command("", "")
    if not shutil.which(program[0]):
        return {}
    voice = Voice()
    found = collected(words, phrases, command_speaker(command, voice), voice)
    return {" ".join(program): found} if found else {}


def missing_programs() -> list[str]:
    """Programs that training voices are made with and that are not installed: without them others must do."""
    return [name for name in ("espeak-ng", "festival", "flite", "pico2wave", "RHVoice-test") if not shutil.which(name)]


def synthetic_voices(count: int, seed: int, held_out: bool = False) -> tuple[Voices, Voices]:
    """English and Spanish voices of the programs that are installed.

    Args:
        count: English voices of espeak-ng; of Spanish ones there are a third.
        seed: Of everything drawn.
        held_out: Use only the voices that no training voice is made from.
    """
    draw = random.Random(seed)
    english: Voices = {}
    spanish: Voices = {}

    def some(size: int) -> list[list[str]]:
        return [cw.english(draw) for _ in range(size)]

    if shutil.which("espeak-ng"):
        english = espeak_voices("en", count, lambda: some(60), draw, held_out)
        more = lambda: [cw.spanish(draw) for _ in range(20)]  # noqa: E731 (drawn anew for each voice)
        spanish = espeak_voices("es", max(count // 3, 4), more, draw, held_out)
    stretches = (1.0,) if held_out else (0.85, 1.0, 1.2)
    if shutil.which("festival"):
        for name in FESTIVAL_VOICES:
            if (name == HELD_OUT_FESTIVAL) is held_out:
                for stretch in stretches:
                    found = collected(cw.ENGLISH_NUMBERS, some(120), festival_speaker(name, stretch))
                    english |= {f"festival-{name}-{stretch}": found} if found else {}
    commands = [flite_command(name, stretch) for name in FLITE_VOICES for stretch in stretches]
    commands += [rhvoice_command(name, stretch) for name in RHVOICE_VOICES for stretch in stretches]
    commands += [pico_command(name, stretch) for name in PICO_VOICES for stretch in stretches]
    for command in [flite_command(HELD_OUT_FLITE, 1.0)] if held_out else commands:
        english |= command_voice(cw.ENGLISH_NUMBERS, some(120), command)
    for stretch in () if held_out else stretches:
        said = [cw.spanish(draw) for _ in range(40)]
        spanish |= command_voice(cw.SPANISH_NUMBERS, said, pico_command(PICO_SPANISH, stretch))
    return english, spanish


def perturbed(voices: Voices, copies: int, seed: int) -> Voices:
    """Virtual speakers of every voice: another pitch and formants, the times scaled with the tempo."""
    draw = np.random.default_rng(seed)
    result: Voices = {}
    for name, voice in voices.items():
        for copy in range(copies):
            pitch, tempo = float(np.exp(draw.uniform(-0.22, 0.22))), float(np.exp(draw.uniform(-0.25, 0.3)))
            words = {number: [_changed(clip, pitch, tempo) for clip in clips] for number, clips in voice.words.items()}
            phrases = [_changed(clip, pitch, tempo) for clip in voice.phrases]
            result[f"{name}~{copy}"] = Voice(words, phrases, voice.others)
    return result


def _changed(clip: Clip, pitch: float, tempo: float) -> Clip:
    wave = ds.stretch(soxr.resample(clip.wave, ds.RATE * pitch, ds.RATE, "MQ"), tempo)
    scale = len(wave) / len(clip.samples)
    samples = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
    return Clip(samples, [(number, start * scale, end * scale) for number, start, end in clip.marks])


def real_voices(recordings: ds.Voices) -> Voices:
    """Recorded digits in the form of the other voices."""

    def clip(digit: int, take: np.ndarray) -> Clip:
        loud = take * min(1.0, 0.9 / (np.abs(take).max() + 1e-6))
        return Clip((loud * 32767).astype(np.int16), [(digit, 0.0, len(take) / ds.RATE)])

    return {
        name: Voice({digit: [clip(digit, take) for take in takes] for digit, takes in enumerate(digits)})
        for name, digits in recordings.items()
    }
