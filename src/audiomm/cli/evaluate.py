"""`audiomm evaluate`: the word error rate of a model on recordings whose text is known.

Rates come with a bootstrap interval, since a few hundred utterances say less than their average pretends.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.hub import write_json
from ..models.whisper.normalizer import BasicTextNormalizer, EnglishTextNormalizer
from ..training.metrics import ErrorRate, error_rate
from .models import check_model, language_and_task, load, printed
from .transcribe import transcripts

logger = logging.getLogger("audiomm.cli")

_SOUND = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aif", ".webm", ".mp4"})
_TEXT_KEYS = ("text", "sentence", "transcription", "transcript")
_PATH_KEYS = ("path", "audio", "file", "audio_filepath")


def run(arguments: argparse.Namespace) -> int:
    """Transcribe the recordings of the arguments and say how wrong the texts are.

    Returns:
        0 when all recordings were heard, 1 when one was not.
    """
    try:
        pairs = read_pairs(Path(arguments.data))
    except InputError as error:
        arguments.usage_error(str(error))
    error_rate(["jiwer"], ["is there"])  # before hours of work
    check_model(arguments)
    pipe = load(arguments)
    options = {**language_and_task(arguments, pipe.model), "num_beams": arguments.beam_size}
    call = {"return_timestamps": True, "generate_kwargs": {k: v for k, v in options.items() if v is not None}}
    heard: list[tuple[str, str, str]] = []
    failed = 0
    for start in range(0, len(pairs), arguments.batch_size):
        batch = pairs[start : start + arguments.batch_size]
        for (path, text), result in zip(batch, transcripts(pipe, [path for path, _ in batch], call), strict=True):
            if isinstance(result, Exception):
                failed += 1
                print(f"audiomm: {path}: {result}", file=sys.stderr)
            else:
                heard.append((path, text, result.text))
    if not heard:
        raise InputError(f"none of the {len(pairs)} recordings could be heard.")
    normalizer = _normalizer(arguments, options)
    references, hypotheses = [text for _, text, _ in heard], [text for *_, text in heard]
    words = error_rate(references, hypotheses, normalizer)
    letters = error_rate(references, hypotheses, normalizer, "character")
    _report(words, letters, [path for path, *_ in heard], arguments.worst)
    if failed:
        print(f"audiomm: {failed} of {len(pairs)} recordings failed and do not count", file=sys.stderr)
    if arguments.output:
        write_json(arguments.output, _as_json(words, letters, heard))
    return 1 if failed else 0


def read_pairs(data: Path) -> list[tuple[str, str]]:
    """(recording, text) of everything in a folder or in a table.

    Raises:
        InputError: There is nothing, or a text is missing.
    """
    if not data.exists():
        raise InputError(f"{data}: there is no such file or folder.")
    if data.is_dir():
        pairs = list(_beside(data))
    elif data.suffix in (".jsonl", ".json", ".tsv", ".csv"):
        pairs = list(_from_table(data))
    else:
        raise InputError(f"{data} is neither a folder nor a .jsonl, .tsv or .csv file.")
    if not pairs:
        raise InputError(f"{data} names no recording.")
    return pairs


def _beside(folder: Path) -> Iterable[tuple[str, str]]:
    """Recordings of a folder and those below it, with the text that lies beside each."""
    for path in sorted(one for one in folder.rglob("*") if one.suffix.lower() in _SOUND):
        text, table = path.with_suffix(".txt"), path.with_suffix(".json")
        if text.is_file():
            yield str(path), text.read_text(encoding="utf-8").strip()
        elif table.is_file():
            yield str(path), _value(_parsed(table.read_text(encoding="utf-8"), str(table)), _TEXT_KEYS, str(table))
        else:
            raise InputError(f"{path} has neither {text.name} nor {table.name} beside it.")


def _from_table(file: Path) -> Iterable[tuple[str, str]]:
    """Rows of a table; paths are relative to it."""
    content = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(content)))
    elif file.suffix == ".tsv":
        # Common Voice quotes nothing, and has sentences that begin with a quotation mark.
        rows = list(csv.DictReader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        lines = content.split("\n")
        rows = [_parsed(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        where = f"{file}, row {number}"
        path, text = _value(row, _PATH_KEYS, where), _value(row, _TEXT_KEYS, where)
        yield (path if "://" in path else str(file.parent / path)), text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}.") from error


def _value(row: Any, keys: tuple[str, ...], where: str) -> str:
    found = next((row[key] for key in keys if isinstance(row, dict) and isinstance(row.get(key), str)), None)
    if found is None:
        raise InputError(f"{where} has no {keys[0]!r} (nor {', '.join(keys[1:])}).")
    return str(found)


def _normalizer(arguments: argparse.Namespace, options: dict[str, Any]) -> Callable[[str], str] | None:
    kind = arguments.normalizer
    if kind == "none":
        return None
    is_english = options.get("task") == "translate" or arguments.language == "en" or "language" not in options
    if kind == "english" or (kind == "auto" and is_english):
        return EnglishTextNormalizer()
    return BasicTextNormalizer()


def _report(words: ErrorRate, letters: ErrorRate, paths: list[str], worst: int) -> None:
    low, high = words.interval()
    printed(f"WER {words.rate:.2%}  (95 % between {low:.2%} and {high:.2%})")
    printed(f"CER {letters.rate:.2%}")
    printed(
        f"{words.substitutions} substituted, {words.deletions} left out, {words.insertions} put in, of {words.units} "
        f"words in {len(words.utterances)} recordings"
        + (f"; {words.skipped} without a text do not count" if words.skipped else "")
    )
    for one in words.worst(worst):
        printed(f"\n{paths[one.place]}: {one.errors} of {one.units} words wrong")
        printed(f"  said   {one.reference}")
        printed(f"  heard  {one.hypothesis}")


def _as_json(words: ErrorRate, letters: ErrorRate, heard: list[tuple[str, str, str]]) -> dict[str, Any]:
    low, high = words.interval()
    counts = {name: value for name, value in dataclasses.asdict(words).items() if name not in ("utterances", "rate")}
    wrong = {one.place: one for one in words.utterances}
    return {
        "wer": words.rate,
        "wer_low": low,
        "wer_high": high,
        "cer": letters.rate,
        **counts,
        "utterances": [
            {"path": path, "text": text, "heard": said, "errors": wrong[place].errors, "words": wrong[place].units}
            for place, (path, text, said) in enumerate(heard)
            if place in wrong
        ],
    }
