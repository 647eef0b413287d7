"""`audiomm transcribe`: audio files to text on the screen or in subtitle files.

A file that cannot be read is reported and the others go on, as in openai-whisper.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.errors import InputError, MissingExtra, SaveError
from ..base.hub import make_folder
from ..base.transcript import Transcript
from ..media.speech import SpeechFinder
from ..models.whisper.face import openai_default
from ..models.whisper.options import OFF
from ..models.whisper.words import APPEND_PUNCTUATIONS, PREPEND_PUNCTUATIONS
from ..pipelines import get_writer
from ..pipelines.clips import LOAD_OPTIONS, clip_times, read_clip
from ..pipelines.writers import SubtitleOptions, Writer, format_timestamp, output_names
from .models import check_model, language_and_task, load, printed

logger = logging.getLogger("audiomm.cli")

#: Flags that are called otherwise in `generate`.
_GENERATE_NAMES = {"beam_size": "num_beams"}
_GENERATE_FLAGS = (
    "beam_size",
    "hallucination_silence_threshold",
    "max_new_tokens",
)
#: Flags that a model's generation config may settle.
_CHECKS = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")
#: Flags that the pipeline takes under the same name, when they say something.
_PIPELINE_FLAGS = ("initial_prompt", "carry_initial_prompt", "hotwords", "clip_timestamps", "vad_filter")
#: Flags that say something about words.
_WORD_FLAGS = ("prepend_punctuations", "append_punctuations", "hallucination_silence_threshold")
#: Flags that go into `vad_parameters`, without "vad_".
_SPEECH_FLAGS = ("vad_detector", "vad_threshold", "vad_min_silence_duration_ms", "vad_speech_pad_ms")


def run(arguments: argparse.Namespace) -> int:
    """Transcribe the files of the arguments.

    Returns:
        0 when all were, 1 when one was not.
    """
    options = _checked(arguments)
    names = output_names(["stdin" if path == "-" else path for path in arguments.audio])
    writer = _writer(arguments)
    pipe = load(arguments)
    piped = sys.stdin.buffer.read() if "-" in arguments.audio else b""
    call = {
        "return_timestamps": "word" if arguments.word_timestamps else True,
        "generate_kwargs": _generate_kwargs(arguments, pipe),
        "allow_urls": True,
        **_pipeline_kwargs(arguments),
    }
    if len(arguments.audio) == 1 and arguments.batch_size > 1:
        call["batch_size"] = arguments.batch_size
    failed = 0
    sources = [piped if path == "-" else path for path in arguments.audio]
    results = transcripts(pipe, sources, call, arguments.batch_size)
    for path, name, result in zip(arguments.audio, names, results, strict=True):
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
    check_model(arguments)
    _check_decoding(arguments)
    try:
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


def _check_decoding(arguments: argparse.Namespace) -> None:
    """Check flags that do not go together; ends with exit code 2 when they do not."""
    words = [name for name in _WORD_FLAGS if getattr(arguments, name) is not None]
    if words and not arguments.word_timestamps:
        arguments.usage_error(f"--{words[0]} needs --word_timestamps True")
    if _is_side_by_side(arguments) and arguments.condition_on_previous_text:
        arguments.usage_error(
            "--condition_on_previous_text True goes window by window, and --batch_size for one file hears windows side "
            "by side; pass one of them"
        )
    for name in ("patience", "length_penalty"):
        if getattr(arguments, name) is not None and arguments.beam_size == 1:
            arguments.usage_error(f"--{name} is for a search; pass a --beam_size above 1")
    if arguments.length_penalty is not None and not 0 <= arguments.length_penalty <= 1:
        arguments.usage_error(f"--length_penalty {arguments.length_penalty:g}: accepted are 0 to 1")
    try:
        arguments.suppress_tokens = [int(entry) for entry in arguments.suppress_tokens.split(",") if entry.strip()]
    except ValueError:
        arguments.usage_error(f"--suppress_tokens {arguments.suppress_tokens}: token ids with commas between")
    if arguments.audio.count("-") > 1 or ("-" in arguments.audio and sys.stdin.isatty()):
        arguments.usage_error("- reads audio once from a pipe, like: ffmpeg ... -f wav - | audiomm transcribe -")


def _generate_kwargs(arguments: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Arguments of `generate`: those of the flags that say something."""
    kwargs = {_GENERATE_NAMES.get(name, name): getattr(arguments, name) for name in _GENERATE_FLAGS}
    kwargs["temperature"] = _temperatures(arguments.temperature, arguments.temperature_increment_on_fallback)
    if isinstance(kwargs["temperature"], tuple) or kwargs["temperature"] > 0:
        kwargs["best_of"] = arguments.best_of
    kwargs.update(_checks(arguments, pipe.model.generation_config))
    # OpenAI's threshold is about text, not about the bytes of token ids.
    kwargs["text_of"] = _text_of(pipe.tokenizer)
    if arguments.patience is not None or arguments.length_penalty is not None:
        kwargs["patience"] = arguments.patience or 1.0
        kwargs["google_length_penalty"] = arguments.length_penalty
    if arguments.suppress_tokens != [-1]:
        own = getattr(pipe.model.generation_config, "suppress_tokens", None) if -1 in arguments.suppress_tokens else ()
        kwargs["suppress_tokens"] = sorted({*(own or ()), *arguments.suppress_tokens} - {-1})
    marks = (arguments.prepend_punctuations, arguments.append_punctuations)
    if marks != (None, None):
        defaults = (PREPEND_PUNCTUATIONS, APPEND_PUNCTUATIONS)
        kwargs["punctuation"] = tuple(
            default if given is None else given for given, default in zip(marks, defaults, strict=True)
        )
    kwargs.update(language_and_task(arguments, pipe.model))
    return {name: value for name, value in kwargs.items() if value is not None}


def _checks(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Thresholds and conditioning: what the flags say, else the model's own, else openai-whisper's defaults."""
    given = {name: getattr(arguments, name) for name in _CHECKS}
    given["condition_on_prev_tokens"] = arguments.condition_on_previous_text
    if arguments.condition_on_previous_text is None and _is_side_by_side(arguments):
        given["condition_on_prev_tokens"] = False
    return {
        name: OFF if value == "None" else openai_default(config, name) if value is None else value
        for name, value in given.items()
    }


def _is_side_by_side(arguments: argparse.Namespace) -> bool:
    """Windows of one file are heard independently of each other."""
    return arguments.batch_size > 1 and len(arguments.audio) == 1


def _text_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Text of tokens, without times."""

    def text(tokens: list[int]) -> str:
        decoded: str = tokenizer.decode([token for token in tokens if token < begin], skip_special_tokens=True)
        return decoded

    begin = tokenizer.timestamp_begin
    return text


def _temperatures(first: float, step: float | None) -> float | tuple[float, ...]:
    """One temperature, or the ladder from it to 1.0."""
    if not step:
        return first
    count = int((1.0 - first) / step + 1e-6) + 1
    return tuple(round(first + index * step, 6) for index in range(max(count, 1)))


def transcripts(
    pipe: Any, sources: list[str | bytes], call: dict[str, Any], batch_size: int | None = None
) -> Iterator[Transcript | Exception]:
    """A transcript for each path or file content, or the error that kept it from being one.

    Args:
        pipe: A speech recognition pipeline.
        sources: What is to be heard.
        call: Arguments of `pipe.transcribe`.
        batch_size: Of the sources go through the model together; None has all of them.
    """
    done = 0
    size = len(sources) if batch_size is None else batch_size
    if len(sources) > 1 and size > 1:
        try:
            for result in _side_by_side(pipe, sources, call, size):
                done += 1
                yield result
        except Exception as error:
            # What one file did to the model must not take the others along: go through them one by one.
            logger.debug("files side by side failed", exc_info=error)
    for source in sources[done:]:
        try:
            transcript: Transcript | Exception = pipe.transcribe(source, **call)
        except Exception as error:
            transcript = error
        yield transcript


def _side_by_side(
    pipe: Any, sources: list[str | bytes], call: dict[str, Any], batch_size: int
) -> Iterator[Transcript | Exception]:
    """What `transcripts` gives, several at once: where one is done, the next takes its row."""
    unread: dict[int, Exception] = {}
    rate = pipe.feature_extractor.sampling_rate
    options = {name: call[name] for name in LOAD_OPTIONS if name in call}

    def read() -> Iterator[dict[str, Any]]:
        for number, source in enumerate(sources):
            try:
                samples = read_clip(source, number, rate, **options).samples
            except Exception as error:
                unread[number] = error
                continue
            yield {"array": samples, "sampling_rate": rate, "number": number}

    done = 0
    for transcript in pipe.transcribe(read(), batch_size=batch_size, **call):
        number = transcript.extra["number"]
        yield from (unread[place] for place in range(done, number))
        yield replace(transcript, extra={})
        done = number + 1
    yield from (unread[place] for place in range(done, len(sources)))


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
            printed(f"{path}:")
        for segment in transcript.segments:
            start, end = format_timestamp(segment.start), format_timestamp(segment.end)
            printed(f"[{start} --> {end}] {segment.text.strip()}")
    if writer is None:
        return None
    try:
        for written in writer.write(transcript, name, options):
            printed(str(written))
    except SaveError as error:
        return error
    return None


def _told(error: Exception, path: str) -> str:
    """An error in words, without the path that stands before it already."""
    text = str(error) or type(error).__name__
    return text.removeprefix(f"{path}: ")
