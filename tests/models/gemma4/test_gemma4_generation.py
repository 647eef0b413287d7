"""Gemma 4 writes the same tokens with every cache, in batches and alone, with drafters and without."""

from __future__ import annotations

from copy import deepcopy
from itertools import takewhile

import pytest
import torch

from audiomm import ConfigError, GenerationError, ShapeError
from audiomm.generation.drafts import PromptLookup
from audiomm.layers.cache import Cache
from audiomm.models.gemma4 import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
)

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = ["dense", "per-layer", "experts"]
#: Random models like to repeat themselves; a new token at every place tells more.
GREEDY = {"do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 1, "suppress_tokens": [0]}
STATIC = {"cache_implementation": "static"}


@pytest.fixture(scope="module", params=KINDS)
def model(tiny, request):
    return tiny.make(request.param)


def batch(tiny):
    ids, mask = tiny.tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :3], mask[2, :7] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_every_cache_and_every_batch_gives_the_same_tokens(tiny, model):
    inputs = batch(tiny)
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=40)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC, max_new_tokens=40), wanted)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False, max_new_tokens=6), wanted[:, :18])
    for row, start in ((0, 0), (1, 3), (2, 7)):
        alone = model.generate(inputs["input_ids"][row : row + 1, start:], **GREEDY, max_new_tokens=40)
        assert torch.equal(alone[0], wanted[row, start:])


def test_beams_are_the_same_with_every_cache(tiny, model):
    inputs = batch(tiny)
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=20, num_beams=3)
    assert torch.equal(model.generate(**inputs, **GREEDY, **STATIC, max_new_tokens=20, num_beams=3), wanted)


def test_a_static_cache_is_used_again(tiny, model):
    inputs = batch(tiny)
    first = model.generate(**inputs, **GREEDY, **STATIC, max_new_tokens=9, return_dict_in_generate=True)
    cache = first.past_key_values
    cache.reset()
    again = model.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"]).logits
    fresh = model.prefill(inputs["input_ids"], model.make_cache(3), attention_mask=inputs["attention_mask"]).logits
    assert first.sequences.shape == (3, 21) and torch.allclose(again, fresh, atol=1e-5)


# ---------------------------------------------------------------------- drafters


def drafter(tiny, kind="dense", width=32, **values):
    own = {**tiny.TEXT, "hidden_size": 16, "num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [FULL]}
    own["vocab_size_per_layer_input"] = 0
    if kind == "dense":
        own |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    config = Gemma4AssistantConfig(text_config=own, backbone_hidden_size=width, num_centroids=8,
                                   centroid_intermediate_top_k=3, **values)  # fmt: skip
    model = Gemma4AssistantForCausalLM(config)
    return tiny.widen(model)


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize(("ordered", "rows"), [(False, 1), (True, 3)])
def test_a_drafter_changes_nothing(tiny, model, ordered, rows, cache):
    name = "dense" if model.config.attention_k_eq_v else "other"
    inputs = {key: value[:rows] for key, value in batch(tiny).items()}
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=14)
    helped = model.generate(
        **inputs,
        **GREEDY,
        **cache,
        max_new_tokens=14,
        assistant_model=drafter(tiny, name, use_ordered_embeddings=ordered),
        num_assistant_tokens=3,
        return_dict_in_generate=True,
    )
    assert torch.equal(helped.sequences, wanted)
    assert helped.draft_counts["rounds"] <= 13 and helped.draft_counts["drafted"] > 3


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["growing", "static"])
def test_good_drafts_save_rounds_in_every_row(tiny, model, cache, monkeypatch):
    helper = drafter(tiny, "dense" if model.config.attention_k_eq_v else "other")
    inputs, rows = batch(tiny), 3
    wanted = model.generate(**inputs, **GREEDY, max_new_tokens=40)
    padding, calls = (1 - inputs["attention_mask"]).sum(1, keepdim=True), []

    def told(**arguments):
        # A drafter that knows the future, but errs at some places, which are others in each row.
        read = arguments["position_ids"] + padding
        calls.append(read.tolist())
        place = read + len(list(takewhile(calls[-1].__eq__, reversed(calls))))
        best = wanted.gather(1, place.clamp(max=wanted.shape[1] - 1))
        best = torch.where(place % torch.tensor([[7], [4], [50]]) == 0, 1, best)
        logits = torch.nn.functional.one_hot(best, 96).float()
        return type(answer)(last_hidden_state=torch.zeros(rows, 1, 32), logits=logits)

    width = 2 * 32
    pairs = {SLIDING: (torch.zeros(1, 2, 3, 8),) * 2, FULL: (torch.zeros(1, 2, 3, 16),) * 2}
    answer = helper(inputs_embeds=torch.zeros(1, 1, width), position_ids=torch.tensor([[3]]), shared_kv_states=pairs)
    monkeypatch.setattr(helper, "forward", told)
    helped = model.generate(
        **inputs, **GREEDY, **cache, max_new_tokens=40, assistant_model=helper, num_assistant_tokens=5,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(helped.sequences, wanted)
    counts = helped.draft_counts
    # As many rounds as the row with most errors needs; the others were done before.
    assert counts["rounds"] <= 12 and counts["accepted"] > rows * (39 - counts["rounds"])


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_rows_that_part_close_their_gaps_and_see_their_windows(tiny, model, cache, noise, monkeypatch):
    inputs, options = batch(tiny), GREEDY | {"no_repeat_ngram_size": 2, "eos_token_id": [3, 77]}
    wanted = model.generate(**inputs, **options, max_new_tokens=110)
    closed, inner = [], Cache._close_gaps

    def propose(self, rows, count):
        columns = rows.columns(0, min(count, self.count)).clamp(max=wanted.shape[1] - 1)
        return torch.where(columns % torch.tensor([[90], [2], [3]]) == 0, 5, wanted.gather(1, columns))

    monkeypatch.setattr(PromptLookup, "propose", propose)
    monkeypatch.setattr(Cache, "_close_gaps", lambda self: (closed.append(self.length), inner(self)))
    assert torch.equal(
        model.generate(**inputs, **options, **cache, max_new_tokens=110, prompt_lookup_num_tokens=9), wanted
    )
    assert closed
    # The assistant reads with a cache of its own, from which drafts are taken back.
    helper = deepcopy(model)
    with torch.no_grad():
        for weight in helper.parameters():
            weight += noise * torch.randn_like(weight) * weight.abs().mean()
    helped = model.generate(
        **inputs, **options, **cache, max_new_tokens=110, assistant_model=helper, return_dict_in_generate=True,
        assistant_confidence_threshold=0.0, num_assistant_tokens=6,
    )  # fmt: skip
    assert torch.equal(helped.sequences, wanted)
    if noise == 0:
        # But for those behind the end of a row.
        assert helped.draft_counts["accepted"] > 0.9 * helped.draft_counts["drafted"]


def test_drafters_of_all_published_sizes_can_be_built(tiny):
    kinds = {
        "E2B": (256, 2048, 4, 1536, True, 77_731_332),
        "E4B": (256, 2048, 4, 2560, True, None),
        "26B": (1024, 8192, 16, 2816, False, None),
        "31B": (1024, 8192, 32, 5376, False, None),
    }
    for name, (width, inner, heads, target, ordered, weights) in kinds.items():
        text = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_hidden_layers": 4,
                "num_key_value_heads": 1, "layer_types": [SLIDING] * 3 + [FULL]}  # fmt: skip
        config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=target, use_ordered_embeddings=ordered)
        with torch.device("meta"):
            model = Gemma4AssistantForCausalLM(config)
        assert config.text_config.num_kv_shared_layers == 4
        if weights is not None:
            buffers = sum(buffer.numel() for key, buffer in model.named_buffers() if "layer_scalar" in key)
            assert model.num_parameters() + buffers in (weights, weights + 4), name
    assert isinstance(
        Gemma4UnifiedAssistantForCausalLM(
            Gemma4UnifiedAssistantConfig(
                text_config={**tiny.TEXT, "num_hidden_layers": 1, "vocab_size_per_layer_input": 0}
            )
        ),
        Gemma4AssistantForCausalLM,
    )


@torch.no_grad()
def test_a_drafter_survives_its_files(tiny, tmp_path):
    model = drafter(tiny, use_ordered_embeddings=True)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    model.masked_embedding.token_ordering.copy_(order)
    model.generation_config.num_assistant_tokens = 3
    model.save_pretrained(tmp_path)
    again = Gemma4AssistantForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert torch.equal(again.masked_embedding.token_ordering, order)
    assert again.masked_embedding.token_ordering.dtype == torch.long
    assert again.generation_config.num_assistant_tokens == 3


def test_only_tokens_of_promising_groups_are_scored(tiny):
    model = drafter(tiny, use_ordered_embeddings=True)
    head = model.masked_embedding
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    head.token_ordering.copy_(order)
    hidden = torch.randn(2, 1, 16)
    with torch.no_grad():
        scores, plain = head(hidden, model.lm_head.weight), model.lm_head(hidden)
        best = head.centroids(hidden).topk(3).indices
    for row in range(2):
        named = order.view(8, 12)[best[row, 0]].flatten()
        assert torch.allclose(scores[row, 0, named], plain[row, 0, named], atol=1e-5)
        rest = torch.ones(96, dtype=torch.bool)
        rest[named] = False
        assert (scores[row, 0, rest] == scores[row, 0, rest][0]).all()
        assert scores[row, 0, rest][0] < scores[row, 0, named].min()


def test_wrong_drafters_are_refused(tiny):
    model, inputs = tiny.make("dense"), batch(tiny)
    with pytest.raises(GenerationError, match="a drafter cannot generate alone"):
        drafter(tiny).generate(tiny.tokens())
    with pytest.raises(ShapeError, match="made for a target of width 64"):
        model.generate(**inputs, **GREEDY, max_new_tokens=4, assistant_model=drafter(tiny, width=64))
    with pytest.raises(ShapeError, match="needs inputs_embeds, position_ids and shared_kv_states"):
        drafter(tiny)(tiny.tokens())
    other = drafter(tiny)
    with pytest.raises(ShapeError, match="keys of kind full_attention: none"):
        other(inputs_embeds=torch.zeros(1, 1, 64), position_ids=torch.zeros(1, 1), shared_kv_states={
            SLIDING: (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))})  # fmt: skip
    small = {**tiny.TEXT, "num_hidden_layers": 2, "vocab_size_per_layer_input": 0}
    for values, message in (
        ({"text_config": {**small, "hidden_size_per_layer_input": 8}}, "per_layer_input=8: a drafter has none"),
        ({"text_config": {**small, "layer_types": [FULL] * 2, "num_kv_shared_layers": 1}}, "all 2 of them"),
        ({"text_config": small, "use_ordered_embeddings": True, "num_centroids": 7, "centroid_intermediate_top_k": 2},
         "cannot be split over num_centroids=7"),
        ({"text_config": small, "num_centroids": 4, "centroid_intermediate_top_k": 5}, "intermediate_top_k='5'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Gemma4AssistantConfig(**values)
