"""What the GPU rows of the targets cost.

    python benchmarks/gpu.py [--minutes 8] [--only ROW] [--against none]

Random weights in bfloat16, exactly so many tokens on both sides (the end is suppressed), the same weights in memory;
times are CUDA events around whole calls of generate(), prefill included. First every row with audiomm captured, audiomm
plain and transformers as it comes; then, while the minutes last, transformers with a static cache, compiled, whose
warm-up is told apart. `limit` is the time to read the weights, keys and values once, at the copy bandwidth measured at
the start. A smoke test without a GPU: --device cpu --tiny.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_models

#: Row -> (audiomm's milliseconds a token at most, the device's limit by the specification).
TOKEN_TARGETS = {
    "turbo": (0.3, 0.081),
    "large-v3": (1.5, 0.431),
    "Gemma 4 E2B": (2.5, 1.067),
    "Gemma 4 E4B": (3.5, 2.176),
    "Gemma 3n E2B": (2.5, 1.135),
    "Gemma 3n E4B": (3.5, 2.097),
    "Gemma 4 31B": (18.0, 14.49),
}
#: Row -> (batch, seconds of audio per second at least, the specification's estimate of the limit).
BATCH_TARGETS = {"large-v3": (128, 1500, 3200), "turbo": (512, 4000, 8100)}
#: transformers' time over audiomm's: as it comes, and compiled.
RATIO_TARGETS = {"transformers": 3.0, "transformers compiled": 1.3}
PREFILL_TOKENS, WINDOW_TOKENS = 1000, 100
CAPTURED = {"cache_implementation": "static"}
PLAIN = {"cache_implementation": "static", "disable_compile": True}
COMPILED = {"cache_implementation": "static"}


class Bench:
    """The setting of a run, its clock, and its rows so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.tiny = arguments.device, arguments.tiny
        self.peers = arguments.against != "none" and importlib.util.find_spec("transformers") is not None
        self.dtype = torch.bfloat16
        self.tokens = 8 if self.tiny else 128
        self.rounds = 1 if self.tiny else 3
        self.ends = time.perf_counter() + 60 * arguments.minutes
        self.rows: list[dict[str, Any]] = []
        self.bandwidth = self.copy_bandwidth()

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Of one call, by the device's own clock."""
        if self.device == "cpu":
            started = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a large copy."""
        source = torch.ones(1 << (20 if self.tiny else 30), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = [self.milliseconds(lambda: target.copy_(source)) for _ in range(6)]
        return 2 * source.numel() / (min(times) / 1000)

    def alternate(self, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Milliseconds of each side in each round; the sides take turns, each round begins with another one."""
        names = list(sides)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(self.milliseconds(sides[name]))
        return times

    def peak_gb(self, run: Callable[[], Any]) -> float:
        """The most memory that a call holds, in GB; 0 without a GPU. The call warms the side up."""
        if self.device == "cpu":
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9

    def measure(self, row: str, sides: dict[str, Callable[[], Any]], units: float, unit: str, **more: Any) -> None:
        """Warm up, time, and note a row for each side.

        Args:
            row: Its name.
            sides: {name: what to run}, audiomm's first.
            units: What a call makes of the unit; the figure is milliseconds per unit, or for "x" units per second.
            unit: "ms a token", "ms", or "x real time".
            more: Target and limit, for the rows of audiomm.
        """
        warm, memory = {}, {}
        for name, run in list(sides.items()):
            started = time.perf_counter()
            try:
                memory[name] = self.peak_gb(run)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                print(f"{row}: {name} failed: {error}", flush=True)
                self.rows.append({"row": row, "side": name, "failed": f"{type(error).__name__}: {error}"[:300]})
                del sides[name]
            warm[name] = time.perf_counter() - started
        times = self.alternate(sides)
        own = next(iter(times.values()), [])
        for name, rounds in times.items():
            found = statistics.median(rounds)
            figure = 1000 * units / found if unit.startswith("x") else found / units
            note = {"row": row, "side": name, "unit": unit, "figure": round(figure, 4), "rounds_ms": rounds}
            note |= {"warm_up_s": round(warm[name], 1), "peak_gb": round(memory[name], 2)}
            note["over_audiomm"] = round(statistics.median(a / b for a, b in zip(rounds, own, strict=True)), 3)
            if name.startswith("audiomm"):
                # Targets and limits are for the published sizes.
                note |= {} if self.tiny else more
            elif name in RATIO_TARGETS and unit == "ms a token" and not self.tiny:
                note["wanted_over_audiomm"] = RATIO_TARGETS[name]
            self.rows.append(note)
            print(line(note), flush=True)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.perf_counter()


def line(note: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    if "failed" in note:
        return f"| {note['row']} | {note['side']} | failed: {note['failed']} | | | | | |"
    figure, target, limit = note["figure"], note.get("target"), note.get("limit")
    wanted, reached, share = "", "", ""
    if target is not None:
        is_speed = note["unit"].startswith("x")
        wanted = f"{'>=' if is_speed else '<='} {target:g}"
        reached = "yes" if (figure >= target if is_speed else figure <= target) else "**no**"
        if limit:
            share = f"{(figure / limit if is_speed else limit / figure):.0%}"
    elif "wanted_over_audiomm" in note:
        wanted = f">= {note['wanted_over_audiomm']:g} x audiomm"
        reached = "yes" if note["over_audiomm"] >= note["wanted_over_audiomm"] else "**no**"
    elif limit:
        share = f"{limit / figure:.0%}"
    cells = (note["row"], note["side"], f"{figure:,.3f} {note['unit']}", f"{note['over_audiomm']:.2f}", wanted, reached)
    return f"| {' | '.join(cells)} | {share} | {note['peak_gb']:.1f} / {note['warm_up_s']:.0f} |"


HEAD = "| row | side | figure | x the first | wanted | reached | of limit | peak GB / warm-up s |\n" + "|---" * 8 + "|"


def whisper_runs(model: Any, inputs: dict[str, Any], count: int, **options: Any) -> Callable[[], Any]:
    # Random models may end at any time: the end is suppressed on all sides.
    fixed = {"max_new_tokens": count, "min_new_tokens": count, "language": "en", "task": "transcribe"}

    def run() -> Any:
        tokens = model.generate(**inputs, return_timestamps=False, do_sample=False, **fixed, **options)
        if tokens.shape[-1] < count:
            raise RuntimeError(f"only {tokens.shape[-1]} of {count} tokens were written")
        return tokens

    return run


def whisper_rows(bench: Bench, name: str, compiled: bool) -> None:
    """Decoding at batch 1 from the encoder's output on, and whole windows in a large batch."""
    model = gpu_models.whisper(name, bench.device, bench.dtype, bench.tiny)
    config = model.config
    hidden = torch.randn(1, config.max_source_positions, config.d_model, dtype=bench.dtype, device=bench.device)
    count, own_inputs = bench.tokens, {"encoder_outputs": (hidden,)}
    sides = {"audiomm captured": whisper_runs(model, own_inputs, count, **CAPTURED)}
    # A first token has weights that are read together moved together, which the twin shall share.
    whisper_runs(model, own_inputs, 1, **PLAIN)()
    other = gpu_models.twin(model) if bench.peers else None
    if other is not None:
        from transformers.modeling_outputs import BaseModelOutput

        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
        options, label = (COMPILED, "transformers compiled") if compiled else ({}, "transformers")
        sides[label] = whisper_runs(other, inputs, count, **options)
    if not compiled:
        sides["audiomm plain"] = whisper_runs(model, own_inputs, count, **PLAIN)
    target, published = TOKEN_TARGETS[name]
    limit = _limit(bench, model, 1)
    bench.measure(
        f"{name}, batch 1", sides, count, "ms a token", target=target, limit=limit, published_limit_h200=published
    )
    if compiled:
        return
    batch, wanted, published = BATCH_TARGETS[name]
    batch, count = (2, 4) if bench.tiny else (batch, WINDOW_TOKENS)
    features = {"input_features": torch.randn(batch, config.num_mel_bins, 3000, dtype=bench.dtype, device=bench.device)}
    sides = {"audiomm captured": whisper_runs(model, features, count, **CAPTURED)}
    if other is not None:
        sides["transformers"] = whisper_runs(other, features, count)
    bench.measure(
        f"{name}, batch {batch}, {count} tokens", sides, 30 * batch, "x real time", target=wanted, limit=published
    )


def gemma_runs(model: Any, prompt: torch.Tensor, count: int, **options: Any) -> Callable[[], Any]:
    mask = torch.ones_like(prompt)

    def run() -> Any:
        tokens = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
        )
        if tokens.shape[1] < prompt.shape[1] + count:
            raise RuntimeError(f"only {tokens.shape[1] - prompt.shape[1]} of {count} tokens were written")
        return tokens

    return run


def gemma_rows(bench: Bench, name: str, compiled: bool) -> None:
    """Decoding at batch 1 after a short prompt, and the first token after a prompt of 1,000."""
    model = gpu_models.gemma(name, bench.device, bench.dtype, bench.tiny)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(3, vocabulary, (1, 16), device=bench.device)
    count = bench.tokens
    sides = {"audiomm captured": gemma_runs(model, prompt, count, **CAPTURED)}
    gemma_runs(model, prompt, 1, **PLAIN)()
    other = gpu_models.twin(model) if bench.peers else None
    if other is not None:
        options, label = (COMPILED, "transformers compiled") if compiled else ({}, "transformers")
        sides[label] = gemma_runs(other, prompt, count, **options)
    if not compiled:
        sides["audiomm plain"] = gemma_runs(model, prompt, count, **PLAIN)
    target, published = TOKEN_TARGETS[name]
    limit = _limit(bench, model, 1)
    bench.measure(
        f"{name}, batch 1", sides, count, "ms a token", target=target, limit=limit, published_limit_h200=published
    )
    if compiled:
        return
    length = 40 if bench.tiny else PREFILL_TOKENS
    prompt = torch.randint(3, vocabulary, (1, length), device=bench.device)
    sides = {"audiomm": gemma_runs(model, prompt, 1)}
    if other is not None:
        sides["transformers"] = gemma_runs(other, prompt, 1)
    bench.measure(f"{name}, prompt of {length}", sides, 1, "ms")


def _limit(bench: Bench, model: Any, batch: int) -> float:
    """Milliseconds to read once what a step reads."""
    return 1000 * (gpu_models.read_bytes(model) + gpu_models.state_bytes(model, batch)) / bench.bandwidth


def main() -> int:
    arguments = parse()
    bench = Bench(arguments)
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if bench.device != "cpu" else "cpu (smoke test)",
        "torch": torch.__version__,
        "copy_gb_s": round(bench.bandwidth / 1e9),
        "tiny": bench.tiny,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()), f"\n\n{HEAD}", flush=True)
    wanted = arguments.only or list(TOKEN_TARGETS)
    passes = (False, True) if bench.peers and not arguments.no_compile and bench.device != "cpu" else (False,)
    for compiled in passes:
        for name in wanted:
            # A compilation of so many layers takes a minute or more.
            if bench.seconds_left < (75 if compiled else 0):
                print(f"{name}: left out, the minutes are over", flush=True)
                continue
            rows = whisper_rows if name in gpu_models.WHISPERS else gemma_rows
            try:
                rows(bench, name, compiled)
            except torch.OutOfMemoryError as error:
                print(f"{name}: left out, {error}", flush=True)
            write(arguments, facts, bench.rows)
            if bench.device != "cpu":
                torch.cuda.empty_cache()
    return 0


def write(arguments: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """JSON and Markdown of what there is so far."""
    place = Path(__file__).resolve().parent / "results"
    path = Path(arguments.json) if arguments.json else place / f"{facts['date']}-gpu{'-tiny' * facts['tiny']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = "\n".join([HEAD, *map(line, rows)])
    path.with_suffix(".md").write_text(f"# GPU: {told}\n\n{table}\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny widths: shows that everything runs")
    parser.add_argument("--only", action="append", choices=tuple(TOKEN_TARGETS), help="this row; may be repeated")
    parser.add_argument("--against", choices=("transformers", "none"), default="transformers")
    parser.add_argument("--no-compile", action="store_true", help="leave out transformers' compiled side")
    parser.add_argument("--minutes", type=float, default=8.0, help="no further row is begun after so many")
    parser.add_argument("--json", help="where the results go (default: results/DATE-gpu.json)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
