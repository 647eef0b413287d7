"""Run the benchmarks: python benchmarks/run.py [--only NAME] [--size tiny] [--against transformers] ...

Sides take turns in one process (A B A B ...); the ratio is the median over the rounds of the peer's time over ours, so
above 1 the peer is slower. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUBJECTS = ("import_time", "log_mel", "encoder", "decode_step", "loading")


def main() -> int:
    arguments = parse()
    sys.path.insert(0, str(HERE))
    if (HERE.parent / "src").is_dir() and importlib.util.find_spec("audiomm") is None:
        sys.path.insert(0, str(HERE.parent / "src"))
    import common

    # Before torch and others start their threads.
    os.environ.update(common.thread_limits(arguments.threads), HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    asked = arguments.against or list(common.PEERS)
    against = tuple(name for name in asked if common.installed(common.PEERS[name]))
    for name in set(asked) - set(against):
        print(f"{name} is not installed and left out", file=sys.stderr)
    tokenizer = arguments.tokenizer or (common.TOKENIZER if common.TOKENIZER.is_dir() else None)
    if tokenizer is None and "faster-whisper" in against:
        print("no tokenizer files (--tokenizer FOLDER): models cannot be converted for faster-whisper", file=sys.stderr)
    setting = common.Setting(
        size=arguments.size,
        against=against,
        threads=arguments.threads,
        repeats=arguments.repeats,
        tokenizer=tokenizer,
    )
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": common.machine(),
        "size": setting.size,
        "threads": setting.threads,
        "repeats": setting.repeats,
        "results": {},
    }
    print_facts(report)
    try:
        for name in arguments.only or SUBJECTS:
            report["results"][name] = importlib.import_module(name).run(setting)
            print_table(name, report["results"][name])
    finally:
        setting.clean()
    path = Path(arguments.json) if arguments.json else HERE / "results" / f"{report['date']}-{setting.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not arguments.json:
        older = json.loads(path.read_text(encoding="utf-8"))
        report["results"] = {**older.get("results", {}), **report["results"]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SUBJECTS, help="this subject; may be repeated")
    parser.add_argument("--size", default="tiny", choices=("tiny", "base", "small", "medium", "large-v3-turbo"))
    parser.add_argument("--against", action="append", choices=("transformers", "faster-whisper"), help="this peer only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--tokenizer", type=Path, help="folder of multilingual tokenizer files, for the converter")
    parser.add_argument("--json", help="where the results go (default: results/DATE-SIZE.json)")
    return parser.parse_args()


def print_facts(report: dict[str, Any]) -> None:
    facts = report["machine"]
    packages = ("audiomm", "torch", "transformers", "faster-whisper", "ctranslate2")
    versions = ", ".join(f"{name} {facts[name]}" for name in packages if name in facts)
    print(f"{facts.get('processor', '?')}, {facts['cores']} cores, {' '.join(facts.get('features', []))}")
    print(f"load {facts.get('load_average')}, threads {report['threads']}, python {facts['python']}, {versions}")


def print_table(name: str, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"\n{name}\n| case | side | ms | CPU ms | ratio | CPU ratio | more |\n|---|---|---|---|---|---|---|")
    shown = ("wall_ms", "cpu_ms", "ratio", "cpu_ratio")
    for case, sides in results.items():
        for side, row in sides.items():
            rest = {key: value for key, value in row.items() if key not in (*shown, "rounds_ms", "fastest_ms")}
            more = ", ".join(f"{key} {value}" for key, value in rest.items())
            cells = " | ".join(f"{row[key]:,.2f}" for key in shown)
            print(f"| {case} | {side} | {cells} | {more} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
