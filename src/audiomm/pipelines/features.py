"""Log-mel features of long recordings that are computed when they are read, window by window.

`generate` reads a window of one recording at a time. Features of an hour would take half as much memory again as its
samples, so only their loudest value is found beforehand: the log-mel of a clip is cut 80 dB below it, and with that
floor the features of a stretch alone are those that it has in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Frames that a stretch is computed with at each side and that are dropped: its edges would be mirrored.
_MARGIN_FRAMES = 4
#: The log-mel is cut at the loudest value minus 8, then (x + 4) / 4: 2 below the loudest.
_FLOOR = 2.0


class RecordingFeatures:
    """Stands for a tensor (recordings, mel bins, frames) of which `features[row : row + 1, :, start : stop]` is read.

    Args:
        extractor: A WhisperFeatureExtractor without dither that pads at the right.
        clips: (samples,) float32 each, at the extractor's rate.
        is_long: Features of whole clips, padded with 0.0 to the longest; False: each clip is one window at most, and
            is padded with silence to a window.
        device: Of what is read.
        dtype: Of what is read.

    Attributes:
        mask: int32 (recordings, frames), 1 where there is audio; of the recordings that there were at first.
    """

    def __init__(
        self, extractor: Any, clips: Sequence[np.ndarray], is_long: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.extractor, self.clips, self.is_long = extractor, list(clips), is_long
        self.device, self.dtype = device, dtype
        self._frames = [len(clip) // extractor.hop_length for clip in self.clips]
        length = self.shape[2]
        # The last frame of a padded clip may lie partly on silence; a whole clip has no such frame.
        ends = self._frames if is_long else [-(-len(clip) // extractor.hop_length) for clip in self.clips]
        self.mask = (torch.arange(length) < torch.tensor(ends)[:, None]).int().to(device)
        self._floors: dict[int, float] = {}

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        length = max(self._frames) if self.is_long else self.extractor.nb_max_frames
        return torch.Size((len(self.clips), self.extractor.feature_size, length))

    def append(self, clip: np.ndarray) -> int:
        """Add a clip, (samples,) float32, as another row of whole clips; returns its frames."""
        self.clips.append(clip)
        self._frames.append(len(clip) // self.extractor.hop_length)
        return self._frames[-1]

    def drop(self, row: int) -> None:
        """Forget the samples of a row that is not read any more."""
        self.clips[row] = np.zeros(0, np.float32)

    def dim(self) -> int:
        """Axes of the tensor: 3."""
        return len(self.shape)

    def __getitem__(self, place: tuple[slice, slice, slice]) -> Tensor:
        """Features (rows, mel bins, frames) of some rows and frames."""
        rows, bins, frames = place
        start, stop, _ = frames.indices(self.shape[2])
        found = [self._read(row, start, max(stop, start)) for row in range(*rows.indices(self.shape[0]))]
        return torch.stack(found).to(self.device, self.dtype)[:, bins]

    def _read(self, row: int, start: int, stop: int) -> Tensor:
        """(mel bins, stop - start) of one row."""
        if not self.is_long:
            return self._extracted(self.clips[row])[:, start:stop]
        features = torch.zeros(self.shape[1], stop - start, device=self.device)
        end = min(stop, self._frames[row])
        if end > start:
            features[:, : end - start] = self._stretch(row, start, end).clamp(min=self._floor(row))
        return features

    def _stretch(self, row: int, start: int, stop: int) -> Tensor:
        """(mel bins, stop - start) of one row, cut 80 dB below its own loudest value."""
        first = max(start - _MARGIN_FRAMES, 0)
        hop, count = self.extractor.hop_length, self._frames[row]
        end = len(self.clips[row]) if stop + _MARGIN_FRAMES >= count else (stop + _MARGIN_FRAMES) * hop
        found = self._extracted(self.clips[row][first * hop : end], truncation=False, padding="do_not_pad")
        return found[:, start - first : stop - first]

    def _floor(self, row: int) -> float:
        """The least value of a row's features."""
        if row not in self._floors:
            size, count = self.extractor.nb_max_frames, self._frames[row]
            loudest = max(float(self._stretch(row, at, min(at + size, count)).max()) for at in range(0, count, size))
            self._floors[row] = loudest - _FLOOR
        return self._floors[row]

    def _extracted(self, samples: np.ndarray, **options: Any) -> Tensor:
        """(mel bins, frames) of samples."""
        if self.device.type == "cuda":
            options["device"] = self.device
        found = self.extractor(samples, sampling_rate=self.extractor.sampling_rate, return_tensors="pt", **options)[
            "input_features"
        ]
        return torch.as_tensor(found)[0]
