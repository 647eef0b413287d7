"""Drafts for a batch of windows: each row goes on as far as its own drafts are right, and says what it says alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from audiomm.generation import speculative, tokens
from audiomm.generation.drafts import PromptLookup, Texts

CACHES: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
#: In each row the drafts of every third column are wrong, or of every hundredth ...
ERRS = torch.tensor([[3], [100], [4], [1]])


@pytest.fixture
def busy(talker: Any) -> Any:
    """The tiny model whose texts end early or late."""
    talker.generation_config.update(eos_token_id=[2, *range(12, 75, 9)], max_length=40)
    return talker


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What every run with drafts has counted."""
    seen: list[dict[str, int]] = []
    inner = speculative.speculate

    def spy(*arguments: Any) -> Any:
        output = inner(*arguments)
        seen.append(output.draft_counts)
        return output

    monkeypatch.setattr(tokens, "speculate", spy)
    return seen


@pytest.fixture
def scripted(busy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes prompt lookup know what the rows will say first, and err at some places."""

    def script(**call: Any) -> None:
        texts: list[Tensor] = []
        inner = tokens.sample

        def spy(request: Any) -> Any:
            output = inner(request)
            texts.append(output.sequences)
            return output

        def propose(self: PromptLookup, rows: Texts, count: int) -> Tensor:
            if len(rows.tokens) < len(texts[0]):
                # The last windows of some.
                return rows.tokens[:, :0]
            columns = rows.columns(0, min(count, self.count)).clamp(max=texts[0].shape[1] - 1)
            return torch.where(columns % ERRS == 0, 30, texts[0].gather(1, columns))

        with monkeypatch.context() as patch:
            patch.setattr(tokens, "sample", spy)
            busy.generate(**call)
        monkeypatch.setattr(PromptLookup, "propose", propose)

    return script


@pytest.mark.parametrize("cache", CACHES, ids=["growing", "static"])
@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_row_takes_as_many_drafts_as_are_right(
    busy: Any, heard: Any, scripted: Any, rounds: Any, seed: int, timestamps: bool, cache: dict[str, Any]
) -> None:
    call = {
        "input_features": heard(4, 40, seed),
        "return_timestamps": timestamps,
        "language": "en",
        "return_segments": True,
        "repetition_penalty": 1.2,
    }
    wanted = [one for row in busy.generate(**call)["segments"] for one in row]
    scripted(**call)
    helped = [one for row in busy.generate(**call, **cache, prompt_lookup_num_tokens=6)["segments"] for one in row]
    assert [one["tokens"].tolist() for one in helped] == [one["tokens"].tolist() for one in wanted]
    assert [float(one["avg_logprob"]) for one in helped] == pytest.approx([float(one["avg_logprob"]) for one in wanted])
    assert rounds[0]["accepted"] > 0


@pytest.mark.parametrize("cache", CACHES, ids=["growing", "static"])
def test_long_texts_close_the_gaps_on_the_way(
    busy: Any, heard: Any, scripted: Any, rounds: Any, cache: dict[str, Any]
) -> None:
    call = {"input_features": heard(4, 40), "language": "en", "no_repeat_ngram_size": 4, "suppress_tokens": [2]}
    busy.generation_config.update(eos_token_id=2, max_length=60)
    wanted = busy.generate(**call)
    scripted(**call)
    assert torch.equal(busy.generate(**call, **cache, prompt_lookup_num_tokens=8), wanted)
    steps = wanted.shape[1] - 1
    # As many passes as the row whose drafts are all wrong; rows that must keep step take no fewer.
    assert rounds[0]["rounds"] <= steps < rounds[0]["rounds"] + rounds[0]["accepted"] / 3


@pytest.mark.parametrize("cache", CACHES, ids=["growing", "static"])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_an_assistant_that_is_often_right_changes_nothing(
    busy: Any, heard: Any, rounds: Any, noise: float, cache: dict[str, Any]
) -> None:
    assistant = deepcopy(busy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in assistant.model.decoder.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator) * weight.abs().mean()
    call = {"input_features": heard(4, 40, 1), "language": "en", "return_timestamps": True, **cache}
    wanted = busy.generate(**call)
    helped = busy.generate(**call, assistant_model=assistant, assistant_confidence_threshold=0.0)
    assert torch.equal(helped, wanted)
    assert rounds[0]["accepted"] > 0
