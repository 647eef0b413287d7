"""Model folders of CTranslate2, as faster-whisper uses them: model.bin, config.json and the vocabulary.

model.bin is a list of named arrays; queries, keys and values of a layer are one matrix, and int8 and int16 matrices
have scales beside them by which they were multiplied. Source: the format as CTranslate2's converters document it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError, CorruptCheckpointError
from ..base.hub import Source, read_json
from .foreign import ByteReader, Foreign, size_of, to_tensor
from .vocabulary import unspelled

MODEL_FILE = "model.bin"
SPECIFICATION = "WhisperSpec"
_VERSIONS = range(4, 7)
#: Types by their number in the file; bfloat16 is read as its bits.
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2", "<i2")
_BFLOAT16 = 5
_MOST_ARRAYS, _MOST_AXES, _LARGEST_AXIS, _MOST_BYTES = 1_000_000, 8, 100_000_000, 1 << 32

#: Parts of a layer: name there -> names here of what is stacked in it.
_ENCODER_LAYER = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
_DECODER_LAYER = {
    **_ENCODER_LAYER,
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
}
_ENDINGS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def read_ctranslate2(source: Source) -> Foreign:
    """Read the folder or repository of a Whisper model of CTranslate2.

    Raises:
        CheckpointError: A file is missing, cut short, or of another kind of model.
    """
    path = source.require(MODEL_FILE)
    arrays = _read_arrays(path)
    weights = _hub_weights(arrays, str(path))
    config = _sizes(arrays, weights, str(path))
    settings_path = source.find("config.json")
    settings = read_json(settings_path) if settings_path else {}
    fields = {"alignment_heads": "alignment_heads", "suppress_ids": "suppress_tokens",
              "suppress_ids_begin": "begin_suppress_tokens"}  # fmt: skip
    generation = {new: settings[old] for old, new in fields.items() if settings.get(old) is not None}
    return Foreign(str(source.name), weights, config, generation, _read_vocabulary(source), source)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Everything in model.bin, aliases too; matrices of whole numbers with their scales beside them."""
    reader = ByteReader(path)
    version = int(reader.numbers("I", "the version")[0])
    if version not in _VERSIONS:
        raise CorruptCheckpointError(
            f"{path} is of binary version {version}; read are {_VERSIONS.start} to {_VERSIONS.stop - 1}. Is it a model "
            "of CTranslate2? Older ones have to be converted again with its converter."
        )
    kind = _text(reader, "the kind of model")
    if kind != SPECIFICATION:
        raise CorruptCheckpointError(f"{path} is a model of kind {kind!r}; only {SPECIFICATION!r} is read.")
    reader.numbers("I", "the revision")
    arrays: dict[str, Tensor] = {}
    for _ in range(reader.count("I", _MOST_ARRAYS, "the number of arrays")):
        name = _text(reader, "the name of an array")
        shape = [
            reader.count("I", _LARGEST_AXIS, f"an axis of {name}")
            for _ in range(reader.count("B", _MOST_AXES, f"the axes of {name}"))
        ]
        arrays[name] = _array(reader, name, shape)
    for _ in range(reader.count("I", _MOST_ARRAYS, "the number of aliases")):
        alias, target = _text(reader, "an alias"), _text(reader, "the target of an alias")
        if target not in arrays:
            raise CorruptCheckpointError(f"{path}: {alias!r} stands for {target!r}, which is not there.")
        arrays[alias] = arrays[target]
    return arrays


def _array(reader: ByteReader, name: str, shape: list[int]) -> Tensor:
    number = reader.count("B", len(_TYPES) - 1, f"the type of {name}")
    dtype = np.dtype(_TYPES[number])
    size = reader.count("I", _MOST_BYTES, f"the bytes of {name}")
    count = math.prod(shape)
    if size != count * dtype.itemsize:
        raise CorruptCheckpointError(
            f"{reader.path}: {name} of shape {shape} has {size:,} bytes instead of {count * dtype.itemsize:,}."
        )
    tensor = to_tensor(reader.array(dtype.str, count, name).reshape(shape))
    return tensor.view(torch.bfloat16) if number == _BFLOAT16 else tensor


def _text(reader: ByteReader, what: str) -> str:
    """A text with its length, the closing zero counted, before it."""
    return reader.text(int(reader.numbers("H", what)[0]), what).removesuffix("\0")


def _hub_weights(arrays: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}

    def put(old: str, names: tuple[str, ...]) -> None:
        for ending, new in _ENDINGS.items():
            stored = arrays.get(f"{old}/{ending}")
            if stored is None:
                continue
            whole = _numbers(stored, arrays.get(f"{old}/{ending}_scale"), f"{old}/{ending}", where)
            if whole.shape[0] % len(names):
                raise CorruptCheckpointError(f"{where}: {old} {list(whole.shape)} does not divide into {len(names)}.")
            for name, part in zip(names, whole.chunk(len(names)), strict=True):
                weights[f"model.{name}.{new}"] = part

    put("encoder/conv1", ("encoder.conv1",))
    put("encoder/conv2", ("encoder.conv2",))
    put("decoder/embeddings", ("decoder.embed_tokens",))
    for stack, parts in (("encoder", _ENCODER_LAYER), ("decoder", _DECODER_LAYER)):
        put(f"{stack}/layer_norm", (f"{stack}.layer_norm",))
        positions = arrays.get(f"{stack}/position_encodings/encodings")
        if positions is not None:
            weights[f"model.{stack}.embed_positions.weight"] = positions
        for layer in range(_layers(arrays, stack)):
            for old, names in parts.items():
                put(f"{stack}/layer_{layer}/{old}", tuple(f"{stack}.layers.{layer}.{name}" for name in names))
    # Keys have no bias in Whisper; stacked between queries and values they have one of zeros.
    for name in [name for name in weights if name.endswith("k_proj.bias")]:
        if bool(weights.pop(name).any()):
            raise CorruptCheckpointError(f"{where}: {name} is not zero; Whisper's keys have no bias.")
    _add_head(arrays, weights, where)
    return weights


def _add_head(arrays: dict[str, Tensor], weights: dict[str, Tensor], where: str) -> None:
    """The output head, where it is not the table of token embeddings."""
    head, table = (arrays.get(f"decoder/{name}/weight") for name in ("projection", "embeddings"))
    if head is not None and head is not table and (table is None or not torch.equal(head, table)):
        scale = arrays.get("decoder/projection/weight_scale")
        weights["proj_out.weight"] = _numbers(head, scale, "decoder/projection/weight", where)


def _layers(arrays: dict[str, Tensor], stack: str) -> int:
    places = {name.split("/")[1] for name in arrays if name.startswith(f"{stack}/layer_")} - {"layer_norm"}
    return len(places)


def _numbers(stored: Tensor, scale: Tensor | None, name: str, where: str) -> Tensor:
    """The array itself, or the numbers that were scaled to whole ones: by row for int8, by one factor for int16."""
    if stored.is_floating_point():
        return stored
    if scale is None:
        raise CorruptCheckpointError(f"{where}: {name} holds whole numbers and no scale for them.")
    factors = scale.float()
    if factors.dim() and (factors.dim() > 1 or len(factors) != len(stored)):
        raise CorruptCheckpointError(f"{where}: {name} of {len(stored)} rows has scales of {list(factors.shape)}.")
    if not bool((factors > 0).all()):
        raise CorruptCheckpointError(f"{where}: the scales of {name} are not all above 0.")
    return (
        stored.float() / factors.reshape(-1, *[1] * (stored.dim() - 1)) if factors.dim() else stored.float() / factors
    )


def _sizes(arrays: dict[str, Tensor], weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    def size(name: str, axis: int) -> int:
        return size_of(weights, f"model.{name}", axis, where)

    def heads(stack: str) -> int:
        number = arrays.get(f"{stack}/num_heads")
        if number is None or number.numel() != 1:
            raise CorruptCheckpointError(f"{where}: {stack}/num_heads is missing; a Whisper model has it.")
        return int(number)

    return {
        "vocab_size": size("decoder.embed_tokens.weight", 0),
        "d_model": size("decoder.embed_tokens.weight", 1),
        "num_mel_bins": size("encoder.conv1.weight", 1),
        "encoder_layers": _layers(arrays, "encoder"),
        "decoder_layers": _layers(arrays, "decoder"),
        "encoder_attention_heads": heads("encoder"),
        "decoder_attention_heads": heads("decoder"),
        "encoder_ffn_dim": size("encoder.layers.0.fc1.weight", 0),
        "decoder_ffn_dim": size("decoder.layers.0.fc1.weight", 0),
        "max_source_positions": size("encoder.embed_positions.weight", 0),
        "max_target_positions": size("decoder.embed_positions.weight", 0),
        "tie_word_embeddings": "proj_out.weight" not in weights,
    }


def _read_vocabulary(source: Source) -> list[bytes] | None:
    """The tokens of text in vocabulary.json or the older vocabulary.txt, up to <|endoftext|>; None without a file."""
    readers: dict[str, Callable[[str], Any]] = {
        "vocabulary.json": json.loads,
        "vocabulary.txt": lambda text: text.removesuffix("\n").split("\n"),
    }
    for filename, parse in readers.items():
        path = source.find(filename)
        if path is None:
            continue
        try:
            entries = parse(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not readable: {str(error)[:200]}") from error
        if not isinstance(entries, list) or "<|endoftext|>" not in entries:
            raise ConfigError(f"{path} is not a list of tokens with <|endoftext|> in it.")
        tokens = [unspelled(str(entry)) for entry in entries[: entries.index("<|endoftext|>")]]
        strange = next((index for index, token in enumerate(tokens) if token is None), None)
        if strange is not None:
            raise ConfigError(
                f"{path}: token {strange}, {str(entries[strange])[:40]!r}, is not in byte-level spelling."
            )
        return [token for token in tokens if token is not None]
    return None
