"""A model for the commands that hear: found by its flags, loaded, and told what the flags say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..base.errors import InputError, MissingExtra
from ..base.languages import language_code
from ..pipelines import pipeline
from ..pipelines.base import resolve_device, resolve_dtype

#: OpenAI's short names that are not a hub id's end as they are.
_SHORT_NAMES = {"turbo": "large-v3-turbo", "large": "large-v3"}
_SIZES = ("tiny", "base", "small", "medium", "large")


def check_model(arguments: argparse.Namespace) -> None:
    """Check the flags about the model; ends with exit code 2 when they are wrong."""
    if arguments.fp16 is not None and arguments.dtype is not None:
        arguments.usage_error("--fp16 and --dtype both say the numbers' type; pass one of them")
    try:
        device = resolve_device(arguments.device)
        if arguments.fp16 is not None:
            arguments.dtype = "float16" if arguments.fp16 and device.type != "cpu" else "float32"
            if arguments.fp16 and device.type == "cpu":
                print("audiomm: --fp16 True is slow on a CPU and is taken as False", file=sys.stderr)
        if arguments.dtype is not None:
            resolve_dtype(arguments.dtype)
        if arguments.language is not None:
            arguments.language = language_code(arguments.language)
    except (InputError, MissingExtra) as error:
        arguments.usage_error(str(error))


def load(arguments: argparse.Namespace) -> Any:
    """The pipeline that the flags describe."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loading = {
        "cache_dir": arguments.model_dir,
        "local_files_only": arguments.local_files_only or None,
        "quantize": arguments.quantize,
    }
    loading = {name: value for name, value in loading.items() if value is not None}
    options: dict[str, Any] = {"model_kwargs": loading} if loading else {}
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model_name(arguments.model),
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
        **options,
    )
    if arguments.compile:
        # In place, so that names of weights stay what they are.
        pipe.model.get_encoder().compile()
        pipe.model.get_decoder().compile(dynamic=True)
    return pipe


def model_name(name: str) -> str:
    """The hub id that OpenAI's short name of a model stands for; folders and other names as they are."""
    size = _SHORT_NAMES.get(name, name)
    if size.split("-")[0].split(".")[0] in _SIZES and not Path(name).exists():
        return f"openai/whisper-{size}"
    return name


def language_and_task(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Arguments of `generate`; a model that knows only English is told neither."""
    if _is_multilingual(model):
        return {"language": arguments.language, "task": arguments.task}
    if arguments.language not in (None, "en"):
        print(
            f"audiomm: {arguments.model} knows English only; --language {arguments.language} is taken as en",
            file=sys.stderr,
        )
    if arguments.task != "transcribe":
        arguments.usage_error(f"--task {arguments.task}: {arguments.model} knows English only and cannot translate")
    return {}


def _is_multilingual(model: Any) -> bool:
    declared = getattr(model.generation_config, "is_multilingual", None)
    return bool(model.config.vocab_size >= 51865 if declared is None else declared)


def printed(text: str, end: str = "\n") -> None:
    """Print, with a ? for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end=end, flush=True)
