"""What happens around a training run: sixteen events, the state they see, and the callbacks that come with the Trainer.

The names are those of transformers: a callback gets (args, state, control, **more) and may set flags of `control`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..base.errors import ConfigError
from ..base.hub import atomic_write, read_json, write_json
from .arguments import TrainingArguments

logger = logging.getLogger("audiomm.training")


@dataclass
class TrainerState:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        epoch: Passes over the data so far, with the fraction of the current one.
        global_step: Optimizer steps so far.
        max_steps, num_train_epochs: Where the run ends.
        logging_steps, eval_steps, save_steps: Intervals in steps.
        train_batch_size: Samples a process takes at once.
        num_input_tokens_seen: Label tokens learnt from.
        total_flos: Floating point operations; not counted.
        log_history: Everything that was logged.
        best_metric, best_global_step, best_model_checkpoint: The best evaluation so far.
        is_local_process_zero, is_world_process_zero: Who this process is.
        stateful_callbacks: State of callbacks that have some.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        write_json(json_path, dataclasses.asdict(self))

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        known = {one.name for one in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in read_json(json_path).items() if name in known})


@dataclass
class TrainerControl:
    """What callbacks ask for; the Trainer reads it after every event."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def new_step(self) -> None:
        self.should_save = self.should_evaluate = self.should_log = False


class TrainerCallback:
    """Base of callbacks; override the events of interest. A returned control takes the place of the old one."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any: ...


EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))

#: Events that answer a flag, which callbacks then see taken back.
_ANSWERED = {"on_log": "should_log", "on_evaluate": "should_evaluate", "on_save": "should_save"}


class CallbackHandler:
    """Calls every callback, in order."""

    def __init__(self, callbacks: Iterable[TrainerCallback | type[TrainerCallback]]) -> None:
        self.callbacks: list[TrainerCallback] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        for index, one in enumerate(self.callbacks):
            if one is callback or (isinstance(callback, type) and type(one) is callback):
                return self.callbacks.pop(index)
        return None

    def call(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        if event in _ANSWERED:
            setattr(control, _ANSWERED[event], False)
        for callback in self.callbacks:
            control = getattr(callback, event)(args, state, control, **more) or control
        return control


class DefaultFlowCallback(TrainerCallback):
    """Asks for logs, evaluations and checkpoints when the arguments say so."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step

        def due(strategy: str, interval: int) -> bool:
            return strategy == "steps" and interval > 0 and step % interval == 0

        if due(args.logging_strategy, state.logging_steps) or (step == 1 and args.logging_first_step):
            control.should_log = True
        if due(args.eval_strategy, state.eval_steps) and step >= args.eval_delay:
            control.should_evaluate = True
        if due(args.save_strategy, state.save_steps):
            control.should_save = True
        if step >= state.max_steps:
            control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy == "steps" and step >= args.eval_delay
            control.should_save = control.should_save or args.save_strategy == "steps"
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or args.logging_strategy == "epoch"
        if args.eval_strategy == "epoch" and state.epoch >= args.eval_delay:
            control.should_evaluate = True
        control.should_save = control.should_save or args.save_strategy == "epoch"
        return control


class ProgressCallback(TrainerCallback):
    """A progress bar on stderr, with the last logs beside it."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, file=sys.stderr, unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None:
            shown = {name: f"{value:.4g}" for name, value in (logs or {}).items() if isinstance(value, float)}
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLinesCallback(TrainerCallback):
    """Appends every log to `log.jsonl` in the output folder, one object a line; `audiomm plot` reads it."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drop lines that a run wrote after the checkpoint it is resumed from."""
        path = Path(args.output_dir) / "log.jsonl"
        if not state.is_world_process_zero or not path.exists():
            return
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= state.global_step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if state.global_step), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        if state.is_world_process_zero:
            line = json.dumps({"step": state.global_step, "time": round(time.time(), 3), **(logs or {})}, default=str)
            with open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _step_of(line: str) -> float:
    """The step of a log line; infinite for a line that was torn when a run was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class EarlyStoppingCallback(TrainerCallback):
    """Ends the run when `metric_for_best_model` has not become better for a while.

    Args:
        early_stopping_patience: Evaluations to wait.
        early_stopping_threshold: Better than the best so far by more than this counts.

    Raises:
        ConfigError: At the start of a run without evaluations or without a metric.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"early_stopping_patience_counter": self.early_stopping_patience_counter}

    def load_state(self, state: dict[str, Any]) -> None:
        self.early_stopping_patience_counter = int(state.get("early_stopping_patience_counter", 0))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.metric_for_best_model is None or args.eval_strategy == "no":
            raise ConfigError(
                "EarlyStoppingCallback needs metric_for_best_model and an eval_strategy of 'steps' or 'epoch'; got "
                f"metric_for_best_model={args.metric_for_best_model!r} and eval_strategy={args.eval_strategy!r}."
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        name = str(args.metric_for_best_model)
        value = (metrics or {}).get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:
            logger.warning("EarlyStoppingCallback: the evaluation gave no %s.", name)
            return control
        best = state.best_metric  # of the evaluations before this one
        gain = math.inf if best is None else (value - best) * (1 if args.greater_is_better else -1)
        is_better = gain > self.early_stopping_threshold
        self.early_stopping_patience_counter = 0 if is_better else self.early_stopping_patience_counter + 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
        return control
