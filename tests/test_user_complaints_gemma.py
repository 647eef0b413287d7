"""What users of other libraries reported about Gemma 3n and Gemma 4, each with the test that it does not happen here.

Tested elsewhere:

- trained with `use_cache=False` or checkpointing, the model learns garbage (hf#45242): test_gemma3n_text.py and
  test_gemma4_text.py, "gradients"; with media in the batch: test_gemma_training.py
- `mm_token_type_ids is required` for training on text (hf#45200, trl#5032): test_gemma_training.py
- an "audio fine-tune" trains no audio weights (unsloth notebooks#295): test_gemma_training.py
- audio alone cannot be trained (LlamaFactory#8693), DDP wants `find_unused_parameters` (axolotl#3584):
  test_gemma_training.py
- a short clip hears its longer neighbour (hf#39911, vllm#50957, Qwen3-ASR#207): test_usm.py, test_gemma3n_audio.py,
  test_gemma4_audio.py; at the door: test_prompted_recognition.py
- counts of tokens and features differ on some lengths (hf#39991, hf#48835): test_gemma4_processing.py
- fp16 overflows (hf#27260, keras-hub#2424): "low_precision" in test_gemma3n_text.py, test_gemma4_text.py and the
  conditional models
- garbage from the mixture of experts (mlx#3393): test_experts.py, test_gemma4_text.py
- user text `<|turn>` becomes a control token (google-deepmind/gemma#770): test_gemma3n_processing.py; whole chats below
- wrong rates and stereo are read silently; 8 kHz is nonsense (measured): test_bad_media.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from audiomm.base.errors import AudiommError, InputError
from audiomm.pipelines import pipeline

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False}


@pytest.fixture(params=["gemma3n", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(family: str, gemma_folders: dict[str, Path]) -> Any:
    return pipeline("any-to-any", model=str(gemma_folders[family]), device="cpu")


def heard(clip: Any, words: str = "hello") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio", "audio": clip}, {"type": "text", "text": words}]}]


def test_marks_of_media_are_printed_in_the_answer(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """omlx#1670, google-deepmind/gemma#649: `<audio|>` in the text."""
    tokens = pipe.processor.tokenizer
    marks = [tokens.audio_token_id, tokens.eoa_token_id, tokens.image_token_id, tokens.convert_tokens_to_ids("hello")]

    def generate(**kwargs: Any) -> torch.Tensor:
        return torch.cat([kwargs["input_ids"], torch.tensor([marks])], dim=1)

    monkeypatch.setattr(pipe.model, "generate", generate)
    assert pipe("hi", return_full_text=False) == [{"input_text": "hi", "generated_text": "hello"}]


def test_the_model_thinks_aloud_instead_of_transcribing(gemma_folders, gemmas, monkeypatch) -> None:
    """ollama#16584: thinking on by default gives empty or invented transcripts."""
    pipe = pipeline("automatic-speech-recognition", model=str(gemma_folders["gemma4"]), device="cpu")
    prompts: list[str] = []
    written = "<|channel>thought\nsome voice<channel|>one two<turn|>"
    ids = torch.tensor(pipe.tokenizer(written, add_special_tokens=False).input_ids)

    def generate(**kwargs: Any) -> torch.Tensor:
        prompts.append(pipe.tokenizer.decode(kwargs["input_ids"][0]))
        return torch.cat([kwargs["input_ids"], ids[None]], dim=1)

    monkeypatch.setattr(pipe.model, "generate", generate)
    assert pipe(gemmas.noise(0.5)) == {"text": "one two"}
    assert "<|think|>" not in prompts[0]
    assert prompts[0].endswith("<|channel>thought\n<channel|>")


def test_sound_is_ignored_where_the_processor_file_lacks_the_extractor(gemma_folders, gemmas, tmp_path: Path) -> None:
    """mlx-vlm#903: the answer is about nothing, and nobody is told."""
    for path in gemma_folders["gemma4"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    del settings["feature_extractor"]
    file.write_text(json.dumps(settings))
    pipe = pipeline("any-to-any", model=str(tmp_path), device="cpu")
    with pytest.raises(InputError, match=r"1 clips were passed, but this Gemma4Processor has no feature_extractor"):
        pipe(heard(gemmas.noise()), **GREEDY)
    with pytest.raises(InputError, match=r"does not listen"):
        pipeline("automatic-speech-recognition", model=str(tmp_path), device="cpu")


def test_an_mp3_is_heard_as_something_else_than_a_wav(pipe: Any, tmp_path: Path) -> None:
    """mlx-vlm#676, llama.cpp#21825."""
    times = np.arange(16_000) / 16_000
    clip = (0.3 * np.sin(2 * np.pi * 440 * times) * np.hanning(16_000)).astype(np.float32)
    features = {}
    for kind in ("wav", "mp3", "flac"):
        soundfile.write(tmp_path / f"a.{kind}", clip, 16_000)
        batch = pipe.processor.apply_chat_template(
            heard(str(tmp_path / f"a.{kind}")), tokenize=True, return_dict=True, return_tensors="pt"
        )
        features[kind] = batch["input_features"][0]
    for kind in ("mp3", "flac"):
        shared = min(len(features["wav"]), len(features[kind])) - 10
        wav, other = features["wav"][20:shared], features[kind][20:shared]
        loud = wav > wav.max() - 4
        assert loud.any()
        assert (wav - other)[loud].abs().median() < 0.1


def test_what_is_said_after_thirty_seconds_is_dropped(gemma_folders, gemmas) -> None:
    """mlx-vlm#675, ollama#15427: an error when asked directly; the recognition pipeline hears everything."""
    pipe = pipeline("any-to-any", model=str(gemma_folders["gemma4"]), device="cpu")
    clip = gemmas.noise(31.0)
    with pytest.raises(AudiommError, match=r"clip 0 lasts 31.0 s"):
        pipe(heard(clip), **GREEDY)
    listener = pipeline("automatic-speech-recognition", model=pipe.model, processor=pipe.processor, device="cpu")
    chunks = listener(clip, return_timestamps=True, max_new_tokens=3)["chunks"]
    assert len(chunks) == 2
    assert chunks[-1]["timestamp"][1] == pytest.approx(31.0)


def test_the_second_turn_with_sound_crashes(pipe: Any, gemmas: Any) -> None:
    """llama.cpp#21816."""
    messages: list[dict[str, Any]] = []
    for turn in range(3):
        messages += heard(gemmas.noise(0.4, seed=turn))
        messages = pipe(messages, **(GREEDY | {"return_full_text": True}))[0]["generated_text"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3


def test_control_tokens_that_a_user_types_end_the_turn(pipe: Any, family: str) -> None:
    """google-deepmind/gemma#770."""
    end = {"gemma3n": "<end_of_turn>", "gemma4": "<turn|>"}[family]
    batch = pipe.processor.apply_chat_template(
        [{"role": "user", "content": f"say {end} and {pipe.processor.audio_token}"}], tokenize=True, return_dict=True
    )
    ids = batch["input_ids"][0]
    assert ids.count(pipe.tokenizer.convert_tokens_to_ids(end)) == 1
    assert pipe.tokenizer.audio_token_id not in ids


def test_adapters_cannot_see_the_clipped_layers(gemma_folders) -> None:
    """hf PR 45388: Gemma4ClippableLinear was no `nn.Linear`, and PEFT refused it."""
    pipe = pipeline("any-to-any", model=str(gemma_folders["gemma4"]), device="cpu")
    linears = {name for name, part in pipe.model.named_modules() if isinstance(part, nn.Linear)}
    assert any("audio_tower" in name and name.endswith("self_attn.q_proj") for name in linears)


def test_one_recording_of_a_batch_changes_what_the_others_say(gemma_folders, gemmas, family: str) -> None:
    """vllm#24006, hf#43377."""
    pipe = pipeline("automatic-speech-recognition", model=str(gemma_folders[family]), device="cpu")
    clips = [gemmas.noise(seconds, seed=seed) for seed, seconds in enumerate((0.4, 1.0, 2.0, 0.7))]
    alone = [pipe(clip, max_new_tokens=5)["text"] for clip in clips]
    assert [found["text"] for found in pipe(clips, batch_size=4, max_new_tokens=5)] == alone
    assert [found["text"] for found in pipe(clips[::-1], batch_size=3, max_new_tokens=5)] == alone[::-1]
