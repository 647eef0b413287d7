"""Drafts change how long generation takes, never what comes out."""

from __future__ import annotations

import pytest
import torch

from audiomm.base.errors import GenerationError
from audiomm.generation.drafts import PromptLookup
from audiomm.generation.speculative import Balance

ENDS = {"eos_token_id": [1, 2, 3]}


@pytest.fixture
def repeating(toy):
    """A model that writes in circles, as drafts from the text so far need."""
    model = toy(0, eos_token_id=None)
    with torch.no_grad():
        model.table.zero_()
        for token in range(24):
            model.table[token, (token + 1) % 6 + 10] = 5.0
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, ENDS, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}])
def test_an_assistant_changes_nothing_for_a_batch(toy, prompts, seed, options):
    model, assistant = toy(seed, eos_token_id=None), toy(seed, eos_token_id=None)
    with torch.no_grad():
        assistant.table += 0.7 * torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    wanted = model.generate(prompts, attention_mask=mask, max_new_tokens=12, **options)
    got = model.generate(prompts, attention_mask=mask, max_new_tokens=12, assistant_model=assistant, **options)
    assert torch.equal(got, wanted)


def test_a_model_that_is_its_own_assistant_saves_steps(toy, prompts):
    model = toy(1, eos_token_id=None)
    twin = toy(1)
    wanted = model.generate(prompts, max_new_tokens=13)
    model.calls["step"] = 0
    options = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
    assert torch.equal(model.generate(prompts, max_new_tokens=13, assistant_model=twin, **options), wanted)
    assert model.calls["step"] == 2


def test_prompt_lookup_changes_nothing_and_saves_steps(repeating, prompts):
    wanted = repeating.generate(prompts, max_new_tokens=24)
    plain = repeating.calls["step"]
    repeating.calls["step"] = 0
    assert torch.equal(repeating.generate(prompts, max_new_tokens=24, prompt_lookup_num_tokens=4), wanted)
    assert repeating.calls["step"] < plain


def test_prompt_lookup_works_where_nothing_repeats(toy):
    model = toy(3)
    prompt = torch.tensor([[4]])
    wanted = model.generate(prompt, max_new_tokens=8)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, prompt_lookup_num_tokens=3), wanted)


def test_sampling_with_an_assistant_follows_the_same_distribution(toy):
    model, assistant = toy(3, eos_token_id=None), toy(4, eos_token_id=None)
    prompt = torch.tensor([[4, 7]])
    options = {"do_sample": True, "top_k": 4, "max_new_tokens": 3, "temperature": 2.0}
    counts = []
    for extra in ({}, {"assistant_model": assistant, "assistant_confidence_threshold": 0.0}):
        torch.manual_seed(0)
        rows = [model.generate(prompt, num_return_sequences=10, **options, **extra)[:, 2:] for _ in range(120)]
        last = torch.cat(rows)[:, 2]
        counts.append(torch.bincount(last, minlength=24) / len(last))
    assert (counts[0] - counts[1]).abs().max() < 0.06


def test_scores_are_those_of_the_plain_loop(toy, prompts):
    wanted = {"output_scores": True, "return_dict_in_generate": True, "output_logprobs": True, "max_new_tokens": 8}
    plain = toy(2).generate(prompts, **wanted)
    drafted = toy(2).generate(prompts, assistant_model=toy(2), **wanted)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert len(plain.scores) == len(drafted.scores)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.scores, drafted.scores, strict=True))
    assert torch.allclose(plain.logprobs, drafted.logprobs, atol=1e-5)


class Counting:
    """A rule that goes by how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.roll(self.calls, dims=-1)


def known(batch_index, ids):
    """A function that knows no padding."""
    assert 0 not in ids.tolist()
    return [token for token in range(3, 24) if (token + len(ids)) % 3]


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"logits_processor": [Counting()]},
        lambda: {"prefix_allowed_tokens_fn": known},
        lambda: {"stopping_criteria": [lambda ids, scores: ids[:, -1] == 10], **ENDS},
        lambda: {"do_sample": True, "generator": [torch.Generator().manual_seed(row) for row in range(3)]},
    ],
    ids=["a rule that remembers", "a function of the text", "a criterion", "sampling"],
)
def test_rows_keep_step_where_something_goes_by_the_step(repeating, prompts, options):
    wanted = repeating.generate(prompts, max_new_tokens=20, **options())
    got = repeating.generate(prompts, max_new_tokens=20, prompt_lookup_num_tokens=4, **options())
    assert torch.equal(got, wanted)


def test_a_row_does_not_wait_for_the_others(repeating, monkeypatch):
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 3, 6]])
    wanted = repeating.generate(prompts, max_new_tokens=60)

    def propose(self, texts, count):
        # Right, but at every fifth, sixth or seventh place.
        columns = texts.columns(0, min(count, self.count)).clamp(max=wanted.shape[1] - 1)
        return torch.where(columns % torch.tensor([[5], [6], [7]]) == 0, 3, wanted.gather(1, columns))

    monkeypatch.setattr(PromptLookup, "propose", propose)
    got = repeating.generate(prompts, max_new_tokens=60, prompt_lookup_num_tokens=10, return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted)
    # Every fifth place in a round of its own, as alone; a batch that keeps step needs twice as many.
    assert got.draft_counts["rounds"] <= 15


def test_attentions_are_one_entry_a_token(seq2seq):
    options = {"max_new_tokens": 5, "output_attentions": True, "return_dict_in_generate": True, "eos_token_id": None}
    features = torch.zeros(2, 24)
    out = seq2seq(1).generate(features, assistant_model=seq2seq(1), **options)
    assert len(out.decoder_attentions) == 5
    assert {layers[0].shape for layers in out.decoder_attentions} == {(2, 1, 1, 2)}


def test_drafts_and_beams_do_not_go_together(toy, prompts):
    with pytest.raises(GenerationError, match="cannot follow a search with num_beams=2"):
        toy().generate(prompts, num_beams=2, assistant_model=toy())


def test_an_assistant_of_another_vocabulary_is_refused(toy, prompts):
    other = toy()
    other.config.vocab_size = 30
    with pytest.raises(GenerationError, match="the assistant's vocabulary has 30 tokens and the model's 24"):
        toy().generate(prompts, assistant_model=other)


def test_a_drafter_of_states_needs_a_model_that_tells_them(toy, prompts):
    drafter = toy()
    drafter.drafts_from_states = True
    with pytest.raises(GenerationError, match="reads the target's states, and the model in use does not tell them"):
        toy().generate(prompts, assistant_model=drafter)


def test_drafts_that_do_not_pay_pause_longer_and_longer():
    balance, asked = Balance(0.1), []
    for _ in range(200):
        asked.append(balance.wants_drafts())
        if asked[-1]:
            balance.note(5, 0)
    assert asked == [True] * 16 + [False] * 16 + [True] * 16 + [False] * 32 + [True] * 16 + [False] * 64 + (
        [True] * 16 + [False] * 24
    )
    useful = Balance(0.1)
    for _ in range(100):
        assert useful.wants_drafts()
        useful.note(5, 1)
    # Found out anew: one token in two rounds of five drafts at a tenth of a step each pays exactly.
    for number in range(32):
        useful.note(5, number % 2)
    assert useful.wants_drafts()


def test_a_useless_assistant_is_hardly_asked(toy, prompts):
    model, assistant = toy(0, eos_token_id=None), toy(1, eos_token_id=None)
    options = {"max_new_tokens": 80, "no_repeat_ngram_size": 3}
    wanted = model.generate(prompts, **options)
    got = model.generate(
        prompts, **options, assistant_model=assistant, assistant_confidence_threshold=0.0, return_dict_in_generate=True
    )
    assert torch.equal(got.sequences, wanted)
    counts = got.draft_counts
    assert counts["rounds"] <= 79 <= counts["rounds"] + counts["accepted"]
    # 20 drafts a round and row in 32 of the rounds, not in all 79.
    assert counts["drafted"] <= 33 * 20 * 3
