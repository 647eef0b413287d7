"""The Trainer's evaluation: loss, predictions and metrics over a dataset."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import ConfigError, InputError
from .data import GivenLoader
from .evaluation import (
    EvalLoopOutput,
    EvalPrediction,
    Kept,
    PredictionOutput,
    as_tensors,
    joined,
    mean_loss,
    merged,
    on_host,
)
from .foundation import Foundation
from .loss import IGNORE, is_shifted, label_tokens, smoothed_loss


class Evaluating(Foundation):
    """compute_loss(), evaluate() and predict()."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of a batch, and the model's outputs if asked for; override it for a loss of your own.

        Raises:
            InputError: The model gives no loss for these inputs.
        """
        smoothing = self.args.label_smoothing_factor
        labels = inputs.get(self.label_names[0])
        is_own_loss = self.compute_loss_func is None and not smoothing and not return_outputs
        only = {"loss_positions_only": True} if is_own_loss and labels is not None and self._can_skip_positions else {}
        outputs = model(**inputs, **only)
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif smoothing and labels is not None:
            loss = smoothed_loss(outputs["logits"], labels, smoothing, is_shifted(self.model, labels))
        else:
            loss = outputs[0] if isinstance(outputs, tuple) else outputs.get("loss")
        if loss is None:
            raise InputError(
                f"the model gave no loss for inputs {', '.join(sorted(inputs))}: the batch needs "
                f"{self.label_names[0]!r} (label_names names other keys)."
            )
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on a dataset; with a dict of datasets, of each under its name.

        Raises:
            ConfigError: There is no dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ConfigError("there is nothing to evaluate: pass eval_dataset to the Trainer or to evaluate().")
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        needed = self.compute_metrics is not None and not self.args.prediction_loss_only
        own = self._overrides("get_eval_dataloader")
        loader = GivenLoader(self.get_eval_dataloader(dataset)) if own else self._eval_loader(dataset)
        output = self._evaluation_loop(loader, keep=needed, ignore_keys=ignore_keys, prefix=metric_key_prefix)
        assert output.metrics is not None, "the loop always measures"
        self.log(output.metrics)
        self._event("on_evaluate", metrics=output.metrics)
        return output.metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predictions for a dataset, its labels, and metrics where it has labels."""
        own = self._overrides("get_test_dataloader")
        loader = GivenLoader(self.get_test_dataloader(test_dataset)) if own else self._eval_loader(test_dataset)
        output = self._evaluation_loop(loader, keep=True, ignore_keys=ignore_keys, prefix=metric_key_prefix)
        self._event("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def _evaluation_loop(
        self, loader: Any, *, keep: bool, ignore_keys: list[str] | None, prefix: str
    ) -> EvalLoopOutput:
        """Run the model over the batches of a dataset; predictions are kept only if somebody wants them."""
        args, started = self.args, time.time()
        model = self._model_for_evaluation()
        self.eval_loader = loader
        wants_inputs = keep and "inputs" in args.include_for_metrics
        kept, latest = Kept(), {}
        is_batched = keep and args.batch_eval_metrics and self.compute_metrics is not None
        for batch, is_last in _with_last(loader):
            inputs = self._on_device(batch)
            loss, logits, labels = self.prediction_step(model, inputs, not keep, ignore_keys)
            kept.counts.append(batch.count)
            kept.losses.append(None if loss is None else float(loss))
            if keep:
                if logits is not None and self.preprocess_logits_for_metrics is not None:
                    logits = self.preprocess_logits_for_metrics(logits, labels)
                kept.predictions.append(on_host(logits))
                kept.labels.append(on_host(labels))
            if wants_inputs:
                kept.inputs.append(on_host(inputs))
            if is_batched:
                latest = self._batch_metrics(kept, is_last)
                kept.predictions, kept.labels, kept.inputs = [], [], []
            self._event("on_prediction_step")
        return self._measured(kept, latest if is_batched else None, prefix, started)

    def _batch_metrics(self, kept: Kept, is_last: bool) -> dict[str, float]:
        """What compute_metrics says when it is called for every batch: it gets tensors then, and all inputs."""
        assert self.compute_metrics is not None, "asked for only with compute_metrics"
        newest = [
            Kept([k.losses[-1]], [k.counts[-1]], k.predictions, k.labels, k.inputs) for k in self._gather_objects(kept)
        ]
        whole_batch = merged(newest)
        found = self._prediction(whole_batch)
        parts = (found.predictions, found.label_ids, joined(whole_batch.inputs), found.losses)
        prediction = EvalPrediction(*map(as_tensors, parts))
        return self.compute_metrics(prediction, compute_result=is_last) or {}  # type: ignore[call-arg]

    def _prediction(self, kept: Kept) -> EvalPrediction:
        inputs = joined([_main_input(part) for part in kept.inputs]) if kept.inputs else None
        wants_losses = "loss" in self.args.include_for_metrics
        # Each sample has the loss of its batch.
        losses = np.repeat(np.asarray(kept.losses, float), kept.counts) if wants_losses else None
        return EvalPrediction(joined(kept.predictions, self._prediction_padding), joined(kept.labels), inputs, losses)

    @property
    def _prediction_padding(self) -> int:
        """What fills predictions of unequal length."""
        return IGNORE

    def _measured(
        self, kept: Kept, batch_metrics: dict[str, float] | None, prefix: str, started: float
    ) -> EvalLoopOutput:
        whole_run = merged(self._gather_objects(kept))
        samples, prediction = sum(whole_run.counts), self._prediction(whole_run)
        metrics: dict[str, Any] = dict(batch_metrics or {})
        is_complete = prediction.predictions is not None and prediction.label_ids is not None
        if batch_metrics is None and self.compute_metrics is not None and is_complete:
            answer = self.compute_metrics(prediction)
            if not isinstance(answer, Mapping):
                raise ConfigError(
                    f"compute_metrics returned a {type(answer).__name__}; a dict of numbers by name is needed, like "
                    "{'wer': 0.1}."
                )
            metrics = dict(answer)
        loss = mean_loss(whole_run)
        if loss is not None:
            metrics["loss"] = loss
        seconds = max(time.time() - started, 1e-9)
        metrics |= {
            "runtime": round(seconds, 4),
            "samples_per_second": round(samples / seconds, 3),
            "steps_per_second": round(len(kept.counts) / seconds, 3),
        }
        named = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": _plain(value)
            for name, value in metrics.items()
        }
        return EvalLoopOutput(prediction.predictions, prediction.label_ids, named, samples)

    @property
    def _can_skip_positions(self) -> bool:
        """Whether the model scores only what labels ask for, if told; how much that is would compile anew each time."""
        return "loss_positions_only" in self._forward_arguments() and not self.args.torch_compile

    def _model_for_evaluation(self) -> Any:
        model = self.model_wrapped
        if not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval):
            model.to(torch.bfloat16 if self.args.bf16_full_eval else torch.float16)
        if model is self.model:
            model.to(self.accelerator.device)
        model.eval()
        return model

    def _counted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The label tokens of a batch, for a loss function that may divide by them."""
        if self.compute_loss_func is None:
            return {}
        labels = inputs.get(self.label_names[0])
        return {"num_items_in_batch": label_tokens(labels, is_shifted(self.model, labels))}

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, logits, labels) of one batch; logits and labels are None with prediction_loss_only.

        Other outputs of the model, like states of the encoder, are not kept.
        """
        labels = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        with torch.no_grad(), self.accelerator.autocast():
            if labels:
                if prediction_loss_only:
                    return self.compute_loss(model, inputs, **self._counted(inputs)).detach().mean(), None, None
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True, **self._counted(inputs))
                loss = loss.detach().mean()
            else:
                loss, outputs = None, model(**inputs)
        if prediction_loss_only:
            return loss, None, None
        logits = outputs["logits"] if "logits" not in (ignore_keys or []) else None
        return loss, logits, labels[0] if len(labels) == 1 else labels or None


def _with_last(items: Any) -> Iterator[tuple[Any, bool]]:
    """Each item and whether it is the last one."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, Tensor)) and getattr(value, "ndim", 0) == 0 else value


def _main_input(inputs: dict[str, Any]) -> Any:
    for name in ("input_features", "input_ids", "pixel_values"):
        if name in inputs:
            return inputs[name]
    return next(iter(inputs.values()))
