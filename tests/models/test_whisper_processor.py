"""WhisperProcessor: clips and texts in one call, both file layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from audiomm.base.errors import CheckpointNotFoundError, InputError
from audiomm.feature_extraction import WhisperFeatureExtractor
from audiomm.models.whisper.processing import WhisperProcessor
from audiomm.models.whisper.tokenizer import WhisperTokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|fr|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]


@pytest.fixture
def tokenizer() -> WhisperTokenizer:
    """Bytes as tokens, and Whisper's special ones."""
    backend = Tokenizer(BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", normalized=False) for step in range(1501)])
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return WhisperTokenizer(tokenizer_object=backend, **ends)


@pytest.fixture
def processor(tokenizer) -> WhisperProcessor:
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer)


@pytest.fixture
def clip() -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(8000) * 0.1).astype(np.float32)


def test_clips_alone_are_features(processor, clip):
    batch = processor(clip, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    assert batch.input_features.shape == (1, 80, 100)
    assert batch.attention_mask.sum() == 50
    assert torch.equal(
        batch.input_features, processor(audio=[clip], sampling_rate=16000, return_tensors="pt").input_features
    )


def test_texts_alone_are_ids(processor):
    encoding = processor(text=["no", "hello"], padding=True, return_tensors="pt")
    assert encoding["input_ids"].shape[0] == 2
    assert encoding["input_ids"].shape == encoding["attention_mask"].shape


def test_clips_with_texts_have_labels_and_keep_their_window(processor, clip):
    batch = processor(audio=[clip, clip], text=["no", "hello"], sampling_rate=16000, padding=True, return_tensors="pt")
    assert sorted(batch) == ["input_features", "labels"]
    assert batch.input_features.shape == (2, 80, 100)
    assert processor.batch_decode(batch.labels, skip_special_tokens=True) == ["no", "hello"]
    assert processor.decode(batch.labels[1], skip_special_tokens=True) == "hello"


def test_options_can_be_meant_for_one_part(processor, clip):
    batch = processor(
        clip,
        "no",
        sampling_rate=16000,
        audio_kwargs={"padding": "longest"},
        text_kwargs={"add_special_tokens": False},
    )
    assert batch.input_features.shape == (1, 80, 50)
    assert len(batch.labels) == 2


def test_nothing_is_an_error(processor):
    with pytest.raises(InputError, match="pass audio=, text= or both"):
        processor()


def test_prompts_come_from_the_tokenizer(processor, tokenizer):
    ids = processor.get_decoder_prompt_ids(language="fr", task="transcribe")
    names = [tokenizer.convert_ids_to_tokens(number) for _, number in ids]
    assert names == ["<|fr|>", "<|transcribe|>", "<|notimestamps|>"]
    assert processor.get_prompt_ids("hi")[0] == tokenizer.convert_tokens_to_ids("<|startofprev|>")


def test_input_names_are_listed_once(processor):
    assert processor.model_input_names == ["input_features", "input_ids", "attention_mask"]


@pytest.mark.parametrize("legacy_format", [False, True])
def test_both_file_layouts_come_back(legacy_format, processor, tmp_path):
    written = processor.save_pretrained(tmp_path, legacy_format=legacy_format)
    name = "preprocessor_config.json" if legacy_format else "processor_config.json"
    assert str(tmp_path / name) in written
    assert {path.name for path in tmp_path.glob("*processor_config.json")} == {name}
    loaded = WhisperProcessor.from_pretrained(tmp_path, language="fr", task="transcribe", feature_size=128)
    assert loaded.tokenizer.language == "fr"
    assert loaded.feature_extractor.feature_size == 128
    assert loaded.feature_extractor.n_samples == 16_000
    assert repr(loaded).startswith("WhisperProcessor:\n- feature_extractor: WhisperFeatureExtractor {")


def test_processor_config_keeps_what_it_does_not_know(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    saved = json.loads(path.read_text())
    assert saved["processor_class"] == "WhisperProcessor"
    assert saved["feature_extractor"]["feature_extractor_type"] == "WhisperFeatureExtractor"
    path.write_text(json.dumps({**saved, "note": 5}))
    assert WhisperProcessor.from_pretrained(tmp_path).to_dict() == {**saved, "note": 5}


def test_missing_parts_are_told(processor, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="tokenizer is a int; WhisperProcessor needs a WhisperTokenizer"):
        WhisperProcessor(WhisperFeatureExtractor(), 5)
    with pytest.raises(TypeError):
        WhisperProcessor(WhisperFeatureExtractor())
    with pytest.raises(CheckpointNotFoundError):
        WhisperProcessor.from_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        WhisperProcessor.from_pretrained(tmp_path)
