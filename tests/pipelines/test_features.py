"""Features of long recordings that are computed when they are read."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from audiomm import WhisperFeatureExtractor, pipeline
from audiomm.base.errors import NonFiniteAudioError
from audiomm.media import load_audio
from audiomm.pipelines import features as features_module
from audiomm.pipelines import speech_recognition
from audiomm.pipelines.features import FeaturesAhead, RecordingFeatures, as_pcm

RATE = 16000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=80, chunk_length=2)


def recording(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that gets louder and falls silent, so that the loudest value of most stretches is not that of the whole."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(round(seconds * RATE)) * np.linspace(1e-6, 0.3, round(seconds * RATE)) ** 2
    samples[len(samples) // 3 : len(samples) // 2] = 0
    return samples.astype(np.float32)


@pytest.mark.parametrize("seconds", [2.013, 5.0, 7.7712])
def test_a_stretch_has_the_features_that_it_has_in_the_whole(
    extractor: WhisperFeatureExtractor, seconds: float
) -> None:
    samples = recording(seconds)
    whole = extractor(
        samples, sampling_rate=RATE, truncation=False, padding="longest", return_tensors="pt",
        return_attention_mask=True,
    )  # fmt: skip
    features = RecordingFeatures(extractor, [samples], True, CPU, torch.float32)
    assert features.shape == whole["input_features"].shape
    assert torch.equal(features.mask, whole["attention_mask"])
    for start, stop in ((0, 200), (1, 150), (37, 237), (features.shape[2] - 120, features.shape[2]), (0, 10**6)):
        found = features[0:1, :, start:stop]
        torch.testing.assert_close(found, whole["input_features"][:, :, start:stop], atol=2e-6, rtol=0)


def test_rows_do_not_depend_on_each_other_and_end_in_zeros(extractor: WhisperFeatureExtractor) -> None:
    short, long = recording(3.0), recording(5.0, seed=1)
    features = RecordingFeatures(extractor, [short, long], True, CPU, torch.float32)
    alone = RecordingFeatures(extractor, [short], True, CPU, torch.float32)
    assert features.shape == (2, 80, 500)
    assert features.mask.sum(dim=1).tolist() == [300, 500]
    assert torch.equal(features[0:1, :, 100:300], alone[0:1, :, 100:300])
    assert not features[0:1, :, 300:500].any()
    assert features[0:2, :, 250:260].shape == (2, 80, 10)


def test_windows_are_padded_with_silence_as_ever(extractor: WhisperFeatureExtractor) -> None:
    clips = [recording(1.5), recording(2.0), recording(0.123)]
    features = RecordingFeatures(extractor, clips, False, CPU, torch.float32)
    expected = extractor(clips, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    torch.testing.assert_close(features[0:3, :, :], expected["input_features"], atol=1e-6, rtol=0)
    assert torch.equal(features.mask, expected["attention_mask"])


def test_what_is_read_has_the_models_type(extractor: WhisperFeatureExtractor) -> None:
    features = RecordingFeatures(extractor, [recording(3.0)], True, CPU, torch.bfloat16)
    assert features[0:1, :, 0:200].dtype == torch.bfloat16
    assert features.dim() == 3


# ---------------------------------------------------------------------- made ahead, as on a GPU


def sixteen_bits(samples: np.ndarray) -> np.ndarray:
    return (np.round(samples * 2**15) / 2**15).astype(np.float32)


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_long_recordings_made_ahead_are_those_made_when_they_are_read(
    extractor: WhisperFeatureExtractor, whole_numbers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_WINDOWS_AT_ONCE", 1)
    clips = [recording(7.7712), recording(5.0, seed=1)]
    if whole_numbers:
        clips = [sixteen_bits(clip) for clip in clips]
    lazy = RecordingFeatures(extractor, clips, True, CPU, torch.float32)
    ahead = FeaturesAhead(extractor, clips, True, CPU, torch.float32)
    for features in (lazy, ahead):
        assert features.append(clips[0][::-1].copy()) == 777
    for row in range(3):
        for start, stop in ((0, 200), (1, 150), (437, 637), (0, 10**6)):
            window = (slice(row, row + 1), slice(None), slice(start, stop))
            torch.testing.assert_close(ahead[window], lazy[window], atol=2e-6, rtol=0)


def test_windows_made_ahead_in_groups_are_those_made_when_they_are_read(
    extractor: WhisperFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "_WINDOWS_AT_ONCE", 2)
    clips = [recording(1.5), sixteen_bits(recording(2.0, seed=1)), recording(0.123)]
    lazy = RecordingFeatures(extractor, clips, False, CPU, torch.bfloat16)
    ahead = FeaturesAhead(extractor, clips, False, CPU, torch.bfloat16)
    assert torch.equal(ahead[0:3, :, :], lazy[0:3, :, :])
    assert torch.equal(ahead[2:3, :, 50:], lazy[2:3, :, 50:])
    assert torch.equal(ahead.mask, lazy.mask)


def test_rows_made_ahead_are_forgotten_when_they_are_dropped(extractor: WhisperFeatureExtractor) -> None:
    features = FeaturesAhead(extractor, [recording(3.0), recording(4.0)], True, CPU, torch.float32)
    kept = features[1:2, :, 0:200]
    features.drop(0)
    with pytest.raises(KeyError):
        features[0:1, :, 0:200]
    assert torch.equal(features[1:2, :, 0:200], kept)


def test_what_fails_while_features_are_made_is_told_when_they_are_read(extractor: WhisperFeatureExtractor) -> None:
    broken = recording(3.0)
    broken[7] = np.nan
    features = FeaturesAhead(extractor, [broken], True, CPU, torch.float32)
    with pytest.raises(NonFiniteAudioError, match="sample 7 is nan"):
        features[0:1, :, 0:200]


def test_samples_travel_as_int16_where_that_holds_them_all() -> None:
    loud = np.array([-1.0, 32767 / 32768, 0.0, 0.25], np.float32)
    found = as_pcm(loud)
    assert found.dtype == np.int16
    assert found.tolist() == [-32768, 32767, 0, 8192]
    between, full = np.append(loud, np.float32(1e-5)), np.append(loud, np.float32(1.0))
    late = np.append(np.zeros(20000, np.float32), np.float32(0.1))
    for samples in (between, full, late):
        assert as_pcm(samples) is samples


def test_a_gpu_makes_features_ahead_and_a_processor_does_not(
    extractor: WhisperFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, torch.device]] = []
    for name in ("FeaturesAhead", "RecordingFeatures"):
        monkeypatch.setattr(features_module, name, lambda *args, name=name: made.append((name, args[3])))
    for device in (torch.device("cuda", 1), CPU):
        features_module.recording_features(extractor, [], True, device, torch.float32)
    assert made == [("FeaturesAhead", torch.device("cuda", 1)), ("RecordingFeatures", CPU)]


class Streams:
    """Stands for a stream of a GPU, and notes in order what happens to streams."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def record_event(self) -> str:
        self.seen.append("made")
        return "event"

    def wait_event(self, event: str) -> None:
        self.seen.append(f"wait for {event}")


def test_the_reading_stream_waits_for_what_another_stream_makes_from_pinned_samples(
    extractor: WhisperFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(streams.seen.append("enter")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: streams.seen.append("keep"))
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self: streams.seen.append(f"pin {self.dtype}") or self
    )  # fmt: skip
    clip = sixteen_bits(recording(3.0))
    features = FeaturesAhead(extractor, [clip], True, CPU, torch.float32)
    wanted = features[0:1, :, 100:300]
    features._stream = streams  # type: ignore[assignment]
    features.append(clip)
    assert torch.equal(features[1:2, :, 100:300], wanted)
    assert streams.seen == ["enter", "pin torch.int16", "made", "wait for event", "keep"]


def test_a_pipeline_hears_the_same_from_features_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one recording side by side, and recordings that take the rows of others."""
    files = sorted((Path(__file__).parents[2] / "examples" / "audio").glob("*.flac"))[:3]
    pipe = pipeline("automatic-speech-recognition", device="cpu")
    clips = [load_audio(file, RATE) for file in files]
    long = [np.concatenate(clips * (2 + place))[: (31 + 4 * place) * RATE] for place in range(3)]
    options = {"return_timestamps": True, "generate_kwargs": {"max_new_tokens": 40}}
    calls = [lambda: pipe(long[2], batch_size=2, **options), lambda: pipe(long, batch_size=2, **options)]
    wanted = [call() for call in calls]
    made: list[FeaturesAhead] = []

    def ahead(*arguments: object) -> FeaturesAhead:
        made.append(FeaturesAhead(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(speech_recognition, "recording_features", ahead)
    assert [call() for call in calls] == wanted
    assert len(made) == 2
    assert all(len(one["chunks"]) > 1 for one in (wanted[0], *wanted[1]))
