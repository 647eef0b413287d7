"""load_video decodes the frames that are wanted, and tells when they are seen."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from audiomm.base.errors import (
    InputError,
    MissingExtra,
    VideoDecodeError,
    VideoError,
    VideoFileNotFoundError,
    VideoLimitError,
)
from audiomm.media.video import VideoMetadata, load_video, sample_frames


def encoded(
    frames: int = 30,
    *,
    kind: str = "matroska",
    codec: str = "mpeg4",
    gaps_milliseconds: tuple[int, ...] = (100,),
    sound: bool = False,
) -> bytes:
    """A video whose frame i is grey of level 5 i (mod 256); the distances of its frames go round `gaps`."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        if sound:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame) + stream.encode(None))
            frames = 0
        else:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
            stream.codec_context.time_base = Fraction(1, 1000)
        moment = 0
        for index in range(frames):
            grey = np.full((48, 64, 3), 5 * index % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            moment += gaps_milliseconds[index % len(gaps_milliseconds)]
            container.mux(stream.encode(frame))
        if frames:
            container.mux(stream.encode(None))
    return file.getvalue()


def levels(frames: np.ndarray) -> list[float]:
    return frames.mean(axis=(1, 2, 3)).tolist()


@pytest.mark.parametrize("form", ["path", "bytes", "file", "dict"])
def test_every_form_of_a_file_gives_the_same_frames(form: str, tmp_path: Any) -> None:
    content = encoded()
    path = tmp_path / "video.mkv"
    path.write_bytes(content)
    forms = {"path": str(path), "bytes": content, "file": io.BytesIO(content), "dict": {"path": path}}
    frames, metadata = load_video(forms[form])
    assert frames.shape == (30, 48, 64, 3) and frames.dtype == np.uint8
    assert levels(frames) == pytest.approx([5 * index for index in range(30)], abs=8)
    assert (metadata.total_num_frames, metadata.width, metadata.height) == (30, 64, 48)
    assert metadata.fps == pytest.approx(10.0) and metadata.duration == pytest.approx(3.0)


def test_frames_picked_are_those_of_the_whole_across_key_frames() -> None:
    content = encoded(50)
    every, _ = load_video(content)
    picked, metadata = load_video(content, num_frames=7)
    assert metadata.frames_indices == [0, 7, 14, 21, 28, 35, 42]
    np.testing.assert_array_equal(picked, every[metadata.frames_indices])
    assert metadata.timestamps == pytest.approx([0.0, 0.7, 1.4, 2.1, 2.8, 3.5, 4.2])
    by_rate, metadata = load_video(content, fps=1)
    np.testing.assert_array_equal(by_rate, every[[0, 10, 20, 30, 40]])


def test_frames_at_unequal_distances_keep_their_times() -> None:
    content = encoded(20, gaps_milliseconds=(50, 350))
    _, metadata = load_video(content, num_frames=4)
    assert metadata.frames_indices == [0, 5, 10, 15]
    assert metadata.timestamps == pytest.approx([0.0, 0.85, 2.0, 2.85])
    _, metadata = load_video(content, fps=5)
    # Every fifth of a second, the frame on the screen; one that stays is taken once.
    assert metadata.frames_indices == sorted(set(metadata.frames_indices))
    assert metadata.timestamps[:4] == pytest.approx([0.0, 0.05, 0.4, 0.45])


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (-90, (0, 1)), (180, (1, 1)), (90, (1, 0))])
def test_videos_of_phones_are_turned_upright(degrees: int, corner: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write marks of rotation")
        stream.set_display_rotation(degrees)
        for index in range(4):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:24, :32] = 200
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, metadata = load_video(file.getvalue(), num_frames=2)
    assert frames.shape == ((2, 64, 48, 3) if degrees in (90, -90) else (2, 48, 64, 3))
    assert (metadata.height, metadata.width) == frames.shape[1:3]
    # Against the clock by -90 degrees, what is at the left above comes to the right above.
    height, width = frames.shape[1] // 2, frames.shape[2] // 2
    quarters = frames[0].reshape(2, height, 2, width, 3).mean(axis=(1, 3, 4))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner and quarters.max() > 150


def test_one_frame_is_a_video_and_too_few_are_all_taken(caplog: pytest.LogCaptureFixture) -> None:
    frames, metadata = load_video(encoded(1), num_frames=32)
    assert len(frames) == 1 and metadata.timestamps == [0.0]
    assert "32 frames are wanted but the video has only 1" in caplog.text


def test_broken_files_are_told(tmp_path: Any) -> None:
    content = encoded(100)
    with pytest.raises(VideoDecodeError, match=r"declares 10\.0 s but its frames end at"):
        load_video(content[: len(content) // 2])
    with pytest.raises(VideoDecodeError, match="cannot be decoded as a video"):
        load_video(b"hello world, hello")
    with pytest.raises(VideoFileNotFoundError, match="no such file. Pass the path of a video file"):
        load_video(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoDecodeError, match="has no pictures, only sound"):
        load_video(encoded(sound=True))
    with pytest.raises(InputError, match="URLs are not fetched"):
        load_video("https://example.com/video.mp4")
    with pytest.raises(TypeError, match="int is not a video"):
        load_video(5)
    with pytest.raises(TypeError, match="NoneType is not a video"):
        load_video({"frames": 5})


def test_limits_are_checked_before_anything_is_decoded() -> None:
    with pytest.raises(VideoLimitError, match=r"30 frames of 64 x 48 are 92,160 pixels; 90,000 are allowed"):
        load_video(encoded(), max_pixels=90_000)
    assert len(load_video(encoded(), num_frames=3, max_pixels=90_000)[0]) == 3


def test_files_without_pyav_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"reading video files needs the package av: pip install 'audiomm\[video\]'"):
        load_video(b"anything")


# ---------------------------------------------------------------------- which frames


def test_frames_are_spread_evenly_from_the_first_on() -> None:
    assert sample_frames(11, 4) == [0, 2, 5, 8]
    assert sample_frames(10_000, 32) == [index * 10_000 // 32 for index in range(32)]
    assert sample_frames(5) == [0, 1, 2, 3, 4]
    assert sample_frames(80, fps=2, source_fps=8.0) == list(range(0, 80, 4))
    assert sample_frames(3, fps=0.01, source_fps=8.0) == [0]
    assert sample_frames(4, fps=1, seconds=[0.0, 0.4, 2.5, 3.0]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"count": 0}, VideoError, "has no frames"),
        ({"count": 5, "num_frames": 0}, InputError, "num_frames=0"),
        ({"count": 5, "num_frames": 2.5}, InputError, "num_frames=2.5"),
        ({"count": 5, "num_frames": True}, InputError, "num_frames=True"),
        ({"count": 5, "fps": 0, "source_fps": 3}, InputError, "fps=0"),
        ({"count": 5, "fps": float("nan"), "source_fps": 3}, InputError, "fps=nan"),
        ({"count": 5, "fps": 1, "num_frames": 2}, InputError, "only one of the two"),
        ({"count": 5, "fps": 1}, VideoError, "how many frames a second the video has"),
    ],
)
def test_impossible_wishes_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_frames(**arguments)


# ---------------------------------------------------------------------- metadata


def test_metadata_reads_by_attribute_and_by_key() -> None:
    metadata = VideoMetadata.of({"fps": 4, "frames_indices": np.array([0, 8, 20])}, frames=3)
    assert metadata.timestamps == metadata["timestamps"] == [0.0, 2.0, 5.0]
    assert metadata.total_num_frames == 21
    assert metadata.sampled_fps == pytest.approx(4 * 3 / 21)
    assert dict(metadata)["fps"] == 4
    assert VideoMetadata.of(metadata, 3) == metadata
    with pytest.raises(KeyError, match="is no field"):
        metadata["colour"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"fps": 0}, "fps=0"),
        ({"fps": "fast"}, "fps='fast'"),
        ({"duration": -1}, "duration=-1"),
        ({"total_num_frames": 100}, "tells of 100 frames, but 3 were passed"),
        ({"total_num_frames": 2.5}, "total_num_frames=2.5"),
        ({"frames_indices": [1, 2]}, "2 frames_indices for 3 frames"),
        ({"timestamps": [1.0]}, "1 timestamps for 3 frames"),
        ({"timestamps": [1.0, 0.5, 2.0]}, "run backwards"),
        ({"frames_indices": [0, 5, 90], "total_num_frames": 50}, "from 0 to 90 of a video of 50"),
        ({"frames_indices": [-1, 0, 1]}, "frames_indices=.* whole numbers from 0 on"),
        ({"frames_indices": [0, 1.5, 2]}, "frames_indices=.* whole numbers from 0 on"),
        ({"timestamps": [0.0, float("nan"), 2.0]}, "seconds=.* numbers from 0 on"),
        ({"timestamps": ["00:00", "00:01", "00:02"]}, "seconds=.* numbers from 0 on"),
        ({"timestamps": [-1.0, 0.0, 1.0]}, "seconds=.* numbers from 0 on"),
        ({"fps": True}, "fps=True"),
        ({"speed": 2}, "holds 'speed'"),
    ],
)
def test_metadata_that_cannot_be_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(VideoError, match=message):
        VideoMetadata.of(told, frames=3)


def test_times_that_are_not_known_are_an_error() -> None:
    with pytest.raises(VideoError, match="times of the frames are not known"):
        _ = VideoMetadata.of(None, frames=3).timestamps
