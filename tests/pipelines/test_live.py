"""Streams: segments as they are decided, and words of live samples that never change once they are out."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm.base.errors import InputError, NonFiniteAudioError, SampleRateError
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.base.transcript import Segment, Transcript, Word
from audiomm.pipelines import pipeline
from audiomm.pipelines.live import LiveTranscriber, LiveUpdate

AUDIO = Path(__file__).parents[2] / "examples" / "audio"
RATE = 16000

needs_model = pytest.mark.skipif(
    not (BUNDLED_MODELS["audiomm/whisper-commands"] / "config.json").is_file(), reason="the bundled model is missing"
)


def chunks(samples: Any, seconds: float, rate: int = RATE) -> Any:
    size = round(seconds * rate)
    return (samples[start : start + size] for start in range(0, len(samples), size))


class Ear:
    """Hears the word " n" where the level is n tenths for at least 0.2 s; one that is cut off is heard wrongly."""

    feature_extractor = SimpleNamespace(sampling_rate=RATE, n_samples=30 * RATE)

    def __init__(self, jitter: float = 0.0, mishears: bool = True) -> None:
        self.heard_seconds: list[float] = []
        self.jitter, self.mishears = jitter, mishears
        self.random = np.random.default_rng(0)

    def transcribe(self, inputs: dict[str, Any], **_: Any) -> Transcript:
        samples = inputs["array"]
        self.heard_seconds.append(len(samples) / RATE)
        level = np.round(samples * 10).astype(int)
        edges = np.flatnonzero(np.diff(level, prepend=0, append=0))
        words = []
        for start, end in itertools.pairwise(edges):
            if level[start] and end - start >= RATE // 5:
                move = self.random.uniform(-self.jitter, self.jitter)
                cut_off = self.mishears and end == len(samples)
                text = " x" if cut_off else f" {level[start]}"
                words.append(Word(text, max(start / RATE + move, 0), min(end / RATE + move, len(samples) / RATE)))
        text = "".join(word.text for word in words)
        return Transcript(text, (Segment(text, 0.0, 1.0, words=tuple(words)),) if words else (), "en")


def levels(seed: int, count: int, pauses: tuple[float, float]) -> tuple[np.ndarray, list[str]]:
    """Stretches of constant level with pauses, and the words that they are."""
    rng = np.random.default_rng(seed)
    pieces, words = [np.zeros(RATE // 3, np.float32)], []
    for _ in range(count):
        level = int(rng.integers(1, 8))
        words.append(str(level))
        pieces.append(np.full(round(rng.uniform(0.3, 0.7) * RATE), level / 10, np.float32))
        pieces.append(np.zeros(round(rng.uniform(*pauses) * RATE), np.float32))
    return np.concatenate(pieces), words


@pytest.mark.parametrize("pauses", [(0.05, 0.2), (0.1, 2.0), (3.0, 4.0)])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_everything_is_heard_once_with_pauses_of_any_length(pauses: tuple[float, float], jitter: float) -> None:
    for seed in range(3):
        samples, words = levels(seed, 40, pauses)
        ear = Ear(jitter)
        live = LiveTranscriber(ear)
        updates = list(live.listen(chunks(samples, 0.5)))
        assert live.transcript.text.split() == words
        assert "".join(update.text for update in updates) == live.transcript.text
        assert max(ear.heard_seconds) <= 15.0
        said = [word for update in updates for word in update.words]
        assert all(before.end <= after.start <= after.end for before, after in itertools.pairwise(said))
        assert said[-1].end <= len(samples) / RATE + 0.3


def test_any_cutting_of_a_stream_gives_the_same_updates() -> None:
    samples, _ = levels(7, 40, (0.1, 0.9))
    found = [list(LiveTranscriber(Ear()).listen(chunks(samples, size))) for size in (0.1, 0.37, 1.0, 1e3)]
    assert found[0] == found[1] == found[2] == found[3]


def test_words_come_soon_after_they_were_said() -> None:
    samples, _ = levels(3, 30, (0.1, 0.4))
    live = LiveTranscriber(Ear())
    for update in live.listen(chunks(samples, 0.25)):
        for word in update.words:
            assert update.seconds - word.end <= 3.0


def test_what_may_change_is_shown_and_does_not_count() -> None:
    samples = np.concatenate(
        [np.full(RATE, 0.2, np.float32), np.full(RATE, 0.3, np.float32), np.zeros(RATE, np.float32)]
    )
    live = LiveTranscriber(Ear())
    updates = live.push(samples)
    assert [(update.text, update.pending) for update in updates] == [("", " x"), ("", " 2 x"), (" 2 3", "")]
    assert live.finish() == LiveUpdate((), "", 3.0)


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "tensor", "8 kHz", "44.1 kHz"])
def test_samples_of_any_type_and_rate_are_heard_alike(kind: str) -> None:
    samples, words = levels(1, 12, (0.2, 0.5))
    rate = {"8 kHz": 8000, "44.1 kHz": 44100}.get(kind, RATE)
    if rate != RATE:
        places = (np.arange(len(samples) * rate // RATE) * RATE / rate).astype(int)
        samples = samples[places]
    forms = {"float64": samples.astype(np.float64), "int16": np.round(samples * 32768).astype(np.int16),
             "tensor": torch.from_numpy(samples)}  # fmt: skip
    found = []
    for size in (0.1, 0.37, 99.0):
        live = LiveTranscriber(Ear(mishears=False), sampling_rate=rate)
        list(live.listen(chunks(forms.get(kind, samples), size, rate)))
        found.append(live.transcript)
    assert found[0] == found[1] == found[2]
    assert found[0].text.split() == words


def test_silence_is_not_listened_to() -> None:
    ear = Ear()
    live = LiveTranscriber(ear)
    updates = list(live.listen(chunks(np.zeros(20 * RATE, np.float32), 0.1)))
    assert (live.transcript.text, live.transcript.segments, ear.heard_seconds) == ("", (), [])
    assert updates[-1].seconds == 20.0


def test_wrong_streams_are_named() -> None:
    live = LiveTranscriber(Ear())
    with pytest.raises(InputError, match="mono samples"):
        live.push(np.zeros((2, 100), np.float32))
    with pytest.raises(NonFiniteAudioError, match="sample 3"):
        live.push(np.array([0, 0, 0, np.nan], np.float32))
    live.finish()
    with pytest.raises(InputError, match="is finished"):
        live.push(np.zeros(9, np.float32))
    for wrong in ({"step_seconds": 0}, {"step_seconds": 99}, {"memory_seconds": 1}, {"memory_seconds": 30}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            LiveTranscriber(Ear(), **wrong)
    with pytest.raises(SampleRateError, match="sampling_rate=5"):
        LiveTranscriber(Ear(), sampling_rate=5)


# ---------------------------------------------------------------------- the pipeline's stream


@pytest.fixture(scope="module")
def digits() -> Any:
    return pipeline("automatic-speech-recognition", device="cpu", num_beams=1)


@needs_model
def test_segments_of_a_file_come_while_the_rest_waits(digits: Any) -> None:
    samples = np.concatenate([soundfile.read(AUDIO / "pi.flac", dtype="float32")[0]] * 6)
    whole = digits.transcribe(samples, return_timestamps=True)
    windows = []
    stream = digits.stream(samples, monitor_progress=lambda done: windows.append(int(done[0, 0])))
    first = next(stream)
    assert windows == [0]
    assert (first, *stream) == whole.segments
    assert len(windows) >= 2


@needs_model
def test_a_stream_of_a_file_may_have_words_and_leave_silence_out(digits: Any) -> None:
    quiet = np.zeros(8 * RATE, np.float32)
    samples = np.concatenate([quiet, soundfile.read(AUDIO / "two_voices.flac", dtype="float32")[0], quiet])
    options = {"vad_filter": True, "return_timestamps": "word"}
    assert tuple(digits.stream(samples, **options)) == digits.transcribe(samples, **options).segments
    assert list(digits.stream(quiet, **options)) == []


@needs_model
def test_the_words_of_a_live_stream_do_not_depend_on_how_it_is_cut(digits: Any) -> None:
    samples = soundfile.read(AUDIO / "two_voices.flac", dtype="float32")[0][: 4 * RATE]
    found = [list(digits.stream(chunks(samples, size))) for size in (0.37, 99.0)]
    assert found[0] == found[1]
    assert "".join(segment.text for segment in found[0]).split()[:3] == ["seven", "two", "four"]
    assert found[0][0].start < 1.0


def test_arguments_that_a_stream_does_not_have_are_named(pipe: Any, make_sound: Any) -> None:
    with pytest.raises(InputError, match="chunk_length_s=10"):
        pipe.stream(make_sound(3, 1), chunk_length_s=10)
    with pytest.raises(InputError, match="sampling_rate=8000 is for an iterator"):
        pipe.stream(make_sound(3, 1), sampling_rate=8000)
