"""Gemma 3n's text stack, whole model and files beside the reference's, on tiny random weights, in float32.

Differences on purpose: scores are float32 in every type of the weights; padding frames of clips count as the
reference's do only in batches of one length; embeddings without ids keep what the layers look up.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm.models.gemma3n as ours
from audiomm.models.gemma3n.slicing import slice_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-4
IMAGE, AUDIO, PLACES = 257, 273, 4
TEXT = {
    "vocab_size": 288, "vocab_size_per_layer_input": 256, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6,
    "max_position_embeddings": 256, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 5, "laurel_rank": 6,
    "activation_sparsity_pattern": [0.9, 0.8] + [0.0] * 8,
}  # fmt: skip
AUDIO_SIZES = {
    "vocab_size": 16, "vocab_offset": 272, "input_feat_size": 16, "hidden_size": 24, "conf_attention_chunk_size": 6,
    "conf_attention_context_left": 7, "conf_num_attention_heads": 3, "conf_num_hidden_layers": 2,
    "sscp_conv_channel_size": [6, 4],
}  # fmt: skip


def block(kind: str, **values: Any) -> dict[str, Any]:
    return {"block_type": kind, "stride": 2, "noskip": False, "se_ratio": 0.0, "act_layer": None} | values


def residual(channels: int) -> dict[str, Any]:
    sizes = {"exp_ratio": 2.0, "dw_kernel_size_start": 0, "dw_kernel_size_mid": 3, "dw_kernel_size_end": 0}
    return block("uir", out_chs=channels, **sizes)


VISION_SIZES = {
    "vocab_size": 16, "vocab_offset": 256, "num_classes": 2, "label_names": ["a", "b"],
    "model_args": {"stem_size": 8, "msfa_output_resolution": 2, "block_args": [
        [block("er", out_chs=8, exp_kernel_size=3, pw_kernel_size=1, exp_ratio=2.0, force_in_chs=0)],
        [residual(8)], [residual(8)], [residual(16)],
    ]},
}  # fmt: skip


@torch.no_grad()
def scatter(model: Any, seed: int) -> Any:
    """Random weights at which every part counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_((0.0 if "per_dim" in name or name.endswith("bias") else 1.0) + 0.3 * noise)
    return model.eval()


@pytest.fixture(scope="module")
def text_pair(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(The reference's text model, ours loaded from what it saved)."""
    theirs = scatter(reference.Gemma3nForCausalLM(reference.Gemma3nTextConfig(**TEXT)), 1)
    theirs.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("text")
    theirs.save_pretrained(folder)
    model, report = ours.Gemma3nForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return theirs, model


@pytest.fixture(scope="module")
def whole_pair(reference: Any, timm: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(The reference's whole model, ours loaded from what it saved)."""
    config = reference.Gemma3nConfig(
        text_config=TEXT, audio_config=AUDIO_SIZES,
        vision_config=reference.Gemma3nVisionConfig.from_dict(copy.deepcopy(VISION_SIZES)),
        audio_soft_tokens_per_image=PLACES, vision_soft_tokens_per_image=PLACES, boi_token_id=250, eoi_token_id=256,
        image_token_id=IMAGE, boa_token_id=251, eoa_token_id=272, audio_token_id=AUDIO,
    )  # fmt: skip
    theirs = scatter(reference.Gemma3nForConditionalGeneration(config), 2)
    # Building the tower fills its arguments with functions, which no file can hold.
    theirs.config.vision_config.model_args = copy.deepcopy(VISION_SIZES["model_args"])
    theirs.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("whole")
    theirs.save_pretrained(folder)
    model, report = ours.Gemma3nForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return theirs, model


def tokens(rows: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def far(one: Any, other: Any) -> float:
    """Largest difference of two tensors."""
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("length", [1, 5, 6, 7, 18])
@torch.no_grad()
def test_logits_of_prompts_around_the_window(text_pair: tuple[Any, Any], length: int) -> None:
    theirs, model = text_pair
    ids = tokens(2, length)
    one, other = (each(ids, output_hidden_states=True) for each in (theirs, model))
    assert far(one.logits, other.logits) < CLOSE
    assert len(one.hidden_states) == len(other.hidden_states)
    sizes = [float(state.abs().max()) for state in one.hidden_states]
    apart = map(far, one.hidden_states, other.hidden_states)
    assert max(distance / size for distance, size in zip(apart, sizes, strict=True)) < CLOSE / 2


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_logits_step_by_step(text_pair: tuple[Any, Any], fixed: bool) -> None:
    theirs, model = text_pair
    ids = tokens(2, 20)
    expected = theirs(ids).logits
    cache = model.make_cache(2, max_length=20, fixed=fixed)
    found = [model(ids[:, :4], past_key_values=cache).logits]
    found += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(4, 20)]
    assert far(torch.cat(found, dim=1), expected) < CLOSE


@torch.no_grad()
def test_padding_on_either_side_and_positions(text_pair: tuple[Any, Any]) -> None:
    theirs, model = text_pair
    ids = tokens(2, 14)
    for mask in (torch.ones(2, 14).long(), torch.ones(2, 14).long()):
        mask[1, :5] = 0
        assert far(theirs(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits) < CLOSE
        turned = mask.flip(1)
        one, other = (each(ids, attention_mask=turned).logits[1, :9] for each in (theirs, model))
        assert far(one, other) < CLOSE
    positions = torch.arange(100, 114)[None].expand(2, -1)
    assert far(theirs(ids, position_ids=positions).logits, model(ids, position_ids=positions).logits) < CLOSE


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_sixty_four_greedy_tokens(text_pair: tuple[Any, Any], cache: str | None, rows: int) -> None:
    theirs, model = text_pair
    ids = tokens(rows, 9)
    mask = torch.ones_like(ids)
    mask[0, : rows - 1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = theirs.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **options), expected)
    assert len(set(expected[0, 9:].tolist())) > 8  # not one token for ever


def test_beams(text_pair: tuple[Any, Any]) -> None:
    theirs, model = text_pair
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(tokens(2, 9), **options), theirs.generate(tokens(2, 9), **options))


def test_loss_and_gradients(text_pair: tuple[Any, Any]) -> None:
    theirs, model = text_pair
    ids = tokens(2, 14)
    labels = ids.clone()
    labels[0, :6] = -100
    results = []
    for each in (theirs, model):
        each.zero_grad()
        loss = each(ids, labels=labels).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}))
    (one, expected), (other, found) = results
    assert abs(one - other) < 1e-5
    assert set(expected) == set(found)
    for name, gradient in expected.items():
        assert far(gradient, found[name]) <= 1e-4 * max(1.0, float(gradient.abs().max())), name


@torch.no_grad()
def test_what_is_saved_here_is_read_there(text_pair: tuple[Any, Any], reference: Any, tmp_path: Path) -> None:
    theirs, model = text_pair
    model.save_pretrained(tmp_path)
    again = reference.Gemma3nForCausalLM.from_pretrained(tmp_path)
    assert far(again(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits) < 1e-6


@torch.no_grad()
def test_a_slice_is_read_there(text_pair: tuple[Any, Any], reference: Any, tmp_path: Path) -> None:
    text_pair[1].save_pretrained(tmp_path / "whole")
    slice_checkpoint(tmp_path / "whole", tmp_path / "part", intermediate_size=24, skipped_layers=(5, 6, 7))
    theirs, model = (
        each.from_pretrained(tmp_path / "part") for each in (reference.Gemma3nForCausalLM, ours.Gemma3nForCausalLM)
    )
    assert model.config.num_hidden_layers == 7
    assert far(theirs(tokens(2, 9)).logits, model(tokens(2, 9)).logits) < CLOSE


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_reference(
    text_pair: tuple[Any, Any], reference: Any, tmp_path: Path
) -> None:
    theirs, model = text_pair
    model.save_pretrained(tmp_path)
    ids = tokens(3, 18)
    exact = theirs(ids).logits
    loaded = [
        each.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for each in (reference.Gemma3nForCausalLM, ours.Gemma3nForCausalLM)
    ]
    errors = [float((each(ids).logits.float() - exact).abs().mean()) for each in loaded]
    assert errors[1] < 1.1 * errors[0]


def media() -> dict[str, torch.Tensor]:
    """A batch with a picture and a clip in the first row, a clip in the second, left-padded."""
    generator = torch.Generator().manual_seed(4)
    image, clip = [250, *[IMAGE] * PLACES, 256], [251, *[AUDIO] * PLACES, 272]
    rows = [[2, 11, *image, 21, *clip, 31, 32], [2, 60, *clip, 61, 62, 63, 64]]
    length = len(rows[0])
    padded = [[0] * (length - len(row)) + row for row in rows]
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 41:] = False
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": (torch.tensor(padded) != 0).long(),
        "pixel_values": torch.rand(1, 3, 32, 32, generator=generator),
        "input_features": torch.randn(2, 60, 16, generator=generator),
        "input_features_mask": valid,
    }


@torch.no_grad()
def test_pictures_and_sound(whole_pair: tuple[Any, Any]) -> None:
    theirs, model = whole_pair
    batch = media()
    one, other = (each(**batch) for each in (theirs, model))
    for name in ("image_hidden_states", "audio_hidden_states"):
        assert far(one[name], other[name]) < CLOSE
    real = batch["attention_mask"].bool()
    assert far(one.logits[real], other.logits[real]) < CLOSE
    assert far(theirs(batch["input_ids"][:, :1]).logits, model(batch["input_ids"][:, :1]).logits) < CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_after_pictures_and_sound(whole_pair: tuple[Any, Any], cache: str | None) -> None:
    theirs, model = whole_pair
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    expected = theirs.generate(**media(), **options)
    assert torch.equal(model.generate(**media(), cache_implementation=cache, **options), expected)


@torch.no_grad()
def test_a_whole_model_saved_here_is_read_there(whole_pair: tuple[Any, Any], reference: Any, tmp_path: Path) -> None:
    theirs, model = whole_pair
    model.save_pretrained(tmp_path)
    again = reference.Gemma3nForConditionalGeneration.from_pretrained(tmp_path)
    assert far(again(**media()).logits, theirs(**media()).logits) < CLOSE
