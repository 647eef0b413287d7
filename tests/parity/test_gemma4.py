"""Gemma 4's text stack, whole models, drafters and files, against transformers; differences on purpose say why.

The models are tiny and random, and far from ties: weights are drawn wide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm.models.gemma4 as gemma4

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    "vocab_size": 160,
    "vocab_size_per_layer_input": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}
DENSE = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING] * 5 + [FULL],
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
PER_LAYER = {
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}
EXPERTS = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
KINDS = {"dense": DENSE, "per-layer": PER_LAYER, "experts": EXPERTS}


@torch.no_grad()
def randomise(model: Any, seed: int) -> Any:
    """Wide random weights, norms and scalars too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=generator)
        if "layer_scalar" in name or ("scale" in name and tensor.dim() == 1):
            tensor.copy_(1 + 0.2 * noise)
        elif tensor.dim() == 1 and "norm" in name and "bias" not in name:
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.dim() >= 2 and not name.endswith("inv_freq"):
            fan_in = (
                1
                if "embed" in name and "proj" not in name
                else tensor[0].numel()
                if tensor.dim() == 2
                else tensor.shape[-1]
            )
            tensor.copy_(0.2 * noise if fan_in == 1 else 1.2 * noise / fan_in**0.5)
    return model.eval()


@pytest.fixture
def pair(reference: Any, tmp_path: Path) -> Any:
    """Makes (the reference's text model, ours loaded from what it saved)."""

    def make(kind: str, seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
        config = reference.Gemma4TextConfig(**{**TEXT, **KINDS[kind], **overrides})
        theirs = randomise(reference.Gemma4ForCausalLM(config), seed)
        theirs.save_pretrained(tmp_path / f"{kind}{seed}")
        return theirs, gemma4.Gemma4ForCausalLM.from_pretrained(tmp_path / f"{kind}{seed}")

    return make


def prompts(batch: int, length: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, 160, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row], ids[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_logits_and_loss_are_the_same(kind: str, pair: Any) -> None:
    for seed in range(3):
        theirs, ours = pair(kind, seed)
        ids = prompts(1, 23)["input_ids"].expand(2, -1).clone()
        ids[1] = ids[1].flip(0)
        expected = theirs(ids, labels=ids, output_hidden_states=True)
        found = ours(ids, labels=ids, output_hidden_states=True)
        assert len(found.hidden_states) == len(expected.hidden_states)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()
        assert (found.logits - expected.logits).abs().max() < 1e-5 * expected.logits.abs().max()
        assert abs(float(found.loss - expected.loss)) < 1e-5
        assert expected.logits.std() > 0.5


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False},
                                     {"prompt_lookup_num_tokens": 4}], ids=str)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same_far_beyond_the_window(kind: str, batch: int, options: Any, pair: Any) -> None:
    theirs, ours = pair(kind, 5)
    inputs = prompts(batch)
    common = {
        "max_new_tokens": 64,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "no_repeat_ngram_size": 2,
    }
    plain = {"disable_compile": True} if "cache_implementation" in options else {}
    ours_only = {
        name: value for name, value in options.items() if name not in ("use_cache", "prompt_lookup_num_tokens")
    }
    expected = theirs.generate(**inputs, **common, **ours_only, **plain)
    found = ours.generate(**inputs, **common, **options)
    assert torch.equal(found, expected)
    assert len(set(found[0, 11:].tolist())) > 4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_saved_here_computes_the_same_there(kind: str, pair: Any, reference: Any, tmp_path: Path) -> None:
    theirs, ours = pair(kind, 7)
    ours.save_pretrained(tmp_path / "ours")
    again = reference.Gemma4ForCausalLM.from_pretrained(tmp_path / "ours")
    ids = prompts(2, 15)["input_ids"]
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    for index in range(theirs.config.num_hidden_layers):
        layers = again.config.per_layer_config, theirs.config.per_layer_config
        assert layers[0][index].head_dim == layers[1][index].head_dim


UNIFIED = {
    "text_config": {
        **{name: value for name, value in TEXT.items() if "per_layer" not in name},
        "vocab_size": 300,
        **DENSE,
    },
    "vision_config": {"patch_size": 4, "mm_embed_dim": 24, "mm_posemb_size": 10, "output_proj_dims": 24},
    "audio_config": {"audio_embed_dim": 20},
    "image_token_id": 290,
    "audio_token_id": 291,
    "video_token_id": 292,
    "boi_token_id": 293,
    "eoi_token_id": 294,
    "boa_token_id": 295,
    "eoa_token_index": 296,
}


@torch.no_grad()
def test_the_12b_embeds_and_reads_as_there(reference: Any, tmp_path: Path) -> None:
    theirs = randomise(reference.Gemma4UnifiedForConditionalGeneration(reference.Gemma4UnifiedConfig(**UNIFIED)), 0)
    theirs.save_pretrained(tmp_path)
    ours, report = gemma4.Gemma4UnifiedForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    squares, clips = torch.rand(2, 6, 432), torch.rand(2, 5, 20)
    places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1], [-1, -1], [-1, -1]],
                           [[0, 0], [1, 0], [2, 0], [-1, -1], [-1, -1], [-1, -1]]])  # fmt: skip
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    for one, other in zip(
        ours.get_image_features(squares, places).pooler_output,
        theirs.model.get_image_features(squares, places).pooler_output,
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)
    found, expected = ours.get_audio_features(clips, valid), theirs.model.get_audio_features(clips, valid)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)
    ids = torch.tensor(
        [[2, 7, 295, 291, 291, 291, 291, 291, 296, 9, 8, 7], [2, 5, 5, 295, 291, 291, 291, 296, 4, 4, 3, 3]]
    )
    inputs = {"input_ids": ids, "input_features": clips, "input_features_mask": valid}
    logits = theirs(**inputs).logits
    assert (ours(**inputs).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    # With pictures the reference has two rules of who sees whom; ours is that of its static cache and its other sizes.
    seen = torch.tensor([[2, 7, 293, 290, 290, 290, 290, 294, 9, 8], [2, 5, 6, 293, 290, 290, 290, 294, 4, 4]])
    types = (seen == 290).long()
    inputs = {"input_ids": seen, "pixel_values": squares, "image_position_ids": places, "mm_token_type_ids": types}
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    for kind in (None, "static"):
        assert torch.equal(ours.generate(**inputs, **options, cache_implementation=kind), expected)


@pytest.mark.parametrize("ordered", [False, True])
@torch.no_grad()
def test_a_drafter_drafts_as_there(ordered: bool, reference: Any, tmp_path: Path, monkeypatch: Any) -> None:
    text = {**TEXT, "vocab_size_per_layer_input": 0, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
            "layer_types": [SLIDING] * 3 + [FULL]}  # fmt: skip
    # The reference refuses to build any drafter: its plan of shared layers wants one layer with keys of its own.
    monkeypatch.setattr(
        reference.Gemma4TextConfig, "kv_sharing_modes", property(lambda config: ["reuse"] * 4), raising=False
    )
    own = {"text_config": text, "backbone_hidden_size": 32, "use_ordered_embeddings": ordered, "num_centroids": 16,
           "centroid_intermediate_top_k": 3}  # fmt: skip
    theirs = randomise(reference.Gemma4AssistantForCausalLM(reference.Gemma4AssistantConfig(**own)), 3)
    if ordered:
        order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
        theirs.masked_embedding.token_ordering.copy_(order)
    theirs.save_pretrained(tmp_path)
    ours = gemma4.Gemma4AssistantForCausalLM.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    pairs = {SLIDING: (draw(2, 2, 10, 8), draw(2, 2, 10, 8)), FULL: (draw(2, 2, 10, 16), draw(2, 2, 10, 16))}
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[1, :4] = 0
    for mask in (None, padding):
        inputs = {"inputs_embeds": draw(2, 1, 64), "position_ids": torch.tensor([[10], [6]]), "attention_mask": mask}
        expected, found = theirs(**inputs, shared_kv_states=pairs), ours(**inputs, shared_kv_states=pairs)
        for name in ("logits", "last_hidden_state"):
            assert (found[name] - expected[name]).abs().max() < 2e-5
