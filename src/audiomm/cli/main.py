"""The command `audiomm`: its commands, their arguments and their exit codes.

Only what is needed to read the arguments is imported here, so that `--help` and `--version` answer at once; a command's
own module is imported when the command runs.

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
from .flags import add_chat, add_evaluate, add_listen, add_plot, add_slice, add_transcribe


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
    add_transcribe(commands)
    add_listen(commands)
    add_evaluate(commands)
    add_plot(commands)
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
    dtypes = ("auto", "float32", "float16", "bfloat16")
    convert.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; the source's when left out")
    convert.add_argument("--tokenizer", help="folder, hub id or .tiktoken file, where the source holds no tokenizer")
    convert.set_defaults(module="convert")
    add_chat(commands)
    add_slice(commands)
    env = commands.add_parser("env", help="versions and devices, for reports of problems")
    env.set_defaults(module="env")
    return parser
