"""LoRA: small trainable matrices beside frozen ones, in the file format of PEFT.

A named linear keeps its name and its weight; the product B A is added by a hook, so the state of the model holds what
it held before plus `lora_A.weight` and `lora_B.weight`. Expert weights, three-dimensional parameters, get one pair an
expert. Adapters are float32 whatever the model is.

Source: "LoRA", arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732. The files are those of PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..base.errors import CheckpointMismatchError, CheckpointNotFoundError, ConfigError
from ..base.hub import Source, make_folder, read_json, write_json
from ..base.quantization import refuse_quantised
from ..base.weights import save_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

#: Options of PEFT that change what an adapter computes and are not supported; with the values that are harmless.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


@dataclass
class LoraConfig:
    """What gets an adapter, and of which size; the fields are PEFT's.

    Attributes:
        r: Rank.
        lora_alpha: The product is scaled by lora_alpha / r.
        target_modules: Ends of the names of linears, a regular expression for whole names, or "all-linear" (all but
            the output head).
        target_parameters: Ends of the names of three-dimensional expert parameters.
        exclude_modules: Ends of names, or a regular expression, of what is left out.
        lora_dropout: Dropout before A while training.
        use_rslora: Scale by lora_alpha / sqrt(r).
        bias: "none"; biases are not trained.
        modules_to_save: Ends of the names of modules that are trained whole and saved with the adapter.
        rank_pattern, alpha_pattern: Other ranks and alphas, by the end of the name.
        init_lora_weights: True starts with a product of zero; False with a random one, for tests.
        task_type, base_model_name_or_path, inference_mode: For PEFT.
        extra: Fields of a file that this class does not know.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"r={self.r!r}: the rank is a whole number of at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout}: expected at least 0 and below 1.")
        if self.bias != "none":
            raise ConfigError(f"bias={self.bias!r}: only 'none' is supported; name modules in modules_to_save instead.")
        if not self.target_modules and not self.target_parameters:
            raise ConfigError('name what to adapt: target_modules=["q_proj", "v_proj"], "all-linear", ...')

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """The configuration of an adapter_config.json.

        Raises:
            ConfigError: It is of another kind of adapter, or has options that would change the result.
        """
        if values.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"peft_type={values['peft_type']!r}: only LORA adapters can be loaded.")
        for name, harmless in _UNSUPPORTED.items():
            if values.get(name, harmless[0]) not in harmless:
                raise ConfigError(f"{name}={values[name]!r} in {CONFIG_NAME} is not supported.")
        known = {one.name for one in dataclasses.fields(cls)} - {"extra"}
        fields = {name: value for name, value in values.items() if name in known and value is not None}
        return cls(**fields, extra={name: value for name, value in values.items() if name not in known})

    def to_dict(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "extra"}
        return {**self.extra, **values, "peft_type": "LORA", "inference_mode": True}

    def size_of(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the adapter of a module or parameter."""
        rank = next((value for end, value in self.rank_pattern.items() if _ends(name, end)), self.r)
        alpha = next((value for end, value in self.alpha_pattern.items() if _ends(name, end)), self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}") or re.fullmatch(rf"(.*\.)?({end})", name) is not None


class _Low(nn.Module):
    """One of the two matrices; a module of its own so that its name is PEFT's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class _Added:
    """The forward hook of an adapted linear."""

    def __init__(self, scale: float, dropout: float) -> None:
        self.scale, self.dropout = scale, dropout
        self.enabled = True

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        down, up = module.lora_A.weight, module.lora_B.weight
        hidden = functional.dropout(inputs[0].to(down.dtype), self.dropout, module.training)
        with torch.autocast(output.device.type, enabled=False):
            added = functional.linear(functional.linear(hidden, down), up) * self.scale
        return output + added.to(output.dtype)


class ExpertDelta(nn.Module):
    """Adds to each expert's matrix the product of its own pair; a parametrization of (experts, out, in)."""

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float) -> None:
        super().__init__()
        experts, width_out, width_in = shape
        self.experts, self.rank, self.scale, self.enabled = experts, rank, scale, True
        self.lora_A = _Low(torch.empty(experts * rank, width_in))
        self.lora_B = _Low(torch.zeros(width_out, rank * experts))

    def delta(self) -> Tensor:
        """(experts, out, in) float32."""
        down = self.lora_A.weight.view(self.experts, self.rank, -1)
        up = self.lora_B.weight.view(-1, self.rank, self.experts).permute(2, 0, 1)
        return torch.bmm(up, down) * self.scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype) if self.enabled else weight


# -------------------------------------------------------------------------------------------------------------- attach


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model and put adapters beside what `config` names; returns the model.

    Raises:
        ConfigError: A name fits nothing, or only expert parameters, which target_parameters must name; or the model
            is quantised.
    """
    refuse_quantised(model, "adapted")
    if lora_config(model) is not None:
        raise ConfigError("the model has adapters already; merge_lora or remove_lora first.")
    linears, parameters = _targets(model, config)
    for value in model.parameters():
        value.requires_grad_(False)
    for name, module in linears:
        rank, scale = config.size_of(name)
        down = torch.empty(rank, module.in_features, device=module.weight.device)
        up = torch.zeros(module.out_features, rank, device=module.weight.device)
        module.lora_A, module.lora_B = _Low(_fresh(down)), _Low(up if config.init_lora_weights else _fresh(up))
        module.lora_hook = _Added(scale, config.lora_dropout)
        module.lora_handle = module.register_forward_hook(module.lora_hook)
    for name, module, leaf in parameters:
        rank, scale = config.size_of(f"{name}.{leaf}")
        weight = getattr(module, leaf)
        added = ExpertDelta(weight.shape, rank, scale).to(weight.device)
        _fresh(added.lora_A.weight.data)
        if not config.init_lora_weights:
            _fresh(added.lora_B.weight.data)
        parametrize.register_parametrization(module, leaf, added)
    for _, module in _whole_modules(model, config):
        module.requires_grad_(True)
    model.__dict__["lora"] = config
    return model


def _fresh(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _targets(model: nn.Module, config: LoraConfig) -> tuple[list[tuple[str, Any]], list[tuple[str, Any, str]]]:
    """The linears and the expert parameters that a configuration names."""
    modules = list(model.named_modules())
    stacks = [
        (name, module, leaf)
        for name, module in modules
        for leaf, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and not isinstance(module, nn.Conv1d)
    ]
    experts = [item for item in stacks if "expert" in f"{item[0]} {type(item[1]).__name__}".lower()]
    wanted = config.target_modules
    names: Iterable[str] = [] if wanted is None else [wanted] if isinstance(wanted, str) else wanted
    head_of = getattr(model, "get_output_embeddings", None)
    head = None if head_of is None else head_of()
    chosen = [
        (name, module)
        for name, module in modules
        if isinstance(module, nn.Linear)
        and not _is_named(name, config.exclude_modules)
        and (module is not head if wanted == "all-linear" else _is_named(name, wanted))
    ]
    for end in names:
        if end == "all-linear":
            skipped = sorted({leaf for _, _, leaf in experts} - set(config.target_parameters or ()))
            named = [leaf for leaf in skipped if not any(_ends(f"x.{leaf}", p) for p in config.target_parameters or ())]
            if named:
                raise ConfigError(
                    f"target_modules='all-linear': {len(experts)} expert parameters ({', '.join(named)}) are no "
                    f"linears and would stay without adapters. Pass target_parameters={named}, or name the linears "
                    "you mean."
                )
        elif not any(_is_named(name, end if isinstance(wanted, str) else [end]) for name, _ in chosen):
            among = [leaf for _, _, leaf in stacks if leaf == end]
            raise ConfigError(
                f"target_modules: {end!r} fits no linear of the model"
                + (f"; it names expert parameters: pass target_parameters=[{end!r}]." if among else ".")
            )
    ends = config.target_parameters or ()
    for end in ends:
        if not any(_ends(f"{name}.{leaf}", end) for name, _, leaf in stacks):
            raise ConfigError(f"target_parameters: {end!r} fits no three-dimensional parameter of the model.")
    # In the model's order, which is that of PEFT, too.
    return chosen, [item for item in stacks if any(_ends(f"{item[0]}.{item[2]}", end) for end in ends)]


def _is_named(name: str, wanted: list[str] | str | None) -> bool:
    """By a regular expression for the whole name, or by ends of names."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None or _ends(name, wanted)
    return any(_ends(name, end) for end in wanted)


def _whole_modules(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    ends = config.modules_to_save or []
    return [(name, module) for name, module in model.named_modules() if any(_ends(name, end) for end in ends)]


def lora_config(model: nn.Module) -> LoraConfig | None:
    """The configuration of a model's adapters, or None."""
    config: LoraConfig | None = model.__dict__.get("lora")
    return config


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_hook"))


def _deltas(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, ExpertDelta]]:
    for name, module in model.named_modules():
        for leaf, parts in getattr(module, "parametrizations", {}).items():
            if isinstance(parts[0], ExpertDelta):
                yield name, module, leaf, parts[0]


# ---------------------------------------------------------------------------------------------------- merge and remove


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add the products to the weights and remove the adapters: the model is as fast as before."""
    for _, module in _linears(model):
        product = module.lora_B.weight.float() @ module.lora_A.weight.float() * module.lora_hook.scale
        module.weight.copy_((module.weight.float() + product).to(module.weight.dtype))
    for _, module, leaf, added in list(_deltas(model)):
        original = module.parametrizations[leaf].original  # type: ignore[index, union-attr]
        original.copy_((original.float() + added.delta()).to(original.dtype))
    return remove_lora(model)


@torch.no_grad()
def remove_lora(model: nn.Module) -> nn.Module:
    """Take the adapters away; the weights are what they were before them."""
    for _, module in list(_linears(model)):
        module.lora_handle.remove()
        for name in ("lora_A", "lora_B", "lora_hook", "lora_handle"):
            delattr(module, name)
    for _, module, leaf, added in list(_deltas(model)):
        added.enabled = False
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    model.__dict__.pop("lora", None)
    return model


def set_lora_enabled(model: nn.Module, enabled: bool) -> None:
    """Use the adapters, or leave them out for a while."""
    for _, module in _linears(model):
        module.lora_hook.enabled = enabled
    for *_, added in _deltas(model):
        added.enabled = enabled


# --------------------------------------------------------------------------------------------------------------- files


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' matrices, and the modules that are trained whole, by their names in PEFT's files."""
    config = lora_config(model)
    if config is None:
        raise ConfigError("the model has no adapters: call add_lora first.")
    found: dict[str, Tensor] = {}
    for name, module in _linears(model):
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = module.lora_A.weight, module.lora_B.weight
    by_module: dict[str, list[ExpertDelta]] = {}
    for name, _, _, added in _deltas(model):
        by_module.setdefault(name, []).append(added)
    for name, parts in by_module.items():
        for number, added in enumerate(parts):  # PEFT wraps the module once a parameter, the last one outermost
            inside = "base_layer." * (len(parts) - 1 - number)
            found[f"{name}.{inside}lora_A.weight"] = added.lora_A.weight
            found[f"{name}.{inside}lora_B.weight"] = added.lora_B.weight
    for name, module in _whole_modules(model, config):
        found.update({f"{name}.{leaf}": value for leaf, value in module.named_parameters() if "lora_" not in leaf})
    return {_PREFIX + name.removeprefix("."): value for name, value in found.items()}


def save_lora(model: nn.Module, save_directory: str | os.PathLike[str]) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT reads."""
    write_lora(model, lora_tensors(model), save_directory)


def write_lora(model: nn.Module, tensors: dict[str, Tensor], save_directory: str | os.PathLike[str]) -> None:
    """`save_lora` of tensors that `lora_tensors` gave, wherever they have been since."""
    config = lora_config(model)
    assert config is not None, "lora_tensors has looked"
    folder = make_folder(save_directory)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    save_tensors({name: value.detach() for name, value in tensors.items()}, folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, config.to_dict())


def load_lora(
    model: nn.Module, name_or_folder: str | os.PathLike[str], is_trainable: bool = False, **kwargs: Any
) -> nn.Module:
    """Put the adapters of a folder or hub id on a model.

    Args:
        model: The model they were trained on.
        name_or_folder: Folder or hub id with adapter_config.json and adapter_model.safetensors.
        is_trainable: Go on training them; otherwise nothing needs gradients.
        **kwargs: Options of the hub.

    Raises:
        CheckpointNotFoundError: There is no adapter.
        CheckpointMismatchError: It belongs to another model.
    """
    source = Source.take(name_or_folder, kwargs)
    add_lora(model, LoraConfig.from_dict(read_json(source.require(CONFIG_NAME))))
    load_lora_weights(model, source)
    if not is_trainable:
        for value in model.parameters():
            value.requires_grad_(False)
    return model


@torch.no_grad()
def load_lora_weights(model: nn.Module, source: Source) -> None:
    """Put the matrices of a file into adapters that are there.

    Raises:
        CheckpointNotFoundError: There is no adapter.
        CheckpointMismatchError: Names or shapes differ.
    """
    path: Path | None = source.find(WEIGHTS_NAME)
    if path is None:
        raise CheckpointNotFoundError(f"{str(source.name)!r} holds no {WEIGHTS_NAME}; pickled adapters are never read.")
    saved, mine = load_file(path), lora_tensors(model)
    # PEFT saves adapted embeddings and heads whole, beside their adapters.
    own = dict(model.named_parameters(remove_duplicate=False))
    bases = {name: own.get(name.removeprefix(_PREFIX).replace(".base_layer.", ".")) for name in set(saved) - set(mine)}
    mine |= {name: value for name, value in bases.items() if value is not None and name.endswith("base_layer.weight")}
    different = sorted(set(saved) ^ set(mine)) or [name for name in mine if saved[name].shape != mine[name].shape]
    if different:
        raise CheckpointMismatchError(
            f"{path}: {len(different)} tensors do not fit the model's adapters, like {different[0]}: the adapter "
            "belongs to another model or to other targets."
        )
    for name, value in mine.items():
        value.copy_(saved[name])


def trainable_report(model: nn.Module, depth: int = 2) -> dict[str, tuple[int, int]]:
    """(trainable, all) weights of each part of a model, by the first `depth` parts of the names."""
    report: dict[str, tuple[int, int]] = {}
    for name, value in model.named_parameters():
        part = ".".join(name.split(".")[:depth])
        trainable, every = report.get(part, (0, 0))
        report[part] = (trainable + value.numel() * value.requires_grad, every + value.numel())
    return report


def freeze(model: nn.Module, except_: list[str] | str | None = None) -> dict[str, tuple[int, int]]:
    """Freeze all weights but those whose names contain one of `except_`; returns the report.

    Raises:
        ConfigError: An exception fits nothing: everything would be frozen silently.
    """
    kept = [except_] if isinstance(except_, str) else list(except_ or [])
    names = [name for name, _ in model.named_parameters()]
    for word in kept:
        if not any(word in name for name in names):
            raise ConfigError(
                f"except_={word!r} is part of no weight's name; parts are {', '.join(trainable_report(model))}."
            )
    for name, value in model.named_parameters():
        value.requires_grad_(any(word in name for word in kept))
    return trainable_report(model)
