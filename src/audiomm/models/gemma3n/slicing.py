"""Smaller models out of a Gemma 3n checkpoint, without training: narrower feed-forward blocks, fewer layers.

Gemma 3n was trained so that the first half of each feed-forward block's neurons is a block of its own, and five layers
can be left out: E2B is a slice of E4B, and sizes between the two are as good as their size. Sources: MatFormer,
arXiv:2310.07707; the presets are those of google's dataset gemma3n-slicing-configs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import ConfigError, SaveError
from ...base.hub import Source, make_folder, read_json
from ...base.weights import Checkpoint, find_checkpoint, save_weights
from .config import Gemma3nConfig, Gemma3nTextConfig
from .weights import NOT_TEXT

#: Layers of E4B, which the presets are slices of.
_LAYERS = 35
#: Layers left out of E4B's thirty-five in the presets of thirty.
_SKIPPED = (20, 21, 22, 23, 24)

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..+)$")
_LAYER_IN_TEXT = re.compile(r"^(model\.)?(language_model\.)?(model\.)?layers\.\d+\.")


@dataclass(frozen=True)
class Slice:
    """What to keep of a checkpoint.

    Attributes:
        intermediate_size: Neurons of each kept layer's feed-forward block, or of all of them.
        skipped_layers: Layers left out.
    """

    intermediate_size: int | tuple[int, ...]
    skipped_layers: tuple[int, ...] = ()


def _preset(*wide: tuple[int, int], layers: int = _LAYERS) -> Slice:
    """8,192 neurons a layer, and 16,384 in layers first ... last of each pair in `wide`."""
    sizes = [8192] * layers
    for first, last in wide:
        sizes[first : last + 1] = [16384] * (last + 1 - first)
    return Slice(tuple(sizes), _SKIPPED if layers < _LAYERS else ())


#: Published slices of E4B, by effective size in billions of parameters; "-block" widens whole blocks of five layers.
PRESETS: dict[str, Slice] = {
    "E2B": _preset(layers=30),
    "E1.96B": _preset((4, 4), layers=30),
    "E2.49B-block": _preset((20, 24)),
    "E2.54B": _preset((4, 4), (20, 24)),
    "E2.69B": _preset((4, 4), (9, 9), (14, 14), (19, 24)),
    "E2.73B-block": _preset((15, 24)),
    "E2.98B": _preset((15, 24), (30, 34)),
    "E2.98B-block": _preset((10, 24)),
    "E3.18B": _preset((4, 4), (9, 24), (29, 29), (34, 34)),
    "E3.24B-block": _preset((10, 29)),
    "E3.39B": _preset((4, 4), (9, 29), (34, 34)),
    "E3.49B-block": _preset((5, 29)),
    "E3.59B": _preset((4, 29), (34, 34)),
    "E3.79B": _preset((4, 34)),
    "E3.79B-block": _preset((5, 34)),
}


def slice_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    size: str | None = None,
    *,
    intermediate_size: int | Sequence[int] | None = None,
    skipped_layers: Iterable[int] = (),
    max_shard_size: int | str = "5GB",
    **hub: Any,
) -> Gemma3nConfig | Gemma3nTextConfig:
    """Write a slice of a checkpoint to a new folder, with its processor and tokenizer files.

    Weights are memory-mapped and cut as views where that can be; it takes about the memory of the per-layer table.

    Args:
        source: Folder or hub id of a Gemma 3n, the whole model or its text part; for presets an E4B.
        output: Folder to write; it must not exist, or be empty.
        size: One of `PRESETS`, or instead of it the next two.
        intermediate_size: Neurons to keep of each feed-forward block: one number, or one a layer, either of the kept
            layers or of all. None keeps all.
        skipped_layers: Layers to leave out.
        max_shard_size: Largest file, in bytes or as "5GB".
        **hub: Options of the hub (revision, token, cache_dir, local_files_only).

    Returns:
        The configuration of the slice.

    Raises:
        ConfigError: There is no such slice of this model.
        SaveError: The folder is not empty, or cannot be written.
    """
    place = Source.take(source, hub)
    if hub:
        raise TypeError(f"slice_checkpoint() got an unknown argument {min(hub)!r}.")
    if Path(output).exists() and any(Path(output).iterdir()):
        raise SaveError(f"{output} is not empty: give a new folder, so that no files of another model are mixed in.")
    values = read_json(place.require("config.json"))
    kind = Gemma3nConfig if values.get("model_type") == Gemma3nConfig.model_type else Gemma3nTextConfig
    if values.get("model_type") != kind.model_type:
        raise ConfigError(f"{source} is of model type {values.get('model_type')!r}: only Gemma 3n is made for slicing.")
    config: Gemma3nConfig | Gemma3nTextConfig = kind.from_dict(values)
    text: Any = config.get_text_config()
    wanted = _wanted(size, intermediate_size, skipped_layers, text)
    kept = _kept_layers(wanted, text)
    sizes = _sizes(wanted, kept, text)
    checkpoint = find_checkpoint(place)
    width = text.hidden_size_per_layer_input
    _shrink(text, kept, sizes)
    folder = make_folder(output)
    save_weights(dict(_sliced(checkpoint, kept, sizes, width)), folder, max_shard_size)
    _copy_side_files(place, folder)
    config.save_pretrained(folder)
    return config


def _wanted(
    size: str | None, intermediate_size: int | Sequence[int] | None, skipped: Iterable[int], text: Gemma3nTextConfig
) -> Slice:
    sizes = text.intermediate_size if intermediate_size is None else intermediate_size
    own = Slice(sizes if isinstance(sizes, int) else tuple(sizes), tuple(skipped))
    if size is None:
        return own
    if intermediate_size is not None or own.skipped_layers:
        raise ConfigError(f"size={size!r} says what to keep: leave out intermediate_size and skipped_layers.")
    if size not in PRESETS:
        raise ConfigError(f"size={size!r}: accepted are {', '.join(PRESETS)}.")
    if text.num_hidden_layers != _LAYERS:
        raise ConfigError(
            f"size={size!r} is a slice of {_LAYERS} layers, and this model has {text.num_hidden_layers}: slice an E4B, "
            "or pass intermediate_size and skipped_layers."
        )
    return PRESETS[size]


def _kept_layers(wanted: Slice, text: Gemma3nTextConfig) -> list[int]:
    """The layers that stay.

    Raises:
        ConfigError: A layer to skip is none, or what is left has no layers to read keys from.
    """
    count = text.num_hidden_layers
    strange = [layer for layer in wanted.skipped_layers if not 0 <= layer < count]
    if strange or len(set(wanted.skipped_layers)) >= count:
        raise ConfigError(
            f"skipped_layers={list(wanted.skipped_layers)}: accepted are some of the layers 0 to {count - 1}, not all."
        )
    kept = [layer for layer in range(count) if layer not in wanted.skipped_layers]
    for layer in kept:
        source = text.kv_source(layer)
        if source not in kept:
            raise ConfigError(
                f"skipped_layers={list(wanted.skipped_layers)}: layer {layer} reads the keys of layer {source}, which "
                "must stay."
            )
    return kept


def _sizes(wanted: Slice, kept: list[int], text: Gemma3nTextConfig) -> list[int]:
    """Neurons of each kept layer.

    Raises:
        ConfigError: The list has another length, or asks for more than there are.
    """
    given = wanted.intermediate_size
    if isinstance(given, int):
        # Layers that are narrower already stay so; a number that none of them reaches is a mistake.
        enough = 1 <= given <= max(text.intermediate_size[layer] for layer in kept)
        sizes = [min(given, text.intermediate_size[layer]) if enough else given for layer in kept]
    elif len(given) == len(kept):
        sizes = list(given)
    elif len(given) == text.num_hidden_layers:
        sizes = [given[layer] for layer in kept]
    else:
        raise ConfigError(
            f"intermediate_size has {len(given)} entries: {len(kept)}, one for each layer that is kept, or "
            f"{text.num_hidden_layers}, one for each layer there is, are needed."
        )
    for layer, size in zip(kept, sizes, strict=True):
        if not 1 <= size <= text.intermediate_size[layer]:
            raise ConfigError(
                f"intermediate_size={size} for layer {layer}: it has {text.intermediate_size[layer]} neurons; accepted "
                f"are 1 to {text.intermediate_size[layer]}."
            )
    return sizes


def _shrink(text: Gemma3nTextConfig, kept: list[int], sizes: list[int]) -> None:
    """Make a configuration that of the slice."""
    shared = sum(layer >= text.first_shared_layer for layer in kept)
    text.layer_types = [text.layer_types[layer] for layer in kept]
    text.activation_sparsity_pattern = [text.activation_sparsity_pattern[layer] for layer in kept]
    text.intermediate_size = sizes
    text.num_hidden_layers = len(kept)
    text.num_kv_shared_layers = shared
    text.validate()


# ---------------------------------------------------------------------- weights


def _sliced(checkpoint: Checkpoint, kept: list[int], sizes: list[int], width: int) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, a view of the file where it can be one, of all that is kept."""
    place = {layer: index for index, layer in enumerate(kept)}
    for name, tensor in checkpoint.tensors(sorted(checkpoint.shapes)):
        layer = _LAYER.match(name) if _LAYER_IN_TEXT.match(name) else None
        if layer is None:
            yield name, _cut(name, tensor, kept, None, width)
        elif int(layer[2]) in place:
            index = place[int(layer[2])]
            yield f"{layer[1]}{index}{layer[3]}", _cut(name, tensor, kept, sizes[index], width)


def _cut(name: str, tensor: Tensor, kept: list[int], size: int | None, width: int) -> Tensor:
    """The part of one tensor that the slice has."""
    if any(re.match(pattern, name) for pattern in NOT_TEXT):
        return tensor
    if name.endswith((".mlp.gate_proj.weight", ".mlp.up_proj.weight")):
        return tensor[:size]
    if name.endswith(".mlp.down_proj.weight"):
        return tensor[:, :size]
    if name.endswith("embed_tokens_per_layer.weight"):
        return _layers_of(tensor, 1, kept, width)
    if name.endswith("per_layer_model_projection.weight"):
        return _layers_of(tensor, 0, kept, width)
    return tensor


def _layers_of(tensor: Tensor, dim: int, kept: list[int], width: int) -> Tensor:
    """The groups of `width` along `dim` that belong to the kept layers."""
    groups = tensor.unflatten(dim, (-1, width))
    if len(kept) == groups.shape[dim]:
        return tensor
    return groups.index_select(dim, torch.tensor(kept, device=tensor.device)).flatten(dim, dim + 1)


def _copy_side_files(source: Source, folder: Path) -> None:
    """Tokenizer, processor, template and generation settings, where the checkpoint has them."""
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ):
        path = source.find(name)
        if path is not None:
            shutil.copyfile(path, folder / name)
