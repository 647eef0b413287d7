"""What a run of our Trainer and of the reference's goes through: orders, dropout, events, schedules, early ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-4
START = 101
#: What audiomm does not log, or logs otherwise on purpose.
IGNORED = ("runtime", "per_second", "total_flos", "preparation_time")


class Noise(torch.utils.data.Dataset):
    """Samples drawn by their number; what stands before the labels is there too, for losses without labels."""

    def __init__(self, samples: int = 37) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 99, (9,), generator=generator)
        before = torch.cat((torch.tensor([START]), labels[:-1]))
        labels[3 + index % 6 :] = -100
        features = torch.randn(8, 60, generator=generator)
        return {"input_features": features, "labels": labels, "decoder_input_ids": before}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return (Noise()[index] for index in range(37))


@pytest.fixture
def course(reference: Any, reference_model: Any, tmp_path: Path, capsys: Any) -> Any:
    """Trains the same model in both packages; gives both trainers, and the events each of them called."""

    def run(
        options: dict[str, Any], *, flags: Any = (), seed: int = 3, model: dict[str, Any] | None = None, **given: Any
    ) -> Any:
        kind = "WhisperForConditionalGeneration"
        reference_model(kind, seed=seed, **(model or {})).save_pretrained(tmp_path / "model")
        results = []
        for package in (reference, audiomm):
            arguments = package.TrainingArguments(
                output_dir=str(tmp_path / package.__name__), use_cpu=True, report_to="none", disable_tqdm=True,
                **{"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2, "save_strategy": "no",
                   **options},
            )  # fmt: skip
            events: list[Any] = []
            trainer = package.Trainer(
                model=getattr(package, kind).from_pretrained(tmp_path / "model"), args=arguments,
                **{"train_dataset": Noise(), "callbacks": [watcher(package, events, dict(flags))],
                   **{name: value(package) if name == "callbacks" else value for name, value in given.items()}},
            )  # fmt: skip
            trainer.train()
            capsys.readouterr()
            results.append((trainer, events))
        return results

    return run


def watcher(package: Any, events: list[Any], flags: dict[tuple[str, int], str]) -> Any:
    """A callback that notes every event with the flags it sees, and sets those it is told to."""

    def noting(name: str) -> Any:
        def on_event(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            wanted = ("log", "evaluate", "save", "training_stop", "epoch_stop")
            seen = tuple(getattr(control, f"should_{flag}") for flag in wanted)
            events.append((name, state.global_step, round(float(state.epoch or 0), 6), *seen))
            if (name, state.global_step) in flags:
                setattr(control, flags[name, state.global_step], True)

        return on_event

    names = [name for name in dir(package.TrainerCallback) if name.startswith("on_")]
    return type("Watcher", (package.TrainerCallback,), {name: noting(name) for name in names})()


def same_logs(theirs: Any, ours: Any) -> None:
    logs = [
        [{name: value for name, value in entry.items() if not any(word in name for word in IGNORED)} for entry in log]
        for log in (theirs.state.log_history, ours.state.log_history)
    ]
    assert len(logs[0]) == len(logs[1])
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys(), (one, other)
        for name, value in one.items():
            assert abs(value - other[name]) <= CLOSE * max(abs(value), 1e-3), (name, one, other)
    final = dict(ours.model.named_parameters())
    for name, value in theirs.model.named_parameters():
        assert float((value - final[name]).norm() / value.norm()) < CLOSE, name


DROPOUT = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.1}


@pytest.mark.parametrize(
    ("options", "model", "given"),
    [
        ({"max_steps": 13}, {}, {}),
        ({"num_train_epochs": 2, "seed": 7}, {}, {}),
        ({"max_steps": 12, "data_seed": 3, "dataloader_drop_last": True}, {}, {}),
        ({"max_steps": 13, "eval_strategy": "steps", "eval_steps": 3}, DROPOUT, {"eval_dataset": Noise(16)}),
        ({"max_steps": 12}, {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}, {}),
        ({"max_steps": 12, "neftune_noise_alpha": 5.0}, {}, {}),
        ({"max_steps": 12}, DROPOUT, {"train_dataset": Stream()}),
    ],
)
def test_random_orders_and_dropout_are_the_same(
    options: dict[str, Any], model: dict[str, Any], given: dict[str, Any], course: Any
) -> None:
    (theirs, _), (ours, _) = course(options, model=model, **given)
    same_logs(theirs, ours)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"max_steps": 7, "eval_strategy": "steps", "eval_steps": 0.3, "save_strategy": "steps", "save_steps": 3}, {}),
        ({"num_train_epochs": 1.5, "eval_strategy": "epoch", "logging_strategy": "epoch",
          "save_strategy": "epoch"}, {}),
        ({"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5, "logging_first_step": True}, {}),
        ({"max_steps": 25, "logging_steps": 0.1}, {}),
        ({"num_train_epochs": 3}, {("on_step_end", 5): "should_epoch_stop"}),
        ({"max_steps": 9}, {("on_step_end", 5): "should_training_stop"}),
        ({"max_steps": 6}, {("on_step_end", 3): "should_evaluate", ("on_step_begin", 3): "should_log",
                            ("on_log", 2): "should_save", ("on_epoch_begin", 0): "should_log"}),
    ],
)  # fmt: skip
def test_events_and_flags_are_the_same(options: dict[str, Any], flags: dict[Any, str], course: Any) -> None:
    (theirs, expected), (ours, found) = course(options, flags=flags.items(), eval_dataset=Noise(16))
    assert found == expected
    same_logs(theirs, ours)
    for name in ("epoch", "global_step", "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"):
        assert getattr(ours.state, name) == getattr(theirs.state, name), name


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("patience", [1, 2])
def test_runs_end_early_at_the_same_step(threshold: float, patience: int, course: Any) -> None:
    values = [1.0, 0.99, 0.9, 0.95, 0.85, 0.84, 0.83, 0.5, 0.51, 0.52]
    left: list[float] = []

    def measure(prediction: Any) -> dict[str, float]:
        if not left:
            left.extend(values)
        return {"m": left.pop(0)}

    def callbacks(package: Any) -> list[Any]:
        left.clear()
        return [package.EarlyStoppingCallback(patience, threshold)]

    options = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "m",
               "greater_is_better": False}  # fmt: skip
    (theirs, _), (ours, _) = course(
        options, eval_dataset=Noise(4), compute_metrics=measure, callbacks=callbacks
    )  # fmt: skip
    assert (ours.state.global_step, ours.state.best_metric) == (theirs.state.global_step, theirs.state.best_metric)
    assert ours.state.best_global_step == theirs.state.best_global_step


@pytest.mark.parametrize("accumulated", [1, 3])
def test_loss_functions_are_told_the_same_counts(accumulated: int, course: Any) -> None:
    told: list[int] = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        told.append(int(num_items_in_batch))
        scores = outputs["logits"].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(scores, labels.flatten(), ignore_index=-100, reduction="sum")
        return total / num_items_in_batch

    options = {"num_train_epochs": 1, "gradient_accumulation_steps": accumulated, "eval_strategy": "epoch"}
    (theirs, _), (ours, _) = course(options, eval_dataset=Noise(16), compute_loss_func=loss)
    half = len(told) // 2
    assert told[:half] == told[half:]
    same_logs(theirs, ours)


def test_a_rate_falls_at_the_same_plateau(course: Any) -> None:
    options = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5},
    }  # fmt: skip
    (theirs, _), (ours, _) = course(options, eval_dataset=Noise(16))
    same_logs(theirs, ours)


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("cosine", {}), ("cosine", {"num_cycles": 1.5}), ("cosine_with_restarts", {"num_cycles": 2.5}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}), ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}), ("polynomial", {"lr_end": 1e-5, "power": 0.5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5}), ("constant", {}),
    ("constant_with_warmup", {}), ("inverse_sqrt", {}), ("inverse_sqrt", {"timescale": 50}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 6, "min_lr_ratio": 0.1, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 3, "num_cycles": 1.0,
                             "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 6, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3, 0.1, 0.33])
def test_schedules_give_the_same_rates(name: str, options: dict[str, Any], warmup: float, reference: Any) -> None:
    from audiomm.training.optim import build_schedule

    for total in (7, 20, 25):
        rates = []
        for package in (reference, audiomm):
            arguments = package.TrainingArguments(
                "unused", lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=warmup, learning_rate=3e-4
            )
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
            if package is audiomm:
                schedule = build_schedule(optimizer, arguments, total)
            else:
                steps = arguments.get_warmup_steps(total)
                schedule = reference.get_scheduler(name, optimizer, steps, total, dict(options))
            rates.append([])
            for _ in range(total):
                rates[-1].append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
        assert rates[1] == pytest.approx(rates[0], rel=1e-9, abs=1e-15)
