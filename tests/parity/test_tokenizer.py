"""Tokenizer, normalisers and processor: files both ways, the same ids and the same text over random strings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

VOCABULARIES = ["whisper-multilingual", "whisper-en"]
PIECES = [
    "hello", " world", "  ", "\n", "\t", "don't", "we'LL", "naïve", "Zürich", "日本語", "한국어", "العربية", "ไทย",
    "🎧🎙️", "e\u0301", "1,234.5", "$20", "…", "—", "<|en|>", "<|0.00|>", "<|endoftext|>", "<|", "|>", "\u200b", "\x00",
    "ﬁ", "A", "z", "'s",
]  # fmt: skip


def text(choose: random.Random) -> str:
    if choose.random() < 0.3:
        return "".join(chr(choose.choice([choose.randrange(32, 127), choose.randrange(160, 0x2FFF)])) for _ in range(9))
    return "".join(choose.choice(PIECES) for _ in range(choose.randrange(0, 12)))


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizers(request: Any, reference: Any, golden: Path) -> tuple[Any, Any]:
    """(the reference's tokenizer, ours) of one published vocabulary."""
    folder = golden / "tokenizers" / request.param
    return reference.WhisperTokenizer.from_pretrained(folder), audiomm.WhisperTokenizer.from_pretrained(folder)


def test_random_strings_give_the_same_ids(tokenizers: tuple[Any, Any]) -> None:
    theirs, ours = tokenizers
    choose = random.Random(0)
    for _ in range(300):
        words = text(choose)
        for special in (True, False):
            assert (
                theirs(words, add_special_tokens=special).input_ids == ours(words, add_special_tokens=special).input_ids
            ), repr(words)
        assert theirs.tokenize(words) == ours.tokenize(words), repr(words)


def test_batches_are_padded_and_cut_alike(tokenizers: tuple[Any, Any]) -> None:
    theirs, ours = tokenizers
    choose = random.Random(1)
    for _ in range(20):
        words = [text(choose) for _ in range(4)]
        for options in ({"padding": True}, {"padding": "max_length", "max_length": 24, "truncation": True}):
            one, other = (dict(t(words, return_tensors="pt", **options)) for t in (theirs, ours))
            assert sorted(one) == sorted(other)
            assert all(one[name].tolist() == other[name].tolist() for name in one), (words, options)


def test_random_ids_give_the_same_text(tokenizers: tuple[Any, Any]) -> None:
    theirs, ours = tokenizers
    choose = random.Random(2)
    size = len(theirs)
    for _ in range(300):
        ids = [choose.choice([choose.randrange(size), choose.randrange(400), size - 1 - choose.randrange(1501)])
               for _ in range(choose.randrange(14))]  # fmt: skip
        for options in ({}, {"skip_special_tokens": True}, {"decode_with_timestamps": True}):
            assert theirs.decode(ids, **options) == ours.decode(ids, **options), (ids, options)


def test_prefixes_prompts_and_tokens_are_the_same(tokenizers: tuple[Any, Any]) -> None:
    theirs, ours = tokenizers
    assert len(theirs) == len(ours)
    assert theirs.get_prompt_ids(" names: Zürich").tolist() == ours.get_prompt_ids(" names: Zürich").tolist()
    assert theirs.all_special_ids == ours.all_special_ids
    for index in (0, 1, 220, 50256, 50257, 50258, 50300, 50363, 50364, len(theirs) - 1):
        assert theirs.convert_ids_to_tokens(index) == ours.convert_ids_to_tokens(index)
    for language, task in ((None, None), ("german", "transcribe"), ("zh", "translate")):
        for stamps in (False, True):
            options = {"language": language, "task": task, "predict_timestamps": stamps}
            theirs.set_prefix_tokens(**options), ours.set_prefix_tokens(**options)
            assert theirs.prefix_tokens == ours.prefix_tokens, options
            assert theirs("hi there").input_ids == ours("hi there").input_ids


def test_files_go_both_ways(tokenizers: tuple[Any, Any], reference: Any, tmp_path: Path) -> None:
    theirs, ours = tokenizers
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    from_theirs = audiomm.WhisperTokenizer.from_pretrained(tmp_path / "theirs")
    from_ours = reference.WhisperTokenizer.from_pretrained(tmp_path / "ours")
    choose = random.Random(3)
    for _ in range(60):
        words = text(choose)
        assert from_theirs(words).input_ids == from_ours(words).input_ids == theirs(words).input_ids
    assert len(from_theirs) == len(from_ours) == len(theirs)


def test_normalisers_agree(tokenizers: tuple[Any, Any]) -> None:
    theirs, ours = tokenizers
    choose = random.Random(4)
    words = ["mr.", "Dr.", "twenty", "one", "hundred", "and", "five", "$", "percent", "colour", "don't", "won't", "2nd",
             "third", "half", "o'clock", "(laughs)", "[noise]", "uh", "um,", "£20", "million", "point", "-", "minus",
             "é", "it's", "1990s", "grey", "double", "zero", "oh", "seven", "cents", "euros", "1,000",
             "3.50", "I'd", "let's", "ain't"]  # fmt: skip
    for _ in range(400):
        phrase = " ".join(choose.choice(words) for _ in range(choose.randrange(1, 9)))
        assert theirs.normalize(phrase) == ours.normalize(phrase), phrase
        other = text(choose)
        assert theirs.basic_normalize(other) == ours.basic_normalize(other), repr(other)
        assert theirs.basic_normalize(other, remove_diacritics=True) == ours.basic_normalize(
            other, remove_diacritics=True
        ), repr(other)


def test_processors_go_both_ways(reference: Any, golden: Path, tmp_path: Path) -> None:
    tokenizer = reference.WhisperTokenizer.from_pretrained(golden / "tokenizers" / "whisper-multilingual")
    theirs = reference.WhisperProcessor(reference.WhisperFeatureExtractor(feature_size=128), tokenizer)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = audiomm.WhisperProcessor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = reference.WhisperProcessor.from_pretrained(tmp_path / "ours")
    wave = np.sin(np.arange(8000, dtype=np.float32))
    batches = [p(audio=wave, sampling_rate=16000, return_tensors="pt") for p in (theirs, ours, back)]
    for batch in batches[1:]:
        assert float((batch["input_features"] - batches[0]["input_features"]).abs().max()) <= 1e-4
    labels = [p(text="It's 5 o'clock.").input_ids for p in (theirs, ours, back)]
    assert labels[0] == labels[1] == labels[2]
    assert ours.feature_extractor.feature_size == back.feature_extractor.feature_size == 128


def test_a_small_vocabulary_of_ones_own_works_in_both(reference: Any, tmp_path: Path) -> None:
    """Byte-level BPE with two merges and Whisper's special tokens behind it; no published file is needed."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "he", "hel"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("he", "l")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>",
             "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    core.add_special_tokens([AddedToken(name, special=True) for name in names])
    core.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>") for step in range(1501)])
    core.save(str(tmp_path / "tokenizer.json"))
    end = "<|endoftext|>"
    settings = {f"{name}_token": end for name in ("bos", "eos", "pad", "unk")} | {"tokenizer_class": "WhisperTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = reference.WhisperTokenizer.from_pretrained(tmp_path)
    ours = audiomm.WhisperTokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    back = reference.WhisperTokenizer.from_pretrained(tmp_path / "ours")
    choose = random.Random(5)
    for _ in range(60):
        words = text(choose)
        ids = theirs(words).input_ids
        assert ids == ours(words).input_ids == back(words).input_ids, repr(words)
        assert theirs.decode(ids) == ours.decode(ids) == back.decode(ids), repr(words)
