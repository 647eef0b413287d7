"""LoRA: what it adds, what it leaves alone, its files, and experts that are never skipped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import audiomm
from audiomm.base.errors import CheckpointMismatchError, CheckpointNotFoundError, ConfigError
from audiomm.training.lora import set_lora_enabled

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(2, 8, 40, generator=generator),
        "labels": torch.randint(10, 90, (2, 5), generator=generator),
    }


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def random_adapter(model: Any, **options: Any) -> Any:
    """Adapters whose product is not zero."""
    torch.manual_seed(7)
    return audiomm.add_lora(model, audiomm.LoraConfig(**{"target_modules": TARGETS, "r": 4, **options}))


def test_fresh_adapters_change_nothing_and_only_they_are_trained(make_model: Any, batch: Any) -> None:
    model = make_model()
    before = logits(model, batch)
    audiomm.add_lora(model, audiomm.LoraConfig(r=4, target_modules=TARGETS))
    # With adapters the encoder walks through its layers, without them it runs straight: the same up to rounding.
    torch.testing.assert_close(logits(model, batch), before, atol=2e-6, rtol=1e-5)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * 2 * 3, "q and v of three attentions"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "lora_alpha": 5}])
def test_merged_adapters_are_the_same_model(options: dict[str, Any], make_model: Any, batch: Any) -> None:
    model = make_model()
    before = logits(model, batch)
    random_adapter(model, init_lora_weights=False, **options)
    adapted = logits(model, batch)
    assert float((adapted - before).abs().max()) > 0.01
    set_lora_enabled(model, False)
    # With adapters the encoder walks through its layers, without them it runs straight: the same up to rounding.
    torch.testing.assert_close(logits(model, batch), before, atol=2e-6, rtol=1e-5)
    set_lora_enabled(model, True)
    audiomm.merge_lora(model)
    assert not [name for name in model.state_dict() if "lora" in name]
    assert torch.allclose(logits(model, batch), adapted, atol=1e-5)


def test_removed_adapters_leave_the_model_as_it_was(make_model: Any, batch: Any, same_weights: Any) -> None:
    model = random_adapter(make_model(), init_lora_weights=False)
    audiomm.remove_lora(model)
    assert same_weights(model, make_model())
    assert torch.equal(logits(model, batch), logits(make_model(), batch))


def test_files_are_pefts_and_load_again(make_model: Any, batch: Any, tmp_path: Path) -> None:
    model = random_adapter(make_model(), init_lora_weights=False, modules_to_save=["decoder.layer_norm"])
    audiomm.save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 4, TARGETS)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    stem = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
    assert {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"} <= names
    assert "base_model.model.model.decoder.layer_norm.weight" in names
    again = audiomm.load_lora(make_model(), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not any(value.requires_grad for value in again.parameters())
    assert any(value.requires_grad for value in audiomm.load_lora(make_model(), tmp_path, True).parameters())


def test_a_bf16_model_has_float32_adapters(make_model: Any, batch: Any) -> None:
    model = random_adapter(make_model().to(torch.bfloat16))
    adapters = [value for name, value in model.named_parameters() if "lora_" in name]
    assert {value.dtype for value in adapters} == {torch.float32}
    loss = model.train()(**{**batch, "input_features": batch["input_features"].bfloat16()}).loss
    loss.backward()
    assert all(value.grad is not None and value.grad.dtype is torch.float32 for value in adapters)
    assert model.model.decoder.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16


def test_the_trainer_saves_adapters_and_goes_on_with_them(make_trainer: Any, make_model: Any, losses: Any) -> None:
    def run(folder: str, **options: Any) -> Any:
        torch.manual_seed(3)
        model = random_adapter(make_model(), lora_dropout=0.1)
        return make_trainer(folder, model=model, max_steps=6, save_strategy="steps", save_steps=3, **options)

    whole = run("whole", learning_rate=0.02)
    frozen = whole.model.model.encoder.conv1.weight.clone()
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert torch.equal(whole.model.model.encoder.conv1.weight, frozen)
    folder = Path(whole.args.output_dir) / "checkpoint-3"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    resumed = run("resumed", learning_rate=0.02)
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_sound_tower_can_be_adapted_alone(make_model: Any) -> None:
    model = random_adapter(make_model(), target_modules=r".*encoder\.layers.*(q_proj|fc1)")
    report = audiomm.trainable_report(model)
    assert report["model.encoder"][0] > 0
    assert report["model.decoder"][0] == 0


def test_all_linear_leaves_the_head_out(make_model: Any) -> None:
    model = random_adapter(make_model(), target_modules="all-linear")
    assert not hasattr(model.proj_out, "lora_A")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = [name for name in linears if hasattr(model.get_submodule(name), "lora_A")]
    assert sorted(adapted) == sorted(set(linears) - {"proj_out"})


# ----------------------------------------------------------------------------------------------------------- experts


class Experts(torch.nn.Module):
    """Two experts and a router, as mixtures hold them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.router = torch.nn.Linear(6, 2)
        self.gate_up_proj = torch.nn.Parameter(torch.randn(2, 10, 6))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shares = self.router(hidden).softmax(-1)
        return torch.einsum("be,eoi,bi->bo", shares, self.gate_up_proj, hidden)


def test_experts_are_never_left_out_silently() -> None:
    words = r"1 expert parameters \(gate_up_proj\) are no linears .* Pass target_parameters=\['gate_up_proj'\]"
    with pytest.raises(ConfigError, match=words):
        audiomm.add_lora(Experts(), audiomm.LoraConfig(target_modules="all-linear"))
    with pytest.raises(
        ConfigError, match=r"'gate_up_proj' fits no linear .* pass target_parameters=\['gate_up_proj'\]"
    ):
        audiomm.add_lora(Experts(), audiomm.LoraConfig(target_modules=["gate_up_proj"]))
    both = audiomm.LoraConfig(target_modules="all-linear", target_parameters=["gate_up_proj"])
    assert hasattr(audiomm.add_lora(Experts(), both).router, "lora_A")


def test_each_expert_has_its_own_pair(tmp_path: Path) -> None:
    model, hidden = Experts(), torch.randn(3, 6)
    before = model(hidden).detach()
    config = audiomm.LoraConfig(r=2, lora_alpha=6, target_parameters=["gate_up_proj"], init_lora_weights=False)
    original = model.gate_up_proj.detach().clone()
    audiomm.add_lora(model, config)
    after = model(hidden).detach()
    assert float((after - before).abs().max()) > 0.01
    audiomm.save_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.lora_{side}.weight"] for side in "AB")
    assert (down.shape, up.shape) == ((4, 6), (10, 4))
    for expert in range(2):
        product = up.view(10, 2, 2)[..., expert] @ down[2 * expert : 2 * expert + 2] * 3
        assert torch.allclose(model.gate_up_proj[expert], original[expert] + product, atol=1e-6)
    assert torch.equal(audiomm.load_lora(Experts(), tmp_path)(hidden), after)
    with pytest.raises(ConfigError, match="target_parameters: 'conv' fits no three"):
        audiomm.add_lora(torch.nn.Sequential(Experts()), audiomm.LoraConfig(target_parameters=["conv"]))
    audiomm.merge_lora(model)
    assert torch.allclose(model(hidden), after, atol=1e-5)
    assert dict(model.named_parameters()).keys() == dict(Experts().named_parameters()).keys()


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0: the rank is a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"bias": "all"}, "bias='all': only 'none'"),
        ({"target_modules": None}, "name what to adapt"),
        ({"target_modules": ["q_proj", "z_proj"]}, "'z_proj' fits no linear of the model"),
        ({"target_parameters": ["w"]}, "target_parameters: 'w' fits no three-dimensional parameter"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options: Any, words: str, make_model: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        audiomm.add_lora(make_model(), audiomm.LoraConfig(**{"target_modules": ["q_proj"], **options}))


def test_adapters_are_added_once(make_model: Any) -> None:
    with pytest.raises(ConfigError, match="has adapters already"):
        random_adapter(random_adapter(make_model()))
    with pytest.raises(ConfigError, match="has no adapters"):
        audiomm.save_lora(make_model(), "nowhere")


def test_files_that_do_not_fit_are_refused(make_model: Any, tmp_path: Path) -> None:
    audiomm.save_lora(random_adapter(make_model()), tmp_path)
    with pytest.raises(CheckpointMismatchError, match="tensors do not fit the model's adapters"):
        audiomm.load_lora(make_model(decoder_layers=2), tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    for change, words in (({"peft_type": "IA3"}, "only LORA"), ({"use_dora": True}, "use_dora=True")):
        config.write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigError, match=words):
            audiomm.load_lora(make_model(), tmp_path)
    config.write_text(json.dumps(values))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="holds no adapter_model.safetensors"):
        audiomm.load_lora(make_model(), tmp_path)


# ----------------------------------------------------------------------------------------------------------- freezing


def test_freezing_reports_what_is_left_and_refuses_names_that_fit_nothing(make_model: Any) -> None:
    model = make_model()
    report = audiomm.freeze(model, except_="decoder")
    assert report["model.encoder"][0] == 0
    trainable, every = report["model.decoder"]
    assert trainable == every > 0
    with pytest.raises(ConfigError, match="except_='audio' is part of no weight's name; parts are model.encoder"):
        audiomm.freeze(model, except_=["decoder", "audio"])
