"""Log-mel features of 30 s of sound, one clip and eight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import Setting, alternate

SECONDS = 30
RATE = 16000


def run(setting: Setting) -> dict[str, Any]:
    """Each side gives a float32 array (clips, 80, 3000)."""
    import torch

    import audiomm

    torch.set_num_threads(setting.threads)
    generator = np.random.default_rng(0)
    ours = audiomm.WhisperFeatureExtractor()
    results = {}
    for count in (1, 8):
        clips = [0.1 * generator.standard_normal(SECONDS * RATE).astype(np.float32) for _ in range(count)]

        def own(clips: list[Any] = clips) -> Any:
            return ours(clips, sampling_rate=RATE, return_tensors="np")["input_features"]

        sides: dict[str, Callable[[], Any]] = {"audiomm": own}
        if "transformers" in setting.against:
            import transformers

            theirs = transformers.WhisperFeatureExtractor()

            def peer(clips: list[Any] = clips, theirs: Any = theirs) -> Any:
                return theirs(clips, sampling_rate=RATE, return_tensors="np")["input_features"]

            def in_numpy(clips: list[Any] = clips, theirs: Any = theirs) -> Any:
                return theirs._np_extract_fbank_features(np.stack(clips), "cpu")

            sides |= {"transformers (torch)": peer, "transformers (numpy)": in_numpy}
        if "faster-whisper" in setting.against:
            from faster_whisper.feature_extractor import FeatureExtractor

            extractor = FeatureExtractor()

            def faster(clips: list[Any] = clips, extractor: Any = extractor) -> Any:
                return np.stack([extractor(clip)[:, :3000] for clip in clips])

            sides["faster-whisper"] = faster
        shapes = {name: np.asarray(side()).shape for name, side in sides.items()}
        assert set(shapes.values()) == {(count, 80, 3000)}, shapes
        times = alternate(sides, setting.repeats)
        for row in times.values():
            row["times_real_time"] = round(count * SECONDS * 1000 / row["wall_ms"])
        results[f"{count} x {SECONDS} s"] = times
    return results
