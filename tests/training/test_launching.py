"""`accelerate launch` with the files that docs/training.md shows: the curve of one process, on two of a CPU."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import audiomm

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
FILES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL))
OPTIONS = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "no", "optim": "adamw_torch",
           "per_device_eval_batch_size": 1}  # fmt: skip

SCRIPT = """
import json, sys
from pathlib import Path
from training_child import Noise, make_trainer
job = json.loads(sys.argv[1])
trainer = make_trainer(job["folder"], job["options"], dropout=0.0)
trainer.eval_dataset = Noise()
trainer.train()
trainer.save_model(job["folder"] + "/final")
loss = trainer.evaluate()["eval_loss"]
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [loss]
    result = {"losses": losses, "kind": trainer.accelerator.distributed_type.value}
    Path(job["folder"], "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts the small training, by itself or through a launch file; several for several machines."""
    (tmp_path / "training_child.py").write_text((Path(__file__).parent / "child.py").read_text(), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    source = str(Path(audiomm.__file__).parent.parent)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip

    def run(name: str, *files: dict[str, Any], **options: Any) -> dict[str, Any]:
        job = json.dumps({"folder": str(tmp_path / name), "options": {**OPTIONS, **options}})
        commands = [[sys.executable, "script.py", job]]
        if files:
            commands = []
        for number, file in enumerate(files):
            path = tmp_path / f"{name}-{number}.yaml"
            path.write_text(yaml.safe_dump(file), encoding="utf-8")
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
            commands.append([*launch, "script.py", job])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs = [subprocess.Popen(one, cwd=tmp_path, env=environment, **pipes) for one in commands]
        for process in runs:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
        result: dict[str, Any] = json.loads((tmp_path / name / "result.json").read_text())
        return result

    return run


def on_two(name: str, **changes: Any) -> dict[str, Any]:
    """A file of the documentation with two processes and full precision."""
    content: dict[str, Any] = yaml.safe_load(FILES[name])
    precision = {"mixed_precision": "no"} if "mixed_precision" in content else {}
    return {**content, "num_processes": 2, **precision, **changes}


def check(tmp_path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0]
    models = [audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path / name / "final") for name in "ab"]
    pairs = zip(*(model.state_dict().values() for model in models), strict=True)
    assert max(float((one - other).abs().max()) for one, other in pairs) < 1e-4


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_of_the_documentation_are_ones_that_accelerate_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    assert config.num_processes in (8, 16)


@pytest.mark.dist
def test_weights_spread_by_a_launch_file_give_the_curve_of_one_process(start: Any, tmp_path: Path) -> None:
    one = start("a", per_device_train_batch_size=4)
    two = start("b", on_two("fsdp.yaml"), per_device_train_batch_size=2)
    assert (one["kind"], two["kind"]) == ("NO", "FSDP")
    check(tmp_path, two, one)


@pytest.mark.dist
def test_two_machines_learn_what_one_does(start: Any, tmp_path: Path) -> None:
    """Both are this one: each starts its own process with its own machine_rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"main_process_ip": "127.0.0.1", "main_process_port": port}
    one = start("a", per_device_train_batch_size=4)
    two = start("b", *(on_two("nodes.yaml", machine_rank=rank, **address) for rank in (0, 1)),
                per_device_train_batch_size=2)  # fmt: skip
    check(tmp_path, two, one)
    weights = audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path / "b" / "final")
    assert all(torch.isfinite(value).all() for value in weights.parameters())
