"""From samples to text: 5 minutes sequentially and 60 minutes in batches, each side as its users would run it.

The audio is spoken digits from examples/audio, over and over; what the model says does not depend on it (see
`checkpoints`): 100 words and two timestamps in each window, that is what half a minute of speech takes. Sequentially
all sides go through the same windows and must write the same text. In batches each side cuts the recording in its own
way, by default: audiomm at pauses, faster-whisper with its voice activity detection (which leaves out silence), or,
as another side, into windows given to it; transformers into overlapping windows of 30 s. So each has windows of its own
number; `words` says how much it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sides
import torch
from checkpoints import is_multilingual
from common import Setting, alternate
from roofline import added, decode_work, encoder_work

RATE = 16_000
WORDS = 100
SEQUENTIAL_SECONDS, BATCHED_SECONDS = 300, 3600
BATCH = 8
RECORDINGS = Path(__file__).resolve().parents[1] / "examples" / "audio"
#: Greedy, without fallback, and no window knows of the one before: what a window says depends on its places alone.
GREEDY = {"language": "en", "temperature": 0, "condition_on_previous_text": False}

Transcribe = Callable[[np.ndarray], str]


def run(setting: Setting) -> dict[str, Any]:
    """Two cases: sequentially and in batches."""
    torch.set_num_threads(setting.threads)
    kinds = (sides.automatic(setting),)
    sequential_seconds, batched_seconds = (35, 65) if setting.quick else (SEQUENTIAL_SECONDS, BATCHED_SECONDS)
    results = {}
    for name, seconds, makers, rounds in (
        ("sequential", sequential_seconds, sequential(setting, kinds), max(setting.few - 1, 1)),
        ("batched", batched_seconds, batched(setting, kinds), 1),
    ):
        audio = recording(seconds)
        texts: dict[str, str] = {}
        for transcribe in makers.values():
            # Windows of half a minute are enough to warm up.
            transcribe(audio[: 65 * RATE])

        def timed(side: str, transcribe: Transcribe, audio: np.ndarray = audio, texts: Any = texts) -> Any:
            def run_once() -> None:
                texts[side] = transcribe(audio)

            return run_once

        runs = {side: timed(side, transcribe) for side, transcribe in makers.items()}
        times = alternate(runs, rounds, warmups=0)
        if name == "sequential" and len(set(texts.values())) != 1:
            raise RuntimeError(
                f"the sides write different texts: { {side: len(text) for side, text in texts.items()} }"
            )
        length = f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
        for side, row in times.items():
            row["words"] = len(texts[side].split())
            row["times_real_time"] = round(1000 * seconds / row["wall_ms"], 1)
            if "chunked" not in side:
                # What chunks say twice is not in the text, so that their number is not known from it.
                row["work"] = _work(setting, row["words"] / WORDS, 1 if name == "sequential" else BATCH)
        results[f"{setting.size}, {length}, {name}"] = times
    return results


def recording(seconds: float) -> np.ndarray:
    """Spoken digits with short pauses: mono float32 at 16 kHz."""
    import audiomm

    pause = np.zeros(round(0.4 * RATE), np.float32)
    clips = [np.asarray(audiomm.load_audio(path, RATE)) for path in sorted(RECORDINGS.glob("*.flac"))]
    once = np.concatenate([part for clip in clips for part in (clip.astype(np.float32), pause)])
    return np.resize(once, round(seconds * RATE))


def sequential(setting: Setting, kinds: tuple[str, ...], with_words: bool = False) -> dict[str, Transcribe]:
    """Sides that go through a recording window by window, with timestamps.

    Args:
        setting: Of the run.
        kinds: Number formats of audiomm.
        with_words: Find the times of words, too; of audiomm and faster-whisper only.
    """
    import audiomm

    folder = setting.checkpoint(WORDS)
    found: dict[str, Transcribe] = {}
    for name, model in sides.own_models(setting, WORDS, kinds).items():
        found[name] = _own(sides.pipeline_of(audiomm, folder, model), with_words)
    if "transformers" in setting.against and not with_words:
        import transformers

        model = sides.transformers_model(setting, WORDS)
        found["transformers float32"] = _hub(sides.pipeline_of(transformers, folder, model), return_timestamps=True)
    if "openai-whisper" in setting.against and not with_words and is_multilingual(folder):
        whisper_model = sides.openai_model(setting, WORDS)
        found["openai-whisper float32"] = lambda audio: whisper_model.transcribe(audio, fp16=False, **GREEDY)["text"]
    if "faster-whisper" in setting.against:
        kind = _best_ctranslate2()
        model = sides.faster_model(setting, WORDS, kind)
        found[f"faster-whisper {kind}"] = sides.faster_transcriber(
            model, beam_size=1, word_timestamps=with_words, **GREEDY
        )
    return found


def batched(setting: Setting, kinds: tuple[str, ...]) -> dict[str, Transcribe]:
    """Sides that hear windows of one recording side by side."""
    import audiomm

    folder = setting.checkpoint(WORDS)
    found: dict[str, Transcribe] = {}
    for name, model in sides.own_models(setting, WORDS, kinds).items():
        found[name] = _hub(sides.pipeline_of(audiomm, folder, model), batch_size=BATCH)
    if "transformers" in setting.against:
        import transformers

        pipe = sides.pipeline_of(transformers, folder, sides.transformers_model(setting, WORDS))
        found["transformers float32, chunked"] = _hub(pipe, batch_size=BATCH, chunk_length_s=30)
    if "faster-whisper" in setting.against:
        kind = _best_ctranslate2()
        model = sides.faster_model(setting, WORDS, kind)
        options = {"beam_size": 1, "batch_size": BATCH, **GREEDY}
        found[f"faster-whisper {kind}"] = sides.faster_transcriber(model, True, **options)
        found[f"faster-whisper {kind}, windows given"] = lambda audio: sides.faster_transcriber(
            model, True, clip_timestamps=_windows(len(audio)), **options
        )(audio)
    return found


def _windows(samples: int) -> list[dict[str, float]]:
    starts = range(0, samples, 30 * RATE)
    return [{"start": start / RATE, "end": min(start + 30 * RATE, samples) / RATE} for start in starts]


def _best_ctranslate2() -> str:
    return "int8" if "int8" in sides.ctranslate2_kinds() else "float32"


def _hub(pipe: Any, **options: Any) -> Transcribe:
    """The pipeline of audiomm or transformers."""
    # The pipelines search with 5 beams unless told otherwise.
    keywords = {"language": "en", "task": "transcribe", "num_beams": 1}
    return lambda audio: str(pipe(audio.copy(), generate_kwargs=dict(keywords), **options)["text"])


def _own(pipe: Any, with_words: bool) -> Transcribe:
    return _hub(pipe, return_timestamps=True, **({"word_timestamps": True} if with_words else {}))


def _work(setting: Setting, windows: float, batch: int) -> Any:
    """What the model needs for so many windows; features, cutting and text are left out."""
    import audiomm

    config = audiomm.WhisperConfig.from_pretrained(setting.checkpoint(WORDS))
    encoding, decoding = encoder_work(config, batch), decode_work(config, batch, WORDS + 3)
    return added(encoding, decoding, windows / batch)
