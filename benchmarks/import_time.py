"""How long a process takes that does nothing but import: audiomm, torch alone, and the peers.

`import audiomm`, like `import transformers`, loads nothing yet; the model classes are what a transcription needs first.
`own_ms` is what is left of a process when the interpreter's own start is taken off.
"""

from __future__ import annotations

import statistics
from typing import Any

from common import Setting, in_child, rotated, summarise

INTERPRETER = "interpreter alone"
PROGRAMS = {
    "audiomm": "import audiomm",
    "audiomm's command, --version": "from audiomm.cli.main import main; main(['--version'])",
    "audiomm, the model classes": "from audiomm import WhisperForConditionalGeneration, WhisperProcessor",
    "torch alone": "import torch",
    INTERPRETER: "pass",
}
#: side: (package, program)
PEERS = {
    "transformers": ("transformers", "import transformers"),
    "transformers, the model classes": (
        "transformers",
        "from transformers import WhisperForConditionalGeneration, WhisperProcessor",
    ),
    "openai-whisper": ("openai-whisper", "import whisper"),
    "faster-whisper": ("faster-whisper", "import faster_whisper"),
}


def run(setting: Setting) -> dict[str, Any]:
    """Wall and processor time of whole processes, in turn."""
    programs = {**PROGRAMS, **{name: code for name, (peer, code) in PEERS.items() if peer in setting.against}}
    names = list(programs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(0 if setting.quick else -1, setting.repeats):
        for name in rotated(names, max(turn, 0)):
            facts = in_child(programs[name], threads=setting.threads)
            if turn >= 0:  # the turn before fills the file cache
                wall[name].append(1000 * facts["wall"])
                processor[name].append(1000 * facts["cpu"])
    times = summarise(wall, processor)
    for name, row in times.items():
        above = (own - bare for own, bare in zip(wall[name], wall[INTERPRETER], strict=True))
        row["own_ms"] = round(statistics.median(above), 3)
    return {"start of a process": times}
