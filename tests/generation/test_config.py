"""GenerationConfig: what it accepts, what it refuses, and the file it is kept in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from audiomm.base.errors import CheckpointNotFoundError, ConfigError, GenerationError
from audiomm.generation import GenerationConfig

REFUSED = [
    ("num_beams", 0),
    ("num_beams", -3),
    ("num_beams", 2.5),
    ("num_beams", True),
    ("num_return_sequences", 0),
    ("max_length", 0),
    ("max_length", "20"),
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 1.5),
    ("min_length", -1),
    ("min_new_tokens", -5),
    ("temperature", -1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 2),
    ("top_p", -0.1),
    ("min_p", 1.01),
    ("typical_p", 0.0),
    ("typical_p", 1.5),
    ("epsilon_cutoff", -0.1),
    ("eta_cutoff", 3),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.2),
    ("encoder_repetition_penalty", 0.0),
    ("length_penalty", float("nan")),
    ("length_penalty", "long"),
    ("no_repeat_ngram_size", -1),
    ("encoder_no_repeat_ngram_size", 1.5),
    ("early_stopping", "always"),
    ("early_stopping", 1),
    ("do_sample", 1),
    ("use_cache", "yes"),
    ("cache_implementation", "quick"),
    ("max_time", 0),
    ("stop_strings", ""),
    ("stop_strings", []),
    ("bad_words_ids", [3, 4]),
    ("bad_words_ids", [[]]),
    ("sequence_bias", [[[1], "a"]]),
    ("sequence_bias", {}),
    ("exponential_decay_length_penalty", [3]),
    ("exponential_decay_length_penalty", (-1, 1.5)),
    ("suppress_tokens", [1, -2]),
    ("pad_token_id", -1),
    ("eos_token_id", [1, -1]),
    ("eos_token_id", "</s>"),
    ("forced_bos_token_id", [3]),
    ("num_assistant_tokens", 0),
    ("assistant_confidence_threshold", 1.5),
    ("prompt_lookup_num_tokens", 0),
    ("num_assistant_tokens_schedule", "sometimes"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(field, value):
    with pytest.raises(GenerationError) as caught:
        GenerationConfig(**{field: value})
    message = str(caught.value)
    assert f"{field}={value!r} is not accepted: pass " in message
    assert isinstance(caught.value, ValueError)


ACCEPTED = [
    ("temperature", 0.0),
    ("temperature", 2),
    ("top_k", 0),
    ("top_p", 0.0),
    ("top_p", 1),
    ("early_stopping", "never"),
    ("eos_token_id", [1, 2]),
    ("eos_token_id", torch.tensor([1, 2])),
    ("stop_strings", ["a", "b"]),
    ("sequence_bias", {(1, 2): -1.0}),
    ("exponential_decay_length_penalty", (0, 1.5)),
    ("suppress_tokens", []),
    ("length_penalty", -1.0),
    ("cache_implementation", "static"),
]


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_a_value_in_range_is_kept(field, value):
    assert getattr(GenerationConfig(**{field: value}), field) is value


def test_more_sequences_than_beams_are_refused():
    with pytest.raises(GenerationError, match="num_return_sequences=3 is more than num_beams=2"):
        GenerationConfig(num_beams=2, num_return_sequences=3)


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_scale", 1.5), ("penalty_alpha", 0.6), ("num_beam_groups", 2), ("top_h", 0.4)]
)
def test_what_cannot_be_honoured_is_refused_when_generation_starts(field, value):
    with pytest.raises(GenerationError, match=f"{field}={value}"):
        GenerationConfig(**{field: value}).filled().check_runnable()


def test_neutral_values_of_what_cannot_be_honoured_pass():
    GenerationConfig(guidance_scale=1, num_beam_groups=1, diversity_penalty=0.0).filled().check_runnable()


def test_temperature_zero_with_sampling_is_refused():
    with pytest.raises(GenerationError, match="temperature=0 with do_sample=True"):
        GenerationConfig(temperature=0.0, do_sample=True).filled().check_runnable()


def test_several_greedy_sequences_are_refused():
    with pytest.raises(GenerationError, match="num_return_sequences=2 needs do_sample=True or num_beams > 1"):
        GenerationConfig(num_return_sequences=2).filled().check_runnable()


def test_unset_fields_are_none_and_filled_gives_defaults_in_a_copy():
    config = GenerationConfig(num_beams=3)
    filled = config.filled()
    assert (config.top_k, config.max_length, config.do_sample) == (None, None, None)
    assert (filled.num_beams, filled.top_k, filled.max_length, filled.do_sample) == (3, 50, 20, False)


def test_overlaid_takes_what_is_set_and_shares_nothing():
    below, above = GenerationConfig(num_beams=3, suppress_tokens=[1]), GenerationConfig(suppress_tokens=[2], top_k=4)
    merged = below.overlaid(above)
    merged.suppress_tokens.append(9)
    assert (merged.num_beams, merged.top_k) == (3, 4)
    assert (below.suppress_tokens, above.suppress_tokens) == ([1], [2])


def test_update_sets_what_exists_and_returns_the_rest():
    config = GenerationConfig(lang_to_id={"<|en|>": 3})
    assert config.update(num_beams=2, lang_to_id={"<|de|>": 4}, bogus=1, validate=2) == {"bogus": 1, "validate": 2}
    assert (config.num_beams, config.lang_to_id) == (2, {"<|de|>": 4})
    with pytest.raises(GenerationError, match="num_beams=0"):
        config.update(num_beams=0)


def test_unknown_keys_survive_the_file(tmp_path: Path):
    values = {
        "lang_to_id": {"<|en|>": 50259},
        "alignment_heads": [[1, 0], [2, 3]],
        "forced_decoder_ids": [[1, None], [2, 50359]],
        "is_multilingual": True,
        "begin_suppress_tokens": [220, 50257],
        "max_length": 448,
        "transformers_version": "4.31.0",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.lang_to_id == {"<|en|>": 50259}
    config.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == values
    assert GenerationConfig.from_pretrained(tmp_path / "copy") == config


def test_a_key_in_the_file_takes_no_method_away():
    config = GenerationConfig.from_dict({"validate": 3, "eos_ids": 4, "_commit_hash": "x", "_detect": False})
    config.validate()
    assert config.eos_ids == []
    assert config.to_diff_dict() == {"_detect": False}


def test_a_file_with_oddities_loads_and_keywords_win_over_it(tmp_path: Path):
    values = {"temperature": 0.7, "do_sample": False, "pad_token_id": -1, "early_stopping": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    config = GenerationConfig.from_pretrained(tmp_path, temperature=0.2)
    assert (config.temperature, config.pad_token_id) == (0.2, -1)


def test_tensors_and_tuple_keys_are_written_as_lists(tmp_path: Path):
    config = GenerationConfig(eos_token_id=torch.tensor([1, 2]), sequence_bias={(3, 4): 1.5})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 2],
        "sequence_bias": [[[3, 4], 1.5]],
    }


def test_an_odd_value_keeps_no_model_from_being_saved(tmp_path: Path):
    config = GenerationConfig.from_dict({"pad_token_id": -1})
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).pad_token_id == -1
    with pytest.raises(GenerationError, match="pad_token_id=-1"):
        config.filled().check_runnable()


def test_a_folder_without_the_file_says_so(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_a_broken_file_says_so(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_the_file_written_by_name_is_the_text(tmp_path):
    config = GenerationConfig.from_dict(config_dict={"num_beams": 2})
    config.to_json_file(tmp_path / "diff.json")
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    assert (tmp_path / "diff.json").read_text() == config.to_json_string()
    assert (tmp_path / "all.json").read_text() == config.to_json_string(use_diff=False)


def test_what_nothing_reads_yet_is_saved_since_a_call_may_ask_for_sampling(tmp_path):
    GenerationConfig(do_sample=False, temperature=0.5).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path, do_sample=True).temperature == 0.5


def test_from_dict_can_return_a_pair():
    config, unused = GenerationConfig.from_dict({"a": 1, "num_beams": 2}, return_unused_kwargs=True, num_beams=4)
    assert (config.a, config.num_beams, unused) == (1, 4, {})


def test_a_model_config_gives_its_special_tokens_and_those_of_its_text_part():
    text = SimpleNamespace(to_dict=lambda: {"eos_token_id": 7, "pad_token_id": 0, "hidden_size": 8})
    model = SimpleNamespace(to_dict=lambda: {"eos_token_id": 1, "use_cache": True}, text_config=text)
    config = GenerationConfig.from_model_config(model)
    assert config.to_diff_dict() == {"eos_token_id": 1, "pad_token_id": 0}


def test_the_end_tokens_are_a_list_however_they_were_given():
    given = [None, 3, [3, 4], torch.tensor([3, 4])]
    assert [GenerationConfig(eos_token_id=value).eos_ids for value in given] == [[], [3], [3, 4], [3, 4]]


def test_equality_and_text_show_what_is_set():
    assert GenerationConfig(num_beams=2) == GenerationConfig(num_beams=2)
    assert GenerationConfig(num_beams=2) != GenerationConfig(num_beams=3)
    assert repr(GenerationConfig(num_beams=2)) == 'GenerationConfig {\n  "num_beams": 2\n}\n'
