"""The model that ships with the package: what it hears in the recordings beside it, and what it does not hear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiomm import AutomaticSpeechRecognitionPipeline, pipeline
from audiomm.base.hub import BUNDLED_MODELS

ROOT = Path(__file__).parents[2]
AUDIO = ROOT / "examples" / "audio"
FOLDER = BUNDLED_MODELS["audiomm/whisper-commands"]
ROW = re.compile(r"^\| `(\w+\.flac)` \|[^|]*\|[^|]*\| (.+) \|$", re.MULTILINE)
WORD = re.compile(r"(zero|one|two|three|four|five|six|seven|eight|nine) (\d+\.\d\d)")

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="the bundled model is not in this checkout"
)


@pytest.fixture(scope="module")
def transcribe() -> AutomaticSpeechRecognitionPipeline:
    return pipeline("automatic-speech-recognition", device="cpu")


def said() -> dict[str, list[tuple[str, float]]]:
    """What the card of the recordings says: words and when they start, by file name."""
    card = (AUDIO / "README.md").read_text(encoding="utf-8")
    return {name: [(word, float(start)) for word, start in WORD.findall(text)] for name, text in ROW.findall(card)}


def test_the_card_of_the_recordings_lists_them_all() -> None:
    assert set(said()) == {path.name for path in AUDIO.glob("*.flac")}
    assert all(len(words) >= 7 for words in said().values())


@pytest.mark.parametrize("name", ["phone_number.flac", "pi.flac", "two_voices.flac"])
def test_the_recordings_are_written_down_word_for_word_at_their_times(
    transcribe: AutomaticSpeechRecognitionPipeline, name: str
) -> None:
    words, starts = zip(*said()[name], strict=True)
    assert transcribe(AUDIO / name)["text"].split() == list(words)
    chunks: list[dict[str, Any]] = transcribe(AUDIO / name, return_timestamps=True)["chunks"]
    assert [chunk["text"].strip() for chunk in chunks] == list(words)
    errors = [abs(chunk["timestamp"][0] - start) for chunk, start in zip(chunks, starts, strict=True)]
    assert np.median(errors) <= 0.1
    assert all(begin < end for begin, end in (chunk["timestamp"] for chunk in chunks))


@pytest.mark.parametrize("where", ["audiomm/whisper-commands", FOLDER], ids=["name", "folder"])
def test_a_model_that_drafts_may_be_named(transcribe: AutomaticSpeechRecognitionPipeline, where: Any) -> None:
    helped = pipeline("automatic-speech-recognition", device="cpu", assistant_model=where)
    recording = AUDIO / "phone_number.flac"
    # The five beams that nobody asked for stand back.
    assert helped(recording) == transcribe(recording, num_beams=1)
    drafter = helped.call_defaults["assistant_model"]
    assert transcribe(recording, generate_kwargs={"assistant_model": drafter}) == helped(recording)
    assert transcribe(recording, prompt_lookup_num_tokens=3) == helped(recording)
    assert drafter is not helped.model and (drafter.dtype, drafter.device) == (helped.dtype, helped.device)


@pytest.mark.parametrize(("seconds", "level"), [(1, 0.0), (12, 0.0), (3, 0.001), (10, 0.05), (20, 0.3)])
def test_silence_and_noise_give_no_words(
    transcribe: AutomaticSpeechRecognitionPipeline, seconds: int, level: float
) -> None:
    noise = np.random.default_rng(seconds).standard_normal(seconds * 16_000).astype(np.float32) * np.float32(level)
    assert transcribe({"array": noise, "sampling_rate": 16_000})["text"] == ""


def test_the_folder_is_small_and_says_under_which_licence_it_is() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000
    assert "CC BY-SA 4.0" in (FOLDER / "LICENSE.md").read_text(encoding="utf-8")
    assert "Free Spoken Digit Dataset" in (FOLDER / "README.md").read_text(encoding="utf-8")
