"""What a Trainer is put together from, looked at before anything is done with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..base.errors import ConfigError
from .arguments import TrainingArguments


def check_parts(model: Any, args: Any, train_dataset: Any, callbacks: Any, optimizers: Any, **functions: Any) -> None:
    """Refuse what cannot be a part of a Trainer; the arguments are those of its constructor.

    Raises:
        ConfigError: One is of another kind; the message names it.
    """
    if args is not None and not isinstance(args, TrainingArguments):
        raise ConfigError(f"args is a {type(args).__name__}; TrainingArguments(...) are needed.")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}; a model is needed, as its class's from_pretrained(...) gives it."
        )
    for name, function in functions.items():
        if isinstance(function, type) or not (function is None or callable(function)):
            what = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
            raise ConfigError(f"{name} is {what}; a function, or an object that can be called, is needed.")
    if isinstance(train_dataset, str | dict):
        parts = ", ".join(map(repr, list(train_dataset)[:5])) if isinstance(train_dataset, dict) else ""
        hint = f" It holds {parts}: pass one of these." if parts else ""
        raise ConfigError(f"train_dataset is a {type(train_dataset).__name__}; samples, one by one, are needed.{hint}")
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise ConfigError(f"callbacks is a {type(callbacks).__name__}: pass a list, callbacks=[...].")
    strange = next((one for one in callbacks or () if not hasattr(one, "on_init_end")), None)
    if strange is not None:
        raise ConfigError(f"callbacks holds a {type(strange).__name__}; objects or classes of TrainerCallback fit.")
    is_pair = isinstance(optimizers, list | tuple) and len(optimizers) == 2
    if not is_pair or any(isinstance(one, type) for one in optimizers):
        raise ConfigError(
            f"optimizers={str(optimizers)[:60]}: a pair (optimizer, schedule) of objects is needed, None for the "
            "Trainer's own; classes go into optimizer_cls_and_kwargs."
        )
