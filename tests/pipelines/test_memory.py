"""An hour of audio needs no more memory than five minutes, but for its samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomm.base.hub import BUNDLED_MODELS

RATE = 16000

#: Peak memory of a process in KiB, after a first call that loads everything. The model is random and narrow, as only
#: what is around it grows.
PROGRAM = """
import copy, resource, sys, torch
from audiomm import WhisperForConditionalGeneration, pipeline

torch.set_num_threads(1)
pipe = pipeline("automatic-speech-recognition", device="cpu")
config = copy.deepcopy(pipe.model.config)
for name in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim"):
    setattr(config, name, 16)
for name in ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"):
    setattr(config, name, 1)
narrow = WhisperForConditionalGeneration(config).eval()
narrow.generation_config = pipe.model.generation_config
pipe.model = narrow
long, warm, size, speech = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
for path in (warm, long):
    pipe.transcribe(path, batch_size=size, vad_filter=speech, return_timestamps=True, num_beams=1, max_new_tokens=3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(path: Path, warm: Path, batch_size: int, speech: bool) -> int:
    command = [sys.executable, "-c", PROGRAM, str(path), str(warm), str(batch_size), str(speech)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of 1, 5 and 60 minutes: noise that swells, so that there are spans of sound and little is said."""
    folder = tmp_path_factory.mktemp("long")
    minute = np.random.default_rng(0).standard_normal(60 * RATE) * 0.02
    minute *= 1 + np.sin(np.arange(len(minute)) / RATE * 0.7) ** 8 * 5
    paths = {minutes: folder / f"{minutes}.wav" for minutes in (1, 5, 60)}
    for minutes, path in paths.items():
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
    return paths


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is asked for in the way of unix")
@pytest.mark.skipif(
    not (BUNDLED_MODELS["audiomm/whisper-commands"] / "config.json").is_file(), reason="the bundled model is missing"
)
@pytest.mark.parametrize(("batch_size", "speech"), [(1, False), (4, False), (1, True)])
def test_memory_grows_with_the_samples_alone(recordings: dict[int, Path], batch_size: int, speech: bool) -> None:
    short, long = (peak_bytes(recordings[minutes], recordings[1], batch_size, speech) for minutes in (5, 60))
    samples = 55 * 60 * RATE * 4
    # What a filter leaves of a recording is a second copy of a part of it.
    allowed = samples * (2 if speech else 1) + 40 * 2**20
    assert long - short <= allowed, f"{(long - short) / 2**20:.0f} MiB more, of which {samples / 2**20:.0f} are samples"
