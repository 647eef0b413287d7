"""What every feature extractor shares: its batches, its file, the way it reads clips and the way it pads them.

Names, keys and the two file layouts (preprocessor_config.json, and the feature_extractor section of
processor_config.json) are those of transformers, so that either library reads what the other wrote.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ..base.errors import CheckpointNotFoundError, ConfigError, InputError, SampleRateError
from ..base.hub import Source, make_folder, read_json, write_json
from ..base.placement import as_device
from ..media.audio import load_audio
from ..media.samples import as_waveforms

logger = logging.getLogger("audiomm.feature_extraction")

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"


class BatchFeature(dict[str, Any]):
    """Model inputs by name: a dict whose entries are attributes too, and that moves to a device as a whole."""

    def __init__(self, data: Mapping[str, Any] | None = None, tensor_type: str | None = None) -> None:
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no entry {name!r}; it holds {sorted(self)}.") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    @property
    def data(self) -> dict[str, Any]:
        """The entries; the same object, under the name transformers uses."""
        return self

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchFeature:
        """Turn every entry into a tensor ("pt") or an array ("np"); None leaves them.

        Raises:
            InputError: `tensor_type` is something else, or an entry's rows differ in shape.
        """
        kind = getattr(tensor_type, "value", tensor_type)
        if kind is None:
            return self
        if kind not in ("pt", "np"):
            raise InputError(f"return_tensors={kind!r}: accepted are 'pt' (torch), 'np' (numpy) and None.")
        for name, value in self.items():
            self[name] = _as_one(name, value, kind)
        return self

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move tensors to a device; a dtype is applied to floating tensors only (masks and ids stay integers).

        Args:
            *args: A device ("cuda", torch.device, index), a dtype (torch.bfloat16 or "bfloat16"), or both.
            **kwargs: device=, dtype=, non_blocking=.

        Returns:
            This object, changed in place.
        """
        non_blocking = bool(kwargs.pop("non_blocking", False))
        device, dtype = kwargs.pop("device", None), _as_dtype(kwargs.pop("dtype", None))
        if kwargs:
            raise TypeError(f"to() takes device, dtype and non_blocking, not {sorted(kwargs)}.")
        for argument in args:
            if (named := _as_dtype(argument)) is not None:
                dtype = named
            elif isinstance(argument, (str, torch.device, int)):
                device = argument
            elif argument is not None:
                raise TypeError(f"to() takes a device and a dtype, not {argument!r}.")
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                kind = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=kind, non_blocking=non_blocking)
        return self


def _as_dtype(value: Any) -> torch.dtype | None:
    """The torch dtype that `value` is or names, else None."""
    named = getattr(torch, value, None) if isinstance(value, str) else value
    return named if isinstance(named, torch.dtype) else None


def _as_one(name: str, value: Any, kind: str) -> torch.Tensor | np.ndarray:
    """An entry as one tensor ("pt") or one array ("np")."""
    try:
        return _as_tensor(value) if kind == "pt" else _as_array(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name!r} cannot become one {'tensor' if kind == 'pt' else 'array'} ({error}); rows of different length "
            "need padding='longest' or 'max_length', or return_tensors=None."
        ) from error


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (torch.Tensor, np.ndarray)):
        return torch.stack([torch.as_tensor(row) for row in value])
    return torch.as_tensor(value)


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (torch.Tensor, np.ndarray)):
        return np.stack([_as_array(row) for row in value])
    return np.asarray(value)


class FeatureExtractionMixin:
    """An object whose whole state is a handful of numbers in a JSON file.

    A subclass assigns its settings to attributes in __init__ and names in `derived` those attributes that are
    computed from the others and are not to be written. Keys it does not know are kept in `extra` and written back.
    """

    model_input_names: ClassVar[list[str]] = []
    #: Section of processor_config.json that holds this object's settings.
    processor_section: ClassVar[str] = "feature_extractor"
    #: Files of its own that hold them, looked for in this order; the first is the one that is written.
    settings_files: ClassVar[tuple[str, ...]] = (PREPROCESSOR_FILE,)
    #: Key under which its class is written.
    type_key: ClassVar[str] = "feature_extractor_type"
    #: Attributes that are not settings.
    derived: ClassVar[frozenset[str]] = frozenset({"extra"})

    def __init__(self, **extra: Any) -> None:
        self.extra: dict[str, Any] = {
            key: value for key, value in extra.items() if key not in (self.type_key, "mel_filters")
        }

    @classmethod
    def setting_names(cls) -> set[str]:
        """Names of all settings the constructor takes, those it hands on to a parent's included."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = (
            parameter
            for parent in cls.__mro__
            if "__init__" in vars(parent)
            for parameter in inspect.signature(vars(parent)["__init__"]).parameters.values()
        )
        return {parameter.name for parameter in parameters if parameter.kind in named} - {"self"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read the settings from a folder or the hub.

        Args:
            pretrained_model_name_or_path: A folder, a hub id, or a bundled model's name.
            **kwargs: revision, token, cache_dir, local_files_only, subfolder, force_download, return_unused_kwargs;
                everything else replaces the setting of that name.

        Returns:
            The object, or what `from_dict` gives with return_unused_kwargs.

        Raises:
            CheckpointNotFoundError: There are no such files.
            ConfigError: They cannot be understood.
        """
        source = Source.take(pretrained_model_name_or_path, kwargs)
        path = source.find(PROCESSOR_FILE)
        section = read_json(path).get(cls.processor_section) if path is not None else None
        if section is None:
            path = next((path for name in cls.settings_files if (path := source.find(name)) is not None), None)
            if path is None:
                raise CheckpointNotFoundError(
                    f"{str(pretrained_model_name_or_path)!r} holds neither {' nor '.join(cls.settings_files)} nor a "
                    f"{PROCESSOR_FILE} with a {cls.processor_section!r} section; is it a model's folder or hub id?"
                )
            section = read_json(path)
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {cls.processor_section!r} is {section!r}, but an object {{...}} is needed.")
        saved_as = section.get(cls.type_key)
        if saved_as is not None and saved_as.removesuffix("Fast") not in {parent.__name__ for parent in cls.__mro__}:
            logger.warning("%s was written by %s and is being read by %s.", path, saved_as, cls.__name__)
        return cls.from_dict(section, **kwargs)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build from what `to_dict` gave; `overrides` win.

        With `return_unused_kwargs` those that name no setting come back beside the object instead of being kept in it.
        """
        built = cls(**{**copy.deepcopy(dict(settings)), **overrides})
        if not return_unused_kwargs:
            return built
        unused = {name: built.extra.pop(name) for name in overrides if name in built.extra and name not in settings}
        return built, unused

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write preprocessor_config.json (the first of `settings_files`) into `save_directory`; the paths written.

        Raises:
            SaveError: The file could not be written.
        """
        path = make_folder(save_directory) / self.settings_files[0]
        write_json(path, self.to_dict())
        return [str(path)]

    def to_dict(self) -> dict[str, Any]:
        """Settings, unknown keys included, as they are written."""
        settings = {key: value for key, value in vars(self).items() if key not in self.derived and key[0] != "_"}
        return copy.deepcopy({**self.extra, **settings, self.type_key: type(self).__name__})

    def to_json_string(self) -> str:
        """Settings as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class SequenceFeatureExtractor(FeatureExtractionMixin):
    """Extractor of audio: clips of different length in, one padded batch out.

    Args:
        feature_size: Numbers a frame, the mel bands.
        sampling_rate: Samples a second that clips must have.
        padding_value: What clips are extended with.
        padding_side: "right" or "left".
        return_attention_mask: Whether batches carry a mask unless the call says otherwise.
        **extra: Keys kept and written back.

    Raises:
        ConfigError: A value is mistyped or out of range.
    """

    #: Axis of one clip's features that is time.
    time_axis: ClassVar[int] = 0

    def __init__(
        self,
        feature_size: int,
        sampling_rate: int,
        padding_value: float,
        padding_side: str = "right",
        return_attention_mask: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(**extra)
        require_positive(feature_size=feature_size, sampling_rate=sampling_rate)
        if padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side={padding_side!r}: accepted are 'right' and 'left'.")
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.padding_side = padding_side
        self.return_attention_mask = return_attention_mask

    def check_sampling_rate(self, sampling_rate: int | None) -> None:
        """Refuse clips at another rate; warn when the rate is not told.

        Raises:
            SampleRateError: The rates differ.
        """
        if sampling_rate is None:
            logger.warning(
                "sampling_rate was not passed to %s: the clips are taken to have %d samples a second. Pass "
                "sampling_rate=%d so that another rate is noticed.",
                type(self).__name__,
                self.sampling_rate,
                self.sampling_rate,
            )
        elif sampling_rate != self.sampling_rate:
            raise SampleRateError(
                f"sampling_rate={sampling_rate!r}: {type(self).__name__} needs {self.sampling_rate} Hz. Resample "
                f"with audiomm.media.load_audio({{'array': clip, 'sampling_rate': {sampling_rate}}}, "
                f"{self.sampling_rate})."
            )

    def read_clips(self, raw_speech: Any, device: str | torch.device | None = None) -> list[torch.Tensor]:
        """Clips of any accepted form as float32 (samples,) tensors; see `audiomm.media.samples.as_waveforms`."""
        return as_waveforms(raw_speech, None if device is None else as_device(device))

    def read_recording(self, recording: Any) -> np.ndarray:
        """One recording (samples, a path, bytes or a dict, as `load_audio` takes it) as samples at this rate."""
        return load_audio(recording, self.sampling_rate)

    @staticmethod
    def padded_lengths(
        lengths: Sequence[int],
        padding: bool | str | None,
        max_length: int | None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> tuple[list[int], list[int]]:
        """How much of each clip is kept, and how long it becomes.

        Args:
            lengths: Of the clips.
            padding: "longest" or True, "max_length", "do_not_pad" or False or None.
            max_length: For padding="max_length" and for truncation.
            truncation: Cut what is longer than `max_length`.
            pad_to_multiple_of: Round lengths up to a multiple of this (also the one clips are cut to).

        Returns:
            (kept lengths, final lengths).

        Raises:
            InputError: An argument is not one of these, or `max_length` is missing.
        """
        accepted = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
        strategy = accepted.get(padding, getattr(padding, "value", padding))  # type: ignore[arg-type]
        if strategy not in ("longest", "max_length", "do_not_pad"):
            raise InputError(f"padding={padding!r}: accepted are True, False, 'longest', 'max_length', 'do_not_pad'.")
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        if multiple < 1 or (max_length is not None and max_length < 1):
            raise InputError(f"pad_to_multiple_of={pad_to_multiple_of} and max_length={max_length} must be at least 1.")
        if max_length is None and (strategy == "max_length" or truncation):
            raise InputError("padding='max_length' and truncation=True need max_length=.")
        limit = 0 if max_length is None else -(-max_length // multiple) * multiple
        kept = [min(length, limit) if truncation else length for length in lengths]
        if strategy == "do_not_pad":
            return kept, list(kept)
        target = limit if strategy == "max_length" else -(-max(kept) // multiple) * multiple
        return kept, [max(length, target) for length in kept]

    def tell_what_is_cut(self, lengths: Sequence[int], kept: Sequence[int]) -> None:
        """Warn for each clip of which fewer samples are kept than it has."""
        for place, (length, used) in enumerate(zip(lengths, kept, strict=True)):
            if used < length:
                logger.warning(
                    "clip %d has %d samples (%.2f s) and is cut to max_length: only the first %d (%.2f s) are heard. "
                    "Pass truncation=False or a larger max_length, or cut the recording into several clips.",
                    place, length, length / self.sampling_rate, used, used / self.sampling_rate,
                )  # fmt: skip

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Put features of several clips into one batch, as a collator does.

        Args:
            processed_features: One dict of lists, or a list of dicts with one clip's features each.
            padding: As in `padded_lengths`; lengths are frames here.
            max_length: Frames.
            truncation: Cut what is longer than `max_length`.
            pad_to_multiple_of: Round the number of frames up to a multiple of this.
            return_attention_mask: Add a mask of real frames; None follows the extractor's setting.
            return_tensors: "pt", "np" or None (list of arrays).

        Raises:
            InputError: There is nothing to pad, or the main input is missing.
        """
        main = self.model_input_names[0]
        if isinstance(processed_features, Mapping):
            columns = dict(processed_features)
        else:
            rows = list(processed_features)
            columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
        if main not in columns or len(columns[main]) == 0:
            raise InputError(f"pad() needs at least one clip's {main!r}; got {sorted(columns) or 'nothing'}.")
        clips = [_as_array(clip) for clip in columns[main]]
        # Lists, as data sets store features, would come out in a type that no model has.
        clips = [clip.astype(np.float32) if clip.dtype == np.float64 else clip for clip in clips]
        lengths = [clip.shape[self.time_axis] for clip in clips]
        kept, final = self.padded_lengths(lengths, padding, max_length, truncation, pad_to_multiple_of)
        sizes = list(zip(kept, final, strict=True))
        columns[main] = [self._pad_one(clip, *size) for clip, size in zip(clips, sizes, strict=True)]
        wants_mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        if "attention_mask" in columns:
            masks = [_as_array(mask) for mask in columns["attention_mask"]]
        else:
            masks = [np.ones(length, np.int32) for length in kept] if wants_mask else []
        if masks:
            pairs = zip(masks, sizes, strict=True)
            columns["attention_mask"] = [self._pad_one(mask, *size, value=0, axis=0) for mask, size in pairs]
        return BatchFeature(columns, tensor_type=return_tensors)

    def _pad_one(
        self, clip: np.ndarray, kept: int, final: int, value: float | None = None, axis: int | None = None
    ) -> np.ndarray:
        """`clip` cut to `kept` and padded to `final` along time."""
        axis = (self.time_axis if axis is None else axis) % clip.ndim
        clip = np.take(clip, range(kept), axis=axis) if clip.shape[axis] > kept else clip
        missing = (0, final - kept) if self.padding_side == "right" else (final - kept, 0)
        widths = [missing if place == axis else (0, 0) for place in range(clip.ndim)]
        return np.pad(clip, widths, constant_values=self.padding_value if value is None else value)


def require_positive(**settings: Any) -> None:
    """Check that settings are whole numbers above 0.

    Raises:
        ConfigError: One is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigError(f"{name}={value!r}: a whole number above 0 is needed.")
