"""A tiny random Whisper that talks, and the tokenizer and features it is called with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

#: Id of <|0.00|> in the tiny vocabulary: 0 pad, 2 end, 3 start, 4-6 languages, 7-8 tasks, 76 startofprev, 77 nospeech,
#: 78 notimestamps; a window of 40 frames is 0.4 s, up to 99.
BEGIN = 79


class TinyTokenizer:
    """Token n is the word " wn", with a full stop behind every fifth."""

    timestamp_begin = BEGIN
    eos_token_id = 2
    all_special_ids = (0, 1, 2, 3, 4, 5, 6, 7, 8, 75, 76, 77, 78)

    def __init__(self) -> None:
        words = {f" w{n}." if n % 5 == 0 else f" w{n}": n for n in range(100)}
        self.backend_tokenizer = Tokenizer(models.WordLevel(words, unk_token=" w1"))
        self.backend_tokenizer.decoder = decoders.Fuse()

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        kept = [token for token in tokens if not skip_special_tokens or token not in self.all_special_ids]
        return self.backend_tokenizer.decode(kept, skip_special_tokens=False)

    def get_prompt_ids(self, text: str) -> list[int]:
        return [76, *(int(word.strip("w.")) for word in text.split())]

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|startofprev|>": 76}[token]


@pytest.fixture
def talker(tiny_whisper: Any) -> Any:
    """The tiny model with languages, tasks and timestamps."""
    config = tiny_whisper.generation_config
    config.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=3)
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 4, "<|de|>": 5, "<|fr|>": 6},
        "task_to_id": {"transcribe": 7, "translate": 8},
        "no_timestamps_token_id": BEGIN - 1,
        "prev_sot_token_id": 76,
        "max_initial_timestamp_index": 5,
        "max_length": 32,
    }.items():
        setattr(config, name, value)
    return tiny_whisper


@pytest.fixture
def tiny_processor() -> Any:
    """Features of 8 bins, and the words of the tiny vocabulary."""
    from audiomm import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return SimpleNamespace(tokenizer=TinyTokenizer(), feature_extractor=extractor)


@pytest.fixture
def heard() -> Any:
    """heard(rows, frames, seed): random features (rows, 8, frames)."""

    def make(rows: int, frames: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def lengths() -> Any:
    """lengths(5, 3): the mask of items of 5 and 3 frames."""

    def make(*frames: int) -> torch.Tensor:
        return torch.stack([(torch.arange(max(frames)) < count).long() for count in frames])

    return make


@pytest.fixture
def encoder_batches(talker: Any) -> list[int]:
    """Rows of every call of the encoder."""
    calls: list[int] = []
    talker.get_encoder().register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    return calls


@pytest.fixture
def prompts(talker: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The prompts of every pass of the decoder, all rows."""
    seen: list[list[list[int]]] = []
    inner = type(talker).prefill

    def spy(self: Any, input_ids: torch.Tensor, cache: Any, **inputs: Any) -> Any:
        seen.append(input_ids.tolist())
        return inner(self, input_ids, cache, **inputs)

    monkeypatch.setattr(type(talker), "prefill", spy)
    return seen
