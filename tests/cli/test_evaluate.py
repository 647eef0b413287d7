"""audiomm evaluate: where texts are found, what is printed, and what is said when something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from audiomm.base.errors import InputError
from audiomm.cli.evaluate import read_pairs
from audiomm.cli.main import main

pytest.importorskip("jiwer")


@pytest.fixture
def clips(make_wav_file: Any, tmp_path: Path) -> Path:
    """Two recordings, which the fake model hears as "Grüße" both."""
    for name, text in (("a", "Grüße!"), ("b", "good day to you")):
        make_wav_file(f"clips/{name}.wav")
        (tmp_path / "clips" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "clips"


def test_rates_their_interval_and_the_worst_are_printed(fake: Any, clips: Path, capsys: Any, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    assert main(["evaluate", "some/model", str(clips), "--language", "de", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WER 80.00%  (95 % between 0.00% and 100.00%)"
    assert lines[1].startswith("CER ")
    assert lines[2] == "1 substituted, 3 left out, 0 put in, of 5 words in 2 recordings"
    assert lines[4:] == [f"{clips / 'b.wav'}: 4 of 4 words wrong", "  said   good day to you", "  heard  grüße"]
    assert fake.loaded_with["model"] == "some/model"
    ((_, call),) = fake.calls
    assert call["generate_kwargs"] == {"language": "de", "task": "transcribe", "num_beams": 1}
    scores = json.loads(output.read_text())
    assert (scores["wer"], scores["deletions"], len(scores["utterances"])) == (0.8, 3, 2)


def test_texts_are_compared_as_they_are_when_asked_for(fake: Any, clips: Path, capsys: Any) -> None:
    assert main(["evaluate", "m", str(clips), "--language", "de", "--normalizer", "none", "--worst", "0"]) == 0
    assert capsys.readouterr().out.startswith("WER 100.00%")


def test_a_recording_that_cannot_be_heard_is_reported_and_does_not_count(fake: Any, clips: Path, capsys: Any) -> None:
    (clips / "c.wav").write_text("no sound")
    (clips / "c.txt").write_text("nothing")
    assert main(["evaluate", "m", str(clips), "--language", "de"]) == 1
    out, err = capsys.readouterr()
    assert "c.wav" in err
    assert "1 of 3 recordings failed and do not count" in err
    assert "in 2 recordings" in out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.jsonl", '{"path": "a.wav", "text": "one"}\n\n{"audio": "sub/b.wav", "sentence": "two"}\n'),
        ("list.tsv", "path\ttext\na.wav\tone\nsub/b.wav\ttwo\n"),
        ("list.csv", "file,transcription\na.wav,one\nsub/b.wav,two\n"),
    ],
)
def test_tables_name_recordings_beside_them(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_pairs(tmp_path / name) == [(str(tmp_path / "a.wav"), "one"), (str(tmp_path / "sub/b.wav"), "two")]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("excel.csv", '\ufeffpath,text\na.wav,"one, two\nthree"\nb.wav,four\n', ["one, two\nthree", "four"]),
        # Common Voice quotes nothing.
        ("voices.tsv", 'path\tsentence\na.wav\t"One\nb.wav\ttwo" three\n', ['"One', 'two" three']),
        ("web.jsonl", '{"path": "a.wav", "text": "one\u2028two"}\n', ["one\u2028two"]),
    ],
)
def test_tables_are_read_as_other_programs_write_them(
    name: str, content: str, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [text for _, text in read_pairs(tmp_path / name)] == texts


def test_a_json_beside_a_recording_holds_its_text(make_wav_file: Any, tmp_path: Path) -> None:
    make_wav_file("x/y/a.wav")
    (tmp_path / "x/y/a.json").write_text('{"text": "one"}')
    assert read_pairs(tmp_path / "x") == [(str(tmp_path / "x/y/a.wav"), "one")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.jsonl", "{", "line 1 is not JSON"),
        ("list.jsonl", '{"path": "a.wav"}', "row 1 has no 'text'"),
        ("list.tsv", "name\ttext\na.wav\tone", "row 1 has no 'path'"),
        ("list.jsonl", "", "names no recording"),
        ("list.txt", "a", "neither a folder nor"),
        ("clips/a.wav", "", "has neither a.txt nor a.json beside it"),
    ],
)
def test_what_is_missing_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_pairs(path.parent if name.startswith("clips") else path)
    assert main(["evaluate", "m", str(path.parent if name.startswith("clips") else path)]) == 2


def test_a_table_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "m", str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv: there is no such file or folder" in capsys.readouterr().err
