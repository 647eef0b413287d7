"""Two processes: the curve of one process with the same global batches, and checkpoints that one process reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm
from audiomm.training import checkpoint

pytestmark = pytest.mark.dist

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import audiomm
import torch
from training_child import Noise, make_trainer

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        data = Noise()
        return (data[index] for index in range(21))

job = json.loads(sys.argv[1])
data = Stream() if job["stream"] else None
args = audiomm.TrainingArguments(job["folder"], use_cpu=True)
turn = Path(job["folder"] + ".turn")
with args.main_process_first():
    assert turn.exists() == (args.process_index > 0), "the others come when the first is done"
    turn.touch()
trainer = make_trainer(job["folder"], job["options"], data, dropout=0.0)
here = trainer.accelerator
assert (args.device.type, args.world_size) == (here.device.type, here.num_processes)
assert (args.process_index, args.local_process_index) == (here.process_index, here.local_process_index)
trainer.eval_dataset = Noise()
trainer.train(resume_from_checkpoint=job["resume"])
trainer.save_model(job["folder"] + "/final")
metrics = trainer.evaluate()
predicted = trainer.predict(Noise())
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    text = json.dumps({{"losses": losses, "eval": metrics["eval_loss"], "labels": predicted.label_ids.tolist()}})
    Path(job["folder"], "result.json").write_text(text)
"""


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs the small training in one or two processes; `options` are its arguments."""
    (tmp_path / "training_child.py").write_text((Path(__file__).parent / "child.py").read_text(), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(tmp_path)), encoding="utf-8")

    def start(name: str, processes: int, *, stream: bool = False, resume: Any = None, **options: Any) -> dict[str, Any]:
        values = {
            "max_steps": 8, "per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2,
            "save_strategy": "steps", "save_steps": 4, "per_device_eval_batch_size": 1, **options,
        }  # fmt: skip
        folder = tmp_path / name
        job = json.dumps({"folder": str(folder), "options": values, "stream": stream, "resume": resume})
        source = str(Path(audiomm.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script), job]
        if processes > 1:
            launch = ["--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, "-m", "torch.distributed.run", *launch, str(script), job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result

    return start


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert one["losses"][-1] < one["losses"][0]
    assert one["eval"] == pytest.approx(other["eval"], rel=1e-5)
    assert one["labels"] == other["labels"], "predictions of all processes in the order of the data"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return audiomm.WhisperForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("stream", [False, True])
def test_two_processes_learn_what_one_does(stream: bool, run: Any, tmp_path: Path) -> None:
    """21 samples in global batches of 4: the last batch of an epoch has one sample, so that one process idles."""
    same(run("two", 2, stream=stream), run("one", 1, stream=stream))
    one, two = weights(tmp_path / "one" / "final"), weights(tmp_path / "two" / "final")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_run_of_two_goes_on_exactly(run: Any, tmp_path: Path) -> None:
    whole = run("whole", 2)
    half = str(tmp_path / "whole" / "checkpoint-4")
    resumed = run("resumed", 2, resume=half)
    assert resumed["losses"] == whole["losses"]
    one, other = (checkpoint.weights_in(tmp_path / name / "checkpoint-8") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = run("alone", 1, resume=half)
    assert alone["losses"] == pytest.approx(whole["losses"], rel=1e-5), "one process takes over from two"


def test_weights_spread_over_two_processes_learn_and_load_on_one(run: Any, tmp_path: Path) -> None:
    plan = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True}}
    spread, one = run("spread", 2, **plan), run("one", 1)
    same(spread, one)
    mine, theirs = weights(tmp_path / "spread" / "final"), weights(tmp_path / "one" / "final")
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    half = str(tmp_path / "spread" / "checkpoint-4")
    again = run("again", 2, resume=half, **plan)
    assert again["losses"] == pytest.approx(spread["losses"], rel=1e-6)
    alone = run("alone", 1, resume=half)
    assert alone["losses"] == pytest.approx(spread["losses"], rel=1e-5)


def test_a_signal_to_one_of_two_ends_both_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "training_child.py").write_text((Path(__file__).parent / "child.py").read_text(), encoding="utf-8")
    script = tmp_path / "script.py"
    folder = tmp_path / "run"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(tmp_path)!r})
import audiomm
from training_child import make_trainer
class Interrupt(audiomm.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
trainer = make_trainer({str(folder)!r}, {{"max_steps": 9}})
trainer.add_callback(Interrupt)
try:
    trainer.train()
except SystemExit as stop:
    assert stop.code == 130
else:
    raise AssertionError("went on")
""",
        encoding="utf-8",
    )
    source = str(Path(audiomm.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-3"]
