"""Speech recognition by asking: a model that writes down what it hears, word for word, and tiny Gemmas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from audiomm.base.errors import InputError
from audiomm.pipelines import PromptedSpeechRecognitionPipeline, pipeline
from audiomm.pipelines.prompted_recognition import is_audible, seam

RATE = 16000
#: Seconds of a spoken word.
WORD = 0.4


class Listener(nn.Module):
    """Hears words: word n is sound of level (n + 1) / 1000 for 0.4 s. What is cut to less than half is not heard."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="gemma4", audio_config=object())
        self.generation_config = SimpleNamespace()
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: torch.Tensor, clips: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls.append({"rows": len(clips), **kwargs})
        rows = []
        for clip in clips:
            words, counts = (clip.abs() * 1000).round().long().unique_consecutive(return_counts=True)
            pairs = zip(words.tolist(), counts.tolist(), strict=True)
            rows.append([word for word, count in pairs if word and count >= WORD / 2 * RATE])
        longest = max(map(len, rows))
        new = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
        return torch.cat([input_ids, new], dim=1)


class Reader:
    """Stands for a processor; remembers the questions."""

    feature_extractor = SimpleNamespace(sampling_rate=RATE)

    def __init__(self) -> None:
        self.tokenizer = self
        self.heard: list[np.ndarray] = []
        self.questions: list[str] = []
        self.options: dict[str, Any] = {}

    def apply_chat_template(self, chats: Any, **options: Any) -> dict[str, Any]:
        self.options = options
        clips = [chat[0]["content"][0]["audio"] for chat in chats]
        self.heard += clips
        self.questions += [chat[0]["content"][1]["text"] for chat in chats]
        size = max(map(len, clips))
        rows = [torch.from_numpy(np.pad(clip, (0, size - len(clip)))) for clip in clips]
        return {"input_ids": torch.zeros(len(clips), 1, dtype=torch.long), "clips": torch.stack(rows)}

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(f"w{int(token) - 1}" for token in tokens if token)


@pytest.fixture
def pipe() -> PromptedSpeechRecognitionPipeline:
    return PromptedSpeechRecognitionPipeline(Listener(), processor=Reader(), device="cpu")


def speech(count: int, gap_seconds: Any = 0.3, first: int = 0) -> np.ndarray:
    """Words with pauses between them."""
    gaps = [gap_seconds] * count if isinstance(gap_seconds, float) else gap_seconds
    parts = []
    for number, gap in enumerate(gaps):
        level = (first + number + 1) / 1000
        parts += [np.full(round(WORD * RATE), level, np.float32), np.zeros(round(gap * RATE), np.float32)]
    return np.concatenate(parts)


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def test_a_long_recording_is_heard_whole_and_once(pipe) -> None:
    generator = np.random.default_rng(4)
    for count in (1, 40, 130):
        recording = speech(count, generator.choice([0.0, 0.2, 0.3, 0.6, 1.5], count).tolist(), first=100)
        assert pipe(recording)["text"] == words(count, first=100)


def test_speech_without_a_pause_is_cut_where_windows_share_words_and_joined_again(pipe) -> None:
    recording = speech(200, 0.0, first=400)
    assert pipe(recording)["text"] == words(200, first=400)
    heard = pipe.processor.heard
    assert len(heard) > 3
    assert max(map(len, heard)) <= 30 * RATE
    assert sum(map(len, heard)) > len(recording)


def test_windows_may_be_shorter_and_never_longer_than_the_model_hears(pipe) -> None:
    recording = speech(60, 0.3, first=100)
    assert pipe(recording, chunk_length_s=8)["text"] == words(60, first=100)
    assert max(map(len, pipe.processor.heard)) <= 8 * RATE
    with pytest.raises(InputError, match=r"chunk_length_s=40: windows of this model last up to 30 s"):
        pipe(recording, chunk_length_s=40)


def test_silence_is_not_asked_about(pipe) -> None:
    for quiet in (np.zeros(0, np.float32), np.zeros(1, np.float32), np.zeros(40 * RATE, np.float32)):
        assert pipe(quiet) == {"text": ""}
    assert pipe(np.zeros(40 * RATE, np.float32), return_timestamps=True) == {"text": "", "chunks": []}
    assert pipe.model.calls == []
    recording = np.concatenate([speech(1, first=100), np.zeros(70 * RATE, np.float32), speech(1, first=101)])
    assert pipe(recording)["text"] == "w100 w101"


def test_steady_noise_and_whispers_are_heard(pipe) -> None:
    assert is_audible(np.full(RATE, 0.1, np.float32), RATE)
    assert is_audible(np.full(50, 0.1, np.float32), RATE)
    assert is_audible(np.full(RATE, 0.0011, np.float32), RATE)
    assert not is_audible(np.full(RATE, 0.0001, np.float32), RATE)
    assert pipe(speech(1, 0.0, first=300))["text"] == "w300"


def test_a_window_shorter_than_a_soft_token_is_filled_up(pipe) -> None:
    pipe(np.full(40, 0.1, np.float32))
    assert [len(clip) for clip in pipe.processor.heard] == [1600]


def test_batches_give_what_windows_give_alone_and_results_keep_their_order(pipe) -> None:
    inputs = [speech(70, 0.3, first=100), np.zeros(RATE, np.float32), speech(3, first=500), speech(150, 0.0, first=600)]
    expected = [words(70, 100), "", words(3, 500), words(150, 600)]
    assert [result["text"] for result in pipe(inputs, batch_size=1)] == expected
    assert {call["rows"] for call in pipe.model.calls} == {1}
    assert [result["text"] for result in pipe(inputs, batch_size=4)] == expected
    assert [result["text"] for result in pipe(iter(inputs), batch_size=3)] == expected
    assert max(call["rows"] for call in pipe.model.calls) >= 3


def test_times_are_those_of_the_windows_in_order_and_within_the_recording(pipe) -> None:
    recording = speech(200, 0.0, first=400)
    chunks = pipe(recording, return_timestamps=True)["chunks"]
    times = [time for chunk in chunks for time in chunk["timestamp"]]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(len(recording) / RATE)
    assert " ".join(chunk["text"] for chunk in chunks) == words(200, first=400)


def test_transcripts_come_typed_too(pipe) -> None:
    transcript = pipe.transcribe(speech(2, first=100), language="german")
    assert transcript.text == "w100 w101"
    assert transcript.language == "de"
    assert transcript.duration_seconds == pytest.approx(1.4)


def test_the_question_says_what_to_do(pipe) -> None:
    recording = speech(1, first=100)
    pipe(recording)
    pipe(recording, language="fr")
    pipe(recording, task="translate", language="german")
    pipe(recording, prompt="Which birds are these?")
    plain, french, german, own = pipe.processor.questions
    assert "word for word" in plain
    assert "in French" in french
    assert "Translate" in german
    assert "in German" in german
    assert own == "Which birds are these?"
    assert pipe.processor.options["enable_thinking"] is False


def test_words_are_the_most_likely_ones_unless_the_call_says_otherwise(pipe) -> None:
    pipe(speech(1, first=100))
    pipe(speech(1, first=100), generate_kwargs={"do_sample": True, "max_new_tokens": 7})
    first, second = pipe.model.calls
    assert (first["do_sample"], first["max_new_tokens"]) == (False, 448)
    assert (second["do_sample"], second["max_new_tokens"]) == (True, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_timestamps": "word"}, r"return_timestamps='word': Listener tells no times of words"),
        ({"task": "summarise"}, r"task='summarise': expected 'transcribe' or 'translate'"),
        ({"language": "klingon"}, r"language='klingon' is not one of the"),
        ({"num_return_sequences": 2}, r"num_return_sequences=2: a recording has one transcript"),
    ],
)
def test_what_such_a_model_cannot_do_is_refused(pipe, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(speech(1, first=100), **options)


def test_a_stride_is_refused(pipe) -> None:
    item = {"raw": speech(2, first=100), "sampling_rate": RATE, "stride": (100, 0)}
    with pytest.raises(InputError, match=r"input 0: 'stride' needs the times of words"):
        pipe(item)


def test_a_model_that_does_not_listen_is_refused() -> None:
    model = Listener()
    model.config.audio_config = None
    with pytest.raises(InputError, match=r"this checkpoint does not listen"):
        PromptedSpeechRecognitionPipeline(model, processor=Reader(), device="cpu")


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("a b c d e", "c d e f g", ("a b c d e", "f g")),
        ("a b the x", "the cat sat", ("a b the x", "the cat sat")),  # one common word proves nothing
        ("a b c d", "x y", ("a b c d", "x y")),
        ("one two Three, four", "three four five", ("one two Three, four", "five")),
        ("", "x y", ("", "x y")),
        ("hello", "hello", ("hello", "")),
    ],
)
def test_a_seam_keeps_every_word_once(left: str, right: str, expected: tuple[str, str]) -> None:
    assert seam(left, right, (0.5, 0.5)) == expected


# ------------------------------------------------------------------------------------------------- tiny Gemmas


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_gemma_transcribes_files_in_batches_as_alone(family, gemma_folders, gemmas, tmp_path: Path) -> None:
    pipe = pipeline("automatic-speech-recognition", model=str(gemma_folders[family]), device="cpu")
    assert isinstance(pipe, PromptedSpeechRecognitionPipeline)
    paths = []
    for number, seconds in enumerate((0.3, 5.2, 1.1)):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], gemmas.noise(seconds, seed=number), RATE)
    options = {"max_new_tokens": 4, "return_timestamps": True}
    alone = [pipe(path, **options) for path in paths]
    assert pipe(paths, batch_size=4, **options) == alone
    assert all(result["text"] for result in alone)
    if family == "gemma3n":
        # 13 places of 160 ms are 2.08 s: the second is heard in windows.
        assert len(alone[1]["chunks"]) > 2
    assert pipe(np.zeros(RATE, np.float32)) == {"text": ""}


def test_a_saved_pipeline_comes_back(gemma_folders, gemmas, tmp_path: Path) -> None:
    pipe = pipeline("automatic-speech-recognition", model=str(gemma_folders["gemma4"]), device="cpu")
    pipe.save_pretrained(tmp_path)
    again = pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")
    clip = gemmas.noise(0.6)
    assert again(clip, max_new_tokens=5) == pipe(clip, max_new_tokens=5)
