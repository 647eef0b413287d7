"""A tokenizer and one or more extractors under one name, saved and loaded together.

Files are those of transformers: processor_config.json with a section for each extractor (version 5), or the older
preprocessor_config.json, with the tokenizer's files beside it.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from ..base.errors import InputError
from ..base.hub import Source, make_folder, read_json, write_json
from ..base.tokenizer import PreTrainedTokenizer
from .base import PROCESSOR_FILE, BatchFeature, FeatureExtractionMixin

Processor = TypeVar("Processor", bound="ProcessorMixin")

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


class ProcessorMixin:
    """What every processor shares.

    A subclass names its parts in `attributes`, in the order of its constructor, and for each part `x` its class in
    `x_class`; a part called "tokenizer" is a tokenizer, the others are extractors.

    Attributes:
        extra: Keys of processor_config.json that are not parts; kept and written back.
    """

    attributes: ClassVar[tuple[str, ...]] = ("feature_extractor", "tokenizer")
    feature_extractor_class: ClassVar[type[FeatureExtractionMixin]]
    tokenizer_class: ClassVar[type[PreTrainedTokenizer]] = PreTrainedTokenizer

    feature_extractor: Any
    tokenizer: Any

    def __init__(self, *parts: Any, **named: Any) -> None:
        """Put parts together, in the order of `attributes` or by name.

        Raises:
            TypeError: A part is missing, one too many, or of another class.
        """
        given = {**dict(zip(self.attributes, parts, strict=False)), **named}
        if len(parts) > len(self.attributes) or set(given) != set(self.attributes):
            raise TypeError(
                f"{type(self).__name__} is made of {', '.join(self.attributes)}; got {len(parts)} parts"
                + (f" and {', '.join(sorted(named))}." if named else ".")
            )
        for name, part in given.items():
            wanted = getattr(self, f"{name}_class")
            if not isinstance(part, wanted):
                raise TypeError(f"{name} is a {type(part).__name__}; {type(self).__name__} needs a {wanted.__name__}.")
            setattr(self, name, part)
        self.extra: dict[str, Any] = {}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return, extractors' first."""
        parts = [getattr(self, name) for name in self._extractors()] + [self.tokenizer]
        return list(dict.fromkeys(name for part in parts for name in part.model_input_names))

    @classmethod
    def _extractors(cls) -> list[str]:
        return [name for name in cls.attributes if name != "tokenizer"]

    @classmethod
    def from_pretrained(
        cls: type[Processor], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Processor:
        """Read all parts from a folder or the hub.

        Args:
            pretrained_model_name_or_path: A folder, a hub id, or a bundled model's name.
            **kwargs: revision, token, cache_dir, local_files_only, subfolder, force_download; an extractor's settings
                (feature_size=...); everything else goes to the tokenizer (language="fr", task="transcribe").

        Raises:
            CheckpointNotFoundError: A part's files are not there.
            ConfigError: They cannot be understood.
        """
        hub = {option: kwargs.pop(option) for option in _HUB_OPTIONS if option in kwargs}
        parts: dict[str, Any] = {}
        for part in cls._extractors():
            part_class = getattr(cls, f"{part}_class")
            known = set(inspect.signature(part_class.__init__).parameters) - {"self", "padding_side"}
            own = {option: kwargs.pop(option) for option in list(kwargs) if option in known}
            parts[part] = part_class.from_pretrained(pretrained_model_name_or_path, **hub, **own)
        parts["tokenizer"] = cls.tokenizer_class.from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)
        processor = cls(**parts)
        path = Source.take(pretrained_model_name_or_path, dict(hub)).find(PROCESSOR_FILE)
        settings = read_json(path) if path is not None else {}
        processor.extra = {key: settings[key] for key in settings if key not in (*cls.attributes, "processor_class")}
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike[str], legacy_format: bool = False) -> list[str]:
        """Write all parts into `save_directory`, and return the paths written.

        Args:
            save_directory: Made if need be.
            legacy_format: Write preprocessor_config.json, which transformers before version 5 and other programs read,
                instead of processor_config.json.

        Raises:
            SaveError: A file could not be written.
        """
        target = make_folder(save_directory)
        written = list(self.tokenizer.save_pretrained(target))
        if legacy_format:
            for name in self._extractors():
                written += getattr(self, name).save_pretrained(target)
        else:
            write_json(target / PROCESSOR_FILE, self.to_dict())
            written.append(str(target / PROCESSOR_FILE))
        return written

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds."""
        sections = {name: getattr(self, name).to_dict() for name in self._extractors()}
        return copy.deepcopy({**self.extra, **sections, "processor_class": type(self).__name__})

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        parts = "\n".join(f"- {name}: {getattr(self, name)!r}" for name in self.attributes)
        return f"{type(self).__name__}:\n{parts}"

    def __call__(
        self,
        audio: Any = None,
        text: str | list[str] | None = None,
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Inputs for the model from clips, from text, or from both.

        Args:
            audio: One mono clip or a batch, as the feature extractor takes it.
            text: A text or a list of texts.
            sampling_rate: Of the clips.
            return_tensors: "pt", "np" or None, for both.
            audio_kwargs: Options of the feature extractor only.
            text_kwargs: Options of the tokenizer only.
            **options: Options of whichever is used; with clips and text both, of the tokenizer (padding=True then pads
                the labels, and features keep their whole window).

        Returns:
            Features (BatchFeature) for clips, an encoding for text; for both, features with the texts' ids as `labels`.

        Raises:
            InputError: Neither is given, or one cannot be used.
            TypeError: An option is not known, or something is neither audio nor text.
        """
        if audio is None and text is None:
            raise InputError("pass audio=, text= or both; both are None.")
        encoding = None
        if text is not None:
            encoding = self.tokenizer(text, return_tensors=return_tensors, **{**options, **(text_kwargs or {})})
        if audio is None:
            return encoding
        own = {**(options if text is None else {}), **(audio_kwargs or {})}
        features: BatchFeature = self.feature_extractor(
            audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **own
        )
        if encoding is not None:
            features["labels"] = encoding["input_ids"]
        return features

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)
