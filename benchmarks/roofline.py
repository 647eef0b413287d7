"""What this machine can do at most, measured, and what a piece of work needs at least, computed.

`share` says how near a measured time comes to the limit: the longer of the time to read what must be read and the time
to multiply what must be multiplied. Reading is measured for several sizes, as what fits into a cache is read faster.
The work is that of the mathematics: no side is charged for copies it makes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

#: Sizes in MB whose reading is measured.
READ_MB = (16, 64, 256)
#: Bytes of a weight and of a key or value in each number format.
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}


def measure(threads: int, quick: bool = False) -> dict[str, Any]:
    """Bandwidths in GB/s and matrix products in GFLOP/s, the best of several tries each."""
    torch.set_num_threads(threads)
    size = 256 if quick else 1536
    results: dict[str, Any] = {"threads": threads, "read_gb_s": {}}
    for megabytes in READ_MB[: 1 if quick else None]:
        values = torch.ones(megabytes * 250_000)
        results["read_gb_s"][str(megabytes)] = round(megabytes / 1e3 / _fastest(values.sum), 1)
    source = torch.ones((16 if quick else 256) * 250_000)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4
    results["copy_gb_s"] = round(moved / 1e9 / _fastest(lambda: target.copy_(source)), 1)
    products = {kind: make(size) for kind, make in _PRODUCTS.items()}
    results["gflop_s"] = {kind: round(2 * size**3 / 1e9 / _fastest(run)) for kind, run in products.items()}
    return results


def _float_product(kind: torch.dtype) -> Callable[[int], Callable[[], Any]]:
    def make(size: int) -> Callable[[], Any]:
        left, right = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
        return lambda: left @ right

    return make


def _int8_product(size: int) -> Callable[[], Any]:
    left = torch.randint(-128, 128, (size, size), dtype=torch.int8)
    right = torch.randint(-128, 128, (size, size), dtype=torch.int8)
    return lambda: torch._int_mm(left, right)


_PRODUCTS = {
    "float32": _float_product(torch.float32),
    "bfloat16": _float_product(torch.bfloat16),
    "int8": _int8_product,
}


def _fastest(run: Callable[[], Any], tries: int = 7) -> float:
    """Seconds of the median of the three fastest tries."""
    run()
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(sorted(times)[:3])


# The work of the models


def encoder_work(config: Any, batch: int) -> dict[str, float]:
    """FLOPs of the encoder over whole windows, and its weights; keys and values are made on the way."""
    places, width, layers = config.max_source_positions, config.d_model, config.encoder_layers
    inner = config.encoder_ffn_dim
    products = places * width * (4 * width + 2 * inner) + 2 * places**2 * width
    convolutions = 3 * width * (2 * places * config.num_mel_bins + places * width)
    weights = layers * width * (4 * width + 2 * inner) + 3 * width * (config.num_mel_bins + width)
    return {"flops": 2.0 * batch * (layers * products + convolutions), "weights": weights, "reads": 1, "states": 0}


def decode_work(config: Any, batch: int, tokens: int) -> dict[str, float]:
    """FLOPs, and numbers read, of `tokens` greedy tokens a row, the pairs of the encoder's output included."""
    width, layers, inner, places = (
        config.d_model,
        config.decoder_layers,
        config.decoder_ffn_dim,
        config.max_source_positions,
    )
    each = layers * width * (6 * width + 2 * inner) + config.vocab_size * width
    pairs = 2 * layers * places * width
    # Of the tokens so far, half of all on average.
    states = batch * (pairs + layers * width * tokens)
    cross = batch * pairs * width
    attention = batch * 2 * layers * width * (places + tokens / 2)
    return {
        "flops": 2.0 * (cross + tokens * (batch * each + attention)),
        "weights": each,
        "reads": tokens,
        "states": float(tokens * states),
    }


def features_work(windows: int) -> dict[str, float]:
    """FLOPs and bytes of log-mel features of windows of 30 s: a real FFT of 400 samples a frame, powers, mel bands."""
    frames, samples, bins = 3000, 480_000, 80
    fft = 2.5 * 400 * math.log2(400)
    # Each frequency counts for two bands at most.
    bands, powers = 2 * 2 * 201, 3 * 201
    return {"flops": windows * frames * (fft + powers + bands), "bytes": 4.0 * windows * (samples + frames * bins)}


def added(first: dict[str, Any], second: dict[str, Any], times: float = 1.0) -> list[dict[str, Any]]:
    """Two pieces of work one after the other, `times` times over."""
    return [{**piece, "repeat": times} for piece in (first, second)]


def limit_ms(work: Any, kind: str, machine: dict[str, Any]) -> float:
    """The least time in ms that this machine needs for the work in that number format."""
    if isinstance(work, list):
        return sum(piece["repeat"] * limit_ms(piece, kind, machine) for piece in work)
    speeds = {int(size): speed for size, speed in machine["read_gb_s"].items()}
    if "bytes" in work:
        seconds = work["bytes"] / 1e9 / speeds[max(speeds)]
        return 1000 * max(seconds, work["flops"] / 1e9 / machine["gflop_s"][kind])
    weights = work["weights"] * WEIGHT_BYTES[kind]
    read = work["reads"] * weights + work["states"] * STATE_BYTES[kind]
    once = weights + work["states"] / max(work["reads"], 1) * STATE_BYTES[kind]
    fitting = [size for size in sorted(speeds) if size * 1e6 >= once]
    seconds = read / 1e9 / speeds[fitting[0] if fitting else max(speeds)]
    return 1000 * max(seconds, work["flops"] / 1e9 / machine["gflop_s"][kind])
