"""`audiomm info`: what a model is and what it needs, from its config and the headers of its weights."""

from __future__ import annotations

import argparse
from collections import Counter
from math import prod
from typing import Any

import torch

from ..auto import FAMILIES, AutoConfig
from ..base.errors import CheckpointNotFoundError
from ..base.hub import Source
from ..base.weights import Checkpoint, find_checkpoint
from ..layers.cache import LayerSpec

#: Fields of a config that say how large the model is, in the order of printing.
_SIZES = (
    "vocab_size",
    "d_model",
    "hidden_size",
    "encoder_layers",
    "decoder_layers",
    "num_hidden_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "top_k_experts",
    "num_kv_shared_layers",
    "sliding_window",
    "max_position_embeddings",
)
#: Parts whose weights may be left out or kept off the GPU, by what stands in their names.
_PARTS = {
    "per-layer embeddings": ("embed_tokens_per_layer.",),
    "experts": (".experts.",),
    "pictures": ("vision_tower.", "embed_vision."),
    "sound": ("audio_tower.", "embed_audio."),
}
_DTYPES = {"float32": 4, "bfloat16 / float16": 2}


def run(arguments: argparse.Namespace) -> int:
    """Print the facts, one a line."""
    for name, value in facts(arguments.model, arguments.revision):
        print(f"{name:26} {value}")
    return 0


def facts(name: str, revision: str | None = None) -> list[tuple[str, str]]:
    """Names and values about a model; nothing is downloaded but its config.

    Raises:
        CheckpointError: There is no such model, or its files are broken.
        ConfigError: Its config is wrong or of an unknown family.
    """
    config = AutoConfig.from_pretrained(name, **({} if revision is None else {"revision": revision}))
    model = _without_weights(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = [("model", name), ("architecture", type(model).__name__), ("model_type", config.model_type)]
    text = config.get_text_config()
    sizes = {size: getattr(text, size, None) for size in _SIZES if size not in text.attribute_map}
    # A model without experts has None of them; other fields may hold a number for each layer.
    found += [(size, f"{value:,}") for size, value in sizes.items() if isinstance(value, int)]
    found.append(("parameters", f"{parameters:,}"))
    found += _parts(model)
    try:
        found += _stored(find_checkpoint(Source(name, revision=revision, local_files_only=True)))
    except CheckpointNotFoundError:
        found.append(("weights", "not on this machine"))
    found += [(f"memory {dtype}", f"{_bytes(parameters * size)} of weights") for dtype, size in _DTYPES.items()]
    cache = sum(_cache_numbers(spec, text) for spec in model.cache_specs()) if hasattr(model, "cache_specs") else 0
    if cache:
        found += [(f"cache {dtype}", f"{_bytes(cache * size)} for one sequence") for dtype, size in _DTYPES.items()]
    return found


def _without_weights(config: Any) -> Any:
    """The model on the meta device, where tensors have shapes and nothing else."""
    family = FAMILIES[config.model_type]
    names = [name for name in config.architectures or () if name in family.models.values()]
    wanted = names[0] if names else family.models["AutoModel"]
    with torch.device("meta"):
        model = family.load(wanted)(config)
    model.tie_weights()
    return model


def _parts(model: Any) -> list[tuple[str, str]]:
    """How many of the parameters lie in parts of their own, and what they need."""
    found = []
    for part, marks in _PARTS.items():
        count = sum(weight.numel() for name, weight in model.named_parameters() if any(mark in name for mark in marks))
        if count:
            needs = ", ".join(f"{_bytes(count * size)} in {dtype}" for dtype, size in _DTYPES.items())
            found.append((f"  in {part}", f"{count:,}, {needs}"))
    return found


def _stored(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for tensor, dtype in checkpoint.dtypes.items():
        counts[dtype] += prod(checkpoint.shapes[tensor])
    dtypes = ", ".join(f"{count:,} numbers in {dtype}" for dtype, count in counts.most_common())
    found = [("weights", f"{len(checkpoint.shapes):,} tensors, {dtypes}")]
    files = sorted(set(checkpoint.files.values()))
    return found + [("file", f"{path.name}, {_bytes(path.stat().st_size)}") for path in files]


def _cache_numbers(spec: LayerSpec, config: Any) -> int:
    """Keys and values of one layer when a sequence is as long as it can be."""
    length: int = getattr(config, "max_target_positions", 0) or getattr(config, "max_position_embeddings", 0)
    kept = min(length, spec.window or length) + (spec.cross_length or 0)
    return int(2 * spec.kv_heads * spec.head_dim * kept)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
