"""Pictures of `curves`: throughput against batch size, and cost against audio length."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(cases: dict[str, Any], stem: Path) -> list[Path]:
    """Save two PNG files; needs matplotlib.

    Args:
        cases: What `curves.run` gives.
        stem: Path of the files without what tells them apart.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, across, up, title in (
        ("batch", "batch", "windows_a_second", ("windows in a batch", "windows a second", "Throughput")),
        ("length", "seconds", "wall_ms", ("seconds of audio", "seconds of work", "Cost, sequential")),
    ):
        figure, axes = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
        for side, points in _lines(cases, across, up).items():
            values = [value / 1000 if up == "wall_ms" else value for _, value in points]
            axes.plot([place for place, _ in points], values, marker="o", label=side)
        axes.set(xlabel=title[0], ylabel=title[1], title=title[2], ylim=(0, None))
        axes.set_xticks(sorted({place for points in _lines(cases, across, up).values() for place, _ in points}))
        axes.grid(alpha=0.3)
        axes.legend()
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def _lines(cases: dict[str, Any], across: str, up: str) -> dict[str, list[tuple[float, float]]]:
    """{side: points in order}."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for sides in cases.values():
        for side, row in sides.items():
            if across in row:
                lines.setdefault(side, []).append((row[across], row[up]))
    return {side: sorted(points) for side, points in lines.items()}
