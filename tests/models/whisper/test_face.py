"""model.transcribe() and audiomm.transcribe(): openai-whisper's arguments and defaults over the same engine."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiomm import GenerationError
from audiomm.base.errors import InputError
from audiomm.base.transcript import Transcript
from audiomm.models.whisper.segments import without_closing_pair
from audiomm.pipelines import transcribe as doors
from audiomm.pipelines.transcribe import transcribe as transcribe_anything

RATE, BEGIN, START = 16000, 79, [3, 4, 7]


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32) / 4


@pytest.fixture
def transcribe(talker, tiny_processor):
    def call(audio, **options):
        options = {"processor": tiny_processor, "temperature": 0.0, "language": "en", "sample_len": 10} | options
        return talker.transcribe(audio, **options)

    return call


def test_a_transcript_is_text_in_segments_with_times(transcribe):
    found = transcribe(sound(1.3))
    assert isinstance(found, Transcript)
    assert found.text == "".join(segment.text for segment in found.segments)
    assert found.text.startswith(" w")
    assert found.language == "en"
    assert found.duration_seconds == pytest.approx(1.3)
    assert found.segments[0].avg_logprob < 0
    assert 0 < found.segments[0].no_speech_prob < 1
    assert all(BEGIN - 1 not in segment.tokens for segment in found.segments)


@pytest.mark.parametrize("words", [False, True])
def test_each_window_is_encoded_once_for_language_silence_temperatures_and_words(transcribe, encoder_batches, words):
    rounds = []
    transcribe(
        sound(1.7), language=None, temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), logprob_threshold=0.0,
        word_timestamps=words, monitor_progress=lambda done: rounds.append(done.tolist()), no_speech_threshold=0.999,
    )  # fmt: skip
    assert len(rounds) > 3
    assert encoder_batches == [1] * len(rounds)


def test_the_bundled_model_is_one_call_away():
    path = Path(__file__).parents[3] / "examples" / "audio" / "pi.flac"
    found = transcribe_anything(path, device="cpu", word_timestamps=True)
    assert found.text == " three one four one five nine two six"
    assert len(found.words) == 8


def test_a_model_that_does_not_transcribe_is_told_so(monkeypatch):
    monkeypatch.setattr(doors, "pipeline", lambda *args, **kwargs: SimpleNamespace(model=Mute()))
    with pytest.raises(InputError, match="model is a Mute, which has no transcribe"):
        transcribe_anything("talk.wav", model=Mute())


class Mute:
    """A model of another family, as far as the door can see."""


def test_a_list_gives_a_list_and_each_what_it_gives_alone(transcribe):
    waves = [sound(1.3, 1), sound(0.2, 2), sound(0.9, 3), np.zeros(0, dtype=np.float32)]
    together = transcribe(waves, batch_size=2)
    assert [one.text for one in together] == [transcribe(wave).text for wave in waves]
    assert together[3].text == ""
    assert together[3].segments == ()
    assert isinstance(transcribe([waves[1]]), list)


def test_text_before_a_window_is_its_prompt(transcribe, prompts):
    found = transcribe(sound(1.3), initial_prompt="w20 w21")
    assert prompts[0] == [[76, 20, 21, *START]]
    first = [segment for segment in found.segments if segment.seek == 0]
    past = [t for one in first for t in without_closing_pair(torch.tensor(one.tokens), BEGIN).tolist()]
    assert prompts[1] == [[76, *[20, 21, *past][-15:], *START]]
    prompts.clear()
    transcribe(sound(1.3), initial_prompt="w20 w21", condition_on_previous_text=False)
    assert prompts[0] == [[76, 20, 21, *START]]
    assert all(rows == [START] for rows in prompts[1:])
    prompts.clear()
    transcribe(
        sound(1.3),
        initial_prompt="w20 w21",
        carry_initial_prompt=True,
        hotwords="w30",
        condition_on_previous_text=False,
    )
    assert all(rows == [[76, 30, 20, 21, *START]] for rows in prompts)


def test_a_hot_window_makes_the_next_one_forget_the_prompt_too(transcribe, prompts):
    torch.manual_seed(0)
    transcribe(sound(1.3), initial_prompt="w20 w21", temperature=0.6, best_of=1)
    assert prompts[0] == [[76, 20, 21, *START]]
    assert all(rows == [START] for rows in prompts[1:])


def test_the_ladder_is_climbed_for_text_that_compresses_too_well(transcribe):
    torch.manual_seed(0)
    found = transcribe(sound(0.4), temperature=(0.0, 1.0), compression_ratio_threshold=0.0, logprob_threshold=None)
    assert {segment.temperature for segment in found.segments} == {1.0}
    text = "".join(segment.text for segment in found.segments if segment.seek == 0).strip()
    kept = transcribe(sound(0.4), temperature=(0.0, 1.0), logprob_threshold=-50.0, compression_ratio_threshold=50.0)
    assert {segment.temperature for segment in kept.segments} == {0.0}
    assert text


def test_checks_are_the_models_own_where_it_has_some(transcribe, talker, prompts):
    options = {"initial_prompt": "w20 w21"}
    transcribe(sound(1.0), **options)
    assert len(prompts[1][0]) > len(START), "openai-whisper has the text before a window as its prompt"
    prompts.clear()
    talker.generation_config.condition_on_prev_tokens = False
    transcribe(sound(1.0), **options)
    assert all(rows == [START] for rows in prompts[1:])
    talker.generation_config.logprob_threshold = 0.0
    assert {one.temperature for one in transcribe(sound(0.4), temperature=(0.0, 0.1)).segments} == {0.1}
    # None switches a check off, whatever the model says.
    loose = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}
    assert {one.temperature for one in transcribe(sound(0.4), temperature=(0.0, 0.1), **loose).segments} == {0.0}


def test_the_likeliest_text_stands_where_that_is_asked_for(transcribe):
    options = {"temperature": (0.0, 1.0), "logprob_threshold": 0.0, "no_speech_threshold": None}
    torch.manual_seed(1)
    last = transcribe(sound(0.4), **options)
    torch.manual_seed(1)
    best = transcribe(sound(0.4), keep_best=True, **options)
    assert last.segments[0].temperature == 1.0
    assert best.segments[0].temperature == 0.0
    assert best.segments[0].avg_logprob > last.segments[0].avg_logprob


def test_only_clips_are_heard(transcribe):
    found = transcribe(sound(2.0), clip_timestamps="0.3,0.5,1.2,1.5")
    assert found.segments
    for segment in found.segments:
        assert 30 <= segment.seek < 50 or 120 <= segment.seek < 150
    assert transcribe(sound(2.0), clip_timestamps=[5.0, 9.0]).text == ""
    until_the_end = transcribe(sound(0.8), clip_timestamps=[0.5])
    assert {segment.seek >= 50 for segment in until_the_end.segments} == {True}


def test_a_clip_that_ends_after_the_recording_ends_with_it(transcribe):
    assert transcribe(sound(0.7), clip_timestamps="0,100").text == transcribe(sound(0.7)).text


def test_windows_follow_one_another_without_timestamps(transcribe):
    words = [*range(9), *range(75, 100)]
    found = transcribe(sound(1.0), without_timestamps=True, no_speech_threshold=None, suppress_tokens=words)
    assert [segment.seek for segment in found.segments] == [0, 40, 80]
    assert [(segment.start, segment.end) for segment in found.segments] == [(0.0, 0.4), (0.4, 0.8), (0.8, 1.0)]
    assert all(max(segment.tokens) < BEGIN for segment in found.segments)


def test_tokens_can_be_forbidden(transcribe, talker):
    talker.generation_config.suppress_tokens = [40]
    found = transcribe(sound(1.0), suppress_tokens="-1,41")
    used = {token for segment in found.segments for token in segment.tokens}
    assert not used & {3, 7, 8, 40, 41, 75, 76, 77, 78}
    with pytest.raises(GenerationError, match="suppress_tokens='four'"):
        transcribe(sound(0.4), suppress_tokens="four")


def test_the_first_timestamp_can_be_limited(transcribe, talker):
    assert all(segment.start - segment.seek / 100 <= 0.1 + 1e-9 for segment in transcribe(sound(0.4)).segments[:1])
    zero = transcribe(sound(1.3), max_initial_timestamp=0.0)
    firsts = {segment.seek: segment.tokens[0] for segment in reversed(zero.segments)}
    assert set(firsts.values()) == {BEGIN}
    talker.generation_config.max_initial_timestamp_index = None
    assert transcribe(sound(0.4)).segments == transcribe(sound(0.4), max_initial_timestamp=None).segments


def test_segments_are_told_as_they_come(transcribe, caplog):
    with caplog.at_level(logging.INFO, logger="audiomm.transcribe"):
        found = transcribe(sound(0.9), verbose=True)
    assert len(caplog.messages) == len(found.segments)
    assert found.segments[0].text.strip() in caplog.messages[0]


@pytest.mark.parametrize("beams", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_and_words_are_inside_the_recording_and_in_order(transcribe, talker, beams, dtype):
    talker.to(dtype)
    waves = [sound(1.11 + seed / 7, seed) for seed in range(3)]
    for found in transcribe(waves, beam_size=beams, word_timestamps=True, no_speech_threshold=None):
        assert found.words
        times = [0.0, *(time for segment in found.segments for time in (segment.start, segment.end))]
        assert times == sorted(times)
        assert times[-1] <= found.duration_seconds
        spoken = [0.0, *(time for word in found.words for time in (word.start, word.end))]
        assert all(earlier <= later for earlier, later in itertools.pairwise(spoken))
        assert spoken[-1] <= found.duration_seconds
        assert all(0 <= word.probability <= 1 for word in found.words)
        assert "".join(word.text for word in found.words) == found.text


def test_a_compiled_model_gives_the_same_words(transcribe, talker):
    expected = transcribe(sound(0.7), word_timestamps=True)
    # As the command line compiles, with the backend that needs no compiler.
    talker.get_encoder().compile(backend="eager")
    talker.get_decoder().compile(backend="eager", dynamic=True)
    found = transcribe(sound(0.7), word_timestamps=True)
    assert expected.words
    assert found.text == expected.text
    assert [(w.text, w.start, w.end) for w in found.words] == [(w.text, w.start, w.end) for w in expected.words]
    # Compiled, the encoder is walked layer by layer; uncompiled it runs straight, and sums round in another order.
    wanted = [word.probability for word in expected.words]
    assert [word.probability for word in found.words] == pytest.approx(wanted, rel=1e-5)


def test_marks_join_the_words_they_are_told_to(transcribe):
    joined = transcribe(sound(0.9), word_timestamps=True)
    apart = transcribe(sound(0.9), word_timestamps=True, prepend_punctuations="", append_punctuations="")
    assert joined.text == apart.text
    assert len(apart.words) >= len(joined.words)


def test_an_english_only_model_is_told_neither_language_nor_task(transcribe, talker):
    talker.generation_config.is_multilingual = False
    assert transcribe(sound(0.4), language="English").text
    with pytest.raises(GenerationError, match="English-only"):
        transcribe(sound(0.4), language="de")
    with pytest.raises(GenerationError, match="English-only"):
        transcribe(sound(0.4), task="translate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2.0}, "patience=2.0 is for searches"),
        ({"carry_initial_prompt": True}, "needs an initial_prompt"),
        ({"clip_timestamps": "3,2"}, "clip_timestamps='3,2': seconds"),
        ({"clip_timestamps": "a"}, "clip_timestamps='a': expected seconds"),
        ({"processor": None}, "does not know where it was loaded from"),
        ({"hallucination_silence_threshold": 1.0}, "needs word_timestamps=True"),
        ({"hallucination_silence_threshold": -1.0, "word_timestamps": True}, "seconds of at least 0"),
        ({"colour": 3}, "'colour' is neither"),
    ],
)
def test_arguments_that_cannot_be_are_named(transcribe, options, message):
    with pytest.raises(GenerationError, match=message):
        transcribe(sound(0.4), **options)
