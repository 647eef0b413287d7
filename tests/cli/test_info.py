"""`audiomm info`: facts of a folder without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audiomm.cli.main import main
from audiomm.models.whisper import WhisperConfig, WhisperForConditionalGeneration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=51864,
    )
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    return tmp_path


def facts(out: str) -> dict[str, str]:
    return {line[:26].strip(): line[27:] for line in out.splitlines()}


def test_sizes_files_memory_and_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    found = facts(capsys.readouterr().out)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found["architecture"] == "WhisperForConditionalGeneration"
    assert found["parameters"] == f"{parameters:,}"
    assert found["decoder_layers"] == "2"
    assert found["vocab_size"] == "51,864"
    assert found["weights"].endswith(f"{parameters:,} numbers in F32")
    assert found["file"].startswith("model.safetensors, ")
    assert found["memory float32"] == f"{parameters * 4 / 2**20:.1f} MiB of weights"
    # 2 layers x (448 own + 1500 encoder) positions x keys and values x 16 numbers
    assert found["cache float32"] == f"{2 * 1948 * 2 * 16 * 4 / 2**10:.1f} KiB for one sequence"


def test_a_folder_without_weights_still_has_a_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    assert main(["info", str(folder)]) == 0
    assert facts(capsys.readouterr().out)["weights"] == "not on this machine"


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "sonar"}'), "sonar"),
        (lambda path: (path / "config.json").write_text("{"), "not readable JSON"),
        (lambda path: (path / "model.safetensors").write_bytes(b"cut short"), "not a whole safetensors file"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(
    folder: Path, prepare: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(folder)
    assert main(["info", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("audiomm: error: ")
    assert words in err
