"""The benchmarks run, write what they promise, and judge by the figures; how fast anything is, is not asked."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
#: A tokenizer that is always at hand.
BUNDLED = ROOT / "src" / "audiomm" / "data" / "whisper-commands"
SUBJECTS = ("encoder", "decode_step", "end_to_end", "word_times", "gemma_overhead")


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of the folder, which is no package; their names are gone again afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def run(program: str, *arguments: str) -> str:
    places = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_quick_run_without_peers_measures_and_reports_every_subject_named(tmp_path: Path) -> None:
    places = ["--json", str(tmp_path / "found.json"), "--tokenizer", str(BUNDLED)]
    only = [part for subject in SUBJECTS for part in ("--only", subject)]
    run("run.py", "--quick", "--threads", "1", "--against", "none", *places, *only)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert set(found["results"]) == set(SUBJECTS)
    for cases in found["results"].values():
        for sides in cases.values():
            assert all(row["rounds_ms"] and row["cpu_ms"] >= 0 for row in sides.values())
    assert min(found["limits"]["gflop_s"].values()) > 0
    # The model says 100 words in each window, whatever is in it: 35 s are two windows.
    written = {row["words"] for row in found["results"]["end_to_end"]["mini, 35 s, sequential"].values()}
    assert written == {200}
    table = (tmp_path / "found.md").read_text(encoding="utf-8")
    assert "| encoder | | transformers float32 | at least 3x | not measured |" in table
    assert "at most 10% of the decode" in table
    assert "### gemma_overhead" in table


def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_models(tmp_path: Path) -> None:
    only = ["--only", "turbo", "--only", "Gemma 4 E2B", "--only", "Gemma 3n E2B"]
    run("gpu.py", "--device", "cpu", "--tiny", "--against", "none", "--json", str(tmp_path / "gpu.json"), *only)
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row for row in rows if "failed" in row] == []
    assert {row["row"] for row in rows if row["side"] == "audiomm plain"} == {
        "turbo, batch 1", "Gemma 4 E2B, batch 1", "Gemma 3n E2B, batch 1",
    }  # fmt: skip
    assert all(row["figure"] > 0 for row in rows)


def test_every_round_begins_with_another_side(benchmark_module: Callable[[str], ModuleType]) -> None:
    common = benchmark_module("common")
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = common.alternate(sides, repeats=4, warmups=0)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert [len(row["rounds_ms"]) for row in times.values()] == [4, 4, 4]
    assert times["a"]["ratio"] == 1


def rows_of(**rounds: list[float]) -> dict[str, dict[str, object]]:
    names = {name.replace("_", " "): times for name, times in rounds.items()}
    return {name: {"wall_ms": sorted(times)[1], "rounds_ms": times} for name, times in names.items()}


def test_a_target_is_judged_round_by_round_against_the_quickest_side_of_the_peer(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    targets = benchmark_module("targets")
    sides = rows_of(
        audiomm_float32=[10, 10, 10], audiomm_int8=[1, 2, 4],
        transformers_float32=[40, 40, 40], transformers_bfloat16=[3, 8, 20],
    )  # fmt: skip
    rows = targets.outcome({"decode_step": {"tiny, batch 1": sides}}, auto="int8")
    default = next(row for row in rows if row["work"] == "decode, default type" and row["case"])
    # Ratios of the rounds are 3, 4 and 5: their median reaches 4.
    assert (default["own"], default["against"]) == ("audiomm int8", "transformers bfloat16")
    assert (default["ratio"], default["spread"], default["reached"]) == (4, [3, 5], True)
    same = next(row for row in rows if row["work"] == "decode, float32" and row["case"])
    assert (same["own"], same["ratio"], same["reached"]) == ("audiomm float32", 4, True)
    assert {row["reached"] for row in rows if row["work"] == "encoder"} == {None}


def test_a_bound_is_judged_by_the_side_of_audiomm_alone(benchmark_module: Callable[[str], ModuleType]) -> None:
    targets = benchmark_module("targets")
    sides = {"audiomm float32": {"wall_ms": 5.0, "rounds_ms": [5.0], "share_of_decode": 0.2}}
    rows = targets.outcome({"word_times": {"tiny, 120 s, words on top": sides}}, auto="float32")
    bound = next(row for row in rows if row["work"] == "times of words, extra" and row["case"])
    assert (bound["figure"], bound["reached"]) == (0.2, False)


def test_the_limit_of_a_step_is_reading_at_one_row_and_multiplying_at_many(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    import audiomm

    roofline = benchmark_module("roofline")
    config = audiomm.WhisperConfig()
    machine = {"read_gb_s": {"256": 10}, "gflop_s": {"float32": 100, "int8": 400}}
    # whisper-tiny: 4 layers of 14 x 384 x 384 and 51,865 x 384 are 28.2 million weights; there are 4.6 million keys and
    # values of the encoder's output, and 0.6 million of the tokens so far, on average.
    tokens = roofline.limit_ms(roofline.decode_work(config, 1, 400), "float32", machine)
    assert tokens == pytest.approx(1000 * 400 * 4 * (28.17e6 + 4.61e6 + 0.61e6) / 10e9, rel=0.01)
    # The encoder's 36.9 GFLOP are the specification's figure.
    encoder = roofline.encoder_work(config, 1)
    assert roofline.limit_ms(encoder, "float32", machine) == pytest.approx(369.4, rel=0.001)
    assert roofline.limit_ms(encoder, "int8", machine) == pytest.approx(369.4 / 4, rel=0.001)
    slow = {**machine, "gflop_s": {"float32": 1}}
    many = roofline.decode_work(config, 64, 100)
    assert roofline.limit_ms(many, "float32", slow) == pytest.approx(many["flops"] / 1e6)
