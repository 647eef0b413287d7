"""Filling a model from a checkpoint: what fits is compared before anything is read, then each tensor is copied once."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from .config import PreTrainedConfig
from .errors import CheckpointMismatchError, CorruptCheckpointError
from .weights import Checkpoint, parse_dtype

logger = logging.getLogger("audiomm.base.loading")


class LoadingReport:
    """Which tensor of the checkpoint goes where, and what does not fit."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        #: name in the model -> name in the checkpoint
        self.sources: dict[str, str] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        #: (name in the model, shape in the checkpoint, shape in the model)
        self.mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def to_dict(self) -> dict[str, list[Any]]:
        return {
            "missing_keys": self.missing,
            "unexpected_keys": self.unexpected,
            "mismatched_keys": self.mismatched,
            "error_msgs": [],
        }

    def settle(self, *, ignore_mismatched_sizes: bool, strict: bool) -> list[str]:
        """Raise for everything that is not excused; return the names of the weights to initialise anew."""
        model, kind = self.model, type(self.model).__name__
        heads = [name for name in self.missing if name.startswith(model.new_weights)] if model.new_weights else []
        missing = [name for name in self.missing if name not in heads]
        problems = []
        if missing and strict:
            total = len(self.missing) + len(self.sources) + len(self.mismatched)
            problems.append(f"{len(missing)} of {total} weights are missing: {_listed(missing)}")
        if self.unexpected and strict:
            problems.append(f"{len(self.unexpected)} are not part of the model: {_listed(self.unexpected)}")
        if self.mismatched and not ignore_mismatched_sizes:
            shapes = [f"{name} is {list(found)}, needed {list(needed)}" for name, found, needed in self.mismatched]
            problems.append(f"{len(shapes)} have another shape: {_listed(shapes)} "
                            "(ignore_mismatched_sizes=True starts these from initial values)")  # fmt: skip
        if problems:
            raise CheckpointMismatchError(
                f"the weights of {self.checkpoint.name!r} do not fit {kind}: {'; '.join(problems)}.{self._hint()}"
            )
        fresh = [*self.missing, *(name for name, _, _ in self.mismatched)]
        if fresh:
            logger.warning(
                "%s: %d weights start from initial values and need training: %s.", kind, len(fresh), _listed(fresh)
            )
        if self.unexpected:
            logger.warning("%s: %d weights are skipped: %s.", kind, len(self.unexpected), _listed(self.unexpected))
        return fresh

    def _hint(self) -> str:
        heads = {name.split(".")[0] for name in self.unexpected}
        if len(heads) == 1 and self.unexpected and not self.sources:
            return f" All names in the file start with {heads.pop() + '.'!r}: was it saved from a wrapper?"
        return " Is it of this class and these sizes? strict=False loads what fits and initialises the rest."


def compare(model: Any, checkpoint: Checkpoint, key_mapping: dict[str, str] | None = None) -> LoadingReport:
    """What of a checkpoint goes where; `key_mapping` has patterns of its names, and what is to be written instead."""
    report = LoadingReport(model, checkpoint)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.active_ties():
        needed.pop(name, None)
    known = _known(model, checkpoint, key_mapping, set(needed))
    for name, shape in needed.items():
        source = known.pop(name, None)
        if source is None:
            report.missing.append(name)
        elif checkpoint.shapes[source] != shape:
            report.mismatched.append((name, checkpoint.shapes[source], shape))
        else:
            report.sources[name] = source
    patterns = [re.compile(pattern) for pattern in (*model.ignored_weights, *map(re.escape, model.active_ties()))]
    report.unexpected = [name for name in known if not any(pattern.match(name) for pattern in patterns)]
    return report


def has_untied(model: Any, checkpoint: Checkpoint, key_mapping: dict[str, str] | None = None) -> bool:
    """Whether a checkpoint has two values for what is one weight of the model: somebody took them apart and saved both.

    Older files hold such a weight twice, with the same values.
    """
    known = _known(model, checkpoint, key_mapping, set(model.state_dict()))
    for name, source in model.active_ties().items():
        if name in known and source in known:
            both = [tensor for _, tensor in checkpoint.tensors([known[name], known[source]])]
            if both[0].shape == both[1].shape and not torch.equal(both[0], both[1].to(both[0])):
                logger.warning(
                    "%s: %s differs from %s, though config.tie_word_embeddings=True says that they are one; both are "
                    "kept, and tie_word_embeddings is False from here on.",
                    type(model).__name__,
                    name,
                    source,
                )
                return True
    return False


def _known(model: Any, checkpoint: Checkpoint, key_mapping: dict[str, str] | None, needed: set[str]) -> dict[str, str]:
    """{name in the model: name in the file}."""
    renamed = (*(key_mapping or {}).items(), *model.renamed_weights)
    originals = {_rename(renamed, name): name for name in checkpoint.shapes}
    return {name: originals[source] for name, source in _translate(model, needed, list(originals)).items()}


def _rename(renamed: tuple[tuple[str, str], ...], name: str) -> str:
    """The name by which this class knows a tensor that a checkpoint of another class or age calls `name`."""
    for pattern, replacement in renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _translate(model: Any, needed: set[str], names: list[str]) -> dict[str, str]:
    """{name in the model: name in the file}: a model with a head and one without read each other's files."""
    prefix = model.base_model_prefix + "."
    in_model = any(name.startswith(prefix) for name in needed)
    in_file = any(name.startswith(prefix) for name in names)
    if in_model and not in_file:
        return {name if name in needed or prefix + name not in needed else prefix + name: name for name in names}
    if in_file and not in_model:
        return {name.removeprefix(prefix): name for name in names}
    return {name: name for name in names}


def _listed(names: list[str], count: int = 12) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ---------------------------------------------------------------------- filling the model


def pick_dtype(dtype: Any, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if dtype != "auto":
        return parse_dtype(dtype) or torch.float32
    if config.dtype is not None:
        return parse_dtype(config.dtype) or torch.float32
    names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    found = {names[kind] for kind in checkpoint.dtypes.values() if kind in names}
    return found.pop() if len(found) == 1 else torch.float32


def fill(
    model: Any,
    checkpoint: Checkpoint,
    sources: dict[str, str],
    dtype: torch.dtype,
    devices: dict[str, Any],
    verify: bool,
) -> None:
    names = {source: name for name, source in sources.items()}
    needed = model.state_dict()
    for source, tensor in checkpoint.tensors(list(names)):
        parent, _, leaf = names[source].rpartition(".")
        # A table that may stay where it is, a map that rounds what it is given.
        take = getattr(model.get_submodule(parent), f"take_{leaf}", None)
        kind = dtype if take is not None or needed[names[source]].is_floating_point() else needed[names[source]].dtype
        if tensor.is_floating_point() != kind.is_floating_point:
            raise CheckpointMismatchError(
                f"{source} in {checkpoint.name!r} is of type {checkpoint.dtypes[source]}; "
                f"{'floating point' if kind.is_floating_point else kind} is needed."
            )
        # Single numbers are bounds, which may be infinite.
        if verify and tensor.dim() and not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CorruptCheckpointError(
                f"{source} in {checkpoint.files[source]}: {bad:,} of {tensor.numel():,} values are NaN or infinite. "
                "verify=False loads them all the same."
            )
        device = _device_of(names[source], devices)
        if take is not None:
            take(tensor, device, dtype)
        else:
            _assign(model, names[source], tensor.to(device=device, dtype=kind))


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Both show in the extremes, which take one pass and no copy of the tensor."""
    if not tensor.numel():
        return True
    low, high = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def initialise(model: Any, fresh: list[str], dtype: torch.dtype, devices: dict[str, Any]) -> None:
    """Initial values for the weights in `fresh`, and only for them."""
    touched: dict[str, list[str]] = {}
    for name in fresh:
        parent, _, leaf = name.rpartition(".")
        touched.setdefault(parent, []).append(leaf)
        shape = model.get_parameter(name).shape
        _assign(model, name, torch.empty(shape, dtype=dtype, device=_device_of(name, devices)))
    for parent, leaves in touched.items():
        module = model.get_submodule(parent)
        kept = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False) if n not in leaves}
        model.init_module(module)
        for name, value in kept.items():
            if not value.is_meta:
                module.get_parameter(name).data.copy_(value)


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        # Every loaded weight can be trained, Whisper's sinusoidal positions too: fine-tuning then takes the same path
        # as in transformers, whose loaded models do the same (seen in its golden SGD steps).
        module._parameters[leaf] = nn.Parameter(tensor)
    else:
        module._buffers[leaf] = tensor


def _device_of(name: str, devices: dict[str, Any]) -> Any:
    """The device of the longest module name in `devices` that `name` lies under; disk goes through the CPU."""
    best = max((key for key in devices if key == "" or name == key or name.startswith(key + ".")), key=len)
    return "cpu" if devices[best] == "disk" else devices[best]
