"""What users of Whisper complained about, one short test each, named after what they saw.

The list is that of the most painful reports about transformers, openai-whisper and faster-whisper. Each behaviour has
closer tests where it is made; here the user's own call must not show it. Where a model would have to misbehave, a
script writes its tokens.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm import AutoModelForSpeechSeq2Seq, CheckpointMismatchError, NonFiniteAudioError, pipeline
from audiomm.base.errors import AudioLayoutError, InputError
from audiomm.base.hub import BUNDLED_MODELS

ROOT = Path(__file__).parents[1]
FOLDER = BUNDLED_MODELS["audiomm/whisper-commands"]
RATE = 16000
PI = ["three", "one", "four", "one", "five", "nine", "two", "six"]

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="the bundled model is not in this checkout"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline("automatic-speech-recognition", device="cpu", num_beams=1)


@pytest.fixture(scope="module")
def pi() -> np.ndarray:
    return soundfile.read(ROOT / "examples" / "audio" / "pi.flac", dtype="float32")[0]


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


class Script:
    """Writes the tokens of the scripts, one a pass over a window, instead of the model."""

    def __init__(self, pipe: Any, *texts: str) -> None:
        self.tokenizer, self.texts, self.passes, self.length = pipe.tokenizer, texts, -1, 1 << 30

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] <= self.length:
            self.passes += 1
            self.start = input_ids.shape[1]
        self.length = input_ids.shape[1]
        text = self.texts[min(self.passes, len(self.texts) - 1)]
        tokens = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, tokens[min(self.length - self.start, len(tokens) - 1)]] = 0.0
        return forced


# ---------------------------------------------------------------------- wrong words


@pytest.mark.parametrize("options", [{}, {"chunk_length_s": 5}, {"vad_filter": True}, {"return_timestamps": True}])
def test_silence_gives_thank_you(pipe: Any, options: dict[str, Any]) -> None:
    assert pipe(silence(12), **options)["text"] == ""


def test_the_thresholds_have_no_effect_with_chunk_length_s(pipe: Any) -> None:
    script = Script(pipe, "<|0.00|> one<|1.00|>")
    options = {"no_speech_threshold": -1.0, "logprob_threshold": 1.0, "logits_processor": [script]}
    assert pipe(silence(12), chunk_length_s=5, return_timestamps=True, **options)["text"] == ""


@pytest.mark.parametrize("seconds", [24.4, 40.0, 62.0])
def test_what_comes_after_30_seconds_is_dropped(pipe: Any, pi: np.ndarray, seconds: float) -> None:
    samples = np.concatenate([silence(seconds), pi])
    for options in ({}, {"batch_size": 2}):
        assert pipe(samples, **options)["text"].split() == PI


def test_the_same_phrase_is_repeated_for_minutes(pipe: Any, pi: np.ndarray) -> None:
    loop = "<|0.00|>" + " one" * 60 + "<|5.00|>"
    script = Script(pipe, loop, "<|0.00|> two six<|5.00|>")
    options = {"temperature": (0.0, 0.4), "compression_ratio_threshold": 1.35, "return_timestamps": True}
    assert pipe(pi, logits_processor=[script], **options)["text"] == " two six"
    assert script.passes == 1


def test_one_temperature_of_zero_skips_windows_that_fail(pipe: Any, pi: np.ndarray) -> None:
    script = Script(pipe, "<|0.00|>" + " one" * 60 + "<|5.00|>")
    found = pipe(pi, logits_processor=[script], temperature=0.0, compression_ratio_threshold=1.35)
    assert found["text"].startswith(" one one")


def test_the_prompt_is_printed_in_the_transcript(pipe: Any, pi: np.ndarray) -> None:
    short, long = (pipe(pi, initial_prompt=" nine" * count, max_new_tokens=40)["text"] for count in (2, 1000))
    assert not short.startswith(" nine nine")
    assert len(long.split()) <= 20


def test_words_are_lost_or_doubled_where_windows_meet(pipe: Any, pi: np.ndarray) -> None:
    for pause in (0.7, 0.9):
        samples = np.concatenate([part for _ in range(5) for part in (pi, silence(pause))])
        together, alone = (pipe(samples, batch_size=size)["text"].split() for size in (4, 1))
        assert together == alone == PI * 5


# ---------------------------------------------------------------------- wrong times


@pytest.mark.parametrize("kind", [True, "word"])
@pytest.mark.parametrize("seconds", [1.3, 3.33, 5.0])
def test_times_are_behind_the_end_or_missing_or_go_backwards(
    pipe: Any, pi: np.ndarray, seconds: float, kind: Any
) -> None:
    samples = pi[: round(seconds * RATE)]
    for found in (pipe(samples, return_timestamps=kind), pipe(samples, return_timestamps=kind, word_timestamps=None)):
        times = [time for chunk in found["chunks"] for time in chunk["timestamp"]]
        assert times
        assert None not in times
        assert times == sorted(times)
        assert 0 <= times[0] <= times[-1] <= seconds
        assert "".join(chunk["text"] for chunk in found["chunks"]) == found["text"]


def test_word_times_crash_with_beams_and_in_long_audio(pipe: Any, pi: np.ndarray) -> None:
    samples = np.concatenate([pi, silence(26), pi[: 2 * RATE]])
    found = pipe.transcribe(samples, return_timestamps="word", num_beams=3)
    assert [word.text.strip() for word in found.words][: len(PI)] == PI
    assert all(0 <= word.start <= word.end <= len(samples) / RATE for word in found.words)


# ---------------------------------------------------------------------- languages


def test_the_language_that_was_heard_is_not_told(pipe: Any, pi: np.ndarray) -> None:
    assert pipe.transcribe(pi).language == "en"
    assert pipe(pi, return_language=True)["chunks"][0]["language"] == "english"


def test_a_batch_cannot_have_several_languages(pipe: Any, pi: np.ndarray) -> None:
    found = pipe([pi, pi], batch_size=2, generate_kwargs={"language": ["english", None]})
    assert [one["text"].split() for one in found] == [PI, PI]


# ---------------------------------------------------------------------- batches


def test_a_clip_is_heard_otherwise_beside_a_longer_one(pipe: Any, pi: np.ndarray) -> None:
    clips = [pi[: round(seconds * RATE)] for seconds in (0.4, 1.0, 2.7)]
    assert pipe(clips, batch_size=3, return_timestamps=True) == [pipe(clip, return_timestamps=True) for clip in clips]


def test_results_are_of_another_kind_for_long_audio_or_with_other_options(pipe: Any, pi: np.ndarray) -> None:
    for samples in (pi[: 2 * RATE], np.concatenate([silence(29), pi[: 2 * RATE]])):
        for options in ({}, {"chunk_length_s": 20}, {"num_beams": 2}, {"batch_size": 2}, {"temperature": (0.0, 0.2)}):
            found = pipe(samples, return_timestamps=True, **options)
            assert (type(found), set(found)) == (dict, {"text", "chunks"})
        features = pipe.feature_extractor(
            samples, sampling_rate=RATE, return_tensors="pt", truncation=False,
            padding="longest" if len(samples) > 30 * RATE else "max_length",
        ).input_features  # fmt: skip
        assert isinstance(pipe.model.generate(features), torch.Tensor)


def test_a_static_cache_changes_the_text(pipe: Any, pi: np.ndarray) -> None:
    assert pipe(pi, cache_implementation="static") == pipe(pi)


def test_threads_get_each_others_words(pipe: Any, pi: np.ndarray) -> None:
    clips = [pi, pi[: 2 * RATE], silence(3), pi[2 * RATE :]]
    alone = [pipe(clip, return_timestamps=True) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda clip: pipe(clip, return_timestamps=True), clips)) == alone


def test_a_transcription_cannot_be_stopped(pipe: Any, pi: np.ndarray) -> None:
    steps = []

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        steps.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(steps) >= 3)

    assert len(pipe(pi, stopping_criteria=[stop])["text"].split()) < len(PI)
    assert len(steps) == 3


# ---------------------------------------------------------------------- input


def test_one_bad_sample_gives_exclamation_marks_for_ever(pipe: Any, pi: np.ndarray) -> None:
    bad = pi.copy()
    bad[4321] = np.inf
    with pytest.raises(NonFiniteAudioError, match="sample 4321"):
        pipe(bad)


def test_stereo_is_taken_for_thousands_of_clips_and_fills_the_memory(pipe: Any, pi: np.ndarray) -> None:
    assert pipe(np.stack([pi, pi], axis=1))["text"].split() == PI
    with pytest.raises(AudioLayoutError, match="mono"):
        pipe.feature_extractor(np.stack([pi, pi], axis=1), sampling_rate=RATE)


@pytest.mark.parametrize("count", [0, 1, 159, 320])
def test_hardly_any_audio_is_an_error_from_deep_inside(pipe: Any, count: int, caplog: Any) -> None:
    assert pipe(np.zeros(count, np.float32), return_timestamps="word") == {"text": "", "chunks": []}
    assert f"{count} samples are less than 0.1 s" in caplog.text


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_nothing_works_without_ffmpeg_or_torchaudio(
    pipe: Any, pi: np.ndarray, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torchaudio", "torchcodec", "librosa", "ffmpeg", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", "")
    places = np.linspace(0, len(pi) - 1, round(len(pi) * rate / RATE))
    file = io.BytesIO()
    soundfile.write(file, np.interp(places, np.arange(len(pi)), pi), rate, format="wav")
    words = pipe(file.getvalue())["text"].split()
    assert words == PI


def test_the_documented_calls_warn(pipe: Any, pi: np.ndarray, recwarn: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        pipe(pi, return_timestamps="word")
        pipe(np.concatenate([pi, silence(27)]))
    assert (list(recwarn), caplog.records) == ([], [])


# ---------------------------------------------------------------------- models


def test_a_local_model_asks_the_hub(monkeypatch: pytest.MonkeyPatch, pi: np.ndarray) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    local = pipeline("automatic-speech-recognition", model=str(FOLDER), device="cpu", num_beams=1)
    assert local(pi[: 2 * RATE])["text"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


def test_weights_that_are_missing_are_made_up(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "decoder_layers": config["decoder_layers"] + 1}))
    with pytest.raises(CheckpointMismatchError, match="missing"):
        AutoModelForSpeechSeq2Seq.from_pretrained(copied)


def test_a_fine_tuned_model_with_old_forced_tokens_cannot_be_told_a_language(copied: Path, pi: np.ndarray) -> None:
    config = json.loads((copied / "config.json").read_text())
    generation = json.loads((copied / "generation_config.json").read_text())
    forced = [[1, None], [2, generation["task_to_id"]["transcribe"]]]
    (copied / "config.json").write_text(json.dumps({**config, "forced_decoder_ids": forced, "max_length": 448}))
    old = pipeline("automatic-speech-recognition", model=str(copied), device="cpu", num_beams=1)
    assert old(pi, language="english")["text"].split() == PI
    old.save_pretrained(copied / "again")
    assert "forced_decoder_ids" not in json.loads((copied / "again" / "generation_config.json").read_text())


def test_labels_that_are_too_long_end_in_an_error_of_the_device(pipe: Any) -> None:
    longest = pipe.model.config.max_target_positions
    labels = torch.ones(1, longest + 1, dtype=torch.long)
    with pytest.raises(InputError, match=str(longest)):
        pipe.model(input_features=torch.zeros(1, pipe.model.config.num_mel_bins, 3000), labels=labels)
