"""Word error rates, time errors and false alarms of a digit model on strings it was not trained on."""

from __future__ import annotations

from pathlib import Path

import digit_strings as ds
import numpy as np
import torch
from digit_checkpoint import EOT, FIRST_TIME, WORD_TOKEN

from audiomm import WhisperFeatureExtractor, WhisperForConditionalGeneration

TEST_TAKES = range(5)  # the test takes of the Free Spoken Digit Dataset


def edits(said: list[int], written: list[int]) -> int:
    """Substitutions, deletions and insertions between two digit strings."""
    row = list(range(len(written) + 1))
    for i, left in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(written, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def test_strings(
    voices: ds.Voices, count: int, seed: int, full: bool = False, noise_db: float | None = None
) -> list[ds.Window]:
    """Strings of one voice each: 3 to 10 digits with gaps up to 0.4 s and some pauses, or a full window of them."""
    rng, names = np.random.default_rng(seed), list(voices)
    windows: list[ds.Window] = []
    for index in range(count):
        voice, now = voices[names[index % len(names)]], float(rng.uniform(0, 0.6))
        pieces: list[tuple[float, np.ndarray]] = []
        digits: list[tuple[int, float, float]] = []
        for _ in range(99 if full else int(rng.integers(3, 11))):
            digit = int(rng.integers(10))
            take = voice[digit][int(rng.integers(len(voice[digit])))]
            if now + len(take) / ds.RATE > ds.WINDOW_SECONDS - 0.7:
                break
            pieces.append((now, take))
            digits.append((digit, now, now + len(take) / ds.RATE))
            now = digits[-1][2] + float(rng.uniform(0.7, 2.0) if rng.random() < 0.12 else rng.uniform(0.04, 0.4))
        wave = np.zeros(int((digits[-1][2] + float(rng.uniform(0, 0.6))) * ds.RATE) + 1, np.float32)
        for start, take in pieces:
            wave[int(start * ds.RATE) :][: len(take)] += take[: len(wave) - int(start * ds.RATE)]
        if noise_db is not None:
            wave += rng.standard_normal(len(wave)).astype(np.float32) * wave.std() * 10 ** (-noise_db / 20)
        windows.append(ds.Window(wave, digits, content=len(wave) / ds.RATE))
    return windows


def transcripts(
    model: WhisperForConditionalGeneration, windows: list[ds.Window], times: bool = True, zeros: bool = False
) -> list[list[int]]:
    """Greedy transcripts as token ids without marks. `zeros` pads the features with 0.0 instead of the waveform."""
    extractor, tokens = WhisperFeatureExtractor(), []
    for start in range(0, len(windows), 16):
        part = windows[start : start + 16]
        waves = [window.wave for window in part]
        features = torch.as_tensor(extractor(waves, sampling_rate=ds.RATE, return_tensors="pt").input_features)
        for row, wave in zip(features, waves, strict=True):
            if zeros:
                row[:, len(wave) // ds.HOP :] = 0.0
        with torch.no_grad():
            ids = model.generate(features, return_timestamps=times)
        tokens += [[token for token in row if token != EOT and token >= WORD_TOKEN] for row in ids.tolist()]
    return tokens


def score(model: WhisperForConditionalGeneration, windows: list[ds.Window]) -> str:
    """Word error rates (plain, with 0.0 padding, without timestamps) and the errors of the times of the words."""
    rates: list[str] = []
    errors: list[float] = []
    total = sum(len(window.digits) for window in windows)
    for times, zeros in ((True, False), (True, True), (False, False)):
        wrong = 0
        for window, ids in zip(windows, transcripts(model, windows, times, zeros), strict=True):
            wrong += edits([item[0] for item in window.digits], [token - WORD_TOKEN for token in ids if token < EOT])
            found = [(token - FIRST_TIME) / ds.FRAMES_PER_SECOND for token in ids if token >= FIRST_TIME]
            true = [time for _, begin, end in window.digits for time in (begin, end)]
            if not zeros and len(found) == len(true):
                errors += [abs(left - right) for left, right in zip(found, true, strict=True)]
        rates.append(f"{wrong / total:6.1%}")
    middle, most = (np.percentile(errors, share) * 1000 if errors else float("nan") for share in (50, 95))
    return f"{total:5d} digits | " + " | ".join(rates) + f" | {middle:3.0f} ms, 95 % below {most:.0f} ms"


def silences() -> dict[str, list[ds.Window]]:
    """Sounds without speech, 1 to 30 s long, from hardly audible to loud."""
    maker = ds.WindowMaker({}, {}, {}, 3)
    noises: list[ds.Window] = []
    for _ in range(48):
        length, level = int(maker.rng.uniform(1, 30) * ds.RATE), np.float32(10 ** maker.rng.uniform(-4, -0.7))
        noises.append(ds.Window(maker.noise_like(length) * level))
    kinds = [(seconds * ds.RATE, np.float32(level)) for seconds in (2, 5, 30) for level in (0.001, 0.01, 0.1, 0.3)]
    white = [ds.Window(maker.rng.standard_normal(size).astype(np.float32) * level) for size, level in kinds]
    quiet = [ds.Window(np.zeros(seconds * ds.RATE, np.float32)) for seconds in (1, 5, 30)]
    return {"noise, hum, tones, clicks": noises, "white noise": white, "digital silence": quiet}


def evaluate(folder: Path, data: Path, hold_out: str | None) -> None:
    """Print a table of word error rates, and how often sounds without speech come back empty."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    everyone = ds.read_recordings(data, TEST_TAKES)
    known = {name: digits for name, digits in everyone.items() if name != hold_out}
    sets = {f"{name}, test takes": test_strings({name: digits}, 30, 11) for name, digits in known.items()}
    sets["all of these, 10 dB white noise"] = test_strings(known, 60, 12, noise_db=10.0)
    sets["all of these, full 30 s"] = test_strings(known, 15, 13, full=True)
    if hold_out:
        unknown = ds.read_recordings(data, range(50), [hold_out])
        sets[f"{hold_out}, never trained on"] = test_strings(unknown, 100, 14)
        sets[f"{hold_out}, full 30 s"] = test_strings(unknown, 8, 15, full=True)
    for name, digits in ds.synthetic_voices(4, 5, held_out=True).items():
        sets[f"{name}, never trained on"] = test_strings({name: digits}, 15, 16)
    print(f"{'':44s} | {'':12s} | times |  0.0   | plain | error of the times")
    for name, windows in sets.items():
        print(f"{name:44s} | {score(model, windows)}", flush=True)
    for name, windows in silences().items():
        for times in (True, False):
            empty = sum(all(token >= EOT for token in ids) for ids in transcripts(model, windows, times))
            print(f"{name:44s} | timestamps {times!s:5s} | empty {empty} of {len(windows)}", flush=True)
