"""What was built from a model's weights is built anew after any change, and looked at once a call of generate()."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from audiomm import LoraConfig, add_lora
from audiomm.layers.projection import Keeper, Marks, checked_once


def model() -> Any:
    made = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 4)}), nn.BatchNorm1d(4))
    return made.eval()


def step_of_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1]["inner"](torch.ones(1, 4)).sum().backward()
    optimizer.step()


def weights_of_another(model: Any, assign: bool) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def other_forward(model: Any) -> None:
    model[1]["inner"].forward = nn.Identity()


CHANGES = {
    "loaded": lambda model: weights_of_another(model, assign=False),
    "loaded by assignment": lambda model: weights_of_another(model, assign=True),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "one weight of another type": lambda model: model[1]["inner"].double(),
    "other data": lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    "the same bytes of another type": lambda model: setattr(
        model[0].weight, "data", model[0].weight.data.view(torch.bfloat16)
    ),
    "trained": step_of_an_optimizer,
    "a hook inside": lambda model: model[1]["inner"].register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "other forward": other_forward,
    "a part replaced": lambda model: model[1].update({"inner": nn.Linear(4, 4)}),
    "a part gone": lambda model: model[1].pop("inner"),
    "a part more": lambda model: model[0].add_module("more", nn.Identity()),
    "a weight gone": lambda model: setattr(model[0], "bias", None),
    "another buffer": lambda model: model[2].running_mean.add_(1.0),
    "a new buffer": lambda model: model[0].register_buffer("more", torch.zeros(1)),
    "a part in training mode": lambda model: model[2].train(),
    "parameters in a new dictionary": lambda model: setattr(model[0], "_parameters", dict(model[0]._parameters)),
    "adapters": lambda model: add_lora(model, LoraConfig(target_modules=["inner"])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    changed, keeper, built = model(), Keeper[int](), []
    for _ in range(2):
        keeper.get(changed, lambda: built.append(1))
    assert len(built) == 1
    CHANGES[change](changed)
    for _ in range(2):
        keeper.get(changed, lambda: built.append(1))
    assert len(built) == 2


def test_weights_of_inference_mode_are_kept_too():
    with torch.inference_mode():
        made = model()
    assert Marks(made).fit(made)
    made[0].weight = nn.Parameter(torch.zeros(4, 4))
    assert not Marks(model()).fit(made)


def test_a_model_that_keeps_something_goes_when_nobody_has_it():
    gc.disable()
    try:
        made = model()
        made.keeper = Keeper[int]()
        made.keeper.get(made, int)
        watch = weakref.ref(made)
        del made
        assert watch() is None
    finally:
        gc.enable()


def test_inside_a_run_a_keeper_looks_once_and_after_it_again():
    changed, keeper = model(), Keeper[object]()
    with checked_once():
        first = keeper.get(changed, object)
        with checked_once():
            with torch.no_grad():
                changed[0].weight.add_(1.0)
            assert keeper.get(changed, object) is first
        found: list[Any] = []
        other = threading.Thread(target=lambda: found.append(keeper.get(changed, object)))
        other.start()
        other.join()
    # Other threads look for themselves.
    assert found[0] is not first
    assert keeper.get(changed, object) is found[0]


def test_a_call_of_generate_looks_once_at_what_each_keeper_keeps(tiny_whisper, monkeypatch):
    features, looks, fit = torch.zeros(1, 8, 40), [], Marks.fit
    monkeypatch.setattr(Marks, "fit", lambda self, model: looks.append(model) or fit(self, model))
    wanted = tiny_whisper.generate(features, max_new_tokens=6)
    looks.clear()
    assert torch.equal(tiny_whisper.generate(features, max_new_tokens=6), wanted)
    assert looks
    assert len(looks) == len(set(looks))
    add_lora(tiny_whisper, LoraConfig(target_modules=["q_proj"]))
    tiny_whisper.generate(features, max_new_tokens=6)
    assert tiny_whisper.quick_step() is None


def test_training_that_nobody_can_see_is_asked_for_by_train() -> None:
    """Fused optimizers change weights and not their version: what was copied is made anew after train()."""
    from audiomm import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, **sizes)
    model = WhisperForConditionalGeneration(config).eval()
    first = model.quick_step()
    assert first is not None and model.quick_step() is first
    model.train()
    model.eval()
    assert model.quick_step() is not first
