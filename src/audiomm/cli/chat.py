"""audiomm chat: talk with a model in a terminal, with pictures, recordings and videos.

A path in a line (typed, or dragged into the window) is attached to it; what it is, its name says. Answers appear as
they are written.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.errors import AudiommError
from ..pipelines import pipeline

KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi"),
}
HELP = "/image PATH, /audio PATH, /video PATH attach a file; /new starts again; /quit ends. A path in a line does, too."


def run(arguments: argparse.Namespace) -> int:
    """Talk until the lines end; 1 when an answer failed, 0 otherwise."""
    if arguments.max_new_tokens < 1:
        arguments.usage_error(f"--max_new_tokens {arguments.max_new_tokens}: at least 1 is needed")
    if arguments.temperature is not None and arguments.temperature < 0:
        arguments.usage_error(f"--temperature {arguments.temperature}: it cannot be negative")
    attached = [part_of(path) for path in arguments.attach]
    pipe = pipeline(
        "any-to-any",
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        revision=arguments.revision,
    )
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature is not None:
        options |= (
            {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
        )
    talk = Conversation(pipe, arguments.system, options)
    talk.waiting += attached
    failed = False
    for line in lines(arguments.prompt):
        try:
            if not talk.obey(line):
                break
        except (AudiommError, OSError) as error:
            print(f"audiomm: error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


class Conversation:
    """The messages so far, and the files that wait for the next question."""

    def __init__(self, pipe: Any, system: str | None, options: dict[str, Any]) -> None:
        self.pipe, self.system, self.options = pipe, system, options
        self.waiting: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = []
        if self.system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})

    def obey(self, line: str) -> bool:
        """Do what a line says; False ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/new":
            self.begin()
        elif command == "/help":
            print(HELP)
        elif command in ("/image", "/audio", "/video"):
            self.waiting.append({"type": command[1:], "path": existing(rest.strip())})
        elif line.strip():
            text, parts = attachments(line)
            self.answer(text, [*self.waiting, *parts])
            self.waiting = []
        return True

    def answer(self, text: str, parts: list[dict[str, Any]]) -> None:
        """Ask, print the answer as it comes, and remember both; a question that fails is forgotten.

        Ctrl-C ends the answer, not the conversation.
        """
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        pieces = []
        stream = self.pipe.stream([*self.messages, question], **self.options)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            stream.close()
        print()
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]}
        self.messages += [question, answer]


def lines(prompt: str | None) -> Iterator[str]:
    """The one question, or what is typed or piped in."""
    if prompt is not None:
        yield prompt
        return
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def attachments(line: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of a line, and parts for the files it names."""
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe is no quotation mark
        words = line.split()
    parts = []
    for word in words:
        path = word.removeprefix("file://")
        if Path(path).suffix.lower() in {end for ends in KINDS.values() for end in ends} and Path(path).is_file():
            parts.append(part_of(path))
            for written in (shlex.quote(word), f'"{word}"', re.sub(r"([\s()'])", r"\\\1", word), word):
                if written in line:
                    line = line.replace(written, " ", 1)
                    break
    return " ".join(line.split()), parts


def part_of(path: str) -> dict[str, Any]:
    """The part of a message that holds a file.

    Raises:
        OSError: There is no such file.
        AudiommError: Its name does not say what it is.
    """
    suffix = Path(existing(path)).suffix.lower()
    for kind, ends in KINDS.items():
        if suffix in ends:
            return {"type": kind, "path": path}
    known = ", ".join(end for ends in KINDS.values() for end in ends)
    raise AudiommError(f"{path}: {suffix or 'no suffix'} says neither picture nor sound nor video; known are {known}.")


def existing(path: str) -> str:
    """The path of a file that is there."""
    if not Path(path).is_file():
        raise FileNotFoundError(2, "there is no such file", path)
    return path
