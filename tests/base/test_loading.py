"""Checkpoints: round trips, and every way a folder can be wrong."""

from __future__ import annotations

import json
import logging
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from audiomm import (
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    MissingShardError,
    SaveError,
    UnsafeCheckpointError,
    WhisperForAudioClassification,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    WhisperModel,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def same_weights(left, right) -> bool:
    right = right.state_dict()
    return all(torch.equal(value, right[name]) for name, value in left.state_dict().items())


def edit(folder, change) -> None:
    """Rewrite the weights file of a folder."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    return json.loads((folder / INDEX).read_text())["weight_map"]


# ---------------------------------------------------------------------- round trips


def test_a_saved_model_loads_with_the_same_weights_tied_and_in_eval_mode(tiny_whisper, tiny_whisper_folder):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper_folder)
    assert same_weights(tiny_whisper, model)
    assert not model.training
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert "proj_out.weight" not in load_file(tiny_whisper_folder / WEIGHTS)
    assert json.loads((tiny_whisper_folder / "config.json").read_text())["architectures"] == [
        "WhisperForConditionalGeneration"
    ]


def test_shards_with_an_index_load_and_leave_nothing_behind(tiny_whisper, tmp_path):
    weight_map = sharded(tiny_whisper, tmp_path)
    assert len(set(weight_map.values())) > 3
    assert same_weights(tiny_whisper, AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path))
    tiny_whisper.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == [WEIGHTS]


def test_models_with_and_without_heads_read_each_others_files(tiny_whisper, tiny_whisper_folder, tmp_path):
    base = AutoModel.from_pretrained(tiny_whisper_folder)
    assert isinstance(base, WhisperModel)
    assert same_weights(tiny_whisper.model, base)
    base.save_pretrained(tmp_path / "base")
    assert same_weights(tiny_whisper, WhisperForConditionalGeneration.from_pretrained(tmp_path / "base"))
    decoder = WhisperForCausalLM.from_pretrained(tiny_whisper_folder)
    assert same_weights(tiny_whisper.model.decoder, decoder.model.decoder)


def test_a_new_task_head_starts_from_initial_values_with_a_warning(tiny_whisper, tiny_whisper_folder, caplog):
    with caplog.at_level(logging.WARNING, logger="audiomm"):
        model = WhisperForAudioClassification.from_pretrained(tiny_whisper_folder, num_labels=5)
    assert "classifier.weight" in caplog.text
    assert model.classifier.weight.shape[0] == 5
    assert same_weights(tiny_whisper.model.encoder, model.encoder)
    assert 0 < float(model.classifier.weight.detach().std()) < 1
    assert torch.equal(model.classifier.bias, torch.zeros(5))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_weights_are_cast_to_the_type_asked_for_and_auto_keeps_the_files(tiny_whisper_folder, tmp_path, dtype):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, dtype=dtype)
    assert str(model.dtype).endswith(str(dtype).removeprefix("torch."))
    model.save_pretrained(tmp_path)
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype="auto").dtype == model.dtype
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=None).dtype == torch.float32
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32


def test_a_device_map_places_the_model(tiny_whisper, tiny_whisper_folder):
    for device_map in ("cpu", "auto", {"": "cpu"}, {"model": "cpu", "proj_out": "cpu"}):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, device_map=device_map)
        assert model.device.type == "cpu"
        assert same_weights(tiny_whisper, model)
    with pytest.raises(ConfigError, match="exclude each other"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="does not say where"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, device_map={"model.encoder": "cpu"})


def test_changing_a_loaded_model_does_not_change_the_file(tiny_whisper, tiny_whisper_folder):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same_weights(tiny_whisper, AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder))


def test_a_subfolder_is_read(tiny_whisper, tmp_path):
    tiny_whisper.save_pretrained(tmp_path / "inner")
    assert same_weights(tiny_whisper, AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, subfolder="inner"))


def test_the_vocabulary_can_grow_and_stays_tied(tiny_whisper):
    old = tiny_whisper.get_input_embeddings().weight.detach().clone()
    tiny_whisper.resize_token_embeddings(103, pad_to_multiple_of=8)
    new = tiny_whisper.get_input_embeddings().weight
    assert new.shape[0] == tiny_whisper.config.vocab_size == 104
    assert torch.equal(new[:100], old)
    assert torch.allclose(new[101], old.mean(0))
    assert tiny_whisper.proj_out.weight is new
    assert tiny_whisper.resize_token_embeddings() is not None
    assert len(tiny_whisper.get_input_embeddings().weight) == 104


def test_new_rows_of_the_vocabulary_can_be_those_of_a_new_model(tiny_whisper):
    old = tiny_whisper.get_input_embeddings().weight.detach().clone()
    tiny_whisper.resize_token_embeddings(140, mean_resizing=False)
    new = tiny_whisper.get_input_embeddings().weight
    assert torch.equal(new[:100], old)
    assert 0.8 < new[100:].std() / tiny_whisper.config.init_std < 1.2
    assert tiny_whisper.proj_out.weight is new


# ---------------------------------------------------------------------- what does not fit


def test_missing_unexpected_and_misshapen_weights_are_listed(tiny_whisper_folder):
    def change(weights):
        del weights["model.decoder.layers.1.fc1.weight"]
        weights["model.decoder.layers.9.fc1.weight"] = torch.zeros(3)
        weights["model.encoder.conv1.weight"] = torch.zeros(2, 2, 2)

    edit(tiny_whisper_folder, change)
    with pytest.raises(CheckpointMismatchError) as caught:
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)
    for part in ("1 of 89 weights are missing: model.decoder.layers.1.fc1.weight", "model.decoder.layers.9.fc1.weight",
                 "model.encoder.conv1.weight is [2, 2, 2], needed [24, 8, 3]"):  # fmt: skip
        assert part in str(caught.value)


def test_misshapen_weights_can_be_started_anew(tiny_whisper, tiny_whisper_folder, caplog):
    edit(tiny_whisper_folder, lambda weights: weights.update({"model.encoder.conv1.weight": torch.zeros(2, 2, 2)}))
    model, info = AutoModelForSpeechSeq2Seq.from_pretrained(
        tiny_whisper_folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"] == [("model.encoder.conv1.weight", (2, 2, 2), (24, 8, 3))]
    assert torch.isfinite(model.model.encoder.conv1.weight).all()
    assert torch.equal(model.model.encoder.conv1.bias, tiny_whisper.model.encoder.conv1.bias)
    assert "model.encoder.conv1.weight" in caplog.text


def test_strict_false_loads_what_fits(tiny_whisper_folder, caplog):
    edit(tiny_whisper_folder, lambda weights: weights.pop("model.decoder.layer_norm.bias"))
    model, info = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, strict=False, output_loading_info=True)
    assert info["missing_keys"] == ["model.decoder.layer_norm.bias"]
    assert torch.equal(model.model.decoder.layer_norm.bias, torch.zeros(24))


def test_names_from_a_wrapper_are_recognised(tiny_whisper_folder):
    weights = {f"module.{name}": value for name, value in load_file(tiny_whisper_folder / WEIGHTS).items()}
    save_file(weights, tiny_whisper_folder / WEIGHTS)
    with pytest.raises(CheckpointMismatchError, match="start with 'module"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)


def test_integer_and_nan_weights_are_refused(tiny_whisper_folder, tmp_path):
    shutil.copytree(tiny_whisper_folder, tmp_path / "integers")
    edit(tmp_path / "integers", lambda w: w.update({"model.encoder.conv1.bias": torch.ones(24, dtype=torch.int32)}))
    with pytest.raises(CheckpointMismatchError, match="type I32"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "integers")
    edit(tiny_whisper_folder, lambda w: w["model.encoder.conv1.bias"].fill_(torch.nan))
    with pytest.raises(CorruptCheckpointError, match="24 of 24 values are NaN"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, verify=False)
    assert model.model.encoder.conv1.bias.isnan().all()


def test_an_unknown_argument_is_an_error(tiny_whisper_folder):
    with pytest.raises(TypeError, match="'colour'"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, colour="red")
    with pytest.raises(TypeError, match="dtype='int8'"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, dtype="int8")
    with pytest.raises(ConfigError, match="attn_implementation"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, attn_implementation="flash")


# ---------------------------------------------------------------------- broken files


@pytest.mark.parametrize("kept", [0, 4, 9, 0.5, -1])
def test_a_truncated_file_is_named_with_its_size(tiny_whisper_folder, kept):
    path = tiny_whisper_folder / WEIGHTS
    data = path.read_bytes()
    size = int(len(data) * kept) if isinstance(kept, float) else kept if kept >= 0 else len(data) + kept
    path.write_bytes(data[:size])
    with pytest.raises(CorruptCheckpointError, match=rf"model\.safetensors \({size:,} bytes\)"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)


def test_a_header_that_names_a_tensor_twice_is_refused(tiny_whisper_folder):
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    (tiny_whisper_folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CorruptCheckpointError, match="names 'a' twice"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)


def test_all_missing_shards_are_listed(tiny_whisper, tmp_path):
    shards = sorted(set(sharded(tiny_whisper, tmp_path).values()))
    for name in shards[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(MissingShardError, match=f"2 of {len(shards)}.*{shards[0]}, {shards[1]}"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", "x.bin"])
def test_an_index_cannot_point_elsewhere(tiny_whisper, tmp_path, name):
    weight_map = sharded(tiny_whisper, tmp_path)
    first = next(iter(weight_map))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {first: name}}))
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    with pytest.raises(UnsafeCheckpointError, match="only names of .safetensors files"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert not any(path.endswith(name) for path in opened)


def test_an_index_that_lies_about_places_is_refused(tiny_whisper, tmp_path):
    weight_map = sharded(tiny_whisper, tmp_path)
    names = sorted(set(weight_map.values()))
    first = next(name for name, shard in weight_map.items() if shard == names[0])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {first: names[1]}}))
    with pytest.raises(CorruptCheckpointError, match=f"{first} .said to be in {names[1]}"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(tiny_whisper, tmp_path, content):
    sharded(tiny_whisper, tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises((CorruptCheckpointError, ConfigError), match="index"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


def test_a_pickle_is_never_read(tiny_whisper_folder):
    marker = tiny_whisper_folder / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tiny_whisper_folder / WEIGHTS).unlink()
    torch.save(Bomb(), tiny_whisper_folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"only pytorch_model\.bin"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)
    with pytest.raises(UnsafeCheckpointError, match="use_safetensors=False"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder, use_safetensors=False)
    assert not marker.exists()


def test_a_folder_without_weights_or_config_says_so(tiny_whisper_folder, tmp_path):
    (tiny_whisper_folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointNotFoundError, match="there are no weights"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_whisper_folder)
    with pytest.raises(CheckpointNotFoundError, match=r"holds no config\.json"):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        AutoModelForSpeechSeq2Seq.from_pretrained(name)


def test_an_unknown_model_id_offline_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="hub cannot be reached"):
        AutoModelForSpeechSeq2Seq.from_pretrained("someone/nothing", local_files_only=True, cache_dir=tmp_path)


# ---------------------------------------------------------------------- saving


def test_a_failed_save_leaves_the_old_checkpoint_whole(tiny_whisper, tiny_whisper_folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in tiny_whisper_folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("audiomm.base.weights.save_file", full_disk)
    with pytest.raises(SaveError, match="No space left"):
        tiny_whisper.save_pretrained(tiny_whisper_folder)
    assert {path.name: path.read_bytes() for path in tiny_whisper_folder.iterdir()} == before


def test_saving_over_a_file_is_an_error(tiny_whisper, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(SaveError, match="taken"):
        tiny_whisper.save_pretrained(tmp_path / "taken")


def test_only_the_main_process_writes(tiny_whisper, tmp_path):
    tiny_whisper.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", ["5XB", "", "-1GB", "big"])
def test_an_unreadable_shard_size_is_refused(tiny_whisper, tmp_path, size):
    with pytest.raises(SaveError, match="max_shard_size"):
        tiny_whisper.save_pretrained(tmp_path, max_shard_size=size)


# ---------------------------------------------------------------------- weights from elsewhere


def test_a_state_dict_takes_the_place_of_the_files(tiny_whisper, tiny_whisper_folder):
    doubled = {name: value * 2 for name, value in tiny_whisper.state_dict().items()}
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper_folder, state_dict=doubled)
    assert torch.equal(model.model.encoder.conv1.weight, 2 * tiny_whisper.model.encoder.conv1.weight)
    with torch.no_grad():
        model.model.encoder.conv1.weight.zero_()
    assert doubled["model.encoder.conv1.weight"].any(), "the model has copies"
    alone = WhisperForConditionalGeneration.from_pretrained(None, config=tiny_whisper.config, state_dict=doubled)
    assert torch.equal(alone.model.encoder.conv1.weight, doubled["model.encoder.conv1.weight"])
    del doubled["model.encoder.conv1.weight"]
    with pytest.raises(CheckpointMismatchError, match=r"missing: model\.encoder\.conv1\.weight"):
        WhisperForConditionalGeneration.from_pretrained(tiny_whisper_folder, state_dict=doubled)
    with pytest.raises(ConfigError, match="needs config=, a configuration, and state_dict="):
        WhisperForConditionalGeneration.from_pretrained(None)


def test_names_of_a_checkpoint_can_be_mapped(tiny_whisper, tiny_whisper_folder):
    def rename(weights):
        for name in [name for name in weights if name.startswith("model.decoder.")]:
            weights[name.replace("model.decoder.", "writer.")] = weights.pop(name)

    edit(tiny_whisper_folder, rename)
    mapping = {r"^writer\.": "model.decoder."}
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper_folder, key_mapping=mapping)
    assert same_weights(tiny_whisper, model)


def test_shards_of_a_variant_are_named_as_in_transformers(tiny_whisper, tmp_path):
    tiny_whisper.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    index = json.loads((tmp_path / "model.safetensors.index.fp16.json").read_text())
    assert index["metadata"]["total_parameters"] == tiny_whisper.num_parameters()
    assert {name.split("-")[0] for name in index["weight_map"].values()} == {"model.fp16"}
    assert same_weights(tiny_whisper, WhisperForConditionalGeneration.from_pretrained(tmp_path, variant="fp16"))


def test_attention_can_be_chosen_by_part(tiny_whisper, tiny_whisper_folder):
    load = WhisperForConditionalGeneration.from_pretrained
    assert load(tiny_whisper_folder, attn_implementation={"": "eager"}).config.attn_implementation == "eager"
    for wrong in ("fast", {"": "fast"}, {"vision_config": "eager"}):
        with pytest.raises(ConfigError, match=r"attn_implementation=.*accepted are .*, or a dict"):
            load(tiny_whisper_folder, attn_implementation=wrong)
        with pytest.raises(ConfigError, match=r"attn_implementation=.*accepted are .*, or a dict"):
            AutoModel.from_config(tiny_whisper.config.copy(), attn_implementation=wrong)
