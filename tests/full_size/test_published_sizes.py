"""Models of the published sizes, with random weights: built, saved, loaded, and made to write twenty tokens.

Loading happens in a process of its own, which tells how much memory it took: at most one copy of the checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

LARGE_V3 = {
    "vocab_size": 51866, "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120, "decoder_layers": 4, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120,
}  # fmt: skip
BASE = {
    "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "decoder_layers": 6, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048,
}  # fmt: skip
#: sizes, type of the weights, millions of parameters, files at least
CASES = [
    pytest.param({}, "float32", 37.76, 1, id="tiny"),
    pytest.param({}, "float32", 37.76, 3, id="tiny in shards"),
    pytest.param(BASE, "float32", 72.59, 1, id="base"),
    pytest.param(LARGE_V3, "bfloat16", 808.88, 3, id="large-v3-turbo in shards"),
]
#: Memory of loading over the size of the checkpoint.
LARGEST_RATIO = 1.15

LOADER = """
import json, sys, time
import torch
import audiomm
from audiomm.models.whisper import WhisperForConditionalGeneration

torch.set_num_threads(1)
folder, bins = sys.argv[1], int(sys.argv[2])
# Whatever is imported or set up on first use belongs to the start, not to the checkpoint.
with torch.device("meta"):
    WhisperForConditionalGeneration(audiomm.WhisperConfig())
torch.zeros(1000, 1000).aminmax()


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


# The peak of this process alone: ru_maxrss is that of its parent, where the parent was larger when it forked.
before = status("VmHWM")
started = time.perf_counter()
model = WhisperForConditionalGeneration.from_pretrained(folder)
facts = {
    "seconds": time.perf_counter() - started, "before": before, "peak": status("VmHWM"), "after": status("VmRSS"),
    "dtype": str(model.dtype), "parameters": model.num_parameters(), "training": model.training,
    "bytes": model.get_memory_footprint(),
}
frames = model.config.max_source_positions * 2
features = torch.randn(1, bins, frames, generator=torch.Generator().manual_seed(0)).to(model.dtype)
options = {"max_new_tokens": 20, "min_new_tokens": 20, "return_timestamps": False}
facts["tokens"] = model.generate(features, **options).tolist()
facts["again"] = model.generate(features, **options).tolist()
print(json.dumps(facts))
"""


def build(sizes: dict[str, Any], dtype: str) -> audiomm.WhisperForConditionalGeneration:
    """A random model, made in its final type so that no second copy is needed."""
    config = audiomm.WhisperConfig(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return audiomm.WhisperForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("sizes", "dtype", "millions", "shards"), CASES)
def test_the_model_is_saved_loaded_within_its_own_size_and_generates(
    sizes: dict[str, Any], dtype: str, millions: float, shards: int, tmp_path: Path
) -> None:
    model = build(sizes, dtype)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=1e-3)
    limit = "5GB" if shards == 1 else model.get_memory_footprint() // (shards - 1)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    files = list(tmp_path.glob("*.safetensors"))
    bins = model.config.num_mel_bins
    del model
    try:
        size = sum(path.stat().st_size for path in files)
        assert len(files) == 1 if shards == 1 else len(files) > 1
        done = subprocess.run(
            [sys.executable, "-c", LOADER, str(tmp_path), str(bins)],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    finally:
        for path in files:
            path.unlink()
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["dtype"] == f"torch.{dtype}"
    assert not facts["training"]
    assert facts["parameters"] == pytest.approx(millions * 1e6, rel=1e-3)
    assert facts["bytes"] == pytest.approx(size, rel=0.01)
    assert len(facts["tokens"][0]) == 20
    assert facts["tokens"] == facts["again"]
    ratio = (facts["peak"] - facts["before"]) / size
    assert ratio <= LARGEST_RATIO, f"loading {size:,} bytes took {ratio:.2f} times as much: {facts}"
    # After loading one copy stays, and nothing is left to be read from the disk later.
    assert (facts["after"] - facts["before"]) / size >= 0.9, facts
