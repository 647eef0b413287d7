"""What Python and dispatch cost in a decoding step of the Gemmas: widths so small that the kernels cost nothing.

The layers are as many as the published E2B has, of both kinds of attention, with per-layer embeddings and shared keys
and values; the same weights on both sides, one row, greedy, the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import Setting, alternate

PROMPT = 8
TOKENS = 64
_TEXT = {
    "hidden_size": 16,
    "hidden_size_per_layer_input": 4,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "max_position_embeddings": 512,
    "sliding_window": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_LAYERS = {
    "gemma3n": {
        "layers": 30,
        "shared": 10,
        "more": {"laurel_rank": 4, "altup_num_inputs": 4, "activation_sparsity_pattern": 0.0},
    },
    "gemma4": {"layers": 35, "shared": 20, "more": {"global_head_dim": 16, "use_double_wide_mlp": True}},
}


def run(setting: Setting) -> dict[str, Any]:
    """One case a family: a step in milliseconds."""
    torch.set_num_threads(setting.threads)
    count = 8 if setting.quick else TOKENS
    results = {}
    for family, sizes in _LAYERS.items():
        layers = 5 if setting.quick else sizes["layers"]
        folder = _checkpoint(family, layers, setting.scratch / family, sizes)
        prompt = torch.arange(3, 3 + PROMPT)[None]
        runs = {"audiomm": _steps(_own(family, folder), prompt, count)}
        if "transformers" in setting.against:
            runs["transformers"] = _steps(_theirs(family, folder), prompt, count)
        written = {name: generate() for name, generate in runs.items()}
        if len({str(tokens) for tokens in written.values()}) != 1:
            setting.note(f"{family}: the sides wrote different tokens of the tiny random model: {written}")
        times = alternate(runs, setting.repeats, warmups=0)
        for row in times.values():
            row["step_ms"] = round(row["wall_ms"] / count, 3)
            row["layers"] = layers
        results[f"{family}, {layers} layers of width {_TEXT['hidden_size']}"] = times
    return results


def _config(family: str, layers: int, sizes: dict[str, Any]) -> dict[str, Any]:
    pattern = ["sliding_attention"] * 4 + ["full_attention"]
    kinds = (pattern * layers)[:layers]
    shared = sizes["shared"] if layers == sizes["layers"] else 0
    more = dict(sizes["more"])
    if "activation_sparsity_pattern" in more:
        # As in E2B: the first third is sparse.
        more["activation_sparsity_pattern"] = [0.95] * (layers // 3) + [0.0] * (layers - layers // 3)
    return {**_TEXT, **more, "num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": kinds}


def _checkpoint(family: str, layers: int, folder: Path, sizes: dict[str, Any]) -> Path:
    import audiomm

    name = {"gemma3n": "Gemma3n", "gemma4": "Gemma4"}[family]
    torch.manual_seed(0)
    config = getattr(audiomm, f"{name}TextConfig")(**_config(family, layers, sizes))
    model = getattr(audiomm, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def _own(family: str, folder: Path) -> Any:
    import audiomm

    return getattr(audiomm, {"gemma3n": "Gemma3nForCausalLM", "gemma4": "Gemma4ForCausalLM"}[family]).from_pretrained(
        folder, dtype=torch.float32
    )


def _theirs(family: str, folder: Path) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = {"gemma3n": "Gemma3nForCausalLM", "gemma4": "Gemma4ForCausalLM"}[family]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)


def _steps(model: Any, prompt: torch.Tensor, count: int) -> Any:
    def run_once() -> list[int]:
        # The model may not end early on either side.
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return tokens[0, prompt.shape[1] :].tolist()

    return run_once
