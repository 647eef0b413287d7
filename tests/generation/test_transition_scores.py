"""compute_transition_scores: what each token scored, for every way of decoding."""

from __future__ import annotations

import pytest
import torch

RECORD = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6}


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}])
def test_tokens_have_the_scores_they_were_chosen_by(toy, prompts, options):
    torch.manual_seed(0)
    model = toy(1)
    output = model.generate(prompts, **RECORD, **options)
    found = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    made = output.sequences[:, prompts.shape[1] :]
    for step, scores in enumerate(output.scores):
        wanted = scores.log_softmax(dim=-1).gather(1, made[:, step : step + 1])[:, 0]
        assert torch.equal(found[:, step], wanted)
    assert found.shape == made.shape


def test_the_scores_of_a_beam_add_up_to_its_own(toy, prompts):
    model = toy(2)
    output = model.generate(prompts, num_beams=3, num_return_sequences=2, length_penalty=0.0, **RECORD)
    found = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert torch.allclose(found.sum(dim=1), output.sequences_scores, atol=1e-4)
    assert bool((found[output.beam_indices[:, : found.shape[1]] < 0] == 0).all())
