"""The published sizes have the published numbers of weights, and a step costs what it uses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiomm.layers import storage
from audiomm.layers.experts import Experts
from audiomm.models.gemma4 import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

FAMILY = {"head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0}
LARGE = {"attention_k_eq_v": True, "use_bidirectional_attention": "vision", "sliding_window": 1024}
SMALL_EYES = {"use_clipped_linears": True}
LARGE_EYES = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
              "num_key_value_heads": 16, "head_dim": 72, "standardize": True}  # fmt: skip


def layers(sliding: int, times: int) -> dict:
    kinds = (["sliding_attention"] * sliding + ["full_attention"]) * times
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


def sizes(hidden: int, inner: int, heads: int, groups: int) -> dict:
    return {**FAMILY, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
            "num_key_value_heads": groups}  # fmt: skip


PUBLISHED = {
    "E2B": (5_104_297_504, 1951, SMALL_EYES, {}, {**sizes(1536, 6144, 8, 1), **layers(4, 7), "num_kv_shared_layers": 20,
            "hidden_size_per_layer_input": 256, "use_double_wide_mlp": True}),
    "E4B": (7_941_100_832, 2076, SMALL_EYES, {}, {**sizes(2560, 10240, 8, 2), **layers(5, 7),
            "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256}),
    "26B": (25_805_933_872, 1013, LARGE_EYES, None, {**sizes(2816, 2112, 16, 8), **layers(5, 5), **LARGE,
            "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
            "moe_intermediate_size": 704}),
    "31B": (31_273_086_512, 1188, LARGE_EYES, None, {**sizes(5376, 21504, 32, 16), **layers(5, 10), **LARGE,
            "num_global_key_value_heads": 4}),
    "12B": (11_959_730_176, 677, {}, {}, {**sizes(3840, 15360, 16, 8), **layers(5, 8), **LARGE,
            "num_global_key_value_heads": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_number_of_weights(name):
    weights, tensors, vision, audio, text = PUBLISHED[name]
    unified = name == "12B"
    config = (Gemma4UnifiedConfig if unified else Gemma4Config)(
        text_config=text, vision_config=vision, audio_config=audio
    )
    with torch.device("meta"):
        model = (Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration)(config)
    assert model.num_parameters() == weights
    # The tied head is in the state dict and not in the file.
    assert len(model.state_dict()) - 1 == tensors
    specs = model.cache_specs()
    assert len(specs) == config.text_config.first_shared_layer
    assert type(config).from_dict(config.to_dict()) == config


class Largest(TorchDispatchMode):
    """Notes the most numbers any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # Views of the weights make nothing.
        if isinstance(made, torch.Tensor) and made._base is None:
            self.numbers = max(self.numbers, made.numel())
        return made


@torch.no_grad()
def test_a_step_of_many_experts_makes_no_more_than_one_of_few():
    made = []
    for count in (8, 64):
        block = Experts(count, 32, 16)
        block.gate_up_proj.normal_()
        block.down_proj.normal_()
        with Largest() as largest:
            block(torch.randn(1, 32), torch.ones(1, 2), torch.tensor([[1, 5]]))
        made.append(largest.numbers)
    assert made[0] == made[1]


@torch.no_grad()
def test_probabilities_of_experts_and_shared_pairs_are_handed_out(tiny):
    model = tiny.make("experts")
    output = model(tiny.tokens(), output_router_logits=True, return_shared_kv_states=True)
    assert [each.shape for each in output.router_logits] == [(40, 5)] * 3
    assert torch.allclose(output.router_logits[0].sum(-1), torch.ones(40), atol=1e-5)
    shapes = {kind: keys.shape for kind, (keys, _) in output.shared_kv_states.items()}
    assert shapes == {"sliding_attention": (2, 2, 20, 8), "full_attention": (2, 2, 20, 16)}
    assert "router_logits" not in model(tiny.tokens())


@pytest.mark.slow
@torch.no_grad()
def test_all_steps_of_a_static_cache_are_one_graph(tiny, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr(storage, "SPARE", 3)
    model, ids, counter = tiny.make("per-layer"), tiny.tokens(2, 10), CompileCounter()
    cache, plain = (model.make_cache(2, max_length=60, fixed=True) for _ in range(2))
    for each in (cache, plain):
        model.prefill(ids, each)
    step = torch.compile(lambda tokens: model.step(tokens, cache).logits, backend=counter, fullgraph=True)
    for place in range(14):
        cache.note(1)
        found = step(ids[:, place % 10, None])
        assert torch.allclose(found, model.step(ids[:, place % 10, None], plain).logits, atol=1e-4)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_model_can_be_the_first_thing_that_is_made_and_without_memory():
    program = """
import torch, audiomm
with torch.device("meta"):
    for name in ("Gemma4Audio", "Gemma4UnifiedText", "Gemma3nAudio", "Whisper"):
        model = audiomm.AutoModel.from_config(getattr(audiomm, name + "Config")())
        assert type(model).__name__ in (name + "Model", name + "Encoder")
        assert all(parameter.is_meta for parameter in model.parameters())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
