"""E2B's text model at full size, random weights in bfloat16: it writes within six gigabytes of memory.

Its per-layer embeddings, four of its nine gigabytes, stay on disk; only the rows of tokens that occur are read.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

E2B = {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}
MOST_BYTES = 6e9
#: Free disk and memory that the test takes: the checkpoint, and what it is made or read in.
DISK_BYTES, FREE_BYTES = 12e9, 8e9

WRITER = """
import json, sys, time
import torch
from audiomm.models.gemma3n import Gemma3nForCausalLM

torch.set_num_threads(2)


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


started = time.perf_counter()
model = Gemma3nForCausalLM.from_pretrained(sys.argv[1], per_layer_embeddings="disk")
loaded = time.perf_counter()
prompt = torch.randint(3, 260_000, (1, 24), generator=torch.Generator().manual_seed(0))
tokens = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(json.dumps({
    "peak": status("VmHWM"), "anonymous": status("RssAnon"), "load_seconds": loaded - started,
    "generate_seconds": time.perf_counter() - loaded, "tokens": tokens[0, 24:].tolist(), "dtype": str(model.dtype),
    "table": str(model.get_per_layer_input_embeddings().placement), "parameters": model.num_parameters(),
}))
"""


def write_checkpoint(folder: Path) -> int:
    """Random weights of the right size, a few tensors in memory at a time; returns their bytes."""
    config = Gemma3nTextConfig(**E2B, architectures=["Gemma3nForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = Gemma3nForCausalLM(config)
    block = torch.randn(1 << 20).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    used = 0
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            if used + weight.numel() > 5e8 and shards[-1]:
                shards.append({})
                used = 0
            shards[-1][name] = weight.shape
            used += weight.numel()
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            scale = 1.0 if len(shape) == 1 or "embed" in name else shape[1] ** -0.5
            tensors[name] = (block * scale).repeat(math.ceil(shape.numel() / len(block)))[: shape.numel()].view(shape)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def test_e2b_text_writes_within_six_gigabytes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < DISK_BYTES or free_memory() < FREE_BYTES:
        pytest.skip("twelve gigabytes of disk and eight of memory are needed")
    try:
        assert write_checkpoint(tmp_path) == pytest.approx(8.87e9, rel=0.01)
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(tmp_path)], capture_output=True, text=True, timeout=1500, check=False
        )
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["dtype"] == "torch.bfloat16" and facts["table"] == "disk"
    assert facts["parameters"] == 4_435_182_688
    assert len(facts["tokens"]) == 6
    assert facts["peak"] < MOST_BYTES, facts
