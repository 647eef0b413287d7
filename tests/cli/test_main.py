"""The command itself: help, versions, facts; started as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import audiomm
from audiomm.cli.main import main

SOURCE = Path(audiomm.__file__).parents[1]


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(("-c", code) if code else ("-m", "audiomm")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_python_m_runs_the_command_and_tells_its_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"audiomm {audiomm.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["transcribe", "--help"], ["--version"], ["no-such-command"]])
def test_reading_the_arguments_does_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; from audiomm.cli.main import main; main({arguments!r}); sys.exit('torch' in sys.modules)"
    assert run(code=code).returncode == 0


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: audiomm" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("transcribe", "info", "env"))


def test_env_tells_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["audiomm"] == audiomm.__version__
    assert facts["python"] == sys.version.split()[0]
    assert {"torch", "safetensors", "tokenizers", "numpy", "soundfile", "cpu", "cuda"} <= facts.keys()


def test_a_reader_that_stops_early_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "audiomm", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0
