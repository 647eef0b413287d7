"""`audiomm listen`: samples from a pipe or a microphone to text, while they come."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from audiomm.base.errors import MissingExtra
from audiomm.base.transcript import Segment, Transcript, Word
from audiomm.cli import models
from audiomm.cli.listen import samples_of
from audiomm.cli.main import main
from audiomm.media.microphone import microphone

RATE = 16000


class Ear:
    """Hears " n" for each n-th second in which there is sound, with what it was asked."""

    feature_extractor = SimpleNamespace(sampling_rate=RATE, n_samples=30 * RATE)

    def __init__(self) -> None:
        self.model = SimpleNamespace(generation_config=SimpleNamespace(is_multilingual=True), config=None)
        self.asked: list[dict[str, Any]] = []

    def transcribe(self, inputs: dict[str, Any], **kwargs: Any) -> Transcript:
        self.asked.append(kwargs)
        seconds = [
            second for second in range(len(inputs["array"]) // RATE)
            if np.abs(inputs["array"][second * RATE : (second + 1) * RATE]).max() > 0.3
        ]  # fmt: skip
        words = tuple(Word(f" {second}", second + 0.2, second + 0.8) for second in seconds)
        text = "".join(word.text for word in words)
        return Transcript(text, (Segment(text, 0.0, 1.0, words=words),) if words else ())


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    heard = Ear()
    monkeypatch.setattr(models, "pipeline", lambda task, **kwargs: heard)
    return heard


def spoken(*loud: int, seconds: int = 5) -> np.ndarray:
    samples = np.zeros(seconds * RATE, np.int16)
    for second in loud:
        samples[second * RATE + 3200 : second * RATE + 12800] = 20000
    return samples


def test_samples_of_a_pipe_are_written_down(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = SimpleNamespace(buffer=io.BytesIO(spoken(0, 1).tobytes()))
    monkeypatch.setattr(sys, "stdin", pipe)
    assert main(["listen", "-", "--device", "cpu", "--language", "German"]) == 0
    assert capsys.readouterr().out == " 0 1\n"
    assert (ear.asked[0]["language"], ear.asked[0]["num_beams"]) == ("de", 1)


def test_samples_of_a_file_are_written_down(ear: Ear, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talk.raw").write_bytes(spoken(0).tobytes())
    assert main(["listen", str(tmp_path / "talk.raw"), "--step", "0.5"]) == 0
    assert capsys.readouterr().out == " 0\n"


def test_halves_of_samples_wait_for_the_other_half() -> None:
    class Dripping(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return self.read(3)

    samples = np.arange(-50, 50, dtype=np.int16)
    assert np.concatenate(list(samples_of(Dripping(samples.tobytes()), RATE))).tolist() == samples.tolist()


def test_a_terminal_shows_what_may_still_change_in_grey(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "talk.raw").write_bytes(spoken(0, 1, 2, 3).tobytes())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["listen", str(tmp_path / "talk.raw")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[90m 0\x1b[0m" in shown
    assert "\x1b[0J 0" in shown


def test_interruption_ends_the_stream_and_the_last_words_are_written(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        yield spoken(0, 1, seconds=2)
        raise KeyboardInterrupt

    monkeypatch.setattr("audiomm.cli.listen.microphone", interrupted)
    assert main(["listen"]) == 0
    assert capsys.readouterr().out.replace("\x1b[0J", "") == " 0 1\n"


def test_a_microphone_without_its_package_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["listen"]) == 1
    assert "audiomm[microphone]" in capsys.readouterr().err
    with pytest.raises(MissingExtra, match="sounddevice"):
        microphone()


def test_wrong_usage_is_told(ear: Ear, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["listen", "--rate", "7"]) == 1
    assert "--rate=7" in capsys.readouterr().err
    assert main(["listen", "missing.raw"]) == 1
    assert "missing.raw" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "start", "kind"), [("a.raw", b"fLaC", "flac"), ("a.mp3", b"\xff\xfb", "mp3")])
def test_a_file_that_is_no_bare_samples_is_refused(
    ear: Ear, name: str, start: bytes, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(start + bytes(3200))
    assert main(["listen", str(path)]) == 2
    assert f"{name} is a file of the kind {kind}, not bare samples" in capsys.readouterr().err
    # Minus one, and other small numbers below zero.
    path = tmp_path / "quiet.raw"
    path.write_bytes(b"\xff\xff" * 1600)
    assert main(["listen", str(path)]) == 0


def test_a_model_that_is_asked_listens_too(
    gemma_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "noise.raw"
    samples = np.random.default_rng(0).integers(-8000, 8000, 24_000)
    samples[8_000:16_000] = 0
    path.write_bytes(samples.astype("<i2").tobytes())
    assert main(["listen", str(path), "--model", str(gemma_folders["gemma4"]), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_model_that_hears_whole_clips_only_says_so(
    gemma_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "noise.raw"
    path.write_bytes(bytes(3200))
    assert main(["listen", str(path), "--model", str(gemma_folders["gemma3n"]), "--device", "cpu"]) == 1
    assert "cannot encode a stream; Gemma 4 E2B and E4B can" in capsys.readouterr().err
