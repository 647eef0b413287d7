"""DeepSpeed's configuration and the Trainer's arguments: what one leaves open the other says."""

from __future__ import annotations

from typing import Any

from ..base.errors import ConfigError
from .arguments import TrainingArguments


def settle_deepspeed(config: dict[str, Any], args: TrainingArguments) -> None:
    """Fill in what DeepSpeed's configuration leaves open.

    Raises:
        ConfigError: It says otherwise than the arguments, or checkpoints are wanted that it cannot give.
    """
    wanted = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
    }
    for name, value in wanted.items():
        found = config.get(name, "auto")
        if found not in ("auto", value):
            raise ConfigError(
                f"DeepSpeed's configuration says {name}={found} and the arguments {value}: make them equal, or write "
                '"auto" there.'
            )
        config[name] = value
    config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    if args.load_best_model_at_end and config["zero_optimization"].get("stage") == 3:
        raise ConfigError("load_best_model_at_end cannot be used with stage 3 of DeepSpeed; take fsdp, or stage 2.")
    if args.save_strategy != "no" and not args.save_only_model:
        raise ConfigError(
            "DeepSpeed keeps the optimizer in a form of its own, so checkpoints hold the model alone: pass "
            "save_only_model=True. A run that must be resumed exactly takes fsdp."
        )
