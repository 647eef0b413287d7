"""Where something is said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from audiomm import InputError
from audiomm.media.speech import SpeechClock, SpeechOptions, energy_spans, join, silero_detector, speech_spans

RATE = 16000
TIGHT = SpeechOptions(min_silence_duration_ms=100, speech_pad_ms=0)


def tone(seconds: float, level: float = 0.3) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * 220 * time)).astype(np.float32)


def noise(seconds: float, level: float) -> np.ndarray:
    return (level * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def recording(*parts: tuple[str, float], background: float = 0.001) -> np.ndarray:
    samples = np.concatenate(
        [tone(s) if kind == "speech" else np.zeros(round(s * RATE), np.float32) for kind, s in parts]
    )
    return samples + noise(len(samples) / RATE, background)[: len(samples)]


@pytest.mark.parametrize("background", [0.0001, 0.001, 0.02])
def test_spans_are_found_to_a_few_frames(background):
    samples = recording(
        ("pause", 1.0), ("speech", 0.6), ("pause", 0.8), ("speech", 0.4), ("pause", 1.2), background=background
    )
    found = [(start / RATE, end / RATE) for start, end in speech_spans(samples, RATE, TIGHT)]
    assert found == [pytest.approx((1.0, 1.6), abs=0.04), pytest.approx((2.4, 2.8), abs=0.04)]


@pytest.mark.parametrize(
    "samples",
    [np.zeros(RATE), noise(3, 0.2), noise(3, 0.0005), tone(3, 0.4), np.zeros(0), np.zeros(3)],
    ids=["silence", "loud noise", "quiet noise", "hum", "nothing", "three samples"],
)  # fmt: skip
def test_steady_sounds_are_background(samples):
    assert energy_spans(samples, RATE) == []
    assert len(join(samples, [])) == 0


def test_spans_are_joined_padded_and_dropped():
    samples = recording(
        ("pause", 1), ("speech", 0.5), ("pause", 0.4), ("speech", 0.5), ("pause", 2), ("speech", 0.03), ("pause", 1)
    )
    apart = speech_spans(
        samples, RATE, SpeechOptions(min_silence_duration_ms=200, speech_pad_ms=0, min_speech_duration_ms=200)
    )
    assert len(apart) == 2
    together = speech_spans(
        samples, RATE, SpeechOptions(min_silence_duration_ms=800, speech_pad_ms=100, min_speech_duration_ms=200)
    )
    assert [(start / RATE, end / RATE) for start, end in together] == [pytest.approx((0.9, 2.5), abs=0.04)]
    # Padding does not make neighbours overlap, nor leave the recording.
    wide = speech_spans(samples, RATE, SpeechOptions(min_silence_duration_ms=200, speech_pad_ms=5000))
    assert wide[0][0] == 0
    assert wide[-1][1] == len(samples)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(wide))


def test_long_spans_are_cut_where_it_is_quiet():
    speech = tone(10)
    speech[round(3.5 * RATE) : round(3.55 * RATE)] = 0
    samples = np.concatenate([np.zeros(2 * RATE, np.float32), speech]) + noise(12, 0.001)
    spans = speech_spans(samples, RATE, SpeechOptions(speech_pad_ms=0, max_speech_duration_s=4))
    assert all(end - start <= 4 * RATE for start, end in spans)
    assert spans[0][1] / RATE == pytest.approx(5.5, abs=0.06)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


def test_the_clock_goes_back_to_the_recording():
    spans = [(RATE, 2 * RATE), (5 * RATE, 8 * RATE)]
    clock = SpeechClock(spans, RATE)
    assert len(join(np.zeros(10 * RATE, np.float32), spans)) == 4 * RATE
    assert [clock.original(at) for at in (0.0, 0.5, 1.0, 2.5, 4.0)] == [1.0, 1.5, 5.0, 6.5, 8.0]
    assert clock.original(1.0, is_end=True) == 2.0
    assert clock.original(99.0) == 8.0
    assert SpeechClock([], RATE).original(3.0) == 3.0


def test_another_detector_can_be_used():
    samples = np.zeros(4 * RATE, np.float32)
    assert speech_spans(samples, RATE, TIGHT, detector=lambda samples, rate: [(rate, 2 * rate)]) == [(RATE, 2 * RATE)]


def test_options_that_cannot_be_are_named():
    with pytest.raises(InputError, match="speech_pad_ms=-1"):
        SpeechOptions(speech_pad_ms=-1)
    with pytest.raises(InputError, match="max_speech_duration_s=0"):
        SpeechOptions(max_speech_duration_s=0)


def test_the_model_detector_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "silero_vad", None)
    with pytest.raises(ImportError, match=r"audiomm\[vad\]"):
        silero_detector()
