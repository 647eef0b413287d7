"""Adapters: PEFT reads what we write and we read what PEFT writes, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-5
CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 4, "lora_alpha": 12},
    "rank-stabilised": {"target_modules": ["q_proj", "out_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": r".*decoder.*(q_proj|k_proj|fc2)", "r": 3,
        "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"fc2": 16},
    },
    "everything": {"target_modules": "all-linear", "r": 2},
    "a whole part": {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["fc2"]},
}  # fmt: skip


@pytest.fixture
def peft(reference: Any) -> Any:
    return pytest.importorskip("peft")


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Random numbers in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for _, value in sorted(model.named_parameters()):
        if value.requires_grad:
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_whisper_travel_both_ways(name: str, peft: Any, pair: Any, inputs_for: Any, tmp_path: Path) -> None:
    theirs, ours = pair()
    inputs = inputs_for("WhisperForConditionalGeneration")
    before = logits(ours, inputs)
    audiomm.add_lora(ours, audiomm.LoraConfig(**CONFIGS[name]))
    fill(ours, 1)
    expected = logits(ours, inputs)
    assert apart(before, expected) > 0.01
    audiomm.save_lora(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert apart(logits(read, inputs), expected) < CLOSE

    fresh, mine = pair(seed=1)
    written = peft.get_peft_model(fresh, peft.LoraConfig(**CONFIGS[name]))
    fill(written, 2)
    expected = logits(written, inputs)
    written.save_pretrained(tmp_path / "theirs")
    assert apart(logits(audiomm.load_lora(mine, tmp_path / "theirs"), inputs), expected) < CLOSE
    assert apart(logits(audiomm.merge_lora(mine), inputs), expected) < CLOSE


def test_trained_counts_agree(peft: Any, pair: Any) -> None:
    for name, options in CONFIGS.items():
        theirs, ours = pair(seed=len(name))
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
        audiomm.add_lora(ours, audiomm.LoraConfig(**options))
        counts = [sum(v.numel() for v in model.parameters() if v.requires_grad) for model in (theirs, ours)]
        assert counts[0] == counts[1], name


EXPERTS = {
    "vocab_size": 60, "vocab_size_per_layer_input": 60, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
    "max_position_embeddings": 64, "pad_token_id": 0, "hidden_size_per_layer_input": 0, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "attention_k_eq_v": True, "enable_moe_block": True,
    "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16, "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
}  # fmt: skip


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]])
def test_adapters_of_experts_travel_both_ways(targets: list[str], reference: Any, peft: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = reference.Gemma4ForCausalLM(reference.Gemma4TextConfig(**EXPERTS)).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(0.2 * torch.randn(value.shape))
    theirs.save_pretrained(tmp_path / "model")
    inputs = {"input_ids": torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))}
    options = {"target_modules": ["q_proj"], "target_parameters": [f"experts.{one}" for one in targets], "r": 2}
    written = peft.get_peft_model(theirs, peft.LoraConfig(**options, lora_alpha=8))
    fill(written, 3)
    expected = logits(written, inputs)
    written.save_pretrained(tmp_path / "theirs")

    ours = audiomm.Gemma4ForCausalLM.from_pretrained(tmp_path / "model")
    plain = logits(ours, inputs)
    audiomm.load_lora(ours, tmp_path / "theirs")
    assert apart(plain, expected) > 0.01
    assert apart(logits(ours, inputs), expected) < CLOSE
    audiomm.save_lora(ours, tmp_path / "ours")
    again = reference.Gemma4ForCausalLM.from_pretrained(tmp_path / "model")
    assert apart(logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours"), inputs), expected) < CLOSE
    assert apart(logits(audiomm.merge_lora(ours), inputs), expected) < CLOSE
