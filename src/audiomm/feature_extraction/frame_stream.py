"""FrameStream: the log-mel frames of a recording that is still going on, equal to those of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.errors import AudioLayoutError, EmptyAudioError, InputError
from .usm_frames import UsmFeatureExtractor


class FrameStream:
    """Samples in as they come, frames out as soon as all their samples are there.

    What comes out, put together, is what the extractor gives for the whole recording at once: `finish` pads as a call
    with the default arguments does.

    Args:
        extractor: Of Gemma 3n or Gemma 4, padding at the right.
        pad_to_multiple_of: As in the extractor's call.
        device: Where to compute; None is the CPU.

    Raises:
        InputError: The extractor pads at the left: a stream has no left end to wait for.
    """

    def __init__(
        self,
        extractor: UsmFeatureExtractor,
        pad_to_multiple_of: int | None = 128,
        device: str | torch.device | None = None,
    ) -> None:
        if extractor.padding_side != "right":
            raise InputError(
                f"padding_side={extractor.padding_side!r}: a stream is padded at its end, so 'right' is needed."
            )
        self.extractor = extractor
        self.multiple = pad_to_multiple_of
        #: Samples heard and frames given so far.
        self.samples = self.frames = 0
        self._rest = torch.zeros(extractor.lead, device=device)

    def push(self, samples: Any) -> Tensor:
        """Frames that became whole.

        Args:
            samples: Mono samples, as few or as many as there are; integers are scaled by their type.

        Returns:
            float32 (frames, feature_size), 0 frames if none did.

        Raises:
            AudioLayoutError: More than one channel or clip.
            InputError: These are no samples; its subclasses say why.
        """
        clips = self.extractor.read_clips(samples, self._rest.device)
        if len(clips) != 1:
            raise AudioLayoutError(f"{len(clips)} rows of samples: a stream takes one, (samples,), mono.")
        self.samples += clips[0].shape[0]
        return self._frames_of(self.extractor.prepare(clips[0]))

    def finish(self) -> Tensor:
        """The frames that the padding at the end completes; afterwards the stream is over.

        Raises:
            EmptyAudioError: All that was heard is too short for a frame.
        """
        extractor = self.extractor
        _, (padded,) = extractor.padded_lengths([self.samples], "longest", None, False, self.multiple)
        real = extractor.real_frames(0, self.samples, extractor.frame_count(padded))
        if not real:
            raise EmptyAudioError(
                f"the stream ended after {self.samples} samples, too few for a frame of {extractor.frame_length} "
                f"samples: at least {extractor.frame_length + 1 - extractor.lead} are needed."
            )
        missing = self._rest.new_full((padded - self.samples,), extractor.padding_value * extractor.input_scale_factor)
        given = self.frames
        return self._frames_of(missing)[: max(0, real.stop - given)]

    def _frames_of(self, prepared: Tensor) -> Tensor:
        self._rest = torch.cat([self._rest, prepared])
        if self._rest.shape[0] <= self.extractor.frame_length:
            return self._rest.new_zeros(0, self.extractor.feature_size)
        (features,) = self.extractor.log_mels([self._rest])
        count = features.shape[0]
        self.frames += count
        self._rest = self._rest[count * self.extractor.hop_length :]
        return features
