"""One step of greedy decoding, as generate() runs it: the time of 48 tokens less that of 8, over 40.

All sides read the same encoder output of one window and may not stop before the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Setting, alternate

SHORT, LONG = 8, 48
END = 50257


def run(setting: Setting) -> dict[str, Any]:
    """Batches of 1 and 8, float32, and bfloat16 where a side has it."""
    import torch

    import audiomm

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint()
    config = audiomm.WhisperConfig.from_pretrained(folder)
    results = {}
    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        ours = audiomm.WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind)
        theirs = None
        if "transformers" in setting.against:
            import transformers

            transformers.utils.logging.set_verbosity_error()
            theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind)
        for batch in (1, 8):
            hidden = torch.randn(batch, config.max_source_positions, config.d_model, dtype=kind)
            makers: dict[str, Callable[[int], Callable[[], Any]]] = {"audiomm": _generate(ours, (hidden,))}
            if theirs is not None:
                from transformers.modeling_outputs import BaseModelOutput

                makers["transformers"] = _generate(theirs, BaseModelOutput(last_hidden_state=hidden))
            if "faster-whisper" in setting.against and dtype == "float32":
                makers["faster-whisper"] = _faster(setting, hidden.numpy())
            sides = {f"{name} {count}": make(count) for name, make in makers.items() for count in (SHORT, LONG)}
            results[f"{dtype}, batch {batch}"] = _per_step(alternate(sides, setting.repeats))
    return results


def _generate(model: Any, encoded: Any) -> Callable[[int], Callable[[], Any]]:
    def make(count: int) -> Callable[[], Any]:
        def run_once() -> Any:
            tokens = model.generate(
                encoder_outputs=encoded, max_new_tokens=count, min_new_tokens=count, return_timestamps=False
            )
            assert tokens.shape[1] >= count, tokens.shape
            return tokens

        return run_once

    return make


def _faster(setting: Setting, hidden: np.ndarray) -> Callable[[int], Callable[[], Any]]:
    """CTranslate2's generate(), the engine of faster-whisper."""
    import ctranslate2

    model = ctranslate2.models.Whisper(
        str(setting.converted()), device="cpu", compute_type="float32", intra_threads=setting.threads
    )
    encoded = ctranslate2.StorageView.from_array(np.ascontiguousarray(hidden))
    prompt = [50258, 50259, 50359, 50363]

    def make(count: int) -> Callable[[], Any]:
        def run_once() -> Any:
            # CTranslate2 generates half of max_length at most.
            options = {"beam_size": 1, "max_length": 2 * count, "suppress_tokens": [END]}
            options["suppress_blank"] = False
            found = model.generate(encoded, [prompt] * len(hidden), **options)
            assert len(found[0].sequences_ids[0]) >= count, len(found[0].sequences_ids[0])
            return found

        return run_once

    return make


def _per_step(times: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """From times of short and long runs to times of one step."""
    from common import summarise

    names = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in times))

    def steps(name: str, key: str) -> list[float]:
        short, long = times[f"{name} {SHORT}"], times[f"{name} {LONG}"]
        if key == "cpu_ms":
            return [(long[key] - short[key]) / (LONG - SHORT)]
        return [(b - a) / (LONG - SHORT) for a, b in zip(short[key], long[key], strict=True)]

    wall = {name: steps(name, "rounds_ms") for name in names}
    return summarise(wall, {name: steps(name, "cpu_ms") for name in names})
