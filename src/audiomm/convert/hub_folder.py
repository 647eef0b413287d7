"""Folders in the hub's layout whose weights are in another format: PyTorch pickles, Flax, TensorFlow, or safetensors.

Large ones are split, with a JSON index that names the files. Configuration and tokenizer lie beside the weights; what
older programs wrote into them is brought to where it belongs today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..base.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    MissingShardError,
    UnsafeCheckpointError,
)
from ..base.hub import Source, read_json
from ..base.weights import find_checkpoint
from .flax import read_flax
from .foreign import Foreign
from .tensorflow import read_tensorflow
from .torch_bin import read_torch


class _Layout(NamedTuple):
    filename: str
    read: Callable[[Path], dict[str, Tensor]]


#: Formats by name, with the file that a folder of each has; a split one has `<filename>.index.json`.
LAYOUTS = {
    "torch": _Layout("pytorch_model.bin", read_torch),
    "flax": _Layout("flax_model.msgpack", read_flax),
    "tensorflow": _Layout("tf_model.h5", read_tensorflow),
}

#: Special tokens that both files name.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: What older files hold besides sizes: options of generate(), which live in generation_config.json today.
_LEGACY = (
    "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens", "max_length", "min_length", "num_beams",
    "length_penalty", "early_stopping", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    "no_repeat_ngram_size", "transformers_version", "_name_or_path", "name_or_path", "auto_map", "torch_dtype", "dtype",
)  # fmt: skip


def read_hub_folder(source: Source, form: str) -> Foreign:
    """Read a folder or repository in the hub's layout.

    Args:
        source: The folder or repository.
        form: A key of LAYOUTS, or "safetensors".

    Raises:
        CheckpointError: Files are missing, broken or unsafe.
        ConfigError: config.json is missing or not of a Whisper.
    """
    config = read_json(source.require("config.json"))
    if config.get("model_type") != "whisper":
        raise ConfigError(
            f"{source.name}: config.json is of model type {config.get('model_type')!r}; only 'whisper' is read."
        )
    if form == "safetensors":
        checkpoint = find_checkpoint(source)
        weights = dict(checkpoint.tensors(list(checkpoint.shapes)))
    else:
        weights = _read_shards(source, LAYOUTS[form])
    generation_path = source.find("generation_config.json")
    generation = _settled(read_json(generation_path) if generation_path else {}, config)
    sizes = {name: value for name, value in config.items() if name not in _LEGACY}
    if any(name.startswith("classifier.") for name in weights):
        return Foreign(str(source.name), weights, sizes, source=source, model="WhisperForAudioClassification")
    return Foreign(str(source.name), _with_prefix(weights), sizes, generation, source=source)


def _read_shards(source: Source, layout: _Layout) -> dict[str, Tensor]:
    path = source.find(layout.filename)
    if path is not None:
        return layout.read(path)
    index_path = source.find(f"{layout.filename}.index.json")
    if index_path is None:
        raise CheckpointNotFoundError(
            f"{str(source.name)!r} holds neither {layout.filename} nor an index of its parts."
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index_path}: weight_map is missing or empty; it names the file of each tensor.")
    names = sorted(set(map(str, weight_map.values())))
    _check_names(names, index_path, Path(layout.filename).suffix)
    paths = {name: source.find(name) for name in names}
    missing = [name for name, found in paths.items() if found is None]
    if missing:
        raise MissingShardError(
            f"{len(missing)} of {len(names)} weight files of {str(source.name)!r} are missing: {', '.join(missing)}."
        )
    weights: dict[str, Tensor] = {}
    for found in paths.values():
        if found is not None:
            weights.update(layout.read(found))
    return weights


def _check_names(names: Iterable[str], index_path: Path, suffix: str) -> None:
    strange = [name for name in names if Path(name).name != name or "\0" in name or not name.endswith(suffix)]
    if strange:
        raise UnsafeCheckpointError(
            f"{index_path} names {strange[0]!r}; only names of {suffix} files beside the index are accepted."
        )


def _with_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model saved without its head gets the names of one with."""
    if any(name.startswith("model.") for name in weights):
        return weights
    return {f"model.{name}" if name.startswith(("encoder.", "decoder.")) else name: weights[name] for name in weights}


def _settled(generation: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What both files say about generate(); where there is no generation_config.json, config.json's lists count."""
    settled = dict(generation)
    for name in _IDS:
        if settled.get(name) is None:
            settled[name] = config.get(name)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if generation or name in config:
            settled.setdefault(name, None if generation else config.get(name))
    if not settled.get("forced_decoder_ids"):
        settled["forced_decoder_ids"] = config.get("forced_decoder_ids")
    return settled
