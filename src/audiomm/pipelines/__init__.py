"""The one-call doors: `pipeline(task, model)` gives an object that takes raw inputs and gives results.

The interface is that of transformers' pipelines; the tasks are the rows of `TASKS`.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ..auto import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)
from ..base.errors import InputError
from .any_to_text import AnyToTextPipeline, ImageTextToTextPipeline, TextGenerationPipeline
from .audio_classification import AudioClassificationPipeline
from .base import Pipeline, resolve_device
from .prompted_recognition import PromptedSpeechRecognitionPipeline
from .speech_recognition import AutomaticSpeechRecognitionPipeline
from .writers import get_writer

__all__ = [
    "TASKS",
    "AnyToTextPipeline",
    "AudioClassificationPipeline",
    "AutomaticSpeechRecognitionPipeline",
    "ImageTextToTextPipeline",
    "Pipeline",
    "PromptedSpeechRecognitionPipeline",
    "Task",
    "TextGenerationPipeline",
    "get_writer",
    "pipeline",
]

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download")


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    Attributes:
        pipeline_class: What `pipeline` returns.
        model_class: Loads a model for it.
        families: Values of `model_type` in a config that make this the task of a model when none is named.
        default_model: The model when none is named; None where one must be.
        parts: What is loaded beside the model; "processor" stands for the tokenizer of a model of text alone.
        options: Keywords for the class.
    """

    pipeline_class: type[Pipeline]
    model_class: Any
    families: tuple[str, ...]
    default_model: str | None
    parts: tuple[str, ...] = ("tokenizer", "feature_extractor")
    options: dict[str, Any] = field(default_factory=dict)


#: Models that are asked, not told what to hear.
_ANSWERING = ("gemma3n", "gemma4", "gemma4_unified")


_BY_TASK = {"text-generation": TextGenerationPipeline, "image-text-to-text": ImageTextToTextPipeline}


def _answers(task: str, model_class: Any = AutoModelForMultimodalLM, families: tuple[str, ...] = ()) -> Task:
    pipeline_class = _BY_TASK.get(task, AnyToTextPipeline)
    return Task(pipeline_class, model_class, families, None, ("processor",), {"task": task})


TASKS = {
    "automatic-speech-recognition": Task(
        AutomaticSpeechRecognitionPipeline, AutoModelForSpeechSeq2Seq, ("whisper",), "audiomm/whisper-commands"
    ),
    "audio-classification": Task(
        AudioClassificationPipeline, AutoModelForAudioClassification, (), None, ("feature_extractor",)
    ),
    "any-to-any": _answers("any-to-any", families=_ANSWERING),
    "image-text-to-text": _answers("image-text-to-text"),
    "audio-text-to-text": _answers("audio-text-to-text"),
    "text-generation": _answers("text-generation", AutoModelForCausalLM, ("gemma3n_text", "gemma4_text")),
}

#: The same task where a model of `_ANSWERING` does it.
_ASKED = {
    "automatic-speech-recognition": Task(
        PromptedSpeechRecognitionPipeline, AutoModelForMultimodalLM, (), None, ("processor",)
    )
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    image_processor: Any = None,
    processor: Any = None,
    revision: str | None = None,
    use_fast: bool = True,
    token: str | bool | None = None,
    device: int | str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    trust_remote_code: bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    pipeline_class: type[Pipeline] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline for a task.

    Args:
        task: A key of `TASKS`; found from the model's config when left out.
        model: A hub id, a folder or a model. None is the model that ships with the package.
        config: A config, or where to read one; only used to find the task and to load the model.
        tokenizer: A tokenizer or where to read one; found where the model came from when left out.
        feature_extractor: A feature extractor or where to read one; likewise.
        image_processor: Accepted for compatibility; pass processor= to have another.
        processor: A processor, or where to read one, that holds the tokenizer and the feature extractor.
        revision: Branch, tag or commit on the hub.
        use_fast: Accepted for compatibility.
        token: Hub token.
        device: "cuda:1", a number (-1 is the CPU), a torch.device; None is the first accelerator, or the CPU.
        device_map: Spread the model over devices while loading it.
        dtype: "bfloat16", torch.float16, ...; None keeps the checkpoint's, but float16 becomes float32 on a CPU.
        torch_dtype: An older name of `dtype`.
        trust_remote_code: Accepted for compatibility; code from a checkpoint is never run.
        model_kwargs: More keywords for the model's `from_pretrained`.
        pipeline_class: Use this class.
        kwargs: For the pipeline: batch_size and defaults for its calls.

    Raises:
        InputError: There is no such task, it cannot be found from the model, or an argument is wrong.
        CheckpointError: The model cannot be loaded.
    """
    row = _row(task, model, config, {"revision": revision, "token": token})
    if model_kwargs is not None and not isinstance(model_kwargs, dict):
        raise InputError(f"model_kwargs is a {type(model_kwargs).__name__}; a dict is needed.")
    model_kwargs = dict(model_kwargs or {})
    hub = {name: model_kwargs.pop(name) for name in _HUB_OPTIONS if name in model_kwargs}
    hub.update({name: value for name, value in (("revision", revision), ("token", token)) if value is not None})
    dtype = dtype if dtype is not None else torch_dtype
    if device is not None and device_map is not None:
        raise InputError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one of them.")
    if model is None:
        if row.default_model is None:
            raise InputError(f"task={task!r} has no model of its own: pass model=, a folder, a hub id or a model.")
        model = row.default_model
    if isinstance(model, (str, os.PathLike)):
        source: Any = model
        options = {"config": config, "dtype": "auto" if dtype is None else dtype, **model_kwargs, **hub}
        options.update({"device": resolve_device(device)} if device_map is None else {"device_map": device_map})
        model = row.model_class.from_pretrained(source, **{k: v for k, v in options.items() if v is not None})
        if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
            # Processors compute float16 slowly and with more rounding; the checkpoint only stores it.
            model.float()
        # It is where it should be, and of the right type.
        device, dtype = None if hasattr(model, "hf_device_map") else model.device, None
    elif isinstance(model, type) or not (isinstance(model, torch.nn.Module) or hasattr(model, "config")):
        raise InputError(f"model={model!r}: a folder, a hub id or a loaded model is needed.")
    else:
        source = getattr(model, "name_or_path", None) or None
    if isinstance(processor, (str, os.PathLike)):
        processor = AutoProcessor.from_pretrained(processor, **hub)
    wanted = row.parts
    if wanted == ("processor",):
        reads_text_alone = model.config.model_type.endswith("_text")
        wanted = ("tokenizer",) if reads_text_alone else ()
        if processor is None and not reads_text_alone:
            processor = _part("processor", None, AutoProcessor, source, hub)
    given = {"tokenizer": (tokenizer, AutoTokenizer), "feature_extractor": (feature_extractor, AutoFeatureExtractor)}
    parts = {
        name: _part(name, given[name][0], given[name][1], source, hub)
        for name in wanted
        if processor is None or given[name][0] is not None
    }
    return (pipeline_class or row.pipeline_class)(
        model=model, processor=processor, device=device, dtype=dtype, **parts, **row.options, **kwargs
    )


def _row(task: str | None, model: Any, config: Any, hub: dict[str, Any]) -> Task:
    """The row of a task, or of the model's family when no task is named."""
    if task is not None:
        if task in _ASKED and model is not None and _model_type(model, config, hub) in _ANSWERING:
            return _ASKED[task]
        if task in TASKS:
            return TASKS[task]
        near = difflib.get_close_matches(str(task), TASKS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"task={task!r}: {hint}The tasks are {', '.join(map(repr, TASKS))}.")
    if model is None:
        raise InputError("pipeline() needs a task, a model or both, like pipeline('automatic-speech-recognition').")
    model_type = _model_type(model, config, hub)
    for row in TASKS.values():
        if model_type in row.families:
            return row
    raise InputError(f"model_type={model_type!r}: no task is known for it; name one of {', '.join(TASKS)}.")


def _model_type(model: Any, config: Any, hub: dict[str, Any]) -> str | None:
    """The model_type of a model or of where it is read from."""
    if config is None or isinstance(config, (str, os.PathLike)):
        where = model if config is None else config
        config = getattr(model, "config", None)
        if config is None and isinstance(where, (str, os.PathLike)):
            config = AutoConfig.from_pretrained(
                where, **{name: value for name, value in hub.items() if value is not None}
            )
    return getattr(config, "model_type", None)


def _part(name: str, given: Any, loader: Any, source: Any, hub: dict[str, Any]) -> Any:
    """A tokenizer or feature extractor: as given, or loaded from where it or the model is."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    where = given if given is not None else source
    if where is None:
        raise InputError(f"{name}: this model does not know where it was loaded from; pass {name}= or processor=.")
    return loader.from_pretrained(where, **hub)
