"""The quick decode step of Whisper gives what calling its modules gives."""

from __future__ import annotations

import copy
import threading
from itertools import product

import pytest
import torch
from torch import nn

from audiomm import LoraConfig, WhisperConfig, WhisperForConditionalGeneration, add_lora

STEPS = 42
PROMPT = torch.tensor([[3, 5, 7, 9], [0, 0, 3, 5], [3, 6, 6, 2], [0, 3, 4, 8], [3, 1, 2, 4]])


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = WhisperConfig(
        **{
            "vocab_size": 200,
            "num_mel_bins": 8,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 160,
            "max_source_positions": 30,
            "max_target_positions": 60,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "init_std": 0.2,
            **options,
        }
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


@pytest.fixture
def model():
    return make()


def prefilled(model, rows, *, fixed=False, padded=False, beams=1):
    torch.manual_seed(1)
    encoded = torch.randn(rows, model.config.max_source_positions, model.config.d_model).to(model.dtype)
    cache = model.make_cache(rows, max_length=STEPS + 8, fixed=fixed)
    prompt = PROMPT[:rows]
    mask = (prompt != 0).long() if padded else None
    model.prefill(prompt, cache, attention_mask=mask, encoder_outputs=encoded)
    cache.repeat(beams)
    return cache


def tokens(rows):
    return torch.randint(3, 200, (rows, STEPS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model, step, rows, beams=1, **options):
    """(rows x beams, steps, vocabulary)."""
    cache, found = prefilled(model, rows, beams=beams, **options), []
    for column in tokens(rows * beams).T:
        found.append(step(column[:, None], cache))
        if beams > 1:
            cache.reorder(torch.arange(rows * beams).view(rows, beams).roll(1, dims=1).flatten())
    assert cache.length == PROMPT.shape[1] + STEPS
    return torch.stack(found, dim=1)


def slow(model):
    return lambda ids, cache: model.step(ids, cache).logits[:, -1].float()


#: (rows, fixed, padded, beams): each with each of the others; what is left of all of them is slow.
PAIRS = [(1, False, False, 1), (1, True, True, 3), (5, False, True, 1), (5, True, False, 3), (1, False, True, 3),
         (5, True, True, 1)]  # fmt: skip
OTHERS = sorted(set(product((1, 5), (False, True), (False, True), (1, 3))) - set(PAIRS))


@pytest.mark.parametrize(
    ("rows", "fixed", "padded", "beams"), [*PAIRS, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_the_quick_step_gives_the_logits_of_the_slow_one(model, rows, fixed, padded, beams):
    expected = logits_of(model, slow(model), rows, beams, fixed=fixed, padded=padded)
    found = logits_of(model, model.quick_step(), rows, beams, fixed=fixed, padded=padded)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("beams", [1, 3], ids=["few rows", "many rows"])
@pytest.mark.parametrize("fixed", [False, True])
def test_as_on_a_gpu_it_gives_the_same_as_on_a_cpu(model, fixed, beams):
    quick = model.quick_step()
    expected = logits_of(model, quick, 5, beams, padded=True, fixed=fixed)
    quick.by_products = False
    found = logits_of(model, quick, 5, beams, padded=True, fixed=fixed)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("options", [{"scale_embedding": True}, {"activation_function": "silu"}, {"head": 16}])
def test_all_kinds_of_configurations_have_it(options):
    heads = options.pop("head", 4)
    model = make(decoder_attention_heads=heads, tie_word_embeddings=False, **options)
    expected, found = logits_of(model, slow(model), 2), logits_of(model, model.quick_step(), 2)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("dtype", "fixed", "kind"),
    [(torch.bfloat16, False, "cpu"), (torch.bfloat16, True, "cpu"), (torch.float16, True, "cpu"),
     (torch.bfloat16, True, "gpu"), (torch.float16, True, "gpu")],
)  # fmt: skip
def test_in_half_precision_it_is_as_near_to_float32_as_the_slow_step(dtype, fixed, kind):
    exact = logits_of(make(), slow(make()), 5)
    model = make(dtype)
    quick = model.quick_step()
    if kind == "gpu":
        quick.by_products = quick.attends_by_products = False
    errors = [
        float((logits_of(model, step, 5, fixed=fixed) - exact).norm() / exact.norm()) for step in (quick, slow(model))
    ]
    assert errors[0] <= 1.25 * errors[1] + 1e-4


def test_rows_alone_give_what_they_give_together(model):
    together = logits_of(model, model.quick_step(), 5)
    alone = logits_of(model, model.quick_step(), 1)
    assert torch.allclose(together[:1, :1], alone[:, :1], atol=1e-5 * float(alone.abs().max()))


def test_a_fixed_cache_is_used_again_without_moving(model):
    quick = model.quick_step()
    first = logits_of(model, quick, 2, fixed=True)
    cache = prefilled(model, 2, fixed=True)
    pairs = [cache.cross(layer) for layer in range(3)]
    addresses = [part.data_ptr() for pair in pairs for part in pair]
    cache.reset()
    torch.manual_seed(1)
    encoded = torch.randn(2, 30, 64)
    with torch.no_grad():
        model.prefill(PROMPT[:2], cache, encoder_outputs=encoded)
        found = torch.stack([quick(column[:, None], cache) for column in tokens(2).T], dim=1)
    assert torch.equal(found, first)
    assert [part.data_ptr() for layer in range(3) for part in cache.cross(layer)] == addresses


def test_more_tokens_than_the_decoder_has_places_for_are_refused(model):
    cache = prefilled(model, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="61 tokens were given to a decoder of max_target_pos"):
        for _ in range(60):
            model.quick_step()(torch.tensor([[5]]), cache)


def test_weights_stay_what_they_are_and_the_step_follows_their_changes(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = logits_of(model, model.quick_step(), 2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "fc1" in name or "layer_norm" in name:
                parameter.mul_(1.1)
    expected, found = logits_of(model, slow(model), 2), logits_of(model, model.quick_step(), 2)
    assert not torch.allclose(found, old, atol=1e-3)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_a_model_with_a_quick_step_can_be_saved_copied_and_trained(model, tmp_path):
    expected = logits_of(model, model.quick_step(), 2)
    model.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, loaded.quick_step(), 2), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin, twin.quick_step(), 2), expected)
    twin.train()
    twin(torch.randn(1, 8, 60), labels=torch.tensor([[4, 5, 2]])).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for n, p in twin.named_parameters() if "decoder" in n)


def with_lora(model):
    add_lora(model, LoraConfig(target_modules=["q_proj"]))
    return model.eval()


def with_hook(model):
    model.model.decoder.layers[1].register_forward_hook(lambda *arguments: None)
    return model


def with_other_forward(model):
    model.model.decoder.layers[2].fc2.forward = nn.Identity()
    return model


def with_eager_attention(model):
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("change", [nn.Module.train, with_lora, with_hook, with_other_forward, with_eager_attention])
def test_it_is_not_offered_where_modules_do_something_else(model, change):
    assert model.quick_step() is not None
    assert change(model).quick_step() is None


def test_threads_that_share_a_model_get_the_same_bits(model):
    expected = logits_of(copy.deepcopy(model), copy.deepcopy(model).quick_step(), 2)
    found = [None] * 8

    def work(index):
        found[index] = logits_of(model, model.quick_step(), 2)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.allclose(found[0], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_in_int8_it_is_as_near_to_float32_as_the_slow_step(model, tmp_path):
    exact = logits_of(model, slow(model), 5)
    model.save_pretrained(tmp_path)
    rounded = WhisperForConditionalGeneration.from_pretrained(tmp_path, quantize="int8")
    assert rounded.quick_step() is not None
    errors = [
        float((logits_of(rounded, step, 5) - exact).norm() / exact.norm())
        for step in (rounded.quick_step(), slow(rounded))
    ]
    assert errors[0] <= 1.25 * errors[1] + 1e-4
