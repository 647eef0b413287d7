"""Transcripts of overlapping chunks joined into one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from audiomm.base.errors import InputError
from audiomm.models.whisper.merging import join_overlapping
from audiomm.models.whisper.tokenizer import WhisperTokenizer

SPECIALS = ["endoftext", "startoftranscript", "en", "fr", "zh", "translate", "transcribe", "startofprev"]
SPECIALS += ["notimestamps"]


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    vocab = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab, [], predict_timestamps=True, **_specials())
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    return tokenizer


def _specials() -> dict[str, object]:
    tokens = [f"<|{name}|>" for name in SPECIALS]
    return {"additional_special_tokens": tokens, "pad_token": "<|endoftext|>"}


def chunk(tokenizer: WhisperTokenizer, text: str, stride: tuple[float, float, float] | None = None, times=None) -> dict:
    ids = tokenizer.encode(text, add_special_tokens=False)
    output = {"tokens": np.array([ids])}
    if stride is not None:
        output["stride"] = stride
    if times is not None:
        output["token_timestamps"] = torch.tensor([times])
    return output


def merge(tokenizer, outputs, return_timestamps=None, return_language=None):
    return tokenizer._decode_asr(
        outputs, return_timestamps=return_timestamps, return_language=return_language, time_precision=0.02
    )


def test_the_shared_words_of_neighbours_are_said_once(tokenizer):
    chunks = [
        chunk(tokenizer, "the quick brown fox", (30.0, 0.0, 5.0)),
        chunk(tokenizer, "brown fox jumps over", (30.0, 5.0, 5.0)),
        chunk(tokenizer, "jumps over the dog", (20.0, 5.0, 0.0)),
    ]
    assert merge(tokenizer, chunks) == ("the quick brown fox jumps over the dog", {})


def test_an_overlap_with_a_mistake_is_cut_in_its_middle():
    left, right = [1, 2, 3, 4, 5, 6, 99], [4, 5, 6, 7, 8, 9]
    assert join_overlapping([(left, []), (right, [])]) == ([1, 2, 3, 4, 5, 6, 7, 8, 9], [])
    assert join_overlapping([([1, 2], []), ([3, 4], [])])[0] == [1, 2, 3, 4]
    assert join_overlapping([([1, 2], [])])[0] == [1, 2]


def test_one_shared_token_is_no_overlap():
    assert join_overlapping([([1, 2, 3], []), ([3, 4, 5], [])])[0] == [1, 2, 3, 3, 4, 5]


def test_with_times_only_tokens_that_do_not_go_back_are_shared():
    left, right = [1, 2, 3], [2, 3, 4]
    agreeing = join_overlapping([(left, [(0, 1), (1, 2), (2, 3)]), (right, [(1, 2), (2, 3), (3, 4)])])
    assert agreeing == ([1, 2, 3, 4], [(0, 1), (1, 2), (2, 3), (3, 4)])
    tokens, times = join_overlapping([(left, [(10, 11), (11, 12), (12, 13)]), (right, [(1, 2), (2, 3), (3, 4)])])
    assert tokens == [1, 2, 3, 2, 3, 4]
    assert len(times) == 6


def test_times_count_from_the_start_of_the_whole_and_strides_are_left_out(tokenizer):
    chunks = [
        chunk(tokenizer, "<|0.00|>one<|10.00|><|10.00|>two<|24.00|><|24.00|>three<|29.00|>", (30.0, 0.0, 5.0)),
        chunk(tokenizer, "<|4.00|>three<|9.00|><|9.00|>four<|18.00|>", (20.0, 5.0, 0.0)),
    ]
    text, extra = merge(tokenizer, chunks, return_timestamps=True)
    assert text == "onetwothreefour"
    assert [(piece["text"], piece["timestamp"]) for piece in extra["chunks"]] == [
        ("one", (0.0, 10.0)),
        ("two", (10.0, 24.0)),
        ("three", (24.0, 29.0)),
        ("four", (29.0, 38.0)),
    ]
    assert all(set(piece) == {"text", "timestamp"} for piece in extra["chunks"])


def test_text_without_an_end_time_is_kept_and_reported(tokenizer, caplog):
    text, extra = merge(tokenizer, [chunk(tokenizer, "<|0.00|>one<|2.00|><|2.00|>two")], return_timestamps=True)
    assert text == "onetwo"
    assert extra["chunks"][-1] == {"text": "two", "timestamp": (2.0, None)}
    assert "no end time" in caplog.text


def test_times_that_fall_back_begin_the_next_window(tokenizer):
    outputs = [chunk(tokenizer, "<|0.00|>one<|25.00|><|1.00|>two<|3.00|>")]
    _, extra = merge(tokenizer, outputs, return_timestamps=True)
    assert [piece["timestamp"] for piece in extra["chunks"]] == [(0.0, 25.0), (31.0, 33.0)]


def test_a_change_of_language_begins_a_new_piece(tokenizer):
    outputs = [
        chunk(tokenizer, "<|startoftranscript|><|en|><|transcribe|>hello"),
        chunk(tokenizer, "<|startoftranscript|><|fr|><|transcribe|>bonjour"),
    ]
    text, extra = merge(tokenizer, outputs, return_language=True)
    assert text == "hellobonjour"
    assert extra["chunks"] == [{"language": "english", "text": "hello"}, {"language": "french", "text": "bonjour"}]


def test_the_prompt_is_left_out(tokenizer):
    outputs = [chunk(tokenizer, "<|startofprev|>before<|startoftranscript|><|en|>now")]
    assert merge(tokenizer, outputs)[0] == "now"


def test_words_get_the_times_of_their_tokens(tokenizer):
    outputs = [chunk(tokenizer, "<|en|>ab, c", times=[0.0, 0.2, 0.4, 0.5, 0.6, 1.0])]
    text, extra = merge(tokenizer, outputs, return_timestamps="word", return_language=True)
    assert text == "ab, c"
    assert extra["chunks"] == [
        {"text": "ab,", "timestamp": (0.0, 0.5), "language": "english"},
        {"text": " c", "timestamp": (0.5, 1.0), "language": "english"},
    ]


def test_words_of_a_language_without_spaces_are_split_by_the_language_token(tokenizer):
    text = "<|zh|>今天"
    outputs = [chunk(tokenizer, text, times=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])]
    _, extra = merge(tokenizer, outputs, return_timestamps="word")
    assert [word["text"] for word in extra["chunks"]] == ["今", "天"]


def test_nothing_gives_nothing(tokenizer):
    assert merge(tokenizer, []) == ("", {})
    assert merge(tokenizer, [{"tokens": np.zeros((1, 0), dtype=np.int64)}], True) == ("", {"chunks": []})


def test_what_cannot_be_merged_is_an_error(tokenizer):
    with pytest.raises(InputError, match="'char'"):
        merge(tokenizer, [], return_timestamps="char")
    with pytest.raises(InputError, match="token_timestamps"):
        merge(tokenizer, [chunk(tokenizer, "a")], return_timestamps="word")
