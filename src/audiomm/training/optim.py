"""Optimizers and learning-rate schedules by name.

Schedules are plain functions of the step, so that resuming needs the step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from ..base.errors import ConfigError
from .arguments import TrainingArguments

_NORM_NAMES = ("norm", "layerscale")


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the weights that decay: all but biases and the weights of norms."""
    kept: set[str] = set()
    for prefix, module in model.named_modules():
        is_norm = any(word in type(module).__name__.lower() for word in _NORM_NAMES)
        for name, _ in module.named_parameters(recurse=False):
            if not is_norm and not name.endswith("bias"):
                kept.add(f"{prefix}.{name}" if prefix else name)
    return kept


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable weights in two groups, with and without decay.

    Raises:
        ConfigError: Nothing is trainable.
    """
    decayed = decayed_names(model)
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not named:
        raise ConfigError("no weight of the model is trainable: every parameter has requires_grad=False.")
    return [
        {"params": [value for name, value in named if (name in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]


def build_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, over the trainable weights."""
    groups = [group for group in parameter_groups(model, args.weight_decay) if group["params"]]
    options: dict[str, Any] = {"lr": args.learning_rate, **_parsed(args.optim_args)}
    if args.optim.startswith("adamw"):
        options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, **options}
        return torch.optim.AdamW(groups, fused=args.optim == "adamw_torch_fused", **options)
    classes = {
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    return classes[args.optim](groups, **options)


def _parsed(text: str | None) -> dict[str, Any]:
    """Keywords from text like momentum=0.9,nesterov=True."""
    options: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"optim_args={text!r}: expected name=value pairs with commas between them.")
        try:
            options[name] = {"True": True, "False": False}[value] if value in ("True", "False") else float(value)
        except ValueError as error:
            raise ConfigError(f"optim_args={text!r}: {value!r} is neither a number nor True or False.") from error
    return options


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments, total_steps: int) -> Any:
    """The schedule that `args.lr_scheduler_type` names.

    Raises:
        ConfigError: lr_scheduler_kwargs hold what it does not know, or lack what it needs.
    """
    name, options = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {})
    warmup = 0 if name == "constant" else args.get_warmup_steps(total_steps)
    if name == "reduce_lr_on_plateau":
        try:
            return ReduceLROnPlateau(optimizer, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"lr_scheduler_kwargs={options} of lr_scheduler_type={name!r}: {error}.") from error
    if name == "warmup_stable_decay":
        return LambdaLR(optimizer, _stable_then_less(options, warmup, total_steps))
    first, rise = 0.0, max(1, warmup)
    if name == "cosine_warmup_with_min_lr":
        given = options.pop("warmup_lr_rate", None)
        first, rise = 1 / rise if given is None else float(given), max(1, warmup - 1)
    shape = _shape(name, options, args, warmup, total_steps)

    def factor(step: int) -> float:
        return first + (1 - first) * step / rise if step < warmup else shape(step)

    return LambdaLR(optimizer, factor)


def _shape(
    name: str, options: dict[str, Any], args: TrainingArguments, warmup: int, total: int
) -> Callable[[int], float]:
    """The factor on the learning rate after the warm-up."""
    length = max(1, total - warmup)

    def share(step: int) -> float:
        return min(1.0, max(0.0, (step - warmup) / length))

    if name in ("constant", "constant_with_warmup"):
        shape: Callable[[int], float] = lambda step: 1.0  # noqa: E731
    elif name == "linear":
        shape = lambda step: 1.0 - share(step)  # noqa: E731
    elif name == "inverse_sqrt":
        scale = options.pop("timescale", None) or warmup or 10_000
        shape = lambda step: math.sqrt(scale / (step - warmup + scale))  # noqa: E731
    elif name == "cosine_with_restarts":
        cycles = options.pop("num_cycles", 1)
        shape = lambda step: (  # noqa: E731
            0.0 if share(step) >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * share(step) % 1.0)))
        )
    elif name == "polynomial":
        power, end = options.pop("power", 1.0), options.pop("lr_end", 1e-7) / (args.learning_rate or 1.0)
        shape = lambda step: end + (1 - end) * (1 - share(step)) ** power  # noqa: E731
    else:
        cycles, least = options.pop("num_cycles", 0.5), 0.0
        if name != "cosine":
            if len({"min_lr", "min_lr_rate"} & set(options)) != 1:
                raise ConfigError(f"lr_scheduler_type={name!r} needs lr_scheduler_kwargs with min_lr or min_lr_rate.")
            least = options.pop("min_lr_rate", None)
            least = options.pop("min_lr") / (args.learning_rate or 1.0) if least is None else least
        ahead = 1 if name == "cosine_warmup_with_min_lr" else 0
        shape = lambda step: (  # noqa: E731
            least + (1 - least) * max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2.0 * share(step + ahead))))
        )
    if options:
        raise ConfigError(f"lr_scheduler_kwargs: {', '.join(options)} is unknown for lr_scheduler_type={name!r}.")
    return shape


def _stable_then_less(options: dict[str, Any], warmup: int, total: int) -> Callable[[int], float]:
    """The factor of "warmup_stable_decay": a rise, a constant rate, a fall, and what is left of it."""
    if "num_decay_steps" not in options:
        raise ConfigError("lr_scheduler_type='warmup_stable_decay' needs lr_scheduler_kwargs={'num_decay_steps': ...}.")
    falling = options.pop("num_decay_steps")
    stable = options.pop("num_stable_steps", total - warmup - falling)
    least, cycles = options.pop("min_lr_ratio", 0.0), options.pop("num_cycles", 0.5)
    shapes: dict[str, Callable[[float, float], float]] = {  # of (what is done, waves), from 1 to 0
        "linear": lambda done, waves: 1.0 - done,
        "cosine": lambda done, waves: 0.5 * (1.0 + math.cos(2.0 * math.pi * waves * done)),
        "1-sqrt": lambda done, waves: 1.0 - math.sqrt(done),
    }
    chosen = {name: options.pop(name, usual) for name, usual in (("warmup_type", "linear"), ("decay_type", "cosine"))}
    for name, value in chosen.items():
        if value not in shapes:
            raise ConfigError(f"lr_scheduler_kwargs: {name}={value!r}; expected one of {', '.join(shapes)}.")
    if options:
        raise ConfigError(
            f"lr_scheduler_kwargs: {', '.join(options)} is unknown for lr_scheduler_type='warmup_stable_decay'."
        )

    def factor(step: int) -> float:
        if step < warmup:
            return least + (1 - least) * shapes[chosen["warmup_type"]](1.0 - step / warmup, 0.5)
        done = step - warmup - stable
        if done < 0:
            return 1.0
        part = shapes[chosen["decay_type"]](done / falling, cycles) if done < falling else 0.0
        return max(0.0, least + (1 - least) * part)

    return factor
