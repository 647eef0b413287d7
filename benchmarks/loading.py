"""Loading a checkpoint in a fresh process: time without imports, and memory over the size of the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common import Setting, in_child, rotated, summarise

FRAME = """
import json, sys, time
{imports}
def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
before = status("VmHWM")
used, started = time.process_time(), time.perf_counter()
model = {load}
{touch}
seconds, used = time.perf_counter() - started, time.process_time() - used
print(json.dumps({{"seconds": seconds, "used": used, "peak": status("VmHWM") - before}}))
"""
#: Weights may be mapped and read later: adding up all of them makes every side read them.
TOUCH = "sum(float(p.sum()) for p in model.parameters())"


#: A size of 3 GB in float32; written for this benchmark, read by audiomm and transformers.
LARGE = "medium"


def run(setting: Setting) -> dict[str, Any]:
    """Time and peak memory until every weight has been read once: the setting's size, and 3 GB."""
    small = setting.checkpoint()
    results = _measured(setting, small, setting.converted() if "faster-whisper" in setting.against else None)
    if not setting.quick:
        import checkpoints

        large = checkpoints.make(LARGE, checkpoints.ENDLESS, setting.tokenizer, setting.scratch / "large")
        results |= _measured(setting, large, None)
        shutil.rmtree(large)
    return results


def _measured(setting: Setting, folder: Path, converted: Path | None) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    programs = {"audiomm": (_program("from audiomm import WhisperForConditionalGeneration as M"), str(folder))}
    if "transformers" in setting.against:
        imports = "from transformers import WhisperForConditionalGeneration as M\nimport transformers.modeling_utils"
        programs["transformers"] = (_program(imports), str(folder))
    if converted is not None:
        load = "W(sys.argv[1], device='cpu', compute_type='float32', local_files_only=True)"
        code = FRAME.format(imports="from faster_whisper import WhisperModel as W", load=load, touch="")
        programs["faster-whisper"] = (code, str(converted))
    names = list(programs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for turn in range(0 if setting.quick else -1, setting.repeats):
        for name in rotated(names, max(turn, 0)):
            facts = in_child(*programs[name], threads=setting.threads)
            peaks[name] = max(peaks[name], int(facts["peak"]))
            if turn >= 0:  # the turn before fills the file cache
                wall[name].append(1000 * facts["seconds"])
                processor[name].append(1000 * facts["used"])
    times = summarise(wall, processor)
    for name, row in times.items():
        row["work"] = {"flops": 0, "bytes": size}
        row["peak_mb"] = round(peaks[name] / 1e6)
        row["peak_over_file"] = round(peaks[name] / size, 2)
    return {f"{size / 1e6:.0f} MB": times}


def _program(imports: str) -> str:
    setup = f"import torch\n{imports}\ntorch.zeros(2, 2) @ torch.zeros(2, 2)"
    return FRAME.format(imports=setup, load="M.from_pretrained(sys.argv[1])", touch=TOUCH)
