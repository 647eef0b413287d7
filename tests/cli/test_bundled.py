"""The command and the examples as users run them: the model that ships with the package on the recordings that do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import audiomm
from audiomm import pipeline
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.cli.main import main

ROOT = Path(__file__).parents[2]
AUDIO = ROOT / "examples" / "audio"
MODEL = "audiomm/whisper-commands"
PI = "three one four one five nine two six"
LINE = re.compile(r"\[\d\d:\d\d\.\d{3} --> \d\d:\d\d\.\d{3}\] \S")

pytestmark = pytest.mark.skipif(
    not (BUNDLED_MODELS[MODEL] / "config.json").is_file(), reason="the bundled model is not in this checkout"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, offline."""
    source = str(Path(audiomm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "audiomm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def words(text: str) -> str:
    """The words of a text in small letters, without marks."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recordings_are_heard_offline_and_a_bad_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "bad.flac").write_bytes(b"fLaC but nothing else")
    done = run("transcribe", AUDIO / "pi.flac", tmp_path / "bad.flac", AUDIO / "two_voices.flac", "--device", "cpu")
    assert done.returncode == 1
    assert "bad.flac" in done.stderr
    assert "Traceback" not in done.stderr
    first, second = done.stdout.split(f"{AUDIO / 'two_voices.flac'}:\n")
    heading, *lines = first.splitlines()
    assert heading == f"{AUDIO / 'pi.flac'}:"
    assert all(LINE.match(line) for line in [*lines, *second.splitlines()])
    assert words(re.sub(r"\[.*?\]", "", " ".join(lines))).startswith(PI)


def test_all_formats_of_all_recordings_in_batches(tmp_path: Path) -> None:
    done = run("transcribe", *sorted(AUDIO.glob("*.flac")), "-o", tmp_path, "--batch_size", "3", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    stems = {path.stem for path in AUDIO.glob("*.flac")}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{extension}" for stem in stems for extension in ("txt", "srt", "vtt", "tsv", "json")
    }
    result = json.loads((tmp_path / "pi.json").read_text())
    assert words(result["text"]).startswith(PI)
    assert words((tmp_path / "pi.txt").read_text()) == words(result["text"])
    assert (tmp_path / "pi.srt").read_text().startswith("1\n00:00:0")
    times = [time for segment in result["segments"] for time in (segment["start"], segment["end"])]
    assert times == sorted(times)


def test_the_default_pipeline_hears_the_same_from_a_path_bytes_and_a_stream() -> None:
    pipe = pipeline("automatic-speech-recognition", device="cpu")
    path = AUDIO / "pi.flac"
    result = pipe(path)
    assert words(result["text"]).startswith(PI)
    assert pipe(path.read_bytes()) == result
    assert list(pipe(iter([str(path)] * 2), batch_size=2)) == [result] * 2


def test_words_are_underlined_as_they_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--word_timestamps True --highlight_words True -f srt --device cpu --beam_size 1"
    assert main(["transcribe", str(AUDIO / "pi.flac"), *flags.split(), "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    cues = (tmp_path / "pi.srt").read_text().strip().split("\n\n")
    underlined = [found for cue in cues for found in re.findall("<u>(.+?)</u>", cue)]
    assert " ".join(map(words, underlined)).startswith(PI)
    assert all(cue.split("\n")[1] for cue in cues)


def test_info_knows_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", MODEL]) == 0
    out = capsys.readouterr().out
    assert "WhisperForConditionalGeneration" in out
    assert "model.safetensors" in out


def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pi.flac"
    path.write_bytes((AUDIO / "pi.flac").read_bytes())
    example("transcribe").main([str(path)])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert words(heading.removeprefix(str(path))).startswith(PI)
    assert lines
    example("subtitles").main([str(path), "--format", "vtt"])
    assert capsys.readouterr().out == f"{tmp_path / 'pi.vtt'}\n"
    assert (tmp_path / "pi.vtt").read_text().startswith("WEBVTT\n\n00:")
