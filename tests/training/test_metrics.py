"""Error rates: known counts, intervals that cover, the worst utterances."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from audiomm.base.errors import InputError, MissingExtra
from audiomm.models.whisper.normalizer import EnglishTextNormalizer
from audiomm.training.evaluation import EvalPrediction
from audiomm.training.metrics import SpeechMetrics, cer, error_rate, wer


def test_errors_are_counted_by_kind() -> None:
    pytest.importorskip("jiwer")
    found = error_rate(["a b c d", "e f"], ["a x d", "e f g"])
    assert (found.substitutions, found.deletions, found.insertions, found.units) == (1, 1, 1, 6)
    assert found.rate == pytest.approx(0.5)
    assert [(one.errors, one.units) for one in found.utterances] == [(2, 4), (1, 2)]
    assert wer(["a b"], ["a b"]) == 0
    assert cer(["abcd"], ["abxd"]) == 0.25
    assert wer(["a"], ["b c d"]) == 3, "more can be made up than was said"


def test_a_normalizer_evens_texts_out() -> None:
    pytest.importorskip("jiwer")
    assert wer(["Mr. Smith's colour, won't it?"], ["mister smith is color will not it"], EnglishTextNormalizer()) == 0
    assert wer(["Mr. Smith"], ["mister smith"]) == 1


def test_texts_without_words_do_not_count(caplog: Any) -> None:
    pytest.importorskip("jiwer")
    found = error_rate(["", "a"], ["anything", "a"])
    assert (found.rate, found.skipped) == (0, 1)
    assert "1 of 2 references are empty" in caplog.text
    with pytest.raises(InputError, match="none of the 1 references"):
        error_rate(["  "], ["a"])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    pytest.importorskip("jiwer")
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        wrong = random.random((60, 5)) < 0.2
        texts = [" ".join("x" if bad else "a" for bad in row) for row in wrong]
        low, high = error_rate(["a a a a a"] * 60, texts).interval(rounds=200, seed=seed)
        covered += low <= 0.2 <= high
    assert covered >= 34, covered
    perfect = error_rate(["a"] * 5, ["a"] * 5)
    assert perfect.interval() == (0, 0)


def test_the_worst_come_first() -> None:
    pytest.importorskip("jiwer")
    found = error_rate(["a b c", "a", "a b", "z"], ["x y c", "b", "x y", "z"])
    assert [one.place for one in found.worst()] == [2, 0, 1]
    assert [one.place for one in found.worst(1)] == [2]


def test_a_trainer_gets_both_rates_from_tokens() -> None:
    pytest.importorskip("jiwer")
    words = ["<pad>", "one", "two", "three"]
    decode = lambda rows, skip_special_tokens: [" ".join(words[i] for i in row if i) for row in rows]  # noqa: E731
    metrics = SpeechMetrics(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, batch_decode=decode)))
    labels = np.array([[1, 2, -100], [3, 3, 3]])
    found = metrics(EvalPrediction(np.array([[1, 2, 0], [3, 1, 3]]), labels))
    assert found == {"wer": pytest.approx(1 / 5), "cer": pytest.approx(4 / 24)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: error_rate(["a"], []), "1 references and 0 hypotheses"),
        (lambda: error_rate(["a"], ["a"], unit="phone"), "unit='phone': accepted are 'word' and 'character'"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, words: str) -> None:
    pytest.importorskip("jiwer")
    with pytest.raises(InputError, match=words):
        call()


def test_without_jiwer_the_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtra, match=r"pip install 'audiomm\[eval\]'"):
        wer(["a"], ["a"])
