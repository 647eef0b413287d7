"""Live transcription by a Gemma 4: the stream's soft tokens are the recording's, and words settle in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.errors import InputError
from audiomm.pipelines import pipeline
from audiomm.pipelines.live_prompted import PromptedLiveTranscriber

RATE = 16_000


@pytest.fixture(scope="module")
def pipe(gemma_folders: dict[str, Path]) -> Any:
    return pipeline("automatic-speech-recognition", model=str(gemma_folders["gemma4"]), device="cpu")


def test_the_end_of_a_stream_says_what_the_whole_recording_says(pipe: Any, gemmas: Any) -> None:
    clip = gemmas.noise(2.3)
    expected = " ".join(pipe(clip, max_new_tokens=6)["text"].split())
    for sizes in (4000, 48_000):
        live = PromptedLiveTranscriber(pipe, step_seconds=5.0, max_new_tokens=6)
        updates = list(live.listen(clip[start : start + sizes] for start in range(0, len(clip), sizes)))
        assert [update.text.strip() for update in updates] == [expected]
        assert updates[-1].seconds == pytest.approx(2.3)


class Scripted:
    """Stands for `generate`: a word for each half second of sound, the newest one still uncertain."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.counts: list[int] = []

    def __call__(self, ids: torch.Tensor, mm_encoder_outputs: dict[str, Any], **_: Any) -> torch.Tensor:
        tokens = mm_encoder_outputs["audio"].pooler_output.shape[1]
        assert int((ids == self.pipe.tokenizer.audio_token_id).sum()) == tokens
        self.counts.append(tokens)
        words = [f"w{number}" for number in range(tokens // 12)]
        text = " ".join([*words, f"x{tokens}"])
        written = self.pipe.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([ids, written], dim=1)


def test_words_settle_when_two_steps_agree_and_at_pauses(pipe: Any, gemmas: Any, monkeypatch: Any) -> None:
    script = Scripted(pipe)
    monkeypatch.setattr(pipe.model, "generate", script)
    live = PromptedLiveTranscriber(pipe, step_seconds=1.0)
    stream = np.concatenate([np.zeros(2 * RATE, np.float32), gemmas.noise(3.0), np.zeros(2 * RATE, np.float32)])
    updates = [update for start in range(0, len(stream), 5000) for update in live.push(stream[start : start + 5000])]
    assert [update.text for update in updates[:3]] == ["", "", ""]
    assert updates[2].pending.startswith(" w0 w1")
    assert updates[3].text == " w0 w1"
    settled = "".join(update.text for update in [*updates, live.finish()]).split()
    assert settled[:6] == [f"w{number}" for number in range(6)]
    assert len(settled) == len(set(settled))
    # Silence before and after is not asked about, and every step reads more of the same recording.
    assert script.counts == sorted(script.counts)
    assert len(script.counts) == 4


def test_nothing_said_is_nothing_written(pipe: Any, monkeypatch: Any) -> None:
    script = Scripted(pipe)
    monkeypatch.setattr(pipe.model, "generate", script)
    live = PromptedLiveTranscriber(pipe)
    assert all(update.text == "" for update in live.listen([np.zeros(3 * RATE, np.float32)]))
    assert script.counts == []
    with pytest.raises(InputError, match=r"this stream is finished"):
        live.push(np.zeros(10, np.float32))


def test_long_speech_is_settled_before_it_fills_a_window(pipe: Any, gemmas: Any, monkeypatch: Any) -> None:
    script = Scripted(pipe)
    monkeypatch.setattr(pipe.model, "generate", script)
    live = PromptedLiveTranscriber(pipe, step_seconds=2.0, chunk_length_s=8)
    list(live.listen([gemmas.noise(21.0)]))
    assert max(script.counts) <= 200  # 8 s
    assert script.counts.count(max(script.counts)) > 1


def test_streams_and_models_that_do_not_fit_are_refused(pipe: Any, gemma_folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"step_seconds=30: accepted are 0.1 to 10"):
        PromptedLiveTranscriber(pipe, step_seconds=30)
    live = PromptedLiveTranscriber(pipe)
    with pytest.raises(InputError, match=r"a piece of a stream has shape \(2, 3\)"):
        live.push(np.zeros((2, 3), np.float32))
    other = pipeline("automatic-speech-recognition", model=str(gemma_folders["gemma3n"]), device="cpu")
    with pytest.raises(InputError, match=r"Gemma3nForConditionalGeneration cannot encode a stream"):
        PromptedLiveTranscriber(other)
