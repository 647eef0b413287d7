"""CTranslate2 and faster-whisper in processes of their own.

In one process with PyTorch they would share its OpenMP runtime, which counts the threads of both, finds more than there
are cores and puts them to sleep between operations: both sides, and PyTorch's above all, would be slower than alone.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np

#: Proxies of all engines that were started.
ENGINES: list[Any] = []


class Engine:
    """A model of CTranslate2, and what it is to work on.

    Args:
        folder: In CTranslate2's format.
        kind: Number format.
        threads: For each operation.
        as_program: Load it as faster-whisper does, to transcribe recordings.
    """

    def __init__(self, folder: str, kind: str, threads: int, as_program: bool) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if as_program:
            import faster_whisper

            options = {"cpu_threads": threads, "local_files_only": True}
            self._program = faster_whisper.WhisperModel(folder, device="cpu", compute_type=kind, **options)
        else:
            import ctranslate2

            self._model = ctranslate2.models.Whisper(folder, device="cpu", compute_type=kind, intra_threads=threads)
        self._inputs: Any = None

    def processor_seconds(self) -> float:
        return time.process_time()

    def take(self, inputs: np.ndarray) -> None:
        """Keep features, an encoder's output or a recording for the next calls."""
        self._inputs = inputs

    def encode(self) -> None:
        self._model.encode(self._stored(), to_cpu=False)

    def decode(self, prompt: list[int], count: int) -> list[list[int]]:
        # CTranslate2 generates half of max_length at most.
        found = self._model.generate(self._stored(), [prompt] * len(self._inputs), beam_size=1, max_length=2 * count)
        return [row.sequences_ids[0][:count] for row in found]

    def transcribe(self, batched: bool, options: dict[str, Any]) -> str:
        program = self._program
        if batched:
            from faster_whisper import BatchedInferencePipeline

            program = BatchedInferencePipeline(program)
        segments, _ = program.transcribe(self._inputs, **options)
        return "".join(segment.text for segment in segments)

    def _stored(self) -> Any:
        import ctranslate2

        # It takes no other type than float32 from outside, and does not copy.
        return ctranslate2.StorageView.from_array(self._inputs)


class Engines(BaseManager):
    """Speaks with engines in another process."""


Engines.register("Engine", Engine)


def start(folder: Path, kind: str, threads: int, as_program: bool = False) -> Any:
    """An `Engine` in a new process, which ends with this one."""
    key = secrets.token_hex(16)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    server = subprocess.Popen(
        command,
        env={**os.environ, "AUDIOMM_BENCHMARK_KEY": key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None, "it is piped"
    engines = Engines(server.stdout.readline().strip(), key.encode())
    engines.connect()
    engine = engines.Engine(str(folder), kind, threads, as_program)  # type: ignore[attr-defined]
    engine.server = server  # its input closes with this process, which ends it
    ENGINES.append(engine)
    return engine


def processor_seconds() -> float:
    """Processor time of this process and of all engines."""
    return time.process_time() + sum(engine.processor_seconds() for engine in ENGINES)


def _serve() -> None:
    import threading

    server = Engines(None, os.environ["AUDIOMM_BENCHMARK_KEY"].encode()).get_server()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.address, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    # The class by the name under which the other process knows it.
    import apart

    apart._serve()
