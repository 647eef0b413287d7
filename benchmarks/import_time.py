"""How long a process takes that does nothing but import: audiomm, torch alone, and the peers."""

from __future__ import annotations

from typing import Any

from common import Setting, in_child, summarise

#: What a transcription needs first, from each side.
PROGRAMS = {
    "audiomm": "import audiomm",
    "audiomm's command, --version": "from audiomm.cli.main import main; main(['--version'])",
    "audiomm, the model class": "from audiomm import WhisperForConditionalGeneration, WhisperProcessor",
    "torch alone": "import torch",
}
PEERS = {
    "transformers": ("transformers", "from transformers import WhisperForConditionalGeneration, WhisperProcessor"),
    "faster-whisper": ("faster-whisper", "from faster_whisper import WhisperModel"),
}


def run(setting: Setting) -> dict[str, Any]:
    """Wall and processor time of whole processes, in turn."""
    programs = {"audiomm, the model class": PROGRAMS["audiomm, the model class"], **PROGRAMS}
    programs |= {f"{name}, the model class": code for name, (peer, code) in PEERS.items() if peer in setting.against}
    wall: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(setting.repeats + 1):
        for name, code in programs.items():
            facts = in_child(code, threads=setting.threads)
            # The first turn fills the file cache.
            if turn:
                wall[name].append(1000 * facts["wall"])
                processor[name].append(1000 * facts["cpu"])
    return {"start of a process": summarise(wall, processor)}
