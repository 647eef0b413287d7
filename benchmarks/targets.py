"""What is to be reached on this machine, and whether a run reached it.

A row compares audiomm with the quickest of a peer's sides in the same case, round by round; others hold a figure of
audiomm's own below a bound. Rows that were not measured are said to be so.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from typing import Any

from common import ratios

#: audiomm's side in its default number format for the machine.
AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A ratio to be reached.

    Attributes:
        work: What is done.
        subject: The benchmark that measures it.
        case: Regular expression of its cases; each that fits is a row.
        own: audiomm's side: AUTO, a number format, or a side's whole name.
        peer: Regular expression of the peer's sides.
        at_least: The peer's time over audiomm's.
    """

    work: str
    subject: str
    case: str
    own: str
    peer: str
    at_least: float


@dataclass(frozen=True)
class Bound:
    """A figure of audiomm's own that is to stay below a bound; `figure` is its name in the row, `unit` its unit."""

    work: str
    subject: str
    case: str
    own: str
    figure: str
    at_most: float
    unit: str = ""


TARGETS: tuple[Target | Bound, ...] = (
    Target("import audiomm", "import_time", ".*", "audiomm", r"transformers$", 5),
    Bound("import audiomm", "import_time", ".*", "audiomm", "own_ms", 100, "ms beside the interpreter"),
    Target("cold process to first text", "cold_start", ".*", "audiomm.*", "transformers", 2),
    Target("cold process to first text", "cold_start", ".*", "audiomm.*", "faster-whisper", 1),
    Target("log-mel", "log_mel", "32 x 30", "audiomm", "transformers", 4),
    Target("log-mel", "log_mel", "32 x 30", "audiomm", "openai", 1.5),
    Target("encoder", "encoder", "batch (1|8)$", AUTO, "transformers float32", 3),
    Target("encoder", "encoder", "batch (1|8)$", AUTO, "faster-whisper", 3),
    Target("decode, float32", "decode_step", "batch 1$", "float32", "transformers float32", 1.8),
    Target("decode, float32", "decode_step", "batch 1$", "float32", "openai", 1.3),
    Target("decode, default type", "decode_step", "batch 1$", AUTO, "transformers", 4),
    Target("decode, default type", "decode_step", "batch 1$", AUTO, "faster-whisper int8", 1),
    Target("decode, default type", "decode_step", "batch 8$", AUTO, "transformers", 4),
    Target("decode, default type", "decode_step", "batch 8$", AUTO, "faster-whisper int8", 1.3),
    Target("audio to text", "end_to_end", "sequential$", AUTO, "transformers", 4),
    Target("audio to text", "end_to_end", "sequential$", AUTO, "faster-whisper int8", 1.2),
    Target("audio to text", "end_to_end", "batched$", AUTO, "transformers", 4),
    Target("audio to text", "end_to_end", "batched$", AUTO, "faster-whisper int8", 1.3),
    Target("times of words, extra", "word_times", "on top$", AUTO, "faster-whisper", 1),
    Bound("times of words, extra", "word_times", "on top$", AUTO, "share_of_decode", 0.10, "of the decode"),
    Target("load", "loading", r"^\d{4,} MB", "audiomm", "transformers", 1.5),
    Bound("load, peak memory", "loading", r"^\d{4,} MB", "audiomm", "peak_over_file", 1.15, "x the file"),
    Target("Gemma step, overhead", "gemma_overhead", ".*", "audiomm", "transformers", 5),
)


def outcome(results: dict[str, Any], auto: str) -> list[dict[str, Any]]:
    """A row for each target and case.

    Args:
        results: {subject: {case: {side: row}}}.
        auto: The number format that audiomm picks for this machine.
    """
    rows = []
    for target in TARGETS:
        cases = results.get(target.subject, {})
        found = [_row(target, case, sides, auto) for case, sides in cases.items() if re.search(target.case, case)]
        measured = [row for row in found if row is not None]
        rows += measured or [{**_named(target), "case": "", "reached": None}]
    return rows


def _named(target: Target | Bound) -> dict[str, Any]:
    if isinstance(target, Target):
        return {"work": target.work, "against": target.peer.strip("$"), "wanted": f"at least {target.at_least:g}x"}
    bound = f"{target.at_most:.0%}" if target.figure.startswith("share") else f"{target.at_most:g}"
    return {"work": target.work, "against": "", "wanted": f"at most {bound} {target.unit}".strip()}


def _row(target: Target | Bound, case: str, sides: dict[str, Any], auto: str) -> dict[str, Any] | None:
    name = _own_side(target.own, sides, auto)
    if name is None:
        return None
    own = sides[name]
    row = {**_named(target), "case": case, "own": name, "own_ms": own["wall_ms"]}
    if isinstance(target, Bound):
        if target.figure not in own:
            return None
        value = own[target.figure]
        return {**row, "figure": value, "reached": value <= target.at_most}
    peers = [side for side in sides if re.match(target.peer, side)]
    if not peers:
        return None
    peer = min(peers, key=lambda side: sides[side]["wall_ms"])
    each = ratios(sides[peer]["rounds_ms"], own["rounds_ms"])
    ratio = statistics.median(each)
    spread = [round(min(each), 3), round(max(each), 3)]
    reached = ratio >= target.at_least
    figures = {"against": peer, "peer_ms": sides[peer]["wall_ms"], "ratio": round(ratio, 3), "spread": spread}
    return {**row, **figures, "reached": reached}


def _own_side(own: str, sides: dict[str, Any], auto: str) -> str | None:
    wanted = f"audiomm {auto}" if own == AUTO else own if own.startswith("audiomm") else f"audiomm {own}"
    return next((side for side in sides if re.fullmatch(wanted, side)), None)
