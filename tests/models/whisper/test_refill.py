"""Windows whose text is done make room for the next ones, and each recording gives what it gives alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audiomm.base.errors import GenerationError
from audiomm.generation import refill
from audiomm.generation.decode import StopFlag
from audiomm.generation.refill import RowBatch

#: Frames of the recordings: from less than a window to seven.
FRAMES = (150, 97, 33, 260, 40, 121)


@pytest.fixture
def busy(talker: Any) -> Any:
    """The tiny model whose texts end early or late, with room for all of them."""
    config = talker.generation_config
    config.update(eos_token_id=[2, *range(12, 75, 9)])
    return talker


@pytest.fixture
def steps(busy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every decode step."""
    seen: list[int] = []
    quick = type(busy.quick_step())
    call = quick.__call__

    def counted(self: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        seen.append(len(ids))
        return call(self, ids, cache)

    monkeypatch.setattr(quick, "__call__", counted)
    return seen


def told(model: Any, features: Any, mask: Any, **options: Any) -> list[list[tuple[Any, ...]]]:
    options = {"return_segments": True, "return_timestamps": True, "language": "en", **options}
    found = model.generate(features, attention_mask=mask, **options)["segments"]
    return [
        [
            (
                round(float(one["start"]), 4),
                round(float(one["end"]), 4),
                one["tokens"].tolist(),
                one["temperature"],
                pytest.approx(float(one["avg_logprob"]), rel=1e-4),
                pytest.approx(one["no_speech_prob"], rel=1e-4),
            )
            for one in segments
        ]
        for segments in found
    ]


CHOICES: list[dict[str, Any]] = [
    {},
    {"condition_on_prev_tokens": True},
    {"prompt_ids": torch.tensor([76, 30, 31, 32]), "prompt_condition_type": "all-segments"},
    {"temperature": (0.0, 0.4, 0.8), "logprob_threshold": -2.6, "top_k": 1, "condition_on_prev_tokens": True},
    {"prefix_ids": torch.tensor([20, 21]), "suppress_tokens": [22, 23]},
    {"language": None},
    {"max_new_tokens": 3},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: ",".join(options) or "none")
@pytest.mark.parametrize("size", [2, 4])
def test_each_recording_gives_what_it_gives_alone(
    busy: Any, heard: Any, lengths: Any, options: dict[str, Any], size: int
) -> None:
    features, mask = heard(len(FRAMES), max(FRAMES)), lengths(*FRAMES)
    together = told(busy, features, mask, batch_size=size, **options)
    for row in range(len(FRAMES)):
        assert told(busy, features[row : row + 1], mask[row : row + 1], **options)[0] == together[row]
    assert sum(map(len, together)) > 12


@pytest.mark.parametrize("options", CHOICES[:4], ids=lambda options: ",".join(options) or "none")
def test_captured_steps_go_on_when_rows_come(
    busy: Any, heard: Any, lengths: Any, graphs: Any, options: dict[str, Any]
) -> None:
    features, mask = heard(len(FRAMES), max(FRAMES)), lengths(*FRAMES)
    plain = told(busy, features, mask, batch_size=3, cache_implementation="dynamic", **options)
    assert graphs.warm_ups == 0
    for _ in range(2):
        assert told(busy, features, mask, batch_size=3, **options) == plain
    assert graphs.replays > 60
    # Rows that come and go leave all tensors where they are; windows decoded again have graphs of their own.
    assert graphs.captures == 1 or "temperature" in options


def test_answers_that_come_late_change_nothing(
    busy: Any, heard: Any, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LateFlag(StopFlag):
        earlier: list[bool] | None = None

        def rows(self, going: torch.Tensor) -> list[bool]:
            known, self.earlier = self.earlier, going.tolist()
            return [True] * len(going) if known is None else known

        def forget(self) -> None:
            self.earlier = None

    features, mask = heard(len(FRAMES), max(FRAMES)), lengths(*FRAMES)
    plain = told(busy, features, mask, batch_size=3, condition_on_prev_tokens=True)
    monkeypatch.setattr(refill, "StopFlag", LateFlag)
    assert told(busy, features, mask, batch_size=3, condition_on_prev_tokens=True) == plain


def test_rows_that_do_not_fit_are_refused() -> None:
    config = SimpleNamespace(cache_implementation=None)
    request = SimpleNamespace(config=config, max_length=9, prompt=torch.zeros(1, 3))
    with RowBatch(2, 8) as batch, pytest.raises(GenerationError, match="at most 9 tokens cannot enter: 2 rows are"):
        batch.enter(request, ["one"])  # type: ignore[arg-type]
    with RowBatch(2, 9) as batch, pytest.raises(GenerationError, match="3 rows of at most 9 tokens"):
        batch.enter(request, ["one", "two", "three"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"do_sample": True, "top_k": 1}, {"min_new_tokens": 4}, {"repetition_penalty": 1.2},
     {"logits_processor": [lambda ids, scores: scores]}, {"max_time": 60.0}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda options: ",".join(options),
)  # fmt: skip
def test_what_goes_by_rows_or_lengths_is_decoded_window_after_window(
    busy: Any, heard: Any, lengths: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    entered = []
    inner = RowBatch.enter
    monkeypatch.setattr(RowBatch, "enter", lambda *args: (entered.append(1), inner(*args)))
    features, mask = heard(3, 97), lengths(97, 60, 33)
    together = told(busy, features, mask, batch_size=2, **options)
    assert [len(one) > 0 for one in together] == [True] * 3
    assert entered == []
    told(busy, features, mask, batch_size=2)
    assert entered


def test_a_row_is_never_idle_while_windows_wait(busy: Any, heard: Any, lengths: Any, steps: list[int]) -> None:
    features, mask = heard(len(FRAMES), max(FRAMES)), lengths(*FRAMES)
    told(busy, features, mask, batch_size=3)
    assert steps == sorted(steps, reverse=True)
    # In the end the longest recording is alone.
    assert steps.count(3) > len(steps) // 2


def test_words_and_times_of_tokens_are_those_alone(busy: Any, heard: Any, lengths: Any, tiny_processor: Any) -> None:
    features, mask = heard(3, 150), lengths(150, 97, 130)
    options = {"language": "en", "tokenizer": tiny_processor.tokenizer, "word_timestamps": True, "batch_size": 2}
    options["return_segments"] = True
    together = busy.generate(features, attention_mask=mask, **options)["segments"]
    for row in range(3):
        one = slice(row, row + 1)
        alone = busy.generate(features[one], attention_mask=mask[one], **options)["segments"][0]
        assert [s["words"] for s in alone] == [
            [{**word, "probability": pytest.approx(word["probability"], rel=1e-3)} for word in s["words"]]
            for s in together[row]
        ]
        assert any(s["words"] for s in alone)


def test_many_windows_need_no_more_columns_than_a_text_has(
    busy: Any, heard: Any, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts = []
    inner = RowBatch._shift

    def spy(self: RowBatch, count: int) -> None:
        shifts.append(count)
        inner(self, count)
        assert self._surplus() >= 0

    monkeypatch.setattr(RowBatch, "_shift", spy)
    frames = (700, 650, 31)
    features, mask = heard(3, 700), lengths(*frames)
    together = told(busy, features, mask, condition_on_prev_tokens=True)
    assert min(shifts) < 0
    alone = told(busy, features[:1], mask[:1], condition_on_prev_tokens=True)[0]
    assert alone == together[0]
