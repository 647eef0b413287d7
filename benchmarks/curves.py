"""Throughput against batch size, and cost against audio length; `plots` draws them.

Batch size: windows through encoder and decoder, 50 tokens each. Length: a recording from samples to text, sequentially.
"""

from __future__ import annotations

from typing import Any

import end_to_end
import sides
import torch
from common import SIZES, Setting, alternate

BATCHES = (1, 2, 4, 8, 16)
TOKENS = 50
LENGTHS_SECONDS = (10, 30, 60, 120)


def run(setting: Setting) -> dict[str, Any]:
    """One case a batch size, and one a length."""
    torch.set_num_threads(setting.threads)
    kind = sides.automatic(setting)
    results = {}
    whole = _windows(setting, kind)
    for batch in BATCHES[: 2 if setting.quick else None]:
        features = torch.randn(batch, SIZES[setting.size].get("num_mel_bins", 80), 3000)
        runs = {name: make(features) for name, make in whole.items()}
        times = alternate(runs, 1 if batch > 4 else setting.few)
        for row in times.values():
            row["batch"], row["windows_a_second"] = batch, round(1000 * batch / row["wall_ms"], 3)
        results[f"{setting.size}, batch of {batch}"] = times
    transcribe = end_to_end.sequential(setting, (kind,))
    transcribe.pop("openai-whisper float32", None)
    for seconds in LENGTHS_SECONDS[: 2 if setting.quick else None]:
        audio = end_to_end.recording(seconds)
        runs = {name: lambda heard=heard, audio=audio: heard(audio) for name, heard in transcribe.items()}
        times = alternate(runs, 1 if seconds > 30 else setting.few, warmups=int(seconds <= 30))
        for row in times.values():
            row["seconds"] = seconds
        results[f"{setting.size}, {seconds} s"] = times
    return results


def _windows(setting: Setting, kind: str) -> dict[str, Any]:
    """{side: function of features that gives what to run: the encoder and 50 tokens of each window}."""
    count = 8 if setting.quick else TOKENS

    def hub(model: Any) -> Any:
        def make(features: torch.Tensor) -> Any:
            inputs = features.to(model.dtype)
            options = {"language": "en", "task": "transcribe", "return_timestamps": False, "max_new_tokens": count}
            return lambda: model.generate(inputs, **options)

        return make

    found = {name: hub(model) for name, model in sides.own_models(setting, kinds=(kind,)).items()}
    if "transformers" in setting.against:
        found["transformers float32"] = hub(sides.transformers_model(setting))
    if "faster-whisper" in setting.against:
        kind = "int8" if "int8" in sides.ctranslate2_kinds() else "float32"
        model = sides.ctranslate2_model(setting, 100, kind)
        prompt = [50258, 50259, 50359, 50363]
        # Given features instead of the encoder's output, it encodes them.
        found[f"faster-whisper {kind}"] = lambda features: sides.ctranslate2_decoder(model, prompt, features, count)
    return found
