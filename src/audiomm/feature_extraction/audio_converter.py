"""keras-hub's audio converters: its argument names and return values over this package's extractors.

A converter takes one clip, and then gives features without a batch axis, or a batch, and then gives one. Where
keras-hub and the published models' own front end differ by a frame or by rounding, this is the front end's answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ..base.errors import ConfigError
from ..base.presets import FromPreset, checkpoint_of
from .base import FeatureExtractionMixin, SequenceFeatureExtractor
from .usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor
from .whisper import WhisperFeatureExtractor

#: Settings of a keras layer that say nothing about sound; `dtype` is always float32 here.
_LAYER_SETTINGS = ("name", "dtype", "trainable")


class AudioConverter(FromPreset):
    """What the three converters share: a configuration that can be written and read, and presets."""

    extractor_class: ClassVar[type[SequenceFeatureExtractor]]
    #: Setting of the converter -> setting of the extractor that has the same value.
    from_extractor: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **layer: Any) -> None:
        unknown = sorted(set(layer) - set(_LAYER_SETTINGS))
        if unknown:
            raise TypeError(f"{type(self).__name__}() does not know {', '.join(unknown)}.")
        if layer.get("dtype") not in (None, "float32"):
            raise ConfigError(f"dtype={layer['dtype']!r}: accepted is 'float32'; cast the result.")
        self._settings: dict[str, Any] = {}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from what `get_config` gave."""
        return cls(**config)

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], **overrides: Any) -> Self:
        """Build with the settings of a model's folder or hub id.

        Args:
            preset: A preset's name, or a folder or hub id with a preprocessor_config.json or processor_config.json.
            **overrides: Constructor arguments that go before the file's.
        """
        extractor: FeatureExtractionMixin = cls.extractor_class.from_pretrained(checkpoint_of(preset, cls.families))
        settings = {name: getattr(extractor, source) for name, source in cls.from_extractor.items()}
        return cls(**{**settings, **overrides})


class Gemma3nAudioConverter(AudioConverter):
    """Clips to Gemma 3n's features and mask.

    Args: all of `Gemma3nAudioFeatureExtractor`, and none has a default; besides
        seed: Makes the noise of `dither` a function of the clip and of this number; None draws from numpy's generator.
        **layer: name and dtype ("float32").

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("gemma3n",)
    extractor_class: ClassVar[type[SequenceFeatureExtractor]] = Gemma3nAudioFeatureExtractor
    _ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "feature_size", "sampling_rate", "padding_value", "return_attention_mask", "frame_length_ms", "hop_length_ms",
        "min_frequency", "max_frequency", "preemphasis", "preemphasis_htk_flavor", "fft_overdrive", "dither",
        "input_scale_factor", "mel_floor", "per_bin_mean", "per_bin_stddev", "padding_side",
    )  # fmt: skip
    from_extractor: ClassVar[Mapping[str, str]] = {name: name for name in _ARGUMENTS}

    def __init__(
        self,
        feature_size: int,
        sampling_rate: int,
        padding_value: float,
        return_attention_mask: bool,
        frame_length_ms: float,
        hop_length_ms: float,
        min_frequency: float,
        max_frequency: float,
        preemphasis: float,
        preemphasis_htk_flavor: bool,
        fft_overdrive: bool,
        dither: float,
        input_scale_factor: float,
        mel_floor: float,
        per_bin_mean: Sequence[float] | None,
        per_bin_stddev: Sequence[float] | None,
        padding_side: str,
        seed: int | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(**layer)
        self.feature_size, self.sampling_rate = feature_size, sampling_rate
        self.padding_value, self.return_attention_mask = padding_value, return_attention_mask
        self.frame_length_ms, self.hop_length_ms = frame_length_ms, hop_length_ms
        self.min_frequency, self.max_frequency = min_frequency, max_frequency
        self.preemphasis, self.preemphasis_htk_flavor = preemphasis, preemphasis_htk_flavor
        self.fft_overdrive, self.dither, self.seed = fft_overdrive, dither, seed
        self.input_scale_factor, self.mel_floor = input_scale_factor, mel_floor
        self.per_bin_mean, self.per_bin_stddev = per_bin_mean, per_bin_stddev
        self.padding_side = padding_side
        self._settings = {name: getattr(self, name) for name in self._ARGUMENTS} | {"seed": seed}
        settings = {name: self._settings[name] for name in self._ARGUMENTS}
        self.extractor = Gemma3nAudioFeatureExtractor(**settings)
        self.extractor.dither_seed = seed

    @property
    def window(self) -> Tensor:
        """float32 (frame length,)."""
        return torch.from_numpy(self.extractor.window)

    @property
    def mel_filters(self) -> Tensor:
        """float32 (fft length // 2 + 1, feature_size)."""
        return torch.from_numpy(self.extractor.mel_filters).float()

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str | None = "longest",
        max_length: int | None = 480_000,
        truncation: bool = True,
        pad_to_multiple_of: int | None = 128,
        return_attention_mask: bool | None = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Features and mask of one clip or of a batch; clips of a batch may differ in length.

        Args:
            raw_speech: (samples,) is one clip; a list of clips or (clips, samples) is a batch.
            padding, max_length, truncation, pad_to_multiple_of: As of `Gemma3nAudioFeatureExtractor`.
            return_attention_mask: Whether there is a mask; None follows the setting.

        Returns:
            float32 (frames, feature_size) and int32 (frames,), 1 where a frame is real; both with a batch axis before
            if `raw_speech` is a batch. The mask is None if it is not wanted.

        Raises:
            InputError: As of `Gemma3nAudioFeatureExtractor`.
        """
        batch = self.extractor(
            raw_speech, padding, max_length, truncation, pad_to_multiple_of, "pt", return_attention_mask
        )
        features, mask = batch["input_features"], batch.get("input_features_mask")
        mask = None if mask is None else mask.to(torch.int32)
        if _is_batch(raw_speech):
            return features, mask
        return features[0], None if mask is None else mask[0]


class _WindowConverter(AudioConverter):
    """A converter whose every result is as long as its window, without a mask."""

    def __init__(
        self, num_mels: int, num_fft_bins: int, stride: int, sampling_rate: int, max_audio_length: int, **layer: Any
    ) -> None:
        super().__init__(**layer)
        self.num_mels, self.num_fft_bins, self.stride = num_mels, num_fft_bins, stride
        self.sampling_rate, self.max_audio_length = sampling_rate, max_audio_length
        self.num_samples = sampling_rate * max_audio_length
        self._settings = {
            "num_mels": num_mels, "num_fft_bins": num_fft_bins, "stride": stride, "sampling_rate": sampling_rate,
            "max_audio_length": max_audio_length,
        }  # fmt: skip

    def audio_shape(self) -> tuple[int, int]:
        """(frames, mel bands) of a result."""
        return self.num_samples // self.stride, self.num_mels


class Gemma4AudioConverter(_WindowConverter):
    """Clips to Gemma 4's features, always of a whole window.

    Args:
        num_mels: Mel bands.
        num_fft_bins: Length of the transform.
        stride: Samples from frame to frame.
        sampling_rate: Samples a second.
        max_audio_length: Seconds of the window.
        min_frequency, max_frequency: Edges of the bands, Hz.
        mel_floor: Added to mel magnitudes.
        per_bin_mean, per_bin_stddev: Taken off, and divided out of, each band.
        frame_length: Samples of a frame; None is `num_fft_bins`.
        **layer: name and dtype ("float32").

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("gemma4",)
    extractor_class: ClassVar[type[SequenceFeatureExtractor]] = Gemma4AudioFeatureExtractor
    from_extractor: ClassVar[Mapping[str, str]] = {
        "num_mels": "feature_size", "num_fft_bins": "fft_length", "stride": "hop_length",
        "sampling_rate": "sampling_rate", "min_frequency": "min_frequency", "max_frequency": "max_frequency",
        "mel_floor": "mel_floor", "per_bin_mean": "per_bin_mean", "per_bin_stddev": "per_bin_stddev",
        "frame_length": "frame_length",
    }  # fmt: skip

    def __init__(
        self,
        num_mels: int = 128,
        num_fft_bins: int = 512,
        stride: int = 160,
        sampling_rate: int = 16_000,
        max_audio_length: int = 30,
        min_frequency: float = 0.0,
        max_frequency: float = 8000.0,
        mel_floor: float = 1e-5,
        per_bin_mean: Sequence[float] | None = None,
        per_bin_stddev: Sequence[float] | None = None,
        frame_length: int | None = 320,
        **layer: Any,
    ) -> None:
        super().__init__(num_mels, num_fft_bins, stride, sampling_rate, max_audio_length, **layer)
        self.frame_length = frame_length or num_fft_bins
        self.extractor = Gemma4AudioFeatureExtractor(
            num_mels,
            sampling_rate,
            min_frequency=min_frequency,
            max_frequency=max_frequency,
            mel_floor=mel_floor,
            per_bin_mean=per_bin_mean,
            per_bin_stddev=per_bin_stddev,
            frame_length=self.frame_length,
            hop_length=stride,
            fft_overdrive=num_fft_bins > 1 << (self.frame_length - 1).bit_length(),
        )
        if self.extractor.fft_length != num_fft_bins:
            raise ConfigError(
                f"num_fft_bins={num_fft_bins}: for frames of {self.frame_length} samples the power of two that holds "
                "one, or twice that, is needed."
            )
        self.min_frequency, self.max_frequency, self.mel_floor = min_frequency, max_frequency, float(mel_floor)
        self.per_bin_mean, self.per_bin_stddev = self.extractor.per_bin_mean, self.extractor.per_bin_stddev
        self._settings |= {
            name: getattr(self, name)
            for name in (
                "min_frequency",
                "max_frequency",
                "mel_floor",
                "per_bin_mean",
                "per_bin_stddev",
                "frame_length",
            )
        }

    def __call__(self, audio: Any) -> Tensor:
        """Features of one clip (samples,), or of a batch of clips.

        Returns:
            float32 (frames, num_mels), with a batch axis before if `audio` is a batch; a clip longer than the window
            is cut, with a warning. Frames behind its end are those of silence.

        Raises:
            InputError: Audio that cannot be used; its subclasses say why.
        """
        extractor = self.extractor
        clips = extractor.read_clips(audio)
        frames, _ = self.audio_shape()
        lengths = [clip.shape[0] for clip in clips]
        kept = [min(length, self.num_samples) for length in lengths]
        extractor.tell_what_is_cut(lengths, kept)
        whole = (frames - 1) * self.stride + self.frame_length + 1 - extractor.lead
        padded = [functional.pad(clip[:used], (0, whole - used)) for clip, used in zip(clips, kept, strict=True)]
        rows = extractor.log_mels([extractor.led(extractor.prepare(clip)) for clip in padded])
        return torch.stack(rows) if _is_batch(audio) else rows[0]


class WhisperAudioConverter(_WindowConverter):
    """Clips to Whisper's features, time before bands, always of a whole window.

    Args:
        num_mels: Mel bands: 80, or 128 for large-v3 and turbo.
        num_fft_bins: Samples of a frame.
        stride: Samples from frame to frame.
        sampling_rate: Samples a second.
        max_audio_length: Seconds of the window.
        **layer: name and dtype ("float32").

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("whisper",)
    extractor_class: ClassVar[type[SequenceFeatureExtractor]] = WhisperFeatureExtractor
    from_extractor: ClassVar[Mapping[str, str]] = {
        "num_mels": "feature_size", "num_fft_bins": "n_fft", "stride": "hop_length",
        "sampling_rate": "sampling_rate", "max_audio_length": "chunk_length",
    }  # fmt: skip

    def __init__(
        self,
        num_mels: int = 80,
        num_fft_bins: int = 400,
        stride: int = 160,
        sampling_rate: int = 16_000,
        max_audio_length: int = 30,
        **layer: Any,
    ) -> None:
        super().__init__(num_mels, num_fft_bins, stride, sampling_rate, max_audio_length, **layer)
        self.extractor = WhisperFeatureExtractor(num_mels, sampling_rate, stride, max_audio_length, num_fft_bins)

    def __call__(self, audio: Any) -> Tensor:
        """Features of one clip (samples,), or of a batch of clips.

        Returns:
            float32 (frames, num_mels), with a batch axis before if `audio` is a batch; a clip longer than the window
            is cut.

        Raises:
            InputError: Audio that cannot be used; its subclasses say why.
        """
        batch = self.extractor(audio, return_tensors="pt", sampling_rate=self.sampling_rate)
        features = cast(Tensor, batch["input_features"]).transpose(1, 2)
        return features if _is_batch(audio) else features[0]


def _is_batch(audio: Any) -> bool:
    """Whether `audio` is several clips, not one."""
    if isinstance(audio, np.ndarray | Tensor):
        return audio.ndim > 1
    return bool(len(audio)) and (isinstance(audio[0], list | tuple) or getattr(audio[0], "ndim", 0) > 0)
