"""Greedy decoding from the encoder's output on, as each side's generate() runs it; the same tokens on all sides.

A run is 200 tokens at batch 1 and 100 at batch 8, the prompt and the keys and values of the encoder's output included.
The model never ends by itself (see `checkpoints`), so that nothing is to be suppressed, and every side must write the
same tokens.
"""

from __future__ import annotations

import time
from typing import Any

import sides
import torch
from checkpoints import ENDLESS
from common import Setting, alternate
from roofline import decode_work

#: Batch size -> tokens.
TOKENS = {1: 200, 8: 100}


def run(setting: Setting) -> dict[str, Any]:
    """One case a batch size."""
    import audiomm

    torch.set_num_threads(setting.threads)
    folder = setting.checkpoint(ENDLESS)
    config = audiomm.WhisperConfig.from_pretrained(folder)
    makers = _makers(setting, folder)
    results = {}
    tokens = {1: 8} if setting.quick else {1: TOKENS[1]} if setting.second else TOKENS
    for batch, count in tokens.items():
        hidden = torch.randn(batch, config.max_source_positions, config.d_model)
        runs = {name: make(hidden, count) for name, make in makers.items()}
        if setting.size == "tiny" and not setting.quick:
            if batch == 1 and "transformers" in setting.against:
                runs["transformers float32, compiled"] = _compiled(
                    setting,
                    "transformers",
                    sides.transformers_decoder(
                        sides.transformers_model(setting, ENDLESS), hidden, count, **sides.compiled_options()
                    ),
                )
            kind = sides.automatic(setting)
            model = sides.own_models(setting, ENDLESS, (kind,))[f"audiomm {kind}"]
            runs[f"audiomm {kind}, compiled"] = _compiled(
                setting, "audiomm", sides.own_decoder_compiled(model, hidden, count)
            )
        _check(runs, batch, count)
        times = alternate(runs, setting.few, warmups=0)
        for row in times.values():
            row["step_ms"] = round(row["wall_ms"] / count, 3)
            row["work"] = decode_work(config, batch, count)
        results[f"{setting.size}, batch {batch}"] = times
    return results


def _makers(setting: Setting, folder: Any) -> dict[str, Any]:
    """{side: function of the encoder's output and the number of tokens that gives what to run}."""
    makers: dict[str, Any] = {}

    def add(name: str, make: Any, *first: Any) -> None:
        makers[name] = lambda hidden, count: make(*first, hidden, count)

    for name, model in sides.own_models(setting, ENDLESS).items():
        add(name, sides.own_decoder, model)
    if "transformers" in setting.against:
        for kind in sides.FLOATS:
            model = sides.transformers_model(setting, ENDLESS, kind)
            add(f"transformers {kind}", sides.transformers_decoder, model)
    if "openai-whisper" in setting.against:
        add("openai-whisper float32", sides.openai_decoder, sides.openai_model(setting, ENDLESS))
    if "faster-whisper" in setting.against:
        import audiomm

        tokens = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
        prompt = audiomm.WhisperTokenizer.from_pretrained(folder).convert_tokens_to_ids(tokens)
        for kind in sides.ctranslate2_kinds():
            model = sides.ctranslate2_model(setting, ENDLESS, kind)
            add(f"faster-whisper {kind}", sides.ctranslate2_decoder, model, prompt)
    return makers


def _compiled(setting: Setting, name: str, run_once: Any) -> Any:
    """A side whose step is compiled; its warm-up is not counted, and told."""
    started = time.perf_counter()
    for _ in range(4):
        # A prompt is compiled when it comes for the third time.
        run_once()
    setting.note(f"{name} compiled in its first four runs, in {time.perf_counter() - started:.0f} s, not counted")
    return run_once


def _check(runs: dict[str, Any], batch: int, count: int) -> None:
    """That all sides write the same tokens; it warms them up, too."""
    written = {name: run() for name, run in runs.items()}
    first = next(iter(written.values()))
    for name, rows in written.items():
        if [len(row) for row in rows] != [count] * batch or rows != first:
            raise RuntimeError(f"{name} writes other tokens than audiomm: {rows[0][:8]} ..., not {first[0][:8]} ...")
