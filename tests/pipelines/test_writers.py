"""The files of transcripts, to the byte as openai-whisper writes them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from audiomm.base.errors import InputError, SaveError
from audiomm.base.transcript import Segment, Transcript, Word
from audiomm.pipelines import get_writer
from audiomm.pipelines.writers import SubtitleOptions, cues, format_timestamp, output_names

PLAIN = Transcript(
    " Hello -->\tworld. Grüße",
    (
        Segment(" Hello -->\tworld.", 0.0, 1.5, tokens=(1, 2), avg_logprob=-0.5),
        Segment(" Grüße", 3661.25, 3662.0004),
    ),
    language="en",
)


def spoken(*segments: list[tuple[str, float, float]]) -> Transcript:
    """A transcript with words."""
    return Transcript(
        "".join(text for segment in segments for text, _, _ in segment),
        tuple(
            Segment(
                "".join(text for text, _, _ in segment),
                segment[0][1],
                segment[-1][2],
                words=tuple(Word(*word) for word in segment),
            )
            for segment in segments
        ),
        timestamps="word",
    )


WORDS = spoken(
    [(" One", 0.0, 0.5), (" two", 0.5, 1.0), (" three", 1.2, 2.0)],
    [(" four", 6.0, 6.5), (" five", 6.5, 7.0)],
)


def written(tmp_path: Path, output_format: str, transcript: Transcript = PLAIN, **options: Any) -> str:
    paths = get_writer(output_format, tmp_path)(transcript, "some/talk.mp3", options)
    assert paths == [tmp_path / f"talk.{output_format}"]
    return paths[0].read_bytes().decode()


def test_txt(tmp_path: Path) -> None:
    assert written(tmp_path, "txt") == "Hello -->\tworld.\nGrüße\n"


def test_srt(tmp_path: Path) -> None:
    assert written(tmp_path, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello ->\tworld.\n\n2\n01:01:01,250 --> 01:01:02,000\nGrüße\n\n"
    )


def test_vtt(tmp_path: Path) -> None:
    assert written(tmp_path, "vtt") == (
        "WEBVTT\n\n00:00.000 --> 00:01.500\nHello ->\tworld.\n\n01:01:01.250 --> 01:01:02.000\nGrüße\n\n"
    )


def test_tsv(tmp_path: Path) -> None:
    assert written(tmp_path, "tsv") == "start\tend\ttext\n0\t1500\tHello --> world.\n3661250\t3662000\tGrüße\n"


def test_json(tmp_path: Path) -> None:
    text = written(tmp_path, "json")
    assert text.isascii()
    assert json.loads(text) == {
        "text": PLAIN.text,
        "segments": [
            {"id": 0, "start": 0.0, "end": 1.5, "text": " Hello -->\tworld.", "tokens": [1, 2], "avg_logprob": -0.5},
            {"id": 1, "start": 3661.25, "end": 3662.0004, "text": " Grüße", "tokens": []},
        ],
        "language": "en",
    }


def test_json_holds_words(tmp_path: Path) -> None:
    segment = json.loads(written(tmp_path, "json", spoken([(" One", 0.0, 0.5)])))["segments"][0]
    assert segment["words"] == [{"word": " One", "start": 0.0, "end": 0.5}]
    with_probability = Segment(" a", 0.0, 1.0, words=(Word(" a", 0.0, 1.0, 0.75),), end_is_estimated=True)
    assert with_probability.to_dict(0)["words"][0]["probability"] == 0.75
    assert with_probability.to_dict(0)["end_is_estimated"] is True


def test_all_writes_every_format_into_a_new_folder(tmp_path: Path) -> None:
    paths = get_writer("all", tmp_path / "new" / "folder")(PLAIN, "talk.mp3")
    assert sorted(path.name for path in paths) == ["talk.json", "talk.srt", "talk.tsv", "talk.txt", "talk.vtt"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(path.name for path in paths)


def test_an_empty_transcript_is_an_empty_file(tmp_path: Path) -> None:
    empty = Transcript("", timestamps="word")
    assert written(tmp_path, "srt", empty, max_line_width=3) == ""
    assert written(tmp_path, "vtt", empty) == "WEBVTT\n\n"


def lines(**options: Any) -> list[str]:
    return [cue.text for cue in cues(WORDS, SubtitleOptions(**options))]


def test_words_follow_segments() -> None:
    assert lines() == ["One two three", "four five"]


def test_long_lines_are_broken() -> None:
    assert lines(max_line_width=8) == ["One two\nthree", "four\nfive"]


def test_few_words_a_cue() -> None:
    assert lines(max_words_per_line=2) == ["One two", "three", "four five"]


def test_width_and_count_fill_cues_across_segments_up_to_a_long_pause() -> None:
    assert lines(max_line_width=8, max_line_count=2) == ["One two\nthree", "four\nfive"]
    assert lines(max_line_width=100, max_line_count=1) == ["One two three", "four five"]
    close = spoken([(" One", 0.0, 0.5)], [(" two", 0.5, 1.0)])
    assert [cue.text for cue in cues(close, SubtitleOptions(max_line_width=100, max_line_count=1))] == ["One two"]


def test_a_cue_lasts_from_its_first_word_to_its_last() -> None:
    assert [(cue.start, cue.end) for cue in cues(WORDS, SubtitleOptions())] == [(0.0, 2.0), (6.0, 7.0)]


def test_each_word_is_highlighted_in_turn_and_pauses_are_plain(tmp_path: Path) -> None:
    assert written(tmp_path, "vtt", spoken([(" One", 0.0, 0.5), (" two", 0.9, 1.2)]), highlight_words=True) == (
        "WEBVTT\n\n00:00.000 --> 00:00.500\n<u>One</u> two\n\n00:00.500 --> 00:00.900\nOne two\n\n"
        "00:00.900 --> 00:01.200\nOne <u>two</u>\n\n"
    )


@pytest.mark.parametrize(
    ("seconds", "options", "text"),
    [
        (0, {}, "00:00.000"),
        (59.9996, {}, "01:00.000"),
        (3600, {}, "01:00:00.000"),
        (1.001, {"always_include_hours": True, "decimal_marker": ","}, "00:00:01,001"),
    ],
)
def test_times_in_words(seconds: float, options: dict[str, Any], text: str) -> None:
    assert format_timestamp(seconds, **options) == text


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(InputError, match="times start at 0"):
        format_timestamp(-0.5)


def test_names_of_outputs_are_all_different(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "audiomm.pipelines"):
        assert output_names(["a/one.wav", "b/two.wav"]) == ["one", "two"]
        assert caplog.text == ""
        assert output_names(["a/x.wav", "b/x.mp3", "y.wav"]) == ["x.wav", "x.mp3", "y"]
    assert "more than one input is called x" in caplog.text
    assert output_names(["a/x.wav", "b/x.wav", "c/X.wav", "x.wav-2.mp3"]) == ["x.wav", "x.wav-3", "X.wav-4", "x.wav-2"]


def test_unknown_formats_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of txt, vtt, srt, tsv, json or all"):
        get_writer("doc", tmp_path)
    with pytest.raises(InputError, match="max_line_width=0"):
        written(tmp_path, "srt", max_line_width=0)
    with pytest.raises(InputError, match="unknown writer option 'line_width'"):
        written(tmp_path, "srt", line_width=3)
    with pytest.raises(InputError, match="return_timestamps='word'"):
        written(tmp_path, "srt", highlight_words=True)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="cannot save"):
        get_writer("txt", tmp_path / "file")(PLAIN, "talk.mp3")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_writer("txt", tmp_path)(Transcript("old", (Segment("old", 0, 1),)), "talk.mp3")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SaveError, match="is unchanged"):
        get_writer("txt", tmp_path)(PLAIN, "talk.mp3")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.txt"]
    assert (tmp_path / "talk.txt").read_bytes() == b"old\n"
