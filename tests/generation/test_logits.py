"""Logits processors and warpers: against plain loops over rows, and what they refuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from audiomm import generation
from audiomm.base.errors import GenerationError
from audiomm.generation import GenerationConfig, LogitsProcessor, LogitsProcessorList
from audiomm.generation.rules import Rules

INFINITY = math.inf
TEXT_END, NO_STAMPS, FIRST = 15, 20, 21


@pytest.fixture
def ids():
    return torch.randint(0, 8, (5, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scores():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) * 3


def banned(result):
    return [set((row == -INFINITY).nonzero().flatten().tolist()) for row in result]


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_no_repeat_ngram_bans_what_a_loop_finds(ids, scores, size):
    result = generation.NoRepeatNGramLogitsProcessor(size)(ids, scores)
    for row, found in zip(ids.tolist(), banned(result), strict=True):
        start = row[len(row) - size + 1 :] if size > 1 else []
        wanted = {row[i + size - 1] for i in range(len(row) - size + 1) if row[i : i + size - 1] == start}
        assert found == wanted


def test_encoder_ngrams_are_shared_by_the_beams_of_an_item(ids, scores):
    text = torch.tensor([[int(ids[0, -1]), 9, int(ids[1, -1]), 10], [int(ids[2, -1]), 11, 5, 5]])
    result = generation.EncoderNoRepeatNGramLogitsProcessor(2, text)(ids[:4], scores[:4])
    for row, found in enumerate(banned(result)):
        words = text[row // 2].tolist()
        assert found == {b for a, b in itertools.pairwise(words) if a == int(ids[row, -1])}


@pytest.mark.parametrize("ignored", [None, 0, 7, torch.tensor([0, 3, 11, 5, 10])])
def test_repetition_penalty_equals_a_loop(ids, scores, ignored):
    result = generation.RepetitionPenaltyLogitsProcessor(1.7, ignored)(ids, scores)
    for row in range(5):
        skip = 0 if ignored is None else int(ignored[row]) if isinstance(ignored, torch.Tensor) else ignored
        for token in range(12):
            value = scores[row, token].item()
            if token in ids[row, skip:].tolist():
                value = value * 1.7 if value < 0 else value / 1.7
            assert result[row, token].item() == pytest.approx(value, rel=1e-5)


def test_encoder_repetition_penalty_favours_the_encoders_tokens(ids, scores):
    result = generation.EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([[3, 4]] * 5))(ids, scores)
    changed = (result > scores).nonzero()[:, 1].unique().tolist()
    assert changed == [3, 4]


def test_sequence_bias_adds_up_where_sequences_complete(ids, scores):
    last = int(ids[0, -1])
    bias = {(5,): 1.0, (last, 5): 2.0, (int(ids[0, -2]), last, 5): 4.0}
    result = generation.SequenceBiasLogitsProcessor(bias)(ids, scores)
    assert (result - scores)[0, 5].item() == pytest.approx(7.0, abs=1e-5)
    as_list = [[list(key), value] for key, value in bias.items()]
    assert torch.equal(generation.SequenceBiasLogitsProcessor(as_list)(ids, scores), result)


def test_bad_words_are_banned_and_end_tokens_let_through(ids, scores):
    words = [[7], [int(ids[2, -1]), 9], [1]]
    found = banned(generation.NoBadWordsLogitsProcessor(words, eos_token_id=1)(ids, scores))
    for row in range(5):
        assert found[row] == ({7, 9} if int(ids[row, -1]) == int(ids[2, -1]) else {7})
    assert torch.equal(generation.NoBadWordsLogitsProcessor([[1]], 1)(ids, scores), scores)


def test_biased_tokens_beyond_the_vocabulary_are_refused(ids, scores):
    with pytest.raises(GenerationError, match="sequence_bias names the token 99, but the vocabulary ends at 11"):
        generation.SequenceBiasLogitsProcessor({(3, 99): 1.0})(ids, scores)
    with pytest.raises(GenerationError, match="bad_words_ids names the token 12"):
        generation.NoBadWordsLogitsProcessor([[12]], 1)(ids, scores)
    with pytest.raises(GenerationError, match="sequence_bias entry"):
        generation.SequenceBiasLogitsProcessor({5: 1.0})


def test_suppression_ignores_ids_beyond_the_vocabulary(ids, scores):
    found = banned(generation.SuppressTokensLogitsProcessor([2, 50])(ids, scores))
    assert found == [{2}] * 5


def test_rules_about_lengths_look_at_the_length(ids, scores):
    begin = generation.SuppressTokensAtBeginLogitsProcessor([3], 11)
    assert banned(begin(ids, scores)) == [{3}] * 5
    begin.set_begin_index(10)
    assert torch.equal(begin(ids, scores), scores)
    assert banned(generation.MinLengthLogitsProcessor(12, [1, 2])(ids, scores)) == [{1, 2}] * 5
    assert torch.equal(generation.MinLengthLogitsProcessor(11, 1)(ids, scores), scores)
    assert banned(generation.MinNewTokensLengthLogitsProcessor(8, 4, 1)(ids, scores)) == [{1}] * 5
    forced = generation.ForcedEOSTokenLogitsProcessor(12, 4)(ids, scores)
    assert forced.argmax(-1).tolist() == [4] * 5
    assert torch.equal(generation.ForcedEOSTokenLogitsProcessor(13, 4)(ids, scores), scores)
    assert generation.ForcedBOSTokenLogitsProcessor(4)(ids[:, :1], scores).argmax(-1).tolist() == [4] * 5


def test_exponential_decay_grows_and_leaves_forbidden_tokens_forbidden(ids, scores):
    scores[0, 3] = -INFINITY
    penalty = generation.ExponentialDecayLengthPenalty((2, 1.5), 3, 6)
    result = penalty(ids, scores)
    assert result[0, 3] == -INFINITY
    expected = scores[1:, 3] + scores[1:, 3].abs() * (1.5**3 - 1)
    assert torch.allclose(result[1:, 3], expected)
    assert torch.equal(penalty(ids[:, :8], scores), scores)


def test_a_function_of_prefixes_wins_over_other_rules(ids, scores):
    scores[:, 4] = -INFINITY
    result = generation.PrefixConstrainedLogitsProcessor(lambda item, tokens: [4], 1)(ids, scores)
    assert result.argmax(-1).tolist() == [4] * 5


def test_nan_and_infinity_are_replaced(ids):
    bad = torch.tensor([[math.nan, INFINITY, -INFINITY, 1.0]])
    limits = torch.finfo(torch.float32)
    assert generation.InfNanRemoveLogitsProcessor()(ids, bad).tolist() == [[0.0, limits.max, limits.min, 1.0]]


def test_what_a_forbidden_token_had_for_a_score_does_not_count(ids, scores):
    scores[0, 2], scores[1, 2] = math.nan, INFINITY
    rules = Rules([generation.SuppressTokensLogitsProcessor([2])])
    result = rules(ids, scores)
    assert banned(result) == [{2}] * 5
    assert torch.equal(torch.cat((result[:, :2], result[:, 3:]), 1), torch.cat((scores[:, :2], scores[:, 3:]), 1))
    assert scores[0, 2].isnan()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(ids, scores, p):
    result = generation.TopPLogitsWarper(p)(ids, scores)
    for row in range(5):
        order = scores[row].softmax(-1).sort(descending=True)
        wanted, total = set(), 0.0
        for probability, token in zip(order.values.tolist(), order.indices.tolist(), strict=True):
            wanted.add(token)
            total += probability
            if total >= p:
                break
        assert set((result[row] > -INFINITY).nonzero().flatten().tolist()) == wanted


def test_the_other_filters_keep_what_they_say(ids, scores):
    probabilities = scores.softmax(-1)
    kept = generation.TopKLogitsWarper(3)(ids, scores) > -INFINITY
    assert kept.sum(-1).tolist() == [3] * 5
    kept = generation.MinPLogitsWarper(0.2)(ids, scores) > -INFINITY
    assert torch.equal(kept, probabilities >= 0.2 * probabilities.amax(-1, keepdim=True))
    kept = generation.EpsilonLogitsWarper(0.05)(ids, scores) > -INFINITY
    assert torch.equal(kept, (probabilities >= 0.05) | (probabilities == probabilities.amax(-1, keepdim=True)))
    entropy = -(probabilities * probabilities.log()).sum(-1, keepdim=True)
    threshold = torch.minimum(torch.tensor(0.05), math.sqrt(0.05) * (-entropy).exp())
    kept = generation.EtaLogitsWarper(0.05)(ids, scores) > -INFINITY
    assert torch.equal(kept, probabilities >= threshold)
    kept = generation.TypicalLogitsWarper(0.3)(ids, scores) > -INFINITY
    nearest = (-probabilities.log() - entropy).abs().argmin(-1)
    assert kept.gather(1, nearest[:, None]).all()


@pytest.mark.parametrize("name", ["TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta"])
def test_every_filter_keeps_the_number_asked_for(ids, scores, name):
    value = 1 if name == "TopK" else 0.999 if name == "MinP" else 0.001
    value = 0.999 if name in ("Epsilon", "Eta") else value
    result = getattr(generation, f"{name}LogitsWarper")(value, min_tokens_to_keep=4, filter_value=-99.0)(ids, scores)
    assert ((result > -99.0).sum(-1) >= 4).all()


ALL = {
    "TemperatureLogitsWarper": (0.5,),
    "TopKLogitsWarper": (3,),
    "TopPLogitsWarper": (0.5,),
    "MinPLogitsWarper": (0.5,),
    "TypicalLogitsWarper": (0.5,),
    "EpsilonLogitsWarper": (0.1,),
    "EtaLogitsWarper": (0.1,),
    "RepetitionPenaltyLogitsProcessor": (2.0,),
    "EncoderRepetitionPenaltyLogitsProcessor": (2.0, torch.tensor([[1, 2]] * 5)),
    "NoRepeatNGramLogitsProcessor": (2,),
    "EncoderNoRepeatNGramLogitsProcessor": (1, torch.tensor([[1, 2]] * 5)),
    "SequenceBiasLogitsProcessor": ([[[5], 1.0]],),
    "NoBadWordsLogitsProcessor": ([[5]],),
    "SuppressTokensLogitsProcessor": ([5],),
    "SuppressTokensAtBeginLogitsProcessor": ([5], 11),
    "ForcedBOSTokenLogitsProcessor": (5,),
    "ForcedEOSTokenLogitsProcessor": (12, 5),
    "MinLengthLogitsProcessor": (20, 5),
    "MinNewTokensLengthLogitsProcessor": (11, 5, 5),
    "ExponentialDecayLengthPenalty": ((1, 1.5), 5, 3),
    "PrefixConstrainedLogitsProcessor": (lambda item, tokens: [5], 1),
    "LogitNormalization": (),
    "InfNanRemoveLogitsProcessor": (),
}


@pytest.mark.parametrize("name", list(ALL))
def test_no_rule_changes_its_inputs_or_looks_at_other_rows(ids, scores, name):
    rule = getattr(generation, name)(*ALL[name])
    ids_before, scores_before = ids.clone(), scores.clone()
    result = rule(ids, scores)
    assert torch.equal(ids, ids_before)
    assert torch.equal(scores, scores_before)
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(rule(ids[order], scores[order]), result[order])


@pytest.mark.parametrize("name", [name for name in ALL if name != "PrefixConstrainedLogitsProcessor"])
def test_no_rule_waits_for_the_device(ids, scores, name):
    """Tensors without values: whatever read one on the host would fail."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = getattr(generation, name)(*ALL[name])(mode.from_tensor(ids), mode.from_tensor(scores))
    assert result.shape == scores.shape


def test_the_timestamp_rules_do_not_wait_for_the_device(ids):
    config = GenerationConfig(no_timestamps_token_id=NO_STAMPS, eos_token_id=TEXT_END)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for begin in (2, 11):
            rule = generation.WhisperTimeStampLogitsProcessor(config, begin)
            assert rule(mode.from_tensor(ids), mode.from_tensor(torch.zeros(5, 40))).shape == (5, 40)


BAD = [
    ("TemperatureLogitsWarper", (0.0,), "temperature=0.0"),
    ("TemperatureLogitsWarper", (-1.0,), "temperature=-1.0"),
    ("TopKLogitsWarper", (0,), "top_k=0"),
    ("TopKLogitsWarper", (1.5,), "top_k=1.5"),
    ("TopPLogitsWarper", (1.5,), "top_p=1.5"),
    ("TopPLogitsWarper", (0.5, -INFINITY, 0), "min_tokens_to_keep=0"),
    ("MinPLogitsWarper", (-0.1,), "min_p=-0.1"),
    ("TypicalLogitsWarper", (1.0,), "typical_p=1.0"),
    ("EpsilonLogitsWarper", (0.0,), "epsilon_cutoff=0.0"),
    ("EtaLogitsWarper", (1.0,), "eta_cutoff=1.0"),
    ("RepetitionPenaltyLogitsProcessor", (-1.0,), "penalty=-1.0"),
    ("RepetitionPenaltyLogitsProcessor", (1.5, -2), "prompt_ignore_length=-2"),
    ("NoRepeatNGramLogitsProcessor", (0,), "ngram_size=0"),
    ("EncoderNoRepeatNGramLogitsProcessor", (0, torch.zeros(1, 2)), "encoder_ngram_size=0"),
    ("SequenceBiasLogitsProcessor", ([],), "sequence_bias is empty"),
    ("SequenceBiasLogitsProcessor", ([[[], 1.0]],), "sequence_bias entry"),
    ("NoBadWordsLogitsProcessor", ([],), r"bad_words_ids=\[\]"),
    ("NoBadWordsLogitsProcessor", ([[]],), r"bad_words_ids holds \[\]"),
    ("SuppressTokensLogitsProcessor", ([-1],), r"suppress_tokens=\[-1\]"),
    ("MinLengthLogitsProcessor", (-1, 2), "min_length=-1"),
    ("MinNewTokensLengthLogitsProcessor", (3, -1, 2), "min_new_tokens=-1"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_arguments_out_of_range_are_refused(name, arguments, message):
    with pytest.raises(GenerationError, match=message):
        getattr(generation, name)(*arguments)


def test_a_list_hands_keywords_to_those_that_take_them(ids, scores):
    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores, shift):
            return scores + shift

    rules = LogitsProcessorList([generation.LogitNormalization(), Shift()])
    assert torch.allclose(rules(ids, scores, shift=2.0), scores.log_softmax(-1) + 2)


def test_a_rule_without_a_call_says_so(ids, scores):
    with pytest.raises(GenerationError, match="LogitsProcessor does not define __call__"):
        LogitsProcessor()(ids, scores)


# ---------------------------------------------------------------- timestamps


def allowed(tokens, scores=None, **options):
    config = GenerationConfig(no_timestamps_token_id=NO_STAMPS, eos_token_id=TEXT_END, **options)
    rule = generation.WhisperTimeStampLogitsProcessor(config, 2, _detect_timestamp_from_logprob=False)
    scores = torch.zeros(len(tokens), 40) if scores is None else scores
    result = rule(torch.tensor([[16, 17, *row] for row in tokens], dtype=torch.long), scores)
    return [set((row > -INFINITY).nonzero().flatten().tolist()) for row in result]


def test_the_first_token_is_a_timestamp_up_to_the_limit():
    assert allowed([[]]) == [set(range(FIRST, 40))]
    assert allowed([[]], max_initial_timestamp_index=4) == [set(range(FIRST, FIRST + 5))]


def test_timestamps_come_in_pairs_and_never_run_back():
    text, stamps = set(range(NO_STAMPS)), set(range(FIRST, 40))
    rows = [[FIRST + 3, 5], [FIRST + 3, FIRST + 4], [5, FIRST + 4], [5, 6], [FIRST, 7, FIRST + 9, FIRST + 9]]
    got = allowed([row[-2:] if len(row) == 2 else row[2:] for row in rows])
    assert got[0] == text | set(range(FIRST + 4, 40))  # text after a start: only later stamps
    assert got[1] == text  # a full pair: text
    assert got[2] == set(range(TEXT_END, NO_STAMPS)) | set(range(FIRST + 4, 40))  # an end: its twin, or stop
    assert got[3] == text | stamps
    assert got[4] == text
    assert allowed([[FIRST + 3]]) == [text]  # a single stamp counts as a full pair


def test_timestamps_win_when_together_they_are_likelier_than_any_text():
    config = GenerationConfig(no_timestamps_token_id=NO_STAMPS, eos_token_id=TEXT_END)
    rule = generation.WhisperTimeStampLogitsProcessor(config, begin_index=1)
    scores = torch.full((2, 40), -4.0)
    scores[:, 3] = 0.0
    scores[0, FIRST:] = -1.0  # nineteen of these outweigh the text token
    result = rule(torch.tensor([[16, 5, 6]] * 2), scores)
    assert (result[0, :FIRST] == -INFINITY).all()
    assert result[1, 3] == 0.0
    rule.set_begin_index(3)
    assert (rule(torch.tensor([[16, 5, 6]]), scores[:1])[0, :FIRST] == -INFINITY).all()


def test_timestamp_rules_need_their_tokens():
    with pytest.raises(GenerationError, match="need no_timestamps_token_id"):
        generation.WhisperTimeStampLogitsProcessor(GenerationConfig(eos_token_id=1), 1)
    with pytest.raises(GenerationError, match="need eos_token_id"):
        generation.WhisperTimeStampLogitsProcessor(GenerationConfig(no_timestamps_token_id=1), 1)
