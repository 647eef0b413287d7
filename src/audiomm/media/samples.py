"""Numbers that are already samples: arrays, tensors and lists to float32 in [-1, 1], checked.

Used by `load_audio` and by the feature extractors, so that both read a clip, or refuse it, in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..base.errors import AudioError, AudioLayoutError, NonFiniteAudioError, ShapeError

#: More channels than any recording has; an axis longer than this is time.
MAX_CHANNELS = 64
#: Full scale is 1.0; beyond this the samples are integers that were never scaled, or rubbish.
MAX_AMPLITUDE = 1e4

ACCEPTED = "a numpy array, a torch tensor, or a list of numbers"


def to_float(values: Any, device: str | torch.device | None = None) -> torch.Tensor:
    """Samples as a float32 tensor; integers are scaled by their type, lists are taken as they are.

    Args:
        values: Array, tensor or (nested) list of numbers: int16 / 2^15, int8 / 2^7, int32 / 2^31, unsigned types
            offset by half their range. float64 and half floats are cast.
        device: Where the tensor goes; None leaves it where it is. Integers travel as they are and are scaled there,
            and samples in pinned memory travel while the processor goes on.

    Returns:
        float32 tensor of the same shape; shares memory with a float32 input.

    Raises:
        TypeError: Not numbers.
        AudioError: int64 samples, whose full scale cannot be known.
    """
    from_list = isinstance(values, (list, tuple))
    if from_list:
        values = _array_from_list(values)
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiu":
            raise TypeError(f"samples of type {values.dtype} are not audio: {ACCEPTED} is needed.")
        values = torch.from_numpy(_for_torch(values))
    if not isinstance(values, torch.Tensor) or values.is_complex() or values.dtype == torch.bool:
        kind = f"a {values.dtype} tensor" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise TypeError(f"{kind} is not audio samples: {ACCEPTED} is needed.")
    # Only upwards: a copy to the processor that is not waited for could be read before it is there.
    upwards, values = values.device.type == "cpu", values.detach()
    if values.is_floating_point() or from_list:
        return values.to(device=device, dtype=torch.float32, non_blocking=upwards)
    return _scaled(values.to(device=device, non_blocking=upwards))


def _for_torch(values: np.ndarray) -> np.ndarray:
    """`values` in a layout and type that torch shares; a copy only where it is needed."""
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        half = 2.0 ** (8 * values.dtype.itemsize - 1)
        return ((values.astype(np.float64) - half) / half).astype(np.float32)
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float32)
    if not values.dtype.isnative:
        return values.astype(values.dtype.newbyteorder("="))
    if not values.flags.writeable or any(step < 0 for step in values.strides):
        return values.copy()
    return values


def _array_from_list(values: list[Any] | tuple[Any, ...]) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"the list holds rows of different length ({error}).") from error
    if array.size == 0:
        return array.astype(np.float32)
    return array


def _scaled(values: torch.Tensor) -> torch.Tensor:
    """Integer samples as float32 in [-1, 1)."""
    if values.dtype == torch.int64:
        if values.numel() and int(values.abs().max()) > 1:
            raise AudioError(
                f"int64 samples up to {int(values.abs().max())}: their full scale is unknown. Pass int16 or int32 "
                "samples (they are scaled by their type), or floats in [-1, 1]."
            )
        return values.to(torch.float32)
    if values.dtype == torch.uint8:
        return (values.to(torch.float32) - 128.0) / 128.0
    return values.to(torch.float32) / float(2 ** (torch.iinfo(values.dtype).bits - 1))


def check_finite(samples: torch.Tensor, where: str = "audio", first_sample: int = 0) -> None:
    """Refuse NaN, infinity and amplitudes that no scaled audio has.

    Args:
        samples: Float tensor, (samples,) or (samples, channels).
        where: What the message calls it.
        first_sample: Where in the audio `samples` starts.

    Raises:
        NonFiniteAudioError: With the first bad sample's index.
    """
    if samples.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(samples))
    if -MAX_AMPLITUDE <= low <= high <= MAX_AMPLITUDE:
        return
    bad = ~(samples.abs() <= MAX_AMPLITUDE)
    first = bad.nonzero()[0]
    place = f"sample {first_sample + int(first[0])}" + (f" of channel {int(first[1])}" if samples.ndim > 1 else "")
    value = float(samples[tuple(first)])
    hint = (
        "samples are to lie in [-1, 1]; unscaled integers are to be passed as an integer array"
        if np.isfinite(value)
        else f"{int((~torch.isfinite(samples)).sum())} samples are not finite; repair the recording or cut them out"
    )
    raise NonFiniteAudioError(f"{where}: {place} is {value:g}; {hint}.")


def as_waveforms(clips: Any, device: str | torch.device | None = None) -> list[torch.Tensor]:
    """One clip or a batch of mono clips as a list of float32 (samples,) tensors.

    Args:
        clips: A 1-D array, tensor or list of numbers is one clip; a list of those is a batch; a 2-D array or tensor
            (clips, samples) is a batch of mono clips.
        device: Where the tensors go; None leaves tensors where they are, the rest on the CPU.

    Raises:
        TypeError: Something else, such as a path: that goes through `load_audio` first.
        AudioLayoutError: Several channels.
        ShapeError: More than two axes.
        NonFiniteAudioError: A sample is NaN, infinite or absurdly large.
    """
    given: Any
    if isinstance(clips, (list, tuple)) and clips and _is_clip(clips[0]):
        given, waveforms = clips, [_mono(clip, device, f"clip {place}") for place, clip in enumerate(clips)]
    elif isinstance(clips, (np.ndarray, torch.Tensor)) and clips.ndim == 2:
        if has_channels_last(clips.shape):
            raise AudioLayoutError(
                f"an array of shape {tuple(clips.shape)} looks like (samples, channels), but a 2-D array is a batch of "
                "mono clips, (clips, samples). Average the channels, or call "
                "audiomm.media.load_audio(array, layout='channels_last')."
            )
        given, waveforms = clips, list(to_float(clips, device))
    elif isinstance(clips, (np.ndarray, torch.Tensor, list, tuple)):
        given, waveforms = [clips], [_mono(clips, device, "audio")]
    else:
        hint = " Read files with audiomm.media.load_audio first." if isinstance(clips, (str, bytes, dict)) else ""
        raise TypeError(
            f"{type(clips).__name__} is not audio samples: {ACCEPTED}, or a list of clips, is needed.{hint}"
        )
    for place, (waveform, samples) in enumerate(zip(waveforms, given, strict=True)):
        # Scaled integers are what they should be, and looking at them would wait for their device.
        if not _is_whole(samples):
            check_finite(waveform, "audio" if len(waveforms) == 1 else f"clip {place}")
    return waveforms


def has_channels_last(shape: Sequence[int]) -> bool:
    """Whether an array of two axes looks like (samples, channels)."""
    return shape[1] <= MAX_CHANNELS < shape[0]


def _is_whole(clip: Any) -> bool:
    """Whether a clip is an array or tensor of integers."""
    if isinstance(clip, torch.Tensor):
        return not clip.is_floating_point()
    return isinstance(clip, np.ndarray) and clip.dtype.kind in "iu"


def _is_clip(item: Any) -> bool:
    """Whether an item of a list is itself a clip, not a number."""
    return isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) > 0


def _mono(clip: Any, device: str | torch.device | None, where: str) -> torch.Tensor:
    if not isinstance(clip, (np.ndarray, torch.Tensor, list, tuple)):
        raise TypeError(f"{where} is a {type(clip).__name__}: {ACCEPTED} is needed.")
    waveform = to_float(clip, device)
    if waveform.ndim == 2 and waveform.shape[0] == 1:
        return waveform[0]
    if waveform.ndim == 2:
        raise AudioLayoutError(
            f"{where} has shape {tuple(waveform.shape)}: a clip of a batch is mono, (samples,). Average the channels, "
            "or load it with audiomm.media.load_audio."
        )
    if waveform.ndim != 1:
        raise ShapeError(f"{where} has shape {tuple(waveform.shape)}: mono audio (samples,) is needed.")
    return waveform
