"""`audiomm listen`: a microphone, or samples from a pipe, to text while it is spoken."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..media.containers import sniff
from ..media.microphone import microphone
from ..media.resample import check_rate
from ..pipelines.live import LiveTranscriber
from ..pipelines.live_prompted import PromptedLiveTranscriber
from ..pipelines.prompted_recognition import PromptedSpeechRecognitionPipeline
from .models import check_model, language_and_task, load, printed

#: Samples that are read from a file or pipe at a time are this long.
BLOCK_SECONDS = 0.1


def run(arguments: argparse.Namespace) -> int:
    """Print what is said until the stream ends or the user interrupts it."""
    check_model(arguments)
    check_rate(arguments.rate, "--rate")
    with ExitStack() as stack:
        chunks = _chunks(arguments, stack)
        pipe = load(arguments)
        live = _live(pipe, arguments)
        screen = _Screen(sys.stdout.isatty())
        try:
            for chunk in chunks:
                for update in live.push(chunk):
                    screen.show(update.text, update.pending)
        except KeyboardInterrupt:
            # Interrupting is how one stops talking; what was said last is still to be written.
            screen.show("", "")
        screen.show(live.finish().text, "")
        screen.close()
    return 0


def _live(pipe: Any, arguments: argparse.Namespace) -> LiveTranscriber | PromptedLiveTranscriber:
    """What hears the stream: Whisper, or a model that is asked what was said."""
    if isinstance(pipe, PromptedSpeechRecognitionPipeline):
        asked = {"language": arguments.language, "task": arguments.task}
        return PromptedLiveTranscriber(pipe, arguments.rate, arguments.step, **asked)
    return LiveTranscriber(
        pipe,
        arguments.rate,
        arguments.step,
        num_beams=arguments.beam_size,
        **language_and_task(arguments, pipe.model),
    )


def _chunks(arguments: argparse.Namespace, stack: ExitStack) -> Iterator[Any]:
    """Where samples come from, opened before the model is loaded."""
    if arguments.source is None:
        device = arguments.microphone
        return microphone(arguments.rate, BLOCK_SECONDS, int(device) if device and device.isdecimal() else device)
    if arguments.source == "-":
        return samples_of(sys.stdin.buffer, arguments.rate)
    path = Path(arguments.source)
    kind = sniff(path).name if path.is_file() else ""
    # Samples, too, may begin like the last two.
    if kind and (kind not in ("mp3", "aac") or path.suffix.lower() == f".{kind}"):
        arguments.usage_error(f"{path} is a file of the kind {kind}, not bare samples: audiomm transcribe reads it")
    return samples_of(stack.enter_context(open(arguments.source, "rb")), arguments.rate)


def samples_of(file: BinaryIO, rate: int) -> Iterator[np.ndarray]:
    """int16 samples of a file or pipe, as they come."""
    size = 2 * round(BLOCK_SECONDS * rate)
    rest = b""
    # read1 gives what has come; read would wait for a whole block.
    read = getattr(file, "read1", file.read)
    while data := read(size):
        data = rest + data
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], dtype="<i2")


class _Screen:
    """Prints settled text once, and in a terminal what may still change behind it, in grey.

    Args:
        is_terminal: Text behind the settled one can be taken back.
    """

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal

    def show(self, settled: str, pending: str) -> None:
        if self.is_terminal:
            # Back to where the settled text ends, and clear what was written behind it.
            settled = f"\x1b[0J{settled}"
            if pending:
                settled += f"\x1b7\x1b[90m{pending}\x1b[0m\x1b8"
        if settled:
            printed(settled, end="")

    def close(self) -> None:
        printed("")
