"""What all benchmarks share: the setting of a run, sides that take turns, and facts about the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apart import processor_seconds

#: Peer on the command line -> its package.
PEERS = {"transformers": "transformers", "openai-whisper": "whisper", "faster-whisper": "faster_whisper"}

#: Sizes of the published models, and a small one for smoke tests; what is not said is as in whisper-tiny.
SIZES: dict[str, dict[str, int]] = {
    "mini": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "heads": 2},
    "tiny": {},
    "base": {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "heads": 8},
    "small": {"d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "heads": 12},
    "medium": {"d_model": 1024, "encoder_layers": 24, "decoder_layers": 24, "heads": 16},
    "large-v3-turbo": {
        "d_model": 1280, "encoder_layers": 32, "decoder_layers": 4, "heads": 20,
        "num_mel_bins": 128, "vocab_size": 51866,
    },
}  # fmt: skip

#: Threads that are done wait for more work a while before they sleep, and would take a core from the next side.
SETTLE_SECONDS = 0.25


@dataclass
class Setting:
    """What the command line asked for.

    Attributes:
        size: A key of SIZES.
        against: Peers to compare with, those that are installed.
        threads: Threads of each side.
        repeats: Rounds; every side runs once in each.
        tokenizer: Folder of Whisper tokenizer files, or None: openai-whisper's vocabulary, else the bundled model's.
        quick: A smoke test: as little work as shows that all runs.
        second: The size is beside the first one: single rows only.
        notes: What a reader of the results must know, gathered on the way.
    """

    size: str = "tiny"
    against: tuple[str, ...] = ()
    threads: int = 1
    repeats: int = 5
    tokenizer: Path | None = None
    quick: bool = False
    second: bool = False
    notes: list[str] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    _scratch: Path | None = None

    @property
    def few(self) -> int:
        """Rounds of cases that take long."""
        return max(self.repeats - 2, 1)

    @property
    def scratch(self) -> Path:
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="audiomm-benchmark-"))
        return self._scratch

    def checkpoint(self, words: int = 100) -> Path:
        """A folder with a model of the wanted size, float32, that says `words` words in each window; made once a run.

        See `checkpoints.make`.
        """
        import checkpoints

        name = f"{self.size}-{words}"
        if name not in self.folders:
            self.folders[name] = checkpoints.make(self.size, words, self.tokenizer, self.scratch / name)
        return self.folders[name]

    def converted(self, words: int = 100) -> Path:
        """The same model in CTranslate2's format."""
        import checkpoints

        name = f"{self.size}-{words}-converted"
        if name not in self.folders:
            self.folders[name] = checkpoints.convert(self.checkpoint(words), self.scratch / name)
        return self.folders[name]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print(text, file=sys.stderr)

    def clean(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self.folders.clear()
            self._scratch = None


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def alternate(sides: dict[str, Callable[[], Any]], repeats: int, warmups: int = 1) -> dict[str, dict[str, Any]]:
    """Time several sides in turn, so that what else the machine does hits all of them alike.

    Every round begins with another side (A B C, B C A, C A B, ...): who runs after whom does not settle who wins.

    Args:
        sides: {name: what to run}; the first is the one the others are compared with.
        repeats: Rounds.
        warmups: Rounds before, not counted.

    Returns:
        What `summarise` gives.
    """
    for _ in range(warmups):
        for run in sides.values():
            run()
    names = list(sides)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in rotated(names, turn):
            time.sleep(SETTLE_SECONDS)
            used, started = processor_seconds(), time.perf_counter()
            sides[name]()
            wall[name].append(1000 * (time.perf_counter() - started))
            processor[name].append(1000 * (processor_seconds() - used))
    return summarise(wall, processor)


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in order, begun with another one each turn."""
    start = turn % len(names)
    return names[start:] + names[:start]


def summarise(wall: dict[str, list[float]], processor: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Medians of rounds, and of ratios taken round by round.

    Args:
        wall: {name: milliseconds of each round}; the first is the one the others are compared with.
        processor: The same in processor time, which says more than the clock where the machine has other work.

    Returns:
        {name: {"wall_ms": median, "fastest_ms", "cpu_ms": median of processor time, "ratio": median over the rounds of
        this side's time over the first side's, "cpu_ratio", "rounds_ms": all, "rounds_cpu_ms": all}}.
    """
    first = next(iter(wall))
    return {
        name: {
            "wall_ms": round(statistics.median(times), 3),
            "fastest_ms": round(min(times), 3),
            "cpu_ms": round(statistics.median(processor[name]), 3),
            "ratio": round(statistics.median(ratios(times, wall[first])), 3),
            "cpu_ratio": round(statistics.median(ratios(processor[name], processor[first])), 3),
            "rounds_ms": [round(value, 3) for value in times],
            "rounds_cpu_ms": [round(value, 3) for value in processor[name]],
        }
        for name, times in wall.items()
    }


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Their time over ours, round by round: above 1 they are slower."""
    return [a / max(b, 1e-9) for a, b in zip(theirs, ours, strict=True)]


def in_child(code: str, *arguments: str, threads: int = 1) -> dict[str, float]:
    """Run a program in a fresh interpreter: its wall and processor seconds, and the JSON of its last line, if any."""
    import json
    import resource

    environment = {**os.environ, **thread_limits(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Installed packages have their bytecode; what is run from its source would be compiled anew in each process.
        environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "audiomm-benchmark-bytecode")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stdout.strip().splitlines()
    said = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {"wall": seconds, "cpu": used, **said}


def thread_limits(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(threads) for name in names}


def machine() -> dict[str, Any]:
    """Processor, memory, load and versions: what a number means nothing without."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.system(), "cores": os.cpu_count()}
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        lines = processor.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        facts["processor"] = names[0] if names else "?"
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
        facts["features"] = [name for name in known if name in flags]
    if hasattr(os, "getloadavg"):
        facts["load_average"] = [round(value, 2) for value in os.getloadavg()]
    for package in ("audiomm", "torch", "transformers", "openai-whisper", "faster-whisper", "ctranslate2"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "audiomm":
                import audiomm

                facts[package] = audiomm.__version__
    return facts
