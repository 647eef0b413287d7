"""What people pass by mistake when they load, save and configure models: each answer is a sentence that helps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from audiomm import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    InputError,
    MissingShardError,
    SaveError,
    WhisperConfig,
    WhisperFeatureExtractor,
)

BUNDLED = "audiomm/whisper-commands"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4410808\n"


@pytest.fixture
def classifier(tiny_whisper_folder, tmp_path) -> Path:
    """A folder with a model of five classes that have names."""
    names = dict(enumerate(["yes", "no", "up", "down", "stop"]))
    model = AutoModelForAudioClassification.from_pretrained(tiny_whisper_folder, id2label=names)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("wrong", [3, WhisperFeatureExtractor(), {}])
def test_what_is_no_place_to_load_from_is_named(wrong):
    for loader in (AutoModel, AutoConfig, AutoTokenizer):
        with pytest.raises(CheckpointNotFoundError, match=f"{type(wrong).__name__} is no place to load from"):
            loader.from_pretrained(wrong)


def test_a_file_of_weights_is_no_folder(tiny_whisper_folder):
    with pytest.raises(CheckpointNotFoundError, match="a file, not a folder"):
        AutoModel.from_pretrained(tiny_whisper_folder / "model.safetensors")


def test_a_name_without_an_owner_is_told_what_names_look_like():
    with pytest.raises(CheckpointNotFoundError, match="begins with its owner, like 'openai/whisper-large-v3'"):
        AutoModel.from_pretrained("large-v3", local_files_only=True)


def test_a_pointer_of_git_lfs_is_recognised(tiny_whisper_folder, tmp_path):
    (tiny_whisper_folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(CorruptCheckpointError, match=r"pointer of Git LFS.*git lfs pull"):
        AutoModel.from_pretrained(tiny_whisper_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(tmp_path / "tok")
        (tmp_path / "tok" / name).write_bytes(POINTER)
        with pytest.raises(ConfigError, match="pointer of Git LFS"):
            AutoTokenizer.from_pretrained(tmp_path / "tok")


def test_a_folder_with_an_adapter_says_how_it_is_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointNotFoundError, match=r"an adapter and no model.*load_lora\(model, "):
        AutoModel.from_pretrained(tmp_path)


def test_a_folder_of_another_program_is_sent_to_the_converter(tmp_path):
    (tmp_path / "config.json").write_text('{"alignment_heads": [], "lang_ids": []}')  # as faster-whisper's
    with pytest.raises(ConfigError, match="audiomm convert"):
        AutoModel.from_pretrained(tmp_path)


def test_of_many_missing_files_a_few_are_named(tiny_whisper_folder):
    (tiny_whisper_folder / "model.safetensors").unlink()
    index = {"weight_map": {f"w{i}": f"model-{i:05d}.safetensors" for i in range(1000)}}
    (tiny_whisper_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingShardError, match="1000 of 1000 .* and 995 more") as caught:
        AutoModel.from_pretrained(tiny_whisper_folder)
    assert len(str(caught.value)) < 1000


def test_weights_in_eight_bit_floats_are_read(tiny_whisper_folder):
    path = tiny_whisper_folder / "model.safetensors"
    weights = load_file(path)
    name = "model.encoder.conv1.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, path)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, dtype="float32")
    assert torch.equal(model.get_parameter(name), weights[name].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("options", [{"device": "gpu"}, {"device_map": "gpu"}, {"device": "cuda:99"}])
def test_devices_that_are_not_here_are_named(tiny_whisper_folder, options):
    with pytest.raises(InputError, match="expected 'cpu', 'cuda'|this machine has"):
        AutoModel.from_pretrained(tiny_whisper_folder, **options)
    with pytest.raises(InputError, match="expected 'cpu', 'cuda'|this machine has"):
        WhisperFeatureExtractor()(np.zeros(100, np.float32), sampling_rate=16000, device=next(iter(options.values())))


def test_weights_are_floats(tiny_whisper_folder):
    with pytest.raises(TypeError, match="dtype=torch.int8: accepted are float32"):
        AutoModel.from_pretrained(tiny_whisper_folder, dtype=torch.int8)


def test_a_model_is_not_made_from_a_name():
    with pytest.raises(ConfigError, match=r"takes a configuration, not a str.*AutoModel.from_pretrained"):
        AutoModel.from_config(BUNDLED)


# ---------------------------------------------------------------------- labels


def test_another_number_of_classes_takes_the_place_of_those_in_the_file(classifier):
    load = AutoModelForAudioClassification.from_pretrained
    model = load(classifier, num_labels=3, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 3
    assert model.classifier.out_features == 3
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert load(classifier, num_labels=5).config.id2label[4] == "stop"


def test_new_names_of_classes_bring_their_numbers_along(classifier):
    config = WhisperConfig.from_pretrained(classifier, id2label={0: "ja", 1: "nein"})
    assert config.label2id == {"ja": 0, "nein": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "num_labels=0: a whole number of at least 1"),
        ({"num_labels": "3"}, "num_labels='3'"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels=3, but id2label names 1"),
        ({"id2label": ["yes", "no"]}, r"id2label=\['yes', 'no'\]: a dict is needed, like \{0: 'yes'"),
        ({"label2id": ["yes", "no"]}, "label2id=.*: a dict is needed"),
    ],
)
def test_labels_that_cannot_be_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        WhisperConfig(**options)


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("wrong", [None, "", 3])
def test_a_place_to_save_is_needed(tiny_whisper, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in (tiny_whisper, tiny_whisper.config, AutoTokenizer.from_pretrained(BUNDLED), WhisperFeatureExtractor()):
        with pytest.raises(SaveError, match=f"cannot save to {wrong!r}: the path of a folder is needed"):
            part.save_pretrained(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -5, "-5GB", "0GB", 1.5, "big"])
def test_files_of_no_size_are_refused(tiny_whisper, tmp_path, size):
    with pytest.raises(SaveError, match="max_shard_size=.*a number of bytes above 0"):
        tiny_whisper.save_pretrained(tmp_path, max_shard_size=size)


def test_a_head_of_its_own_is_not_lost_in_a_file_that_has_none(tiny_whisper, tmp_path):
    tiny_whisper.proj_out.weight = torch.nn.Parameter(tiny_whisper.proj_out.weight + 1.0)
    with pytest.raises(SaveError, match="hold different values, but config.tie_word_embeddings=True"):
        tiny_whisper.save_pretrained(tmp_path / "tied")
    tiny_whisper.config.tie_word_embeddings = False
    tiny_whisper.save_pretrained(tmp_path / "own")
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "own")
    assert torch.equal(loaded.proj_out.weight, tiny_whisper.proj_out.weight)
    tiny_whisper.config.tie_word_embeddings = True
    tiny_whisper.proj_out.weight = torch.nn.Parameter(tiny_whisper.get_input_embeddings().weight.detach().clone())
    tiny_whisper.save_pretrained(tmp_path / "copied")


@pytest.mark.parametrize("is_another", [False, True])
def test_a_head_of_its_own_in_a_file_is_kept_though_the_config_knows_of_none(
    tiny_whisper, tmp_path, caplog, is_another
):
    tiny_whisper.config.tie_word_embeddings = False
    head = tiny_whisper.proj_out.weight.detach() + float(is_another)
    tiny_whisper.proj_out.weight = torch.nn.Parameter(head)
    tiny_whisper.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    found = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert torch.equal(found.proj_out.weight, head)
    assert torch.equal(found.model.decoder.embed_tokens.weight, tiny_whisper.model.decoder.embed_tokens.weight)
    assert found.config.tie_word_embeddings is not is_another
    assert ("both are kept" in caplog.text) is is_another


def test_a_model_without_values_is_not_saved(tiny_whisper, tmp_path):
    with pytest.raises(SaveError, match=r"without values in memory.*pass state_dict="):
        tiny_whisper.to("meta").save_pretrained(tmp_path)


@pytest.mark.parametrize("rows", [0, -1, 2.5, "100"])
def test_a_vocabulary_has_a_size(tiny_whisper, rows):
    with pytest.raises(ConfigError, match=f"new_num_tokens={rows!r}: a whole number"):
        tiny_whisper.resize_token_embeddings(rows)


# ---------------------------------------------------------------------- audio that is cut


def test_what_whispers_extractor_cuts_is_told(caplog):
    extractor, clip = WhisperFeatureExtractor(), np.zeros(31 * 16000, np.float32)
    extractor(clip[: 30 * 16000], sampling_rate=16000)
    extractor(clip, sampling_rate=16000, truncation=False, padding="longest")
    assert caplog.messages == []
    extractor(clip, sampling_rate=16000)
    assert "clip 0 has 496000 samples (31.00 s) and is cut" in caplog.text
    assert "only the first 480000 (30.00 s) are heard" in caplog.text
