"""Gemma4VideoProcessor picks frames, cuts them into patches and tells when they are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.errors import CheckpointNotFoundError, ConfigError, InputError, VideoError
from audiomm.feature_extraction.image import Gemma4ImageProcessor
from audiomm.feature_extraction.video import Gemma4UnifiedVideoProcessor, Gemma4VideoProcessor, flat_videos
from audiomm.media.video import VideoMetadata

FRAMES = np.random.RandomState(0).randint(0, 256, (11, 40, 64, 3), dtype=np.uint8)


def processor(**settings: Any) -> Gemma4VideoProcessor:
    return Gemma4VideoProcessor(**{"patch_size": 4, "num_frames": 4} | settings)


def test_frames_are_what_the_image_processor_makes_of_them() -> None:
    batch = processor()(FRAMES, return_tensors="pt")
    pictures = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)(FRAMES[[0, 2, 5, 8]], return_tensors="pt")
    assert torch.allclose(batch.pixel_values_videos, pictures.pixel_values, atol=1e-6)
    assert torch.equal(batch.video_position_ids, pictures.image_position_ids)
    assert batch.num_frames_per_video.tolist() == [4]
    assert batch.num_soft_tokens_per_video.tolist() == pictures.num_soft_tokens_per_image[:1].tolist()
    assert "video_metadata" not in batch


@pytest.mark.parametrize("form", ["array", "list", "frames", "tensor", "pictures", "nested", "five axes"])
def test_every_form_of_a_video_is_read(form: str) -> None:
    forms = {
        "array": FRAMES,
        "list": [FRAMES],
        "frames": list(FRAMES),
        "tensor": torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
        "pictures": form == "pictures" and [pytest.importorskip("PIL.Image").fromarray(frame) for frame in FRAMES],
        "nested": [[FRAMES]],
        "five axes": FRAMES[None],
    }
    batch = processor()(forms[form], return_tensors="pt")
    assert torch.equal(batch.pixel_values_videos, processor()(FRAMES, return_tensors="pt").pixel_values_videos)


def test_several_videos_of_different_length_and_size_share_a_batch() -> None:
    short = np.random.RandomState(1).randint(0, 256, (3, 90, 30, 3), dtype=np.uint8)
    batch = processor(num_frames=3)([FRAMES, short], return_tensors="pt")
    assert batch.num_frames_per_video.tolist() == [3, 3]
    assert batch.pixel_values_videos.shape == (6, 630, 48)
    assert len(flat_videos([[FRAMES, short], [short]])) == 3


def test_metadata_tells_which_frames_were_picked_and_when_they_are_seen() -> None:
    def seen(told: Any, **options: Any) -> VideoMetadata:
        return processor()(FRAMES, video_metadata=told, return_metadata=True, **options)["video_metadata"][0]

    plain = seen({"fps": 8.0})
    assert plain.frames_indices == [0, 2, 5, 8] and plain.timestamps == [0.0, 0.25, 0.625, 1.0]
    assert (plain.total_num_frames, plain.height, plain.width) == (11, 40, 64)
    picked = seen([{"fps": 10, "frames_indices": list(range(0, 110, 10)), "total_num_frames": 110}])
    assert picked.frames_indices == [0, 20, 50, 80] and picked.timestamps == [0.0, 2.0, 5.0, 8.0]
    unequal = seen([[{"timestamps": [0, 1, 1.5, 2, 4, 8, 9, 10, 11, 12, 60]}]])
    assert unequal.timestamps == [0, 1.5, 8, 11]
    every = seen(VideoMetadata(11, fps=2.0), do_sample_frames=False)
    assert every.frames_indices == list(range(11)) and every.timestamps[-1] == 5.0
    by_rate = seen({"fps": 8.0}, fps=2)
    assert by_rate.frames_indices == [0, 5]


def test_a_rate_of_the_settings_wins_over_their_number_of_frames() -> None:
    batch = processor(fps=4)(FRAMES, video_metadata={"fps": 8.0})
    assert batch.num_frames_per_video == [5]
    assert processor(fps=4)(FRAMES, num_frames=2).num_frames_per_video == [2]


def test_one_frame_is_a_video_and_ten_thousand_are_sampled(caplog: pytest.LogCaptureFixture) -> None:
    assert processor(num_frames=32)(FRAMES[:1]).num_frames_per_video == [1]
    assert "32 frames are wanted but the video has only 1; all are taken" in caplog.text
    long = np.broadcast_to(FRAMES[:1, :8, :8], (10_000, 8, 8, 3))
    batch = processor(num_frames=32)(long, video_metadata={"fps": 25}, return_metadata=True)
    assert batch.num_frames_per_video == [32]
    assert batch["video_metadata"][0].timestamps[1] == pytest.approx(312 / 25)


def test_files_are_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 40, "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    batch = processor()([str(path), FRAMES], return_metadata=True, return_tensors="pt")
    assert batch.num_frames_per_video.tolist() == [4, 4]
    assert batch["video_metadata"][0].timestamps == pytest.approx([0.0, 0.5, 1.25, 2.0])
    with pytest.raises(VideoError, match="a file has its own"):
        processor()(str(path), video_metadata={"fps": 3})


def test_the_12b_reads_squares_as_large_as_a_soft_token() -> None:
    batch = Gemma4UnifiedVideoProcessor(patch_size=4, num_frames=2)(FRAMES, return_tensors="pt")
    assert batch.pixel_values_videos.shape == (2, 70, 12 * 12 * 3)
    assert int((batch.video_position_ids[0] >= 0).all(-1).sum()) == int(batch.num_soft_tokens_per_video[0])


@pytest.mark.parametrize(
    ("videos", "options", "error", "message"),
    [
        ([], {}, InputError, "there are no videos"),
        (FRAMES[:0], {}, VideoError, "the video has no frames"),
        (FRAMES, {"video_metadata": {"fps": 0}}, VideoError, "fps=0"),
        (FRAMES, {"video_metadata": {"fps": -24}}, VideoError, "fps=-24"),
        (FRAMES, {"fps": 1}, VideoError, "how many frames a second the video has"),
        (FRAMES, {"fps": 1, "num_frames": 2}, InputError, "only one of the two"),
        (FRAMES, {"num_frames": 0}, InputError, "num_frames=0"),
        (FRAMES, {"video_metadata": [{"fps": 1}] * 2}, VideoError, "tells of 2 videos, but 1 were passed"),
        (FRAMES, {"video_metadata": {"total_num_frames": 7}}, VideoError, "7 frames, but 11 were passed"),
        ([FRAMES[0], FRAMES[1][:20]], {}, VideoError, "frame 1 has 64 x 20 pixels, those before it 64 x 40"),
        (np.zeros((2, 3)), {}, VideoError, r"an array of shape \(2, 3\) is not a video"),
        (5, {}, TypeError, "int is not a video"),
        (FRAMES, {"junk": 1}, TypeError, "got 'junk'"),
        (FRAMES, {"data_format": "channels_last"}, InputError, "data_format='channels_last'"),
        ("https://example.com/video.mp4", {}, InputError, "URLs are not fetched"),
    ],
)
def test_wrong_calls_are_refused(videos: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        processor()(videos, **options)


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_frames": 0}, "num_frames=0"), ({"fps": -1}, "fps=-1"), ({"fps": "x"}, "fps='x'")]
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processor(**settings)


def test_settings_survive_being_saved(tmp_path: Path) -> None:
    saved = processor(max_soft_tokens=140, do_sample_frames=False)
    (path,) = saved.save_pretrained(tmp_path)
    assert Path(path).name == "video_preprocessor_config.json"
    assert json.loads(Path(path).read_text())["video_processor_type"] == "Gemma4VideoProcessor"
    assert Gemma4VideoProcessor.from_pretrained(tmp_path).to_dict() == saved.to_dict()
    section = {"video_processor": {"num_frames": 3, "max_soft_tokens": 280}}
    (tmp_path / "processor_config.json").write_text(json.dumps(section))
    assert Gemma4VideoProcessor.from_pretrained(tmp_path).num_frames == 3
    with pytest.raises(CheckpointNotFoundError, match="neither video_preprocessor_config.json nor preprocessor_config"):
        Gemma4VideoProcessor.from_pretrained(tmp_path / "..", subfolder="nothing")
