"""Checkpoints: runs go on exactly, torn folders are passed over, and a full disk or a signal costs nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import audiomm
from audiomm.base.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveError
from audiomm.training import checkpoint

#: Everything random at once: dropout, noise in the samples, batches that end within an epoch.
WILD: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "dropout": 0.1,
    "save_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}


def names(folder: str | Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


@pytest.fixture
def wild_run(make_trainer: Any, tones: Any) -> Any:
    def make(folder: str, **options: Any) -> audiomm.Trainer:
        given = {"train_dataset": tones(20, noise=True), "callbacks": [Noisy()], **WILD, "save_steps": 3, **options}
        return make_trainer(folder, **given)

    return make


class Noisy(audiomm.TrainerCallback):
    """Draws from every generator at every step, as user code may."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        import random

        self.drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    step: int, wild_run: Any, same_weights: Any, losses: Any
) -> None:
    """20 samples in steps of 6: steps 4 and 8 end an epoch, with fewer samples."""
    whole = wild_run("whole", save_steps=step)
    expected = whole.train()
    folder = Path(whole.args.output_dir)
    copied = folder.parent / "resumed"
    copied.mkdir()
    shutil.copytree(folder / f"checkpoint-{step}", copied / f"checkpoint-{step}")
    torch.rand(7)
    resumed = wild_run("resumed", save_steps=step)
    result = resumed.train(resume_from_checkpoint=True)
    assert same_weights(whole.model, resumed.model)
    assert losses(resumed) == losses(whole)
    assert result.training_loss == expected.training_loss
    noise = [run.callback_handler.pop(Noisy).drawn for run in (whole, resumed)]
    assert noise[0] == noise[1], "every random state goes on"
    mine, theirs = (checkpoint.load_nested(path / "checkpoint-9", "training") for path in (folder, copied))
    assert str(mine["optimizer"]) == str(theirs["optimizer"])
    assert {**mine, "optimizer": 0} == {**theirs, "optimizer": 0}


def test_a_run_interrupted_in_every_way_of_reading_data_goes_on_exactly(
    wild_run: Any, tones: Any, same_weights: Any
) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            data = tones(20, noise=True)
            return (data[index] for index in torch.randperm(20).tolist())

    cases: list[dict[str, Any]] = [
        {"train_dataset": Stream()},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 2},
    ]
    for number, options in enumerate(cases):
        whole = wild_run(f"whole{number}", **options)
        whole.train()
        half = Path(whole.args.output_dir) / "checkpoint-3"
        resumed = wild_run(f"resumed{number}", **options)
        resumed.train(resume_from_checkpoint=str(half))
        assert same_weights(whole.model, resumed.model), options


def test_the_same_step_in_other_batches_goes_on_at_the_same_sample(wild_run: Any, tones: Any) -> None:
    first = wild_run("first", max_steps=3)
    first.train()
    data = tones(20)
    again = wild_run("again", per_device_train_batch_size=2, gradient_accumulation_steps=3, train_dataset=data)
    again.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-3"))
    untouched = set(range(20)) - set(first.train_dataset.read)
    assert set(data.read[:2]) == untouched, "the two samples that are left of the epoch come first"


def test_random_states_of_samples_do_not_depend_on_workers(make_trainer: Any, tones: Any, losses: Any) -> None:
    runs = []
    for workers in (0, 2):
        data = tones(20, noise=True)
        runs.append(make_trainer(f"{workers}", train_dataset=data, dataloader_num_workers=workers, max_steps=5))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("samples", {"samples": 21}),
        ("samples_per_step", {"gradient_accumulation_steps": 1}),
        ("seed", {"seed": 43}),
        ("data_seed", {"data_seed": 1}),
        ("train_sampling_strategy", {"train_sampling_strategy": "sequential"}),
        ("learning_rate", {"learning_rate": 1e-3}),
        ("lr_scheduler_type", {"lr_scheduler_type": "linear"}),
        ("optim", {"optim": "sgd"}),
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
    ],
)
def test_a_run_that_would_not_go_on_as_it_began_is_refused_with_the_field(
    field: str, options: dict[str, Any], make_trainer: Any, tones: Any, tmp_path: Path
) -> None:
    make_trainer("run", **{**WILD, "max_steps": 1}).train()
    samples = options.pop("samples", 20)
    other = make_trainer("run", train_dataset=tones(samples), **{**WILD, "max_steps": 2, **options})
    with pytest.raises(audiomm.ResumeError, match=rf"^{field} is .* was .* allow_change=\('{field}',\)"):
        other.train(resume_from_checkpoint=True)
    if field == "learning_rate":
        again = make_trainer("run", train_dataset=tones(samples), **{**WILD, "max_steps": 2, **options})
        again.train(resume_from_checkpoint=True, allow_change=(field,))
        assert again.state.log_history[-2]["learning_rate"] <= 1e-3, "the new rate holds"


def test_more_steps_are_no_change(wild_run: Any) -> None:
    wild_run("run", max_steps=3).train()
    longer = wild_run("run", max_steps=5)
    assert longer.train(resume_from_checkpoint=True).global_step == 5


def test_other_weights_are_refused(wild_run: Any, make_model: Any) -> None:
    wild_run("run", max_steps=3).train()
    with pytest.raises(audiomm.ResumeError, match="holds another model"):
        wild_run("run", model=make_model(decoder_layers=2)).train(resume_from_checkpoint=True)
    frozen = make_model()
    frozen.freeze_encoder()
    with pytest.raises(audiomm.ResumeError, match="trained in the checkpoint or in this run but not in both"):
        wild_run("run", model=frozen).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_not_there_or_only_a_model_is_refused(wild_run: Any, tmp_path: Path) -> None:
    trainer = wild_run("run", max_steps=3, save_only_model=True)
    with pytest.raises(CheckpointNotFoundError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointNotFoundError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    trainer.train()
    with pytest.raises(audiomm.ResumeError, match="save_only_model=True: it holds no optimizer"):
        wild_run("run").train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------------ torn folders


@pytest.mark.parametrize("damage", ["short", "missing", "changed", "unsealed"])
def test_a_torn_newest_checkpoint_is_passed_over_and_named(damage: str, wild_run: Any, caplog: Any) -> None:
    trainer = wild_run("run", max_steps=6)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-6"
    if damage == "short":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        (folder / "training.safetensors").unlink()
    elif damage == "changed":
        state = bytearray((folder / "training.safetensors").read_bytes())
        state[-1] ^= 1
        (folder / "training.safetensors").write_bytes(state)
    else:
        (folder / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "audiomm.training"):
        assert audiomm.get_last_checkpoint(trainer.args.output_dir) == str(folder.parent / "checkpoint-3")
    said = {
        "short": "model.safetensors has",
        "missing": "training.safetensors is missing",
        "changed": "training.safetensors is not what was written: its SHA-256 has changed",
        "unsealed": "it has no manifest.json",
    }
    assert f"checkpoint-6 is passed over: {said[damage]}" in caplog.text
    with pytest.raises(CorruptCheckpointError, match="is not a complete checkpoint"):
        wild_run("run").train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("place", ["_save_model", "save_nested", "random_states", "seal", "Path.rename"])
def test_a_run_that_dies_while_saving_leaves_the_older_checkpoint(place: str, wild_run: Any, monkeypatch: Any) -> None:
    """The process ends without any cleaning up at each of the stages in turn."""
    from audiomm.training import saving

    class Died(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise Died

    trainer = wild_run("run", max_steps=3)
    trainer.train()
    whole = wild_run("whole", max_steps=6)
    whole.train()
    interrupted = wild_run("run", max_steps=6)
    with monkeypatch.context() as patch:
        if place == "Path.rename":
            rename = Path.rename

            def final(path: Path, target: Any) -> Any:
                return (die if path.name == ".partial-checkpoint-6" else rename)(path, target)

            patch.setattr(Path, "rename", final)
        elif place == "seal":
            patch.setattr(checkpoint, "seal", die)
        else:
            patch.setattr(interrupted if place == "_save_model" else saving, place, die)
        with pytest.raises(Died):
            interrupted.train(resume_from_checkpoint=True)
    assert names(trainer.args.output_dir) == ["checkpoint-3"]
    resumed = wild_run("run", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert names(trainer.args.output_dir) == ["checkpoint-3", "checkpoint-6"]
    assert not list(Path(trainer.args.output_dir).glob(".partial*")), "litter is taken away"
    mine, theirs = (dict(run.model.named_parameters()) for run in (whole, resumed))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_limits_spare_the_best_and_the_newest(make_trainer: Any, tones: Any) -> None:
    scores = iter([0.2, 0.1, 0.3, 0.4, 0.5])
    trainer = make_trainer(
        compute_metrics=lambda prediction: {"wer": next(scores)}, eval_dataset=tones(2), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, save_total_limit=2, metric_for_best_model="wer",
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert names(trainer.args.output_dir) == ["checkpoint-4", "checkpoint-10"]


def test_checkpoints_of_an_earlier_longer_run_do_not_push_new_ones_out(wild_run: Any, caplog: Any) -> None:
    wild_run("run", max_steps=9, save_total_limit=1).train()
    again = wild_run("run", max_steps=6, save_total_limit=1)
    with caplog.at_level(logging.WARNING, "audiomm.training"):
        again.train()
    assert "holds checkpoint-9 of an earlier run, and this one starts anew" in caplog.text
    assert names(again.args.output_dir) == ["checkpoint-6", "checkpoint-9"]


def test_the_log_of_a_resumed_run_has_every_step_once(wild_run: Any) -> None:
    trainer = wild_run("run", max_steps=5)
    trainer.train()
    path = Path(trainer.args.output_dir) / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "los', encoding="utf-8")
    wild_run("run", max_steps=6).train(resume_from_checkpoint=str(path.parent / "checkpoint-3"))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_callbacks_get_their_state_back(make_trainer: Any, tones: Any) -> None:
    options = {
        "compute_metrics": lambda prediction: {"wer": 0.5}, "eval_dataset": tones(2), "eval_strategy": "steps",
        "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "wer",
        "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    make_trainer(callbacks=[audiomm.EarlyStoppingCallback(10)], max_steps=4, **options).train()
    stopper = audiomm.EarlyStoppingCallback(2)
    resumed = make_trainer(callbacks=[stopper], **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6, "one bad evaluation before, one after"


# --------------------------------------------------------------------------------------------- disks, signals, kills

CHILD = """
import sys, torch, audiomm
sys.path.insert(0, {tests!r})
from training_child import make_trainer
trainer = make_trainer({folder!r}, {options!r})
{before}
trainer.train(resume_from_checkpoint={resume!r})
"""


def child(folder: Path, tmp_path: Path, *, resume: bool = False, before: str = "", **options: Any) -> Any:
    """A training run in a process of its own."""
    (tmp_path / "training_child.py").write_text((Path(__file__).parent / "child.py").read_text(), encoding="utf-8")
    code = CHILD.format(tests=str(tmp_path), folder=str(folder), options=options, before=before, resume=resume)
    source = str(Path(audiomm.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    limit = """
import resource, signal
class Full(audiomm.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
trainer.add_callback(Full)
"""
    process = child(folder, tmp_path, before=limit, max_steps=4, save_steps=2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "SaveError" in said
    assert "earlier checkpoints are unchanged" in said
    assert names(folder) == ["checkpoint-2"]
    assert checkpoint.fault(folder / "checkpoint-2") is None
    assert not list(folder.glob(".partial*"))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(wild_run: Any, monkeypatch: Any) -> None:
    trainer = wild_run("run", max_steps=6)
    weights = sum(value.numel() for value in trainer.model.state_dict().values()) * 4

    class Fill(audiomm.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * weights))
                monkeypatch.setattr(checkpoint, "save_nested", None)

    trainer.add_callback(Fill)
    with pytest.raises(SaveError, match=r"[\d,]+ bytes are needed and [\d,]+ are free on its disk"):
        trainer.train()
    assert names(trainer.args.output_dir) == ["checkpoint-3"]
    assert checkpoint.fault(Path(trainer.args.output_dir) / "checkpoint-3") is None


def test_an_error_of_the_disk_names_the_checkpoint(wild_run: Any, monkeypatch: Any) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    trainer = wild_run("run", max_steps=3)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError, match="checkpoint-3 could not be written"):
        trainer.train()
    assert names(trainer.args.output_dir) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_exits_with_130(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    send = f"""
import os
class Interrupt(audiomm.TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), {int(number)})
    def on_train_end(self, *args, **kwargs):
        print("closed", flush=True)
trainer.add_callback(Interrupt)
"""
    process = child(folder, tmp_path, before=send, max_steps=9, save_steps=100)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == "closed\n"
    assert names(folder) == ["checkpoint-3"]
    assert checkpoint.fault(folder / "checkpoint-3") is None


def test_a_second_signal_ends_the_run_at_once(make_trainer: Any) -> None:
    class Twice(audiomm.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background with SIGINT ignored, the tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trainer = make_trainer(callbacks=[Twice])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert names(trainer.args.output_dir) == []
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_same_weights(tmp_path: Path) -> None:
    """Twenty rounds of kill -9; then the run is allowed to end."""
    import random
    import time

    options = {"max_steps": 60, "save_steps": 1, "save_total_limit": 2}

    def finish(process: Any) -> None:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(child(whole, tmp_path, **options))
    clock = random.Random(7)
    reached = []
    for _ in range(20):
        last = audiomm.get_last_checkpoint(killed)
        reached.append(0 if last is None else int(Path(last).name.split("-")[1]))
        process = child(killed, tmp_path, resume=last is not None, **options)
        deadline = time.monotonic() + 120
        while f"checkpoint-{reached[-1] + 1}" not in names(killed) and time.monotonic() < deadline:
            time.sleep(0.001)  # it has written one; a random moment later it is writing or learning again
        time.sleep(clock.random() * 0.2)
        process.kill()
        process.communicate()
    assert 0 < reached[10] < reached[-1] < 60, reached
    finish(child(killed, tmp_path, resume=True, **options))
    one, other = (checkpoint.weights_in(folder / "checkpoint-60") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(killed.glob(".partial*"))
