"""A whole process from its start to the first text of a 10-second file: imports, loading, listening, writing.

Each side does what its users do first: open the model's folder, hand over the file, greedy, English. transformers' own
way to read a file needs the ffmpeg program, so it is handed the samples. faster-whisper has no torch to import, which
alone takes half of audiomm's time; "torch alone" is that time, below which nothing built on torch can come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Setting, in_child, rotated, summarise

SECONDS, RATE = 10, 16_000
#: Words that the model says: what 10 s of speech take.
WORDS = 25

OWN = """
import json, sys
from audiomm import pipeline
recognise = pipeline("automatic-speech-recognition", model=sys.argv[1])
text = recognise(sys.argv[2], generate_kwargs={"language": "en", "num_beams": 1})["text"]
print(json.dumps({"words": len(text.split())}))
"""
TRANSFORMERS = """
import json, sys
import soundfile
from transformers import pipeline
recognise = pipeline("automatic-speech-recognition", model=sys.argv[1])
samples, rate = soundfile.read(sys.argv[2], dtype="float32")
sound = {"raw": samples, "sampling_rate": rate}
text = recognise(sound, generate_kwargs={"language": "en", "num_beams": 1})["text"]
print(json.dumps({"words": len(text.split())}))
"""
FASTER_WHISPER = """
import json, sys
from faster_whisper import WhisperModel
threads = int(sys.argv[3])
model = WhisperModel(sys.argv[1], device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True)
segments, _ = model.transcribe(sys.argv[2], language="en", beam_size=1, temperature=0)
print(json.dumps({"words": len("".join(segment.text for segment in segments).split())}))
"""


def run(setting: Setting) -> dict[str, Any]:
    """Wall and processor time of whole processes, in turn."""
    sound = _sound(setting)
    own = str(setting.checkpoint(WORDS))
    programs = {"audiomm": (OWN, own), "torch alone": ("import torch", "")}
    if "transformers" in setting.against:
        programs["transformers"] = (TRANSFORMERS, own)
    if "faster-whisper" in setting.against:
        programs["faster-whisper int8"] = (FASTER_WHISPER, str(setting.converted(WORDS)))
    names = list(programs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    words: dict[str, int] = {}
    for turn in range(0 if setting.quick else -1, setting.repeats):
        for name in rotated(names, max(turn, 0)):
            code, folder = programs[name]
            facts = in_child(code, folder, str(sound), str(setting.threads), threads=setting.threads)
            words[name] = int(facts.get("words", 0))
            if turn >= 0:  # the turn before fills the file cache
                wall[name].append(1000 * facts["wall"])
                processor[name].append(1000 * facts["cpu"])
    times = summarise(wall, processor)
    for name, row in times.items():
        row["words"] = words[name]
    return {f"{setting.size}, {SECONDS} s": times}


def _sound(setting: Setting) -> Path:
    """A wav file of so many seconds of spoken digits."""
    import soundfile
    from end_to_end import recording

    path = setting.scratch / "cold_start.wav"
    soundfile.write(path, recording(SECONDS), RATE)
    return path
