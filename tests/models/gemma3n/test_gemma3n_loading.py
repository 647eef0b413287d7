"""Names, shapes and numbers of the weights, checkpoints of other classes and ages, the table of per-layer rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from audiomm.base.errors import CheckpointMismatchError, ConfigError
from audiomm.models.gemma3n import (
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nModel,
    Gemma3nTextConfig,
    Gemma3nTextModel,
)

E2B = {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}


def rewrite(folder: Path, change) -> None:
    """Pass the weights of a folder through `change`."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("sizes", "tensors", "parameters", "unused"),
    [
        pytest.param(E2B, 1526, 5_439_438_272, 10, id="E2B"),
        pytest.param({}, 1631, 7_849_978_192, 15, id="E4B"),
    ],
)
def test_the_published_sizes_have_the_published_numbers_of_weights(sizes, tensors, parameters, unused):
    with torch.device("meta"):
        model = Gemma3nForConditionalGeneration(Gemma3nConfig(text_config=Gemma3nTextConfig(**sizes)))
    assert len(model.state_dict()) == tensors + 1  # the head is tied and not in the files
    # The files also hold keys and values of layers that read another layer's: two matrices and a norm each.
    assert model.num_parameters() + unused * (2 * 512 * 2048 + 256) == parameters


def test_names_and_shapes_are_those_of_the_reference(golden):
    expected = json.loads((golden / "manifests" / "expected.json").read_text())
    for name in ("gemma3n-e2b", "gemma3n-e4b"):
        config = Gemma3nConfig.from_pretrained(golden / "manifests" / "configs" / name)
        with torch.device("meta"):
            model = Gemma3nForConditionalGeneration(config)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected[name]


def test_unused_keys_and_values_of_the_hub_are_skipped(model, ids, tmp_path):
    """Weights that nothing uses are not weights of the model (complaint transformers#45312)."""
    model.save_pretrained(tmp_path)
    extra = {
        f"model.language_model.layers.{layer}.self_attn.{name}.weight": torch.zeros(shape)
        for layer in range(3, 6)
        for name, shape in (("k_proj", (16, 32)), ("v_proj", (16, 32)), ("k_norm", (8,)))
    }
    rewrite(tmp_path, lambda weights: weights | extra)
    loaded, report = Gemma3nForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    tokens = ids()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


OLDER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.audio_tower.": "audio_tower.",
    "model.embed_": "embed_",
}


def older_name(name: str) -> str:
    for new, old in OLDER.items():
        name = old + name.removeprefix(new) if name.startswith(new) else name
    return name


def headless_name(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("named", [str, older_name, headless_name])
def test_every_class_reads_its_part_of_a_whole_checkpoint(model, ids, tmp_path, named):
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {named(name): value for name, value in weights.items()})
    tokens = ids()
    with torch.no_grad():
        expected = model(tokens).logits
        for kind in (Gemma3nForConditionalGeneration, Gemma3nForCausalLM):
            assert torch.allclose(kind.from_pretrained(tmp_path)(tokens).logits, expected, atol=1e-6)
        states = model.model(tokens).last_hidden_state
        for kind in (Gemma3nModel, Gemma3nTextModel):
            loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert torch.allclose(loaded(tokens).last_hidden_state, states, atol=1e-6)


def test_a_text_model_is_read_from_its_own_folder_with_and_without_head(text_model, ids, tmp_path):
    model, tokens = text_model(), ids()
    model.save_pretrained(tmp_path / "head")
    assert "lm_head.weight" not in load_file(tmp_path / "head" / "model.safetensors")
    model.model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        for folder in ("head", "plain"):
            again = Gemma3nForCausalLM.from_pretrained(tmp_path / folder)
            assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_missing_weight_is_named(text_model, tmp_path):
    text_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {name: value for name, value in weights.items() if "layers.3.laurel" not in name})
    with pytest.raises(CheckpointMismatchError, match="3 of .* missing: model.layers.3.laurel"):
        Gemma3nForCausalLM.from_pretrained(tmp_path)


def test_initial_weights_are_those_of_a_fresh_model(text_config):
    model = Gemma3nForCausalLM(text_config())
    layer = model.model.layers[0]
    assert layer.altup.correct_output_scale.abs().max() == 0
    assert torch.equal(layer.input_layernorm.weight, torch.ones(32))
    assert layer.self_attn.q_norm.weight.mean() == 1
    assert 0.01 < layer.mlp.gate_proj.weight.std() < 0.03
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------------- where the table of per-layer embeddings is


@pytest.mark.parametrize("placement", ["device", "cpu", "disk"])
def test_a_table_elsewhere_gives_the_same_bits(text_model, ids, tmp_path, placement):
    model, tokens = text_model().to(torch.bfloat16), ids()
    model.save_pretrained(tmp_path)
    loaded = Gemma3nForCausalLM.from_pretrained(tmp_path, per_layer_embeddings=placement)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))
    loaded.save_pretrained(tmp_path / "again")
    assert "per_layer_embeddings" not in json.loads((tmp_path / "again" / "config.json").read_text())
    table = load_file(tmp_path / "again" / "model.safetensors")["model.embed_tokens_per_layer.weight"]
    assert torch.equal(table, model.model.embed_tokens_per_layer.weight)


@pytest.mark.parametrize("placement", ["cpu", "disk"])
def test_a_table_elsewhere_stays_there_and_is_not_trained(model, ids, tmp_path, placement):
    model.save_pretrained(tmp_path)
    loaded = Gemma3nForConditionalGeneration.from_pretrained(tmp_path, per_layer_embeddings=placement)
    table = loaded.get_per_layer_input_embeddings()
    assert table is loaded.model.get_per_layer_input_embeddings()
    place = table.weight.data_ptr()
    loaded.to(torch.float64).train()
    assert table.weight.dtype == torch.float32 and table.weight.data_ptr() == place
    tokens = ids()
    loaded(tokens, labels=tokens).loss.backward()
    assert table.weight.grad is None and not table.weight.requires_grad
    assert loaded.model.language_model.per_layer_model_projection.weight.grad.abs().max() > 0


def test_a_place_that_is_none_is_refused(text_model, tmp_path):
    text_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="per_layer_embeddings='gpu': accepted are device, cpu, disk"):
        Gemma3nForCausalLM.from_pretrained(tmp_path, per_layer_embeddings="gpu")
    with pytest.raises(ConfigError, match="modalities=.*takes text only"):
        Gemma3nForCausalLM.from_pretrained(tmp_path, modalities=("text",))
