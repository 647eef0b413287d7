"""Beam search: against searching everything, and its options."""

from __future__ import annotations

import itertools

import pytest
import torch

from audiomm.base.errors import GenerationError
from audiomm.generation import TextStreamer


def every_continuation(model, prompt, new, ends):
    """All continuations of up to `new` tokens with their log-probabilities, by brute force."""
    found = {}
    running = {(): 0.0}
    for _ in range(new):
        longer = {}
        for tail, score in running.items():
            logs = model(torch.tensor([[*prompt.tolist(), *tail]]))[0, -1].log_softmax(-1).tolist()
            for token, log in enumerate(logs):
                (found if token in ends else longer)[(*tail, token)] = score + log
        running = longer
    return {**found, **running}


def test_as_many_beams_as_continuations_find_the_best_ones(toy, prompts):
    model = toy(3).eval()
    with torch.no_grad():
        for row in prompts[:2]:
            scores = every_continuation(model, row, 2, (1,))
            ranked = sorted(scores, key=lambda tail: -scores[tail] / len(tail))
            out = model.generate(
                row[None],
                max_new_tokens=2,
                num_beams=24,
                num_return_sequences=3,
                output_scores=True,
                return_dict_in_generate=True,
            )
            for place in range(3):
                tail = ranked[place]
                assert out.sequences[place, 5 : 5 + len(tail)].tolist() == list(tail)
                assert out.sequences_scores[place].item() == pytest.approx(scores[tail] / len(tail), abs=1e-4)


def test_the_length_penalty_decides_between_short_and_long(toy, prompts):
    model = toy(7)
    lengths = {}
    for penalty in (-4.0, 4.0):
        out = model.generate(
            prompts,
            max_new_tokens=10,
            num_beams=4,
            length_penalty=penalty,
            output_scores=True,
            return_dict_in_generate=True,
            sequence_bias=[[[1], 3.0]],
        )
        lengths[penalty] = (out.beam_indices >= 0).sum()
    assert lengths[-4.0] < lengths[4.0]


def test_beam_indices_lead_from_the_last_token_to_the_first(toy, prompts):
    model = toy(2, eos_token_id=None)
    out = model.generate(
        prompts, max_new_tokens=6, num_beams=3, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    assert out.beam_indices.shape == (3, 6)
    for row in range(3):
        total = 0.0
        for step in range(6):
            origin = int(out.beam_indices[row, step])
            assert origin // 3 == row
            total += out.logits[step][origin].log_softmax(-1)[out.sequences[row, 5 + step]].item()
        assert out.sequences_scores[row].item() == pytest.approx(total / 6, abs=1e-4)


def test_the_batch_does_not_matter(toy, prompts):
    model = toy(4)
    options = {"max_new_tokens": 8, "num_beams": 3, "pad_token_id": 23}
    together = model.generate(prompts, **options)
    for row in range(3):
        alone = model.generate(prompts[row : row + 1], **options)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert (together[row, alone.shape[1] :] == 23).all()


@pytest.mark.parametrize(("early", "penalty"), list(itertools.product([True, False, "never"], [-1.0, 0.0, 2.0])))
def test_every_way_to_stop_returns_ended_sequences_best_first(toy, prompts, early, penalty):
    out = toy(6).generate(
        prompts,
        max_new_tokens=12,
        num_beams=4,
        num_return_sequences=4,
        early_stopping=early,
        length_penalty=penalty,
        eos_token_id=[1, 2],
        output_scores=True,
        output_logprobs=True,
        return_dict_in_generate=True,
    )
    scores = out.sequences_scores.view(3, 4)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    lengths = (out.beam_indices >= 0).sum(1)
    for tokens, length in zip(out.sequences[:, 5:].tolist(), lengths.tolist(), strict=True):
        assert length == 12 or tokens[length - 1] in (1, 2)
        assert not set(tokens[: length - 1]) & {1, 2}
    assert torch.allclose(out.logprobs, out.sequences_scores * lengths**penalty, atol=1e-4)


def test_renormalising_makes_scores_of_what_is_left(toy, prompts):
    options = {"max_new_tokens": 4, "num_beams": 2, "eos_token_id": None, "suppress_tokens": list(range(5, 20))}
    wanted = {"output_scores": True, "return_dict_in_generate": True}
    plain = toy(1).generate(prompts, **options, **wanted)
    normal = toy(1).generate(prompts, renormalize_logits=True, **options, **wanted)
    assert (normal.sequences_scores > plain.sequences_scores).all()
    assert torch.allclose(normal.scores[0].exp().sum(-1), torch.ones(6), atol=1e-5)


def test_one_prefill_serves_all_beams(toy, prompts):
    model = toy(eos_token_id=None)
    model.generate(prompts, max_new_tokens=5, num_beams=4)
    assert model.calls == {"prefill": 1, "step": 4}


def test_beams_share_an_encoder(seq2seq):
    model = seq2seq(1)
    features = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    together = model.generate(features, num_beams=3, max_new_tokens=6, pad_token_id=23)
    for row in range(3):
        alone = model.generate(features[row : row + 1], num_beams=3, max_new_tokens=6, pad_token_id=23)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_sampled_beams_repeat_with_the_seed(toy, prompts):
    model = toy(5)
    options = {"num_beams": 3, "do_sample": True, "temperature": 2.0, "max_new_tokens": 6}
    torch.manual_seed(1)
    first = model.generate(prompts, **options)
    torch.manual_seed(1)
    assert torch.equal(first, model.generate(prompts, **options))


def test_a_streamer_cannot_follow_a_search(toy, prompts):
    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    streamer = TextStreamer(Words())
    with pytest.raises(GenerationError, match="a streamer cannot follow a search with num_beams=2"):
        toy().generate(prompts[:1], num_beams=2, streamer=streamer)
