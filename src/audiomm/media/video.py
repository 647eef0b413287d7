"""Videos to frames, and to the moments at which they are seen.

Frames are picked before they are decoded: a first pass over the packets, which decodes nothing, tells how many frames
there are and when each is seen (their distances need not be equal); then only the stretches from a key frame to a
frame that is wanted are decoded, by PyAV. Frames that are decoded already come with a `VideoMetadata`, or a dict.
"""

from __future__ import annotations

import io
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..base.errors import InputError, VideoDecodeError, VideoError, VideoLimitError
from .fetch import VIDEO, FetchLimits, describe, fetch
from .image import MAX_PIXELS
from .pyav import import_av

logger = logging.getLogger("audiomm.media")

#: A file may declare so much more than its frames fill; codecs and rounding do that.
_SLACK_SECONDS = 1.0
#: Most pixels of all frames taken from one video together; 1.5 GB as RGB.
MAX_VIDEO_PIXELS = 500_000_000


@dataclass
class VideoMetadata:
    """What is known of a video beside its pictures; also read by keys, `metadata["fps"]`.

    Attributes:
        total_num_frames: Frames of the source.
        fps: Frames a second of the source; an average where their distances differ.
        width, height: Pixels.
        duration: Seconds.
        video_backend: What decoded it.
        frames_indices: Which frames of the source were taken; None before that.
        seconds: When each frame taken is seen; None where `frames_indices` and `fps` tell.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: list[int] | None = None
    seconds: list[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.total_num_frames, bool) or not isinstance(self.total_num_frames, (int, np.integer)):
            raise VideoError(f"total_num_frames={self.total_num_frames!r}: a whole number is needed.")
        for name in ("fps", "duration"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise VideoError(f"{name}={value!r}: a number above 0 is needed.")
        for name, kinds, needed in (("frames_indices", "iu", "whole numbers"), ("seconds", "iuf", "numbers")):
            if getattr(self, name) is not None:
                values = np.asarray(getattr(self, name))
                if values.size and (values.ndim != 1 or values.dtype.kind not in kinds or not (values >= 0).all()):
                    raise VideoError(f"{name}={getattr(self, name)!r}: a list of {needed} from 0 on is needed.")
                setattr(self, name, values.tolist())
        if self.seconds is not None and not all(a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise VideoError("the times of the frames run backwards; pass frames and times in order.")

    @classmethod
    def of(cls, told: VideoMetadata | Mapping[str, Any] | None, frames: int) -> VideoMetadata:
        """From what a caller told about `frames` frames that are decoded.

        Args:
            told: Metadata; or a dict of its fields, where `total_num_frames` may be missing and `timestamps` is another
                name of `seconds`; or None.
            frames: How many were passed.

        Raises:
            VideoError: A field is not known or impossible, or does not fit the number of frames.
        """
        values = {} if told is None else dict(told)
        if values.get("timestamps") is not None:
            values["seconds"] = values.pop("timestamps")
        unknown = sorted(set(values) - {field.name for field in fields(cls)} - {"timestamps", "sampled_fps"})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise VideoError(f"video_metadata holds {', '.join(map(repr, unknown))}; its fields are {known}.")
        chosen = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        indices = chosen.get("frames_indices")
        last = frames - 1 if indices is None or len(indices) == 0 else max(*indices, frames - 1)
        metadata = cls(**{"total_num_frames": int(last) + 1, **chosen})
        indices = metadata.frames_indices
        if indices is None and metadata.total_num_frames != frames:
            raise VideoError(
                f"video_metadata tells of {metadata.total_num_frames} frames, but {frames} were passed. If they were "
                "picked from a longer video, pass which: frames_indices=[...]."
            )
        for name, numbers in (("frames_indices", indices), ("timestamps", metadata.seconds)):
            if numbers is not None and len(numbers) != frames:
                raise VideoError(f"video_metadata has {len(numbers)} {name} for {frames} frames; one each is needed.")
        total = metadata.total_num_frames
        if indices and not 0 <= min(indices) <= max(indices) < total:
            raise VideoError(f"frames_indices from {min(indices)} to {max(indices)} of a video of {total} frames.")
        return metadata

    @property
    def timestamps(self) -> list[float]:
        """When each frame taken is seen, in seconds.

        Raises:
            VideoError: Neither times nor frames a second are known.
        """
        if self.seconds is not None:
            return self.seconds
        if self.fps is None:
            raise VideoError("the times of the frames are not known: pass video_metadata={'fps': ...}.")
        indices = range(self.total_num_frames) if self.frames_indices is None else self.frames_indices
        return [float(index / self.fps) for index in indices]

    @property
    def sampled_fps(self) -> float | None:
        """Frames taken a second; None where it cannot be told."""
        if self.fps is None or self.frames_indices is None or self.total_num_frames == 0:
            return self.fps
        return len(self.frames_indices) / self.total_num_frames * self.fps

    def keys(self) -> list[str]:
        """Names of all fields."""
        return [field.name for field in fields(self)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, name: str) -> Any:
        if name not in (*self.keys(), "timestamps", "sampled_fps"):
            raise KeyError(f"{name!r} is no field of a video's metadata; there are {', '.join(self.keys())}.")
        return getattr(self, name)

    def taken(self, places: Sequence[int]) -> VideoMetadata:
        """The metadata after `places` of the frames have been picked."""
        indices = range(self.total_num_frames) if self.frames_indices is None else self.frames_indices
        values = {name: self[name] for name in self.keys()}
        values["frames_indices"] = [indices[place] for place in places]
        if self.seconds is not None:
            values["seconds"] = [self.seconds[place] for place in places]
        return VideoMetadata(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def check_sampling(num_frames: int | None, fps: float | None) -> None:
    """Refuse impossible wishes for frames.

    Raises:
        InputError: Both are wanted, or one is no number above 0.
    """
    if num_frames is not None and fps is not None:
        raise InputError(f"num_frames={num_frames} and fps={fps}: pass only one of the two.")
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, (int, np.integer)) or num_frames < 1
    ):
        raise InputError(f"num_frames={num_frames!r}: a whole number above 0 is needed.")
    if fps is not None and not (_is_number(fps) and 0 < fps < math.inf):
        raise InputError(f"fps={fps!r}: a number above 0 is needed.")


def sample_frames(
    count: int,
    num_frames: int | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    seconds: Sequence[float] | None = None,
) -> list[int]:
    """Which of `count` frames to take: evenly spread from the first one on, as transformers does.

    Args:
        count: Frames there are.
        num_frames: Frames wanted. All are taken, with a warning, when there are fewer.
        fps: Frames a second wanted; only one of the two.
        source_fps: Frames a second there are; needed with `fps`, unless `seconds` tells.
        seconds: When each frame is seen.

    Returns:
        Indices, rising; all, when neither is wanted.

    Raises:
        VideoError: There are no frames, or their rate is not known.
        InputError: Both are wanted, or something impossible is.
    """
    if count < 1:
        raise VideoError("the video has no frames.")
    check_sampling(num_frames, fps)
    if fps is not None:
        if seconds is not None:
            moments = np.arange(seconds[0], seconds[-1] + 1e-6, 1.0 / fps)
            return sorted({int(place) for place in np.searchsorted(seconds, moments + 1e-6, side="right") - 1})
        if source_fps is None:
            raise VideoError(f"fps={fps} is wanted, but not known is how many frames a second the video has.")
        num_frames = max(1, int(count / source_fps * fps))
    if num_frames is None:
        return list(range(count))
    if num_frames > count:
        logger.warning("%d frames are wanted but the video has only %d; all are taken.", num_frames, count)
        return list(range(count))
    return [place * count // num_frames for place in range(num_frames)]


def load_video(
    video: Any,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_pixels: int = MAX_VIDEO_PIXELS,
    allow_urls: bool = False,
    allowed_hosts: Collection[str] | None = None,
    max_bytes: int = 1 << 30,
    timeout_seconds: float = 60.0,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode frames of a video file.

    Args:
        video: A path, bytes, a binary file object, a data URI, a URL (see `allow_urls`), or a dict with "bytes" or
            "path".
        num_frames: So many frames, evenly spread; None is all.
        fps: So many frames a second, instead.
        max_pixels: Of all frames taken together.
        allow_urls: Fetch http(s) addresses from any public host.
        allowed_hosts: Fetch http(s) addresses from these hosts, private ones too, and no other.
        max_bytes: Of a download, a data URI or a file object.
        timeout_seconds: For a download.

    Returns:
        uint8 (frames, height, width, 3), RGB, and the metadata, with the moments at which the frames are seen.

    Raises:
        VideoFileNotFoundError: There is no such file (also a FileNotFoundError).
        VideoDecodeError: Not a video, or a broken one.
        VideoLimitError: Too many pixels or bytes.
        MissingExtra: PyAV is not installed, `pip install 'audiomm[video]'`.
        InputError: What is wanted is impossible.
        TypeError: Not a video at all.
    """
    if isinstance(video, Mapping):
        video = next((video[key] for key in ("bytes", "path", "video") if video.get(key) is not None), None)
    name = describe(video)
    source = fetch(video, FetchLimits(allow_urls, allowed_hosts, max_bytes, timeout_seconds), VIDEO)
    av = import_av("video")
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.video:
                raise VideoDecodeError(f"{name} has no pictures, only sound.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            moments, keys = _moments(name, container, stream)
            metadata = _metadata(stream, moments)
            _check_whole(name, container, stream, metadata, av.time_base)
            places = sample_frames(len(moments), num_frames, fps, metadata.fps, metadata.seconds)
            _check_size(name, metadata, len(places), max_pixels)
            frames = list(_decoded(name, container, stream, [moments[place] for place in places], keys))
    except av.FFmpegError as error:
        raise VideoDecodeError(f"{name} cannot be decoded as a video: {error}.") from error
    # A phone held upright writes lying pictures and a mark that says so.
    metadata.height, metadata.width = frames[0].shape[:2]
    return np.stack(frames), metadata.taken(places)


def is_video_file(video: Any) -> bool:
    """Whether `load_video` is for this: a path, bytes, a file object or a dict of one; not frames."""
    return isinstance(video, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)) or hasattr(video, "read")


def _moments(name: str, container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames in order, and of the key frames, in the stream's unit; nothing is decoded."""
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if any(packet.pts is None for packet in packets):
        raise VideoDecodeError(f"{name} does not tell when its frames are seen; put it into an mp4 or mkv file.")
    moments = sorted({packet.pts for packet in packets})
    if not moments:
        raise VideoDecodeError(f"{name} has no frames.")
    return moments, sorted(packet.pts for packet in packets if packet.is_keyframe)


def _metadata(stream: Any, moments: list[int]) -> VideoMetadata:
    # Exact until the end: a frame at 3 s must not be at 2.9999 s.
    seconds = [float((moment - moments[0]) * stream.time_base) for moment in moments]
    rate = float(stream.average_rate) if stream.average_rate else None
    if len(moments) > 1 and seconds[-1] > 0:
        rate = (len(moments) - 1) / seconds[-1]
    return VideoMetadata(
        total_num_frames=len(moments),
        fps=rate,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=seconds[-1] + 1.0 / rate if rate else None,
        video_backend="pyav",
        seconds=seconds,
    )


def _check_whole(name: str, container: Any, stream: Any, metadata: VideoMetadata, units_a_second: int) -> None:
    """Refuse a file whose frames end long before the time it declares."""
    declared = 0.0
    if stream.duration is not None:
        declared = float(stream.duration * stream.time_base)
    elif container.duration is not None and not container.streams.audio:
        declared = container.duration / units_a_second
    found = metadata.duration or 0.0
    if found < declared - _SLACK_SECONDS:
        raise VideoDecodeError(f"{name} is damaged: it declares {declared:.1f} s but its frames end at {found:.1f} s.")


def _check_size(name: str, metadata: VideoMetadata, frames: int, max_pixels: int) -> None:
    pixels = (metadata.width or 0) * (metadata.height or 0)
    if pixels > MAX_PIXELS or pixels * frames > max_pixels:
        raise VideoLimitError(
            f"{name}: {frames} frames of {metadata.width} x {metadata.height} are {frames * pixels:,} pixels; "
            f"{max_pixels:,} are allowed (max_pixels=), {MAX_PIXELS:,} a frame. Take fewer with num_frames= or fps=."
        )


def _decoded(name: str, container: Any, stream: Any, wanted: list[int], keys: list[int]) -> Iterator[np.ndarray]:
    """uint8 (height, width, 3) of each frame wanted, upright, decoding from the last key frame before it."""
    container.seek(wanted[0], stream=stream)
    frames, reached = container.decode(stream), -math.inf
    for moment in wanted:
        before = bisect_right(keys, moment) - 1
        if before >= 0 and keys[before] > reached > -math.inf:
            container.seek(keys[before], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            reached = frame.pts if frame.pts is not None else reached
            if reached >= moment:
                yield _upright(frame)
                break
        else:
            raise VideoDecodeError(
                f"{name} is damaged: the frame at {float(moment * stream.time_base):.3f} s could not be decoded."
            )


def _upright(frame: Any) -> np.ndarray:
    """uint8 (height, width, 3) of a frame, turned as the file says it is to be shown, in quarters of a circle."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    # Degrees against the clock; the oldest releases of PyAV do not tell.
    return np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90) % 4)
