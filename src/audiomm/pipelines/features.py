"""Log-mel features of long recordings that are computed when they are read, window by window.

`generate` reads a window of one recording at a time. Features of an hour would take half as much memory again as its
samples, so only their loudest value is found beforehand: the log-mel of a clip is cut 80 dB below it, and with that
floor the features of a stretch alone are those that it has in the whole. On a GPU it is the other way round: samples
go there in 16 bits, and features are made there beside the decoding of earlier windows, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Frames that a stretch is computed with at each side and that are dropped: its edges would be mirrored.
_MARGIN_FRAMES = 4
#: The log-mel is cut at the loudest value minus 8, then (x + 4) / 4: 2 below the loudest.
_FLOOR = 2.0
#: Windows that a GPU transforms at once: enough to be busy, with half a gigabyte for spectra in float64.
_WINDOWS_AT_ONCE = 16


def recording_features(
    extractor: Any, clips: Sequence[np.ndarray], is_long: bool, device: torch.device, dtype: torch.dtype
) -> RecordingFeatures:
    """The kind of `RecordingFeatures` that suits the device; arguments are those of it."""
    kind = FeaturesAhead if device.type == "cuda" else RecordingFeatures
    return kind(extractor, clips, is_long, device, dtype)


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
            return self._extracted(self.clips[row])[0, :, start:stop]
        features = torch.zeros(self.shape[1], stop - start, device=self.device)
        end = min(stop, self._frames[row])
        if end > start:
            stretch = self._stretch(self.clips[row], start, end)
            features[:, : end - start] = stretch.clamp(min=self._floor(row))
        return features

    def _stretch(self, clip: np.ndarray | Tensor, start: int, stop: int) -> Tensor:
        """(mel bins, stop - start) of a clip, cut 80 dB below its own loudest value."""
        first = max(start - _MARGIN_FRAMES, 0)
        hop, count = self.extractor.hop_length, len(clip) // self.extractor.hop_length
        end = len(clip) if stop + _MARGIN_FRAMES >= count else (stop + _MARGIN_FRAMES) * hop
        found = self._extracted(clip[first * hop : end], truncation=False, padding="do_not_pad")
        return found[0, :, start - first : stop - first]

    def _floor(self, row: int) -> float:
        """The least value of a row's features."""
        if row not in self._floors:
            size, clip = self.extractor.nb_max_frames, self.clips[row]
            count = self._frames[row]
            loudest = max(float(self._stretch(clip, at, min(at + size, count)).max()) for at in range(0, count, size))
            self._floors[row] = loudest - _FLOOR
        return self._floors[row]

    def _extracted(self, samples: Any, **options: Any) -> Tensor:
        """(clips, mel bins, frames) of the samples of a clip or of several, computed where they are."""
        rate = self.extractor.sampling_rate
        batch = self.extractor(samples, sampling_rate=rate, return_tensors="pt", **options)
        return torch.as_tensor(batch["input_features"])


class FeaturesAhead(RecordingFeatures):
    """Features that are made on a GPU before they are read, by a thread and on a stream of their own.

    Samples travel as int16 where that holds them all, as it does for most files, from pinned memory; what is made of
    them stays on the device until its row is dropped: 58 MB an hour with 80 mel bins in 16 bits.
    """

    def __init__(
        self, extractor: Any, clips: Sequence[np.ndarray], is_long: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(extractor, clips, is_long, device, dtype)
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        #: For each row the work that makes it, with others or alone, and its place there.
        self._work: dict[int, tuple[Future[tuple[Tensor, Any]], int]] = {}
        count = 1 if is_long else _WINDOWS_AT_ONCE
        for first in range(0, len(self.clips), count):
            self._begin(first, self.clips[first : first + count])

    def append(self, clip: np.ndarray) -> int:
        frames = super().append(clip)
        self._begin(len(self.clips) - 1, [clip])
        return frames

    def drop(self, row: int) -> None:
        super().drop(row)
        del self._work[row]

    def _begin(self, first: int, clips: list[np.ndarray]) -> None:
        """Have the features of rows from `first` on made: of one long one, or of some windows."""
        make = self._long if self.is_long else self._windows
        work = self._worker.submit(self._made, make, clips)
        self._work.update((first + place, (work, place)) for place in range(len(clips)))

    def _made(self, make: Callable[[list[Tensor]], Tensor], clips: list[np.ndarray]) -> tuple[Tensor, Any]:
        """(rows, mel bins, frames) of clips, and the event after which they are there."""
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            made = make([self._sent(clip) for clip in clips]).to(self.dtype)
            return made, None if self._stream is None else self._stream.record_event()

    def _sent(self, clip: np.ndarray) -> Tensor:
        """A clip on the device, (samples,) int16 or float32."""
        samples = torch.from_numpy(np.require(as_pcm(clip), requirements="W"))
        return (samples if self._stream is None else samples.pin_memory()).to(self.device, non_blocking=True)

    def _windows(self, clips: list[Tensor]) -> Tensor:
        return self._extracted(clips)

    def _long(self, clips: list[Tensor]) -> Tensor:
        (clip,) = clips
        size, count = _WINDOWS_AT_ONCE * self.extractor.nb_max_frames, len(clip) // self.extractor.hop_length
        stretches = [self._stretch(clip, at, min(at + size, count)) for at in range(0, count, size)]
        whole = torch.cat(stretches, dim=1)[None]
        # The loudest value stays on the device: nobody waits for it.
        return torch.maximum(whole, whole.amax() - _FLOOR, out=whole)

    def _read(self, row: int, start: int, stop: int) -> Tensor:
        work, place = self._work[row]
        made, event = work.result()
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            # Whoever gets its memory next waits for what this stream still reads.
            made.record_stream(stream)
        found = made[place, :, start:stop]
        return torch.nn.functional.pad(found, (0, stop - start - found.shape[1]))


def as_pcm(samples: np.ndarray) -> np.ndarray:
    """Samples (samples,) float32 as int16 where that holds them exactly, else as they are."""
    # The first second tells in most cases: what was resampled or mixed is anywhere between whole numbers.
    for piece in (samples[:16000], samples):
        scaled = piece * np.float32(2**15)
        with np.errstate(invalid="ignore"):
            pcm = scaled.astype(np.int16)
        if not np.array_equal(pcm, scaled):
            return samples
    return pcm
