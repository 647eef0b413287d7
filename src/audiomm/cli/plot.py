"""`audiomm plot`: the curves of a training run as a picture and as a page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from ..base.errors import InputError, MissingExtra, SaveError

_RATES = ("wer", "cer")
#: Numbers of a log line that are no curve.
_NOT_DRAWN = ("runtime", "per_second", "epoch", "step", "time")


def run(arguments: argparse.Namespace) -> int:
    """Draw the run of the arguments.

    Returns:
        0.
    """
    log = find_log(Path(arguments.run))
    curves = read_curves(log)
    output = Path(arguments.output or log.parent / "curves")
    if output.suffix not in ("", ".png", ".html"):
        arguments.usage_error(f"--output {output}: pass a .png or .html file, or a name without an ending for both")
    picture = draw(curves, str(log.parent.name))
    for ending in [output.suffix] if output.suffix else [".png", ".html"]:
        path = output.with_suffix(ending)
        try:
            path.write_bytes(picture if ending == ".png" else _page(picture, curves, log.parent.name).encode())
        except OSError as error:
            raise SaveError(f"{path} could not be written: {error.strerror}") from error
        print(path)
    return 0


def find_log(run: Path) -> Path:
    """The log.jsonl of a run's folder, of a checkpoint in it, or the file itself.

    Raises:
        InputError: There is none.
    """
    for path in (run, run / "log.jsonl", run.parent / "log.jsonl"):
        if path.is_file():
            return path
    raise InputError(f"{run} holds no log.jsonl; pass the output_dir of a run of the Trainer.")


def read_curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number that was logged, by name.

    Raises:
        InputError: Nothing was.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry: dict[str, Any] = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{log}, line {number} is no line of a training log: {line[:60]!r}.") from error
        for name, value in entry.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not name.startswith("train_") and not name.endswith(_NOT_DRAWN):
                curves.setdefault(name, []).append((step, float(value)))
    if not curves:
        raise InputError(f"{log} holds no numbers yet.")
    return curves


def draw(curves: dict[str, list[tuple[int, float]]], title: str) -> bytes:
    """One PNG with a panel each for losses, rates of error, the learning rate, and whatever else was logged.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("drawing curves", "matplotlib", "plot") from error
    panels = _panels(curves)
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            axis.plot(steps, values, label=name, marker="." if len(steps) < 40 else "", linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[-1].set_xlabel("step")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _panels(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[str]]:
    """Names of curves by the label of their panel."""
    panels: dict[str, list[str]] = {}
    for name in curves:
        if name.endswith("loss"):
            label = "loss"
        elif name.endswith(_RATES):
            label = "error rate"
        elif name == "learning_rate":
            label = "learning rate"
        else:
            label = name.removeprefix("eval_").replace("_", " ")
        panels.setdefault(label, []).append(name)
    order = ["loss", "error rate", "learning rate"]
    return dict(sorted(panels.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _page(picture: bytes, curves: dict[str, list[tuple[int, float]]], title: str) -> str:
    """The picture and a table of the first, best and last values in one file that needs nothing else."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(
            f"<td>{value:.6g} <small>step {step}</small></td>"
            for step, value in (points[0], min(points, key=lambda point: point[1]), points[-1])
        )
        + "</tr>"
        for name, points in curves.items()
    )
    image = base64.b64encode(picture).decode()
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}small{color:#888}</style>"
        f'<h1>{html.escape(title)}</h1><img alt="curves" src="data:image/png;base64,{image}">'
        f"<table><tr><th>curve<th>first<th>lowest<th>last</tr>{rows}</table>\n"
    )
