"""Run the benchmarks: python benchmarks/run.py [--only NAME] [--size tiny] [--against transformers] [--quick] ...

Sides take turns in one process, each round begins with another one; a ratio is the median over the rounds of the peer's
time over ours, so above 1 the peer is slower. Nothing here passes or fails. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUBJECTS = (
    "import_time",
    "cold_start",
    "log_mel",
    "encoder",
    "decode_step",
    "end_to_end",
    "word_times",
    "loading",
    "gemma_overhead",
    "curves",
)
#: Subjects that the second size is measured in, too, unless sizes are named.
OF_ALL_SIZES = ("encoder", "decode_step")
SIZES = ("tiny", "base")


sys.path.insert(0, str(HERE))


def main() -> int:
    arguments = parse()
    if (HERE.parent / "src").is_dir() and importlib.util.find_spec("audiomm") is None:
        sys.path.insert(0, str(HERE.parent / "src"))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    import common

    # Before torch and others start their threads.
    os.environ.update(common.thread_limits(arguments.threads), HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    warnings.filterwarnings("ignore")
    asked = list(common.PEERS) if arguments.against is None else [name for name in arguments.against if name != "none"]
    against = tuple(name for name in asked if common.installed(common.PEERS[name]))
    for name in sorted(set(asked) - set(against)):
        print(f"{name} is not installed and left out", file=sys.stderr)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": common.machine(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "auto": "float32",
        "limits": None,
        "notes": [],
        "results": {},
    }
    sizes = arguments.size or (["mini"] if arguments.quick else list(SIZES))
    report["ends"] = time.perf_counter() + 60 * arguments.minutes
    if arguments.only and not arguments.quick:
        report["results"] = older(place(report, arguments))
    failed = 0
    for size in sizes:
        setting = common.Setting(
            size=size,
            against=against,
            threads=arguments.threads,
            repeats=1 if arguments.quick else arguments.repeats,
            tokenizer=arguments.tokenizer,
            quick=arguments.quick,
            second=not arguments.size and size != sizes[0],
            notes=report["notes"],
        )
        # Of the usual sizes the second is measured where it differs most; a size that was asked for, in everything.
        chosen = arguments.only or SUBJECTS
        names = [name for name in chosen if not setting.second or name in OF_ALL_SIZES]
        try:
            failed += measure(setting, names, report, lambda: write(report, arguments))
        finally:
            setting.clean()
    finish(report, arguments)
    return 1 if failed else 0


def measure(setting: Any, names: list[str], report: dict[str, Any], save: Callable[[], None]) -> int:
    """Run the subjects one after the other and put what they find into the report, saved after each.

    Returns:
        How many subjects failed; the others are measured all the same.
    """
    import report as reports
    import roofline
    import sides

    if report["limits"] is None:
        report["limits"] = roofline.measure(setting.threads, setting.quick)
        report["auto"] = sides.automatic(setting)
        print(reports.head(report), flush=True)
    if "faster-whisper" in setting.against and not convertible(setting):
        setting.against = tuple(name for name in setting.against if name in ("transformers",))
    failed = 0
    for name in names:
        started = time.perf_counter()
        if started > report["ends"]:
            setting.note(f"{name}, {setting.size}: left out, the minutes were over (--minutes)")
            continue
        try:
            found = importlib.import_module(name).run(setting)
        except Exception:
            failed += 1
            traceback.print_exc()
            setting.note(f"{name}, {setting.size}: failed, see the output: {traceback.format_exc().splitlines()[-1]}")
            continue
        reports.tell_limits(found, report["limits"])
        report["results"].setdefault(name, {}).update(found)
        table = reports.cases_table(found)
        print(f"\n{name}, {time.perf_counter() - started:.0f} s\n\n{table}", flush=True)
        save()
    return failed


def convertible(setting: Any) -> bool:
    """Whether CTranslate2's converter can run: it needs transformers and OpenAI's vocabulary."""
    import checkpoints
    import common

    if not common.installed("transformers"):
        setting.note("faster-whisper is left out: converting models for it takes transformers")
        return False
    if not checkpoints.is_multilingual(setting.tokenizer):
        setting.note("faster-whisper and openai-whisper are left out: no vocabulary of theirs (--tokenizer FOLDER)")
        return False
    return True


def place(report: dict[str, Any], arguments: argparse.Namespace) -> Path:
    stem = f"{report['date']}-{report['threads']}-threads" + ("-quick" if arguments.quick else "")
    return Path(arguments.json) if arguments.json else HERE / "results" / f"{stem}.json"


def older(path: Path) -> dict[str, Any]:
    """The results of an earlier run of that day, which stay where this one does not measure."""
    if not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")).get("results", {}))


def write(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """JSON with all rounds, and Markdown beside it."""
    import report as reports

    path = place(report, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in report.items() if key != "ends"}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(reports.markdown(report), encoding="utf-8")


def finish(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Save all, print the table of targets, and draw."""
    import report as reports

    write(report, arguments)
    path = place(report, arguments)
    print(f"\n{reports.targets_table(report)}\n\nwritten to {path} and {path.with_suffix('.md').name}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: pip install -e '.[plot]'", file=sys.stderr)
    elif "curves" in report["results"]:
        import plots

        for picture in plots.draw(report["results"]["curves"], path.with_suffix("")):
            print(f"drawn: {picture}")


def parse() -> argparse.Namespace:
    from common import PEERS
    from common import SIZES as KNOWN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="this subject; may be repeated")
    parser.add_argument("--size", action="append", choices=tuple(KNOWN), help="this size; may be repeated")
    parser.add_argument("--against", action="append", choices=(*PEERS, "none"), help="this peer only; may be repeated")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2), help="of each side")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; half-minute cases take two fewer")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models, little audio, one round")
    parser.add_argument("--minutes", type=float, default=25, help="no further subject is begun after so many")
    parser.add_argument("--tokenizer", type=Path, help="folder of OpenAI's multilingual tokenizer files")
    parser.add_argument("--json", help="where the results go (default: results/DATE-N-threads.json)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
