"""Connected digit strings for training a tiny Whisper: voices, windows of audio with exact times, log-mel features.

Recordings of single digits (and, where the programs are installed, digits spoken by espeak-ng and flite) are joined
with known gaps, so that every digit's start and end is known to the sample.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

RATE = 16_000
HOP = 160
FRAMES_PER_SECOND = 50  # encoder positions, after the stride of two
WINDOW_SECONDS = 30.0
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SILENCE = len(WORDS)  # the class of a frame without a digit
NOISE_SHARE, OTHERS_SHARE = 0.07, 0.008  # windows without a digit: more of them, and new voices come back empty
HELD_OUT_VOICES = ("flite-rms", "espeak-en-us+f5", "espeak-en-gb-x-rp+m8", "espeak-en+Andrea", "espeak-en-us+Michael")
_OTHER_TEXT = (
    "house water people garden window the and because music letter morning animal country picture answer paper yes no "
    "hello thank you please never table river mountain children always together school under between another important "
    "money summer doctor orange purple kitchen telephone computer what where when which about world simple question"
)
OTHER_WORDS = tuple(_OTHER_TEXT.split())

Voices = dict[str, list[list[np.ndarray]]]  # voice -> digit -> takes (float32, 16 kHz)


# ------------------------------------------------------------------------------------------------------------ voices
def trim(wave: np.ndarray, drop_db: float = 38.0) -> np.ndarray:
    """Cut leading and trailing parts that are `drop_db` below the loudest 10 ms."""
    blocks = wave[: len(wave) // HOP * HOP].reshape(-1, HOP)
    power = (blocks**2).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-drop_db / 10))
    return wave[max(loud[0] - 1, 0) * HOP : (loud[-1] + 2) * HOP]


def read_recordings(folder: Path, takes: Iterable[int], speakers: Sequence[str] | None = None) -> Voices:
    """Read `<speaker>/<digit>_<speaker>_<take>.flac` as 16 kHz voices with one speaker each."""
    voices: Voices = {}
    for home in sorted(path for path in folder.iterdir() if path.is_dir()):
        if speakers is not None and home.name not in speakers:
            continue
        voices[home.name] = [[] for _ in WORDS]
        for digit in range(len(WORDS)):
            for take in takes:
                path = home / f"{digit}_{home.name}_{take}.flac"
                if path.exists():
                    wave, rate = soundfile.read(path, dtype="float32")
                    voices[home.name][digit].append(trim(soxr.resample(wave, rate, RATE)))
    return voices


def _speak(command: list[str]) -> np.ndarray | None:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        result = subprocess.run([*command, file.name], capture_output=True, check=False)
        if result.returncode:
            return None
        wave, rate = soundfile.read(file.name, dtype="float32")
    if not len(wave) or np.abs(wave).max() < 0.01:
        return None
    return trim(soxr.resample(wave, rate, RATE))


def synthetic_voices(count: int, seed: int, held_out: bool = False, words: Sequence[str] = WORDS) -> Voices:
    """Speak `words` with `count` random espeak-ng voices and a few flite ones (whichever program is installed).

    `held_out=True` uses only `HELD_OUT_VOICES`, which no training voice is made from.
    """
    draw = random.Random(seed)
    jobs: dict[str, list[str]] = {}
    if shutil.which("espeak-ng"):
        accents = ["en", "en-us", "en-us", "en-gb-x-rp", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-us-nyc"]
        listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
        variants = [line.split("!v/")[1].split()[0] for line in listing.splitlines() if "!v/" in line]
        plain = [f"{sex}{i}" for sex in "mf" for i in range(1, 6)]
        for index in range(count):
            name = f"espeak-{draw.choice(accents)}+{draw.choice(plain if index % 2 else variants)}"
            if held_out:
                name = [voice for voice in HELD_OUT_VOICES if voice.startswith("espeak")][index % 4]
            elif any(name.split("+")[1] == voice.split("+")[-1] for voice in HELD_OUT_VOICES):
                continue
            pitch, speed = draw.randint(15, 85), draw.randint(110, 230)
            command = ["espeak-ng", "-v", name.removeprefix("espeak-"), "-p", str(pitch), "-s", str(speed)]
            jobs[f"{name}-{pitch}-{speed}"] = command
    if shutil.which("flite"):
        for name in ["rms"] if held_out else ["kal", "kal16", "awb", "slt"]:
            for stretch in (1.0,) if held_out else (0.75, 0.9, 1.0, 1.1, 1.25):
                command = ["flite", "-voice", name, "--setf", f"duration_stretch={stretch}"]
                jobs[f"flite-{name}-{stretch}"] = command

    def speak(job: tuple[str, list[str]]) -> tuple[str, list[np.ndarray | None]]:
        name, command = job
        tail = (lambda word: ["-t", word, "-o"]) if name.startswith("flite") else (lambda word: [word, "-w"])
        return name, [_speak([*command, *tail(word)]) for word in words]

    with ThreadPoolExecutor(4) as threads:
        spoken = list(threads.map(speak, jobs.items()))
    return {name: [[take] for take in takes] for name, takes in spoken if all(take is not None for take in takes)}


def converted(voices: dict[str, list[list[Any]]], convert: Callable[[Any], Any]) -> dict[str, list[list[Any]]]:
    """Apply `convert` to every take, for instance between numpy and torch."""
    return {name: [[convert(take) for take in takes] for takes in digits] for name, digits in voices.items()}


def stretch(wave: np.ndarray, tempo: float) -> np.ndarray:
    """Change the tempo without changing the pitch (overlap-add of the best fitting 25 ms pieces)."""
    size, hop, reach = 400, 200, 80
    window = np.hanning(size + 1)[:size].astype(np.float32)
    padded = np.pad(wave, (0, size + 2 * reach))
    steps = max(int(len(wave) / (hop * tempo)), 1)
    out = np.zeros(steps * hop + size, np.float32)
    natural = padded[:size]
    for step in range(steps):
        centre = int(step * hop * tempo)
        low = max(centre - reach, 0)
        if step:
            scores = np.correlate(padded[low : centre + reach + size], natural, "valid")
            low += int(scores.argmax())
        out[step * hop : step * hop + size] += padded[low : low + size] * window
        natural = padded[low + hop : low + hop + size]
        if len(natural) < size:
            break
    return out[: max(int(len(wave) / tempo), hop)]


def perturbed(
    voices: Voices, copies: int, seed: int, keep: float = 0.35, most: tuple[float, float] = (0.2, 0.25)
) -> Voices:
    """Make `copies` virtual speakers of every voice: another pitch and formants (by resampling) and another tempo.

    `most` are the largest logarithms of both changes; `keep` of the speakers keep their recordings' own speed.
    """
    draw = np.random.default_rng(seed)
    result: Voices = {}
    for name, digits in voices.items():
        for copy in range(copies):
            pitch, tempo = (float(np.exp(draw.uniform(-width, width))) for width in most)
            if draw.random() < keep / 2:
                pitch = 1.0
            if draw.random() < keep:
                tempo = 1 / pitch  # the recording's own speed, or a plain change of the playing speed
            result[f"{name}~{copy}"] = [
                [_perturb(take, pitch, tempo * float(draw.uniform(0.93, 1.07))) for take in takes] for takes in digits
            ]
    return result


def _perturb(wave: np.ndarray, pitch: float, tempo: float) -> np.ndarray:
    shifted = soxr.resample(wave, RATE * pitch, RATE, "MQ") if pitch != 1.0 else wave
    return stretch(shifted, tempo) if abs(tempo - 1) > 0.02 else shifted


# ----------------------------------------------------------------------------------------------------------- windows
@dataclass
class Window:
    """Audio of one window; `digits` are (digit, start, end) in seconds, `open_end` says speech goes on after it."""

    wave: np.ndarray
    digits: list[tuple[int, float, float]] = field(default_factory=list)
    open_end: bool = False
    content: float = 0.0  # seconds before the padding


class WindowMaker:
    """Draws windows of joined digits, silence, noise and other words."""

    def __init__(self, real: Voices, synthetic: Voices, others: Voices, seed: int, real_share: float = 0.68) -> None:
        self.rng = np.random.default_rng(seed)
        self.groups = [(list(group), group) for group in (real, synthetic) if group]
        self.real_share = real_share if len(self.groups) > 1 else 1.0
        self.others = [take for digits in others.values() for takes in digits for take in takes]
        self.noise = self._noise_bank()
        self.difficulty = 1.0  # 0 to 1: how often and how loudly speech is disturbed

    def _noise_bank(self) -> list[np.ndarray]:
        white = self.rng.standard_normal(RATE * 40).astype(np.float32)
        spectrum, frequency = np.fft.rfft(white), np.arange(RATE * 20 + 1) / 40
        bank = []
        for slope in (0.0, 0.0, 0.5, 1.0):
            colored = np.fft.irfft(spectrum / np.maximum(frequency, 20.0) ** slope).astype(np.float32)
            bank.append(colored / colored.std())
        low = np.fft.irfft(spectrum * (frequency < 3800)).astype(np.float32)
        return [*bank, low / low.std()]

    def noise_like(self, samples: int) -> np.ndarray:
        """Noise, hum, tones, music-like notes or clicks with a level of about one."""
        rng, kind = self.rng, self.rng.random()
        start = int(rng.integers(0, RATE * 40 - samples + 1))
        bed = self.noise[int(rng.integers(len(self.noise)))][start : start + samples]
        if kind < 0.6:
            return bed
        time = np.arange(samples, dtype=np.float32) / RATE
        if kind < 0.75:
            base = float(rng.choice([50.0, 60.0, 100.0, 120.0, rng.uniform(40, 400)]))
            wave = sum(rng.uniform(0, 1) / k * np.sin(2 * np.pi * base * k * time) for k in range(1, 7))
        elif kind < 0.92:
            wave = np.zeros(samples, np.float32)
            at, root, harmonics = 0, rng.uniform(110, 660), int(rng.integers(1, 6))
            while at < samples:
                length = int(RATE * rng.uniform(0.1, 1.5))
                note = root * 2 ** (int(rng.integers(-12, 13)) / 12)
                t = time[: min(length, samples - at)]
                envelope = np.exp(-t * rng.uniform(0, 6)) * np.minimum(t * 50, 1)
                wave[at : at + len(t)] += envelope * sum(
                    np.sin(2 * np.pi * note * k * t) / k for k in range(1, harmonics + 1)
                )
                at += int(length * rng.uniform(0.3, 1.2))
        else:
            wave = np.zeros(samples, np.float32)
            for at in rng.integers(0, samples, int(rng.integers(1, 20))):
                wave[at : at + 40] += rng.standard_normal(min(40, samples - at)) * rng.uniform(0.2, 3)
        wave = wave / (np.abs(wave).max() + 1e-6) * 2 + bed * rng.choice([0.0, 0.01, 0.1])
        return wave.astype(np.float32)

    def _stream(self, limit: float, count: int, dense: bool) -> list[tuple[int, float, np.ndarray]]:
        """(digit, start, samples) of up to `count` digits from one voice or several, within `limit` seconds."""
        rng = self.rng
        mixed, pauses = rng.random() < 0.15, rng.choice([0.0, 0.1, 0.25])
        low, high = [(0.02, 0.12), (0.03, 0.3), (0.1, 0.4), (-0.02, 0.05), (0.02, 0.42)][int(rng.integers(5))]
        now = float(rng.choice([0.0, rng.uniform(0, 0.3), rng.uniform(0, 1.5)]))
        if not dense and rng.random() < 0.1:
            now = float(rng.uniform(0, max(limit - 2, 0.1)))
        items: list[tuple[int, float, np.ndarray]] = []
        voice, level, digit = self._voice(), rng.uniform(0, 4), 0
        for _ in range(count):
            if mixed and rng.random() < 0.3:
                voice = self._voice()
            digit = int(rng.integers(len(WORDS))) if rng.random() < 0.9 else digit  # a few more repeated digits
            takes = voice[digit]
            take = takes[int(rng.integers(len(takes)))]
            if now >= limit:
                break
            gain = 10 ** (rng.uniform(-level, level) / 20) / (np.sqrt((take**2).mean()) + 1e-4) * 0.1
            items.append((digit, now, take * np.float32(gain)))
            now += len(take) / RATE
            if rng.random() < pauses:
                now += rng.uniform(0.62, 3.0 if rng.random() < 0.8 else 5.0)
            else:
                now += rng.uniform(low, high)
        return items

    def _voice(self) -> list[list[np.ndarray]]:
        names, group = self.groups[0 if self.rng.random() < self.real_share else -1]
        return group[names[int(self.rng.integers(len(names)))]]

    def draw(self, seconds: float, dense: bool, cut: bool) -> Window:
        """One window. `dense` fills it with speech; `cut` lets speech run over its end."""
        rng, samples = self.rng, int(seconds * RATE)
        window = Window(np.zeros(samples, np.float32))
        kind = rng.random()
        if kind < NOISE_SHARE:
            window.content = seconds if dense else rng.uniform(0.5, seconds)
            length = int(window.content * RATE)
            if rng.random() < 0.8:
                window.wave[:length] = self.noise_like(length) * 10 ** rng.uniform(-5, -0.7)
            return window
        if kind < NOISE_SHARE + OTHERS_SHARE and self.others:
            at = int(rng.uniform(0, 0.5) * RATE)
            while at < samples and rng.random() < 0.9:
                word = self.others[int(rng.integers(len(self.others)))]
                piece = word[: samples - at]
                window.wave[at : at + len(piece)] += piece
                at += len(word) + int(rng.uniform(0.02, 0.6) * RATE)
            window.content = min(at, samples) / RATE
        else:
            count = 99 if dense or cut else int(rng.integers(1, max(int(seconds * 2.2), 3)))
            items = self._stream(seconds, count, dense or cut)
            for digit, start, take in items:
                at = int(start * RATE)
                end = start + len(take) / RATE
                if end > seconds:
                    if not cut:
                        break
                    window.open_end = True
                    piece = take[: samples - at]
                    window.wave[at:] += piece[: samples - at]
                    if len(piece) > 0.75 * len(take):
                        window.digits.append((digit, start, seconds))
                    break
                window.wave[at : at + len(take)] += take[: samples - at]
                window.digits.append((digit, start, end))
            last = window.digits[-1][2] if window.digits else 0.2
            after = float(rng.choice([0.0, 0.1, rng.uniform(0, 2)]))
            window.content = seconds if cut or dense else min(last + after, seconds)
        self._pollute(window)
        return window

    def _pollute(self, window: Window) -> None:
        """Room, level and noise; nothing is added after the content."""
        rng, length = self.rng, int(window.content * RATE)
        wave = window.wave[:length]
        if not length:
            return
        speech = np.sqrt((wave**2).mean()) + 1e-5
        if rng.random() < 0.2 * self.difficulty:
            decay = rng.uniform(0.03, 0.12)
            tail = np.arange(int(decay * 4 * RATE)) / RATE
            room = rng.standard_normal(len(tail)) * np.exp(-tail / decay) * rng.uniform(0.01, 0.06)
            room[0] = 1.0
            size = 1 << (length + len(room)).bit_length()
            dry, wet = (torch.fft.rfft(torch.from_numpy(part.astype(np.float32)), size) for part in (wave, room))
            wave[:] = torch.fft.irfft(dry * wet)[:length].numpy()
        if rng.random() < 0.65 * self.difficulty:
            level = -rng.uniform(24 - 20 * self.difficulty, 45)
            wave += self.noise_like(length) * np.float32(speech * 10 ** (level / 20))
        wave *= np.float32(10 ** rng.uniform(-1.7, 0.3))
        if rng.random() < 0.05:
            np.clip(wave, -speech * 2, speech * 2, out=wave)


# ---------------------------------------------------------------------------------------------------------- features
class LogMel:
    """Whisper's log-mel features with optional random frequency warps, equalisation, band limits and masks."""

    def __init__(self, mel_filters: np.ndarray, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        filters = torch.from_numpy(np.asarray(mel_filters, np.float32).T)  # (mels, 201)
        self.warps = [self._warped(filters, alpha) for alpha in np.linspace(0.83, 1.2, 31)]
        self.plain = filters
        self.window = torch.hann_window(400)
        self.difficulty = 1.0

    @staticmethod
    def _warped(filters: torch.Tensor, alpha: float) -> torch.Tensor:
        """Filters that read the spectrum at frequencies scaled by `alpha`."""
        bins = filters.shape[1]
        source = torch.arange(bins) / alpha
        low = source.floor().long().clamp(max=bins - 2)
        part = (source - low).clamp(0, 1)
        return filters[:, low] * (1 - part) + filters[:, low + 1] * part

    def _random_filter(self) -> torch.Tensor:
        rng = self.rng
        weights = self.warps[int(rng.integers(len(self.warps)))] if rng.random() < 0.7 * self.difficulty else self.plain
        frequency = np.arange(201) * 40.0
        decibel = np.zeros(201)
        if rng.random() < 0.7 * self.difficulty:
            decibel += np.interp(frequency, np.linspace(0, 8000, 9), rng.uniform(-7, 7, 9))
            decibel += rng.uniform(-8, 8) * frequency / 8000
        if rng.random() < 0.4:
            decibel -= np.clip((frequency - rng.uniform(3300, 4000)) / 8, 0, rng.uniform(30, 90))
        if rng.random() < 0.3:
            decibel -= np.clip((rng.uniform(60, 350) - frequency) / 6, 0, 30)
        return weights * torch.from_numpy(10 ** (decibel / 10)).float()

    def __call__(self, windows: Sequence[Window], augment: bool = True) -> torch.Tensor:
        """(batch, mels, frames). Half of the padding is silence in the waveform, half is 0.0 in the features."""
        waves = torch.from_numpy(np.stack([window.wave for window in windows]))
        spectrum = torch.stft(waves, 400, HOP, window=self.window, center=True, return_complex=True)[..., :-1]
        power = spectrum.real**2 + spectrum.imag**2
        filters = torch.stack([self._random_filter() if augment else self.plain for _ in windows])
        mel = torch.bmm(filters, power).clamp(min=1e-10).log10()
        peak = mel.amax(dim=(1, 2), keepdim=True)
        if augment and self.rng.random() < 0.2:  # the loudest moment of a long file may lie in another window
            peak = peak + torch.from_numpy(self.rng.uniform(0, 0.6, (len(windows), 1, 1))).float()
        mel = (torch.maximum(mel, peak - 8.0) + 4.0) / 4.0
        for index, window in enumerate(windows):
            if augment and self.rng.random() < self.difficulty:
                self._mask(mel[index])
            if self.rng.random() < 0.5:
                mel[index, :, int(window.content * RATE) // HOP :] = 0.0
        return mel

    def _mask(self, mel: torch.Tensor) -> None:
        rng, (bins, frames) = self.rng, mel.shape
        value = mel.mean()
        for _ in range(int(rng.integers(0, 3))):
            width = int(rng.integers(1, 11))
            at = int(rng.integers(0, bins - width))
            mel[at : at + width] = value
        for _ in range(int(rng.integers(0, 1 + frames // 200))):
            width = int(rng.integers(1, 9))
            at = int(rng.integers(0, frames - width))
            mel[:, at : at + width] = value
