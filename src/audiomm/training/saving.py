"""The Trainer's checkpoints: what is saved when, and how a run goes on from them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..base.hub import Source, read_json, write_json
from ..base.staging import staged
from ..base.weights import save_weights, weight_files
from .callbacks import TrainerState
from .checkpoint import (
    ResumeError,
    load_nested,
    load_optimizer_state,
    new_checkpoint,
    optimizer_state,
    random_states,
    rotate,
    save_nested,
    weights_in,
    whole,
)
from .data import has_length
from .foundation import Foundation
from .lora import WEIGHTS_NAME, load_lora_weights, lora_config, lora_tensors, write_lora

logger = logging.getLogger("audiomm.training")

#: Arguments that must be what they were when a run goes on.
_RECIPE = (
    "data_seed", "train_sampling_strategy", "dataloader_drop_last", "average_tokens_across_devices",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16",
)  # fmt: skip


class Saving(Foundation):
    """Checkpoints, the best of them, and uploads."""

    def _checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _facts(self) -> dict[str, Any]:
        """What decides which sample is learnt when, and how."""
        args = self.args
        grouped = args.train_sampling_strategy == "group_by_length"
        return {
            "samples": len(self.train_dataset) if has_length(self.train_dataset) else None,
            "samples_per_step": self._samples_per_step,
            "samples_per_batch": self._samples_per_batch if grouped else None,
            "seed": args.seed,
            **{name: getattr(args, name) for name in _RECIPE},
        }

    @property
    def _samples_per_batch(self) -> int:
        return self._batch_size * self._world

    def _names(self) -> dict[int, str]:
        return {id(value): name for name, value in self.model.named_parameters()}

    def _save_checkpoint(self) -> None:
        """A checkpoint of this moment; unless it stands already."""
        path, writes = self._checkpoint_path(), self._writes
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(path)
        if self._saved_step == self.state.global_step:
            return
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "state") and hasattr(callback, "load_state"):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        wait = self.accelerator.wait_for_everyone
        needed = self._bytes_to_save()
        with new_checkpoint(self.args.output_dir, self.state.global_step, writes, wait, needed) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
                state = {
                    "optimizer": optimizer_state(optimizer, self._names()),
                    "schedule": _plain_state(self.lr_scheduler.state_dict()),
                    "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                    "place": {
                        "epoch": self._place["epoch"],
                        "samples": self._place["batches"] * self._samples_per_batch,
                        "logged_step": self._logged_step,
                    },
                    "loss_sum": self._loss_sum.cpu(),
                    "total_loss": self._total_loss,
                    "facts": self._fingerprint,
                }
                save_nested(folder, f"random-{self.accelerator.process_index}", random_states())
                if writes:
                    save_nested(folder, "training", state)
            if writes:
                self.state.save_to_json(folder / "trainer_state.json")
                (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        self._saved_step = self.state.global_step
        if writes:
            rotate(self.args.output_dir, self.args.save_total_limit, path, self.state.best_model_checkpoint)
        logger.info("saved %s", path)
        self._event("on_save")
        if self.args.push_to_hub and self.args.hub_strategy == "every_save":
            self.push_to_hub(commit_message=f"Training in progress, step {self.state.global_step}")

    def _bytes_to_save(self) -> int:
        """About what a checkpoint takes: weights and, unless they are not wanted, what the optimizer remembers."""
        weights = lora_tensors(self.model) if lora_config(self.model) is not None else self.model.state_dict()
        tensors = list(weights.values())
        if not self.args.save_only_model:
            tensors += [part for values in self.optimizer.state.values() for part in values.values()]
        return sum(part.numel() * part.element_size() for part in tensors if isinstance(part, Tensor))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and `processing_class` to a folder that `from_pretrained` reads."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_model(folder)
        self.accelerator.wait_for_everyone()

    def _save_model(self, folder: Path) -> None:
        model = self.model
        is_lora = lora_config(model) is not None  # then the model itself is what it was before
        state = lora_tensors(model) if is_lora else model.state_dict(keep_vars=True)
        weights = {name: whole(value) for name, value in state.items()}  # all processes together
        if not self._writes:
            return
        if is_lora:
            write_lora(model, weights, folder)
        elif hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, state_dict=weights)
        else:
            with staged(folder, weight_files(folder)) as stage:
                save_weights(_untied(weights), stage)
        if hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Upload the model, without its checkpoints, under hub_model_id (the name of output_dir unless given).

        Args:
            commit_message: Of the upload.
            blocking: Accepted for compatibility; the upload is always waited for.
            token, private: Instead of hub_token and hub_private_repo.
            card: What README.md is to tell: language, license, tags, model_name, finetuned_from, tasks, dataset_tags,
                dataset, dataset_args. Without any of them none is written.
        """
        text = _model_card(**card) if card else None
        self._event("on_push_begin")
        folder = Path(self.args.output_dir) / ".upload"
        self.save_model(str(folder))  # all processes together
        if not self.accelerator.is_main_process:
            return None
        try:
            if text is not None:
                (folder / "README.md").write_text(text, encoding="utf-8")
            return self.model.push_to_hub(
                self.args.hub_model_id or Path(self.args.output_dir).name,
                folder=folder,
                commit_message=commit_message,
                token=self.args.hub_token if token is None else token,
                private=self.args.hub_private_repo if private is None else private,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------ going on

    def _load_weights(self, folder: Path) -> None:
        """Put a checkpoint's weights into the model.

        Raises:
            ResumeError: They are those of another model.
        """
        model = self.model
        if lora_config(model) is not None:
            load_lora_weights(model, Source(str(folder)))
            return
        if hasattr(model, "peft_config"):
            _load_peft_weights(model, folder)
            return
        weights = weights_in(folder)
        if any(hasattr(value, "device_mesh") for value in model.parameters()):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, strict=False))
            return
        tied = model.active_ties() if hasattr(model, "active_ties") else {}
        report = model.load_state_dict(weights, strict=False)
        missing = [name for name in report.missing_keys if name not in tied and not _is_alias(model, name, weights)]
        if missing or report.unexpected_keys:
            name = (missing or report.unexpected_keys)[0]
            raise ResumeError(
                f"{folder} holds another model: {len(missing)} weights are missing and {len(report.unexpected_keys)} "
                f"are not known, like {name}."
            )
        if hasattr(model, "tie_weights"):
            model.tie_weights()

    def _restore(self, folder: Path, allow_change: tuple[str, ...]) -> dict[str, int]:
        """Put optimizer, schedule, random states and place into what a checkpoint holds; returns the place."""
        if not (folder / "training.json").exists():
            raise ResumeError(f"{folder} was saved with save_only_model=True: it holds no optimizer to go on with.")
        saved = load_nested(folder, "training")
        self._check_facts(saved["facts"], folder, allow_change)
        callbacks = self.callback_handler.callbacks
        self.state = TrainerState.load_from_json(folder / "trainer_state.json")
        self.state.is_local_process_zero = self.accelerator.is_local_main_process
        self.state.is_world_process_zero = self.accelerator.is_main_process
        if self.args.restore_callback_states_from_checkpoint:
            for callback in callbacks:
                state = self.state.stateful_callbacks.get(type(callback).__name__)
                if state is not None:
                    callback.load_state(state)  # type: ignore[attr-defined]
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        is_own = self._given_optimizers[1] is None and isinstance(self.lr_scheduler, LambdaLR)
        load_optimizer_state(optimizer, self._names(), saved["optimizer"], with_options=not is_own)
        if is_own:  # the rate follows from the step and the arguments, which may have been changed on purpose
            self.lr_scheduler.last_epoch = saved["schedule"]["last_epoch"]
            self.lr_scheduler._step_count = saved["schedule"]["_step_count"]
            rates = [
                base * factor(self.lr_scheduler.last_epoch)
                for base, factor in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            self.lr_scheduler._last_lr = rates
        else:
            self.lr_scheduler.load_state_dict(saved["schedule"])
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self._loss_sum.copy_(saved["loss_sum"])
        self._total_loss = saved["total_loss"]
        mine = f"random-{self.accelerator.process_index}"
        if (folder / f"{mine}.json").exists():
            self._random_states = load_nested(folder, mine)
        else:
            logger.warning("%s holds no random states of process %s.", folder, self.accelerator.process_index)
        place = saved["place"]
        skipped = 0 if self.args.ignore_data_skip else -(-place["samples"] // self._samples_per_batch)
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():  # the folder of the run may have been moved
            self.state.best_model_checkpoint = str(folder.parent / Path(best).name)
        return {"epoch": place["epoch"], "batches": skipped, "logged_step": place["logged_step"]}

    def _check_facts(self, saved: dict[str, Any], folder: Path, allow_change: tuple[str, ...]) -> None:
        facts = self._facts()
        for name, old in saved.items():
            if name in facts and facts[name] != old and name not in allow_change:
                raise ResumeError(
                    f"{name} is {facts[name]!r} now and was {old!r} when {folder.name} was made, so the run would not "
                    f"go on as it began. Set it back, or pass allow_change=({name!r},) to train() if it is meant."
                )

    def _finish_best(self) -> None:
        """Load the best checkpoint, if the arguments ask for it."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return
        if not Path(best).is_dir():
            logger.warning("the best checkpoint %s was not saved; the last weights stay.", best)
            return
        logger.info("loading the best checkpoint, %s (%s)", best, self.state.best_metric)
        self._load_weights(Path(best))

    def save_state(self) -> None:
        """Write trainer_state.json into output_dir."""
        if self.accelerator.is_main_process:
            self.state.save_to_json(Path(self.args.output_dir) / "trainer_state.json")

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Show metrics in the log, a line each."""
        for name in sorted(metrics):
            logger.info("%s  %s = %s", split, name, metrics[name])

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write <split>_results.json, and add it to all_results.json."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir)
        write_json(folder / f"{split}_results.json", metrics)
        if combined:
            path = folder / "all_results.json"
            write_json(path, {**(read_json(path) if path.exists() else {}), **metrics})


def _load_peft_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint of a PeftModel, which holds its adapters, into one that is there.

    Raises:
        ResumeError: It holds other adapters.
    """
    from peft import set_peft_model_state_dict  # a PeftModel is here, so is the package

    for name in model.peft_config:
        path = (folder if name == "default" else folder / name) / WEIGHTS_NAME
        saved = load_file(path) if path.is_file() else {}
        found: Any = set_peft_model_state_dict(model, saved, adapter_name=name)
        trained = {key for key, value in model.named_parameters() if value.requires_grad and f".{name}." in key}
        if found.unexpected_keys or trained & set(found.missing_keys):
            raise ResumeError(f"{path} does not hold the weights of the adapter {name!r} of this model.")


def _plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a schedule's state that are numbers, texts, or lists of them."""
    plain = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, plain) for item in value))
    }


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those that share their memory with an earlier one."""
    seen: set[int] = set()
    kept = {}
    for name, value in weights.items():
        if value.data_ptr() not in seen or value.numel() == 0:
            kept[name] = value
        seen.add(value.data_ptr())
    return kept


def _is_alias(model: nn.Module, name: str, weights: dict[str, Tensor]) -> bool:
    """True for a weight that shares its memory with one that is there."""
    state = model.state_dict()
    return any(other in weights and state[other].data_ptr() == state[name].data_ptr() for other in state)


def _model_card(
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        language=language,
        license=license,
        tags=tags if tags is None or isinstance(tags, list) else [tags],
        base_model=finetuned_from,
        pipeline_tag=tasks[0] if isinstance(tasks, list) else tasks,
        datasets=dataset_tags,
    )
    told = {"Fine-tuned from": finetuned_from, "Data": dataset, "Part of the data": dataset_args}
    lines = [
        f"{what}: {value if isinstance(value, str) else ', '.join(value)}" for what, value in told.items() if value
    ]
    return f"---\n{data.to_yaml()}\n---\n\n# {model_name or 'A model'}\n\n" + "".join(f"{line}\n\n" for line in lines)
