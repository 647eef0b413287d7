"""What all benchmarks share: peers, alternating timers, random checkpoints and facts about the machine."""

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

#: Peer on the command line -> its package.
PEERS = {"transformers": "transformers", "faster-whisper": "faster_whisper"}

#: Sizes of the published models; what is not said is as in whisper-tiny.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {},
    "base": {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "heads": 8},
    "small": {"d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "heads": 12},
    "medium": {"d_model": 1024, "encoder_layers": 24, "decoder_layers": 24, "heads": 16},
    "large-v3-turbo": {
        "d_model": 1280, "encoder_layers": 32, "decoder_layers": 4, "heads": 20,
        "num_mel_bins": 128, "vocab_size": 51866,
    },
}  # fmt: skip

#: Where the files of a multilingual tokenizer are; CTranslate2's converter wants them.
TOKENIZER = Path(__file__).resolve().parents[2] / "shared" / "golden" / "tokenizers" / "whisper-multilingual"


@dataclass
class Setting:
    """What the command line asked for.

    Attributes:
        size: A key of SIZES.
        against: Peers to compare with, those that are installed.
        threads: Threads of each side.
        repeats: Rounds; every side runs once in each.
        tokenizer: Folder of tokenizer files for CTranslate2's converter, or None.
    """

    size: str = "tiny"
    against: tuple[str, ...] = ()
    threads: int = 1
    repeats: int = 7
    tokenizer: Path | None = None
    folders: dict[str, Path] = field(default_factory=dict)
    _scratch: Path | None = None

    @property
    def scratch(self) -> Path:
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="audiomm-benchmark-"))
        return self._scratch

    def checkpoint(self) -> Path:
        """A folder with a random model of the wanted size, float32; made once a run."""
        if "checkpoint" not in self.folders:
            self.folders["checkpoint"] = _make_checkpoint(self.size, self.scratch / "checkpoint")
        return self.folders["checkpoint"]

    def converted(self) -> Path:
        """The same model in CTranslate2's format.

        Raises:
            RuntimeError: There are no tokenizer files, which the converter needs.
        """
        if "converted" not in self.folders:
            if self.tokenizer is None:
                raise RuntimeError("no tokenizer files for CTranslate2's converter: pass --tokenizer FOLDER")
            source = self.checkpoint()
            for path in self.tokenizer.iterdir():
                shutil.copyfile(path, source / path.name)
            from ctranslate2.converters import TransformersConverter

            folder = self.scratch / "converted"
            TransformersConverter(str(source), low_cpu_mem_usage=True).convert(str(folder))
            shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
            self.folders["converted"] = folder
        return self.folders["converted"]

    def clean(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _make_checkpoint(size: str, folder: Path) -> Path:
    import torch

    import audiomm

    values = dict(SIZES[size])
    heads = values.pop("heads", None)
    if heads is not None:
        values |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
        values |= {"encoder_ffn_dim": 4 * values["d_model"], "decoder_ffn_dim": 4 * values["d_model"]}
    torch.manual_seed(0)
    model = audiomm.WhisperForConditionalGeneration(audiomm.WhisperConfig(**values))
    model.save_pretrained(folder)
    audiomm.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    return folder


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def alternate(sides: dict[str, Callable[[], Any]], repeats: int, warmups: int = 1) -> dict[str, dict[str, Any]]:
    """Time several sides in turn, A B C A B C ..., so that what else the machine does hits all of them alike.

    Args:
        sides: {name: what to run}; the first is the one the others are compared with.
        repeats: Rounds.
        warmups: Rounds before, not counted.

    Returns:
        {name: {"wall_ms": median, "fastest_ms", "cpu_ms": median of processor time, "ratio": median over the rounds of
        this side's time over the first side's, "rounds_ms": all}}.
    """
    for _ in range(warmups):
        for run in sides.values():
            run()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            used, started = time.process_time(), time.perf_counter()
            run()
            wall[name].append(1000 * (time.perf_counter() - started))
            processor[name].append(1000 * (time.process_time() - used))
    return summarise(wall, processor)


def summarise(wall: dict[str, list[float]], processor: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Medians of rounds, and of ratios taken round by round; see `alternate`."""
    first = next(iter(wall))
    # On a machine with other work processor time tells more than the clock.
    return {
        name: {
            "wall_ms": round(statistics.median(times), 3),
            "fastest_ms": round(min(times), 3),
            "cpu_ms": round(statistics.median(processor[name]), 3),
            "ratio": round(statistics.median(a / max(b, 1e-9) for a, b in zip(times, wall[first], strict=True)), 3),
            "cpu_ratio": round(
                statistics.median(a / max(b, 1e-9) for a, b in zip(processor[name], processor[first], strict=True)), 3
            ),
            "rounds_ms": [round(value, 3) for value in times],
        }
        for name, times in wall.items()
    }


def in_child(code: str, *arguments: str, threads: int = 1) -> dict[str, float]:
    """Run a program in a fresh interpreter: its wall and processor seconds, and the JSON of its last line, if any."""
    import json
    import resource

    environment = {**os.environ, **thread_limits(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
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
        flags = next((line for line in lines if line.startswith("flags")), "")
        facts["features"] = [name for name in ("avx2", "avx512f", "amx_bf16", "amx_int8") if f" {name}" in flags]
    if hasattr(os, "getloadavg"):
        facts["load_average"] = [round(value, 2) for value in os.getloadavg()]
    for package in ("audiomm", "torch", "transformers", "faster-whisper", "ctranslate2"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "audiomm":
                import audiomm

                facts[package] = audiomm.__version__
    return facts
