"""The text decoder: the same answer however it is asked for, gradients, embeddings, and configs that cannot be."""

from __future__ import annotations

import copy

import pytest
import torch

from audiomm.base.errors import ConfigError, InputError, ShapeError
from audiomm.models.gemma3n import Gemma3nTextConfig, Gemma3nTextModel

CLOSE = 2e-5


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_a_prompt_split_anywhere_gives_the_logits_of_the_whole(text_model, ids):
    model, tokens = text_model(), ids()
    whole = logits_of(model, input_ids=tokens)
    for cut in (1, 5, 6, 7, 14):
        for fixed in (False, True):
            cache = model.make_cache(2, max_length=16, fixed=fixed)
            parts = [
                logits_of(model, input_ids=part, past_key_values=cache) for part in (tokens[:, :cut], tokens[:, cut:])
            ]
            assert (torch.cat(parts, dim=1) - whole).abs().max() < CLOSE, (cut, fixed)


def test_only_layers_with_keys_of_their_own_are_cached(text_model):
    model = text_model()
    assert len(model.cache_specs()) == 3
    assert [spec.window for spec in model.cache_specs()] == [6, None, 6]
    owners = [name for name, _ in model.named_parameters() if "k_proj" in name or "v_proj" in name or "k_norm" in name]
    assert len(owners) == 9


def test_left_padding_changes_nothing_of_what_is_read(text_model, ids):
    model, tokens = text_model(), ids()
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(19) >= 4).long().expand(2, -1)
    with_padding = logits_of(model, input_ids=padded, attention_mask=mask)[:, 4:]
    assert (with_padding - logits_of(model, input_ids=tokens)).abs().max() < CLOSE


def test_a_ready_mask_counts_as_the_mask_of_padding_does(text_model, ids):
    model, tokens = text_model(), ids()
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[1, :3] = 0
    expected = logits_of(model, input_ids=tokens, attention_mask=mask)
    seen = torch.ones(15, 15, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    near = seen & torch.ones(15, 15, dtype=torch.bool).triu(-5)
    ready = {"full_attention": seen, "sliding_attention": near}
    assert (logits_of(model, input_ids=tokens, attention_mask=ready) - expected)[:, 3:].abs().max() < CLOSE
    added = {kind: torch.zeros(part.shape).masked_fill(~part, -torch.inf) for kind, part in ready.items()}
    assert (logits_of(model, input_ids=tokens, attention_mask=added) - expected)[:, 3:].abs().max() < CLOSE
    own = logits_of(model, input_ids=tokens, attention_mask=dict.fromkeys(ready))
    assert (own - logits_of(model, input_ids=tokens)).abs().max() < CLOSE


def test_sequences_packed_into_a_row_do_not_see_each_other(text_model, ids):
    model, tokens = text_model(), ids()
    lengths = [9, 6]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = logits_of(model, input_ids=tokens, position_ids=places, use_cache=False)
    alone = [logits_of(model, input_ids=part, use_cache=False) for part in tokens.split(lengths, dim=1)]
    assert (packed - torch.cat(alone, dim=1)).abs().max() < CLOSE


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_positions_alone_are_the_last_of_all(text_model, ids, keep, padded):
    model, tokens = text_model(), ids()
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :4] = 1 - int(padded)
    whole = logits_of(model, input_ids=tokens, attention_mask=mask)
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        for layer in model.model.layers
    ]
    last = logits_of(model, input_ids=tokens, attention_mask=mask, logits_to_keep=keep)
    for hook in hooks:
        hook.remove()
    assert last.shape[1] == keep
    assert (last - whole[:, -keep:]).abs().max() < CLOSE
    assert seen == [15] * 3 + [keep] * 3  # the layers that share keys ran on what is read


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_responses_runs_the_layers_that_share_keys_on_these_alone(text_model, ids, padded, checkpointing):
    model, tokens = text_model(), ids()
    labels, mask = tokens.clone(), torch.ones(2, 15, dtype=torch.long)
    labels[0, :9], labels[1, :5], labels[:, 12] = -100, -100, -100
    mask[0, :3] = 1 - int(padded)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    seen, found = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for positions_only in (False, True):
        model.zero_grad()
        out = model(input_ids=tokens, attention_mask=mask, labels=labels, loss_positions_only=positions_only)
        if not checkpointing:
            assert seen[-6:] == ([15] * 3 + [9] * 3 if positions_only else [15] * 6)
        out.loss.backward()
        found.append((out.loss.detach(), {name: part.grad.clone() for name, part in model.named_parameters()}))
    (loss, grads), (other, others) = found
    assert torch.allclose(loss, other, atol=1e-6)
    scale = max(grad.abs().max() for grad in grads.values())
    for name, grad in grads.items():
        assert (grad - others[name]).abs().max() < 1e-5 * scale, name


def test_scores_of_responses_are_those_of_the_whole_and_without_labels_there_are_none(text_model, ids):
    model, tokens = text_model(), ids()
    labels = torch.full_like(tokens, -100)
    whole = logits_of(model, input_ids=tokens)
    labels[0, 7], labels[1, 14] = tokens[0, 7], tokens[1, 14]
    for extra in ({}, {"output_hidden_states": True}):
        with torch.no_grad():
            part = model(input_ids=tokens, labels=labels, loss_positions_only=True, **extra)
        assert (part.logits - whole[:, [6, 13]]).abs().max() < CLOSE
    labels.fill_(-100)
    with torch.no_grad():
        assert model(input_ids=tokens, labels=labels, loss_positions_only=True).logits.shape == (2, 0, 288)
    with pytest.raises(ShapeError, match="pass labels, and no logits_to_keep"):
        model(input_ids=tokens, loss_positions_only=True)


def test_hidden_states_and_attentions_are_whole_when_they_are_asked_for(text_model, ids):
    model = text_model()
    with torch.no_grad():
        out = model(ids(), logits_to_keep=1, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(4, 2, 15, 32)] * 7
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 15, 15)] * 6


def test_eager_attention_and_the_fused_kernels_agree(text_model, ids):
    model = text_model()
    fused = logits_of(model, input_ids=ids())
    model.set_attn_implementation("eager")
    assert (logits_of(model, input_ids=ids()) - fused).abs().max() < CLOSE


def gradients(model, tokens, **options):
    model.zero_grad()
    model(tokens, labels=tokens, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_are_the_same_with_cache_without_and_recomputed(text_model, ids):
    """Complaints transformers#45242 and #45312, unsloth-zoo#813 and #1275: shared keys went missing without a cache."""
    model, tokens = text_model().train(), ids()
    plain = gradients(model, tokens, use_cache=False)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    cached = gradients(model, tokens, use_cache=True)
    model.gradient_checkpointing_enable()
    recomputed = gradients(model, tokens, use_cache=True)
    for name, gradient in plain.items():
        size = gradient.abs().max()
        assert (cached[name] - gradient).abs().max() <= 1e-5 * size, name
        assert (recomputed[name] - gradient).abs().max() <= 1e-5 * size, name


def test_the_loss_divides_by_the_number_of_labels_it_is_told(text_model, ids):
    model, tokens = text_model(), ids()
    labels = tokens.clone()
    labels[0, :10] = -100
    mean = model(tokens, labels=labels).loss
    assert torch.allclose(model(tokens, labels=labels, num_items_in_batch=38).loss, mean * 19 / 38)  # 5 + 14 labels
    with pytest.raises(ShapeError, match="score all positions"):
        model(tokens, labels=labels, logits_to_keep=3)


def test_embeddings_of_tokens_lack_what_the_layers_look_up_unless_it_is_passed(text_model, ids):
    model, tokens = text_model(), ids()
    expected = logits_of(model, input_ids=tokens)
    embeds = model.get_input_embeddings()(tokens)
    own = model.model.get_per_layer_inputs(tokens)
    assert (logits_of(model, inputs_embeds=embeds, per_layer_inputs=own) - expected).abs().max() < CLOSE
    assert (logits_of(model, inputs_embeds=embeds) - expected).abs().max() > 0.1


def test_rotary_tables_survive_a_cast_to_bfloat16(text_model, ids):
    model = text_model()
    model.to(torch.bfloat16)
    late = torch.arange(4000, 4015)[None].expand(2, -1)
    model(ids(), position_ids=late)
    frequencies = model.model._frequencies[torch.device("cpu")][6]
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, 1.0 / 10_000.0 ** (torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_and_finite(text_model, ids, dtype):
    model, tokens = text_model(), ids()
    exact = logits_of(model, input_ids=tokens)
    logits = logits_of(copy.deepcopy(model).to(dtype), input_ids=tokens)
    assert logits.dtype == torch.float32  # the soft cap is taken there
    assert logits.isfinite().all()
    assert (logits - exact).abs().mean() < 0.15 * exact.abs().mean()


def test_large_states_do_not_overflow_in_float16(text_model, ids):
    model = text_model().half()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(200.0)
    assert logits_of(model, input_ids=ids()).isfinite().all()


def test_scores_stay_within_the_soft_cap(text_model, ids):
    model = text_model(final_logit_softcapping=2.0)
    capped = logits_of(model, input_ids=ids())
    model.config.final_logit_softcapping = None
    free = logits_of(model, input_ids=ids())
    assert capped.abs().max() <= 2.0 < free.abs().max()
    assert torch.allclose(capped, 2.0 * torch.tanh(free / 2.0))


def test_mixing_coefficients_are_kept_within_their_limit(text_model, tmp_path):
    model = text_model(altup_coef_clip=0.5)
    with torch.no_grad():
        model.model.layers[0].altup.prediction_coefs.weight[0, 0] = 7.0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.layers[0].altup.prediction_coefs.weight.abs().max() == 0.5


def test_new_tokens_get_no_rows_that_stand_for_media(text_model, ids):
    model, tokens = text_model(), ids()
    before = logits_of(model, input_ids=tokens)
    model.resize_token_embeddings(VOCABULARY_AND_MORE)
    assert model.config.vocab_size == VOCABULARY_AND_MORE == model.lm_head.out_features
    assert model.config.vocab_size_per_layer_input == 256
    after = logits_of(model, input_ids=tokens)
    assert torch.allclose(after[..., :288], before, atol=1e-5)
    tokens[0, 3] = VOCABULARY_AND_MORE - 1
    assert logits_of(model, input_ids=tokens).isfinite().all()


VOCABULARY_AND_MORE = 293


def test_neither_or_both_of_ids_and_embeddings_are_refused(text_model, ids):
    model, tokens = text_model(), ids()
    embeds = model.get_input_embeddings()(tokens)
    with pytest.raises(ShapeError, match="exactly one"):
        model()
    with pytest.raises(ShapeError, match="exactly one"):
        model(tokens, inputs_embeds=embeds)
    with pytest.raises(ShapeError, match="follow from input_ids"):
        model(tokens, per_layer_inputs=model.model.get_per_layer_inputs(tokens))
    with pytest.raises(ShapeError, match="attention_mask is of shape"):
        model(tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(ShapeError, match="per_layer_inputs is of shape"):
        model(inputs_embeds=embeds, per_layer_inputs=torch.zeros(2, 3, 6, 8))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[2, 288]], "input_ids holds 288: ids of this model are 0 to 287"),
        ([[-7, 5]], "input_ids holds -7"),
        ([2, 5], r"shape \(2,\); \(rows, tokens\)"),
        ([[]], r"shape \(1, 0\)"),
    ],
)
def test_ids_that_the_vocabulary_has_not_are_refused(text_model, tokens, message):
    with pytest.raises(InputError, match=message):
        text_model()(torch.tensor(tokens, dtype=torch.long))


def test_wrong_ids_are_refused_wherever_a_prompt_is_read(text_model, model):
    for each in (text_model(), model):
        for options in ({}, {"prefill_chunk_size": 1}):
            with pytest.raises(InputError, match="input_ids holds 288"):
                each.generate(torch.tensor([[2, 288, 3]]), max_new_tokens=2, **options)
        with pytest.raises(ShapeError, match="at least one"):
            each.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_what_is_no_cache_is_refused(text_model, ids):
    with pytest.raises(InputError, match="past_key_values is a tuple"):
        text_model()(ids(), past_key_values=())


# ---------------------------------------------------------------------- configurations


def test_older_rotary_fields_become_the_new_one():
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    config = Gemma3nTextConfig(**old)
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert Gemma3nTextConfig.from_dict(config.to_dict()) == config
    assert not {"rope_theta", "rope_local_base_freq", "rope_scaling"} & set(config.to_dict())


def test_keys_of_other_programs_are_kept(tmp_path):
    config = Gemma3nTextConfig(altup_lr_multiplier=1.0, query_pre_attn_scalar=256)
    config.save_pretrained(tmp_path)
    assert Gemma3nTextConfig.from_pretrained(tmp_path).query_pre_attn_scalar == 256


def test_one_number_stands_for_all_layers():
    config = Gemma3nTextConfig(num_hidden_layers=12, num_kv_shared_layers=2, activation_sparsity_pattern=0.5)
    assert config.intermediate_size == [16384] * 12
    assert config.activation_sparsity_pattern == [0.5] * 12
    assert config.kv_sharing_modes == [None] * 8 + ["store", "store"] + ["reuse"] * 2
    assert [config.kv_source(layer) for layer in (3, 10, 11)] == [3, 8, 8]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intermediate_size": [1, 2]}, "intermediate_size has 2 entries; num_hidden_layers=6"),
        ({"intermediate_size": [0] * 6}, "intermediate_size holds 0"),
        ({"activation_sparsity_pattern": [1.0] * 6}, "activation_sparsity_pattern holds 1.0"),
        ({"layer_types": ["full_attention"] * 5 + ["other"]}, "layer_types holds 'other'"),
        ({"num_kv_shared_layers": 5}, "no earlier full_attention layer"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers='7'"),
        ({"hidden_size": 30}, "hidden_size=30 is no multiple of num_attention_heads=4"),
        ({"num_attention_heads": 3, "hidden_size": 33}, "no multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ({"altup_active_idx": 4}, "altup_active_idx='4'"),
        ({"rope_parameters": {"full": {}}}, "entry 'full'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'.*None"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused(text_config, values, message):
    with pytest.raises(ConfigError, match=message):
        text_config(**values)


def test_a_text_model_alone_is_a_model_too(text_config, ids):
    model = Gemma3nTextModel(text_config()).eval()
    assert model(ids()).last_hidden_state.shape == (2, 15, 32)
    assert model(ids(), last_positions=2, return_dict=False)[0].shape == (2, 2, 32)
