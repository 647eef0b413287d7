"""Whisper's generate(): windows, languages, prompts, fallback and their limits, on a tiny random model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from audiomm import GenerationConfig, GenerationError, ShapeError, TextIteratorStreamer, WhisperForCausalLM
from audiomm.models.whisper.segments import split_segments

# The tiny model's vocabulary: 0 pad, 2 end, 3 start, 4-6 languages, 7-8 tasks, 76 startofprev, 77 nospeech,
# 78 notimestamps, 79-99 <|0.00|> to <|0.40|>: a window of 40 frames is 0.4 s.
BEGIN = 79


@pytest.fixture
def whisper(tiny_whisper):
    config = tiny_whisper.generation_config
    config.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=3)
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 4, "<|de|>": 5, "<|fr|>": 6},
        "task_to_id": {"transcribe": 7, "translate": 8},
        "no_timestamps_token_id": BEGIN - 1,
        "prev_sot_token_id": 76,
        "max_initial_timestamp_index": 5,
        "max_length": 32,
    }.items():
        setattr(config, name, value)
    return tiny_whisper


def noise(rows: int, frames: int, seed: int = 0):
    return torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int):
    return torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])


@pytest.fixture
def encoder_calls(whisper):
    calls = []
    whisper.get_encoder().register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    return calls


# ---------------------------------------------------------------------- short form


def test_short_form_equals_the_plain_loop_over_forward(whisper):
    features = noise(1, 40)
    tokens = [3, 5, 7, 78]
    for _ in range(12):
        tokens.append(int(whisper(features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    expected = [token for token in tokens[4:] if token != 2]
    assert whisper.generate(features, language="de", max_new_tokens=12)[0].tolist() == expected


def test_rows_of_a_batch_give_what_they_give_alone(whisper):
    features = noise(3, 40)
    together = whisper.generate(features, language=["de", "en", "fr"], max_new_tokens=10)
    for row, language in enumerate(["german", "<|en|>", "French"]):
        alone = whisper.generate(features[row : row + 1], language=language, max_new_tokens=10)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert (together[row, len(alone) :] == 0).all()


def test_the_detected_language_is_the_likeliest_and_costs_no_second_encoder_pass(whisper, encoder_calls):
    features = noise(2, 40)
    scores = whisper(features, decoder_input_ids=torch.full((2, 1), 3)).logits[:, 0, 4:7].detach()
    encoder_calls.clear()
    output = whisper.generate(features, return_segments=True, return_timestamps=False)
    assert output["languages"] == [["en", "de", "fr"][index] for index in scores.argmax(-1).tolist()]
    assert encoder_calls == [2]
    ids, probabilities = whisper.detect_language(features, return_probabilities=True)
    assert ids.tolist() == (4 + scores.argmax(-1)).tolist()
    assert probabilities[0]["de"] == pytest.approx(float(scores.softmax(-1)[0, 1]), abs=1e-5)


def test_a_fine_tuned_checkpoint_settles_language_and_task(whisper):
    features = noise(1, 40)
    expected = whisper.generate(features, language="fr", task="translate", max_new_tokens=8)
    chosen = whisper.generate(features, language="de", task="transcribe", max_new_tokens=8)
    whisper.generation_config.language, whisper.generation_config.task = "<|fr|>", "translate"
    assert torch.equal(whisper.generate(features, max_new_tokens=8), expected)
    assert torch.equal(whisper.generate(features, language="de", task="transcribe", max_new_tokens=8), chosen)


@pytest.mark.parametrize("place", ["the call", "its config", "the model's generation config", "the model's config"])
def test_forced_tokens_name_a_language_and_a_task(whisper, place):
    features = noise(1, 40)
    expected = whisper.generate(features, language="de", task="translate", max_new_tokens=8)
    other = whisper.generate(features, language="fr", max_new_tokens=8)
    whisper.generation_config.task = "transcribe"  # what loading makes of the forced tokens of older files
    forced, options = [[1, 5], [2, 8], [3, BEGIN - 1]], {"max_new_tokens": 8}
    if place == "the call":
        options["forced_decoder_ids"] = forced
    elif place == "its config":
        options["generation_config"] = GenerationConfig(forced_decoder_ids=forced)
    else:
        config = whisper.config if place == "the model's config" else whisper.generation_config
        config.forced_decoder_ids = forced
    assert torch.equal(whisper.generate(features, **options), expected)
    assert torch.equal(whisper.generate(features, language="fr", **options), other)


def test_forced_tokens_that_are_text_are_refused(whisper):
    with pytest.raises(GenerationError, match=r"forced_decoder_ids=\[\[1, 20\]\] are not just a language, a task"):
        whisper.generate(noise(1, 40), forced_decoder_ids=[[1, 20]])


def test_times_are_written_at_the_precision_of_the_call(whisper):
    options = {"language": "en", "return_segments": True, "return_timestamps": True, "return_token_timestamps": True}
    features = noise(1, 110)
    plain = whisper.generate(features, **options)["segments"][0]
    coarse = whisper.generate(features, time_precision=0.04, time_precision_features=0.03, **options)["segments"][0]
    assert len(plain) == len(coarse) > 1
    for one, other in zip(plain, coarse, strict=True):
        assert other["start"] == pytest.approx(2 * float(one["start"]))
        within = float(one["end"]) - one["seek"] / 100
        stretched = 3 * within if one.get("end_estimated") else 2 * within
        assert other["end"] == pytest.approx(one["seek"] / 50 + stretched)
        moved = one["token_timestamps"] + one["seek"] / 100
        torch.testing.assert_close(other["token_timestamps"], moved)
    with pytest.raises(GenerationError, match="time_precision=0 and time_precision_features"):
        whisper.generate(features, time_precision=0, **options)


def test_the_decoder_alone_goes_on_with_a_prompt(whisper, tmp_path):
    features, prompt = noise(2, 40), torch.tensor([[3, 5, 7, 78]] * 2)
    expected = whisper.generate(features, language="de", max_new_tokens=6)
    whisper.save_pretrained(tmp_path)
    decoder = WhisperForCausalLM.from_pretrained(tmp_path)
    states = whisper.get_encoder()(features).last_hidden_state
    assert torch.equal(decoder.generate(prompt, encoder_outputs=states, max_new_tokens=6)[:, 4:], expected)
    beams = decoder.generate(prompt, encoder_outputs=(states,), max_new_tokens=6, num_beams=2)[:, 4:]
    assert torch.equal(beams, whisper.generate(features, language="de", max_new_tokens=6, num_beams=2))


def test_an_empty_task_is_no_task(whisper):
    with pytest.raises(GenerationError, match="task='': accepted are 'transcribe' and 'translate'"):
        whisper.generate(noise(1, 40), language="de", task="")


def test_a_prompt_may_be_empty(whisper):
    features = noise(1, 40)
    tokens = [76, 3, 5, 7, 78]
    for _ in range(6):
        tokens.append(int(whisper(features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    expected = [token for token in tokens[5:] if token != 2]
    found = whisper.generate(features, language="de", prompt_ids=torch.tensor([76]), max_new_tokens=6)
    assert found[0].tolist() == expected
    assert expected != whisper.generate(features, language="de", max_new_tokens=6)[0].tolist()


def test_a_known_language_beside_an_unknown_one(whisper):
    features = noise(2, 40)
    detected = whisper.generate(features, return_segments=True, return_timestamps=False)["languages"]
    mixed = whisper.generate(features, language=[None, "fr"], return_segments=True, return_timestamps=False)
    assert mixed["languages"] == [detected[0], "fr"]


def test_static_cache_beams_and_dictionaries_agree_with_the_plain_call(whisper):
    features = noise(2, 40)
    plain = whisper.generate(features, language="en", max_new_tokens=10)
    assert torch.equal(
        whisper.generate(features, language="en", max_new_tokens=10, cache_implementation="static"), plain
    )
    beams = whisper.generate(features, language="en", max_new_tokens=10, num_beams=3)
    static = whisper.generate(features, language="en", max_new_tokens=10, num_beams=3, cache_implementation="static")
    assert torch.equal(beams, static)
    output = whisper.generate(
        features, language="en", max_new_tokens=10, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences[:, :4].tolist() == [[3, 4, 7, 78]] * 2
    assert [[t for t in row if t not in (0, 2)] for row in output.sequences[:, 4:].tolist()] == [
        [t for t in row if t] for row in plain.tolist()
    ]
    assert output.scores[0].shape == (2, 100)
    looked = whisper.generate(
        features, language="en", max_new_tokens=4, return_dict_in_generate=True, output_attentions=True
    )
    assert looked.encoder_attentions[1].shape == (2, 3, 20, 20)
    assert looked.cross_attentions[0][1].shape == (2, 4, 4, 20)
    assert looked.cross_attentions[1][1].shape == (2, 4, 1, 20)


def test_several_sequences_a_clip_are_different_hypotheses(whisper):
    features = noise(2, 40)
    best = whisper.generate(features, language="en", max_new_tokens=8, num_beams=4)
    many = whisper.generate(features, language="en", max_new_tokens=8, num_beams=4, num_return_sequences=3)
    assert len(many) == 6
    assert len({tuple(row) for row in many[:3].tolist()}) == 3
    assert [token for token in many[3].tolist() if token] == [token for token in best[1].tolist() if token]
    with pytest.raises(GenerationError, match="longer than one window"):
        whisper.generate(noise(1, 90), language="en", num_beams=4, num_return_sequences=3)


def test_nothing_of_the_model_changes(whisper):
    config, generation_config = whisper.config.copy(), copy.deepcopy(whisper.generation_config)
    whisper.train()
    whisper.generate(noise(1, 90), temperature=(0.0, 0.5), logprob_threshold=0.0, num_beams=2)
    assert whisper.training
    assert whisper.config == config
    assert whisper.generation_config == generation_config


def test_encoder_outputs_stand_in_for_features(whisper, encoder_calls):
    features = noise(2, 40)
    expected = whisper.generate(features)
    encoded = whisper.get_encoder()(features)
    encoder_calls.clear()
    for form in (encoded, (encoded.last_hidden_state,), encoded.last_hidden_state):
        assert torch.equal(whisper.generate(encoder_outputs=form), expected)
    assert encoder_calls == []


def test_a_streamer_gets_the_tokens_as_they_come(whisper):
    class Words:
        def decode(self, tokens, **kwargs):
            return " ".join(str(int(token)) for token in tokens) + " "

    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    tokens = whisper.generate(noise(1, 40), language="en", max_new_tokens=6, streamer=streamer)[0]
    streamed = [int(word) for word in "".join(streamer).split()]
    assert [token for token in streamed if token != 2] == tokens.tolist()


def test_a_stream_goes_on_through_the_windows(whisper):
    class Ids:
        def decode(self, tokens, **kwargs):
            return " ".join(str(int(token)) for token in tokens) + " "

    streamer = TextIteratorStreamer(Ids(), skip_prompt=True)
    features = noise(1, 110)
    segments = whisper.generate(features, language="en", max_new_tokens=8, streamer=streamer, return_segments=True)
    streamed = [int(word) for word in "".join(streamer).split()]
    texts = [token for one in segments["segments"][0] for token in one["tokens"].tolist()]
    assert len({one["seek"] for one in segments["segments"][0]}) > 1
    remaining = iter(streamed)
    # Text that a window's end cut off is streamed too, and heard again in the next window.
    assert all(token in remaining for token in texts)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_drafts_change_nothing(whisper, tiny_whisper_config, tmp_path, cache):
    torch.manual_seed(5)
    small = type(whisper)(tiny_whisper_config(decoder_layers=1, encoder_layers=1)).eval()
    small.save_pretrained(tmp_path)
    decoder = WhisperForCausalLM.from_pretrained(tmp_path)
    for frames, lengths in ((40, (40, 40)), (110, (110, 70))):
        options = {
            "attention_mask": mask(*lengths), "language": "en", "return_timestamps": True, "max_new_tokens": 10,
            "cache_implementation": cache,
        }  # fmt: skip
        features = noise(2, frames)
        expected = whisper.generate(features, **options)
        for assistant in (small, decoder, whisper):
            assert torch.equal(whisper.generate(features, assistant_model=assistant, **options), expected)
    with pytest.raises(GenerationError, match="encoder of its own"):
        whisper.generate(encoder_outputs=whisper.get_encoder()(noise(1, 40)), assistant_model=small)


# ---------------------------------------------------------------------- long form


def segments_of(whisper, features, **options):
    options = {"return_segments": True, "return_timestamps": True, "language": "en"} | options
    return whisper.generate(features, **options)["segments"]


def plain(segments):
    return [(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in segments]


@pytest.mark.parametrize(
    "options",
    [{}, {"condition_on_prev_tokens": True}, {"num_beams": 2}, {"cache_implementation": "static"},
     {"temperature": (0.0, 0.2), "logprob_threshold": -3.0, "top_k": 1, "no_speech_threshold": 0.02}],
)  # fmt: skip
def test_files_in_a_batch_give_what_they_give_alone(whisper, options):
    lengths = (150, 97, 33)
    features = noise(3, 150)
    together = segments_of(whisper, features, attention_mask=mask(*lengths), **options)
    for row in range(len(lengths)):
        alone = segments_of(whisper, features[row : row + 1], attention_mask=mask(*lengths)[row : row + 1], **options)
        assert plain(alone[0]) == plain(together[row])
        assert alone[0]


def test_windows_are_encoded_once_whatever_is_asked(whisper, encoder_calls):
    windows = []
    whisper.generate(
        noise(1, 130), return_segments=True, temperature=(0.0, 0.4, 0.8), logprob_threshold=10.0,
        no_speech_threshold=0.999, compression_ratio_threshold=1.0,
        monitor_progress=lambda done: windows.append(done.tolist()),
    )  # fmt: skip
    assert encoder_calls == [1] * len(windows)
    assert windows[0] == [[0, 130]]
    assert all(earlier[0][0] < later[0][0] for earlier, later in itertools.pairwise(windows))


def test_times_stay_inside_the_audio_and_in_order(whisper):
    for seed in range(6):
        segments = segments_of(whisper, noise(1, 170, seed))[0]
        starts = [float(one["start"]) for one in segments]
        assert starts == sorted(starts)
        assert all(0 <= float(one["start"]) <= float(one["end"]) for one in segments)
        # As in transformers a timestamp may lie in the padding of the last window; transcribe() bounds it.
        assert all(float(one["end"]) <= one["seek"] / 100 + 0.4 + 1e-9 for one in segments)


def test_short_audio_with_timestamps_ends_where_the_audio_ends(whisper):
    features = noise(1, 40)
    windows = []
    whisper.generate(
        features, attention_mask=(torch.arange(40) < 20).long()[None], language="en", return_timestamps=True,
        monitor_progress=lambda done: windows.append(done.tolist()[0]),
    )  # fmt: skip
    assert all(done < 20 and total == 20 for done, total in windows)


def test_context_is_the_text_before_and_the_prompt_comes_first(whisper, monkeypatch):
    prompts = []
    inner = type(whisper).prefill

    def spy(self, input_ids, cache, **inputs):
        prompts.append(input_ids[0].tolist())
        return inner(self, input_ids, cache, **inputs)

    monkeypatch.setattr(type(whisper), "prefill", spy)
    start = [3, 4, 7]
    given = torch.tensor([76, 30, 31])
    segments_of(whisper, noise(1, 90), prompt_ids=given, max_new_tokens=6)
    assert prompts[0] == [76, 30, 31, *start]
    assert all(prompt == start for prompt in prompts[1:])
    prompts.clear()
    segments_of(whisper, noise(1, 90), prompt_ids=given, prompt_condition_type="all-segments", max_new_tokens=6)
    assert all(prompt == [76, 30, 31, *start] for prompt in prompts)
    prompts.clear()
    segments = segments_of(whisper, noise(1, 70), prompt_ids=given, condition_on_prev_tokens=True, max_new_tokens=4)[0]
    first = [token for one in segments if one["seek"] == 0 for token in one["tokens"].tolist()]
    closing = first[:-1] if len(first) > 2 and first[-1] >= BEGIN and first[-2] >= BEGIN else first
    assert prompts[1] == [76, 30, 31, *closing, *start]


def test_fallback_climbs_only_for_windows_that_need_it(whisper):
    torch.manual_seed(4)
    kept = segments_of(whisper, noise(1, 60), temperature=(0.0, 0.8), logprob_threshold=-50.0)[0]
    assert {one["temperature"] for one in kept} == {0.0}
    raised = segments_of(whisper, noise(1, 60), temperature=(0.0, 0.8), logprob_threshold=0.0)[0]
    assert {one["temperature"] for one in raised} == {0.8}


def test_windows_without_speech_are_skipped(whisper):
    assert segments_of(whisper, noise(1, 60), no_speech_threshold=0.0) == [[]]
    certain = segments_of(whisper, noise(1, 60), no_speech_threshold=0.0, logprob_threshold=-50.0)
    assert len(certain[0]) > 0
    assert whisper.generate(noise(1, 60), language="en", no_speech_threshold=0.0).shape == (1, 0)


def test_seeds_make_sampling_repeatable_and_zero_is_greedy(whisper):
    features = noise(1, 60)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(whisper.generate(features, language="en", temperature=1.0).tolist())
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(1)
    assert whisper.generate(features, language="en", do_sample=True).tolist() == draws[0]
    assert torch.equal(
        whisper.generate(features, language="en", temperature=0.0), whisper.generate(features, language="en")
    )


# ---------------------------------------------------------------------- splitting


def split(*tokens, frames=40):
    found = split_segments(torch.tensor(tokens, dtype=torch.long), BEGIN, frames, offset_seconds=10.0)
    return [(round(start, 2), round(end, 2), piece.tolist()) for start, end, piece in found.segments], found.advance


def test_pairs_of_timestamps_cut_and_the_rest_is_heard_again():
    segments, advance = split(BEGIN, 40, BEGIN + 5, BEGIN + 5, 41, BEGIN + 9, BEGIN + 10, 42)
    assert segments == [
        (10.0, 10.1, [BEGIN, 40, BEGIN + 5]),
        (10.1, 10.18, [BEGIN + 5, 41, BEGIN + 9, BEGIN + 10]),
    ]
    assert advance == 18


def test_a_single_timestamp_at_the_end_says_that_nothing_follows():
    segments, advance = split(BEGIN, 40, BEGIN + 5, BEGIN + 6, 41, BEGIN + 9)
    assert [piece for _, _, piece in segments] == [[BEGIN, 40, BEGIN + 5], [BEGIN + 6, 41, BEGIN + 9]]
    assert advance == 40


@pytest.mark.parametrize(
    ("tokens", "end"), [((40, 41), 10.4), ((BEGIN, 40), 10.4), ((BEGIN, 40, BEGIN + 7), 10.14), ((), 10.4)]
)
def test_without_a_pair_the_window_is_one_segment(tokens, end):
    assert split(*tokens) == ([(10.0, end, list(tokens))], 40)


def test_a_pair_at_zero_does_not_stay_in_place_for_ever():
    assert split(BEGIN, BEGIN, 40)[1] == 40


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "klingon"}, "not one of the 100 languages"),
        ({"language": "spanish"}, "does not know spanish; it knows 3 languages: de, en, fr"),
        ({"language": ["de", "en"]}, "2 entries for a batch of 1"),
        ({"task": "summarise"}, "accepted are 'transcribe' and 'translate'"),
        ({"max_new_tokens": 40}, "at most max_new_tokens=28 fits"),
        ({"prompt_condition_type": "sometimes"}, "'first-segment' and 'all-segments'"),
        ({"prompt_ids": torch.ones(1, 3, dtype=torch.long)}, "tokens of shape"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": ()}, "at least one number"),
        ({"num_segment_frames": 41}, "accepted are 2 to 40"),
        ({"attention_mask": torch.ones(1, 39)}, "frames. = .1, 40. is needed"),
        ({"colour": "red"}, "'colour' is neither"),
        ({"streamer": TextIteratorStreamer(None), "temperature": (0.0, 0.5)}, "cannot take back"),
    ],
)
def test_options_that_cannot_be_are_named(whisper, options, message):
    with pytest.raises((GenerationError, ShapeError), match=message):
        whisper.generate(noise(1, 40), **options)


def test_long_audio_needs_timestamps_and_batches_of_it_a_mask(whisper):
    with pytest.raises(GenerationError, match="return_timestamps=False with audio longer than one window of 40"):
        whisper.generate(noise(1, 41), return_timestamps=False)
    with pytest.raises(GenerationError, match="a batch of 2 items longer than one window"):
        whisper.generate(noise(2, 41))
    with pytest.raises(ShapeError, match=r"\(batch, 8, frames\) is needed"):
        whisper.generate(torch.zeros(8, 40))
    with pytest.raises(GenerationError, match="nothing to transcribe"):
        whisper.generate()
    whisper.generation_config.no_timestamps_token_id = None
    with pytest.raises(GenerationError, match="needs no_timestamps_token_id"):
        whisper.generate(noise(1, 40), return_timestamps=True)


def test_an_english_only_model_takes_no_language_and_no_task(whisper):
    whisper.generation_config.is_multilingual = False
    assert whisper.generate(noise(1, 40), max_new_tokens=4).shape[1] <= 4
    for option in ({"language": "en"}, {"task": "transcribe"}):
        with pytest.raises(GenerationError, match="English-only"):
            whisper.generate(noise(1, 40), **option)
