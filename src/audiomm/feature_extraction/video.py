"""Videos to what Gemma 4 reads: some frames, each cut into patches as a picture is, and when they are seen.

Arguments and file layouts are those of transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError, InputError, VideoError
from ..media.fetch import FetchLimits
from ..media.video import VideoMetadata, check_sampling, is_video_file, load_video, sample_frames
from .base import PREPROCESSOR_FILE, BatchFeature
from .image import PatchProcessingMixin, UnifiedPatches, check_data_format


class Gemma4VideoProcessor(PatchProcessingMixin):
    """Videos as patches of some of their frames.

    Args:
        max_soft_tokens: Soft tokens a frame takes at most.
        do_normalize: On, with mean 0 and deviation 1, as published: nothing but the rescaling is done.
        do_sample_frames: Pick frames; False takes all that are passed.
        num_frames: Frames picked, evenly spread; None leaves it to `fps`.
        fps: Frames a second picked instead of `num_frames`, over which it wins.
        return_metadata: Add `video_metadata`.
        **settings: Those of `PatchProcessingMixin`.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values_videos", "video_position_ids", "num_frames_per_video"]
    processor_section: ClassVar[str] = "video_processor"
    settings_files: ClassVar[tuple[str, ...]] = ("video_preprocessor_config.json", PREPROCESSOR_FILE)
    type_key: ClassVar[str] = "video_processor_type"

    def __init__(
        self,
        max_soft_tokens: int = 70,
        do_normalize: bool = True,
        do_sample_frames: bool = True,
        num_frames: int | None = 32,
        fps: float | None = None,
        return_metadata: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(max_soft_tokens=max_soft_tokens, do_normalize=do_normalize, **settings)
        try:
            check_sampling(None if fps else num_frames, fps)
        except InputError as error:
            raise ConfigError(str(error)) from error
        self.do_sample_frames = do_sample_frames
        self.num_frames = num_frames
        self.fps = fps
        self.return_metadata = return_metadata

    def __call__(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        return_metadata: bool | None = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: str | torch.device | None = None,
        limits: FetchLimits | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Make patches of frames and their places.

        Args:
            videos: One video or a list. A video is an array of frames (frames, height, width, 3) or (frames, 3, height,
                width), a list of pictures, or a file as `audiomm.media.video.load_video` reads it.
            video_metadata: For each video a dict, a `VideoMetadata` or None. {"fps": ...} tells the times of frames
                that are decoded already, {"timestamps": [...]} those of frames at unequal distances;
                {"frames_indices": [...]} tells which frames of a longer video were passed.
            num_frames, fps: Which frames are picked, for this call; only one of the two.
            return_metadata: Add `video_metadata`, a list of `VideoMetadata` with the frames picked and their times.
            return_tensors: "pt", "np", or None, which leaves the counts lists.
            input_data_format: "channels_first" or "channels_last" for arrays in which both could be.
            data_format: Accepted is "channels_first"; patches have no such order.
            device: Where the result goes.
            limits: What may be fetched where a video is named by a URL; nothing, unless told.
            **settings: Settings for this call only, by the constructor's names (max_soft_tokens=...).

        Returns:
            pixel_values_videos float32 (frames of all videos, patches, patch_size * patch_size * 3),
            video_position_ids int64 (frames of all videos, patches, 2) with -1 for padding, num_frames_per_video
            (videos,) and num_soft_tokens_per_video (videos,), the soft tokens of each frame.

        Raises:
            VideoError: A video cannot be used; its subclasses say why.
            ImageError: A frame cannot be used.
            InputError: There are no videos, or what is wanted is impossible.
            TypeError: A setting is not known, or something is no video.
        """
        check_sampling(num_frames, fps)
        check_data_format(data_format)
        found = flat_videos(videos)
        if not found:
            raise InputError("there are no videos: the list is empty.")
        told = _metadata_list(video_metadata, len(found))
        own = self.with_settings(**settings)
        if num_frames is None and fps is None:
            num_frames, fps = (None, own.fps) if own.fps is not None else (own.num_frames, None)
        wanted = (num_frames, fps) if own.do_sample_frames else (None, None)
        frames, counts, metadata = [], [], []
        for video, known in zip(found, told, strict=True):
            numbers, seen = own._frames(video, known, wanted, input_data_format, limits)
            frames.append(own.patches(numbers))
            counts.append(own.soft_tokens(numbers))
            metadata.append(seen)
        features = BatchFeature(
            {
                "pixel_values_videos": torch.cat([patches for patches, _ in frames]).to(device),
                "video_position_ids": torch.cat([places for _, places in frames]).to(device),
                "num_frames_per_video": [len(patches) for patches, _ in frames],
                "num_soft_tokens_per_video": counts,
            },
            return_tensors,
        )
        if self.return_metadata if return_metadata is None else return_metadata:
            features["video_metadata"] = metadata
        return features

    preprocess = __call__

    def _frames(
        self,
        video: Any,
        told: Any,
        wanted: tuple[int | None, float | None],
        input_data_format: str | None,
        limits: FetchLimits | None,
    ) -> tuple[Tensor, VideoMetadata]:
        """The frames picked, float32 (frames, 3, height, width) at the model's size, and what is known of them."""
        if is_video_file(video):
            if told is not None:
                raise VideoError("video_metadata is for frames that are decoded already; a file has its own.")
            own = {} if limits is None else vars(limits)
            frames, metadata = load_video(video, num_frames=wanted[0], fps=wanted[1], **own)
            video, input_data_format = frames, "channels_last"
        else:
            metadata = VideoMetadata.of(told, len(video))
            places = sample_frames(len(video), *wanted, metadata.fps, metadata.seconds)
            video, metadata = [video[place] for place in places], metadata.taken(places)
        rows: list[Tensor] = []
        size: tuple[int, ...] | None = None
        for frame in video:
            pixels = self.read(frame, input_data_format, limits)
            size = size or tuple(pixels.shape[-2:])
            if tuple(pixels.shape[-2:]) != size:
                raise VideoError(
                    f"frame {len(rows)} has {pixels.shape[-1]} x {pixels.shape[-2]} pixels, those before it {size[1]} "
                    f"x {size[0]}: the frames of a video have one size."
                )
            rows.append(self.scaled(self.fitted(pixels)))
        if size is not None and metadata.width is None:
            metadata.height, metadata.width = size
        return torch.stack(rows), metadata


class Gemma4UnifiedVideoProcessor(UnifiedPatches, Gemma4VideoProcessor):
    """Videos for the 12B, which reads squares of pixels as large as a soft token."""


def flat_videos(videos: Any) -> list[Any]:
    """One video, a list of videos, or lists of lists of videos (the videos of each prompt), as one flat list."""
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim not in (4, 5):
            raise VideoError(
                f"an array of shape {tuple(videos.shape)} is not a video: (frames, height, width, 3), (frames, 3, "
                "height, width), or one axis more for several videos, is needed."
            )
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, (list, tuple)):
        if videos and _is_frame(videos[0]):
            return [videos]
        return [video for item in videos for video in flat_videos(item)]
    if not is_video_file(videos):
        raise TypeError(f"{type(videos).__name__} is not a video: frames, or a file, are needed.")
    return [videos]


def _is_frame(item: Any) -> bool:
    """Whether an item of a list is a picture, so that the list is a video."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim in (2, 3)
    return hasattr(item, "convert") and hasattr(item, "size")


def _metadata_list(told: Any, videos: int) -> list[Any]:
    """What was told about each video."""
    if told is None:
        return [None] * videos
    if not isinstance(told, (list, tuple)):
        told = [told]
    flat = [item for row in told for item in (row if isinstance(row, (list, tuple)) else [row])]
    if len(flat) != videos:
        raise VideoError(f"video_metadata tells of {len(flat)} videos, but {videos} were passed; one each is needed.")
    return flat
