"""The Gemma feature extractors: published numbers, an obvious twin, batches, streams, arguments, files and refusals."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
import torch

from audiomm.base.errors import (
    AudioLayoutError,
    ConfigError,
    EmptyAudioError,
    InputError,
    NonFiniteAudioError,
    SampleRateError,
)
from audiomm.feature_extraction.frame_stream import FrameStream
from audiomm.feature_extraction.raw_frames import Gemma4UnifiedAudioFeatureExtractor
from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor

BOTH = pytest.mark.parametrize("kind", [Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor])
#: A length for every phase of the padding to 128 samples and of the hops of 160, and the shortest there are.
LENGTHS = (513, 514, 640, 641, 769, 1000, 1153, 1280, 5000, 7777, 9001, 16000)


def plain_features(extractor, clip: np.ndarray) -> np.ndarray:
    """All frames of a clip padded as it is alone, one after the other, in float64 (the window too)."""
    padded = np.pad(clip.astype(np.float64), (extractor.lead, -len(clip) % 128)) * extractor.input_scale_factor
    rows = []
    for start in range(0, len(padded) - extractor.frame_length, extractor.hop_length):
        piece = padded[start : start + extractor.frame_length + 1]
        share = extractor.preemphasis
        if extractor.preemphasis_htk_flavor:
            frame = piece[:-1] - share * np.concatenate([piece[:1], piece[:-2]])
        else:
            frame = piece[1:] - share * piece[:-1]
        angles = 2 * np.pi * np.arange(len(frame)) / len(frame)
        spectrum = np.fft.rfft(frame * (0.5 - 0.5 * np.cos(angles)), extractor.fft_length)
        mel = np.abs(spectrum) @ extractor.mel_filters
        floor = extractor.mel_floor
        rows.append(
            np.log(np.maximum(mel, floor) if isinstance(extractor, Gemma3nAudioFeatureExtractor) else mel + floor)
        )
    result = np.stack(rows)
    if extractor.per_bin_mean is not None:
        result = result - np.array(extractor.per_bin_mean)
    return result if extractor.per_bin_stddev is None else result / np.array(extractor.per_bin_stddev)


def one(extractor, clip, **options) -> tuple[torch.Tensor, torch.Tensor]:
    batch = extractor(clip, return_tensors="pt", **options)
    return batch["input_features"][0], batch["input_features_mask"][0]


# ---------------------------------------------------------------------------------------------------------- numbers


def test_gemma3n_has_the_numbers_of_the_published_front_end():
    time = np.arange(20_837) / 16000
    sound = 0.4 * np.sin(2 * np.pi * 220 * time) + 0.2 * np.sin(2 * np.pi * (300 + 900 * time) * time)
    sound += 0.05 * np.sin(2 * np.pi * 3100 * time)
    batch = Gemma3nAudioFeatureExtractor()(sound.astype(np.float32), return_tensors="np")
    features = batch["input_features"]
    assert features.shape == (1, 128, 128) and batch["input_features_mask"].sum() == 128
    found = [features.mean(), features.std(), features.min(), features.max(), *features.flat[[0, 777, 4321]]]
    np.testing.assert_allclose(
        found, [-6.13652, 3.74858, -11.51293, 4.18331, -2.2887, -2.72516, -8.1284], atol=2e-5, rtol=0
    )


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preemphasis": 0.9},
        {"preemphasis": 0.9, "preemphasis_htk_flavor": False},
        {"fft_overdrive": True, "mel_floor": 0.02, "input_scale_factor": 2.5},
        {"frame_length_ms": 25.0, "hop_length_ms": 8.0, "feature_size": 40, "min_frequency": 300.0},
        {"feature_size": 4, "per_bin_mean": [1.0, 2, 3, 4], "per_bin_stddev": [0.5, 2, 1, 3]},
    ],
)
def test_every_setting_does_what_the_obvious_form_does(kind, settings, speech):
    extractor = kind(**settings)
    features, mask = one(extractor, speech[:9000])
    wanted = plain_features(extractor, speech[:9000])
    assert features.shape == wanted.shape
    np.testing.assert_allclose(features[mask], wanted[mask.numpy()], atol=2e-3, rtol=0)


def test_gemma4_sets_frames_that_are_not_real_to_zero_and_has_a_band_without_sound(speech):
    features, mask = one(Gemma4AudioFeatureExtractor(), speech[:8000], padding="max_length", max_length=16000)
    assert int(mask.sum()) == 49 and mask[:49].all() and not features[49:].any()
    np.testing.assert_allclose(features[:49, 0], np.log(1e-3), atol=1e-6)


def test_frames_of_any_length_follow_the_formulas():
    first, second = Gemma3nAudioFeatureExtractor(), Gemma4AudioFeatureExtractor()
    for samples in range(513, 480_001, 167):
        padded = -(-samples // 128) * 128
        assert first.real_frames(0, samples, first.frame_count(padded)) == range((padded - 513) // 160 + 1)
        assert second.real_frames(0, samples, second.frame_count(padded)) == range((samples - 161) // 160 + 1)


def test_samples_may_be_any_kind_of_number(speech):
    extractor = Gemma3nAudioFeatureExtractor()
    integers = (speech * 2**15).astype(np.int16)
    wanted, _ = one(extractor, integers.astype(np.float32) / 2**15)
    for same in (integers, (integers / 2**15), torch.from_numpy(integers), (integers / 2**15).tolist()):
        assert torch.equal(one(extractor, same)[0], wanted)


# ---------------------------------------------------------------------------------------------------------- batches


@BOTH
def test_a_clip_gives_the_same_in_a_batch_as_alone(kind, speech):
    extractor = kind()
    clips = [speech[:length] for length in LENGTHS]
    batch = extractor(clips, return_tensors="pt")
    for row, clip in enumerate(clips):
        features, mask = one(extractor, clip)
        real = batch["input_features_mask"][row]
        assert int(real.sum()) == int(mask.sum())
        assert torch.equal(batch["input_features"][row, : len(features)][real[: len(features)]], features[mask])
        assert not batch["input_features"][row, len(features) :].any()


def test_batch_invariance_can_be_switched_off_and_then_padding_counts(speech):
    extractor = Gemma3nAudioFeatureExtractor()
    extractor.batch_invariant = False
    batch = extractor([speech[:7777], speech[:9001]], return_tensors="pt")
    assert batch["input_features_mask"].sum(-1).tolist() == [49, 54]
    assert batch["input_features"][0, 53].max() < -11.5


@BOTH
def test_padding_at_the_left_marks_the_right_end(kind, speech):
    extractor = kind(padding_side="left")
    batch = extractor([speech[:7777], speech[:9001]], return_tensors="pt")
    mask = batch["input_features_mask"]
    assert mask[0, -1] and not mask[0, 0] and (mask[0].int().diff() >= 0).all()


@BOTH
def test_without_padding_every_clip_has_its_own_frames(kind, speech):
    batch = kind()([speech[:9000], speech[:700]], padding="do_not_pad")
    lengths = [(9000, 700), (9160, 860)][kind is Gemma4AudioFeatureExtractor]
    size = kind().frame_length + 1
    assert [len(row) for row in batch["input_features"]] == [(length - size) // 160 + 1 for length in lengths]
    assert all(mask.dtype == bool for mask in batch["input_features_mask"])


@BOTH
def test_a_long_clip_is_cut_with_a_warning_and_not_without_a_limit(kind, speech, caplog):
    extractor = kind()
    with caplog.at_level(logging.WARNING, "audiomm.feature_extraction"):
        cut, _ = one(extractor, speech, max_length=8000)
    assert "27251 samples (1.70 s)" in caplog.text and "first 8064 (0.50 s)" in caplog.text
    caplog.clear()
    for options in ({"max_length": None}, {"truncation": False, "max_length": 8000}):
        whole, mask = one(extractor, speech, **options)
        assert len(whole) > 160 and torch.equal(whole[: len(cut) - 4], cut[:-4]) and mask.sum() > 160
    assert not caplog.text


@BOTH
def test_the_mask_is_left_out_when_it_is_not_wanted(kind, speech):
    assert set(kind()(speech, return_attention_mask=False)) == {"input_features"}
    published = kind(return_attention_mask=False)
    assert "input_features_mask" in published(speech)
    assert set(published(speech, return_attention_mask=None)) == {"input_features"}


def test_dither_is_noise_of_the_given_size_and_follows_the_seed(speech):
    extractor = Gemma3nAudioFeatureExtractor(dither=0.01)
    np.random.seed(5)
    first, _ = one(extractor, np.zeros(16000, np.float32))
    np.random.seed(5)
    again, _ = one(extractor, np.zeros(16000, np.float32))
    louder, _ = one(Gemma3nAudioFeatureExtractor(dither=0.1), np.zeros(16000, np.float32))
    assert torch.equal(first, again)
    assert abs(float((louder - first).mean()) - np.log(10)) < 0.1


@BOTH
@pytest.mark.parametrize("piece", [7, 160, 1000, 20_000])
def test_a_stream_of_pieces_gives_the_frames_of_the_whole(kind, piece, speech):
    extractor = kind(preemphasis=0.97)
    speech = speech[: 400 * piece]
    wanted, mask = one(extractor, speech)
    stream = FrameStream(extractor)
    parts = [stream.push(speech[start : start + piece]) for start in range(0, len(speech), piece)]
    frames = torch.cat([*parts, stream.finish()])
    assert frames.shape == wanted[mask].shape
    torch.testing.assert_close(frames, wanted[mask], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- files


@BOTH
def test_settings_survive_a_file_and_samples_in_it_go_before_milliseconds(kind, tmp_path):
    extractor = kind(feature_size=4, frame_length_ms=25.0, per_bin_mean=[1.0, 2, 3, 4], future_key=7)
    extractor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["frame_length"] == 400 and written["hop_length"] == 160 and written["future_key"] == 7
    assert "window" not in written and "mel_filters" not in written and "batch_invariant" not in written
    again = kind.from_pretrained(tmp_path)
    assert again.to_dict() == extractor.to_dict()
    assert kind.from_pretrained(tmp_path, frame_length_ms=20.0).frame_length == 320
    assert pickle.loads(pickle.dumps(extractor)).to_dict() == extractor.to_dict()


def test_nested_statistics_of_transformers_files_are_read():
    extractor = Gemma3nAudioFeatureExtractor.from_dict({"feature_size": 2, "per_bin_mean": [[[1.0, 2.0]]]})
    assert extractor.per_bin_mean == [1.0, 2.0]


# ---------------------------------------------------------------------------------------------------------- refusals


@BOTH
def test_audio_that_cannot_be_used_is_refused(kind, speech):
    extractor = kind()
    fewest = {Gemma3nAudioFeatureExtractor: 513, Gemma4AudioFeatureExtractor: 161}[kind]
    assert one(extractor, speech[:fewest])[1].any()
    with pytest.raises(EmptyAudioError, match=f"clip 1 of 2 has {fewest - 1} samples.*at least {fewest} are needed"):
        extractor([speech, speech[: fewest - 1]])
    with pytest.raises(EmptyAudioError, match="0 samples"):
        extractor(np.zeros(0, np.float32))
    with pytest.raises(SampleRateError, match="8000"):
        extractor(speech, sampling_rate=8000)
    with pytest.raises(AudioLayoutError):
        extractor(np.stack([speech, speech], axis=1))
    with pytest.raises(NonFiniteAudioError, match="sample 3"):
        extractor(np.array([0.1, 0.2, 0.3, np.nan] * 400, np.float32))
    with pytest.raises(InputError, match="padding='always'"):
        extractor(speech, padding="always")


def test_what_is_not_known_is_named(speech, caplog):
    with caplog.at_level(logging.WARNING, "audiomm.feature_extraction"):
        Gemma4AudioFeatureExtractor()(speech, colour="red")
    assert "does not know and does not use colour" in caplog.text


@BOTH
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hop_length_ms": 0}, "hop_length_ms=0"),
        ({"mel_floor": -1.0}, "mel_floor=-1.0"),
        ({"dither": float("nan")}, "dither=nan"),
        ({"preemphasis": "high"}, "preemphasis='high'"),
        ({"padding_side": "middle"}, "padding_side='middle'"),
        ({"per_bin_mean": [1.0]}, "per_bin_mean has 1 numbers"),
        ({"min_frequency": 9000.0}, "no filter bank"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, words):
    with pytest.raises(ConfigError, match=words):
        kind(**settings)


def test_a_stream_refuses_what_it_cannot_do(speech):
    with pytest.raises(InputError, match="padding_side='left'"):
        FrameStream(Gemma4AudioFeatureExtractor(padding_side="left"))
    stream = FrameStream(Gemma3nAudioFeatureExtractor())
    with pytest.raises(AudioLayoutError, match="2 rows of samples"):
        stream.push(np.stack([speech, speech]))
    stream.push(speech[:300])
    with pytest.raises(EmptyAudioError, match="after 300 samples"):
        stream.finish()


# ---------------------------------------------------------------------------------------------------------- raw frames


def test_raw_frames_are_the_samples_themselves(speech):
    extractor = Gemma4UnifiedAudioFeatureExtractor()
    batch = extractor([speech[:1500], speech[:640]], return_tensors="pt")
    assert batch["input_features"].shape == (2, 3, 640)
    assert batch["input_features_mask"].tolist() == [[True, True, True], [True, False, False]]
    np.testing.assert_array_equal(batch["input_features"][0].flatten()[:1500], speech[:1500])
    assert not batch["input_features"][0].flatten()[1500:].any() and not batch["input_features"][1, 1:].any()
    assert [extractor.frame_count(n) for n in (1, 640, 641)] == [1, 1, 2]


def test_raw_frames_pad_cut_and_refuse_as_asked(speech, caplog):
    extractor = Gemma4UnifiedAudioFeatureExtractor(padding_side="left")
    batch = extractor(speech[:1500], padding="max_length", max_length=4, return_tensors="pt")
    assert batch["input_features_mask"].tolist() == [[False, True, True, True]]
    with caplog.at_level(logging.WARNING, "audiomm.feature_extraction"):
        cut = extractor(speech, max_length=2)
    assert len(cut["input_features"][0]) == 2 and "43 frames" in caplog.text
    with pytest.raises(SampleRateError):
        extractor(speech, sampling_rate=44100)
    with pytest.raises(EmptyAudioError, match="clip 1 of 2"):
        extractor([speech, speech[:0]])
    with pytest.raises(ConfigError, match="feature_size=320"):
        Gemma4UnifiedAudioFeatureExtractor(feature_size=320)
