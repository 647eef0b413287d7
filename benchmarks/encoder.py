"""Whisper's encoder over windows of 30 s, the same weights on every side, in each number format."""

from __future__ import annotations

from typing import Any

import sides
import torch
from common import Setting, alternate
from roofline import encoder_work

BATCHES = (1, 8)


def run(setting: Setting) -> dict[str, Any]:
    """One case a batch size."""
    import audiomm

    torch.set_num_threads(setting.threads)
    config = audiomm.WhisperConfig.from_pretrained(setting.checkpoint())
    makers: dict[str, Any] = {name: (sides.hub_encoder, model) for name, model in sides.own_models(setting).items()}
    if "transformers" in setting.against:
        for kind in sides.FLOATS:
            makers[f"transformers {kind}"] = (sides.hub_encoder, sides.transformers_model(setting, kind=kind))
    if "openai-whisper" in setting.against:
        makers["openai-whisper float32"] = (sides.openai_encoder, sides.openai_model(setting))
    if "faster-whisper" in setting.against:
        for kind in sides.ctranslate2_kinds():
            model = sides.ctranslate2_model(setting, 100, kind)
            makers[f"faster-whisper {kind}"] = (sides.ctranslate2_encoder, model)
    results = {}
    for batch in BATCHES[: 1 if setting.quick or setting.second else None]:
        features = torch.randn(batch, config.num_mel_bins, 3000)
        runs = {name: make(model, features) for name, (make, model) in makers.items()}
        _check(runs)
        times = alternate(runs, setting.repeats if batch == 1 else setting.few, warmups=0)
        work = encoder_work(config, batch)
        results[f"{setting.size}, batch {batch}"] = {name: {**row, "work": work} for name, row in times.items()}
    return results


def _check(runs: dict[str, Any]) -> None:
    """That all sides compute the same; it warms them up, too."""
    outputs = {name: run() for name, run in runs.items()}
    first = next(iter(outputs.values()))
    for name, output in outputs.items():
        # CTranslate2 hands out no tensor; other number formats are further away.
        if "float32" in name and isinstance(output, torch.Tensor):
            distance = float((output - first).abs().max())
            if distance > 1e-3:
                raise RuntimeError(f"{name}: its encoder's output is {distance:.2g} away from audiomm's")
