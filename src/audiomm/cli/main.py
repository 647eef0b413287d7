"""The command `audiomm`: its commands, their arguments and their exit codes.

Only what is needed to read the arguments is imported here, so that `--help` and `--version` answer at once; a command's
own module is imported when the command runs. Flags are called as in openai-whisper where it has them.

Exit codes: 0 all went well, 1 something failed, 2 the arguments are wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..base.errors import AudiommError

OUTPUT_FORMATS = ("txt", "vtt", "srt", "tsv", "json", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; those of the process when None.

    Returns:
        The exit code.
    """
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        command = importlib.import_module(f".{arguments.module}", __package__)
        code: int = command.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has said what it has to say
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("\naudiomm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, like `head`, has seen enough; keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (AudiommError, OSError) as error:
        print(f"audiomm: error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and all its subcommands."""
    parser = argparse.ArgumentParser(prog="audiomm", description="Models that listen: transcribe, inspect, check.")
    parser.add_argument("--version", action="version", version=f"audiomm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_transcribe(commands)
    info = commands.add_parser("info", help="what a model is, without loading its weights")
    info.add_argument("model", metavar="MODEL", help="a folder or a hub id")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    info.set_defaults(module="info")
    convert = commands.add_parser("convert", help="a Whisper checkpoint of another program to a folder that loads here")
    convert.add_argument("source", metavar="SOURCE", help="a .pt or ggml file, or a folder or hub id of another format")
    convert.add_argument("output", metavar="OUTPUT", help="the folder to write; must not exist or be empty")
    convert.add_argument(
        "--format", default="auto", help="openai, ggml, ctranslate2, torch, flax, tensorflow, safetensors"
    )
    convert.add_argument("--dtype", default="auto", help="float32, float16 or bfloat16; the source's when left out")
    convert.add_argument("--tokenizer", help="folder, hub id or .tiktoken file, where the source holds no tokenizer")
    convert.set_defaults(module="convert")
    env = commands.add_parser("env", help="versions and devices, for reports of problems")
    env.set_defaults(module="env")
    return parser


def _add_transcribe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "transcribe",
        help="speech to text",
        description="Transcribe audio files. Without --output_dir and --output_format the text is printed with its "
        "times and no file is written.",
    )
    command.set_defaults(module="transcribe", usage_error=command.error)
    command.add_argument("audio", nargs="+", metavar="FILE", help="audio files (wav, flac, mp3, ogg, ...) or URLs")
    command.add_argument(
        "--model", default="audiomm/whisper-digits", help="a hub id like openai/whisper-large-v3-turbo, or a folder"
    )
    command.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps; the first accelerator, or the CPU, when left out")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the checkpoint's when left out")
    command.add_argument("--batch_size", type=_positive, default=1, help="files that are transcribed side by side")
    command.add_argument("--threads", type=_positive, help="CPU threads; all when left out")

    speech = command.add_argument_group("speech")
    speech.add_argument("--task", choices=("transcribe", "translate"), default="transcribe")
    speech.add_argument("--language", help="language spoken, as a code or an English name; detected when left out")

    speech.add_argument("--initial_prompt", metavar="TEXT", help="what to read before the first window, like names")
    speech.add_argument(
        "--carry_initial_prompt", type=_boolean, default=False, metavar="BOOL", help="read it before every window"
    )
    speech.add_argument("--hotwords", metavar="TEXT", help="what to read before every window")
    speech.add_argument(
        "--clip_timestamps", metavar="SECONDS", help="hear only these parts: start,end,start,end; the last end may lack"
    )
    speech.add_argument("--vad_filter", type=_boolean, metavar="BOOL", help="leave out what is not speech")
    speech.add_argument("--vad_detector", choices=("energy", "silero"), help="what finds speech (default: energy)")
    speech.add_argument("--vad_threshold", type=float, help="silero's probability of speech (default: 0.5)")
    speech.add_argument(
        "--vad_min_silence_duration_ms", type=float, metavar="MS", help="leave out only silence longer than this (2000)"
    )
    speech.add_argument("--vad_speech_pad_ms", type=float, metavar="MS", help="keep this much around speech (400)")

    output = command.add_argument_group("output")
    output.add_argument("-o", "--output_dir", help="folder for the files; the current one when only a format is given")
    output.add_argument("-f", "--output_format", choices=OUTPUT_FORMATS, help="all when only a folder is given")
    output.add_argument("--verbose", type=_boolean, metavar="BOOL", help="print the text while files are written, too")
    output.add_argument(
        "--word_timestamps", type=_boolean, default=False, metavar="BOOL", help="find the times of words"
    )
    output.add_argument("--max_line_width", type=_positive, help="characters in a subtitle's line (needs words)")
    output.add_argument("--max_line_count", type=_positive, help="lines in a subtitle (needs words)")
    output.add_argument("--max_words_per_line", type=_positive, help="words in a subtitle (needs words)")
    output.add_argument(
        "--highlight_words", type=_boolean, default=False, metavar="BOOL", help="underline each word as it is said"
    )

    decoding = command.add_argument_group(
        "decoding", "A window of 30 s that fails a check is decoded again, warmer. None switches a check off."
    )
    decoding.add_argument("--beam_size", type=_positive, help="beams of the search; 1 is greedy (default: 5)")
    decoding.add_argument("--length_penalty", type=float, help="how a beam's length counts")
    decoding.add_argument("--max_new_tokens", type=_positive, help="most tokens of a window")
    decoding.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    checks: dict[str, tuple[float, str]] = {
        "temperature_increment_on_fallback": (0.2, "how much warmer, up to 1"),
        "compression_ratio_threshold": (1.35, "repeats itself: its tokens compress better than this"),
        "logprob_threshold": (-1.0, "unsure: its tokens are less likely than this, on average"),
        "no_speech_threshold": (0.6, "silent, if it is unsure as well: no speech is likelier than this"),
    }
    for name, (default, meaning) in checks.items():
        text = f"{meaning} (default: {default})"
        decoding.add_argument(f"--{name}", type=_optional_float, default=default, metavar="NUMBER", help=text)
    decoding.add_argument(
        "--condition_on_previous_text", type=_boolean, metavar="BOOL", help="begin a window with the text before it"
    )


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _optional_float(text: str) -> float | None:
    return None if text == "None" else float(text)
