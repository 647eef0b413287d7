"""Log-mel features of clips of 30 s, one and 32, and of 32 short ones that are filled up to 30 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Setting, alternate
from roofline import features_work

WINDOW_SECONDS, RATE = 30, 16_000
#: (clips, seconds of each)
CASES = ((32, 30), (1, 30), (32, 5))
QUICK_CASES = ((2, 30),)


def run(setting: Setting) -> dict[str, Any]:
    """Each side gives float32 (clips, 80, 3000)."""
    import torch

    torch.set_num_threads(setting.threads)
    generator = np.random.default_rng(0)
    results = {}
    for count, seconds in QUICK_CASES if setting.quick else CASES:
        clips = [0.1 * generator.standard_normal(seconds * RATE).astype(np.float32) for _ in range(count)]
        there = [name for name in MAKERS if name.split(" ", 1)[0] in ("audiomm", *setting.against)]
        sides = {name: _on(MAKERS[name](), clips) for name in there}
        shapes = {name: np.asarray(side()).shape for name, side in sides.items()}
        if set(shapes.values()) != {(count, 80, 3000)}:
            raise RuntimeError(f"the sides give different shapes: {shapes}")
        times = alternate(sides, setting.repeats)
        for row in times.values():
            row["work"] = features_work(count)
            row["times_real_time"] = round(count * seconds * 1000 / row["wall_ms"])
        results[f"{count} x {seconds} s"] = times
    return results


Extract = Callable[[list[np.ndarray]], Any]


def _on(extract: Extract, clips: list[np.ndarray]) -> Callable[[], Any]:
    return lambda: extract(clips)


def _own() -> Extract:
    import audiomm

    extractor = audiomm.WhisperFeatureExtractor()
    return lambda clips: extractor(clips, sampling_rate=RATE, return_tensors="np")["input_features"]


def _transformers() -> Extract:
    import transformers

    extractor = transformers.WhisperFeatureExtractor()
    return lambda clips: extractor(clips, sampling_rate=RATE, return_tensors="np")["input_features"]


def _openai_one_by_one() -> Extract:
    import torch
    from whisper.audio import log_mel_spectrogram, pad_or_trim

    return lambda clips: torch.stack([log_mel_spectrogram(pad_or_trim(clip)) for clip in clips])


def _openai_at_once() -> Extract:
    from whisper.audio import log_mel_spectrogram, pad_or_trim

    return lambda clips: log_mel_spectrogram(np.stack([pad_or_trim(clip) for clip in clips]))


def _faster_whisper() -> Extract:
    from faster_whisper.feature_extractor import FeatureExtractor

    extractor, samples = FeatureExtractor(), WINDOW_SECONDS * RATE
    return lambda clips: np.stack([extractor(np.pad(clip, (0, samples - len(clip))))[:, :3000] for clip in clips])


#: A side's name begins with its package.
MAKERS: dict[str, Callable[[], Extract]] = {
    "audiomm": _own,
    "transformers": _transformers,
    "openai-whisper one by one": _openai_one_by_one,
    "openai-whisper at once": _openai_at_once,
    "faster-whisper": _faster_whisper,
}
