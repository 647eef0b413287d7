"""The examples for the Gemmas run as they stand, on tiny models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import soundfile

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recordings(gemmas: Any, tmp_path: Path) -> list[str]:
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], gemmas.noise(1.2, seed=number), 16_000)
        paths[-1].with_suffix(".txt").write_text("the hello\n")
    return [str(path) for path in paths]


@pytest.fixture
def frames(gemmas: Any, tmp_path: Path) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        pillow.fromarray(gemmas.picture(number)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_transcripts_and_chats(family, gemma_folders, recordings, frames, capsys) -> None:
    model = str(gemma_folders[family])
    example("transcribe_with_gemma").main([model, *recordings, "--max_new_tokens", "4"])
    out = capsys.readouterr().out
    assert recordings[0] in out
    assert "0.00 s -    1.20 s" in out
    example("chat_image_audio").main(
        [model, "--image", str(frames / "0.png"), "--audio", recordings[0], "--max_new_tokens", "4"]
    )
    assert capsys.readouterr().out.strip()


def test_questions_about_a_video(gemma_folders, frames, capsys) -> None:
    example("video_question").main([str(gemma_folders["gemma4"]), str(frames), "--max_new_tokens", "4"])
    assert capsys.readouterr().out.strip()


def test_a_fine_tuned_adapter_is_saved(gemma_folders, recordings, tmp_path: Path, capsys) -> None:
    output = tmp_path / "adapter"
    example("finetune_gemma_audio").main(
        [str(gemma_folders["gemma4"]), str(tmp_path), "--output", str(output), "--steps", "2"]
    )
    assert "model.audio_tower" in capsys.readouterr().out
    assert (output / "adapter_model.safetensors").is_file()
