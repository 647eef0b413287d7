"""Trainer: fine-tunes a model on accelerate, resumes exactly, evaluates, predicts and saves.

The arguments and methods are those of transformers' Trainer. The loop reads: epochs, steps, the batches of a step.
Data are not given to accelerate: every process takes its part of each global batch by itself (see `data`), so that
nothing is read ahead of the random states that a checkpoint keeps.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..base.errors import ConfigError, InputError, NumericalError
from .callbacks import TrainerControl, TrainerState
from .checkpoint import checkpoints, find_checkpoint, set_random_states, set_seed, whole
from .data import Batch, batches_in, has_length
from .evaluating import Evaluating
from .loss import finite, is_shifted, label_tokens
from .saving import Saving

logger = logging.getLogger("audiomm.training")

#: NaN steps in a row after which nan_policy="skip" gives up.
_MOST_SKIPPED = 10


class TrainOutput(NamedTuple):
    """What `Trainer.train` returns."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer(Evaluating, Saving):
    """Trains a model.

    Args:
        model: A PreTrainedModel, or any module whose forward takes a batch's items by name and returns an output with
            `loss` (and `logits`) when it gets labels.
        args: Options; None are the defaults.
        data_collator: List of samples to a dict of tensors; None pads with `processing_class` where it can.
        train_dataset: Map-style, iterable, or a `datasets` object.
        eval_dataset: Likewise, or a dict of name to dataset.
        processing_class: Tokenizer, feature extractor or processor; saved beside the model.
        model_init: Makes the model, for runs that must start from the same weights.
        compute_loss_func: (outputs, labels, num_items_in_batch=...) to loss.
        compute_metrics: EvalPrediction to a dict of numbers.
        callbacks: More callbacks.
        optimizers: (optimizer, schedule) instead of those the arguments name.
        optimizer_cls_and_kwargs: (class, keywords) of the optimizer.
        preprocess_logits_for_metrics: (logits, labels) to what is kept for compute_metrics.

    Raises:
        ConfigError: Arguments contradict each other.
    """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        allow_change: tuple[str, ...] = (),
    ) -> TrainOutput:
        """Train until the steps are done, a callback stops, or SIGINT or SIGTERM arrives.

        A signal ends the run after the current step with a checkpoint; a second one ends it at once.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest complete one in output_dir.
            trial: None; hyper-parameter search is not part of this library.
            ignore_keys_for_eval: Output keys that evaluation during training leaves out.
            allow_change: What may differ from the checkpoint's run ("samples", "samples_per_step", "seed",
                "learning_rate", ...; the error names it); resuming is then no longer exact.

        Raises:
            ConfigError: There are no data or no end of the run.
            ResumeError: The checkpoint belongs to a run with other data or another recipe.
            NumericalError: The loss or a gradient is NaN or infinite (see nan_policy).
            SaveError: A checkpoint could not be written.
        """
        if self.train_dataset is None:
            raise ConfigError("Trainer.train needs a train_dataset.")
        if trial is not None:
            raise ConfigError(f"trial={trial!r}: hyper-parameter search is not part of this library; leave it out.")
        self._ignored_keys = ignore_keys_for_eval
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if self.model_init is not None and self._has_trained:
            set_seed(self.args.seed)
            self.model = self._model_made()
            if self.args.gradient_checkpointing:
                self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        if not self.args.auto_find_batch_size:
            return self._train(checkpoint, allow_change)
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

        def attempt(batch_size: int) -> TrainOutput:
            self._batch_size = batch_size
            self.model.load_state_dict(weights)
            return self._train(checkpoint, allow_change)

        result: TrainOutput = self._halving_batches(attempt)
        return result

    def _plan(self) -> tuple[int, int]:
        """(optimizer steps of the run, passes over the data); notes how many batches a pass has."""
        args = self.args
        if not has_length(self.train_dataset):
            if args.max_steps <= 0:
                raise ConfigError("the training data have no length, so max_steps must say when to end.")
            # A pass over a stream ends where it ends; fractions of one are told by the whole run, as in transformers.
            self._batches_in_epoch = args.max_steps * args.gradient_accumulation_steps
            return args.max_steps, sys.maxsize
        size = self._batch_size * self._world
        if self._overrides("get_train_dataloader"):
            batches = len(self.get_train_dataloader())
        else:
            batches = batches_in(len(self.train_dataset), size, args.dataloader_drop_last)
        self._batches_in_epoch = batches
        if batches == 0:
            raise ConfigError(
                f"{len(self.train_dataset)} training samples do not fill one batch of {size}: use smaller batches or "
                "dataloader_drop_last=False."
            )
        in_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * in_epoch)
        return total, math.ceil(total / in_epoch)

    def _train(self, checkpoint: Path | None, allow_change: tuple[str, ...]) -> TrainOutput:
        total, epochs = self._plan()
        self.model_wrapped, old = self.model, self.state
        self.state = TrainerState(
            is_local_process_zero=old.is_local_process_zero, is_world_process_zero=old.is_world_process_zero
        )
        self._warn_of_float16()
        if checkpoint is None:
            self._warn_of_other_runs()
        else:  # before the weights are spread over processes
            self._load_weights(checkpoint)
        self._prepare(total)
        place = {"epoch": 0, "batches": 0, "logged_step": 0}
        self._loss_sum.zero_()
        self._total_loss, self._random_states, self._saved_step = 0.0, None, None
        if checkpoint is not None:
            place = self._restore(checkpoint, allow_change)
            self._saved_step = self.state.global_step if self._is_here(checkpoint) else None
        self._note_plan(total, epochs)
        self._fingerprint, self._logged_step = self._facts(), place["logged_step"]
        self._start_trackers()
        started, first_step = time.time(), self.state.global_step
        noise = self._neftune(self.args.neftune_noise_alpha) if self.args.neftune_noise_alpha else None
        self.is_in_train = True
        try:
            with self._catching_signals():
                self._event("on_train_begin")
                if self.args.eval_on_start and checkpoint is None:
                    self._evaluate_now()
                if self._random_states is not None:
                    set_random_states(self._random_states)
                if self.state.global_step < total:
                    self._epochs(place["epoch"], place["batches"])
        finally:
            self.is_in_train = False
            if noise is not None:
                noise.remove()
        return self._finished(started, first_step)

    def _warn_of_float16(self) -> None:
        if any(weight.requires_grad and weight.dtype == torch.float16 for weight in self.model.parameters()):
            logger.warning(
                "the weights to be trained are float16, too coarse for small steps: some are lost, some become NaN. "
                "Load the model with dtype='float32'; bf16=True and fp16=True compute in 16 bits all the same."
            )

    def _warn_of_other_runs(self) -> None:
        found = checkpoints(self.args.output_dir)
        if found and self._writes:
            logger.warning(
                "%s holds %s of an earlier run, and this one starts anew: it replaces those of the steps it saves "
                "itself. resume_from_checkpoint=True goes on from the newest; another output_dir keeps them apart.",
                self.args.output_dir,
                ", ".join(path.name for path in found),
            )

    def _is_here(self, checkpoint: Path) -> bool:
        return checkpoint.resolve() == self._checkpoint_path().resolve()

    def _note_plan(self, total: int, epochs: int) -> None:
        """Write into the state where the run ends and what happens how often."""
        args, state = self.args, self.state
        state.max_steps, state.train_batch_size = total, self._batch_size
        state.num_train_epochs = epochs
        state.logging_steps = args.every(args.logging_steps, total)
        if args.eval_steps is not None:
            state.eval_steps = args.every(args.eval_steps, total)
        state.save_steps = args.every(args.save_steps, total)
        self.control = TrainerControl()

    def _start_trackers(self) -> None:
        if self.args.report_to:
            options = {name: str(value) for name, value in self.args.to_dict().items() if value is not None}
            self.accelerator.init_trackers(self.args.run_name or self.args.project, options)

    def _finished(self, started: float, first_step: int) -> TrainOutput:
        """Load the best weights, say how it went, and upload."""
        state = self.state
        self._finish_best()
        seconds = max(time.time() - started, 1e-9)
        steps = state.global_step - first_step
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(steps * self._samples_per_step / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_loss": (self._total_loss + float(self._loss_sum)) / max(state.global_step, 1),
        }
        self.log(metrics)
        self._close()
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    def _close(self) -> None:
        self._event("on_train_end")
        if self.args.report_to:
            self.accelerator.end_training()

    def _epochs(self, epoch: int, batches_done: int) -> None:
        args, state, is_cut = self.args, self.state, False
        while True:
            self.control.should_epoch_stop = False
            self.train_loader = self._train_loader(epoch, batches_done)
            self._event("on_epoch_begin")
            batches = iter(self.train_loader)
            steps_here = 0
            while not self.control.should_training_stop:
                part: list[Batch] = list(islice(batches, args.gradient_accumulation_steps))
                if not part:
                    break
                self.control.new_step()
                self._step(part)
                batches_done += len(part)
                steps_here += 1
                state.global_step += 1
                state.epoch = epoch + batches_done / self._batches_in_epoch
                self._place = {"epoch": epoch, "batches": batches_done}
                self._event("on_step_end")
                self._after()
                if self.control.should_epoch_stop:
                    is_cut = True
                    break
            if not steps_here and not batches_done and not self.control.should_training_stop:
                raise InputError(f"epoch {epoch} of the training data gave no batch.")
            epoch, batches_done = epoch + 1, 0
            self._place = {"epoch": epoch, "batches": 0}
            self.control.new_step()
            self._event("on_epoch_end")
            self._after()
            is_last = is_cut and epoch >= state.num_train_epochs  # steps that were cut off are not made up for
            if self.control.should_training_stop or state.global_step >= state.max_steps or is_last:
                return

    def _step(self, part: list[Batch]) -> None:
        """One step of the optimizer over the batches of `part`."""
        model, args = self.model_wrapped, self.args
        model.train()
        self._event("on_step_begin")
        inputs = [self._on_device(batch) for batch in part]
        weights, tokens = self._loss_weights(part, inputs)
        step_loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for number, (batch, weight) in enumerate(zip(inputs, weights, strict=True)):
            is_last = number == len(inputs) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)  # what DeepSpeed steps by
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                self._weight = weight
                step_loss += self.training_step(model, batch, tokens)
            if not is_last:
                self._event("on_substep_end")
        step_loss = self._reduced(step_loss.float(), "mean").double() if self._world > 1 else step_loss
        norm = self.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        norm = None if norm is None else whole(norm)
        if self._is_usable(step_loss, norm):
            self._event("on_pre_optimizer_step")
            self.optimizer.step()
            self._event("on_optimizer_step")
            self._rate = float(self.optimizer.param_groups[0]["lr"])
            is_skipped = getattr(self.optimizer, "step_was_skipped", False)
            if not is_skipped and not isinstance(self.lr_scheduler, ReduceLROnPlateau):
                self.lr_scheduler.step()
            self._loss_sum += step_loss.nan_to_num(0.0, 0.0, 0.0) if args.logging_nan_inf_filter else step_loss
        self._grad_norm = None if norm is None else float(norm)
        self.optimizer.zero_grad()
        self.state.num_input_tokens_seen += int(tokens) if tokens is not None else 0

    def _loss_weights(self, part: list[Batch], inputs: list[Any]) -> tuple[list[Any], Tensor | None]:
        """The share of each batch in the loss of a step, and the label tokens of the step in all processes.

        The gradients of the processes are averaged, so weights of this process count from its share of the whole.
        """
        labels = [batch.get(self.label_names[0]) for batch in inputs]
        counts: list[Any] = [label_tokens(one, is_shifted(self.model, one)) for one in labels]
        has_tokens = all(count is not None for count in counts)
        if not has_tokens:
            counts = [torch.tensor(batch.count, device=self.accelerator.device) for batch in part]
        own = [count * (batch.count > 0) for count, batch in zip(counts, part, strict=True)]
        everything = torch.stack(own).sum()
        world = self._world if self.args.average_tokens_across_devices else 1
        if world > 1:
            everything = self._reduced(everything, "sum")
        tokens = everything if has_tokens else None
        if self.compute_loss_func is not None:  # it divides by the tokens itself, where there are some
            share = float(world) if has_tokens else 1.0 / len(part)
            return [torch.tensor(share * (batch.count > 0)) for batch in part], tokens
        return [count * world / everything.clamp(min=1) for count in own], tokens

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Loss and gradients of one batch; returns the loss, weighted by its share of the step."""
        with self.accelerator.autocast():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # Where nothing counts the loss may be 0 / 0, which must not reach the others.
        weight = self._weight.to(loss.device)
        loss = torch.where(weight > 0, loss * weight, torch.zeros_like(loss))
        # The weights average the batches of a step already.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self._has_deepspeed else {}))
        return loss.detach()

    def _is_usable(self, loss: Tensor, norm: Tensor | None) -> bool:
        """False for a step to leave out.

        Raises:
            NumericalError: The loss or the norm of the gradients is not finite, and nan_policy says so.
        """
        if self.accelerator.scaler is not None or finite(loss, *([] if norm is None else [norm])):
            self._skipped = 0
            return True
        self._skipped += 1
        step = self.state.global_step + 1
        if self.args.nan_policy == "skip" and self._skipped <= _MOST_SKIPPED:
            logger.warning("step %d is left out: its loss is %s.", step, float(loss))
            return False
        bad = [
            name
            for name, value in self.model.named_parameters()
            if value.grad is not None and not finite(whole(value.grad))
        ]
        raise NumericalError(
            f"step {step}: the loss is {float(loss)} and the gradients of {len(bad)} weights are not finite"
            f"{f', the first of them {bad[0]}' if bad else ''}. Lower the learning rate or look at the data; "
            "nan_policy='skip' leaves such steps out."
        )

    # ------------------------------------------------------------------ between steps

    def _after(self) -> None:
        """Log, evaluate and save as asked for, and end the run if a signal has arrived."""
        if self.control.should_log and self.state.global_step > self._logged_step:
            self._log_training()
        metrics = self._evaluate_now() if self.control.should_evaluate else None
        is_better = self._note_best(metrics) if metrics else False
        if metrics and isinstance(self.lr_scheduler, ReduceLROnPlateau):
            self.lr_scheduler.step(metrics[self._metric_key() or "eval_loss"])
        if is_better and (self.args.save_strategy == "best" or self.args.load_best_model_at_end):
            self.control.should_save = True
        if self.control.should_save:
            self._save_checkpoint()
        self.control.new_step()
        stop = int(self._stop_signal or 0)
        if self._world > 1:  # one process that was told is enough
            stop = int(self._reduced(torch.tensor(stop, device=self.accelerator.device), "sum"))
        if stop:
            self._save_checkpoint()
            logger.warning("stopped by a signal after step %d; a checkpoint was saved.", self.state.global_step)
            self._close()
            raise SystemExit(130)

    def _log_training(self) -> None:
        steps = self.state.global_step - self._logged_step
        loss = float(self._loss_sum)
        self._loss_sum.zero_()
        self._total_loss += loss
        self._logged_step = self.state.global_step
        logs: dict[str, float] = {"loss": loss / steps}
        if self._grad_norm is not None:
            logs["grad_norm"] = self._grad_norm
        logs["learning_rate"] = self._rate
        self.log(logs)

    def _evaluate_now(self) -> dict[str, float]:
        datasets = self.eval_dataset
        if not isinstance(datasets, dict):
            return self.evaluate(ignore_keys=self._ignored_keys)
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            metrics.update(self.evaluate(dataset, self._ignored_keys, f"eval_{name}"))
        return metrics

    def _metric_key(self) -> str | None:
        name = self.args.metric_for_best_model
        return name if name is None or name.startswith("eval_") else f"eval_{name}"

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether these metrics are the best so far."""
        key = self._metric_key()
        if key is None:
            return False
        if key not in metrics:
            raise ConfigError(
                f"metric_for_best_model={self.args.metric_for_best_model!r}: the evaluation gave "
                f"{', '.join(sorted(metrics))}; name one of them."
            )
        value, best = metrics[key], self.state.best_metric
        is_better = best is None or (value > best if self.args.greater_is_better else value < best)
        if is_better:
            self.state.best_metric = value
            if self.args.save_strategy != "no":
                self.state.best_global_step = self.state.global_step
        return is_better

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Remember SIGINT and SIGTERM until the step is done; the second one works as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old: dict[int, Any] = {}

        def remember(number: int, frame: Any) -> None:
            self._stop_signal = number
            for one, handler in old.items():
                signal.signal(one, handler)

        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            old[number] = signal.signal(number, remember)
        try:
            yield
        finally:
            for one, handler in old.items():
                signal.signal(one, handler)
            self._stop_signal = None
