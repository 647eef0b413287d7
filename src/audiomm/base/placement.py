"""Which module goes to which device: one device, a map written by hand, or one made by accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, InputError

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def as_device(device: int | str | torch.device) -> torch.device:
    """The device of this machine that a number (-1 is the CPU) or a name means.

    Raises:
        InputError: There is none.
    """
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r}: expected 'cpu', 'cuda', 'cuda:1', 'mps' or a number.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device={str(found)!r}: this machine has {count} CUDA devices; device='cpu' always works.")
    return found


def plan_devices(
    model: nn.Module,
    device_map: Any,
    device: str | torch.device | None,
    dtype: torch.dtype,
    max_memory: dict[int | str, int | str] | None = None,
) -> dict[str, Any]:
    """{module name: device} that covers the whole model; {"": device} when it is one.

    Args:
        model: On the meta device; only shapes are read.
        device_map: None, "auto" and its kin, a device, or {module name: device, "cpu" or "disk"}.
        device: The one device, when there is no map.
        dtype: Type the weights will have, for their sizes.
        max_memory: {device: bytes or "10GB"} limits for the automatic maps.

    Raises:
        ConfigError: Both were given, or the map leaves out a part of the model.
        InputError: There is no such device here.
    """
    if device_map is not None and device is not None:
        raise ConfigError(f"device={device!r} and device_map={device_map!r} exclude each other: pass one of them.")
    if device_map is None:
        return {"": as_device("cpu" if device is None else device)}
    if isinstance(device_map, str | int | torch.device) and device_map not in _AUTOMATIC:
        return {"": as_device(device_map)}
    if isinstance(device_map, dict):
        uncovered = [name for name, _ in model.named_parameters() if not _covers(device_map, name)]
        if uncovered:
            raise ConfigError(f"device_map does not say where {len(uncovered)} weights go, {uncovered[0]} among them.")
        return device_map
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    options = {"no_split_module_classes": list(getattr(model, "no_split_modules", ())), "dtype": dtype}
    if device_map != "sequential":
        max_memory = get_balanced_memory(model, max_memory, low_zero=device_map == "balanced_low_0", **options)
    return dict(infer_auto_device_map(model, max_memory=max_memory, **options))


def dispatch(model: nn.Module, devices: dict[str, Any], offload_folder: str | os.PathLike[str] | None) -> None:
    """Let accelerate move activations between the parts of a model that is spread over several devices.

    Raises:
        ConfigError: Parts go to disk and there is no folder for them.
    """
    places = {str(place) for place in devices.values()}
    if len(places) == 1 and "disk" not in places:
        return
    if "disk" in places and offload_folder is None:
        raise ConfigError("device_map puts parts of the model on disk: pass offload_folder=, the folder to use.")
    from accelerate import dispatch_model

    dispatch_model(model, devices, offload_dir=offload_folder)


def _covers(device_map: dict[str, Any], name: str) -> bool:
    return any(key == "" or name == key or name.startswith(key + ".") for key in device_map)
