"""Gemma 4's text stack: fed in any way it gives one answer; files of all ages load, wrong ones are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from audiomm import CheckpointMismatchError, ConfigError, ShapeError
from audiomm.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4TextModel, Gemma4UnifiedTextConfig
from audiomm.models.gemma4.heads import chunk_edges

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = ["dense", "per-layer", "experts"]


@pytest.fixture(scope="module", params=KINDS)
def model(tiny, request):
    return tiny.make(request.param)


def close(first, second, bound=1e-5):
    return (first - second).abs().max() < bound * second.abs().max()


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("chunks", [[20], [7] + [1] * 13, [3, 9, 8]])
@torch.no_grad()
def test_pieces_through_a_cache_equal_one_pass(tiny, model, fixed, chunks):
    ids = tiny.tokens()
    whole = model(ids, use_cache=False).logits
    cache = model.make_cache(2, max_length=24, fixed=fixed)
    pieces, start = [], 0
    for count in chunks:
        pieces.append(model(ids[:, start : start + count], past_key_values=cache).logits)
        start += count
    assert close(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_a_padded_row_answers_as_it_does_alone(tiny, model):
    ids, mask = tiny.tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    batch = model(ids, attention_mask=mask).logits
    assert close(batch[1:, 5:], model(ids[1:, 5:]).logits)
    right = mask.flip(1)
    assert close(model(ids, attention_mask=right).logits[1:, :11], model(ids[1:, :11]).logits)


@torch.no_grad()
def test_a_ready_mask_counts_as_the_mask_of_padding_does(tiny, model):
    ids, mask = tiny.tokens(2, 16), torch.ones(2, 16, dtype=torch.bool)
    mask[1, :3] = False
    wanted, places = model(ids, attention_mask=mask).logits[mask], torch.arange(16)
    distance = places[:, None] - places[None]
    full = (distance >= 0) & mask[:, None, None]
    near = full & (distance < model.config.sliding_window)
    for ready in ({FULL: full, SLIDING: near}, {kind: (~m * -3e38) for kind, m in ((FULL, full), (SLIDING, near))}):
        assert close(model(ids, attention_mask=ready).logits[mask], wanted)
    last = model(ids, attention_mask={FULL: full, SLIDING: near}, logits_to_keep=1).logits
    assert close(last, model(ids, attention_mask=mask).logits[:, -1:])
    assert close(model(ids, attention_mask={FULL: None, SLIDING: None}).logits, model(ids).logits)
    assert close(model(ids[:, :5], attention_mask=full[:, :, :5, :5]).logits[0], model(ids[:1, :5]).logits)


@torch.no_grad()
def test_sequences_packed_into_a_row_do_not_see_each_other(tiny, model):
    ids, lengths = tiny.tokens(2, 16), [9, 7]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=places, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    assert close(packed, torch.cat(alone, dim=1))
    one = model(ids, position_ids=torch.arange(16)[None] + 3, use_cache=False).logits
    assert close(one, model(ids, position_ids=torch.arange(16)[None] + 3).logits)


@torch.no_grad()
def test_eager_attention_says_the_same_and_shows_its_weights(tiny, model):
    ids = tiny.tokens()
    plain = model(ids)
    seen = model(ids, output_attentions=True, output_hidden_states=True)
    assert close(seen.logits, plain.logits)
    assert len(seen.attentions) == model.config.num_hidden_layers == len(seen.hidden_states) - 1
    for index, weights in enumerate(seen.attentions):
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 20), atol=1e-5)
        window = model.config.window_of(index)
        if window is not None:
            assert weights[..., -1, : 20 - window].abs().max() == 0


@torch.no_grad()
def test_only_what_is_asked_for_is_scored(tiny, model):
    ids = tiny.tokens()
    whole = model(ids).logits
    assert close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    assert close(model(ids, logits_to_keep=torch.tensor([2, 9, 10])).logits, whole[:, [2, 9, 10]])
    labels = ids.clone()
    labels[:, :12] = -100
    assert torch.allclose(model(ids, labels=labels, logits_to_keep=9).loss, model(ids, labels=labels).loss, atol=1e-5)


def test_layers_that_share_keys_run_on_what_is_wanted_only(tiny):
    model, widths = tiny.make("per-layer"), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        model.prefill(tiny.tokens(), model.make_cache(2))
        assert widths == [20, 20, 20, 1, 1, 1]
        widths.clear()
        model.prefill(tiny.tokens(), model.make_cache(2), prefill_chunk_size=8)
        assert widths == [8, 8, 8, 8, 8, 8, 4, 4, 4, 1, 1, 1]


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["loss positions only", "checkpointing", "no cache"])
def test_ways_to_train_have_one_loss_and_one_gradient(tiny, model, way):
    ids = tiny.tokens(3)
    labels = ids.clone()
    labels[0, :14], labels[1, :9], labels[2, :17] = -100, -100, -100
    loss, grads = gradients(model, input_ids=ids, labels=labels)
    twin = copy.deepcopy(model)
    options = {"loss positions only": {"loss_positions_only": True}, "no cache": {"use_cache": False}}.get(way, {})
    if way == "checkpointing":
        twin.gradient_checkpointing_enable()
        twin.train()
    other, others = gradients(twin, input_ids=ids, labels=labels, **options)
    assert torch.allclose(loss, other, atol=1e-6)
    assert grads.keys() == others.keys()
    scale = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() < 1e-6 * scale, name


def test_every_weight_is_trained(tiny):
    # A process group complains about weights that no gradient reaches.
    for kind in KINDS:
        model = tiny.make(kind)
        _, grads = gradients(model, input_ids=tiny.tokens(4, 30), labels=tiny.tokens(4, 30))
        assert [name for name, _ in model.named_parameters() if name not in grads] == []


def test_a_sum_over_pieces_of_a_batch_is_the_whole_loss(tiny, model):
    ids = tiny.tokens(4)
    whole = model(ids, labels=ids).loss
    parts = sum(model(part, labels=part, num_items_in_batch=4 * 19).loss for part in ids.split(1))
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_near_and_never_overflows(tiny, model, dtype):
    ids = tiny.tokens()
    wanted = model(ids).logits
    low = copy.deepcopy(model).to(dtype)
    found = low(ids).logits
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.2 * wanted.abs().mean()
    for layer in low.model.layers:
        layer.mlp.down_proj.weight.mul_(3e4 if dtype == torch.float16 else 1e30)
    assert low(ids).logits.isfinite().all()


@torch.no_grad()
def test_embeddings_of_tokens_stand_for_tokens(tiny, model):
    ids = tiny.tokens()
    embedded = model.get_input_embeddings()(ids)
    assert close(model(inputs_embeds=embedded).logits, model(ids).logits)
    told = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    blind = model.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(blind, told[:, 20:])


def test_wrong_inputs_are_refused(tiny):
    model = tiny.make("per-layer")
    ids = tiny.tokens()
    with pytest.raises(ShapeError, match="pass exactly one of the two"):
        model()
    with pytest.raises(ShapeError, match="pass exactly one of the two"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ShapeError, match="with input_ids they are looked up"):
        model(ids, per_layer_inputs=torch.zeros(2, 20, 6, 8))
    with pytest.raises(ShapeError, match=r"attention_mask is of shape \(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ShapeError, match="pass labels, and no logits_to_keep"):
        model(ids, loss_positions_only=True)


# ---------------------------------------------------------------------- pieces of a prompt


def test_pieces_are_cut_between_pictures():
    blocks = torch.zeros(2, 40, dtype=torch.bool)
    blocks[0, 6:14], blocks[1, 18:31] = True, True
    assert chunk_edges(40, 1, 10, None) == [0, 10, 20, 30, 40]
    assert chunk_edges(40, 1, 10, blocks) == [0, 6, 16, 18, 31, 40]
    assert chunk_edges(9, 1, 10, blocks[:, :9]) == [0, 9]
    assert chunk_edges(12, 5, 10, None) == [0, 7, 12]
    everything = torch.ones(1, 30, dtype=torch.bool)
    assert chunk_edges(30, 1, 10, everything) == [0, 30]


@pytest.mark.parametrize("fixed", [None, "static"])
def test_a_prompt_in_pieces_is_continued_alike(tiny, model, fixed):
    ids, mask = tiny.tokens(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[1, :4], mask[2, :9] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=7, cache_implementation=fixed), whole)


# ---------------------------------------------------------------------- configurations and files


def test_both_spellings_of_a_configuration_are_read_and_written(tiny):
    own = {**tiny.TEXT, **tiny.KINDS["dense"]}
    new = {name: value for name, value in own.items() if "global" not in name}
    new["per_layer_config"] = {"3": {"head_dim": 16, "num_key_value_heads": 1}}
    old, new = Gemma4TextConfig(**own), Gemma4TextConfig.from_dict(new)
    assert old == new
    written = new.to_dict()
    assert written["global_head_dim"] == 16 and written["num_global_key_value_heads"] == 1
    assert written["per_layer_config"] == {"3": {"head_dim": 16, "num_key_value_heads": 1}}
    assert Gemma4TextConfig.from_dict(written) == new
    many = Gemma4TextConfig(num_hidden_layers=12, expert_intermediate_size=7, _sliding_window_pattern=4)
    assert many.layer_types == [SLIDING, SLIDING, SLIDING, FULL] * 3 and many.moe_intermediate_size == 7
    assert many.head_dim_of(3) == 512 and many.head_dim_of(0) == 256 and next(iter(many.per_layer_config)) == "03"


def test_the_last_layer_sees_everything(tiny, caplog):
    config = Gemma4TextConfig(**{**tiny.TEXT, "num_hidden_layers": 2, "layer_types": [SLIDING, SLIDING]})
    assert config.layer_types == [SLIDING, FULL] and "the last layer is made" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": [FULL]}, "layer_types has 1 entries"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 cannot be shared out"),
        ({"head_dim": 7}, "head_dim=7 of layer 0: an even number"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers='9'"),
        ({"num_kv_shared_layers": 4}, "no layer below 2 is of kind full_attention"),
        ({"enable_moe_block": True}, "num_experts='None'"),
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, r"\['rope_type'\]='yarn'"),
        ({"per_layer_config": {"9": {"head_dim": 8}}}, "accepted are layers below 6"),
        ({"hidden_size": 0}, "hidden_size='0'"),
    ],
)
def test_impossible_configurations_are_refused(tiny, values, message):
    with pytest.raises(ConfigError, match=message):
        Gemma4TextConfig(**{**tiny.TEXT, **tiny.KINDS["per-layer"], **values})


def test_the_12b_has_its_own_defaults():
    config = Gemma4UnifiedTextConfig()
    assert (config.sliding_window, config.use_bidirectional_attention) == (1024, "vision")
    assert config.hidden_size_per_layer_input == 0


@torch.no_grad()
def test_files_of_whole_models_and_early_ones_load(tiny, tmp_path):
    model = tiny.make("per-layer")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert not any("layers.3.self_attn.k_proj" in name for name in weights)
    ids = tiny.tokens()
    wanted = model(ids).logits
    extra = {"model.layers.3.self_attn.k_proj.weight": torch.ones(16, 32), "model.rotary_emb.inv_freq": torch.ones(4)}
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in {**weights, **extra}.items()}
        renamed["model.vision_tower.std_bias"] = torch.zeros(3)
        save_file(renamed, tmp_path / "model.safetensors")
        assert torch.equal(Gemma4ForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)
        assert torch.equal(Gemma4TextModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])
    renamed.pop("language_model.model.norm.weight")
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match="model.norm.weight"):
        Gemma4ForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_per_layer_table_may_stay_behind(tiny, tmp_path):
    model = tiny.make("per-layer")
    model.save_pretrained(tmp_path)
    ids = tiny.tokens()
    for placement in ("cpu", "disk"):
        loaded = Gemma4ForCausalLM.from_pretrained(tmp_path, per_layer_embeddings=placement)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ConfigError, match="per_layer_embeddings='moon'"):
        Gemma4ForCausalLM.from_pretrained(tmp_path, per_layer_embeddings="moon")


@torch.no_grad()
def test_a_vocabulary_grows_and_shrinks_with_its_per_layer_table(tiny, tmp_path):
    model, ids = tiny.make("per-layer"), tiny.tokens() % 80
    wanted = model(ids).logits
    model.resize_token_embeddings(100, pad_to_multiple_of=8)
    table, config = model.get_per_layer_input_embeddings(), model.config
    assert table.weight.shape == (104, 6 * 8) and (config.vocab_size, config.vocab_size_per_layer_input) == (104, 104)
    assert torch.allclose(table.weight[103], table.weight[:96].mean(0), atol=1e-6)
    assert table.weight.requires_grad and close(model(ids).logits[..., :96], wanted)
    model.save_pretrained(tmp_path)
    again = Gemma4ForCausalLM.from_pretrained(tmp_path)
    new = torch.tensor([[2, 100, 103]])
    assert torch.equal(again(new).logits, model(new).logits)
    model.resize_token_embeddings(80)
    assert len(model.get_per_layer_input_embeddings().weight) == 80 and close(model(ids).logits, wanted[..., :80])
