"""load_audio turns anything that sounds into a mono float32 waveform."""

from __future__ import annotations

import base64
import io
import logging
import tracemalloc

import numpy as np
import pytest
import torch

from audiomm.base.errors import (
    AudioDecodeError,
    AudioError,
    AudioFileNotFoundError,
    AudioLayoutError,
    AudioLimitError,
    InputError,
    NonFiniteAudioError,
    SampleRateError,
    ShapeError,
)
from audiomm.media import audio_duration, load_audio


def loudest_hertz(samples: np.ndarray, rate: int = 16000) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


@pytest.mark.parametrize(
    "form", ["str", "path", "bytes", "bytearray", "file", "data uri", "base64", "dict path", "dict bytes"]
)
def test_every_form_of_a_file_gives_the_same_samples(form, tone, encode, tmp_path):
    content = encode(tone, subtype="FLOAT")
    path = tmp_path / "tone.wav"
    path.write_bytes(content)
    forms = {
        "str": str(path),
        "path": path,
        "bytes": content,
        "bytearray": bytearray(content),
        "file": io.BytesIO(content),
        "data uri": "data:audio/wav;base64," + base64.b64encode(content).decode(),
        "base64": base64.b64encode(content).decode(),
        "dict path": {"path": str(path), "bytes": None},
        "dict bytes": {"bytes": content, "path": None},
    }
    np.testing.assert_array_equal(load_audio(forms[form]), tone)


@pytest.mark.parametrize("form", ["array", "float64", "half", "tensor", "list", "dict array", "dict raw", "read-only"])
def test_every_form_of_samples_gives_the_same_samples(form, tone):
    frozen = tone.copy()
    frozen.setflags(write=False)
    forms = {
        "array": tone,
        "float64": tone.astype(np.float64),
        "half": tone.astype(np.float16),
        "tensor": torch.from_numpy(tone),
        "list": tone.tolist(),
        "dict array": {"array": tone, "sampling_rate": 16000},
        "dict raw": {"raw": tone, "sampling_rate": 16000},
        "read-only": frozen,
    }
    loaded = load_audio(forms[form])
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, tone, atol=3e-4 if form == "half" else 0)


def test_a_dict_is_not_changed(tone):
    audio = {"array": tone, "sampling_rate": 8000, "text": "la"}
    load_audio(audio)
    assert audio == {"array": tone, "sampling_rate": 8000, "text": "la"}


def test_a_decoder_object_is_read():
    class Samples:
        data, sample_rate = torch.ones(2, 800) * 0.5, 8000

    class Decoder:
        def get_all_samples(self) -> Samples:
            return Samples()

    assert load_audio(Decoder()).shape == (1600,)


@pytest.mark.parametrize(
    ("dtype", "values", "floats"),
    [
        (np.int16, [0, 16384, -32768], [0, 0.5, -1]),
        (np.int8, [0, 64, -128], [0, 0.5, -1]),
        (np.int32, [0, 2**30, -(2**31)], [0, 0.5, -1]),
        (np.uint8, [128, 192, 0], [0, 0.5, -1]),
        (np.uint16, [32768, 49152, 0], [0, 0.5, -1]),
        (">i2", [0, 16384, -32768], [0, 0.5, -1]),
        (np.int64, [0, 1, -1], [0, 1, -1]),
    ],
)
def test_integers_are_scaled_by_their_type(dtype, values, floats):
    assert load_audio(np.array(values, dtype=dtype)).tolist() == floats


def test_int64_samples_have_no_known_full_scale():
    with pytest.raises(AudioError, match="int64 samples up to 300"):
        load_audio(np.array([1, -300, 7]))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "OPUS"])
def test_formats_keep_pitch_and_length(container, tone, encode):
    content = encode(tone, "OGG", subtype="OPUS") if container == "OPUS" else encode(tone, container)
    loaded = load_audio(content)
    assert loaded.shape == tone.shape
    assert loudest_hertz(loaded) == 440


def test_the_content_counts_not_the_name(tone, encode, tmp_path):
    path = tmp_path / "tone.mp3"
    path.write_bytes(encode(tone, "FLAC"))
    assert load_audio(path).shape == tone.shape


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 192000])
def test_any_rate_is_resampled_to_the_ceiling(rate, encode):
    length = rate + 17
    samples = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(length) / rate)).astype(np.float32)
    from_array = load_audio({"array": samples, "sampling_rate": rate})
    assert len(from_array) == -(-length * 16000 // rate)
    assert loudest_hertz(from_array[:16000]) == 1000
    np.testing.assert_allclose(load_audio(encode(samples, rate=rate, subtype="FLOAT")), from_array, atol=1e-6)


def test_resampling_in_blocks_is_resampling_at_once(encode):
    samples = (np.random.default_rng(1).standard_normal(200_000) * 0.1).astype(np.float32)
    at_once = load_audio({"array": samples, "sampling_rate": 44100})
    in_blocks = load_audio(encode(samples, rate=44100, subtype="FLOAT"))
    np.testing.assert_allclose(in_blocks, at_once, atol=1e-6)


def test_channels_are_averaged_or_chosen(encode):
    both = np.stack([np.full(1000, 0.5), np.full(1000, -0.25)], axis=1).astype(np.float32)
    for audio in (encode(both, subtype="FLOAT"), both, both.T, torch.from_numpy(both)):
        assert set(load_audio(audio)) == {np.float32(0.125)}
        assert set(load_audio(audio, channel=1)) == {np.float32(-0.25)}
    with pytest.raises(AudioLayoutError, match="channel=2: the array has 2, 0 to 1"):
        load_audio(both, channel=2)


def test_channels_that_cancel_are_noticed(tone, caplog):
    with caplog.at_level(logging.WARNING, "audiomm"):
        assert not load_audio(np.stack([tone, -tone])).any()
    assert "cancel each other" in caplog.text
    caplog.clear()
    load_audio(np.stack([tone, -tone]), channel=0)
    load_audio(np.zeros((2, 1000), np.float32))
    assert not caplog.text


def test_a_layout_that_cannot_be_told_must_be_said():
    square = np.full((80, 90), 0.5, np.float32)
    for shape in ((80, 90), (3, 4)):
        with pytest.raises(AudioLayoutError, match="neither axis is clearly the channels"):
            load_audio(np.zeros(shape, np.float32))
    assert load_audio(square[:3], layout="channels_first").shape == (90,)
    assert load_audio(square[:, :4], layout="channels_last").shape == (80,)
    with pytest.raises(AudioLayoutError, match="has 80 channels; 1 to 64"):
        load_audio(square, layout="channels_first")
    with pytest.raises(ShapeError, match=r"\(2, 3, 4\)"):
        load_audio(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(InputError, match="layout='stereo'"):
        load_audio(square, layout="stereo")


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (1e30, "1e"), (-20000.0, "-20000")])
def test_samples_that_are_no_sound_are_refused(value, shown, tone, encode):
    both = np.stack([tone, tone], axis=1)
    both[100, 1] = value
    with pytest.raises(NonFiniteAudioError, match=f"sample 100 of channel 1 is {shown}"):
        load_audio(both)
    with pytest.raises(NonFiniteAudioError, match=f"sample 100 of channel 1 is {shown}"):
        load_audio(encode(both, subtype="FLOAT"))


def test_a_bad_sample_is_counted_from_the_start_of_the_file(encode):
    samples = np.zeros(100_000, np.float32)
    samples[90_000] = np.nan
    with pytest.raises(NonFiniteAudioError, match="sample 90000 "):
        load_audio(encode(samples, subtype="FLOAT"))


@pytest.mark.parametrize(
    "audio", [None, 5, 2.5, object(), {"text": "la"}, ["a", "b"], np.array(["a"]), np.array([True])]
)
def test_what_is_not_audio_is_a_type_error(audio):
    with pytest.raises(TypeError, match=r"is not audio|is not one clip|are not audio|needs 'array'"):
        load_audio(audio)


def test_a_list_of_clips_is_not_one_clip(tone):
    for clips in ([tone, tone], [tone.tolist(), tone.tolist()]):
        with pytest.raises(TypeError, match="Load the clips of a batch one by one"):
            load_audio(clips)


def test_no_samples_are_an_empty_waveform(encode):
    assert load_audio([]).shape == (0,)
    assert load_audio(np.zeros(0, np.float32)).shape == (0,)
    assert load_audio(encode(np.zeros(0, np.float32))).shape == (0,)


def test_a_missing_file_is_two_kinds_of_error(tmp_path):
    for kind in (AudioFileNotFoundError, AudioError, FileNotFoundError, ValueError):
        with pytest.raises(kind, match=r"nothing\.wav: no such file"):
            load_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioDecodeError, match="is not a file"):
        load_audio(tmp_path)


@pytest.mark.parametrize("rate", [0, -1, 999, 2_000_000_000, 16000.5, "16000", True, float("nan")])
def test_impossible_rates_are_refused(rate, tone):
    with pytest.raises(SampleRateError, match="sampling_rate="):
        load_audio({"array": tone, "sampling_rate": rate})
    with pytest.raises(SampleRateError, match="sampling_rate="):
        load_audio(tone, rate)


def test_samples_in_a_dict_need_their_rate(tone):
    with pytest.raises(SampleRateError, match="no 'sampling_rate'"):
        load_audio({"array": tone})


def test_too_long_audio_is_refused_before_it_is_decoded(encode):
    with pytest.raises(AudioLimitError, match="lasts 2 s or more; 1 s are allowed"):
        load_audio(np.zeros(32000, np.float32), max_seconds=1)
    bomb = encode(np.zeros(60_000_000, np.int16), "FLAC", rate=96000)
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    with pytest.raises(AudioLimitError, match="lasts 625 s or more; 60 s are allowed"):
        load_audio(bomb, max_seconds=60)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16e6


def test_options_are_checked(tone):
    with pytest.raises(InputError, match="on_truncated='skip'"):
        load_audio(tone, on_truncated="skip")
    with pytest.raises(InputError, match="max_seconds=0"):
        load_audio(tone, max_seconds=0)
    with pytest.raises(InputError, match="max_seconds='1'"):
        load_audio(tone, max_seconds="1")
    for wrong in ("left", 0.5, True):
        with pytest.raises(InputError, match=f"channel={wrong!r}: a number is needed, 0 is the first"):
            load_audio(tone, channel=wrong)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_duration_needs_no_decoding(container, noise, encode, tmp_path):
    content = encode(noise, container)
    assert audio_duration(content) == pytest.approx(2.0)
    path = tmp_path / "noise"
    path.write_bytes(content)
    assert audio_duration(path) == pytest.approx(2.0)
    with pytest.raises(AudioFileNotFoundError):
        audio_duration(tmp_path / "nothing")
