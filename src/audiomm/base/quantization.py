"""Weights in fewer bits: which scheme a call of from_pretrained means, and which linear maps take part.

"int8" is done while the checkpoint is read, tensor by tensor, so the peak of memory is that of the quantised model
and one tensor. Schemes of torchao are applied to the loaded model. Embedding tables, norms, convolutions and routers
stay as they are, and with schemes of torchao the stacked weights of experts, too.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, MissingExtra

logger = logging.getLogger("audiomm.base.quantization")

#: scheme -> the configuration class of torchao.quantization that does it.
TORCHAO_SCHEMES = {
    "int8wo": "Int8WeightOnlyConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "fp8wo": "Float8WeightOnlyConfig",
    "fp8": "Float8DynamicActivationFloat8WeightConfig",
}
SCHEMES = ("auto", "int8", *TORCHAO_SCHEMES)


def settle_scheme(
    quantize: str | None, dtype: Any, saved: torch.dtype, devices: dict[str, Any]
) -> tuple[str | None, torch.dtype]:
    """The scheme to use, never "auto", and the type of what is not quantised.

    Args:
        quantize: As passed to from_pretrained.
        dtype: As passed to from_pretrained.
        saved: What `dtype` comes to without quantisation.
        devices: {module name: device}.

    Raises:
        ConfigError: There is no such scheme, or it does not work on these devices.
        MissingExtra: It is one of torchao's, which is not installed.
    """
    if quantize is None:
        return None, saved
    if quantize not in SCHEMES:
        raise ConfigError(f"quantize={quantize!r}: accepted are None, {', '.join(map(repr, SCHEMES))}.")
    kinds = {"disk" if place == "disk" else torch.device(place).type for place in devices.values()}
    if quantize == "auto":
        if kinds != {"cpu"}:
            return None, saved
        quantize = "int8" if has_int8_products() else None
        if quantize is None and dtype == "auto":
            return None, torch.bfloat16 if has_bfloat16_products() else torch.float32
    if quantize == "int8" and kinds != {"cpu"}:
        raise ConfigError(
            f"quantize='int8' is for models on the CPU, and this one goes to {', '.join(sorted(kinds))}: on a GPU pass "
            "quantize='int8wo' or 'fp8wo' (extra: torchao)."
        )
    if quantize in TORCHAO_SCHEMES:
        if len(devices) > 1:
            raise ConfigError(f"quantize={quantize!r} needs the whole model on one device; device_map spreads it.")
        _torchao()
    # On the CPU float16 is stored, not calculated with: what is left of the model would be the slow part.
    slow = dtype == "auto" and saved == torch.float16 and kinds == {"cpu"}
    return quantize, torch.float32 if slow else saved


def has_int8_products() -> bool:
    """Whether the processor multiplies 8-bit numbers at a multiple of its float32 speed (VNNI, AMX)."""
    return _cpu_can("_is_vnni_supported") or _cpu_can("_is_amx_tile_supported")


def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 quicker than float32 (AVX-512 BF16, AMX)."""
    return _cpu_can("_is_avx512_bf16_supported") or _cpu_can("_is_amx_tile_supported")


def _cpu_can(test: str) -> bool:
    # Named with an underscore in torch, and in no other place: a version without one counts as "no".
    return bool(getattr(torch.cpu, test, bool)())


def quantised_linears(model: Any, kept: list[str]) -> dict[str, nn.Linear]:
    """{name: linear map} of those that take part.

    Args:
        model: Its class says with `float_linears` which ones stay as they are.
        kept: Names of weights that are to be trained, whose maps stay, too.

    Raises:
        ConfigError: The model is of a kind that cannot be quantised.
    """
    if model.quantized_linear is None:
        raise ConfigError(f"{type(model).__name__} cannot be quantised: load it without quantize=.")
    stays = [re.compile(pattern) for pattern in model.float_linears]
    fresh = {name.rpartition(".")[0] for name in kept}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in fresh and not any(one.search(name) for one in stays)
    }


def quantised_parts(model: Any, kept: list[str]) -> dict[str, nn.Module]:
    """{name: module} of what takes part besides linear maps: experts. `kept` as for `quantised_linears`."""
    fresh = {name.rpartition(".")[0] for name in kept}
    parts = model.named_modules()
    return {name: module for name, module in parts if type(module) in model.quantized_parts and name not in fresh}


def stand_in(model: Any, linears: dict[str, nn.Linear], parts: dict[str, nn.Module]) -> None:
    """Put a module that quantises what it is given in the place of each linear map and part; on the meta device."""
    for name, module in {**linears, **parts}.items():
        parent, _, leaf = name.rpartition(".")
        kind = model.quantized_linear if name in linears else model.quantized_parts[type(module)]
        setattr(model.get_submodule(parent), leaf, kind.empty_like(module))
    model.quantization = "int8"


def fill_tied(model: Any, device: Any, dtype: torch.dtype) -> None:
    """Quantise the table into maps that share it by name: a head. The table itself stays as it is."""
    for name, source in model.active_ties().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, model.quantized_linear):
            module.take_weight(model.get_parameter(source).detach(), device, dtype)


def apply_torchao(model: Any, scheme: str, linears: dict[str, nn.Linear]) -> None:
    """Let torchao replace the weights of the linear maps."""
    quantisation = _torchao()
    kind = getattr(quantisation, TORCHAO_SCHEMES[scheme], None)
    if kind is None:
        raise ConfigError(f"quantize={scheme!r}: this version of torchao has no {TORCHAO_SCHEMES[scheme]}; upgrade it.")
    parts = quantised_parts(model, [])
    if parts:
        logger.warning(
            "%s: quantize=%r leaves the weights of experts as they are (%d layers, %s among them).",
            type(model).__name__, scheme, len(parts), next(iter(parts)),
        )  # fmt: skip
    chosen = set(linears.values())
    quantisation.quantize_(model, kind(), filter_fn=lambda module, name: module in chosen)
    model.quantization = scheme


def _torchao() -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise MissingExtra("quantize= with a scheme of torchao", "torchao", "torchao") from error
    return quantization


def refuse_quantised(model: Any, action: str, kind: type[Exception] = ConfigError) -> None:
    """Raise `kind` if the model was quantised: it does not do `action`."""
    scheme = getattr(model, "quantization", None)
    if scheme is not None:
        raise kind(
            f"this {type(model).__name__} was loaded with quantize={scheme!r} and cannot be {action}: its "
            "weights are rounded. Load it without quantize= for that."
        )
