"""`audiomm chat`: a tiny Gemma answers lines, with files attached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomm.base.errors import AudiommError
from audiomm.cli.chat import Conversation, attachments, part_of
from audiomm.cli.main import main


class Recorder:
    """Stands for a pipeline: remembers the messages and answers with their number."""

    def __init__(self) -> None:
        self.asked: list[list[dict]] = []

    def stream(self, messages, **options):
        self.asked.append(messages)
        yield from ("answer ", str(len(self.asked)))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "my clip.wav"
    soundfile.write(path, np.zeros(1600, np.float32), 16_000)
    return path


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{escaped}", "'file://{}'"])
def test_a_path_in_a_line_becomes_an_attachment_however_it_is_quoted(clip, written):
    line = "what is said in " + written.format(clip, escaped=str(clip).replace(" ", r"\ ")) + " ?"
    text, parts = attachments(line)
    assert parts == [{"type": "audio", "path": str(clip)}]
    assert "my clip" not in text
    assert text.startswith("what is said in")


def test_words_that_name_no_file_stay_text():
    assert attachments("don't read notes.txt or song.mp3") == ("don't read notes.txt or song.mp3", [])


def test_a_file_of_an_unknown_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(AudiommError, match=r"notes.txt: .txt says neither"):
        part_of(str(path))


def test_a_conversation_remembers_what_was_said_and_begins_anew(clip, capsys):
    pipe = Recorder()
    talk = Conversation(pipe, "Be brief.", {})
    assert talk.obey(f"/audio {clip}\n")
    assert talk.obey("what is this?\n")
    assert talk.obey("and now?\n")
    first, second = pipe.asked
    assert first[0]["role"] == "system"
    assert [part["type"] for part in first[1]["content"]] == ["audio", "text"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in second[-1]["content"]] == ["text"]
    assert talk.obey("/new")
    assert len(talk.messages) == 1
    assert not talk.obey("/quit")
    assert "answer 1" in capsys.readouterr().out


def test_a_missing_attachment_is_an_error_before_the_model_is_loaded(capsys):
    assert main(["chat", "no/model", "--attach", "missing.wav"]) == 1
    assert "missing.wav" in capsys.readouterr().err


def test_control_c_ends_the_answer_and_not_the_conversation(capsys):
    class Interrupted(Recorder):
        def stream(self, messages, **options):
            self.asked.append(messages)
            yield "so far"
            if len(self.asked) == 1:
                raise KeyboardInterrupt

    pipe = Interrupted()
    talk = Conversation(pipe, None, {})
    assert talk.obey("tell me everything")
    assert talk.obey("and now?")
    assert pipe.asked[1][1] == {"role": "assistant", "content": [{"type": "text", "text": "so far"}]}


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_model_answers_in_a_terminal_with_a_file(family, gemma_folders, clip, capsys):
    arguments = ["chat", str(gemma_folders[family]), "--device", "cpu", "--max_new_tokens", "4"]
    assert main([*arguments, "--attach", str(clip), "--prompt", "what is said?"]) == 0
    assert capsys.readouterr().out.strip()
    assert main([*arguments, "--prompt", f"look at '{clip.parent / 'none.png'}'"]) == 0
    assert main([*arguments, "--temperature", "0", "--prompt", f"'{clip}' '{clip}' hello"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--max_new_tokens", "0"], "at least 1 is needed"), (["--temperature", "-1"], "cannot be negative")],
)
def test_numbers_out_of_range_are_refused_before_the_model_is_loaded(options, message, capsys):
    assert main(["chat", "no/model", *options]) == 2
    assert message in capsys.readouterr().err
