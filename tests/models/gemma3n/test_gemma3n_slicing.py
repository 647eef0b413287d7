"""Slices of a checkpoint: the layers and neurons that are kept compute what they did, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch

from audiomm.base.errors import ConfigError, SaveError
from audiomm.cli.main import main
from audiomm.cli.slice import layer_list, neuron_counts
from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nForConditionalGeneration
from audiomm.models.gemma3n.slicing import PRESETS, slice_checkpoint


def test_narrower_blocks_are_the_first_neurons(text_model, ids, tmp_path):
    model, tokens = text_model(), ids()
    model.save_pretrained(tmp_path / "whole")
    sizes = [20, 48, 30, 48, 10, 1]
    config = slice_checkpoint(tmp_path / "whole", tmp_path / "part", intermediate_size=sizes)
    part = Gemma3nForCausalLM.from_pretrained(tmp_path / "part")
    assert part.config.intermediate_size == config.intermediate_size == sizes
    with torch.no_grad():
        for layer, size in zip(model.model.layers, sizes, strict=True):
            layer.mlp.down_proj.weight[:, size:] = 0.0  # the neurons that are gone
        # In the sparse layer the neurons that are gone also counted for the mean of the gates.
        for layer, size in list(zip(model.model.layers, sizes, strict=True))[:1]:
            layer.mlp.gate_proj.weight = torch.nn.Parameter(layer.mlp.gate_proj.weight[:size].clone())
            layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight[:size].clone())
            layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :size].clone())
        assert torch.allclose(part(tokens).logits, model(tokens).logits, atol=2e-5)


def test_a_skipped_layer_takes_its_embeddings_along(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    slice_checkpoint(
        tmp_path / "whole",
        tmp_path / "part",
        intermediate_size=24,
        skipped_layers=[3, 4, 5],
        max_shard_size="40KB",
    )
    assert len(list((tmp_path / "part").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "part" / "tokenizer.json").read_text() == "{}"
    part, report = Gemma3nForConditionalGeneration.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not report["unexpected_keys"]
    text = part.config.text_config
    assert (text.num_hidden_layers, text.num_kv_shared_layers, text.intermediate_size) == (3, 0, [24] * 3)
    whole, cut = model.get_decoder(), part.get_decoder()
    tokens = ids()
    own = whole.get_per_layer_inputs(tokens)[:, :, :3]
    assert torch.equal(cut.get_per_layer_inputs(tokens), own)
    embeds = whole.embed_tokens(tokens)
    expected = whole.project_per_layer_inputs(embeds, whole.get_per_layer_inputs(tokens))[:, :, :3]
    assert torch.allclose(cut.project_per_layer_inputs(embeds, own), expected, atol=1e-6)
    assert part.generate(tokens, max_new_tokens=3).shape == (2, 18)


def test_a_layer_in_the_middle_of_the_shared_ones_may_go(text_model, tmp_path):
    text_model().save_pretrained(tmp_path / "whole")
    config = slice_checkpoint(tmp_path / "whole", tmp_path / "part", skipped_layers=(4,))
    assert (config.num_hidden_layers, config.num_kv_shared_layers) == (5, 2)
    part = Gemma3nForCausalLM.from_pretrained(tmp_path / "part")
    whole = Gemma3nForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(part.model.layers[4].mlp.up_proj.weight, whole.model.layers[5].mlp.up_proj.weight)
    assert [part.config.kv_source(layer) for layer in (2, 3, 4)] == [2, 2, 2]


def test_presets_are_slices_of_e4b():
    kept = {name: 35 - len(preset.skipped_layers) for name, preset in PRESETS.items()}
    assert all(len(PRESETS[name].intermediate_size) == count for name, count in kept.items())
    assert PRESETS["E2B"].intermediate_size == (8192,) * 30
    assert PRESETS["E2B"].skipped_layers == (20, 21, 22, 23, 24)
    wide = [layer for layer, size in enumerate(PRESETS["E2.69B"].intermediate_size) if size == 16384]
    assert wide == [4, 9, 14, 19, 20, 21, 22, 23, 24]


def test_the_preset_e2b_makes_an_e2b(text_model, tmp_path):
    layers = {"num_hidden_layers": 35, "num_kv_shared_layers": 15, "activation_sparsity_pattern": None,
              "layer_types": None}  # fmt: skip
    text_model(**layers, hidden_size=8, num_attention_heads=2, intermediate_size=16384).save_pretrained(
        tmp_path / "e4b"
    )
    config = slice_checkpoint(tmp_path / "e4b", tmp_path / "e2b", "E2B")
    assert (config.num_hidden_layers, config.num_kv_shared_layers) == (30, 10)
    assert config.layer_types == ["sliding_attention"] * 4 + ["full_attention"] + config.layer_types[:25]
    assert config.activation_sparsity_pattern == [0.95] * 10 + [0.0] * 20
    assert (config.kv_source(28), config.kv_source(29)) == (18, 19)
    assert Gemma3nForCausalLM.from_pretrained(tmp_path / "e2b").num_parameters() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intermediate_size": 0}, "intermediate_size=0 for layer 0"),
        ({"intermediate_size": [49] * 6}, "intermediate_size=49 for layer 0: it has 48 neurons"),
        ({"intermediate_size": 49}, "intermediate_size=49 for layer 0: it has 48 neurons"),
        ({"intermediate_size": [4] * 7}, "intermediate_size has 7 entries: 6"),
        ({"skipped_layers": [6]}, r"skipped_layers=\[6\]: accepted are some of the layers 0 to 5"),
        ({"skipped_layers": [2]}, "layer 3 reads the keys of layer 2, which must stay"),
        ({"size": "E3B"}, "size='E3B': accepted are E2B, E1.96B"),
        ({"size": "E2B"}, "a slice of 35 layers, and this model has 6"),
        ({"size": "E2B", "intermediate_size": 8}, "leave out intermediate_size"),
    ],
)
def test_slices_that_cannot_be_are_refused(text_model, tmp_path, arguments, message):
    text_model().save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match=message):
        slice_checkpoint(tmp_path / "whole", tmp_path / "part", **arguments)
    assert not (tmp_path / "part").exists()


def test_a_folder_with_something_in_it_and_other_models_are_refused(text_model, tiny_whisper_folder, tmp_path):
    text_model().save_pretrained(tmp_path / "whole")
    with pytest.raises(SaveError, match="is not empty"):
        slice_checkpoint(tmp_path / "whole", tmp_path / "whole", intermediate_size=4)
    with pytest.raises(ConfigError, match="model type 'whisper': only Gemma 3n"):
        slice_checkpoint(tiny_whisper_folder, tmp_path / "part", intermediate_size=4)
    with pytest.raises(TypeError, match="unknown argument 'sizes'"):
        slice_checkpoint(tmp_path / "whole", tmp_path / "part", sizes=4)


def test_the_command_writes_a_folder_that_is_read(text_model, ids, tmp_path, capsys):
    text_model().save_pretrained(tmp_path / "whole")
    folders = [str(tmp_path / "whole"), str(tmp_path / "part")]
    assert main(["slice", *folders]) == 1
    assert "nothing to leave out: say --size E2B" in capsys.readouterr().err
    assert main(["slice", *folders, "--intermediate_size", "24", "--skip_layers", "3-4"]) == 0
    assert "4 layers of 24 neurons" in capsys.readouterr().out
    part = Gemma3nForCausalLM.from_pretrained(tmp_path / "part")
    assert part.generate(ids(), max_new_tokens=2, min_new_tokens=2).shape == (2, 17)


def test_the_command_reads_lists_of_layers_and_neurons():
    assert layer_list("20-24, 30") == [20, 21, 22, 23, 24, 30]
    assert neuron_counts("8192") == 8192
    assert neuron_counts("8192x3,16384") == [8192, 8192, 8192, 16384]
    with pytest.raises(ConfigError, match="--skip_layers 'all'"):
        layer_list("all")
    with pytest.raises(ConfigError, match="--intermediate_size '8k'"):
        neuron_counts("8k")
