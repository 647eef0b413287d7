"""Transcripts as files: txt, srt, vtt, tsv and json.

The formats, the way lines are broken and the names of the options are those of openai-whisper, so that tools which
read its files read these. Every file is written whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.hub import atomic_write, make_folder
from ..base.transcript import Transcript, Word

logger = logging.getLogger("audiomm.pipelines")

#: A silence longer than this starts a new cue when lines are broken freely.
LONG_PAUSE_SECONDS = 3.0


@dataclass(frozen=True)
class SubtitleOptions:
    """How words are laid out in cues; only transcripts with word times have words to lay out.

    Attributes:
        max_line_width: Most characters in a line; None for no limit.
        max_line_count: Most lines in a cue; None for no limit.
        max_words_per_line: Most words in a cue; None for no limit.
        highlight_words: Write one cue a word with the word that is being said underlined.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None
    highlight_words: bool = False

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1 is needed; pass None for no limit.")

    @property
    def needs_words(self) -> bool:
        limits = (self.max_line_width, self.max_line_count, self.max_words_per_line)
        return self.highlight_words or any(limit is not None for limit in limits)


@dataclass(frozen=True)
class Cue:
    """One subtitle: text that is shown from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


class Writer:
    """Writes transcripts of one format into a folder; made by `get_writer`.

    Args:
        formats: Names of formats, keys of `FORMATS`.
        output_dir: The folder; it is made when the first file is written.
    """

    def __init__(self, formats: Sequence[str], output_dir: str | os.PathLike[str]) -> None:
        self.formats = tuple(formats)
        self.output_dir = Path(output_dir)

    def __call__(
        self,
        result: Transcript,
        audio_path: str | os.PathLike[str],
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Path]:
        """Write one transcript.

        Args:
            result: What `pipe.transcribe` returned.
            audio_path: The input; its name without folder and extension names the files.
            options: Fields of `SubtitleOptions` in a dict.
            **kwargs: The same as keywords.

        Returns:
            The files written.

        Raises:
            SaveError: A file cannot be written; what stood there before is unchanged.
        """
        return self.write(result, Path(audio_path).stem, subtitle_options({**(options or {}), **kwargs}))

    def write(self, transcript: Transcript, name: str, options: SubtitleOptions | None = None) -> list[Path]:
        """Write one transcript to files called `name` plus the extension of each format.

        Raises:
            InputError: Options that lay out words, and a transcript without word times.
            SaveError: A file cannot be written; what stood there before is unchanged.
        """
        options = options or SubtitleOptions()
        if options.needs_words and transcript.segments and transcript.segments[0].words is None:
            raise InputError(
                "highlight_words, max_line_width, max_line_count and max_words_per_line lay out words, and this "
                "transcript has none; transcribe with return_timestamps='word' (--word_timestamps True)."
            )
        folder = make_folder(self.output_dir)
        paths = []
        for extension in self.formats:
            path = folder / f"{name}.{extension}"
            with atomic_write(path) as temporary:
                temporary.write_text(FORMATS[extension](transcript, options), encoding="utf-8")
            paths.append(path)
        return paths


def get_writer(output_format: str, output_dir: str | os.PathLike[str]) -> Writer:
    """A writer of one format, or of "all" of them.

    Raises:
        InputError: There is no such format.
    """
    if output_format == "all":
        return Writer(tuple(FORMATS), output_dir)
    if output_format not in FORMATS:
        raise InputError(f"output_format={output_format!r}: expected one of {', '.join(FORMATS)} or all.")
    return Writer((output_format,), output_dir)


def subtitle_options(options: dict[str, Any]) -> SubtitleOptions:
    """`SubtitleOptions` from a dict.

    Raises:
        InputError: A name that is not a field, or a limit below 1.
    """
    unknown = sorted(set(options) - set(SubtitleOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(SubtitleOptions.__dataclass_fields__)
        raise InputError(f"unknown writer option {unknown[0]!r}; the options are {known}.")
    return SubtitleOptions(**options)


def output_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A file name without extension for each input, all different.

    The name of the input without its extension where that is unique; else with its extension ("talk.mp3" gives
    talk.mp3.srt); else with a number behind it.
    """
    stems = [Path(path).stem or "audio" for path in paths]
    counts = Counter(stem.casefold() for stem in stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for path, stem in zip(paths, stems, strict=True):
        name = stem
        if counts[stem.casefold()] > 1:
            full = Path(path).name or stem
            numbered = (f"{full}-{number}" for number in itertools.count(2))
            name = next(name for name in itertools.chain([full], numbered) if name.casefold() not in taken)
            taken.add(name.casefold())
            logger.warning("more than one input is called %s: the transcript of %s goes to %s.*", stem, path, name)
        names.append(name)
    return names


def format_timestamp(seconds: float, always_include_hours: bool = False, decimal_marker: str = ".") -> str:
    """Seconds as [hh:]mm:ss.mmm.

    Raises:
        InputError: A negative time.
    """
    if seconds < 0:
        raise InputError(f"a time of {seconds} s cannot be written; times start at 0.")
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours:02d}:" if always_include_hours or hours else ""
    return f"{front}{minutes:02d}:{milliseconds // 1000:02d}{decimal_marker}{milliseconds % 1000:03d}"


def cues(transcript: Transcript, options: SubtitleOptions) -> Iterator[Cue]:
    """The subtitles of a transcript: its words laid out in lines, or its segments where there are no words."""
    if not transcript.segments or transcript.segments[0].words is None:
        for segment in transcript.segments:
            yield Cue(segment.start, segment.end, segment.text.strip().replace("-->", "->"))
        return
    for laid in _lay_out(transcript, options):
        if options.highlight_words:
            yield from _highlighted(laid)
        else:
            yield Cue(laid[0].start, laid[-1].end, "".join(word.text for word in laid))


def _lay_out(transcript: Transcript, options: SubtitleOptions) -> Iterator[list[Word]]:
    """Groups of words, one a cue; a word that begins a line carries the line break in its text."""
    # Cues follow segments unless both limits say how a cue is filled.
    free = options.max_line_width is not None and options.max_line_count is not None
    width_limit = options.max_line_width or 1000
    cue: list[Word] = []
    width, lines = 0, 1
    previous_start = next((segment.words[0].start for segment in transcript.segments if segment.words), 0.0)
    for word, opens in _with_breaks(transcript, options):
        paused = free and word.start - previous_start > LONG_PAUSE_SECONDS
        breaks_cue = bool(cue) and opens and not free
        if width and width + len(word.text) <= width_limit and not paused and not breaks_cue:
            width += len(word.text)
            placed = word.text
        else:
            placed = word.text.strip()
            full = options.max_line_count is not None and (paused or lines >= options.max_line_count)
            if breaks_cue or (cue and full):
                yield cue
                cue, lines = [], 1
                width = len(placed)
            elif width:
                lines += 1
                width, placed = len(placed), f"\n{placed}"
            else:
                width = len(placed)
        cue.append(Word(placed, word.start, word.end, word.probability))
        previous_start = word.start
    if cue:
        yield cue


def _with_breaks(transcript: Transcript, options: SubtitleOptions) -> Iterator[tuple[Word, bool]]:
    """Each word, and whether it begins a segment or a group of `max_words_per_line` words."""
    size = options.max_words_per_line
    for segment in transcript.segments:
        for index, word in enumerate(segment.words or ()):
            yield word, index == 0 or (size is not None and index % size == 0)


def _highlighted(words: list[Word]) -> Iterator[Cue]:
    """One cue a word with that word underlined, and a plain cue wherever nothing is said in between."""
    plain = "".join(word.text for word in words)
    shown_until = words[0].start
    for index, word in enumerate(words):
        if format_timestamp(shown_until) != format_timestamp(word.start):
            yield Cue(shown_until, word.start, plain)
        marked = [
            re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", other.text) if index == place else other.text
            for place, other in enumerate(words)
        ]
        yield Cue(word.start, word.end, "".join(marked))
        shown_until = word.end


def _txt(transcript: Transcript, _: SubtitleOptions) -> str:
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def _srt(transcript: Transcript, options: SubtitleOptions) -> str:
    blocks = []
    for number, cue in enumerate(cues(transcript, options), start=1):
        start, end = (format_timestamp(time, True, ",") for time in (cue.start, cue.end))
        blocks.append(f"{number}\n{start} --> {end}\n{cue.text}\n\n")
    return "".join(blocks)


def _vtt(transcript: Transcript, options: SubtitleOptions) -> str:
    blocks = [
        f"{format_timestamp(cue.start)} --> {format_timestamp(cue.end)}\n{cue.text}\n\n"
        for cue in cues(transcript, options)
    ]
    return "WEBVTT\n\n" + "".join(blocks)


def _tsv(transcript: Transcript, _: SubtitleOptions) -> str:
    lines = ["start\tend\ttext\n"]
    for segment in transcript.segments:
        text = segment.text.strip().replace("\t", " ")
        lines.append(f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{text}\n")
    return "".join(lines)


def _json(transcript: Transcript, _: SubtitleOptions) -> str:
    segments = [segment.to_dict(number) for number, segment in enumerate(transcript.segments)]
    return json.dumps({"text": transcript.text, "segments": segments, "language": transcript.language})


#: Extension of a format -> the text of its file.
FORMATS: dict[str, Callable[[Transcript, SubtitleOptions], str]] = {
    "txt": _txt,
    "vtt": _vtt,
    "srt": _srt,
    "tsv": _tsv,
    "json": _json,
}
