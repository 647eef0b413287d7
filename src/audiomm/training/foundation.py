"""What every part of the Trainer stands on: its parts, processes and precision, loaders, events and logs.

accelerate is spoken to here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, find_executable_batch_size, gather_object
from torch import Tensor, nn

from ..base.errors import ConfigError
from ..base.hub import read_json
from ..base.modeling import PreTrainedModel
from .arguments import TrainingArguments
from .callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    JsonLinesCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from .checkpoint import set_seed
from .collators import default_data_collator, padding_collator
from .data import (
    Collate,
    EpochBatches,
    GivenLoader,
    KeepColumns,
    OwnRandomness,
    ProcessShare,
    epoch_order,
    has_length,
    make_loader,
    sample_lengths,
)
from .deepspeed import settle_deepspeed
from .evaluation import EvalPrediction
from .loss import without_adapters
from .optim import build_optimizer, build_schedule, decayed_names
from .parts import check_parts

logger = logging.getLogger("audiomm.training")


class Foundation:
    """The parts of a Trainer, whose arguments its docstring tells."""

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        check_parts(
            model,
            args,
            train_dataset,
            callbacks,
            optimizers,
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.args = args if args is not None else TrainingArguments()
        self.args.check()
        level, library = self.args.get_process_log_level(), logging.getLogger("audiomm")
        if level != library.getEffectiveLevel():  # else it goes on following what the script says of all loggers
            library.setLevel(level)
        self._seed_everything()
        if (model is None) == (model_init is None):
            raise ConfigError("Trainer needs either model or model_init, and not both.")
        self.model_init = model_init
        chosen: Any = model if model_init is None else self._model_made()
        self.model = chosen
        self.processing_class = processing_class
        self.data_collator = data_collator or (
            padding_collator(processing_class) if processing_class is not None else default_data_collator
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if self.args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError(
                f"eval_strategy={self.args.eval_strategy!r} needs an eval_dataset; pass one, or set it to 'no'."
            )
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = self._given_optimizers = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.label_names = self.args.label_names or ["labels"]
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        self.accelerator = self._make_accelerator()
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.control = TrainerControl()
        standard: list[Any] = [DefaultFlowCallback, JsonLinesCallback]
        if not self.args.disable_tqdm:
            standard.append(ProgressCallback)
        self.callback_handler = CallbackHandler([*standard, *(callbacks or [])])
        self.model_wrapped: Any = self.model
        self.train_loader: Any = None
        self.eval_loader: Any = None
        self.is_in_train = False
        self._has_trained = False
        self._lengths: list[int] | None = None
        self._saved_step: int | None = None
        self._ignored_keys: list[str] | None = None
        self._stop_signal: int | None = None
        self._random_states: dict[str, Any] | None = None
        self._place = {"epoch": 0, "batches": 0}
        self._batches_in_epoch = 1
        self._fingerprint: dict[str, Any] = {}
        self._logged_step = 0
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        self._total_loss = 0.0
        self._rate = self.args.learning_rate
        self._grad_norm: float | None = None
        self._skipped = 0
        self._weight: Tensor = torch.ones(())
        self._batch_size = self.args.per_device_train_batch_size
        if self.accelerator.is_main_process:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self._event("on_init_end")

    # ------------------------------------------------------------------ set-up

    def _model_made(self) -> nn.Module:
        """What model_init makes; it may take a trial, which is None here."""
        assert self.model_init is not None, "asked for only where there is one"
        takes = inspect.signature(self.model_init).parameters.values()
        needed = [one for one in takes if one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD]
        return self.model_init(*[None] * len(needed))

    def _seed_everything(self) -> None:
        set_seed(self.args.seed)
        if self.args.full_determinism:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if self.args.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = self.args.tf32

    def _make_accelerator(self) -> Accelerator:
        args = self.args
        AcceleratorState._reset_state()  # an earlier Trainer of this process may have had another precision
        handlers: list[Any] = [
            DistributedDataParallelKwargs(
                find_unused_parameters=self._may_leave_parts_out(),
                **({"bucket_cap_mb": args.ddp_bucket_cap_mb} if args.ddp_bucket_cap_mb else {}),
            )
        ]
        if args.ddp_backend or args.ddp_timeout != 1800:
            handlers.append(
                InitProcessGroupKwargs(backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))
            )
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None  # None: as `accelerate launch` was told
        options: dict[str, Any] = {
            "mixed_precision": precision,
            "cpu": args.use_cpu,
            "kwargs_handlers": handlers,
            "dataloader_config": DataLoaderConfiguration(dispatch_batches=False),
            "log_with": args.report_to or None,
            "project_dir": str(Path(args.output_dir) / "runs") if args.report_to else None,
        }
        if args.fsdp:
            options["fsdp_plugin"] = _fsdp_plugin(args)
        if args.deepspeed:
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=args.deepspeed)
        own = args.accelerator_config or {}
        unknown = sorted(set(own) - set(inspect.signature(Accelerator).parameters))
        if unknown:
            raise ConfigError(
                f"accelerator_config: {', '.join(unknown)} cannot be set. Every process takes its part of each batch "
                "by itself; accelerate's loaders are not used."
            )
        accelerator = Accelerator(**{**options, **own})
        is_launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if (args.fsdp or is_launched) and accelerator.distributed_type is DistributedType.MULTI_CPU:
            # accelerate takes FSDP for accelerators only, and would go on with DDP.
            accelerator.state.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin(fsdp_version=2)
            accelerator.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if accelerator.state.deepspeed_plugin is not None:
            settle_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, args)
        found = {str(getattr(one, "value", one)) for one in accelerator.log_with}
        missing = sorted(set(args.report_to) - found - {"all"})
        if missing:  # accelerate would go on without them
            raise ConfigError(f"report_to: the package of {', '.join(missing)} is not installed.")
        return accelerator

    def _may_leave_parts_out(self) -> bool:
        """Whether DDP must look which parameters a batch used: a chat without sound uses none of the sound tower."""
        if self.args.ddp_find_unused_parameters is not None:
            return self.args.ddp_find_unused_parameters
        model = without_adapters(self.model)
        return not isinstance(model, PreTrainedModel) or bool(model.config.parts())

    def create_optimizer(self) -> Any:
        """The optimizer, made if there is none yet."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            cls, options = self.optimizer_cls_and_kwargs
            self.optimizer = cls([value for value in self.model.parameters() if value.requires_grad], **options)
        elif self.optimizer is None:
            self.optimizer = build_optimizer(self.model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate, made if there is none yet."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(optimizer or self.optimizer, self.args, num_training_steps)
        return self.lr_scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def _prepare(self, total: int) -> None:
        """Wrap model and optimizer for the processes and the precision."""
        model = self.model
        if self._has_trained:  # what an earlier run made belongs to that run
            self.optimizer, self.lr_scheduler = self._given_optimizers
        self._has_trained = True
        if self.args.torch_compile:
            model = torch.compile(
                model, backend=self.args.torch_compile_backend or "inductor", mode=self.args.torch_compile_mode
            )
        if not self._spreads_weights:
            model = model.to(self.accelerator.device)
        optimizer = self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.model.__dict__.pop("_original_forward", None) is not None:
            # Every call here is under autocast anyway, and the model goes back to the user as it came.
            self.model.__dict__.pop("forward", None)
        self.create_scheduler(total, getattr(optimizer, "optimizer", optimizer))

    def _neftune(self, alpha: float) -> Any:
        """Add noise to the embeddings until the returned handle is removed."""

        def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not module.training:
                return output
            size = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
            return output + torch.empty_like(output).uniform_(-size, size)

        return self.model.get_input_embeddings().register_forward_hook(noisy)

    @property
    def _samples_per_step(self) -> int:
        return self._batch_size * self._world * self.args.gradient_accumulation_steps

    # ------------------------------------------------------------------ data

    @property
    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    def _columns(self) -> set[str]:
        """Keys that the model's forward takes, or that the collator says it reads."""
        read = getattr(self.data_collator, "columns", ())
        return {*self._forward_arguments(), *self.label_names, "label", "label_ids", *read}

    def _forward_arguments(self) -> Mapping[str, inspect.Parameter]:
        """What the model's forward takes; PEFT's wrapper passes everything on."""
        return inspect.signature(without_adapters(self.model).forward).parameters

    def _collate(self) -> Collate:
        collate = self.data_collator
        takes_anything = any(one.kind is one.VAR_KEYWORD for one in self._forward_arguments().values())
        if self.args.remove_unused_columns and not takes_anything:
            collate = KeepColumns(collate, self._columns())
        return Collate(collate)

    def _loader(self, dataset: Any, batch_size: int, *, order: Any, start: int, epoch: int, drop_last: bool) -> Any:
        """Batches of this process: in `order` for map-style data, as they come for a stream."""
        rank, world = self.accelerator.process_index, self._world
        if start == 0:  # a number that transformers' loaders draw when they begin: dropout goes on alike behind it
            torch.empty((), dtype=torch.int64).random_()
        batches = share = None
        if order is not None:
            batches = EpochBatches(order, batch_size, rank, world, drop_last, start)
        else:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            share = ProcessShare(dataset, batch_size, rank, world, start, drop_last, (self._data_seed, epoch))
        return make_loader(
            dataset,
            self._collate(),
            batches=batches,
            share=share,
            seed=self._data_seed,
            epoch=epoch,
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _train_loader(self, epoch: int, start: int) -> Any:
        if self._overrides("get_train_dataloader"):
            return GivenLoader(self.get_train_dataloader(), start)
        return self._own_train_loader(epoch, start)

    def _own_train_loader(self, epoch: int, start: int) -> Any:
        dataset, order = self.train_dataset, None
        if has_length(dataset):
            strategy, lengths = self.args.train_sampling_strategy, None
            if strategy == "group_by_length":
                with OwnRandomness(self._data_seed):
                    self._lengths = lengths = self._lengths or sample_lengths(dataset, self.args.length_column_name)
            size = self._batch_size * self._world
            order = epoch_order(len(dataset), self._data_seed, epoch, strategy, lengths, size)
        return self._loader(
            dataset, self._batch_size, order=order, start=start, epoch=epoch, drop_last=self.args.dataloader_drop_last
        )

    def _eval_loader(self, dataset: Any) -> Any:
        size, order = self.args.per_device_eval_batch_size, range(len(dataset)) if has_length(dataset) else None
        return self._loader(dataset, size, order=order, start=0, epoch=0, drop_last=False)

    def get_train_dataloader(self) -> Any:
        """The loader of the first epoch. One of your own, where a subclass overrides this, is read in every epoch."""
        if self.train_dataset is None:
            raise ConfigError("Trainer.train needs a train_dataset.")
        return self._own_train_loader(0, 0)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of an evaluation, of a dataset or of the one with that name; a subclass may override it."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ConfigError("there is nothing to evaluate: pass eval_dataset to the Trainer or to evaluate().")
        return self._eval_loader(self.eval_dataset[dataset] if isinstance(dataset, str) else dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The loader of `predict`; a subclass may override it."""
        return self._eval_loader(test_dataset)

    def _overrides(self, name: str) -> bool:
        """Whether a subclass has a method of its own in the place of one of these."""
        return getattr(type(self), name) is not getattr(Foundation, name)

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.accelerator.device, non_blocking=True)
        if isinstance(value, Mapping):
            return {name: self._on_device(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._on_device(part) for part in value)
        return value

    # ------------------------------------------------------------------ events and logs

    def _event(self, name: str, **more: Any) -> TrainerControl:
        self.control = self.callback_handler.call(
            name,
            self.args,
            self.state,
            self.control,
            model=self.model,
            processing_class=self.processing_class,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            train_dataloader=self.train_loader,
            eval_dataloader=self.eval_loader,
            **more,
        )
        return self.control

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add numbers to the history and give them to callbacks and trackers."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs=logs)
        if self.args.report_to and self.accelerator.trackers:
            self.accelerator.log(logs, step=self.state.global_step)

    def _gather_objects(self, value: Any) -> list[Any]:
        """What each process holds, in order."""
        return gather_object([value]) if self._world > 1 else [value]

    def _reduced(self, value: Tensor, how: str) -> Tensor:
        """The "sum" or "mean" of a tensor over all processes."""
        reduced: Tensor = self.accelerator.reduce(value, how) if self._world > 1 else value
        return reduced

    @property
    def _has_deepspeed(self) -> bool:
        return self.accelerator.state.deepspeed_plugin is not None

    @property
    def _spreads_weights(self) -> bool:
        """Whether no process has all weights at once."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)

    @property
    def _writes(self) -> bool:
        """Whether this process writes checkpoints."""
        first = self.accelerator.is_local_main_process if self.args.save_on_each_node else self.is_world_process_zero()
        return bool(first)

    def _halving_batches(self, run: Callable[[int], Any]) -> Any:
        """`run(batch_size)`, again with half of it whenever memory runs out."""
        return find_executable_batch_size(run, starting_batch_size=self._batch_size)()

    # ------------------------------------------------------------------ small doors

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the weights that weight_decay is for."""
        decayed = decayed_names(model)
        return [name for name, _ in model.named_parameters() if name in decayed]

    def get_num_trainable_parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters() if value.requires_grad)

    def get_learning_rates(self) -> list[float]:
        """The rate of each group of weights; there is an optimizer once training has begun."""
        return [float(group["lr"]) for group in self.create_optimizer().param_groups]

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callback_handler.add(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        return self.callback_handler.pop(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callback_handler.pop(callback)

    def is_world_process_zero(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def is_local_process_zero(self) -> bool:
        return bool(self.accelerator.is_local_main_process)


def join_processes(args: TrainingArguments) -> PartialState:
    """The processes of this run, joined now if no Trainer has done so."""
    if args.deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    return PartialState(cpu=args.use_cpu, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


def _fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin:
    """The plugin that `fsdp` and `fsdp_config` describe."""
    given = args.fsdp_config or {}
    settings = {
        name.removeprefix("fsdp_"): value
        for name, value in (given if isinstance(given, dict) else read_json(given)).items()
    }
    settings.pop("version", None)
    words = args.fsdp.split() if isinstance(args.fsdp, str) else []
    values = {
        "reshard_after_forward": "shard_grad_op" not in words,
        "cpu_offload": "offload" in words,
        **({"auto_wrap_policy": "transformer_based_wrap"} if "auto_wrap" in words else {}),
        **settings,
    }
    if "transformer_layer_cls_to_wrap" in values:
        values["transformer_cls_names_to_wrap"] = values.pop("transformer_layer_cls_to_wrap")
    known = {one.name for one in dataclasses.fields(FullyShardedDataParallelPlugin)} - {"fsdp_version"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"fsdp_config: {', '.join(unknown)} is not known; accepted are {', '.join(sorted(known))}.")
    return FullyShardedDataParallelPlugin(fsdp_version=2, **values)
