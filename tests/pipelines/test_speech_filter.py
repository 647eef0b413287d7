"""Hearing only parts of a recording, found or given, with times of the recording; and prompts given as text."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm.base.errors import InputError
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.media import speech
from audiomm.media.speech import SpeechClock, SpeechFinder, SpeechOptions, join, speech_spans
from audiomm.pipelines import pipeline

AUDIO = Path(__file__).parents[2] / "examples" / "audio"
RATE = 16000
TIGHT = {"speech_pad_ms": 0, "min_silence_duration_ms": 500}


def exact_spans(samples: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """Spans to the sample, so that the model of these tests, which counts seconds, hears whole ones."""
    edges = np.flatnonzero(np.diff((np.abs(samples) > 0.1).astype(int), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "energy_spans", exact_spans)


def times_of(result: dict[str, Any]) -> list[Any]:
    return [time for chunk in result["chunks"] for time in chunk["timestamp"]]


def test_times_are_those_of_the_recording(pipe: Any, make_sound: Any, exact: None) -> None:
    result = pipe(make_sound(20, 4, 15), vad_filter=True, vad_parameters=TIGHT, return_timestamps=True)
    # The second sound is the second second that the model hears.
    assert result["text"] == " w0 w1"
    assert times_of(result) == pytest.approx([4, 5, 15, 16], abs=0.05)
    assert pipe.model.calls[-1]["lengths"][0] < 220


def test_long_audio_with_little_speech_is_one_window_in_any_batch(pipe: Any, make_sound: Any, exact: None) -> None:
    items = [make_sound(70, 40), make_sound(3, 1), make_sound(5)]
    options = {"vad_filter": True, "vad_parameters": TIGHT, "return_timestamps": True}
    together = pipe(items, batch_size=3, **options)
    assert [call["shape"] for call in pipe.model.calls] == [(2, 1, 3000)]
    assert times_of(together[0]) == pytest.approx([40, 41], abs=0.05)
    assert together == [pipe(item, **options) for item in items]
    assert together[2] == {"text": "", "chunks": []}


def test_silence_gives_no_text_without_running_the_model(
    pipe: Any, make_sound: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "audiomm.pipelines"):
        transcript = pipe.transcribe(make_sound(35), vad_filter=True, chunk_length_s=10)
    assert (transcript.text, transcript.segments, transcript.duration_seconds) == ("", (), 35.0)
    assert pipe.model.calls == []
    assert caplog.text == ""


def test_words_and_windows_go_back_to_the_recording(pipe: Any, make_sound: Any, exact: None) -> None:
    samples = make_sound(40, 5, 30)
    options = {"vad_filter": True, "vad_parameters": TIGHT, "return_timestamps": "word"}
    transcript = pipe.transcribe(samples, word_timestamps=False, **options)
    assert [word.start for word in transcript.words] == pytest.approx([5.25, 30.25], abs=0.05)
    assert [segment.start for segment in transcript.segments] == [word.start for word in transcript.words]
    assert transcript.duration_seconds == 40
    merged = pipe.transcribe(samples, chunk_length_s=10, stride_length_s=0, **options)
    assert [word.start for word in merged.words] == pytest.approx([5.25, 30.25], abs=0.05)


def test_parts_are_cut_out_and_times_go_back(pipe: Any, make_sound: Any) -> None:
    samples = make_sound(20, 2, 5, 10, 19)
    for parts in ("4,7,9,12,19", [4, 7, 9, 12, 19, 99]):
        result = pipe(samples, clip_timestamps=parts, return_timestamps=True)
        assert result["text"] == " w1 w4 w6"
        assert times_of(result) == [5, 6, 10, 11, 19, 20]
    for whole in ("", "0", [0.0], None):
        assert pipe(samples, clip_timestamps=whole)["text"] == " w2 w5 w10 w19"


def test_parts_beyond_the_end_are_told(pipe: Any, make_sound: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "audiomm.pipelines"):
        assert pipe(make_sound(5, 1), clip_timestamps="30,40") == {"text": ""}
    assert "clip_timestamps leave 0 samples of its 5.00 s" in caplog.text


class Prompts:
    """get_prompt_ids that remembers the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str, return_tensors: str | None = None) -> torch.Tensor:
        assert return_tensors == "pt"
        self.texts.append(text)
        return torch.tensor([999, len(text)])


@pytest.mark.parametrize(
    ("arguments", "text", "kind"),
    [
        ({"initial_prompt": " Ørsted "}, "Ørsted", "first-segment"),
        ({"initial_prompt": "Ørsted", "carry_initial_prompt": True}, "Ørsted", "all-segments"),
        ({"hotwords": "Aarhus"}, "Aarhus", "all-segments"),
        ({"initial_prompt": "Ørsted", "hotwords": "Aarhus"}, "Aarhus Ørsted", "all-segments"),
        ({"initial_prompt": "Ørsted", "hotwords": " "}, "Ørsted", "first-segment"),
    ],
)
def test_prompts_are_text(pipe: Any, make_sound: Any, arguments: dict[str, Any], text: str, kind: str) -> None:
    pipe.tokenizer.get_prompt_ids = prompts = Prompts()
    pipe(make_sound(3, 1), **arguments)
    call = pipe.model.calls[-1]
    assert (prompts.texts, call["prompt_ids"].tolist()) == ([text], [999, len(text)])
    assert call["prompt_condition_type"] == kind
    assert not {"initial_prompt", "carry_initial_prompt", "hotwords"} & call.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vad_filter": 0.5}, "vad_filter=0.5"),
        ({"vad_parameters": {}}, "without vad_filter"),
        ({"vad_filter": True, "vad_parameters": 3}, "vad_parameters is a int"),
        ({"vad_filter": True, "vad_parameters": {"pad": 3}}, "has no 'pad'; it takes min_speech_duration_ms"),
        ({"vad_filter": True, "vad_parameters": {"detector": "ear"}}, "detector='ear'"),
        ({"vad_filter": True, "vad_parameters": {"threshold": 0.5}}, "is for detector='silero'"),
        ({"vad_filter": True, "vad_parameters": {"threshold": 2, "detector": "silero"}}, "between 0 and 1"),
        ({"vad_filter": True, "vad_parameters": {"speech_pad_ms": "much"}}, "speech_pad_ms='much'"),
        ({"vad_filter": True, "vad_parameters": {"max_speech_duration_s": float("nan")}}, "max_speech_duration_s=nan"),
        ({"vad_filter": True, "clip_timestamps": "1,2"}, "both choose what is heard"),
        ({"clip_timestamps": "1,zwei"}, "expected seconds as"),
        ({"clip_timestamps": 3}, "expected seconds as"),
        ({"clip_timestamps": [-1, 2]}, "at least 0"),
        ({"clip_timestamps": "1,nan"}, "at least 0"),
        ({"clip_timestamps": [1, 5, 4, 6]}, "must be in order"),
        ({"initial_prompt": 3}, "initial_prompt is a int"),
        ({"hotwords": ["a"]}, "hotwords is a list"),
        ({"carry_initial_prompt": True}, "needs an initial_prompt"),
        ({"carry_initial_prompt": "yes", "initial_prompt": "a"}, "carry_initial_prompt='yes'"),
        ({"hotwords": "a", "prompt_ids": torch.tensor([1])}, "prompt_ids excludes"),
        ({"hotwords": "a", "generate_kwargs": {"prompt_condition_type": "all-segments"}}, "prompt_condition_type excl"),
    ],
)
def test_wrong_arguments_are_named(pipe: Any, make_sound: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pipe(make_sound(3, 1), **arguments)
    assert pipe.feature_extractor.calls == []


def test_a_stride_of_the_caller_cannot_be_kept(pipe: Any, make_sound: Any) -> None:
    item = {"raw": make_sound(10, 1), "sampling_rate": RATE, "stride": (16000, 32000)}
    with pytest.raises(InputError, match="its stride cannot be kept"):
        pipe(item, vad_filter=True)


def test_silence_that_was_kept_around_speech_does_not_stretch_segments_over_joins() -> None:
    clock = SpeechClock([(0, 4 * RATE), (44 * RATE, 48 * RATE)], RATE, slack_seconds=0.4)
    assert clock.stretch(3.8, 5.0) == (44, 45)
    assert clock.stretch(2.0, 4.2) == (2, 4)
    assert clock.stretch(3.0, 5.0) == (3, 45)
    assert clock.stretch(4.0, 5.0) == (44, 45)
    assert clock.word(3.9, 4.3) == pytest.approx((44, 44.3))
    # A word belongs to the speech that its segment is in, wherever its own times were found.
    assert clock.word(4.2, 4.6, within=(3.0, 4.1)) == pytest.approx((4, 4))
    assert clock.word(3.2, 3.6, within=(4.5, 5.0)) == pytest.approx((44, 44))
    assert clock.word(3.2, 3.6, within=(1.0, 5.0)) == pytest.approx((3.2, 3.6))
    assert SpeechClock([], RATE).stretch(1, 2) == SpeechClock([], RATE).word(1, 2) == (1, 2)
    # Where nothing was cut out, nothing moves.
    assert SpeechClock([(0, 4 * RATE), (4 * RATE, 8 * RATE)], RATE, 0.4).stretch(3.8, 5) == pytest.approx((3.8, 5))


def test_a_finder_is_made_from_parameters() -> None:
    finder = SpeechFinder.from_parameters({"speech_pad_ms": 10, "max_speech_duration_s": 9})
    assert (finder.options, finder.detector) == (SpeechOptions(speech_pad_ms=10, max_speech_duration_s=9), None)


@pytest.mark.skipif(
    not (BUNDLED_MODELS["audiomm/whisper-commands"] / "config.json").is_file(), reason="the bundled model is missing"
)
@pytest.mark.parametrize("noise", [0.0, 0.0003])
def test_a_recording_with_long_silences_has_the_words_of_its_speech_in_the_right_places(noise: float) -> None:
    rng = np.random.default_rng(0)
    pieces: list[np.ndarray] = []
    spoken: list[tuple[float, float]] = []
    for name, seconds in (("pi", 7), ("phone_number", 40)):
        pieces.append(np.zeros(seconds * RATE, np.float32))
        pieces.append(soundfile.read(AUDIO / f"{name}.flac", dtype="float32")[0])
        end = sum(map(len, pieces)) / RATE
        spoken.append((end - len(pieces[-1]) / RATE, end))
    samples = np.concatenate([*pieces, np.zeros(5 * RATE, np.float32)])
    samples = (samples + noise * rng.standard_normal(len(samples))).astype(np.float32)
    pipe = pipeline("automatic-speech-recognition", device="cpu", num_beams=1)
    spans = speech_spans(samples, RATE)
    alone = pipe(join(samples, spans), return_timestamps=True)
    found = pipe.transcribe(samples, vad_filter=True, return_timestamps=True)
    assert found.text == alone["text"]
    assert found.duration_seconds == len(samples) / RATE
    places = [[one for one in found.segments if start <= one.start < one.end <= end] for start, end in spoken]
    assert len(places[0]) + len(places[1]) == len(found.segments)
    # The first recording has eight words from 0.35 s to 5.34 s, the second seven from 0.35 s to 5.78 s.
    for segments, (start, _), last in zip(places, spoken, (5.34, 5.78), strict=True):
        assert len(segments) >= 7
        assert segments[0].start == pytest.approx(start + 0.35, abs=0.1)
        assert segments[-1].end == pytest.approx(start + last, abs=0.1)
    # Words are found by another way; each lies in the stretch of speech in which its segment was heard.
    words = pipe.transcribe(samples, vad_filter=True, return_timestamps="word").words
    for segments, (first, last) in zip(places, spans, strict=True):
        inside = [one for one in words if first / RATE - 0.001 <= one.start <= one.end <= last / RATE + 0.001]
        assert [one.text for one in inside] == [one.text for one in segments]
        errors = [abs(word.start - segment.start) for word, segment in zip(inside, segments, strict=True)]
        assert np.median(errors) <= 0.1
    assert len(words) == len(found.segments)
    assert all(before.end <= after.start + 0.001 for before, after in itertools.pairwise(words))


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is None, reason="needs the extra vad")
def test_silero_leaves_out_what_is_not_speech_and_times_stay_those_of_the_recording() -> None:
    speech_samples = soundfile.read(AUDIO / "pi.flac", dtype="float32")[0]
    time = np.arange(12 * RATE) / RATE
    music = sum(np.sin(2 * np.pi * hertz * time) for hertz in (220, 277, 330)) * np.sin(2 * np.pi * 3 * time) * 0.1
    samples = np.concatenate([music, speech_samples, np.zeros(6 * RATE)]).astype(np.float32)
    spans = SpeechFinder.from_parameters({"detector": "silero"})(samples, RATE)
    assert len(spans) == 1
    assert [time / RATE for time in spans[0]] == pytest.approx([12, 12 + len(speech_samples) / RATE], abs=0.5)
    assert SpeechFinder()(samples, RATE)[0][0] < 11 * RATE, "the energy detector takes music for speech"
    pipe = pipeline("automatic-speech-recognition", device="cpu", num_beams=1)
    parameters = {"detector": "silero", "threshold": 0.6}
    found = pipe.transcribe(samples, vad_filter=True, vad_parameters=parameters, return_timestamps=True)
    assert found.text.split() == ["three", "one", "four", "one", "five", "nine", "two", "six"]
    assert found.segments[0].start == pytest.approx(12.35, abs=0.1)
