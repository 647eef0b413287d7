"""A tokenizer and one or more extractors under one name, saved and loaded together.

Files are those of transformers: processor_config.json with a section for each extractor (version 5), or the older
preprocessor_config.json, with the tokenizer's files beside it.
"""

from __future__ import annotations

import copy
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
    `x_class`; a part called "tokenizer" is a tokenizer, the others are extractors. A part in `optional` may be None;
    numbers of its own that stand beside the parts in processor_config.json are in `settings`, with their defaults.

    Attributes:
        extra: Keys of processor_config.json that are neither; kept and written back.
    """

    attributes: ClassVar[tuple[str, ...]] = ("feature_extractor", "tokenizer")
    optional: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[dict[str, Any]] = {}
    feature_extractor_class: ClassVar[type[FeatureExtractionMixin]]
    tokenizer_class: ClassVar[type[PreTrainedTokenizer]] = PreTrainedTokenizer

    feature_extractor: Any
    tokenizer: Any

    def __init__(self, *parts: Any, chat_template: str | dict[str, str] | None = None, **named: Any) -> None:
        """Put parts together, in the order of `attributes` or by name.

        Raises:
            TypeError: A part is missing, one too many, or of another class.
        """
        for name, default in self.settings.items():
            setattr(self, name, named.pop(name, default))
        given = {**dict(zip(self.attributes, parts, strict=False)), **named}
        given |= {name: None for name in self.optional if name not in given}
        if len(parts) > len(self.attributes) or set(given) != set(self.attributes):
            raise TypeError(
                f"{type(self).__name__} is made of {', '.join(self.attributes)}; got {len(parts)} parts"
                + (f" and {', '.join(sorted(named))}." if named else ".")
            )
        for name, part in given.items():
            wanted = getattr(self, f"{name}_class")
            if not isinstance(part, wanted) and not (part is None and name in self.optional):
                raise TypeError(f"{name} is a {type(part).__name__}; {type(self).__name__} needs a {wanted.__name__}.")
            setattr(self, name, part)
        self.extra: dict[str, Any] = {}
        if chat_template is not None:
            self.chat_template = chat_template

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.tokenizer.chat_template = template

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return, extractors' first."""
        parts = [*self._present().values(), self.tokenizer]
        return list(dict.fromkeys(name for part in parts for name in part.model_input_names))

    @classmethod
    def _extractors(cls) -> list[str]:
        return [name for name in cls.attributes if name != "tokenizer"]

    def _present(self) -> dict[str, Any]:
        """The extractors that there are, by name."""
        parts = {name: getattr(self, name) for name in self._extractors()}
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_pretrained(
        cls: type[Processor], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Processor:
        """Read all parts from a folder or the hub.

        Args:
            pretrained_model_name_or_path: A folder, a hub id, or a bundled model's name.
            **kwargs: revision, token, cache_dir, local_files_only, subfolder, force_download; settings of extractors
                (feature_size=..., max_soft_tokens=...), for each that has them; everything else goes to the tokenizer
                (language="fr", task="transcribe").

        Raises:
            CheckpointNotFoundError: A part's files are not there.
            ConfigError: They cannot be understood.
        """
        hub = {option: kwargs.pop(option) for option in _HUB_OPTIONS if option in kwargs}
        source = Source.take(pretrained_model_name_or_path, dict(hub))
        path = source.find(PROCESSOR_FILE)
        config = read_json(path) if path is not None else {}
        named = {name: kwargs.pop(name, config.get(name)) for name in (*cls.settings, "chat_template")}
        parts: dict[str, Any] = {}
        taken: set[str] = set()
        for part in cls._extractors():
            part_class = getattr(cls, f"{part}_class")
            if part in cls.optional and not _has(source, config, part_class):
                continue
            # Pictures and frames share settings; the side is that of texts, never of clips.
            known = kwargs.keys() & (part_class.setting_names() - {"padding_side"})
            own = {option: kwargs[option] for option in known}
            parts[part] = part_class.from_pretrained(pretrained_model_name_or_path, **hub, **own)
            taken |= known
        kwargs = {option: value for option, value in kwargs.items() if option not in taken}
        parts["tokenizer"] = cls.tokenizer_class.from_pretrained(pretrained_model_name_or_path, **hub, **kwargs)
        if named["chat_template"] is None and parts["tokenizer"].chat_template is None:
            # An older place of a processor's template.
            path = source.find("chat_template.json")
            named["chat_template"] = read_json(path).get("chat_template") if path is not None else None
        processor = cls(**parts, **{name: value for name, value in named.items() if value is not None})
        known = {*cls.attributes, *named, "processor_class"}
        processor.extra = {key: value for key, value in config.items() if key not in known}
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
            files: dict[str, dict[str, Any]] = {}
            for part in self._present().values():
                # Extractors that share a file are told apart by their keys, as published checkpoints do it.
                files.setdefault(part.settings_files[0], {}).update(part.to_dict())
            for name, content in files.items():
                write_json(target / name, content)
                written.append(str(target / name))
        else:
            write_json(target / PROCESSOR_FILE, self.to_dict())
            written.append(str(target / PROCESSOR_FILE))
        return written

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds."""
        sections = {name: part.to_dict() for name, part in self._present().items()}
        numbers = {name: getattr(self, name) for name in self.settings}
        return copy.deepcopy({**self.extra, **numbers, **sections, "processor_class": type(self).__name__})

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


def _has(source: Source, config: Mapping[str, Any], part_class: type[FeatureExtractionMixin]) -> bool:
    """Whether a checkpoint describes an optional part: in processor_config.json, or in an older file of its own."""
    if config.get(part_class.processor_section) is not None:
        return True
    paths = [path for name in part_class.settings_files if (path := source.find(name)) is not None]
    return any(part_class.type_key in read_json(path) for path in paths)
