"""Configurations: what comes in goes out, and what no model can be is refused at once."""

from __future__ import annotations

import copy
import json

import pytest

from audiomm import AutoConfig, AutoModel, ConfigError, Gemma4Config, Gemma4VisionConfig, SaveError, WhisperConfig


def test_save_and_load_keeps_every_key_of_the_file(tmp_path):
    values = WhisperConfig(d_model=64, encoder_attention_heads=4, decoder_attention_heads=4).to_diff_dict()
    values |= {"some_new_key": {"deep": [1, 2]}, "architectures": ["WhisperForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = WhisperConfig.from_pretrained(tmp_path)
    assert config.some_new_key == {"deep": [1, 2]}
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == values


def test_aliases_read_and_write_the_field_they_stand_for():
    config = WhisperConfig(hidden_size=48, num_attention_heads=3, decoder_attention_heads=3, num_hidden_layers=7)
    assert (config.d_model, config.encoder_attention_heads, config.encoder_layers) == (48, 3, 7)
    config.hidden_size = 96
    assert config.d_model == 96
    assert "hidden_size" not in config.to_dict()


def test_the_specific_name_wins_over_its_alias():
    assert WhisperConfig(encoder_layers=3, num_hidden_layers=9).encoder_layers == 3


@pytest.mark.parametrize(("vocabulary", "end"), [(51864, 50256), (51865, 50257), (51866, 50257)])
def test_special_tokens_follow_from_the_vocabulary(vocabulary, end):
    config = WhisperConfig(vocab_size=vocabulary)
    assert (config.eos_token_id, config.pad_token_id, config.decoder_start_token_id) == (end, end, end + 1)
    assert config.begin_suppress_tokens == [220, end]
    assert WhisperConfig(vocab_size=vocabulary, eos_token_id=7).eos_token_id == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder_layers", 10_000_000), ("decoder_layers", 0), ("d_model", 10**9), ("d_model", -1), ("d_model", "64"),
        ("vocab_size", [1]), ("dropout", 1.5), ("encoder_layerdrop", "a"), ("activation_function", "evil/repo"),
        ("encoder_attention_heads", 7), ("median_filter_width", 4), ("max_source_positions", 0),
        ("num_mel_bins", True), ("attn_implementation", "evil/kernels"),
    ],
)  # fmt: skip
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(ConfigError, match=field):
        WhisperConfig(**{field: value})


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", '"text"', "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_file_cannot_choose_what_code_runs(tmp_path):
    values = WhisperConfig().to_dict() | {
        "attn_implementation": "evil/repo", "_attn_implementation": "evil/repo", "auto_map": {"AutoModel": "x.Y"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.attn_implementation == "sdpa"
    assert not hasattr(config, "auto_map")


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisperer"}')
    with pytest.raises(ConfigError, match="Did you mean 'whisper'"):
        AutoConfig.from_pretrained(tmp_path)


def test_another_familys_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="'bert'"):
        WhisperConfig.from_pretrained(tmp_path)


def test_overrides_win_and_unused_ones_come_back(tmp_path):
    WhisperConfig(d_model=96).save_pretrained(tmp_path)
    config, unused = WhisperConfig.from_pretrained(tmp_path, return_unused_kwargs=True, dropout=0.25, colour="red")
    assert (config.d_model, config.dropout, unused) == (96, 0.25, {"colour": "red"})


def test_fields_of_a_nested_configuration_are_replaced_one_by_one(tmp_path):
    Gemma4Config(text_config={"num_hidden_layers": 4}, vision_config={"rope_theta": 7.0}).save_pretrained(tmp_path)
    config = Gemma4Config.from_pretrained(tmp_path, text_config={"hidden_size": 48}, audio_config={})
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (4, 48)
    assert config.vision_config.rope_parameters == {"rope_type": "axial", "rope_theta": 7.0}
    assert config.audio_config.hidden_size == 1024
    whole = Gemma4Config.from_pretrained(tmp_path, vision_config=Gemma4VisionConfig())
    assert whole.vision_config.rope_parameters["rope_theta"] == 100.0


def test_the_older_name_of_the_type_is_read_and_written():
    config = WhisperConfig(torch_dtype="float16")
    assert config.torch_dtype == "float16"
    config.torch_dtype = "bfloat16"
    assert config.dtype == "bfloat16"
    assert "torch_dtype" not in config.to_dict()


def test_labels_are_numbered_and_named():
    config = WhisperConfig(id2label={"0": "yes", "1": "no", "2": "maybe"})
    assert config.num_labels == 3
    assert config.label2id == {"yes": 0, "no": 1, "maybe": 2}
    assert WhisperConfig(num_labels=4).id2label[3] == "LABEL_3"
    assert json.loads(config.to_json_string())["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}


def test_labels_nobody_named_are_two_and_stay_out_of_files():
    config = WhisperConfig()
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    assert config.to_dict()["id2label"] == config.id2label
    assert "id2label" not in config.to_diff_dict()
    assert "id2label" not in Gemma4Config().to_diff_dict()["text_config"]
    named = WhisperConfig(id2label={0: "yes", 1: "no"})
    named.num_labels = 2
    assert named.id2label == {0: "yes", 1: "no"}
    named.num_labels = 3
    assert named.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    twelve = list(json.loads(WhisperConfig(num_labels=12).to_json_string())["id2label"])
    assert twelve == [str(index) for index in range(12)]


def test_the_attention_is_read_and_chosen_under_the_name_of_transformers():
    config = Gemma4Config()
    assert config._attn_implementation == config.text_config._attn_implementation == "sdpa"
    config._attn_implementation = "eager"
    assert config.attn_implementation == config.text_config.attn_implementation == "eager"
    config._attn_implementation = {"text_config": "sdpa"}
    assert (config._attn_implementation, config.text_config._attn_implementation) == ("eager", "sdpa")
    config._attn_implementation = None
    assert config._attn_implementation == "sdpa"
    assert WhisperConfig(_attn_implementation="eager")._attn_implementation == "eager"
    parts = Gemma4Config(attn_implementation={"vision_config": "eager"}, vision_config={"hidden_size": 64})
    assert (parts.attn_implementation, parts.vision_config.attn_implementation) == ("sdpa", "eager")
    assert not any("attn_implementation" in name for name in parts.to_dict())
    with pytest.raises(ConfigError, match="'sdpa_fast': accepted are sdpa and eager"):
        config._attn_implementation = "sdpa_fast"


def test_methods_take_their_arguments_under_the_names_of_transformers(tmp_path):
    config, unused = WhisperConfig.from_dict(config_dict={"d_model": 96}, return_unused_kwargs=True, other=1)
    assert (config.d_model, unused) == (96, {"other": 1})
    config.update(config_dict={"d_model": 48})
    assert "label2id" in json.loads(config.to_json_string(use_diff=False))
    config.to_json_file(json_file_path=tmp_path / "one.json", use_diff=True)
    assert (tmp_path / "one.json").read_text() == config.to_json_string(use_diff=True)
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    assert WhisperConfig.from_json_file(tmp_path / "all.json") == config
    with pytest.raises(SaveError, match=r"one\.json"):
        config.to_json_file(tmp_path / "one.json" / "inner.json")


@pytest.mark.parametrize("part", ["audio", "vision"])
def test_a_part_of_the_12b_is_found_by_its_type_and_is_no_model_by_itself(part, tmp_path):
    config = AutoConfig.for_model(f"gemma4_unified_{part}")
    assert type(config).__name__ == f"Gemma4Unified{part.title()}Config"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ConfigError, match="no model for AutoModel; it has none"):
        AutoModel.from_config(config)


def test_copies_are_equal_and_independent():
    config = WhisperConfig(suppress_tokens=[1, 2])
    twin = copy.deepcopy(config)
    assert twin == config
    twin.suppress_tokens.append(3)
    assert config.suppress_tokens == [1, 2]
    assert twin != config


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="WhisperConfig has no field 'd_modle'"):
        _ = WhisperConfig().d_modle
