"""The table of families, and the Auto classes that read it: adding a family is one row here.

A folder says which family it belongs to by `model_type` in its config.json.
"""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .base.config import CONFIG_NAME, PreTrainedConfig
from .base.errors import ConfigError
from .base.hub import Source, read_json


@dataclass(frozen=True)
class Family:
    """The classes of one model family, by the job they do.

    Attributes:
        module: Where the classes are, below audiomm.models.
        config, tokenizer, feature_extractor, image_processor, video_processor, processor: Class names; "" for none.
        models: {Auto class name: class name}.
        own: {class name: class} of those that are not below audiomm.models.
    """

    module: str
    config: str
    tokenizer: str = ""
    feature_extractor: str = ""
    processor: str = ""
    image_processor: str = ""
    video_processor: str = ""
    models: dict[str, str] = field(default_factory=dict)
    own: dict[str, type] = field(default_factory=dict)

    def load(self, name: str) -> Any:
        if name in self.own:
            return self.own[name]
        return getattr(importlib.import_module(f"{__package__}.models.{self.module}"), name)

    def part(self, config: str, models: dict[str, str]) -> Family:
        """The row of a model type that is a part of this family's whole model."""
        return replace(self, config=config, models=models)


def _multimodal(base: str, whole: str) -> dict[str, str]:
    """The Auto classes of a model that reads several kinds of media and writes text."""
    jobs = ("CausalLM", "ImageTextToText", "MultimodalLM", "PreTraining")
    return {"AutoModel": base, **{f"AutoModelFor{job}": whole for job in jobs}}


def _text(base: str, head: str) -> dict[str, str]:
    return {"AutoModel": base, "AutoModelForCausalLM": head}


_WHISPER = Family(
    module="whisper",
    config="WhisperConfig",
    tokenizer="WhisperTokenizer",
    feature_extractor="WhisperFeatureExtractor",
    processor="WhisperProcessor",
    models={
        "AutoModel": "WhisperModel",
        "AutoModelForSpeechSeq2Seq": "WhisperForConditionalGeneration",
        "AutoModelForAudioClassification": "WhisperForAudioClassification",
        "AutoModelForCausalLM": "WhisperForCausalLM",
    },
)
_GEMMA3N = Family(
    module="gemma3n",
    config="Gemma3nConfig",
    tokenizer="GemmaTokenizer",
    feature_extractor="Gemma3nAudioFeatureExtractor",
    processor="Gemma3nProcessor",
    image_processor="SiglipImageProcessor",
    models=_multimodal("Gemma3nModel", "Gemma3nForConditionalGeneration"),
)
_GEMMA4 = Family(
    module="gemma4",
    config="Gemma4Config",
    tokenizer="GemmaTokenizer",
    feature_extractor="Gemma4AudioFeatureExtractor",
    processor="Gemma4Processor",
    image_processor="Gemma4ImageProcessor",
    video_processor="Gemma4VideoProcessor",
    models=_multimodal("Gemma4Model", "Gemma4ForConditionalGeneration"),
)
_GEMMA4_UNIFIED = Family(
    module="gemma4",
    config="Gemma4UnifiedConfig",
    tokenizer="GemmaTokenizer",
    feature_extractor="Gemma4UnifiedAudioFeatureExtractor",
    processor="Gemma4UnifiedProcessor",
    image_processor="Gemma4UnifiedImageProcessor",
    video_processor="Gemma4UnifiedVideoProcessor",
    models=_multimodal("Gemma4UnifiedModel", "Gemma4UnifiedForConditionalGeneration"),
)

#: model_type in a config.json -> the classes for it.
FAMILIES: dict[str, Family] = {
    "whisper": _WHISPER,
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N.part("Gemma3nTextConfig", _text("Gemma3nTextModel", "Gemma3nForCausalLM")),
    "gemma3n_audio": _GEMMA3N.part("Gemma3nAudioConfig", {"AutoModel": "Gemma3nAudioEncoder"}),
    "gemma3n_vision": _GEMMA3N.part("Gemma3nVisionConfig", {"AutoModel": "Gemma3nVisionModel"}),
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4.part("Gemma4TextConfig", _text("Gemma4TextModel", "Gemma4ForCausalLM")),
    "gemma4_audio": _GEMMA4.part("Gemma4AudioConfig", {"AutoModel": "Gemma4AudioModel"}),
    "gemma4_vision": _GEMMA4.part("Gemma4VisionConfig", {"AutoModel": "Gemma4VisionModel"}),
    "gemma4_assistant": _GEMMA4.part("Gemma4AssistantConfig", {"AutoModelForCausalLM": "Gemma4AssistantForCausalLM"}),
    "gemma4_unified": _GEMMA4_UNIFIED,
    "gemma4_unified_text": _GEMMA4_UNIFIED.part(
        "Gemma4UnifiedTextConfig", _text("Gemma4UnifiedTextModel", "Gemma4UnifiedForCausalLM")
    ),
    "gemma4_unified_audio": _GEMMA4_UNIFIED.part("Gemma4UnifiedAudioConfig", {}),
    "gemma4_unified_vision": _GEMMA4_UNIFIED.part("Gemma4UnifiedVisionConfig", {}),
    "gemma4_unified_assistant": _GEMMA4_UNIFIED.part(
        "Gemma4UnifiedAssistantConfig", {"AutoModelForCausalLM": "Gemma4UnifiedAssistantForCausalLM"}
    ),
}


def register(model_type: str, family: Family) -> None:
    """Add a family of your own, or replace one."""
    FAMILIES[model_type] = family


def family_of(model_type: str | None, where: str) -> Family:
    """The family of a model type.

    Raises:
        ConfigError: No family has that type.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if model_type is None:
        hint = (
            " A checkpoint of another program (faster-whisper, ggml, ...) becomes one of these with `audiomm convert`."
        )
    raise ConfigError(
        f"{where}: model_type={model_type!r} is not known here; known are {', '.join(sorted(FAMILIES))}.{hint}"
    )


def _register(config_class: Any, part: str, cls: type, exist_ok: bool) -> None:
    """Put a class of your own into the row of its configuration's model type; `part` is a field or an Auto class.

    Raises:
        ConfigError: The model type is missing or has another class there already, unless `exist_ok`.
    """
    model_type = config_class.model_type
    if not model_type:
        raise ConfigError(f"{config_class.__name__} has no model_type; give it one of its own.")
    row = FAMILIES.get(model_type, Family("", config_class.__name__, own={config_class.__name__: config_class}))
    if part != "config" and row.load(row.config) is not config_class:
        raise ConfigError(
            f"{config_class.__name__}: model_type={model_type!r} is that of {row.config}; give it one of its own."
        )
    name = cls.__name__
    known = row.models.get(part) if part.startswith("Auto") else getattr(row, part)
    if known and not exist_ok and row.load(known) is not cls:
        raise ConfigError(f"model_type={model_type!r} has {known} already; pass exist_ok=True to put {name} there.")
    changes: dict[str, Any] = {part: name}
    if part.startswith("Auto"):
        changes = {"models": {**row.models, part: name}}
    FAMILIES[model_type] = replace(row, own={**row.own, name: cls}, **changes)


def _split(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """The source of the files, and its options to pass on."""
    source = Source.take(name, kwargs)
    return source, {option: value for option, value in vars(source).items() if option != "name" and value}


def _refuse_construction(cls: type) -> None:
    raise TypeError(f"{cls.__name__} is not built directly: use {cls.__name__}.from_pretrained(name_or_folder).")


class AutoConfig:
    """The configuration of a folder or hub id, of the class that fits it."""

    def __init__(self) -> None:
        _refuse_construction(type(self))

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        values = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, kwargs)
        family = family_of(values.get("model_type"), str(pretrained_model_name_or_path))
        return family.load(family.config).from_dict(values, name_or_path=str(pretrained_model_name_or_path), **kwargs)

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> PreTrainedConfig:
        """A configuration of the named type with default values, `kwargs` overriding them."""
        family = family_of(model_type, "AutoConfig.for_model")
        config: PreTrainedConfig = family.load(family.config)(**kwargs)
        return config

    @staticmethod
    def register(model_type: str, config: type[PreTrainedConfig], exist_ok: bool = False) -> None:
        """Add a configuration class of your own, for folders whose config.json has its model_type.

        Raises:
            ConfigError: The class has another model_type, or the type is taken.
        """
        if config.model_type != model_type:
            raise ConfigError(
                f"{config.__name__}.model_type is {config.model_type!r} and not {model_type!r}; make them the same."
            )
        _register(config, "config", config, exist_ok)


class _AutoModel:
    """Base of the Auto classes for models: which class of the family is a matter of the Auto class's own name."""

    role: ClassVar[str] = "AutoModel"

    def __init__(self) -> None:
        _refuse_construction(type(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load the model of a folder or hub id; arguments as in PreTrainedModel.from_pretrained.

        Raises:
            ConfigError: The family is not known, or has no model for this job.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            model_type: Any = config.model_type
        else:
            _, options = _split(pretrained_model_name_or_path, dict(kwargs))
            values = PreTrainedConfig.get_config_dict(config or pretrained_model_name_or_path, options)
            model_type = values.get("model_type")
        return cls._class_for(model_type, str(pretrained_model_name_or_path)).from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A model with initial weights."""
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"{cls.__name__}.from_config takes a configuration, not a {type(config).__name__}. To load a folder or "
                f"hub id use {cls.__name__}.from_pretrained(...)."
            )
        return cls._class_for(config.model_type, cls.__name__)._from_config(config, **kwargs)

    @classmethod
    def register(cls, config_class: type[PreTrainedConfig], model_class: type[Any], exist_ok: bool = False) -> None:
        """Add a model class of your own, for configurations of `config_class`.

        Raises:
            ConfigError: The model is made for another configuration, or there is one for this job.
        """
        if model_class.config_class is not config_class:
            raise ConfigError(
                f"{model_class.__name__}.config_class is {model_class.config_class.__name__} and not "
                f"{config_class.__name__}; make them the same."
            )
        _register(config_class, cls.role, model_class, exist_ok)

    @classmethod
    def _class_for(cls, model_type: str | None, where: str) -> Any:
        family = family_of(model_type, where)
        name = family.models.get(cls.role)
        if name is None:
            raise ConfigError(
                f"{where}: the {model_type} family has no model for {cls.role}; it has "
                f"{', '.join(family.models) or 'none'}."
            )
        return family.load(name)


class AutoModel(_AutoModel):
    """The model of a folder or hub id, without a head."""


class AutoModelForSpeechSeq2Seq(_AutoModel):
    """A model that writes what it hears."""

    role = "AutoModelForSpeechSeq2Seq"


class AutoModelForAudioClassification(_AutoModel):
    """A model that names what it hears."""

    role = "AutoModelForAudioClassification"


class AutoModelForCausalLM(_AutoModel):
    """A model that continues text."""

    role = "AutoModelForCausalLM"


class AutoModelForImageTextToText(_AutoModel):
    """A model that sees pictures and writes."""

    role = "AutoModelForImageTextToText"


class AutoModelForMultimodalLM(_AutoModel):
    """A model that reads text, pictures and sound, and writes."""

    role = "AutoModelForMultimodalLM"


class AutoModelForPreTraining(_AutoModel):
    """The model of a folder or hub id, with the head it was trained with."""

    role = "AutoModelForPreTraining"


class _AutoReader:
    """Base of the Auto classes for what stands around a model; the family comes from config.json."""

    part: ClassVar[str]

    def __init__(self) -> None:
        _refuse_construction(type(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load from a folder or hub id; `kwargs` are options of the hub and of the class that fits.

        Raises:
            ConfigError: The family is not known.
        """
        source, options = _split(pretrained_model_name_or_path, kwargs)
        config = kwargs.pop("config", None)
        model_type = config.model_type if isinstance(config, PreTrainedConfig) else _model_type(source, cls.part)
        family = family_of(model_type, str(pretrained_model_name_or_path))
        name = getattr(family, cls.part)
        if not name:
            raise ConfigError(f"{pretrained_model_name_or_path}: models of type {model_type} have no {cls.part}.")
        return family.load(name).from_pretrained(pretrained_model_name_or_path, **options, **kwargs)

    @classmethod
    def register(cls, config_class: type[PreTrainedConfig], part_class: type, exist_ok: bool = False) -> None:
        """Add a class of your own for models with configurations of `config_class`.

        Raises:
            ConfigError: There is one already.
        """
        _register(config_class, cls.part, part_class, exist_ok)


def _model_type(source: Source, part: str) -> str | None:
    """The model type in config.json, or what the names of the classes in the other files begin with.

    Where a tokenizer, or another single part, is looked for, the whole name of its class is enough.
    """
    path = source.find(CONFIG_NAME)
    if path is not None:
        return read_json(path).get("model_type")
    for filename in ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = source.find(filename)
        if path is None:
            continue
        values = read_json(path)
        for key in ("processor_class", "tokenizer_class", "feature_extractor_type", "image_processor_type"):
            name = str(values.get(key, "")).lower()
            matches = [model_type for model_type in FAMILIES if name.startswith(model_type.replace("_", ""))]
            if not matches and key.startswith(part):
                name = name.removesuffix("fast")
                matches = [kind for kind, family in FAMILIES.items() if str(getattr(family, part)).lower() == name]
            if matches:
                return max(matches, key=len)
    source.require(CONFIG_NAME)
    return None


class AutoTokenizer(_AutoReader):
    """The tokenizer of a folder or hub id."""

    part = "tokenizer"

    @classmethod
    def register(  # type: ignore[override]  # the names and places are those of transformers
        cls,
        config_class: type[PreTrainedConfig],
        tokenizer_class: type | None = None,
        slow_tokenizer_class: type | None = None,
        fast_tokenizer_class: type | None = None,
        exist_ok: bool = False,
    ) -> None:
        """Add a tokenizer of your own; slow and fast are older names, the fast one coming first.

        Raises:
            ConfigError: None is given, or there is one already.
        """
        chosen = tokenizer_class or fast_tokenizer_class or slow_tokenizer_class
        if chosen is None:
            raise ConfigError("AutoTokenizer.register needs a tokenizer_class.")
        super().register(config_class, chosen, exist_ok)


class AutoFeatureExtractor(_AutoReader):
    """The feature extractor of a folder or hub id."""

    part = "feature_extractor"


class AutoImageProcessor(_AutoReader):
    """The image processor of a folder or hub id."""

    part = "image_processor"

    @classmethod
    def register(  # type: ignore[override]  # the names and places are those of transformers
        cls,
        config_class: type[PreTrainedConfig],
        slow_image_processor_class: type | None = None,
        fast_image_processor_class: type | None = None,
        image_processor_classes: dict[str, type] | None = None,
        exist_ok: bool = False,
    ) -> None:
        """Add an image processor of your own: the fast one, or the first of `image_processor_classes`.

        Raises:
            ConfigError: None is given, or there is one already.
        """
        chosen = [*(image_processor_classes or {}).values(), fast_image_processor_class, slow_image_processor_class]
        found = [one for one in chosen if one is not None]
        if not found:
            raise ConfigError("AutoImageProcessor.register needs a class, as in image_processor_classes={'pil': Mine}.")
        super().register(config_class, found[0], exist_ok)


class AutoVideoProcessor(_AutoReader):
    """The video processor of a folder or hub id."""

    part = "video_processor"


class AutoProcessor(_AutoReader):
    """The processor of a folder or hub id: tokenizer and extractors together."""

    part = "processor"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The processor; or the tokenizer, image processor or feature extractor that stands there alone.

        Raises:
            ConfigError: The family is not known.
        """
        source, _ = _split(pretrained_model_name_or_path, dict(kwargs))
        part = None if "config" in kwargs else _lone_part(source)
        return (part.from_pretrained if part else super().from_pretrained)(pretrained_model_name_or_path, **kwargs)


def _lone_part(source: Source) -> type[_AutoReader] | None:
    """The Auto class of the only part in a folder that names neither a model nor a processor."""
    if source.find(CONFIG_NAME) or source.find("processor_config.json"):
        return None
    paths = [source.find(f"{name}_config.json") for name in ("tokenizer", "preprocessor")]
    values = [read_json(path) for path in paths if path is not None]
    if len(values) != 1 or values[0].get("processor_class"):
        return None
    if paths[0] is not None:
        return AutoTokenizer
    return AutoImageProcessor if "image_processor_type" in values[0] else AutoFeatureExtractor
