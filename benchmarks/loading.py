"""Loading a checkpoint in a fresh process: time without imports, and memory over the size of the file."""

from __future__ import annotations

from typing import Any

from common import Setting, in_child, summarise

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


def run(setting: Setting) -> dict[str, Any]:
    """Time and peak memory until every weight has been read once."""
    folder = str(setting.checkpoint())
    size = sum(path.stat().st_size for path in setting.checkpoint().glob("*.safetensors"))
    programs = {"audiomm": (_program("from audiomm import WhisperForConditionalGeneration as M"), folder)}
    if "transformers" in setting.against:
        imports = "from transformers import WhisperForConditionalGeneration as M\nimport transformers.modeling_utils"
        programs["transformers"] = (_program(imports), folder)
    if "faster-whisper" in setting.against:
        load = "W(sys.argv[1], device='cpu', compute_type='float32', local_files_only=True)"
        code = FRAME.format(imports="from faster_whisper import WhisperModel as W", load=load, touch="")
        programs["faster-whisper"] = (code, str(setting.converted()))
    wall: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    peaks: dict[str, int] = {}
    for turn in range(setting.repeats + 1):
        for name, (code, where) in programs.items():
            facts = in_child(code, where, threads=setting.threads)
            if turn:
                wall[name].append(1000 * facts["seconds"])
                processor[name].append(1000 * facts["used"])
            peaks[name] = max(peaks.get(name, 0), int(facts["peak"]))
    times = summarise(wall, processor)
    for name, row in times.items():
        row["peak_mb"] = round(peaks[name] / 1e6)
        row["peak_over_file"] = round(peaks[name] / size, 2)
    return {f"{size / 1e6:.0f} MB": times}


def _program(imports: str) -> str:
    setup = f"import torch\n{imports}\ntorch.zeros(2, 2) @ torch.zeros(2, 2)"
    return FRAME.format(imports=setup, load="M.from_pretrained(sys.argv[1])", touch=TOUCH)
