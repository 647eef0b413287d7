"""GenerationConfig: how tokens are to be chosen, checked, and read from or written to generation_config.json.

The file format, the names and the meaning of None ("not set here: ask the next one") are those of transformers 5:
call arguments win over the config passed to generate(), that over the model's own, and that over `DEFAULTS`.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..base.errors import GenerationError
from ..base.hub import Source, make_folder, read_json, write_json
from .fields import DEFAULTS, FIELDS, REFUSED

FILE_NAME = "generation_config.json"

#: Fields a model config may hold for other reasons, and that say nothing about generation there.
_NOT_FROM_MODEL = {"output_attentions", "output_hidden_states", "use_cache", "cache_config", "max_length", "top_k"}

_BOOKKEEPING = ("_from_model_config", "_commit_hash")


@dataclass
class CompileConfig:
    """How torch.compile is to treat decode steps, and prompts that come often; generate() takes it as `compile_config`.

    Where it is given, steps are compiled on any device, layers that are alike once for all of them, and the cache is a
    static one. On a GPU what was compiled is captured as a CUDA graph, unless AUDIOMM_CAPTURE=0.

    Attributes:
        fullgraph: Fail where the step is not one graph; it is one with every model of this library.
        dynamic: As for torch.compile; None counts as False, since no shape changes from step to step.
        backend, options: As for torch.compile.
        mode: As for torch.compile, None where there are `options`; its own CUDA graphs are left out.
        regional: False compiles layers together and not once for all, which takes longer the more there are; a step
            of a small model then takes less time.
    """

    fullgraph: bool = False
    dynamic: bool | None = None
    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = "reduce-overhead"
    options: dict[str, Any] | None = None
    regional: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class GenerationConfig:
    """Options of generate().

    Every field of `fields.FIELDS` is an attribute, None where it was not given. Other keywords (Whisper's
    `lang_to_id`, `alignment_heads`, ...) are kept as attributes too and survive a round trip through the file.

    Args:
        **values: Fields by name.

    Raises:
        GenerationError: A value is outside what its field accepts.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    early_stopping: bool | str | None
    max_time: float | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: int | None
    use_cache: bool | None
    cache_implementation: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    length_penalty: float | None
    google_length_penalty: float | None
    patience: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    renormalize_logits: bool | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    sequence_bias: Any
    num_return_sequences: int | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    output_logprobs: bool | None
    return_dict_in_generate: bool | None
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    decoder_start_token_id: int | list[int] | None
    num_assistant_tokens: int | None
    prefill_chunk_size: int | None
    assistant_confidence_threshold: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    max_cache_len: int | None
    cross_cache_dtype: str | None
    compile_config: CompileConfig | dict[str, Any] | None
    disable_compile: bool | None

    def __init__(self, **values: Any) -> None:
        self._set(values)
        self.validate()

    def _set(self, values: dict[str, Any]) -> None:
        for name in FIELDS:
            setattr(self, name, None)
        for name, value in values.items():
            # A key must not stand in the way of a method, and two say only where the values came from.
            if name not in _BOOKKEEPING and not hasattr(type(self), name):
                setattr(self, name, value)

    # -- checks

    def validate(self) -> None:
        """Check every field that is set, and those that must agree.

        Raises:
            GenerationError: Names the field, its value and what it accepts.
        """
        for name, rule in FIELDS.items():
            value = getattr(self, name)
            wanted = None if value is None else rule(value)
            if wanted is not None:
                raise GenerationError(f"{name}={value!r} is not accepted: pass {wanted}, or None to leave it unset.")
        beams, returned = self.num_beams or 1, self.num_return_sequences or 1
        if beams > 1 and returned > beams:
            raise GenerationError(
                f"num_return_sequences={returned} is more than num_beams={beams}: a search keeps one sequence per "
                "beam. Lower num_return_sequences or raise num_beams."
            )

    def check_runnable(self) -> None:
        """Further checks of a config whose fields are filled in, made when generation starts.

        Raises:
            GenerationError: Fields that are fine alone do not fit together, or ask for what generate() cannot do.
        """
        self.validate()
        for name, neutral in REFUSED.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise GenerationError(
                    f"{name}={value!r} is not something generate() can honour: leave it unset (None)."
                )
        if self.do_sample and self.temperature == 0:
            raise GenerationError(
                "temperature=0 with do_sample=True would divide by zero: pass a temperature above 0, or "
                "do_sample=False for the most likely token."
            )
        if not self.do_sample and self.num_beams == 1 and self.num_return_sequences != 1:
            raise GenerationError(
                f"num_return_sequences={self.num_return_sequences} needs do_sample=True or num_beams > 1: greedy "
                "decoding gives the same sequence every time."
            )

    # -- derived

    @property
    def eos_ids(self) -> list[int]:
        """The end tokens as a list, empty when there are none, or -1 says so."""
        return [token for token in _as_ids(self.eos_token_id) if token >= 0]

    def filled(self) -> GenerationConfig:
        """A copy in which fields that were None and have a default hold it."""
        result = copy.deepcopy(self)
        for name, value in DEFAULTS.items():
            if getattr(result, name) is None:
                setattr(result, name, value)
        return result

    def overlaid(self, other: GenerationConfig) -> GenerationConfig:
        """A copy in which everything that is set in `other` replaces what stood here."""
        result = copy.deepcopy(self)
        for name, value in vars(other).items():
            if value is not None:
                setattr(result, name, copy.deepcopy(value))
        return result

    def update(self, **values: Any) -> dict[str, Any]:
        """Set the attributes that exist, and return the rest.

        Raises:
            GenerationError: A value is outside what its field accepts.
        """
        unused = {name: value for name, value in values.items() if name not in vars(self)}
        for name, value in values.items():
            if name not in unused:
                setattr(self, name, value)
        self.validate()
        return unused

    # -- files

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a config from a dictionary; `kwargs` win over it.

        What a checkpoint wrote is taken as it is and judged when generation starts, so that no file fails to load
        for a field that nobody uses.

        Returns:
            The config, with `return_unused_kwargs` a pair of it and an empty dictionary (all keys are kept).
        """
        config = cls()
        config._set({**copy.deepcopy(config_dict), **kwargs})
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], config_file_name: str | None = None, **kwargs: Any
    ) -> Any:
        """Read generation_config.json from a folder or the hub; further keywords win over the file.

        Raises:
            CheckpointNotFoundError: The folder or repository has no such file.
            ConfigError: The file is not a JSON object.
        """
        unused = bool(kwargs.pop("return_unused_kwargs", False))
        source = Source.take(pretrained_model_name, kwargs)
        values = read_json(source.require(str(config_file_name or FILE_NAME)))
        return cls.from_dict(values, return_unused_kwargs=unused, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """Special tokens and older generation fields that a model's own config holds, its text part included."""
        config = cls()
        parts = [getattr(model_config, name, None) for name in ("decoder", "text_config")]
        for part in [model_config, *parts]:
            if part is None:
                continue
            values = part if isinstance(part, dict) else part.to_dict()
            for name in FIELDS:
                if name not in _NOT_FROM_MODEL and values.get(name) is not None and getattr(config, name) is None:
                    setattr(config, name, copy.deepcopy(values[name]))
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], config_file_name: str | None = None, **kwargs: Any
    ) -> None:
        """Write the fields that are set to generation_config.json in `save_directory`.

        Values are not judged here, so that no odd field of a checkpoint keeps a model from being saved.

        Raises:
            SaveError: The folder or file cannot be written.
        """
        write_json(make_folder(save_directory) / str(config_file_name or FILE_NAME), self.to_diff_dict())

    def to_dict(self) -> dict[str, Any]:
        """All fields and further attributes, as JSON types."""
        return {name: _as_json(value) for name, value in vars(self).items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Only what is set."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write what `to_json_string` gives to a file.

        Raises:
            SaveError: It cannot be written.
        """
        write_json(json_file_path, self.to_diff_dict() if use_diff else self.to_dict())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _as_ids(value: Any) -> list[int]:
    """Token ids from None, one id, a list or a tensor."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(token) for token in value.flatten().tolist()]
    return [int(token) for token in value] if isinstance(value, (list, tuple)) else [int(value)]


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        if any(isinstance(key, tuple) for key in value):
            return [[list(key), _as_json(item)] for key, item in value.items()]
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else copy.deepcopy(value)
