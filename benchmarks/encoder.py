"""The encoder over one window of 30 s, the same random weights on every side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Setting, alternate


def run(setting: Setting) -> dict[str, Any]:
    """float32, and bfloat16 where a side has it."""
    import torch

    import audiomm

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint()
    features = torch.randn(1, audiomm.WhisperConfig.from_pretrained(folder).num_mel_bins, 3000)
    results = {}
    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        ours = audiomm.WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind).get_encoder()
        inputs = features.to(kind)

        def own(model: Any = ours, inputs: Any = inputs) -> Any:
            with torch.inference_mode():
                return model(inputs).last_hidden_state

        sides: dict[str, Callable[[], Any]] = {"audiomm": own}
        if "transformers" in setting.against:
            import transformers

            theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=kind).get_encoder()

            def peer(model: Any = theirs, inputs: Any = inputs) -> Any:
                with torch.inference_mode():
                    return model(inputs).last_hidden_state

            sides["transformers"] = peer
            difference = float((own().float() - peer().float()).abs().max())
            assert difference < (1e-3 if dtype == "float32" else 0.5), difference
        if "faster-whisper" in setting.against and dtype == "float32":
            sides["faster-whisper"] = faster_encoder(setting, features.numpy())
        results[dtype] = alternate(sides, setting.repeats)
    return results


def faster_encoder(setting: Setting, features: np.ndarray) -> Callable[[], Any]:
    """CTranslate2's encoder, the engine of faster-whisper."""
    import ctranslate2

    model = ctranslate2.models.Whisper(
        str(setting.converted()), device="cpu", compute_type="float32", intra_threads=setting.threads
    )

    def run_once() -> Any:
        return model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(features)), to_cpu=False)

    return run_once
