"""Stopping criteria."""

from __future__ import annotations

import time

import pytest
import torch

from audiomm.base.errors import GenerationError
from audiomm.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

PIECES = ["he", "llo", " wor", "ld", "!", "\n\n", "st", "op", "stopped", " ", "\u00e9"]


class Pieces:
    """A tokenizer of whole pieces, and two ids that make one letter together."""

    def decode(self, ids, **kwargs):
        text = ""
        for place, token in enumerate(ids):
            if token == 20:
                text += "" if ids[place + 1 : place + 2] == [21] else "\ufffd"
            elif token == 21:
                text += "\u00e9"
            else:
                text += PIECES[token]
        return text


def test_length_counts_the_prompt():
    ids = torch.zeros(3, 7, dtype=torch.long)
    assert MaxLengthCriteria(7)(ids, None).tolist() == [True] * 3
    assert MaxLengthCriteria(8)(ids, None).tolist() == [False] * 3


def test_end_tokens_are_looked_for_at_the_end():
    ids = torch.tensor([[1, 5], [5, 1], [5, 2], [2, 3]])
    assert EosTokenCriteria(1)(ids, None).tolist() == [False, True, False, False]
    assert EosTokenCriteria([1, 2])(ids, None).tolist() == [False, True, True, False]
    assert EosTokenCriteria(torch.tensor([3]))(ids, None).tolist() == [False, False, False, True]


def test_time_is_counted_from_a_start():
    ids = torch.zeros(2, 1)
    assert MaxTimeCriteria(100)(ids, None).tolist() == [False, False]
    assert MaxTimeCriteria(100, initial_timestamp=time.time() - 200)(ids, None).tolist() == [True, True]


@pytest.mark.parametrize(
    ("tokens", "strings", "wanted"),
    [
        ([0, 1], "hello", True),
        ([0, 1], ["xyz", "llo"], True),
        ([0, 1, 2], "hello", False),  # complete before the newest token
        ([6, 7], "stop", True),
        ([8], "stop", True),  # ends inside the newest token
        ([0, 1, 2, 3], "o world", True),
        ([0, 1], "hello!", False),
        ([20, 21], "\u00e9", True),
        ([9, 20], "\u00e9", False),
    ],
)
def test_a_string_stops_when_the_newest_token_completes_it(tokens, strings, wanted):
    assert StopStringCriteria(Pieces(), strings)(torch.tensor([tokens]), None).tolist() == [wanted]


def test_strings_stop_generation_row_by_row(toy, prompts):
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join(chr(97 + token) for token in ids)

    model = toy(0, eos_token_id=None)
    free = model.generate(prompts, max_new_tokens=6)
    text = Letters().decode(free[0, 5:8].tolist())
    got = model.generate(prompts, max_new_tokens=6, stop_strings=[text], tokenizer=Letters(), pad_token_id=23)
    assert got[0].tolist() == [*free[0, :8].tolist(), *[23] * (got.shape[1] - 8)]


def test_strings_need_a_tokenizer_and_characters(toy, prompts):
    with pytest.raises(GenerationError, match="stop_strings need a tokenizer, but tokenizer is a NoneType"):
        toy().generate(prompts, stop_strings="x")
    with pytest.raises(GenerationError, match=r"stop_strings=\[''\] is not accepted"):
        StopStringCriteria(Pieces(), [""])


def test_a_list_is_done_when_one_is_and_takes_plain_answers():
    class Always(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return True

    ids = torch.tensor([[1, 5], [5, 1]])
    assert StoppingCriteriaList([EosTokenCriteria(1), MaxLengthCriteria(9)])(ids, None).tolist() == [False, True]
    assert StoppingCriteriaList([Always()])(ids, None).tolist() == [True, True]
    assert StoppingCriteriaList()(ids, None).tolist() == [False, False]
    assert StoppingCriteriaList([MaxLengthCriteria(9), MaxLengthCriteria(4)]).max_length == 4
    assert StoppingCriteriaList().max_length is None


def test_a_criterion_without_a_call_says_so():
    with pytest.raises(GenerationError, match="StoppingCriteria does not define __call__"):
        StoppingCriteria()(torch.zeros(1, 1), None)
