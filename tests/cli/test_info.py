"""`audiomm info`: facts of a folder without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audiomm.cli.main import main
from audiomm.models.gemma4 import Gemma4Config
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


def test_a_gemma_tells_its_parts_before_anything_is_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "global_head_dim": 16, "vocab_size": 96, "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "max_position_embeddings": 100,
        "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    Gemma4Config(
        text_config=text,
        vision_config={"hidden_size": 24, "num_hidden_layers": 1},
        architectures=["Gemma4ForConditionalGeneration"],
    ).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    found = facts(capsys.readouterr().out)
    assert found["num_hidden_layers"] == "4" and found["num_experts"] == "5" and found["sliding_window"] == "6"
    assert found["weights"] == "not on this machine"
    assert found["in per-layer embeddings"].startswith(f"{96 * 4 * 8:,}, 12.0 KiB in float32, 6.0 KiB in bfloat16")
    assert found["in experts"].startswith(f"{4 * 5 * 3 * 16 * 32:,}, ")
    assert "in pictures" in found and "in sound" not in found
    # Two layers have keys of their own: a window of 6 with 2 heads of 8, and all 100 with 2 heads of 16.
    assert found["cache float32"] == f"{2 * 2 * (6 * 8 + 100 * 16) * 4 / 2**10:.1f} KiB for one sequence"


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
