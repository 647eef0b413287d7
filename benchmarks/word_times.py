"""What the times of words cost on top of a transcription.

A run with and a run without word timestamps, in turn, two minutes of audio, sequentially; the difference, round by
round, is the extra time. The decode that it is compared with is that of audiomm alone: the run without, less the time
of its encoder.
"""

from __future__ import annotations

import statistics
from typing import Any

import sides
import torch
from common import Setting, alternate, summarise
from end_to_end import WORDS, recording, sequential

SECONDS = 120


def run(setting: Setting) -> dict[str, Any]:
    """One case: the extra milliseconds of each side, and their share of audiomm's decode."""
    torch.set_num_threads(setting.threads)
    seconds = 35 if setting.quick else SECONDS
    audio = recording(seconds)
    kinds = (sides.automatic(setting),)
    plain = sequential(setting, kinds)
    timed = sequential(setting, kinds, with_words=True)
    runs = {}
    for name, with_words in timed.items():
        without = plain[name]
        runs[name] = lambda run=without: run(audio)
        runs[f"{name}, words"] = lambda run=with_words: run(audio)
    own = next(iter(timed))
    windows = -(-seconds // 30)
    model = next(iter(sides.own_models(setting, WORDS, kinds).values()))
    encode = sides.hub_encoder(model, torch.randn(1, model.config.num_mel_bins, 3000))
    runs["encoder"] = lambda: [encode() for _ in range(windows)]
    times = alternate(runs, setting.repeats, warmups=0 if setting.quick else 1)
    extra, used = (
        {name: _differences(times, f"{name}, words", name, kind) for name in timed}
        for kind in ("rounds_ms", "rounds_cpu_ms")
    )
    decode = _differences(times, own, "encoder")
    results = summarise(extra, used)
    for name, row in results.items():
        row["share_of_decode"] = round(statistics.median(extra[name]) / max(statistics.median(decode), 1e-9), 3)
    length = f"{seconds} s"
    return {f"{setting.size}, {length}, words on top": results, f"{setting.size}, {length}, whole": times}


def _differences(times: dict[str, dict[str, Any]], more: str, less: str, kind: str = "rounds_ms") -> list[float]:
    """Round by round, a millisecond at least: that much is noise."""
    pairs = zip(times[more][kind], times[less][kind], strict=True)
    return [max(a - b, 1.0) for a, b in pairs]
