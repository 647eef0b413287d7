"""Optimizers and learning-rate schedules by name.

Schedules are plain functions of the step, so that resuming needs the step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..base.errors import ConfigError
from .arguments import TrainingArguments

_NORM_NAMES = ("norm", "scale")


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


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments, total_steps: int) -> LambdaLR:
    """The schedule that `args.lr_scheduler_type` names."""
    warmup = 0 if args.lr_scheduler_type == "constant" else args.get_warmup_steps(total_steps)
    shape = _shape(args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {}), args, warmup, total_steps)

    def factor(step: int) -> float:
        return step / max(1, warmup) if step < warmup else shape(step)

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
        cycles, least = options.pop("num_cycles", 0.5), options.pop("min_lr_rate", None)
        if least is None:
            least = options.pop("min_lr", 0.0) / args.learning_rate if args.learning_rate else 0.0
        shape = lambda step: (  # noqa: E731
            least + (1 - least) * max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2.0 * share(step))))
        )
    if options:
        raise ConfigError(f"lr_scheduler_kwargs: {', '.join(options)} is unknown for lr_scheduler_type={name!r}.")
    return shape
