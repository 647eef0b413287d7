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
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ConfigError, InputError, NumericalError
from .callbacks import TrainerControl
from .checkpoint import find_checkpoint, set_random_states, whole
from .data import Batch, batches_in, has_length
from .evaluating import Evaluating
from .foundation import set_seed
from .loss import finite, is_shifted, label_tokens
from .saving import Saving

logger = logging.getLogger("audiomm.training")

#: NaN steps in a row after which nan_policy="skip" gives up.
_MOST_SKIPPED = 10


class TrainOutput(tuple[int, float, dict[str, float]]):
    """(global_step, training_loss, metrics), also by name."""

    global_step = property(lambda self: self[0])
    training_loss = property(lambda self: self[1])
    metrics = property(lambda self: self[2])


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
            trial: Accepted for compatibility; hyper-parameter search is not part of this library.
            ignore_keys_for_eval: Output keys that evaluation during training leaves out.
            allow_change: Facts that may differ from the checkpoint's run ("samples", "samples_per_step", "seed",
                "train_sampling_strategy"); resuming is then no longer exact.

        Raises:
            ConfigError: There are no data or no end of the run.
            ResumeError: The checkpoint belongs to a run with other data.
            NumericalError: The loss or a gradient is NaN or infinite (see nan_policy).
            SaveError: A checkpoint could not be written.
        """
        if self.train_dataset is None:
            raise ConfigError("Trainer.train needs a train_dataset.")
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        if self.model_init is not None:
            set_seed(self.args.seed)
            self.model = self.model_init()
        if not self.args.auto_find_batch_size:
            return self._train(checkpoint, allow_change)
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

        def attempt(batch_size: int) -> TrainOutput:
            self._batch_size = batch_size
            self.optimizer = self.lr_scheduler = None
            self.model.load_state_dict(weights)
            return self._train(checkpoint, allow_change)

        result: TrainOutput = self._halving_batches(attempt)
        return result

    def _plan(self) -> tuple[int, int | None]:
        """(optimizer steps of the run, steps of an epoch or None for a stream)."""
        args = self.args
        if not has_length(self.train_dataset):
            if args.max_steps <= 0:
                raise ConfigError("the training data have no length, so max_steps must say when to end.")
            return args.max_steps, None
        size = self._batch_size * self._world
        batches = batches_in(len(self.train_dataset), size, args.dataloader_drop_last)
        if batches == 0:
            raise ConfigError(
                f"{len(self.train_dataset)} training samples do not fill one batch of {size}: use smaller batches or "
                "dataloader_drop_last=False."
            )
        in_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * in_epoch)), in_epoch

    def _train(self, checkpoint: Path | None, allow_change: tuple[str, ...]) -> TrainOutput:
        args = self.args
        total, in_epoch = self._plan()
        if checkpoint is not None:  # before the weights are spread over processes
            self._load_weights(checkpoint)
        self._prepare(total)
        place = {"epoch": 0, "batches": 0, "logged_step": 0}
        self._loss_sum.zero_()
        self._total_loss, self._random_states = 0.0, None
        if checkpoint is not None:
            place = self._restore(checkpoint, allow_change)
        state = self.state
        state.max_steps, state.train_batch_size = total, self._batch_size
        state.num_train_epochs = math.ceil(total / in_epoch) if in_epoch else sys.maxsize
        state.logging_steps = args.every(args.logging_steps, total)
        state.eval_steps = args.every(args.eval_steps, total)
        state.save_steps = args.every(args.save_steps, total)
        self.control = TrainerControl()
        self._fingerprint = self._facts()
        started, first_step = time.time(), state.global_step
        if args.report_to:
            self.accelerator.init_trackers(
                args.run_name or args.project, {k: str(v) for k, v in args.to_dict().items() if v is not None}
            )
        self._logged_step = place["logged_step"]
        if state.global_step < total:
            with self._catching_signals():
                self._event("on_train_begin")
                if args.eval_on_start and checkpoint is None:
                    self._evaluate_now()
                if self._random_states is not None:
                    set_random_states(self._random_states)
                self._epochs(place["epoch"], place["batches"], in_epoch)
        self._finish_best()
        seconds = time.time() - started
        steps = state.global_step - first_step
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_steps_per_second": round(steps / max(seconds, 1e-9), 4),
            "train_samples_per_second": round(steps * self._samples_per_step / max(seconds, 1e-9), 4),
            "train_loss": self._total_loss / max(state.global_step, 1),
            "epoch": state.epoch,
        }
        self.log(dict(metrics))
        self._event("on_train_end")
        if args.report_to:
            self.accelerator.end_training()
        if args.push_to_hub:
            self.push_to_hub()
        return TrainOutput((state.global_step, metrics["train_loss"], metrics))

    def _epochs(self, epoch: int, batches_done: int, in_epoch: int | None) -> None:
        args, state, control = self.args, self.state, self.control
        while True:
            self._event("on_epoch_begin")
            batches = iter(self._train_loader(epoch, batches_done))
            steps_here = 0
            while not control.should_training_stop:
                part: list[Batch] = list(islice(batches, args.gradient_accumulation_steps))
                if not part:
                    break
                control.new_step()
                self._step(part)
                batches_done += len(part)
                steps_here += 1
                state.global_step += 1
                done = math.ceil(batches_done / args.gradient_accumulation_steps)
                state.epoch = epoch + done / in_epoch if in_epoch else state.global_step / state.max_steps
                self._place = {"epoch": epoch, "batches": batches_done}
                control = self._event("on_step_end")
                self._after(control)
                if control.should_epoch_stop:
                    break
            if not steps_here and not batches_done:
                raise InputError(f"epoch {epoch} of the training data gave no batch.")
            epoch, batches_done = epoch + 1, 0
            self._place = {"epoch": epoch, "batches": 0}
            control.should_epoch_stop = False
            control.new_step()
            control = self._event("on_epoch_end")
            self._after(control)
            if control.should_training_stop or state.global_step >= state.max_steps:
                return

    def _step(self, part: list[Batch]) -> None:
        """One step of the optimizer over the batches of `part`."""
        model, args = self.model_wrapped, self.args
        model.train()
        self._event("on_step_begin")
        inputs = [self._on_device(batch.inputs) for batch in part]
        weights, tokens = self._loss_weights(part, inputs)
        step_loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for number, (batch, weight) in enumerate(zip(inputs, weights, strict=True)):
            is_last = number == len(inputs) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                step_loss += self.training_step(model, batch, tokens, weight)
            if not is_last:
                self._event("on_substep_end")
        step_loss = self._reduced(step_loss.float(), "mean").double() if self._world > 1 else step_loss
        norm = None
        if args.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            norm = None if norm is None else whole(norm)
        if self._is_usable(step_loss, norm):
            self._event("on_pre_optimizer_step")
            self.optimizer.step()
            self._event("on_optimizer_step")
            if not getattr(self.optimizer, "step_was_skipped", False):
                self.lr_scheduler.step()
            self._loss_sum += step_loss
        self._grad_norm = None if norm is None else float(norm)
        self.optimizer.zero_grad()
        self.state.num_input_tokens_seen += int(tokens) if tokens is not None else 0

    def _loss_weights(self, part: list[Batch], inputs: list[Any]) -> tuple[list[Any], Tensor | None]:
        """The share of each batch in the loss of a step, and the label tokens of the step in all processes.

        The gradients of the processes are averaged, so weights of this process count from its share of the whole.
        """
        labels = [batch.get(self.label_names[0]) for batch in inputs]
        counts: list[Any] = [label_tokens(one, is_shifted(self.model, one)) for one in labels]
        if any(count is None for count in counts):
            counts = [torch.tensor(batch.count, device=self.accelerator.device) for batch in part]
            tokens = None
        else:
            tokens = torch.stack(counts).sum()
        own = [count * (batch.count > 0) for count, batch in zip(counts, part, strict=True)]
        if not self.args.average_tokens_across_devices:
            return [1.0 / len(part) if batch.count else 0.0 for batch in part], tokens
        everything = torch.stack(own).sum()
        everything = self._reduced(everything, "sum")
        tokens = everything if tokens is not None else None
        return [count * self._world / everything.clamp(min=1) for count in own], tokens

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None, weight: Any = 1.0
    ) -> Tensor:
        """Loss and gradients of one batch; returns the weighted loss."""
        with self.accelerator.autocast():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.compute_loss_func is None:
            loss = loss * weight
        self.accelerator.backward(loss)
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

    def _after(self, control: TrainerControl) -> None:
        """Log, evaluate and save as asked for, and end the run if a signal has arrived."""
        if control.should_log and self.state.global_step > self._logged_step:
            self._log_training()
        metrics = self._evaluate_now() if control.should_evaluate else None
        is_better = self._note_best(metrics) if metrics else False
        if control.should_save or (is_better and self.args.save_strategy == "best"):
            self._save_checkpoint()
        control.should_log = control.should_evaluate = control.should_save = False
        stop = self._stop_signal
        if self._world > 1:
            stop = max((one or 0) for one in self._gather_objects(stop)) or None
        if stop is not None:
            self._save_checkpoint()
            logger.warning("stopped by signal %d after step %d; a checkpoint was saved.", stop, self.state.global_step)
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
        logs["learning_rate"] = float(self.lr_scheduler.get_last_lr()[0])
        self.log(logs)

    def _evaluate_now(self) -> dict[str, float]:
        datasets = self.eval_dataset
        if not isinstance(datasets, dict):
            return self.evaluate()
        metrics: dict[str, float] = {}
        for name, dataset in datasets.items():
            metrics.update(self.evaluate(dataset, metric_key_prefix=f"eval_{name}"))
        return metrics

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether these metrics are the best so far."""
        name = self.args.metric_for_best_model
        if name is None:
            return False
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            raise ConfigError(
                f"metric_for_best_model={name!r}: the evaluation gave {', '.join(sorted(metrics))}; name one of them."
            )
        value, best = metrics[key], self.state.best_metric
        is_better = best is None or (value > best if self.args.greater_is_better else value < best)
        if is_better:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.state.best_model_checkpoint = str(self._checkpoint_path())
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
