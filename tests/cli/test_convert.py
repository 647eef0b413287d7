"""`audiomm convert`: from the command line to a folder, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from audiomm import WhisperForConditionalGeneration
from audiomm.cli.main import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The bundled model as a folder of before safetensors."""
    from audiomm.base.hub import BUNDLED_MODELS

    folder = tmp_path / "old"
    folder.mkdir()
    for path in BUNDLED_MODELS["audiomm/whisper-commands"].iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    model = WhisperForConditionalGeneration.from_pretrained("audiomm/whisper-commands")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_a_folder_is_converted_and_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "new"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    found = WhisperForConditionalGeneration.from_pretrained(tmp_path / "new")
    wanted = WhisperForConditionalGeneration.from_pretrained("audiomm/whisper-commands")
    assert found.dtype == torch.float32
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float()), name
    kept = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    old = json.loads((source / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in old} == old
    assert main(["info", str(tmp_path / "new")]) == 0


def test_errors_are_one_line_and_an_exit_code(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "missing.pt"), str(tmp_path / "new")]) == 1
    assert main(["convert", str(source), str(source)]) == 1
    assert main(["convert", str(source), str(tmp_path / "new"), "--format", "onnx"]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("audiomm: error: ")
    assert "missing.pt" in first
    assert "is not an empty folder" in second
    assert "format='onnx': accepted are auto, openai" in third
    assert not (tmp_path / "new").exists()


def test_wrong_arguments_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "only-one"]) == 2
    assert main(["convert", "a", "b", "--dtype", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err
