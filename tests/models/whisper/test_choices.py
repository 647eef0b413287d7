"""Prefix, best-of, patience, n-best, languages of windows, and how likely tokens are."""

from __future__ import annotations

import pytest
import torch

from audiomm import GenerationConfig, GenerationError, TextIteratorStreamer
from audiomm.generation.patience import wanted_sequences

BEGIN = 79
OPTIONS = {"language": "en", "return_segments": True, "return_timestamps": True}


def test_the_first_window_starts_with_the_prefix_and_no_other_does(talker, heard, prompts):
    output = talker.generate(heard(1, 100), prefix_ids=[30, 31], **OPTIONS)
    assert output["segments"][0][0]["tokens"].tolist()[:3] == [BEGIN, 30, 31]
    assert prompts[0] == [[3, 4, 7, BEGIN, 30, 31]]
    assert all(rows == [[3, 4, 7]] for rows in prompts[1:])
    untimed = talker.generate(heard(1, 40), language="en", prefix_ids=torch.tensor([30, 31]), return_timestamps=False)
    assert untimed[0, :2].tolist() == [30, 31]


def test_a_prefix_in_a_batch_is_the_prefix_alone(talker, heard, lengths):
    features, mask = heard(3, 100), lengths(100, 50, 90)
    options = {**OPTIONS, "prefix_ids": [30], "prompt_ids": torch.tensor([76, 20, 21])}
    together = talker.generate(features, attention_mask=mask, batch_size=2, **options)["segments"]
    for row in range(3):
        alone = talker.generate(features[row : row + 1], attention_mask=mask[row : row + 1], **options)["segments"][0]
        assert [one["tokens"].tolist() for one in alone] == [one["tokens"].tolist() for one in together[row]]


def test_a_prefix_leaves_room_for_a_text(talker, heard):
    with pytest.raises(GenerationError, match=r"prefix_ids is of shape \(15,\).*at most 14"):
        talker.generate(heard(1, 40), prefix_ids=list(range(10, 25)))


def test_of_several_drawn_texts_the_likeliest_per_token_stands(talker, heard):
    features = heard(2, 40)
    options = {"language": "en", "return_timestamps": False, "max_new_tokens": 6}
    torch.manual_seed(3)
    found = talker.generate(features, temperature=1.0, best_of=4, return_segments=True, **options)["segments"]
    torch.manual_seed(3)
    drawn = talker.generate(
        features, do_sample=True, num_return_sequences=4, return_dict_in_generate=True, output_scores=True, **options
    )
    for window in range(2):
        means = []
        for row in range(4 * window, 4 * window + 4):
            tokens = drawn.sequences[row, 4:].tolist()
            count = tokens.index(2) if 2 in tokens else len(tokens)
            steps = [
                float(drawn.scores[step][row].log_softmax(-1)[tokens[step]])
                for step in range(min(count + 1, len(tokens)))
            ]
            means.append((sum(steps) / max(count, 1), tokens[:count]))
        assert found[window][0]["tokens"].tolist() == max(means)[1]
    greedy = talker.generate(features, temperature=0.0, best_of=4, **options)
    assert torch.equal(greedy, talker.generate(features, **options))


@torch.no_grad()
def reference_search(model, features, beams, patience, limit, penalty=None):
    """OpenAI's beam search, written down as the paper's appendix and its code describe it, one hypothesis at a time."""
    start, end = [3, 4, 7, 78], 2
    running, finished = [(0.0, ())], {}
    for _ in range(limit):
        candidates = {}
        for score, text in running:
            logits = model(features, decoder_input_ids=torch.tensor([[*start, *text]])).logits[0, -1]
            values, tokens = logits.log_softmax(-1).topk(beams + 1)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                candidates[(*text, token)] = score + value
        running = []
        ended = []
        for text, score in sorted(candidates.items(), key=lambda item: -item[1]):
            if text[-1] == end:
                ended.append((text[:-1], score))
            else:
                running.append((score, text))
                if len(running) == beams:
                    break
        for text, score in ended:
            if len(finished) < round(beams * patience):
                finished[text] = score
        if len(finished) >= round(beams * patience):
            break
    for score, text in sorted(running, reverse=True):
        if len(finished) >= beams:
            break
        finished[text] = score
    divisor = (lambda n: max(n, 1)) if penalty is None else (lambda n: ((5 + n) / 6) ** penalty)
    return sorted(finished, key=lambda text: -finished[text] / divisor(len(text)))


@pytest.mark.parametrize(
    ("beams", "patience", "penalty"), [(2, 1.0, None), (3, 2.0, None), (3, 0.4, 0.6), (4, 1.0, 1.0)]
)
def test_a_patient_search_is_openais(talker, heard, beams, patience, penalty):
    talker.proj_out.weight.data[2] *= 1.6
    features = heard(3, 40, seed=5)
    found = talker.generate(
        features, language="en", return_timestamps=False, num_beams=beams, patience=patience,
        google_length_penalty=penalty, max_new_tokens=7, num_return_sequences=beams,
    ).view(3, beams, -1)  # fmt: skip
    for row in range(3):
        expected = reference_search(talker, features[row : row + 1], beams, patience, 7, penalty)
        assert [tuple(t for t in text.tolist() if t) for text in found[row]] == [
            tuple(t for t in text if t) for text in expected[:beams]
        ]


def test_patience_that_waits_for_nothing_is_refused(talker, heard):
    with pytest.raises(GenerationError, match="patience=0.1 with num_beams=2 waits for 0 sequences"):
        talker.generate(heard(1, 40), num_beams=2, patience=0.1)
    with pytest.raises(GenerationError, match="do_sample=True draws at random"):
        wanted_sequences(GenerationConfig(num_beams=2, patience=1.0, do_sample=True))


def test_every_hypothesis_has_its_segments(talker, heard):
    features = heard(2, 40)
    many = talker.generate(features, num_beams=3, num_return_sequences=3, output_scores=True, **OPTIONS)
    assert len(many["segments"]) == len(many["sequences"]) == 6
    assert many["languages"] == ["en"] * 6
    assert many["sequences_scores"].view(2, 3).diff(dim=1).le(0).all()
    for row in range(2):
        mine = many["segments"][3 * row : 3 * row + 3]
        assert len({tuple(token for one in segments for token in one["tokens"].tolist()) for segments in mine}) == 3
    assert all(0 <= float(one["start"]) <= float(one["end"]) for segments in many["segments"] for one in segments)


def test_tokens_know_how_likely_they_are(talker, heard):
    features = heard(1, 40)
    for options in ({}, {"num_beams": 2}, {"prefix_ids": [30]}):
        segment = talker.generate(
            features, token_probabilities=True, max_new_tokens=5, **(OPTIONS | options | {"return_timestamps": False})
        )["segments"][0][0]
        tokens = segment["tokens"].tolist()
        with torch.no_grad():
            logits = talker(features, decoder_input_ids=torch.tensor([[3, 4, 7, 78, *tokens]])).logits[0]
        expected = [float(logits[3 + place].softmax(-1)[token]) for place, token in enumerate(tokens)]
        assert segment["token_probabilities"].tolist() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------- languages


def heard_languages(model, features):
    return model.detect_language(features, return_probabilities=True)[1]


def test_windows_of_a_multilingual_recording_have_their_own_languages(talker, heard):
    features = torch.cat([heard(1, 40, seed) for seed in range(8)], dim=2)
    # Every window whole, so that it is known which features each one is.
    options = {"return_segments": True, "return_timestamps": False, "fixed_windows": True}
    expected = [
        max(found, key=found.get)
        for window in range(8)
        for found in heard_languages(talker, features[:, :, 40 * window : 40 * window + 40])
    ]
    assert len(set(expected)) > 1
    output = talker.generate(features, multilingual=True, **options)
    assert [one["language"] for one in output["segments"][0]] == expected
    assert output["languages"] == expected[:1]
    assert {one["language"] for one in talker.generate(features, **options)["segments"][0]} == {expected[0]}


def test_several_windows_vote_on_the_language_until_one_is_sure(talker, heard, encoder_batches):
    features = torch.cat([heard(1, 40, seed) for seed in range(8)], dim=2)
    found = [heard_languages(talker, features[:, :, 40 * window : 40 * window + 40])[0] for window in range(8)]
    best = [max(one, key=one.get) for one in found]
    for threshold in (0.0, 0.45, 1.0):
        sure = next((window for window in range(5) if max(found[window].values()) > threshold), None)
        expected = max(best[:5], key=best[:5].count) if sure is None else best[sure]
        output = talker.generate(
            features, return_segments=True, language_detection_segments=5, language_detection_threshold=threshold
        )
        assert output["languages"] == [expected], threshold
    encoder_batches.clear()
    stream = talker.stream_segments(features, language_detection_segments=5, language_detection_threshold=0.0)
    next(stream)
    assert encoder_batches == [1]


def test_detected_languages_come_with_their_probabilities(talker, heard):
    features = heard(2, 40)
    output = talker.generate(features, language=[None, "fr"], return_segments=True, return_timestamps=False)
    expected = heard_languages(talker, features)[0]
    assert output["language_probabilities"][0] == pytest.approx(expected, abs=1e-5)
    assert output["language_probabilities"][1] is None
    known = talker.generate(features, language="fr", return_segments=True, return_timestamps=False)
    assert "language_probabilities" not in known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of": 0}, "best_of=0: at least 1"),
        ({"language_detection_segments": 0}, "language_detection_segments=0: at least 1"),
        ({"language_detection_threshold": 1.5}, "language_detection_threshold=1.5: a probability"),
        ({"hallucination_silence_threshold": 2.0}, "needs word_timestamps=True"),
        ({"streamer": TextIteratorStreamer(None), "best_of": 2}, "a streamer cannot follow best_of=2"),
    ],
)
def test_choices_that_cannot_be_are_named(talker, heard, options, message):
    with pytest.raises(GenerationError, match=message):
        talker.generate(heard(1, 40), **options)
