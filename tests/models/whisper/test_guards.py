"""What keeps imagined text out: loops, words that nobody said, and sounds that are no speech."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audiomm import pipeline
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.models.whisper.guards import Loop, find_loop, is_suspect, leave_out_imagined, without_loop
from audiomm.models.whisper.word_times import Window

BEGIN, RATE = 79, 16000

needs_model = pytest.mark.skipif(
    not (BUNDLED_MODELS["audiomm/whisper-commands"] / "model.safetensors").is_file(),
    reason="the bundled model is not in this checkout",
)

# ---------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([9, *[7] * 16], Loop(1, 1, 17)),
        ([9, *[7] * 15], None),
        ([1, 2, *[3, 4, 5] * 6, 8], Loop(2, 3, 20)),
        ([1, 2, *[3, 4, 5] * 4, 8], None),
        ([*[1, 2, 3, 4, 5, 6] * 5], Loop(0, 6, 30)),
        ([*range(40)], None),
        ([], None),
    ],
)
def test_a_loop_is_five_times_the_same_and_sixteen_tokens_long(tokens, loop):
    assert find_loop(tokens) == loop


def test_what_follows_the_first_repetition_is_cut():
    tokens = torch.tensor([BEGIN, 20, *[30, 31] * 8, BEGIN + 9, BEGIN + 9, 40, BEGIN + 12])
    kept = without_loop(tokens, BEGIN, 40)
    assert kept.tolist() == [BEGIN, 20, 30, 31, BEGIN + 9]
    open_end = torch.tensor([BEGIN, 20, *[30] * 20])
    assert without_loop(open_end, BEGIN, 40).tolist() == [BEGIN, 20, 30, BEGIN + 20]
    assert without_loop(torch.tensor([20, *[30] * 20]), BEGIN, 40).tolist() == [20, 30]
    assert without_loop(torch.tensor([BEGIN, 20, 30]), BEGIN, 40) is None


def test_segments_that_say_the_same_again_and_again_are_a_loop():
    tokens = torch.tensor([token for n in range(6) for token in (BEGIN + 2 * n, 30, 31, 32, BEGIN + 2 * n + 1)])
    assert without_loop(tokens, BEGIN, 40).tolist() == [BEGIN, 30, 31, 32, BEGIN + 1]


def repeat_one_word(model, word):
    """A model that says one word for ever, whatever it hears, at temperature 0."""
    model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight.detach().clone())

    class Say:
        def __call__(self, tokens, scores):
            scores = scores.clone()
            scores[:, word] = scores.amax() + 30
            return scores

    return [Say()]


def test_no_text_in_a_loop_is_kept(talker, heard):
    rules = repeat_one_word(talker, 40)
    options = {"language": "en", "return_segments": True, "return_timestamps": False, "max_new_tokens": 20}
    loud = talker.generate(heard(1, 40), logits_processor=rules, **options)["segments"][0][0]
    assert loud["tokens"].tolist() == [40] * 20
    broken = talker.generate(heard(1, 40), logits_processor=rules, break_loops=True, **options)["segments"][0][0]
    assert broken["tokens"].tolist() == [40]


def test_a_loop_is_a_reason_to_try_the_next_temperature(talker, heard):
    rules = repeat_one_word(talker, 40)
    options = {"language": "en", "return_segments": True, "return_timestamps": False, "max_new_tokens": 20}
    found = talker.generate(
        heard(1, 40), logits_processor=rules, temperature=(0.0, 100.0), break_loops=True, **options
    )["segments"][0][0]
    assert found["temperature"] == 100.0
    assert len(set(found["tokens"].tolist())) > 3


# ---------------------------------------------------------------------- words that nobody said


def word(start, end, probability=0.9, text=" so"):
    return {"word": text, "start": start, "end": end, "probability": probability}


@pytest.mark.parametrize(
    ("words", "suspect"),
    [
        ([word(1.0, 1.4), word(1.4, 1.8)], False),
        ([word(1.0, 1.01), word(1.01, 1.02)], True),
        ([word(1.0, 1.4, 0.1)], True),
        ([word(1.0, 1.4, 0.1), word(1.4, 1.8)], False),
        ([word(1.0, 6.1)], True),
        ([word(0.0, 0.4)] * 5 + [word(1, 1.3, 0.05)] * 3, True),
        ([word(0.0, 0.4)] * 8 + [word(1, 1.3, 0.05)] * 8, False),
    ],
)
def test_words_too_short_too_long_or_too_unlikely_are_suspect(words, suspect):
    assert is_suspect(words) is suspect


def window(*segments, offset=0, is_whole=True, advance=3000, spoken=0.0):
    made = [{"start": words[0]["start"], "end": words[-1]["end"], "words": list(words)} for words in segments]
    return Window(
        first_frame=offset, frames=3000, start_tokens=[], segments=made, frames_heard=3000, window_frames=3000,
        advance=advance, is_whole=is_whole, speech_end_seconds=spoken,
    )  # fmt: skip


GOOD = [word(1.0, 1.5), word(1.5, 2.0)]


def test_imagined_words_after_a_pause_are_left_out_and_heard_again_from_there():
    found = window(GOOD, [word(12.0, 12.01, 0.05)])
    leave_out_imagined(found, 9000, 2.0)
    assert [one["start"] for one in found.segments] == [1.0]
    assert found.advance == 1200


def test_imagined_words_at_the_end_of_the_recording_end_it():
    found = window(GOOD, [word(28.5, 28.51, 0.05)])
    leave_out_imagined(found, 3000, 2.0)
    assert [one["start"] for one in found.segments] == [1.0]
    assert found.advance == 3000


def test_silence_before_an_imagined_first_segment_is_skipped_and_the_rest_heard_again():
    found = window([word(9.0, 9.01, 0.05)], [word(10.0, 10.5)])
    leave_out_imagined(found, 9000, 2.0)
    assert found.segments == []
    assert found.advance == 900


def test_words_that_nothing_is_wrong_with_stay():
    found = window(GOOD, [word(12.0, 12.5)])
    leave_out_imagined(found, 9000, 2.0)
    assert len(found.segments) == 2
    assert found.advance == 3000
    alone = window()
    leave_out_imagined(alone, 9000, 2.0)
    assert alone.advance == 3000


def test_the_next_window_starts_after_the_last_word_where_silence_follows():
    found = window(GOOD, is_whole=False, advance=2500)
    leave_out_imagined(found, 9000, 2.0)
    assert found.advance == 200
    near = window([word(27.0, 28.5)], is_whole=False, advance=2500)
    leave_out_imagined(near, 9000, 2.0)
    assert near.advance == 3000


# ---------------------------------------------------------------------- sounds that are no speech


def hum(t: np.ndarray, g: np.random.Generator) -> np.ndarray:
    base = g.choice([50, 60])
    return sum(np.sin(2 * np.pi * base * k * t + g.uniform(0, 6)) / k for k in (1, 2, 3, 5))


def pink(t: np.ndarray, g: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(g.standard_normal(len(t))) / np.sqrt(np.arange(1, len(t) // 2 + 2))
    shaped = np.fft.irfft(spectrum, len(t))
    return shaped / shaped.std()


def chord(t: np.ndarray, g: np.random.Generator) -> np.ndarray:
    root = g.uniform(110, 330)
    return sum(np.sin(2 * np.pi * root * ratio * t) / 3 for ratio in (1, 1.26, 1.5))


def melody(t: np.ndarray, g: np.random.Generator) -> np.ndarray:
    beats = g.uniform(1.5, 3)
    notes = g.choice([220, 247, 262, 294, 330, 349, 392, 440], size=int(t[-1] * beats) + 1)
    pitch, fade = notes[(t * beats).astype(int)], np.exp(-3 * ((t * beats) % 1))
    return fade * sum(np.sin(2 * np.pi * pitch * k * t) / k for k in (1, 2, 3))


SOUNDS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "silence": lambda t, g: np.zeros(len(t)),
    "white noise": lambda t, g: g.standard_normal(len(t)),
    "pink noise": pink,
    "hum": hum,
    "a tone": lambda t, g: np.sin(2 * np.pi * g.uniform(80, 2000) * t),
    "a chord": chord,
    "a melody": melody,
    "clicks": lambda t, g: 5.0 * (g.random(len(t)) < 0.0005),
}


def clip(kind: str, seed: int) -> np.ndarray:
    g = np.random.default_rng(seed)
    t = np.arange(int(g.uniform(1, 20) * RATE)) / RATE
    return (SOUNDS[kind](t, g) * 10 ** g.uniform(-3, -0.5)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe():
    return pipeline("automatic-speech-recognition", device="cpu")


@needs_model
@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for seed, kind in enumerate([*SOUNDS, "hum", "white noise"])])
def test_sounds_that_are_no_speech_give_an_empty_transcript(pipe, kind, seed):
    assert pipe(clip(kind, seed))["text"] == ""
    assert pipe.model.transcribe(clip(kind, seed), processor=pipe).text == ""


@needs_model
def test_imagined_words_can_be_left_out_of_real_speech_without_losing_any(pipe):
    path = Path(__file__).parents[3] / "examples" / "audio" / "phone_number.flac"
    plain = pipe.model.transcribe(path, processor=pipe, word_timestamps=True)
    guarded = pipe.model.transcribe(path, processor=pipe, word_timestamps=True, hallucination_silence_threshold=2.0)
    assert guarded.text == plain.text == " five five five zero one nine eight"


@needs_model
@pytest.mark.slow
def test_two_hundred_clips_without_speech_give_no_word(pipe):
    kinds = list(SOUNDS)
    found = {}
    for seed in range(200):
        kind = kinds[seed % len(kinds)]
        for door, text in (
            ("pipeline", pipe(clip(kind, 100 + seed))["text"]),
            ("transcribe", pipe.model.transcribe(clip(kind, 100 + seed), processor=pipe).text),
        ):
            if text:
                found[door, kind, 100 + seed] = text
    assert not found
