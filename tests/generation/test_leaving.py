"""Rows that are done leave a run on the CPU, and nothing that comes out of it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from audiomm import WhisperConfig, WhisperForConditionalGeneration
from audiomm.generation import leaving

ROWS = 7


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(4)
    config = WhisperConfig(
        vocab_size=90, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=32, max_source_positions=12,
        max_target_positions=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    made = WhisperForConditionalGeneration(config).eval()
    for weight in made.model.decoder.parameters():
        weight.data.normal_()
    # Small, so that no token calls for itself again.
    made.model.decoder.embed_tokens.weight.data.mul_(0.2)
    return made


def run(model: Any, rows: list[int], **options: Any) -> Any:
    """Tokens after the start token, and how many rows each step had."""
    heard = torch.randn(ROWS, 12, 16, generator=torch.Generator().manual_seed(5))[rows]
    steps: list[int] = []
    quick = type(model.quick_step())
    call = quick.__call__

    def counted(self: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        steps.append(len(ids))
        return call(self, ids, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "__call__", counted)
        # Many tokens end a text, so texts differ in length.
        ends = list(range(1, 90, 12))
        options = {"eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 40, "do_sample": False, **options}
        found = model.generate(encoder_outputs=(heard,), **options)
    return found, steps


def texts(found: torch.Tensor) -> list[list[int]]:
    return [[token for token in row if token != 0] for row in found.tolist()]


def test_each_row_gives_what_it_gives_alone(model: Any) -> None:
    found, steps = run(model, list(range(ROWS)))
    assert len({len(text) for text in texts(found)}) > 3, "texts are of different lengths"
    assert texts(found) == [texts(run(model, [row])[0])[0] for row in range(ROWS)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < ROWS
    lengths = sorted(len(text) + 1 for text in texts(found))
    # A text of n tokens, its end included, takes n - 1 steps after the prompt's own.
    assert sum(steps) <= sum(lengths) + ROWS


@pytest.mark.parametrize("options", [{"do_sample": True}, {"return_dict_in_generate": True}, {"num_beams": 2}])
def test_rows_stay_where_something_goes_by_their_number(model: Any, options: dict[str, Any]) -> None:
    _, steps = run(model, list(range(ROWS)), **options)
    assert len(set(steps)) == 1


def test_a_rule_of_the_callers_own_sees_all_rows(model: Any) -> None:
    seen = set()

    def rule(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.add(len(ids))
        return scores

    found, _ = run(model, list(range(ROWS)), logits_processor=[rule])
    assert seen == {ROWS}
    assert torch.equal(found, run(model, list(range(ROWS)))[0])


def test_scores_are_summed_as_if_all_rows_had_stayed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from audiomm.generation import GenerationConfig, generate_tokens, make_request

    heard = torch.randn(ROWS, 12, 16, generator=torch.Generator().manual_seed(5))
    config = GenerationConfig(eos_token_id=list(range(1, 90, 12)), pad_token_id=0, max_new_tokens=40)

    def output() -> Any:
        prompt = torch.full((ROWS, 1), 2)
        inputs = {"encoder_outputs": (heard,)}
        return generate_tokens(make_request(model, prompt, config, model_inputs=inputs, logprobs=True))

    left = output()
    monkeypatch.setattr(leaving.Leaving, "without_done", lambda self, state: state)
    stayed = output()
    assert torch.equal(left.sequences, stayed.sequences)
    torch.testing.assert_close(left.logprobs, stayed.logprobs, rtol=1e-5, atol=1e-5)
