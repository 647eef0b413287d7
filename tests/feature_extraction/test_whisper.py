"""WhisperFeatureExtractor: arguments, padding, masks, refusals, and the reference's numbers."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from audiomm.base.errors import (
    AudioLayoutError,
    CheckpointNotFoundError,
    ConfigError,
    EmptyAudioError,
    InputError,
    NonFiniteAudioError,
    SampleRateError,
    SaveError,
    ShapeError,
)
from audiomm.feature_extraction import WhisperFeatureExtractor
from audiomm.feature_extraction.mel import plain_log_mel
from audiomm.media import load_audio, samples


@pytest.fixture
def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(chunk_length=2)


def features(extractor: WhisperFeatureExtractor, clip, **options) -> torch.Tensor:
    return extractor(clip, sampling_rate=16000, return_tensors="pt", **options)["input_features"]


def twin(extractor: WhisperFeatureExtractor, samples: np.ndarray) -> torch.Tensor:
    """Log-mel of one padded clip by the obvious form."""
    filters = torch.from_numpy(extractor.mel_filters).float()
    return plain_log_mel(torch.from_numpy(samples)[None], filters, extractor.n_fft, extractor.hop_length)


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("mels", "case"), [(80, "mel80"), (128, "mel128")])
def test_real_speech_has_the_references_features(mels, case, golden):
    folder = golden / "whisper_features" / "window30s"
    call = next(call for call in json.loads((folder / "case.json").read_text())["calls"] if call["id"] == case)
    check = call["expect"][0]
    speech = load_audio(golden / "data" / "jfk.flac")
    mine = features(WhisperFeatureExtractor(feature_size=mels), speech).numpy()
    wanted = load_file(folder / "expected.safetensors")[check["tensor"]]
    taken = mine[tuple(slice(*part) for part in check["take"])]
    np.testing.assert_allclose(taken, wanted, atol=check["atol"], rtol=0)


@pytest.mark.parametrize("length", [1, 159, 160, 319, 320, 321, 16_000, 31_999, 32_000])
def test_clips_are_padded_with_silence(length, extractor, speech):
    clip = np.resize(speech, length)
    padded = np.pad(clip, (0, 32_000 - length))
    torch.testing.assert_close(features(extractor, clip), twin(extractor, padded), atol=1e-6, rtol=0)


def test_a_long_clip_is_cut_or_kept(extractor, speech):
    clip = np.tile(speech, 3)
    assert features(extractor, clip).shape == (1, 80, 200)
    torch.testing.assert_close(features(extractor, clip), twin(extractor, clip[:32_000]), atol=1e-6, rtol=0)
    whole = features(extractor, clip, truncation=False, padding="longest")
    torch.testing.assert_close(whole, twin(extractor, clip), atol=1e-6, rtol=0)


def test_padding_may_be_another_value_side_or_none(speech):
    left = WhisperFeatureExtractor(chunk_length=2, padding_side="left")
    value = WhisperFeatureExtractor(chunk_length=2, padding_value=0.01)
    missing = 32_000 - len(speech)
    torch.testing.assert_close(features(left, speech), twin(left, np.pad(speech, (missing, 0))), atol=1e-6, rtol=0)
    padded = np.pad(speech, (0, missing), constant_values=np.float32(0.01))
    torch.testing.assert_close(features(value, speech), twin(value, padded), atol=1e-6, rtol=0)
    torch.testing.assert_close(features(left, speech, padding=False), twin(left, speech), atol=1e-6, rtol=0)


def test_normalising_uses_the_real_samples_only(extractor, speech):
    loud = (speech - speech.mean()) / np.sqrt(speech.var() + 1e-7)
    padded = np.pad(loud, (0, 32_000 - len(loud)))
    batch = features(extractor, [speech, speech[:5000]], do_normalize=True)
    torch.testing.assert_close(batch[:1], twin(extractor, padded), atol=1e-5, rtol=0)


def test_dither_is_noise_from_torchs_generator(speech):
    noisy = WhisperFeatureExtractor(chunk_length=2, dither=0.01)
    torch.manual_seed(3)
    once = features(noisy, speech)
    torch.manual_seed(3)
    noise = torch.randn(1, 32_000)[0].numpy()
    padded = np.pad(speech, (0, 32_000 - len(speech))) + np.float32(0.01) * noise
    torch.testing.assert_close(once, twin(noisy, padded), atol=1e-6, rtol=0)


def test_logmel_padding_is_zero_after_the_last_whole_frame(extractor, speech):
    rows = features(extractor, speech, pad_mode="logmel")
    spoken = twin(extractor, np.pad(speech, (0, 48_000)))[..., : len(speech) // 160]
    torch.testing.assert_close(rows[..., : spoken.shape[-1]], spoken, atol=1e-6, rtol=0)
    assert not rows[..., spoken.shape[-1] :].any()
    with pytest.raises(InputError, match="pad_mode='mel'"):
        features(extractor, speech, pad_mode="mel")


# ------------------------------------------------------------------------------------------------- shapes and masks


def test_forms_of_one_clip_agree(extractor, speech):
    wanted = features(extractor, speech)
    for clip in (speech.astype(np.float64), torch.from_numpy(speech), speech.tolist(), [speech], speech[None]):
        torch.testing.assert_close(features(extractor, clip), wanted, atol=1e-6, rtol=0)


def test_integers_are_scaled(extractor, speech):
    integers = (speech * 20_000).astype(np.int16)
    wanted = features(extractor, integers / np.float32(32768))
    torch.testing.assert_close(features(extractor, integers), wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(features(extractor, [torch.from_numpy(integers)]), wanted, atol=1e-7, rtol=0)


def test_integers_are_not_looked_at_which_would_wait_for_their_device(extractor, speech, monkeypatch):
    integers = (speech * 20_000).astype(np.int16)
    wanted = [features(extractor, batch) for batch in (integers, [integers, speech])]
    seen = []
    monkeypatch.setattr(samples, "check_finite", lambda waveform, where: seen.append(where))
    for form in (integers, torch.from_numpy(integers), integers[None], torch.from_numpy(integers)[None]):
        assert torch.equal(features(extractor, form), wanted[0])
    assert seen == []
    assert torch.equal(features(extractor, [integers, speech]), wanted[1])
    assert seen == ["clip 1"]


def test_batches_may_be_lists_tuples_and_arrays(extractor, speech):
    pair = np.stack([speech, speech[::-1]])
    wanted = torch.cat([features(extractor, clip) for clip in pair])
    for batch in (pair, list(pair), tuple(pair), torch.from_numpy(pair.copy()), [clip.tolist() for clip in pair]):
        torch.testing.assert_close(features(extractor, batch), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "frames", "ones"),
    [
        ({}, 200, [171, 7]),
        ({"padding": "longest"}, 170, [170, 7]),
        ({"padding": True, "pad_to_multiple_of": 1600}, 180, [171, 7]),
        ({"max_length": 8000}, 50, [50, 7]),
        ({"max_length": 8001, "pad_to_multiple_of": 480}, 51, [51, 7]),
        ({"max_length": 40_000}, 250, [171, 7]),
    ],
)
def test_lengths_and_masks(options, frames, ones, extractor, speech):
    batch = extractor(
        [speech, speech[:1000]], sampling_rate=16000, return_tensors="pt", return_attention_mask=True, **options
    )
    assert batch.input_features.shape == (2, 80, frames)
    assert batch.attention_mask.shape == (2, frames)
    assert batch.attention_mask.dtype == torch.int32
    assert batch.attention_mask.sum(-1).tolist() == ones


def test_the_mask_follows_setting_call_and_side(speech):
    always = WhisperFeatureExtractor(chunk_length=2, return_attention_mask=True, padding_side="left")
    mask = always(speech, sampling_rate=16000)["attention_mask"]
    assert mask.shape == (1, 200)
    assert mask[0, -1] == 1
    assert mask[0, 0] == 0
    assert "attention_mask" not in always(speech, sampling_rate=16000, return_attention_mask=False)


def test_results_come_as_asked(extractor, speech):
    assert isinstance(extractor(speech, sampling_rate=16000).input_features, np.ndarray)
    assert isinstance(extractor(speech, sampling_rate=16000, return_tensors="np").input_features, np.ndarray)
    ragged = extractor([speech, speech[:1000]], sampling_rate=16000, padding=False)
    assert [row.shape for row in ragged.input_features] == [(80, 170), (80, 6)]
    with pytest.raises(InputError, match=r"'input_features' cannot become one tensor.*padding='longest'"):
        extractor([speech, speech[:1000]], sampling_rate=16000, padding=False, return_tensors="pt")
    with pytest.raises(InputError, match="return_tensors='tf'"):
        extractor(speech, sampling_rate=16000, return_tensors="tf")


def test_real_frames_are_counted_on_request(extractor, speech):
    batch = extractor([speech, speech[:1000]], sampling_rate=16000, return_token_timestamps=True, return_tensors="pt")
    assert batch.num_frames.tolist() == [170, 6]


# --------------------------------------------------------------------------------------------------------- refusals


def test_the_rate_is_checked(extractor, speech, caplog):
    with pytest.raises(SampleRateError, match=r"sampling_rate=8000: WhisperFeatureExtractor needs 16000 Hz"):
        extractor(speech, sampling_rate=8000)
    with caplog.at_level(logging.WARNING, "audiomm"):
        extractor(speech)
    assert "sampling_rate was not passed" in caplog.text


@pytest.mark.parametrize("clip", [np.zeros(0, np.float32), [], [np.zeros(10, np.float32), np.zeros(0, np.float32)]])
def test_a_clip_without_samples_is_refused(clip, extractor):
    with pytest.raises(EmptyAudioError, match="has no samples"):
        features(extractor, clip)


def test_nan_is_refused_with_its_place(extractor, speech):
    broken = speech.copy()
    broken[77] = np.nan
    with pytest.raises(NonFiniteAudioError, match="clip 1: sample 77 is nan"):
        features(extractor, [speech, broken])
    with pytest.raises(NonFiniteAudioError, match="unscaled integers are to be passed as an integer array"):
        features(extractor, speech * 1e6)


def test_several_channels_are_refused(extractor):
    with pytest.raises(AudioLayoutError, match=r"shape \(32000, 2\) looks like \(samples, channels\)"):
        features(extractor, np.zeros((32_000, 2), np.float32))
    with pytest.raises(AudioLayoutError, match=r"clip 0 has shape \(2, 500\)"):
        features(extractor, [np.zeros((2, 500), np.float32)])
    with pytest.raises(ShapeError, match=r"\(2, 3, 500\)"):
        features(extractor, np.zeros((2, 3, 500), np.float32))
    with pytest.raises(ShapeError, match="rows of different length"):
        features(extractor, [[[0.0, 0.1], [0.2]]])


@pytest.mark.parametrize("clip", ["speech.wav", b"abc", None, {"array": [0.0]}, ["a.wav"], 3, [[0.1], None]])
def test_what_is_not_samples_is_a_type_error(clip, extractor):
    with pytest.raises(TypeError, match=r"is not audio samples|are not audio|is a NoneType"):
        features(extractor, clip)


def test_paddings_are_checked(extractor, speech):
    with pytest.raises(InputError, match="padding='widest'"):
        features(extractor, speech, padding="widest")
    with pytest.raises(InputError, match="pad_to_multiple_of=0"):
        features(extractor, speech, pad_to_multiple_of=0)
    with pytest.raises(EmptyAudioError, match="150 samples without padding"):
        features(extractor, speech[:150], padding="do_not_pad")


def test_an_unknown_option_is_named(extractor, speech, caplog):
    with caplog.at_level(logging.WARNING, "audiomm"):
        features(extractor, speech, paddding="longest")
    assert "does not know and does not use paddding" in caplog.text


@pytest.mark.parametrize(
    "setting", [{"feature_size": 0}, {"n_fft": "400"}, {"hop_length": 1.5}, {"dither": -1}, {"padding_side": "up"}]
)
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=next(iter(setting)) + "="):
        WhisperFeatureExtractor(**setting)


# ------------------------------------------------------------------------------------------------------------ files

KEYS = {
    "chunk_length",
    "dither",
    "feature_extractor_type",
    "feature_size",
    "hop_length",
    "n_fft",
    "n_samples",
    "nb_max_frames",
    "padding_side",
    "padding_value",
    "return_attention_mask",
    "sampling_rate",
}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    made = WhisperFeatureExtractor(feature_size=128, chunk_length=5, processor_class="WhisperProcessor", note=[1])
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert set(saved) == KEYS | {"processor_class", "note"}
    loaded = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == made.to_dict()
    assert loaded.n_samples == 80_000
    assert WhisperFeatureExtractor.from_pretrained(tmp_path, chunk_length=7).nb_max_frames == 700
    assert json.loads(repr(loaded).split(" ", 1)[1]) == saved


def test_a_section_of_processor_config_is_read_and_old_filters_are_not(tmp_path):
    section = {"feature_size": 128, "mel_filters": [[0.5]], "feature_extractor_type": "WhisperFeatureExtractor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": section}))
    loaded = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.mel_filters.shape == (201, 128)
    assert "mel_filters" not in loaded.to_dict()


def test_files_that_are_missing_or_wrong_are_told(tmp_path, caplog):
    with pytest.raises(
        CheckpointNotFoundError, match=r"neither preprocessor_config\.json nor a processor_config\.json"
    ):
        WhisperFeatureExtractor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": 5}')
    with pytest.raises(ConfigError, match="'feature_extractor' is 5"):
        WhisperFeatureExtractor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "Gemma3nAudioFeatureExtractor"}')
    with caplog.at_level(logging.WARNING, "audiomm"):
        WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert "was written by Gemma3nAudioFeatureExtractor" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(SaveError):
        WhisperFeatureExtractor().save_pretrained(tmp_path / "file")


def test_an_extractor_can_be_copied_and_pickled(extractor, speech):
    wanted = features(extractor, speech)
    for other in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert torch.equal(features(other, speech), wanted)
