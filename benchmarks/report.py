"""The results as Markdown: targets, the machine's limits, and all cases."""

from __future__ import annotations

from typing import Any

import roofline
from targets import outcome

_PACKAGES = ("audiomm", "torch", "transformers", "openai-whisper", "faster-whisper", "ctranslate2")
_KNOWN = ("wall_ms", "fastest_ms", "cpu_ms", "ratio", "cpu_ratio", "rounds_ms", "rounds_cpu_ms", "work", "of_limit")


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [head(report), "## Targets", targets_table(report)]
    if report.get("limits"):
        parts += ["## Limits of the machine, measured at the start of the last run", _limits(report["limits"])]
    parts.append("## All cases")
    for subject, cases in report["results"].items():
        parts += [f"### {subject}", cases_table(cases)]
    if report.get("notes"):
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def head(report: dict[str, Any]) -> str:
    """The machine and the versions."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in _PACKAGES if name in facts)
    features = " ".join(facts.get("features", []))
    return (
        f"# Benchmarks of {report['date']}\n\n{facts.get('processor', '?')}, {facts['cores']} cores ({features}), "
        f"{report['threads']} threads a side, load {facts.get('load_average')} at the start; python {facts['python']}, "
        f"{versions}. audiomm's default number format here: {report['auto']}. Written by `benchmarks/run.py`: sides "
        "take turns in one process, each round begins with another one; ratios are medians over the rounds, lowest "
        "and highest behind them."
    )


def targets_table(report: dict[str, Any]) -> str:
    """Each target with what was reached."""
    lines = ["| work | case | against | wanted | measured | audiomm ms | peer ms | reached |", "|" + "---|" * 8]
    for row in outcome(report["results"], report["auto"]):
        if row["reached"] is None:
            lines.append(f"| {row['work']} | | {row['against']} | {row['wanted']} | not measured | | | |")
            continue
        if "ratio" in row:
            low, high = row["spread"]
            measured, peer = f"{row['ratio']:.2f}x ({low:.2f} to {high:.2f})", f"{row['peer_ms']:,.1f}"
        else:
            measured, peer = f"{row['figure']:.3g}", ""
        reached = "yes" if row["reached"] else "**no**"
        against = f"{row['own']} / {row['against']}" if row["against"] else row["own"]
        cells = (row["work"], row["case"], against, row["wanted"], measured, f"{row['own_ms']:,.1f}", peer, reached)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _limits(limits: dict[str, Any]) -> str:
    reading = ", ".join(f"{speed} ({size} MB)" for size, speed in limits["read_gb_s"].items())
    products = " | ".join(f"{kind} {speed:,}" for kind, speed in limits["gflop_s"].items())
    return (
        f"Reading, GB/s: {reading}; copying (read + written): {limits['copy_gb_s']}. Matrix products, GFLOP/s: "
        f"{products.replace(' | ', ', ')}. `of limit` is the least time that the limits of a side's own run "
        "allow, over the time measured; keys and values count 2 bytes in bfloat16 and int8."
    )


def tell_limits(cases: dict[str, Any], limits: dict[str, Any] | None) -> None:
    """Write into the rows of cases just measured what share of the machine's limits they reach."""
    for sides in cases.values():
        for side, row in sides.items():
            share = share_of_limit(side, row, limits)
            if share is not None:
                row["of_limit"] = round(share, 4)


def cases_table(cases: dict[str, Any]) -> str:
    """All sides of all cases of a subject."""
    lines = ["| case | side | ms | fastest | CPU ms | x the first | of limit | more |", "|" + "---|" * 8]
    for case, sides in cases.items():
        for side, row in sides.items():
            share = row.get("of_limit")
            more = ", ".join(f"{key} {value}" for key, value in row.items() if key not in _KNOWN)
            times = " | ".join(f"{row[key]:,.1f}" for key in ("wall_ms", "fastest_ms", "cpu_ms"))
            limit = "" if share is None else f"{share:.0%}"
            lines.append(f"| {case} | {side} | {times} | {row['ratio']:.2f} | {limit} | {more} |")
    return "\n".join(lines)


def share_of_limit(side: str, row: dict[str, Any], limits: dict[str, Any] | None) -> float | None:
    """The least time for the row's work in the side's number format, over its time; None where no work is told."""
    if limits is None or "work" not in row or row["wall_ms"] <= 0:
        return None
    kind = next((kind for kind in roofline.WEIGHT_BYTES if f" {kind}" in side), "float32")
    return roofline.limit_ms(row["work"], kind, limits) / row["wall_ms"]
