"""Training: the same losses, gradients and weights as the reference over a few steps of SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS = 3
CLOSE = 1e-5


@pytest.fixture
def loaded(reference: Any, reference_model: Any, tmp_path: Path) -> Any:
    """Makes (the reference's model, ours), both loaded from one folder and in training mode."""

    def make(kind: str, seed: int, **overrides: Any) -> tuple[Any, Any]:
        reference_model(kind, seed, **overrides).save_pretrained(tmp_path)
        return tuple(getattr(package, kind).from_pretrained(tmp_path).train() for package in (reference, audiomm))

    return make


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Length of the difference over the length of the first."""
    return float((first - second).norm() / first.norm().clamp(min=1e-12))


def train(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    losses, gradients = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        named = model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        losses.append(float(loss))
        optimizer.step()
    return losses, gradients


def compare(theirs: Any, ours: Any, inputs: dict[str, Any]) -> None:
    expected, expected_gradients = train(theirs, inputs)
    found, gradients = train(ours, inputs)
    assert len(set(expected)) == STEPS, "the steps change nothing"
    for one, other in zip(expected, found, strict=True):
        assert abs(one - other) <= CLOSE * max(1.0, abs(one)), (expected, found)
    for step, (one, other) in enumerate(zip(expected_gradients, gradients, strict=True)):
        assert sorted(one) == sorted(other), step
        worst = max((relative(one[name], other[name]), name) for name in one if float(one[name].norm()) > 1e-6)
        assert worst[0] <= CLOSE * (1 + 9 * step), (step, worst)
    final = dict(ours.named_parameters())
    assert all(relative(value.detach(), final[name].detach()) <= CLOSE for name, value in theirs.named_parameters())


def labels_of(seed: int, rows: int = 2, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 142, (rows, tokens), generator=generator)
    labels[-1, 6:] = -100
    return labels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_speech_to_text_trains_alike(seed: int, checkpointing: bool, loaded: Any, inputs_for: Any) -> None:
    theirs, ours = loaded("WhisperForConditionalGeneration", seed=seed)
    if checkpointing:
        ours.gradient_checkpointing_enable()
        assert ours.is_gradient_checkpointing
    inputs = inputs_for("WhisperForConditionalGeneration", seed)
    inputs.pop("decoder_input_ids")
    compare(theirs, ours, {**inputs, "labels": labels_of(seed)})


def test_a_frozen_encoder_gets_no_gradients_in_both(loaded: Any, inputs_for: Any) -> None:
    theirs, ours = loaded("WhisperForConditionalGeneration", seed=3)
    for model in (theirs, ours):
        model.freeze_encoder()
    inputs = inputs_for("WhisperForConditionalGeneration", 3)
    inputs.pop("decoder_input_ids")
    compare(theirs, ours, {**inputs, "labels": labels_of(3)})
    assert all(parameter.grad is None for parameter in ours.get_encoder().parameters())


@pytest.mark.parametrize("weighted", [False, True])
def test_classification_trains_alike(weighted: bool, loaded: Any, inputs_for: Any) -> None:
    theirs, ours = loaded("WhisperForAudioClassification", seed=4, num_labels=5, use_weighted_layer_sum=weighted)
    compare(theirs, ours, {**inputs_for("WhisperForAudioClassification", 4), "labels": torch.tensor([1, 4])})


def test_the_decoder_alone_trains_alike(loaded: Any, inputs_for: Any) -> None:
    theirs, ours = loaded("WhisperForCausalLM", seed=5)
    compare(theirs, ours, {**inputs_for("WhisperForCausalLM", 5, tokens=9), "labels": labels_of(5)})
