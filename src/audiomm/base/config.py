"""PreTrainedConfig: a typed description of a model that reads and writes config.json and loses nothing on the way.

Each family declares its fields as annotated class attributes with defaults, the way a dataclass does. Keys of a file
that no field declares are kept as plain attributes and written back, so that `save(load(folder))` equals the folder.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self, dataclass_transform

from .errors import ConfigError
from .hub import Source, make_folder, read_json, write_json

CONFIG_NAME = "config.json"

# Choices of one process, not facts of the checkpoint: never written to config.json and never taken from one, so that
# a downloaded file cannot choose which code runs.
_RUNTIME_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "auto_map",
    "trust_remote_code",
    "_commit_hash",
    "name_or_path",
    "_name_or_path",
    "per_layer_embeddings",
)

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")

_EXAMPLES = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}

# Fields that every configuration has and few set: files leave them out where they hold these values.
_UNSET = {
    "architectures": None,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


@dataclass_transform(kw_only_default=True)
class PreTrainedConfig:
    """Base of all configurations.

    Attributes:
        architectures: Class names the checkpoint was saved from; the auto classes read it.
        dtype: Type of the weights as saved ("float16"); None when unknown. `torch_dtype` is its older name.
        tie_word_embeddings: The output head shares the token embedding's weight.
        is_encoder_decoder: The model reads with one stack and writes with another.
        id2label, label2id, problem_type: Names of the classes of a classification head; two of them unless told.
        name_or_path: Where the configuration came from; never saved.
        attn_implementation: "sdpa" or "eager", chosen at load time; never saved.

    Raises:
        ConfigError: A field has a value that no model can have; the message names field, value and range.
    """

    model_type: ClassVar[str] = ""
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {}
    #: Those of `sub_configs` that may be None: the model then lacks that part.
    optional_configs: ClassVar[frozenset[str]] = frozenset()
    attribute_map: ClassVar[dict[str, str]] = {}

    architectures: list[str] | None = None
    dtype: Any = None
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    return_dict: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False

    def __init__(self, **values: Any) -> None:
        values = dict(values)
        self.name_or_path: str = str(values.pop("name_or_path", ""))
        self.attn_implementation: str = "sdpa"
        attention = values.get("attn_implementation") or values.get("_attn_implementation")
        for key in (*_RUNTIME_KEYS, "model_type"):
            values.pop(key, None)
        count = values.pop("num_labels", None)
        older = values.pop("torch_dtype", None)
        if values.get("dtype") is None and older is not None:
            values["dtype"] = older
        for name in self.field_names():
            value = values.pop(name) if name in values else copy.copy(getattr(type(self), name))
            setattr(self, name, value)
        for name, value in values.items():
            setattr(self, self.attribute_map.get(name, name), value)
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        if isinstance(self.architectures, tuple):
            self.architectures = list(self.architectures)
        self._set_labels(count)
        self._build_sub_configs()
        if attention:
            self.choose_attention(attention)
        self.validate()

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of all declared fields, base class first."""
        names: dict[str, None] = {}
        for parent in reversed(cls.__mro__):
            for name, annotation in vars(parent).get("__annotations__", {}).items():
                if not name.startswith("_") and "ClassVar" not in str(annotation):
                    names[name] = None
        return list(names)

    def validate(self) -> None:
        """Check the values of the fields; each family says what its fields may be."""

    def require_int(self, low: int, high: int, *names: str) -> None:
        """Raise ConfigError unless every named field is a whole number from `low` to `high`."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}={str(value)[:60]!r}: accepted are whole numbers from {low:,} to {high:,}.")

    def require_fraction(self, *names: str) -> None:
        """Raise ConfigError unless every named field is a number from 0 to 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}={str(value)[:60]!r}: accepted are numbers from 0 to 1.")

    @property
    def torch_dtype(self) -> Any:
        """The older name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    # ------------------------------------------------------------------ labels

    def _set_labels(self, count: int | None) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"num_labels={count!r}: a whole number of at least 1 is needed.")
        for name in ("id2label", "label2id"):
            if not isinstance(getattr(self, name), dict | None):
                raise ConfigError(f"{name}={str(getattr(self, name))[:60]}: a dict is needed, like {_EXAMPLES[name]}.")
        if self.id2label:
            self.id2label = {int(index): label for index, label in self.id2label.items()}
            if count is not None and count != len(self.id2label):
                raise ConfigError(f"num_labels={count}, but id2label names {len(self.id2label)}: pass one of the two.")
        else:
            self.id2label = {index: f"LABEL_{index}" for index in range(2 if count is None else count)}
        if self.label2id is None:
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head; 2 unless told."""
        return 2 if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if self.id2label is None or count != len(self.id2label):
            self.id2label = self.label2id = None
            self._set_labels(count)

    # ------------------------------------------------------------------ attention

    @property
    def _attn_implementation(self) -> str:
        """What transformers calls `attn_implementation`; assigning it chooses for the nested configurations, too."""
        return self.attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        self.choose_attention(value or "sdpa")

    def choose_attention(self, chosen: str | dict[str, str]) -> None:
        """Choose the attention of this configuration and its parts, or of some: {"vision_config": "eager"}.

        Raises:
            ConfigError: There is no such attention, or no such part.
        """
        by_part = chosen if isinstance(chosen, dict) else {"": chosen}
        for name, value in by_part.items():
            part = getattr(self, name, None) if name else self
            if value not in ATTENTION_IMPLEMENTATIONS or not isinstance(part, PreTrainedConfig):
                raise ConfigError(
                    f"attn_implementation={chosen!r}: accepted are {' and '.join(ATTENTION_IMPLEMENTATIONS)}, or a "
                    f"dict of these by part of the configuration."
                )
            for one in (part, *part.parts()) if name or not isinstance(chosen, dict) else (part,):
                one.attn_implementation = value

    # ------------------------------------------------------------------ nested configurations and aliases

    def _build_sub_configs(self) -> None:
        for name, kind in self.sub_configs.items():
            value = getattr(self, name, None)
            if value is None:
                if name not in self.optional_configs:
                    setattr(self, name, kind())
            elif isinstance(value, dict):
                setattr(self, name, kind.from_dict(value))
            elif not isinstance(value, kind):
                raise ConfigError(f"{name} is a {type(value).__name__}; accepted are {kind.__name__} and dict.")

    def parts(self) -> list[PreTrainedConfig]:
        """The nested configurations that are there."""
        nested = [getattr(self, name) for name in self.sub_configs]
        return [part for part in nested if part is not None]

    def __getattr__(self, name: str) -> Any:
        # Only reached when normal lookup fails: an alias such as hidden_size -> d_model.
        target = type(self).attribute_map.get(name)
        if target is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}.")
        return getattr(self, target)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(type(self).attribute_map.get(name, name), value)

    def get_text_config(self, decoder: bool = False) -> PreTrainedConfig:
        """The configuration of the part that writes text: a nested one where there is one, else this one."""
        return getattr(self, "text_config", self) if "text_config" in self.sub_configs else self

    # ------------------------------------------------------------------ in and out

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from the content of a config.json, `kwargs` winning over it.

        A dict for a nested configuration replaces the fields it names and leaves the others as they are.

        With `return_unused_kwargs` those kwargs that name no field come back beside it instead of being set.
        """
        values = {name: value for name, value in copy.deepcopy(config_dict).items() if name not in _RUNTIME_KEYS}
        labels = values.get("id2label")
        if labels:
            values.pop("num_labels", None)
        is_renumbered = kwargs.get("num_labels") not in (None, len(labels) if isinstance(labels, dict) else 0)
        if is_renumbered or "id2label" in kwargs:
            values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
        for name in cls.sub_configs:
            if isinstance(values.get(name), dict) and isinstance(kwargs.get(name), dict):
                kwargs[name] = values[name] | kwargs[name]
        unused = {}
        if return_unused_kwargs:
            known = {*cls.field_names(), *cls.attribute_map, "num_labels", "attn_implementation", "name_or_path"}
            unused = {name: value for name, value in kwargs.items() if name not in known and name not in values}
        config = cls(**(values | {name: value for name, value in kwargs.items() if name not in unused}))
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read config.json of a folder or hub id.

        Args:
            pretrained_model_name_or_path: Folder, config file, hub id or bundled model.
            **kwargs: Options of the hub (revision, token, cache_dir, local_files_only, subfolder, force_download),
                fields to override, and return_unused_kwargs.

        Raises:
            CheckpointNotFoundError: No such folder, or the hub cannot be reached.
            ConfigError: The file is broken, or describes another kind of model.
        """
        values = cls.get_config_dict(pretrained_model_name_or_path, kwargs)
        model_type = values.get("model_type")
        if cls.model_type and model_type != cls.model_type:
            nested = [value for value in values.values() if isinstance(value, dict)]
            match = [value for value in nested if value.get("model_type") == cls.model_type]
            if model_type is not None and not match:
                raise ConfigError(
                    f"{pretrained_model_name_or_path}: config.json is of model type {model_type!r}, but "
                    f"{cls.__name__} reads {cls.model_type!r}. AutoConfig picks the class that fits."
                )
            values = match[0] if match else values
        return cls.from_dict(values, name_or_path=str(pretrained_model_name_or_path), **kwargs)

    @staticmethod
    def get_config_dict(name_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json, removing the hub's options from `kwargs`."""
        source = Source.take(name_or_path, kwargs)
        path = Path(name_or_path)
        is_config = path.suffix == ".json" and path.is_file()
        return read_json(path if is_config else source.require(CONFIG_NAME))

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """A configuration from the file of that name."""
        return cls.from_dict(read_json(json_file))

    def to_dict(self) -> dict[str, Any]:
        """All fields and kept keys, nested configurations as dicts."""
        values: dict[str, Any] = {"model_type": self.model_type} if self.model_type else {}
        for name, value in vars(self).items():
            if name not in _RUNTIME_KEYS:
                values[name] = value.to_dict() if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json: all fields but those that every configuration has and this one leaves alone."""
        values = self.to_dict()
        for name, value in vars(self).items():
            if isinstance(value, PreTrainedConfig):
                values[name] = value.to_diff_dict()
        return {name: value for name, value in values.items() if name not in _UNSET or value != _UNSET[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """What the file holds; all fields with `use_diff=False`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` to a file.

        Raises:
            SaveError: It cannot be written.
        """
        write_json(json_file_path, self.to_diff_dict() if use_diff else self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json into a folder, made if need be.

        Raises:
            SaveError: The folder cannot be written.
        """
        write_json(make_folder(save_directory) / CONFIG_NAME, self.to_diff_dict())

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several attributes at once."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def copy(self) -> Self:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
