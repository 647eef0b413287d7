"""generate() gives the reference's tokens, over many random models; where it differs on purpose, the reason is here.

The models are tiny and random but decode far from ties: weights are drawn wide. Rows are numbers of the table of known
faults of the reference of transformers (prompt repeated in each window, beams lost after a fallback, ...).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SEEDS = range(10)
#: Random models write timestamps where a trained one has none; plain decoding forbids them in both packages.
TIMESTAMPS = list(range(111, 142))
PLAIN = {"return_timestamps": False, "suppress_tokens": [3, 50, 101, 107, 108, 109, *TIMESTAMPS]}
ENGLISH = {"language": "en", "max_new_tokens": 16}
PROMPT = torch.tensor([108, 4, 5, 6])


def frames_of(seed: int) -> int:
    """A length from three to seven windows of 60 frames, never whole ones."""
    return 190 + 23 * seed


def same(first: Any, second: Any) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


SHORT = {
    "greedy": {**ENGLISH, **PLAIN},
    "greedy to the default length": {"language": "en", **PLAIN},
    "timestamps": {"language": "de", "return_timestamps": True, "max_new_tokens": 16},
    "eager sampling switch off": {**ENGLISH, "do_sample": False, "temperature": 0.0},
    "translation": {**ENGLISH, **PLAIN, "task": "translate"},
    "detected language with a task": {"task": "transcribe", "max_new_tokens": 16},
    "three beams": {**ENGLISH, **PLAIN, "num_beams": 3},
    "three beams with timestamps": {**ENGLISH, "num_beams": 3},
    "beams, short texts preferred": {**ENGLISH, **PLAIN, "num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
    "renormalised beams": {**ENGLISH, **PLAIN, "num_beams": 3, "renormalize_logits": True},
    "no repeats": {**ENGLISH, **PLAIN, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "bad words": {**ENGLISH, "bad_words_ids": [[1], [66, 2]]},
    "at least ten tokens": {**ENGLISH, "min_new_tokens": 10},
    "a static cache": {**ENGLISH, "cache_implementation": "static"},
    "a prompt": {**ENGLISH, **PLAIN, "prompt_ids": PROMPT},
    "a late first timestamp": {**ENGLISH, "max_initial_timestamp_index": 29},
    "one pass, everything kept": {**ENGLISH, **PLAIN, "force_unique_generate_call": True},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SHORT)
def test_one_window_gives_the_same_tokens(name: str, batch: int, pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, batch)
        expected, found = theirs.generate(features, **SHORT[name]), ours.generate(features, **SHORT[name])
        assert same(expected, found), f"seed {seed}: {expected.tolist()} and {found.tolist()}"


def test_start_tokens_do_not_count_against_max_length(pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        prompted = {"max_length": 15, "prompt_ids": PROMPT}
        for options in ({"max_length": 20}, {"max_length": 9, "num_beams": 2}, prompted):
            expected = theirs.generate(features, language="en", **PLAIN, **options)
            found = ours.generate(features, language="en", **PLAIN, **options)
            assert same(expected, found), f"seed {seed}, {options}"


def test_every_item_may_have_its_own_language(pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 3)
        options = {"language": ["german", "<|en|>", "zh"], "task": "translate", "max_new_tokens": 12}
        assert same(theirs.generate(features, **options), ours.generate(features, **options)), f"seed {seed}"


def test_detected_languages_are_the_same(pair: Any, noise_features: Any) -> None:
    found = set()
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 3)
        expected = theirs.detect_language(features)
        assert torch.equal(expected, ours.detect_language(features)), f"seed {seed}"
        found |= set(expected.tolist())
    assert len(found) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 10},
        {"do_sample": True, "temperature": 1.0, "top_p": 0.8, "top_k": 0},
        {"do_sample": True, "temperature": 1.3, "min_p": 0.05, "top_k": 0},
        {"temperature": 0.7, "top_k": 50},
    ],
)
def test_the_same_seed_draws_the_same_tokens(options: dict[str, Any], pair: Any, noise_features: Any) -> None:
    drawn = set()
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 2)
        torch.manual_seed(50 + seed)
        expected = theirs.generate(features, **ENGLISH, **PLAIN, **options)
        torch.manual_seed(50 + seed)
        assert same(expected, ours.generate(features, **ENGLISH, **PLAIN, **options)), f"seed {seed}"
        drawn.add(tuple(expected.flatten().tolist()))
    assert len(drawn) == len(SEEDS)


def test_scores_and_logits_of_every_step_are_the_same(pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 2)
        options = {**ENGLISH, **PLAIN, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        expected, found = theirs.generate(features, **options), ours.generate(features, **options)
        assert same(expected.sequences, found.sequences)
        assert len(expected.scores) == len(found.scores) == len(found.logits)
        for one, other in zip((*expected.scores, *expected.logits), (*found.scores, *found.logits), strict=True):
            assert torch.equal(one.isinf(), other.isinf())
            real = ~one.isinf()
            assert float((one[real] - other[real]).abs().max()) <= 1e-4


LONG = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "conditioned on the text before": {"condition_on_prev_tokens": True},
    "conditioned beams": {"condition_on_prev_tokens": True, "num_beams": 3},
    "conditioned with a prompt": {"condition_on_prev_tokens": True, "prompt_ids": PROMPT},
    "a prompt in all windows": {
        "condition_on_prev_tokens": True, "prompt_ids": PROMPT, "prompt_condition_type": "all-segments",
    },
    "fallback to a sharper choice": {"temperature": (0.0, 0.4), "top_k": 1, "logprob_threshold": -0.3},
    "fallback for repetition": {"temperature": (0.0, 0.4), "top_k": 1, "compression_ratio_threshold": 0.95},
    "silence skipped": {"temperature": 0.0, "logprob_threshold": -0.05, "no_speech_threshold": 1e-6},
    "a static cache": {"cache_implementation": "static"},
    "detected language with a task": {"language": None, "task": "translate"},
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LONG)
def test_long_audio_gives_the_same_tokens(name: str, batch: int, pair: Any, noise_features: Any) -> None:
    lengths = set()
    for seed in SEEDS:
        theirs, ours = pair(seed=seed, max_target_positions=448 if "condition" in str(LONG[name]) else 64)
        features = noise_features(seed, batch, frames_of(seed))
        options = {**ENGLISH, "return_timestamps": True, **LONG[name]}
        if batch > 1:
            mask = torch.ones(batch, features.shape[-1], dtype=torch.long)
            mask[1, frames_of(seed) - 77 :] = 0
            mask[2, 41 + 9 * seed :] = 0
            options["attention_mask"] = mask
        expected, found = theirs.generate(features, **options), ours.generate(features, **options)
        assert same(expected, found), f"seed {seed}: {expected.tolist()} and {found.tolist()}"
        lengths.add(expected.shape[1])
    assert len(lengths) > 1


def test_forced_tokens_are_the_language_and_the_task(pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        forced = [[1, 104], [2, 105], [3, 110]]
        theirs.generation_config.forced_decoder_ids = forced
        expected = theirs.generate(features, max_new_tokens=16, **PLAIN)
        assert same(expected, ours.generate(features, forced_decoder_ids=forced, max_new_tokens=16, **PLAIN))


@pytest.mark.parametrize("name", ["plain", "beams", "own rule", "own limit", "own end", "sampling", "no top_k"])
def test_the_decoder_alone_goes_on_with_a_prompt(name: str, pair: Any, inputs_for: Any, reference: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair("WhisperForCausalLM", seed=seed)
        inputs = inputs_for("WhisperForCausalLM", seed)
        inputs["encoder_outputs"] = inputs["encoder_outputs"][0]  # the reference gives beams no copies of a tuple
        inputs["input_ids"].clamp_(max=99)  # no padding
        results = []
        for package, model in ((reference.generation, theirs), (audiomm.generation, ours)):
            options: dict[str, Any] = {
                "plain": {"eos_token_id": [5, 9]},
                "beams": {"num_beams": 3},
                "own rule": {"no_repeat_ngram_size": 3, "logits_processor": [package.NoRepeatNGramLogitsProcessor(1)]},
                "own limit": {"stopping_criteria": [package.MaxLengthCriteria(21)]},
                "own end": {"eos_token_id": 5, "stopping_criteria": [package.EosTokenCriteria(9)]},
                "sampling": {"do_sample": True, "top_k": 7},
                "no top_k": {"do_sample": True, "top_k": None, "temperature": 3.0},
            }[name]
            for rule in ("logits_processor", "stopping_criteria"):
                kind = package.LogitsProcessorList if rule == "logits_processor" else package.StoppingCriteriaList
                if rule in options:
                    options[rule] = kind(options[rule])
            torch.manual_seed(seed)
            results.append(model.generate(**inputs, max_new_tokens=9, **options))
        assert same(*results), f"seed {seed}: {results}"


PRECISIONS = [{}, {"time_precision": 0.04, "time_precision_features": 0.03}]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_segments_of_long_audio_are_the_same(precision: dict[str, float], pair: Any, noise_features: Any) -> None:
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        options = {**ENGLISH, "return_timestamps": True, "return_segments": True, **precision}
        features = noise_features(seed, 1, frames_of(seed))
        expected, found = theirs.generate(features, **options), ours.generate(features, **options)
        assert same(expected["sequences"], found["sequences"])
        for one, other in zip(expected["segments"][0], found["segments"][0], strict=True):
            assert torch.equal(one["tokens"], other["tokens"])
            assert one["start"].dtype == other["start"].dtype
            assert abs(float(one["start"] - other["start"])) < 1e-9
            assert abs(float(one["end"] - other["end"])) < 1e-9


def test_an_english_only_model_gives_the_same_tokens(reference_model: Any, noise_features: Any, tmp_path: Any) -> None:
    for seed in SEEDS:
        theirs = reference_model(seed=seed)
        theirs.generation_config.is_multilingual = False
        del theirs.generation_config.lang_to_id, theirs.generation_config.task_to_id
        theirs.save_pretrained(tmp_path / str(seed))
        ours = audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path / str(seed))
        for frames in (60, 211):
            features = noise_features(seed, 1, frames)
            options = {"max_new_tokens": 16, "return_timestamps": True}
            assert same(theirs.generate(features, **options), ours.generate(features, **options)), f"seed {seed}"


def test_the_multilingual_vocabulary_of_the_hub_gives_the_same_tokens(
    reference: Any, reference_model: Any, noise_features: Any, tmp_path: Any
) -> None:
    """Real ids, all 51,865 of them; timestamps beyond the short window of this model are forbidden."""
    ids = {"pad_token_id": 50257, "bos_token_id": 50257, "eos_token_id": 50257, "decoder_start_token_id": 50258}
    theirs = reference_model(seed=1, vocab_size=51865, d_model=24, encoder_layers=1, decoder_layers=1, **ids,
                             begin_suppress_tokens=[220, 50257])  # fmt: skip
    theirs.generation_config = reference.GenerationConfig(
        **ids, begin_suppress_tokens=[220, 50257], max_length=64, return_timestamps=True,
        suppress_tokens=[1, 2, 7, 50358, 50359, 50360, 50361, 50362, *range(50364 + 31, 51865)],
        is_multilingual=True, lang_to_id={"<|en|>": 50259, "<|fr|>": 50265}, max_initial_timestamp_index=20,
        task_to_id={"translate": 50358, "transcribe": 50359}, no_timestamps_token_id=50363,
        forced_decoder_ids=[[1, None], [2, 50359]], prev_sot_token_id=50361,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    for seed in SEEDS:
        for options in ({"language": "french"}, {}, {"language": "en", "num_beams": 2}):
            features = noise_features(seed, 1, 150)
            expected = theirs.generate(features, max_new_tokens=12, **options)
            assert same(expected, ours.generate(features, max_new_tokens=12, **options)), f"seed {seed}, {options}"


# ---------------------------------------------------------------------- differences on purpose


def test_row_1_padding_behind_the_mask_of_a_short_clip_is_not_transcribed(pair: Any, noise_features: Any) -> None:
    """The reference decodes the padded tail of a clip again and again; the mask says where the clip ends."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        mask = torch.ones(1, features.shape[-1], dtype=torch.long)
        mask[:, 24:] = 0
        options = {**ENGLISH, "return_timestamps": True, "return_segments": True, "attention_mask": mask}
        expected, found = (model.generate(features, **options)["segments"][0] for model in (theirs, ours))
        assert all(float(segment["start"]) <= 0.24 for segment in found if segment["seek"])
        assert all(segment["seek"] < 24 for segment in found)
        # What comes from the first window is the same.
        assert torch.equal(expected[0]["tokens"], found[0]["tokens"])
        differing += len(expected) != len(found)
    assert differing, "the reference has mended this: drop the difference"


def test_row_5_beams_are_kept_for_the_windows_after_a_fallback(pair: Any, noise_features: Any) -> None:
    """The reference sets num_beams to 1 at the first fallback and keeps it so for all later windows."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 1, frames_of(seed))
        options = {**ENGLISH, "return_timestamps": True, "num_beams": 2, "top_k": 1, "temperature": (0.0, 0.5)}
        options |= {"compression_ratio_threshold": 0.95, "return_segments": True}
        expected, found = (model.generate(features, **options)["segments"][0] for model in (theirs, ours))
        first = next((segment["seek"] for segment in found if segment["temperature"] > 0), None)
        # Up to and with the first window that fell back the texts are the same.
        for one, other in zip(expected, found, strict=False):
            if first is not None and other["seek"] > first:
                break
            assert torch.equal(one["tokens"], other["tokens"]), f"seed {seed}"
        differing += [one["tokens"].tolist() for one in expected] != [one["tokens"].tolist() for one in found]
    assert differing, "the reference has mended this: drop the difference"


def test_half_the_decoder_is_for_the_text_of_a_window_with_timestamps(pair: Any, noise_features: Any) -> None:
    """224 tokens, as in openai-whisper; the reference goes on to the decoder's last position."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        options = {"language": "en", "return_timestamps": True, "return_segments": True}
        expected, found = (model.generate(features, **options)["segments"][0] for model in (theirs, ours))
        assert max(len(segment["tokens"]) for segment in found) <= 32
        size = min(len(expected[0]["tokens"]), len(found[0]["tokens"]))
        assert torch.equal(expected[0]["tokens"][:size], found[0]["tokens"][:size])
        differing += len(expected[0]["tokens"]) > 32
    assert differing, "the reference has mended this: drop the difference"


def test_row_9_max_length_is_the_same_in_every_window(pair: Any, noise_features: Any) -> None:
    """The reference adds the start tokens to max_length anew in each window, so that later windows are longer."""
    longest = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 1, frames_of(seed))
        options = {"language": "en", "return_timestamps": True, "max_length": 12, "return_segments": True}
        expected, found = (model.generate(features, **options)["segments"][0] for model in (theirs, ours))
        assert max(len(segment["tokens"]) for segment in found) <= 13
        longest = max(longest, *(len(segment["tokens"]) for segment in expected))
    assert longest > 12, "the reference has mended this: drop the difference"


def test_row_46_a_prompt_for_the_first_segment_stands_before_the_first_window_only(
    pair: Any, noise_features: Any
) -> None:
    """Without conditioning the reference puts it before every window, against its own documentation."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed, 1, frames_of(seed))
        options = {**ENGLISH, "return_timestamps": True, "prompt_ids": PROMPT, "return_segments": True}
        expected, found = (model.generate(features, **options)["segments"][0] for model in (theirs, ours))
        assert torch.equal(expected[0]["tokens"], found[0]["tokens"])
        late = [segment for segment in found if segment["seek"]]
        if late:
            seek = late[0]["seek"]
            rest = ours.generate(features[:, :, seek:], **ENGLISH, return_timestamps=True, return_segments=True)
            assert torch.equal(rest["segments"][0][0]["tokens"], late[0]["tokens"])
        differing += not all(
            torch.equal(one["tokens"], other["tokens"]) for one, other in zip(expected, found, strict=False)
        )
    assert differing, "the reference has mended this: drop the difference"


def test_a_task_stands_in_every_multilingual_prompt(pair: Any, noise_features: Any) -> None:
    """With neither language nor task the reference detects the language and then leaves the task token out, unless
    forced_decoder_ids hold one; no model was trained on such a prompt, so "transcribe" is what is meant here."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        found = ours.generate(features, max_new_tokens=16)
        assert same(theirs.generate(features, task="transcribe", max_new_tokens=16), found), f"seed {seed}"
        differing += not same(theirs.generate(features, max_new_tokens=16), found)
    assert differing, "the reference has mended this: drop the difference"


def test_timestamps_that_nobody_asked_for_do_not_cut_a_window(pair: Any, noise_features: Any) -> None:
    """Without return_timestamps one window is one pass; the reference looks for pairs of timestamps all the same and
    decodes the rest of the window again."""
    differing = 0
    for seed in SEEDS:
        theirs, ours = pair(seed=seed)
        features = noise_features(seed)
        expected = theirs.generate(features, **ENGLISH, return_timestamps=False)
        found = ours.generate(features, **ENGLISH, return_timestamps=False)
        assert found.shape[1] <= 16
        once = theirs.generate(features, **ENGLISH, return_timestamps=False, force_unique_generate_call=True)
        assert same(once[:, 4 : 4 + found.shape[1]], found)
        differing += not same(expected, found)
    assert differing, "the reference has mended this: drop the difference"


def test_num_segment_frames_is_heeded(pair: Any, noise_features: Any) -> None:
    """The reference overwrites it with the model's window."""
    theirs, ours = pair(seed=1)
    features = noise_features(1, 1, 200)
    options = {**ENGLISH, "return_timestamps": True}
    whole = theirs.generate(features, **options)
    assert same(theirs.generate(features, **options, num_segment_frames=40), whole), "the reference has mended this"
    found = ours.generate(features, **options, num_segment_frames=40, return_segments=True)
    assert not same(found["sequences"], whole)
    assert all(float(segment["end"] - segment["start"]) <= 0.61 for segment in found["segments"][0])
