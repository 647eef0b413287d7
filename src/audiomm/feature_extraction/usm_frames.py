"""UsmFeatureExtractor: clips to log-mel frames as the Universal Speech Model takes them; the Gemma extractors' base.

Frames are cut from the samples as they are (no mirroring), windowed, and their magnitudes, not powers, are gathered
into HTK mel bands; the logarithm is natural.

What a clip gives does not depend on the clips beside it: each is padded as it would be alone, and the frames that only
the batch adds are 0 and masked. Source: arXiv:2303.01037.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..base.errors import ConfigError, EmptyAudioError
from .base import BatchFeature, SequenceFeatureExtractor, require_positive
from .mel import mel_filter_bank, transform_dtype

logger = logging.getLogger("audiomm.feature_extraction")

#: Frames computed at once on a CPU, so that frames and spectrum stay in the cache.
_BLOCK_FRAMES = 256
#: Settings in samples, which files hold instead of those in milliseconds.
_SAMPLES = ("frame_length", "hop_length", "fft_length")


@dataclass(frozen=True)
class _Place:
    """A padded clip, and which frames of its row of the batch are real and which keep their values."""

    waveform: Tensor
    frames: int
    real: range
    kept: range


class UsmFeatureExtractor(SequenceFeatureExtractor):
    """Clips to log-mel frames; what both Gemma extractors share.

    Args:
        feature_size: Mel bands.
        sampling_rate: Samples a second.
        padding_value: What clips are extended with.
        return_attention_mask: What a call with return_attention_mask=None does; published files say false and mean
            nothing by it, so calls give the mask of real frames unless told otherwise.
        frame_length_ms: Length of a frame, milliseconds.
        hop_length_ms: From the start of a frame to that of the next, milliseconds.
        min_frequency: Lower edge of the first band, Hz.
        max_frequency: Upper edge of the last band, Hz.
        preemphasis: Share of the sample before that is taken off each sample; 0 takes nothing.
        preemphasis_htk_flavor: The first sample of a frame is scaled by 1 - preemphasis; otherwise frames start one
            sample later and their first sample is treated like the others.
        fft_overdrive: Transform at twice the power of two that holds a frame.
        dither: Standard deviation of noise added to the clips; 0 adds none. Drawn from numpy's global generator.
        input_scale_factor: Factor on the samples.
        mel_floor: Smallest mel magnitude that is told from silence.
        per_bin_mean, per_bin_stddev: Taken off, and divided out of, each band of the result.
        padding_side: "right" or "left"; the encoders are made for "right".
        **extra: Unknown keys, kept and written back. `frame_length` and `hop_length` in samples, which files hold,
            go before the milliseconds.

    Attributes:
        frame_length, hop_length, fft_length: Samples.
        window: float32 (frame_length,).
        mel_filters: float64 (fft_length // 2 + 1, feature_size).

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    model_input_names: ClassVar[list[str]] = ["input_features", "input_features_mask"]
    derived: ClassVar[frozenset[str]] = frozenset({"extra", "window", "mel_filters", "dither_seed", "batch_invariant"})
    #: False pads a clip of a batch like the longest and counts frames there, as transformers does: see the families.
    batch_invariant: bool = True

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
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        told = {name: extra.pop(name, None) for name in _SAMPLES}
        super().__init__(feature_size, sampling_rate, padding_value, padding_side, return_attention_mask, **extra)
        _require_numbers(False, preemphasis=preemphasis, dither=dither)
        _require_numbers(True, frame_length_ms=frame_length_ms, hop_length_ms=hop_length_ms, mel_floor=mel_floor)
        self.frame_length = told["frame_length"] or round(sampling_rate * frame_length_ms / 1000.0)
        self.hop_length = told["hop_length"] or round(sampling_rate * hop_length_ms / 1000.0)
        require_positive(frame_length=self.frame_length, hop_length=self.hop_length)
        self.fft_length = (1 << (self.frame_length - 1).bit_length()) * (2 if fft_overdrive else 1)
        self.min_frequency = min_frequency
        self.max_frequency = max_frequency
        self.preemphasis = preemphasis
        self.preemphasis_htk_flavor = preemphasis_htk_flavor
        self.fft_overdrive = fft_overdrive
        self.dither = dither
        self.dither_seed: int | None = None
        self.input_scale_factor = input_scale_factor
        self.mel_floor = float(mel_floor)
        self.per_bin_mean = self._per_band("per_bin_mean", per_bin_mean)
        self.per_bin_stddev = self._per_band("per_bin_stddev", per_bin_stddev)
        self.window = self.make_window(self.frame_length)
        self.mel_filters = mel_filter_bank(
            self.fft_length // 2 + 1, feature_size, min_frequency, max_frequency, sampling_rate
        )
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build from what `to_dict` gave; `overrides` win, milliseconds over a file's samples too."""
        replaced = {name.removesuffix("_ms") for name in overrides if name.endswith("_ms")}
        kept = {name: value for name, value in settings.items() if name not in replaced}
        return super().from_dict(kept, return_unused_kwargs, **overrides)

    def _per_band(self, name: str, values: Any) -> list[float] | None:
        if values is None:
            return None
        flat = np.asarray(values, np.float64).reshape(-1)
        if len(flat) != self.feature_size:
            raise ConfigError(f"{name} has {len(flat)} numbers; feature_size={self.feature_size} asks for as many.")
        return [float(value) for value in flat]

    # ------------------------------------------------------------------ what the families differ in

    #: Zeros put before every clip, in shares of a frame.
    lead_divisor: ClassVar[int] = 0

    @staticmethod
    def make_window(length: int) -> np.ndarray:
        """float32 (length,): the periodic Hann window, computed in the precision the models were trained with."""
        raise TypeError(
            "UsmFeatureExtractor is what two extractors share: use Gemma3nAudioFeatureExtractor or Gemma4's."
        )

    def compress(self, mel: Tensor) -> Tensor:
        """Logarithm of mel magnitudes."""
        return mel.clamp(min=self.mel_floor).log()

    def real_frames(self, start: int, stop: int, frames: int) -> range:
        """Which of `frames` frames count as real when samples `start` to `stop` of the padded clip are the clip."""
        first = -(-start // self.hop_length)
        return range(first, max(first, min(frames, -(-stop // self.hop_length))))

    def kept_frames(self, real: range, own: int) -> range:
        """Which frames keep their values; the rest are set to 0."""
        return range(own)

    # ------------------------------------------------------------------ counting

    @property
    def frame_length_ms(self) -> float:
        return 1000.0 * self.frame_length / self.sampling_rate

    @property
    def hop_length_ms(self) -> float:
        return 1000.0 * self.hop_length / self.sampling_rate

    @property
    def lead(self) -> int:
        """Zeros put before every clip, samples."""
        return self.frame_length // self.lead_divisor if self.lead_divisor else 0

    def frame_count(self, num_samples: int) -> int:
        """Frames that a padded clip of so many samples is cut into."""
        return max(0, (num_samples + self.lead - self.frame_length - 1) // self.hop_length + 1)

    # ------------------------------------------------------------------ the call

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str | None = "longest",
        max_length: int | None = 480_000,
        truncation: bool = True,
        pad_to_multiple_of: int | None = 128,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = True,
        sampling_rate: int | None = None,
        device: str | torch.device | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """Features of one clip or of a batch.

        Args:
            raw_speech: One mono clip (array, tensor, list of numbers), or a batch: a list of clips, or a 2-D array
                (clips, samples). Integers are scaled by their type.
            padding: "longest" or True, "max_length", "do_not_pad" or False.
            max_length: Samples to cut clips to, rounded up to `pad_to_multiple_of`; None cuts nothing.
            truncation: Cut clips at `max_length`, with a warning that says what is lost.
            pad_to_multiple_of: Round padded lengths, in samples, up to a multiple of this.
            return_tensors: "pt", "np", or None (a list of numpy arrays for each entry).
            return_attention_mask: Add `input_features_mask`; None follows the setting.
            sampling_rate: Of the clips; another than the extractor's is an error.
            device: Where to compute; None is where a tensor lies, else the CPU. With return_tensors="pt" the result
                stays there.
            **ignored: Anything else is named in a warning and not used.

        Returns:
            input_features float32 (batch, frames, feature_size); input_features_mask bool (batch, frames), True where
            a frame is real.

        Raises:
            SampleRateError: `sampling_rate` is not the extractor's.
            EmptyAudioError: A clip is too short to give a frame.
            InputError: Audio, padding or lengths that cannot be used; its subclasses say which.
        """
        if ignored:
            logger.warning("%s does not know and does not use %s.", type(self).__name__, ", ".join(sorted(ignored)))
        if sampling_rate is not None:
            self.check_sampling_rate(sampling_rate)
        clips = self.read_clips(raw_speech, device)
        if not clips:
            raise EmptyAudioError("raw_speech holds no clips; at least 1 is needed.")
        lengths = [clip.shape[0] for clip in clips]
        cut = truncation and max_length is not None
        kept, padded = self.padded_lengths(lengths, padding, max_length, cut, pad_to_multiple_of)
        self.tell_what_is_cut(lengths, kept)
        alone = [self.padded_lengths([n], padding, max_length, cut, pad_to_multiple_of)[1][0] for n in lengths]
        places = [
            self._place(clip[: sizes[0]], *sizes, where=f"clip {row} of {len(clips)}")
            for row, (clip, sizes) in enumerate(zip(clips, zip(kept, padded, alone, strict=True), strict=True))
        ]
        computed = self.log_mels([place.waveform for place in places])
        rows = [self._row(features, place) for features, place in zip(computed, places, strict=True)]
        masks = [_marked(place, rows[0].device) for place in places]
        batch: dict[str, Any] = {"input_features": rows}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            batch["input_features_mask"] = masks
        if return_tensors is None:
            return BatchFeature({name: [row.cpu().numpy() for row in value] for name, value in batch.items()})
        return BatchFeature(batch, tensor_type=return_tensors)

    def _place(self, clip: Tensor, kept: int, padded: int, alone: int, where: str) -> _Place:
        """Where a clip lies that is padded to `padded` samples, and to `alone` without the others."""
        from_left = self.padding_side == "left"
        size = alone if self.batch_invariant and not from_left else padded
        start = size - kept if from_left else 0
        own = self.frame_count(size)
        real = self.real_frames(start, start + kept, own)
        if not own or (not from_left and not real):
            raise EmptyAudioError(
                f"{where} has {kept} samples, too few for a frame of {self.frame_length} samples: at least "
                f"{self.frame_length + 1 - self.lead} are needed. Leave it out, or add silence."
            )
        around = (start, size - kept - start)
        if self.dither_seed is None:  # transformers gives the padding noise too
            waveform = self.prepare(functional.pad(clip, around, value=self.padding_value))
        else:
            silence = self.padding_value * self.input_scale_factor
            waveform = functional.pad(self.prepare(clip), around, value=silence)
        return _Place(self.led(waveform), self.frame_count(padded), real, self.kept_frames(real, own))

    def _row(self, features: Tensor, place: _Place) -> Tensor:
        """All frames of a row of the batch, 0 where nothing is to be."""
        row = features.new_zeros(place.frames, self.feature_size)
        row[place.kept.start : place.kept.stop] = features[place.kept.start : place.kept.stop]
        return row

    # ------------------------------------------------------------------ samples to frames

    def prepare(self, clip: Tensor) -> Tensor:
        """float32 (samples,): scaled, with noise if asked for."""
        if self.dither > 0.0:
            clip = clip + self.dither * self._noise(clip)
        return clip * self.input_scale_factor if self.input_scale_factor != 1.0 else clip

    def _noise(self, clip: Tensor) -> Tensor:
        """float32 (samples,): from numpy's generator; with a seed from one of the clip's own, whatever is beside it."""
        if self.dither_seed is None:
            return torch.from_numpy(np.random.standard_normal(clip.shape[0])).to(clip)
        digest = hashlib.sha256(clip.cpu().numpy().tobytes() + str(self.dither_seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(clip.shape, generator=generator).to(clip)

    def led(self, waveform: Tensor) -> Tensor:
        """The waveform with the zeros before it."""
        return functional.pad(waveform, (self.lead, 0)) if self.lead else waveform

    def log_mels(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Features of all frames of prepared samples.

        Args:
            waveforms: float32 (samples,) each, lead included.

        Returns:
            For each float32 (frames, feature_size), frames = (samples - frame_length - 1) // hop_length + 1.
        """
        long = self.frame_length + 1
        frames = [waveform.unfold(0, long, self.hop_length) for waveform in waveforms]
        if waveforms[0].device.type != "cpu":  # launches are what costs there, so all clips at once
            return list(self._log_mel_of(torch.cat(frames)).split([len(part) for part in frames]))
        return [torch.cat([self._log_mel_of(block) for block in part.split(_BLOCK_FRAMES)]) for part in frames]

    def _log_mel_of(self, frames: Tensor) -> Tensor:
        """(frames, frame_length + 1) samples to (frames, feature_size)."""
        window, filters = self._tables_on(frames.device)
        share = self.preemphasis
        if share == 0.0:
            cut = frames[:, :-1]
        elif self.preemphasis_htk_flavor:
            first = frames[:, :1] * (1.0 - share)
            cut = torch.cat([first, frames[:, 1:-1] - share * frames[:, :-2]], dim=1)
        else:
            cut = frames[:, 1:] - share * frames[:, :-1]
        # In float32 the rounding of a transform shows in quiet bands (7e-4 of the logarithm).
        windowed = (cut * window).to(transform_dtype(frames.device))
        spectrum = torch.view_as_real(torch.fft.rfft(windowed, n=self.fft_length)).float()
        real, imaginary = spectrum.unbind(-1)
        result = self.compress(real.square().addcmul_(imaginary, imaginary).sqrt_() @ filters)
        if self.per_bin_mean is not None:
            result = result - result.new_tensor(self.per_bin_mean)
        if self.per_bin_stddev is not None:
            result = result / result.new_tensor(self.per_bin_stddev)
        return result

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """float32 window and filters on `device`, made once."""
        if device not in self._tables:
            with torch.inference_mode(False):
                window = torch.from_numpy(self.window).to(device)
                self._tables[device] = window, torch.from_numpy(self.mel_filters).to(device, torch.float32)
        return self._tables[device]


def _require_numbers(above: bool, **settings: Any) -> None:
    """Check that settings are finite numbers above 0, or at least 0.

    Raises:
        ConfigError: One is not.
    """
    for name, value in settings.items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and np.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            raise ConfigError(f"{name}={value!r}: a number {'above' if above else 'of at least'} 0 is needed.")


def _marked(place: _Place, device: torch.device) -> Tensor:
    """Mask (frames,), True where a frame is real."""
    mask = torch.zeros(place.frames, dtype=torch.bool, device=device)
    mask[place.real.start : place.real.stop] = True
    return mask
