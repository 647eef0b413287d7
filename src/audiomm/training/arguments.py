"""What a user may say of a training run: the fields of transformers' TrainingArguments that people set.

Names that older versions knew are refused with the name that took their place, never ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from ..base.errors import ConfigError
from .processes import LOG_LEVELS, ProcessView
from .setters import Setters

#: Names of older versions, and what to write instead.
RENAMED = {
    "evaluation_strategy": "write eval_strategy",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "group_by_length": 'write train_sampling_strategy="group_by_length"',
    "warmup_ratio": "write warmup_steps with the share of all steps, like warmup_steps=0.1",
    "no_cuda": "write use_cpu",
    "use_mps_device": "leave it out: the device is found",
    "overwrite_output_dir": "leave it out: checkpoints of other runs are never overwritten silently",
    "save_safetensors": "leave it out: weights are always safetensors",
    "fp16_opt_level": "write fp16",
    "fp16_backend": "write fp16",
    "half_precision_backend": "write bf16 or fp16",
    "tokenizer": "pass processing_class to the Trainer",
    "push_to_hub_token": "write hub_token",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write hub_model_id",
    "logging_dir": "leave it out: trackers write into output_dir/runs",
    "include_inputs_for_metrics": 'write include_for_metrics=["inputs"]',
    "activation_checkpointing": "write gradient_checkpointing",
    "activation_checkpointing_kwargs": "leave it out: layers are recomputed without reentrance",
    "use_liger_kernel": "leave it out: scores are made only where labels ask for them",
    "trackers": "write report_to",
}

#: Arguments of transformers that may be given with the value they have when nobody sets them, and are dropped then.
WITHOUT_EFFECT: dict[str, Any] = {
    "activation_checkpointing": False,
    "activation_checkpointing_kwargs": None,
    "dataloader_in_order": True,
    "dataloader_multiprocessing_context": None,
    "ddp_broadcast_buffers": None,
    "ddp_static_graph": None,
    "debug": ("", []),
    "enable_jit_checkpoint": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "hub_always_push": False,
    "hub_revision": None,
    "include_num_input_tokens_seen": (False, "no"),
    "liger_kernel_config": None,
    "local_rank": -1,
    "optim_target_modules": None,
    "parallelism_config": None,
    "skip_memory_metrics": True,
    "torch_empty_cache_steps": None,
    "use_cache": False,
    "use_liger_kernel": False,
}

_STRATEGIES = ("no", "steps", "epoch")
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
)
FSDP_WORDS = ("full_shard", "shard_grad_op", "auto_wrap", "offload")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop")


class _RefusesOldNames(type):
    """Makes an unknown keyword an error that says what to write."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **_known(cls, kwargs))


def _known(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of arguments that `cls` has, without those that may be given and have no effect.

    Raises:
        ConfigError: There is another.
    """
    known = {one.name for one in dataclasses.fields(cls)}
    kept = {name: value for name, value in values.items() if name in known}
    for name in set(values) - known:
        usual = WITHOUT_EFFECT.get(name, ())
        if values[name] in (usual if isinstance(usual, tuple) else (usual,)):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
        if name in WITHOUT_EFFECT:
            hint = f"it is not part of this library, so {values[name]!r} cannot be asked for; leave it out"
        raise ConfigError(f"{cls.__name__} has no {name!r}; {RENAMED.get(name, hint)}")
    return kept


@dataclass
class TrainingArguments(ProcessView, Setters, metaclass=_RefusesOldNames):
    """Options of a training run; names and defaults are those of transformers 5.

    Attributes:
        output_dir: Where checkpoints and logs go.
        do_train, do_eval, do_predict: For scripts; the Trainer does what it is called for.
        num_train_epochs: Passes over the data; a fraction ends within one.
        max_steps: Optimizer steps; above 0 it wins over num_train_epochs. Needed for data without a length.
        per_device_train_batch_size, per_device_eval_batch_size: Samples a process takes at once.
        gradient_accumulation_steps: Batches whose gradients make one optimizer step.
        average_tokens_across_devices: Average the loss over the label tokens of all processes; False averages over
            those of each process first. The batches of a step are averaged over their tokens either way.
        learning_rate, lr_scheduler_type, lr_scheduler_kwargs: The schedule; `SCHEDULES` lists the names.
        warmup_steps: Steps of rising rate; below 1 a share of all steps.
        weight_decay: Of weights that are neither biases nor scales of norms.
        optim, optim_args: A name of `OPTIMIZERS`, and "momentum=0.9,..." for it.
        adam_beta1, adam_beta2, adam_epsilon: For AdamW.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        label_smoothing_factor: Share of the target spread over the whole vocabulary.
        neftune_noise_alpha: Noise on the embeddings while training (arXiv:2310.05914).
        bf16, fp16: Mixed precision; weights stay what they are.
        bf16_full_eval, fp16_full_eval: Convert the model for evaluation.
        tf32: Allow TF32 matmuls on CUDA.
        gradient_checkpointing, gradient_checkpointing_kwargs: Recompute activations in the backward pass.
        torch_compile, torch_compile_backend, torch_compile_mode: Compile the model's forward pass.
        logging_strategy, logging_steps, logging_first_step: When to log; a step count below 1 is a share of all steps.
        logging_nan_inf_filter: Count a loss that is NaN or infinite as 0 in the average that is logged (with fp16,
            whose scaler leaves such steps out).
        nan_policy: "raise" ends a run at a NaN or infinite loss or gradient; "skip" leaves such steps out.
        eval_strategy, eval_steps, eval_delay, eval_on_start: When to evaluate.
        eval_accumulation_steps: Accepted; what is kept of a batch goes to the host at once anyway.
        prediction_loss_only: Evaluate the loss and nothing else.
        include_for_metrics: "inputs" or "loss" for compute_metrics.
        batch_eval_metrics: Call compute_metrics for every batch with compute_result=True at the last.
        save_strategy, save_steps, save_total_limit, save_only_model, save_on_each_node: When and what to save; the
            strategy may also be "best".
        load_best_model_at_end, metric_for_best_model, greater_is_better: Which checkpoint counts. A metric whose name
            ends in loss, wer or cer is better when it is lower, unless greater_is_better says so.
        ignore_data_skip: On resume, begin the epoch anew instead of going to the place in it.
        restore_callback_states_from_checkpoint: On resume, give callbacks their state.
        seed, data_seed, full_determinism: Random numbers.
        dataloader_num_workers, dataloader_pin_memory, dataloader_prefetch_factor, dataloader_drop_last: Of the loaders.
        dataloader_persistent_workers: Accepted; workers start anew with every epoch, so that each epoch can be resumed.
        remove_unused_columns, label_names: Which keys of samples go to the model.
        train_sampling_strategy: "random", "sequential" or "group_by_length".
        length_column_name: Column with the lengths for that.
        report_to: Names of trackers of accelerate ("tensorboard", "wandb", ...), "none" or "all".
        run_name, project: For trackers.
        disable_tqdm: No progress bar.
        log_level, log_level_replica: Of the library's loggers, in the first process and in the others: "debug", "info",
            "warning", "error", "critical", or "passive" to leave it.
        log_on_each_node: Whether the first process of each machine is a first one.
        push_to_hub, hub_model_id, hub_strategy, hub_token, hub_private_repo: Upload to the hub when saving.
        ddp_find_unused_parameters: Let batches leave out parts of the model, such as a tower; None does so for models
            that have several.
        ddp_bucket_cap_mb, ddp_backend, ddp_timeout: For distributed runs.
        fsdp: True, or words of `FSDP_WORDS`; usually `accelerate launch` sets this and the next.
        fsdp_config: Fields of accelerate's plugin, with or without "fsdp_" before them, or a JSON file of them.
        deepspeed: DeepSpeed's configuration, or its file. What it leaves open ("auto") comes from these arguments.
        auto_find_batch_size: Halve the batch size when memory runs out.
        resume_from_checkpoint: For scripts; `Trainer.train` takes it.
        use_cpu: Stay on the CPU.
        accelerator_config: Keywords for `Accelerator`; not those about its data loaders, which are not used.
    """

    output_dir: str = "trainer_output"
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    average_tokens_across_devices: bool = True
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0
    weight_decay: float = 0.0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    bf16: bool = False
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    logging_nan_inf_filter: bool = True
    nan_policy: str = "raise"
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    eval_on_start: bool = False
    eval_accumulation_steps: int | None = None
    prediction_loss_only: bool = False
    include_for_metrics: list[str] = field(default_factory=list)
    batch_eval_metrics: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_only_model: bool = False
    save_on_each_node: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    ignore_data_skip: bool = False
    restore_callback_states_from_checkpoint: bool = False
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_drop_last: bool = False
    remove_unused_columns: bool = True
    label_names: list[str] | None = None
    train_sampling_strategy: str = "random"
    length_column_name: str = "length"
    report_to: str | list[str] = "none"
    run_name: str | None = None
    project: str = "audiomm"
    disable_tqdm: bool = False
    log_level: str = "passive"
    log_level_replica: str = "warning"
    log_on_each_node: bool = True
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_token: str | None = None
    hub_private_repo: bool | None = None
    ddp_find_unused_parameters: bool | None = None
    ddp_bucket_cap_mb: int | None = None
    ddp_backend: str | None = None
    ddp_timeout: int = 1800
    fsdp: str | bool | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None
    auto_find_batch_size: bool = False
    resume_from_checkpoint: str | None = None
    use_cpu: bool = False
    accelerator_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike | None):
            raise ConfigError(f"output_dir={self.output_dir!r}: the path of a folder is needed.")
        self.output_dir = str(Path(self.output_dir or "trainer_output").expanduser())
        self._read_texts()
        self._check_choices()
        self.do_eval = self.do_eval or self.eval_strategy != "no"
        self.torch_compile = self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        self.disable_tqdm = bool(self.disable_tqdm)
        follows_metric = self.lr_scheduler_type == "reduce_lr_on_plateau" or self.save_strategy == "best"
        if self.load_best_model_at_end or follows_metric:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "wer", "cer"))
        self.check()

    def _read_texts(self) -> None:
        """Dictionaries may be written as JSON."""
        for name in ("accelerator_config", "deepspeed", "fsdp_config", "lr_scheduler_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                try:
                    setattr(self, name, json.loads(value))
                except ValueError as error:
                    raise ConfigError(f"{name}={value!r} is no JSON: {error}.") from error

    def check(self) -> None:
        """Look at all values and whether they fit each other, as the Trainer does with what was set meanwhile.

        Raises:
            ConfigError: A value is none of those accepted, or does not go with another.
        """
        self._check_choices()
        self._check_numbers()
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and self.eval_strategy == "no":
            raise ConfigError("lr_scheduler_type='reduce_lr_on_plateau' goes by evaluations: set eval_strategy, too.")
        is_matched = self.save_strategy == "best" or self.eval_strategy == self.save_strategy
        if self.load_best_model_at_end and (self.eval_strategy == "no" or not is_matched):
            raise ConfigError(
                f"load_best_model_at_end needs evaluations and their checkpoints, but eval_strategy="
                f"{self.eval_strategy!r} and save_strategy={self.save_strategy!r}; make both 'steps' or both 'epoch'."
            )
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.eval_steps:
            times, both_shares = self.save_steps / self.eval_steps, (self.save_steps < 1) == (self.eval_steps < 1)
            if not both_shares or abs(times - round(times)) > 1e-6 or times < 1:
                raise ConfigError(
                    f"load_best_model_at_end with save_steps={self.save_steps} and eval_steps={self.eval_steps}: what "
                    "is evaluated at other steps than those saved cannot be loaded. Make save_steps a multiple of "
                    "eval_steps."
                )

    def _check_choices(self) -> None:
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        self.report_to = [name for name in trackers if name != "none"]
        choices = {
            "eval_strategy": _STRATEGIES,
            "logging_strategy": _STRATEGIES,
            "save_strategy": (*_STRATEGIES, "best"),
            "lr_scheduler_type": SCHEDULES,
            "optim": OPTIMIZERS,
            "train_sampling_strategy": ("random", "sequential", "group_by_length"),
            "nan_policy": ("raise", "skip"),
            "hub_strategy": ("end", "every_save"),
            "log_level": LOG_LEVELS,
            "log_level_replica": LOG_LEVELS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            value = str(getattr(value, "value", value))
            setattr(self, name, value)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}.")
        for end in ("", "_full_eval"):
            if getattr(self, f"bf16{end}") and getattr(self, f"fp16{end}"):
                raise ConfigError(f"bf16{end} and fp16{end} exclude each other; choose one.")
        for name in ("fp16", "fp16_full_eval"):
            if getattr(self, name) and (self.use_cpu or not torch.cuda.is_available()):
                raise ConfigError(f"{name}=True needs a CUDA device; on a CPU use {name.replace('fp', 'bf')}=True.")
        if self.gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            raise ConfigError(
                f"gradient_checkpointing_kwargs={self.gradient_checkpointing_kwargs!r}: only {{'use_reentrant': "
                "False} is known, which is how layers are recomputed anyway."
            )
        if self.fsdp_config and not self.fsdp:
            raise ConfigError("fsdp_config does nothing without fsdp: pass fsdp=True, too.")
        words = self.fsdp.split() if isinstance(self.fsdp, str) else []
        unknown = [word for word in words if word not in FSDP_WORDS]
        if unknown:
            raise ConfigError(f"fsdp={self.fsdp!r}: known are {', '.join(FSDP_WORDS)}, and True.")

    def _check_numbers(self) -> None:
        lowest = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "label_smoothing_factor": 0,
            "num_train_epochs": 0,
            "logging_steps": 0,
            "save_steps": 0,
            "eval_delay": 0,
            "dataloader_num_workers": 0,
        }
        for name in ("max_steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value!r}: a whole number is needed.")
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
                raise ConfigError(f"{name}={value!r}: a number of at least {low} is needed.")
        if not self.label_smoothing_factor < 1:
            raise ConfigError(f"label_smoothing_factor={self.label_smoothing_factor}: it must be below 1.")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ConfigError(f"save_total_limit={self.save_total_limit}: at least 1, or None to keep all.")
        intervals = (
            ("eval_steps", "eval_strategy"),
            ("save_steps", "save_strategy"),
            ("logging_steps", "logging_strategy"),
        )
        for name, strategy in intervals:
            value = getattr(self, name)
            if getattr(self, strategy) != "steps":
                continue
            if not (value or 0) > 0:
                raise ConfigError(f"{name}={value!r} with {strategy}='steps': it must be above 0.")
            if value > 1 and value != int(value):
                raise ConfigError(f"{name}={value!r}: above 1 it is a number of steps, so it must be whole.")
        if self.dataloader_prefetch_factor is not None and self.dataloader_num_workers == 0:
            raise ConfigError(
                "dataloader_prefetch_factor does nothing without workers: set dataloader_num_workers, too."
            )

    def _set(self, **values: Any) -> Self:
        changed = copy.copy(self)
        for name, value in _known(type(self), values).items():
            setattr(changed, name, value)
        changed._check_choices()
        changed._check_numbers()
        vars(self).update(vars(changed))
        return self

    @staticmethod
    def every(steps: float | None, total: int) -> int:
        """A number of steps, where below 1 means a share of all of them."""
        if not steps:
            return 0
        return math.ceil(total * steps) if steps < 1 else int(steps)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of rising rate."""
        steps = self.warmup_steps
        return math.ceil(num_training_steps * steps) if steps < 1 else int(steps)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-compatible values, without the hub token."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        if values["hub_token"]:
            values["hub_token"] = "<HUB_TOKEN>"
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """TrainingArguments of models that write: what evaluation generates.

    Attributes:
        predict_with_generate: Evaluate generated tokens instead of logits.
        generation_max_length: max_length while evaluating; None is the model's.
        generation_num_beams: num_beams while evaluating; None is the model's.
        generation_config: Options of `generate` while evaluating.
        sortish_sampler: The older name of train_sampling_strategy="group_by_length".
    """

    predict_with_generate: bool = False
    generation_max_length: int | None = None
    generation_num_beams: int | None = None
    generation_config: Any = None
    sortish_sampler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sortish_sampler:
            self.train_sampling_strategy = "group_by_length"
