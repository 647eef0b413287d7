"""audiomm plot: a picture and a page from the log of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from audiomm.cli.main import main
from audiomm.cli.plot import read_curves

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my <run>"
    folder.mkdir()
    lines = [{"step": n, "time": 1.0, "loss": 5 / n, "learning_rate": 1e-3, "epoch": n / 4} for n in range(1, 9)]
    lines += [{"step": n, "eval_loss": 2 / n, "eval_wer": 0.9 / n, "eval_runtime": 1.0} for n in (4, 8)]
    lines.append({"step": 8, "train_runtime": 3.0, "train_loss": 1.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_becomes_a_picture_and_a_page(run: Path, capsys: Any) -> None:
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(run / "curves.png"), str(run / "curves.html")]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "curves.html").read_text()
    assert "<title>my &lt;run&gt;</title>" in page
    assert "data:image/png;base64," in page
    assert "<td>eval_wer</td><td>0.225 <small>step 4</small></td><td>0.1125 <small>step 8</small></td>" in page


def test_curves_are_what_was_learnt_not_how_long_it_took(run: Path) -> None:
    curves = read_curves(run / "log.jsonl")
    assert sorted(curves) == ["eval_loss", "eval_wer", "learning_rate", "loss"]
    assert curves["eval_loss"] == [(4, 0.5), (8, 0.25)]


def test_a_checkpoint_or_the_file_will_do_and_the_place_can_be_chosen(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-8").mkdir()
    assert main(["plot", str(run / "checkpoint-8"), "-o", str(tmp_path / "a.png")]) == 0
    assert main(["plot", str(run / "log.jsonl"), "-o", str(tmp_path / "b.html")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.html", "my <run>"]


def test_what_cannot_be_drawn_is_said(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["plot", str(tmp_path / "nothing")]) == 1
    assert "holds no log.jsonl" in capsys.readouterr().err
    assert main(["plot", str(run), "-o", "x.pdf"]) == 2
    assert "a .png or .html file" in capsys.readouterr().err
    assert main(["plot", str(run), "-o", str(tmp_path / "no" / "x.png")]) == 1
    assert "could not be written" in capsys.readouterr().err
    (run / "log.jsonl").write_text("hello\n")
    assert main(["plot", str(run)]) == 1
    assert "line 1 is no line of a training log: 'hello'" in capsys.readouterr().err
    (run / "log.jsonl").write_text("")
    assert main(["plot", str(run)]) == 1
    assert "holds no numbers yet" in capsys.readouterr().err
