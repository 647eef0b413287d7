"""One long recording heard in windows side by side: where it is cut, and that no word is lost or doubled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm.base.errors import InputError
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.base.transcript import Segment, Word
from audiomm.pipelines import pipeline
from audiomm.pipelines.seams import join_windows
from audiomm.pipelines.windows import plan_windows

AUDIO = Path(__file__).parents[2] / "examples" / "audio"
RATE = 16000
LENGTH = 30 * RATE


def tone(seconds: float) -> np.ndarray:
    return 0.3 * np.sin(np.arange(round(seconds * RATE)) / 7).astype(np.float32)


def spoken(seed: int, seconds: float, pauses: tuple[float, float]) -> np.ndarray:
    """Sounds of 0.2 to 2 s with pauses between them, over a little noise."""
    rng = np.random.default_rng(seed)
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < seconds * RATE:
        pieces += [tone(rng.uniform(0.2, 2.0)), np.zeros(round(rng.uniform(*pauses) * RATE), np.float32)]
    samples = np.concatenate(pieces)[: round(seconds * RATE)]
    return samples + 0.001 * rng.standard_normal(len(samples)).astype(np.float32)


@pytest.mark.parametrize("seed", range(12))
def test_windows_cover_everything_and_are_cut_in_pauses(seed: int) -> None:
    samples = spoken(seed, 31 + 17.3 * seed, (0.2, 3.0))
    windows = plan_windows(samples, RATE, LENGTH)
    assert (windows[0].start, windows[-1].end) == (0, len(samples))
    assert all(window.end - window.start <= LENGTH for window in windows)
    for before, after in itertools.pairwise(windows):
        assert (before.right, after.left) == (0, 0)
        assert before.end == after.start
        around = samples[before.end - RATE // 20 : before.end + RATE // 20]
        assert np.abs(around).max() < 0.02, "a sound is cut"


@pytest.mark.parametrize("background", [0.0, 0.001])
def test_silence_is_cut_into_whole_windows(background: float) -> None:
    samples = np.full(95 * RATE, 0, np.float32) + np.float32(background) * np.float32(0.5)
    assert [window.end / RATE for window in plan_windows(samples, RATE, LENGTH)] == [30, 60, 90, 95]


def test_sound_without_a_pause_is_shared_by_two_windows() -> None:
    windows = plan_windows(tone(70), RATE, LENGTH)
    assert [(w.start / RATE, w.end / RATE, w.left / RATE, w.right / RATE) for w in windows] == [
        (0, 30, 0, 5), (20, 50, 5, 5), (40, 70, 5, 0),
    ]  # fmt: skip


def test_a_short_recording_is_one_window() -> None:
    assert len(plan_windows(tone(30), RATE, LENGTH)) == 1


@pytest.fixture
def ears(pipe: Any) -> Any:
    """A pipeline whose model hears each sound once, however its window lies."""

    def sounds(row: torch.Tensor) -> list[float]:
        rises = torch.diff((row > 0.4).int(), prepend=torch.zeros(1, dtype=torch.int)) == 1
        return [round(float(frame) / 100, 2) for frame in rises.nonzero()[:, 0]]

    def segment(second: float) -> dict[str, Any]:
        times = {"start": torch.tensor(second), "end": torch.tensor(second + 1)}
        return {**times, "tokens": torch.tensor([1]), "token_timestamps": torch.tensor([second])}

    pipe.model._sounds, pipe.model._segment = sounds, segment
    return pipe


def starts(found: Any) -> Any:
    return pytest.approx([one.start for one in found], abs=0.03)


@pytest.mark.parametrize("seed", range(8))
def test_windows_are_heard_together_and_no_sound_is_lost_or_doubled(ears: Any, make_sound: Any, seed: int) -> None:
    loud = np.cumsum(np.random.default_rng(seed).choice([2, 3, 5, 9], size=40)).tolist()
    samples = make_sound(loud[-1] + 4, *loud)
    together = ears.transcribe(samples, batch_size=3)
    call = ears.model.calls[-1]
    assert (len(ears.model.calls), call["batch_size"]) == (1, 3)
    assert call["shape"][0] >= 5
    assert starts(together.segments) == loud
    assert together.duration_seconds == loud[-1] + 4
    assert starts(ears.transcribe([samples], batch_size=3)[0].segments) == loud
    words = ears(samples, batch_size=2, return_timestamps="word")["chunks"]
    assert [word["timestamp"][0] for word in words] == pytest.approx(loud, abs=0.03)


def test_a_recording_of_one_window_is_heard_as_ever(pipe: Any, make_sound: Any) -> None:
    samples = make_sound(20, 3, 9)
    assert pipe(samples, batch_size=4, return_timestamps=True) == pipe(samples, return_timestamps=True)


def test_windows_of_what_a_filter_left_go_back_to_the_recording(ears: Any, make_sound: Any) -> None:
    loud = [5, 20, 33, 47, 61, 75, 88]
    found = ears.transcribe(make_sound(100, *loud), batch_size=2, clip_timestamps="15,95")
    assert starts(found.segments) == loud[1:]
    assert found.duration_seconds == 100
    assert ears.model.calls[-1]["shape"][0] >= 3


def test_windows_side_by_side_have_no_text_before_them(pipe: Any, make_sound: Any) -> None:
    with pytest.raises(InputError, match="condition_on_prev_tokens=True goes through a recording window by window"):
        pipe(make_sound(40, 1), batch_size=2, condition_on_prev_tokens=True)
    assert pipe(make_sound(40, 1), condition_on_prev_tokens=True)["text"] == " w1"


# ---------------------------------------------------------------------- seams


def window(words: list[tuple[str, float]]) -> list[Segment]:
    timed = tuple(Word(f" {text}", start, start + 0.4) for text, start in words)
    return [Segment("".join(word.text for word in timed), timed[0].start, timed[-1].end, words=timed)]


def test_words_that_two_windows_heard_are_written_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        said = [(str(rng.choice(list("abcde"))), at * 0.7 + float(rng.uniform(0, 0.2))) for at in range(100)]
        parts, shared = [], []
        for start in (0, 20, 40):
            shifted = [(text, time + float(rng.uniform(-0.15, 0.15))) for text, time in said]
            heard = [shifted[at] for at, (_, time) in enumerate(said) if start <= time < start + 29.5]
            # What stands at the very edge of a window is often misheard.
            heard[-1] = ("x", heard[-1][1])
            heard[0] = ("y", heard[0][1]) if start else heard[0]
            parts.append(window(heard))
            shared.append((start + 20.0, start + 30.0))
        joined = [word for segment in join_windows(parts, shared[:-1]) for word in segment.words or ()]
        assert [word.text.strip() for word in joined][:-1] == [text for text, time in said if time < 69.5][:-1]
        assert all(before.end <= after.start for before, after in itertools.pairwise(joined))


def test_windows_with_nothing_in_common_are_each_believed_on_their_side() -> None:
    left, right = window([("a", 21), ("b", 23), ("c", 28)]), window([("d", 22), ("e", 26), ("f", 29)])
    joined = join_windows([left, right], [(20, 30)])
    assert "".join(segment.text for segment in joined) == " a b e f"
    assert [(segment.start, segment.end) for segment in joined] == [(21, 23.4), (26, 29.4)]


def test_a_window_without_words_takes_nothing_from_its_neighbours() -> None:
    assert [segment.text for segment in join_windows([window([("a", 21)]), [], window([("b", 45)])],
                                                     [(20, 30), (40, 50)])] == [" a", " b"]  # fmt: skip


# ---------------------------------------------------------------------- the bundled model


@pytest.mark.skipif(
    not (BUNDLED_MODELS["audiomm/whisper-commands"] / "config.json").is_file(), reason="the bundled model is missing"
)
def test_digits_side_by_side_are_those_one_after_the_other() -> None:
    rng = np.random.default_rng(5)
    names = [str(rng.choice(["pi", "phone_number", "two_voices"])) for _ in range(7)]
    pieces = [
        part
        for name in names
        for part in (soundfile.read(AUDIO / f"{name}.flac", dtype="float32")[0],
                     np.zeros(round(rng.uniform(0.1, 0.9) * RATE), np.float32))
    ]  # fmt: skip
    samples = np.concatenate(pieces)
    pipe = pipeline("automatic-speech-recognition", device="cpu", num_beams=1)
    together, alone = (pipe.transcribe(samples, batch_size=size, return_timestamps=True) for size in (3, 1))
    assert together.text.split() == alone.text.split()
    times = [time for segment in together.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert times[-1] <= len(samples) / RATE
