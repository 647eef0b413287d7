"""`audiomm transcribe`: audio files to text on the screen or in subtitle files.

A file that cannot be read is reported and the others go on, as in openai-whisper.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..base.errors import InputError, MissingExtra, SaveError
from ..base.hub import make_folder
from ..base.languages import language_code
from ..base.transcript import Transcript
from ..media.speech import SpeechFinder
from ..pipelines import get_writer, pipeline
from ..pipelines.base import batched, resolve_device, resolve_dtype
from ..pipelines.clips import clip_times
from ..pipelines.writers import SubtitleOptions, Writer, format_timestamp, output_names

logger = logging.getLogger("audiomm.cli")

#: Flags that are called otherwise in `generate`.
_GENERATE_NAMES = {"beam_size": "num_beams", "condition_on_previous_text": "condition_on_prev_tokens"}
_GENERATE_FLAGS = (
    "beam_size",
    "compression_ratio_threshold",
    "logprob_threshold",
    "no_speech_threshold",
    "condition_on_previous_text",
    "length_penalty",
    "max_new_tokens",
)
#: Flags that the pipeline takes under the same name, when they say something.
_PIPELINE_FLAGS = ("initial_prompt", "carry_initial_prompt", "hotwords", "clip_timestamps", "vad_filter")
#: Flags that go into `vad_parameters`, without "vad_".
_SPEECH_FLAGS = ("vad_detector", "vad_threshold", "vad_min_silence_duration_ms", "vad_speech_pad_ms")


def run(arguments: argparse.Namespace) -> int:
    """Transcribe the files of the arguments.

    Returns:
        0 when all were, 1 when one was not.
    """
    options = _checked(arguments)
    names = output_names(arguments.audio)
    writer = _writer(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    pipe = pipeline(
        "automatic-speech-recognition",
        model=arguments.model,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    call = {
        "return_timestamps": "word" if arguments.word_timestamps else True,
        "generate_kwargs": _generate_kwargs(arguments, pipe.model),
        "allow_urls": True,
        **_pipeline_kwargs(arguments),
    }
    failed = 0
    for batch in batched(iter(zip(arguments.audio, names, strict=True)), arguments.batch_size):
        for (path, name), result in zip(batch, _transcribe(pipe, [path for path, _ in batch], call), strict=True):
            error: Exception | None
            if isinstance(result, Transcript):
                error = _deliver(result, path, name, writer, options, arguments)
            else:
                error = result
            if error is not None:
                failed += 1
                logger.debug("%s", path, exc_info=error)
                print(f"audiomm: {path}: {_told(error, path)}", file=sys.stderr)
    if failed and len(arguments.audio) > 1:
        print(f"audiomm: {failed} of {len(arguments.audio)} files failed", file=sys.stderr)
    return 1 if failed else 0


def _checked(arguments: argparse.Namespace) -> SubtitleOptions:
    """The layout of subtitles; ends with exit code 2 when arguments are wrong."""
    for path in arguments.audio:
        if Path(path).is_dir():
            arguments.usage_error(f"{path} is a folder; pass the files in it, like {path}/*.wav")
    options = SubtitleOptions(
        max_line_width=arguments.max_line_width,
        max_line_count=arguments.max_line_count,
        max_words_per_line=arguments.max_words_per_line,
        highlight_words=arguments.highlight_words,
    )
    if options.needs_words and not arguments.word_timestamps:
        arguments.usage_error(
            "--highlight_words, --max_line_width, --max_line_count and --max_words_per_line need --word_timestamps True"
        )
    try:
        resolve_device(arguments.device)
        if arguments.dtype is not None:
            resolve_dtype(arguments.dtype)
        if arguments.language is not None:
            arguments.language = language_code(arguments.language)
        SpeechFinder.from_parameters(_speech_parameters(arguments))
        parts = clip_times(arguments.clip_timestamps)
    except (InputError, MissingExtra) as error:
        arguments.usage_error(str(error))
    if parts and arguments.vad_filter:
        arguments.usage_error("--clip_timestamps and --vad_filter True both choose what is heard; pass one of them")
    if _speech_parameters(arguments) and not arguments.vad_filter:
        arguments.usage_error("flags that begin with --vad_ need --vad_filter True")
    if arguments.carry_initial_prompt and arguments.initial_prompt is None:
        arguments.usage_error("--carry_initial_prompt True needs an --initial_prompt")
    return options


def _pipeline_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call: those of the flags that say something."""
    kwargs = {name: value for name in _PIPELINE_FLAGS if (value := getattr(arguments, name)) not in (None, False)}
    parameters = _speech_parameters(arguments)
    return {**kwargs, "vad_parameters": parameters} if parameters else kwargs


def _speech_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about finding speech."""
    given = {name.removeprefix("vad_"): getattr(arguments, name) for name in _SPEECH_FLAGS}
    return {name: value for name, value in given.items() if value is not None}


def _writer(arguments: argparse.Namespace) -> Writer | None:
    """Where files go, made ready before hours of work; None when the text is only to be printed."""
    if arguments.output_dir is None and arguments.output_format is None:
        return None
    return get_writer(arguments.output_format or "all", make_folder(arguments.output_dir or "."))


def _generate_kwargs(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Arguments of `generate`: those of the flags that say something."""
    kwargs = {_GENERATE_NAMES.get(name, name): getattr(arguments, name) for name in _GENERATE_FLAGS}
    kwargs["temperature"] = _temperatures(arguments.temperature, arguments.temperature_increment_on_fallback)
    if _is_multilingual(model):
        kwargs.update(language=arguments.language, task=arguments.task)
    else:
        if arguments.language not in (None, "en"):
            print(
                f"audiomm: {arguments.model} knows English only; --language {arguments.language} is taken as en",
                file=sys.stderr,
            )
        if arguments.task != "transcribe":
            arguments.usage_error(f"--task {arguments.task}: {arguments.model} knows English only and cannot translate")
    return {name: value for name, value in kwargs.items() if value is not None}


def _temperatures(first: float, step: float | None) -> float | tuple[float, ...]:
    """One temperature, or the ladder from it to 1.0."""
    if not step:
        return first
    count = int((1.0 - first) / step + 1e-6) + 1
    return tuple(round(first + index * step, 6) for index in range(max(count, 1)))


def _is_multilingual(model: Any) -> bool:
    declared = getattr(model.generation_config, "is_multilingual", None)
    return bool(model.config.vocab_size >= 51865 if declared is None else declared)


def _transcribe(pipe: Any, paths: list[str], call: dict[str, Any]) -> Iterator[Transcript | Exception]:
    """A transcript for each path, or the error that kept it from being one."""
    if len(paths) > 1:
        try:
            yield from pipe.transcribe(paths, batch_size=len(paths), **call)
            return
        except Exception as error:
            # One bad file must not take the others along: go through them one by one.
            logger.debug("a batch of %d files failed", len(paths), exc_info=error)
    for path in paths:
        try:
            transcript: Transcript | Exception = pipe.transcribe(path, **call)
        except Exception as error:
            transcript = error
        yield transcript


def _deliver(
    transcript: Transcript,
    path: str,
    name: str,
    writer: Writer | None,
    options: SubtitleOptions,
    arguments: argparse.Namespace,
) -> SaveError | None:
    """Print a transcript, write it, or both; what could not be written comes back as an error."""
    if not transcript.text.strip():
        print(f"audiomm: {path}: no speech found", file=sys.stderr)
    if writer is None or arguments.verbose:
        if len(arguments.audio) > 1:
            _print(f"{path}:")
        for segment in transcript.segments:
            start, end = format_timestamp(segment.start), format_timestamp(segment.end)
            _print(f"[{start} --> {end}] {segment.text.strip()}")
    if writer is None:
        return None
    try:
        for written in writer.write(transcript, name, options):
            _print(str(written))
    except SaveError as error:
        return error
    return None


def _told(error: Exception, path: str) -> str:
    """An error in words, without the path that stands before it already."""
    text = str(error) or type(error).__name__
    return text.removeprefix(f"{path}: ")


def _print(text: str) -> None:
    """Print, with a ? for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), flush=True)
