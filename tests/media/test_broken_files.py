"""Broken files are noticed: no silent short read, no foreign exception, no noise on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import sys

import numpy as np
import pytest

from audiomm.base.errors import AudioDecodeError, AudioError, MissingExtra, SampleRateError, TruncatedAudioError
from audiomm.media import load_audio
from audiomm.media.quiet import quiet_stderr


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "silence.wav"
    path.touch()
    with pytest.raises(AudioDecodeError, match=r"silence\.wav: empty file \(0 bytes\)"):
        load_audio(path)
    with pytest.raises(AudioDecodeError, match=r"empty \(0 bytes\)"):
        load_audio(b"")


def test_text_named_wav_is_quoted(tmp_path):
    path = tmp_path / "speech.wav"
    path.write_text("this is not audio at all")
    with pytest.raises(AudioDecodeError, match=r"speech\.wav is not an audio file.*it starts with 'this is not audi'"):
        load_audio(path)


@pytest.mark.parametrize("content", [b"RIFF", b"RIFF" + bytes(60), b"fLaC" + bytes(60), bytes(100)])
def test_a_magic_word_alone_is_no_file(content):
    with pytest.raises(AudioDecodeError, match="not an audio file"):
        load_audio(content)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "OPUS"])
def test_half_a_file_is_noticed_or_used_on_request(container, noise, encode, caplog):
    noise = np.tile(noise, 5)
    whole = encode(noise, "OGG", subtype="OPUS") if container == "OPUS" else encode(noise, container)
    half = whole[: len(whole) // 2]
    with pytest.raises(TruncatedAudioError, match=r"is damaged: .*samples could be read\. Pass on_truncated='partial'"):
        load_audio(half)
    with caplog.at_level(logging.WARNING, "audiomm"):
        part = load_audio(half, on_truncated="partial")
    assert "are used" in caplog.text
    assert 0.2 * len(noise) < len(part) < 0.7 * len(noise)
    np.testing.assert_allclose(part[:4000], load_audio(whole)[:4000], atol=1e-3)


def test_a_header_that_promises_four_gigabytes_is_noticed(tone, encode):
    content = bytearray(encode(tone))
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", 4_000_000_000)
    with pytest.raises(TruncatedAudioError, match="declares 4000000000 bytes of samples, the file has 32000"):
        load_audio(bytes(content))


def test_a_wav_written_into_a_pipe_has_no_sizes(tone, encode):
    content = bytearray(encode(tone))
    place = content.index(b"data") + 4
    content[4:8] = content[place : place + 4] = b"\xff" * 4
    assert load_audio(bytes(content)).shape == tone.shape


@pytest.mark.parametrize("rate", [0, 10, 2_000_000_000, 4_000_000_000])
def test_a_header_with_an_absurd_rate_is_a_rate_error(rate, tone, encode):
    content = bytearray(encode(tone))
    content[24:28] = struct.pack("<I", rate)
    with pytest.raises(SampleRateError, match=f"header's sampling rate={rate}: accepted are 1000 to 768000"):
        load_audio(bytes(content))


@pytest.mark.parametrize("channels", [0, 65, 65535])
def test_a_header_with_absurd_channels_is_refused(channels, tone, encode):
    content = bytearray(encode(tone))
    content[22:24] = struct.pack("<H", channels)
    with pytest.raises(AudioDecodeError, match=r"channels; up to 64|cannot|can be read"):
        load_audio(bytes(content))


def test_an_ogg_page_with_a_flipped_bit_is_found(noise, encode):
    content = bytearray(encode(noise, "OGG"))
    content[len(content) * 3 // 4] ^= 1
    with pytest.raises(TruncatedAudioError, match=r"ogg page \d+ at byte \d+ does not match its checksum"):
        load_audio(bytes(content))


def test_an_ogg_file_without_its_last_page_is_found(noise, encode):
    content = encode(noise, "OGG")
    with pytest.raises(TruncatedAudioError, match="does not end the stream"):
        load_audio(content[: content.rindex(b"OggS")])


def test_an_ogg_file_without_a_middle_page_is_found(noise, encode):
    content = encode(np.tile(noise, 3), "OGG")
    pages = [place for place in range(len(content)) if content.startswith(b"OggS", place)]
    with pytest.raises(TruncatedAudioError, match=r"has number \d+, after \d+"):
        load_audio(content[: pages[4]] + content[pages[5] :])


def test_damaged_files_never_come_back_short(noise, encode):
    """Cut, flip and splice: an answer is a whole one, anything else is an AudioError."""
    random = np.random.default_rng(5)
    files = [encode(noise, container) for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF")]
    files.append(encode(noise, "OGG", subtype="OPUS"))
    short = refused = 0
    for trial in range(300):
        content = bytearray(files[trial % len(files)])
        place = int(random.integers(1, len(content)))
        if trial % 3 == 0:
            content = content[:place]
        elif trial % 3 == 1:
            for spot in random.integers(0, len(content), 20):
                content[spot] ^= 1 << int(random.integers(8))
        else:
            content = content[:place] + content[place + 1500 :]
        try:
            short += len(load_audio(bytes(content))) < len(noise) - 2304
        except AudioError:
            refused += 1
    assert short == 0
    assert refused > 100


def test_a_broken_mp3_writes_nothing_to_standard_error(noise, encode, capfd):
    content = bytearray(encode(noise, "MP3"))
    for spot in range(2000, len(content), 97):
        content[spot] ^= 0xFF
    with contextlib.suppress(AudioError):
        load_audio(bytes(content), on_truncated="partial")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_standard_error_comes_back_after_an_exception(capfd):
    with pytest.raises(KeyError), quiet_stderr(), quiet_stderr():
        os.write(2, b"hidden")
        raise KeyError
    print("seen", file=sys.stderr)
    assert capfd.readouterr().err == "seen\n"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypM4A ", "m4a or mp4"),
        (b"\x1a\x45\xdf\xa3", "webm or mkv"),
        (b"\xff\xf1\x50\x80", "aac"),
        (b"#!AMR\n", "amr"),
    ],
)
def test_formats_of_video_need_an_extra(head, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        MissingExtra, match=rf"reading {name} files needs the package av: pip install 'audiomm\[video\]'"
    ):
        load_audio(head + bytes(100))


def test_m4a_is_read_where_pyav_is_installed(tone):
    av = pytest.importorskip("av")
    import io

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        split = av.AudioResampler(format=stream.format, layout="mono", rate=16000, frame_size=stream.frame_size)
        for part in split.resample(frame) + split.resample(None):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    loaded = load_audio(file.getvalue())
    assert abs(len(loaded) - 16000) < 3000
    assert np.abs(np.fft.rfft(loaded[:16000])).argmax() == 440
    with pytest.raises(AudioDecodeError, match="m4a or mp4"):
        load_audio(file.getvalue()[: len(file.getvalue()) // 2])
