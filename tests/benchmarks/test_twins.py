"""The peers that the benchmarks compare with compute the same as audiomm, from the same weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.parity

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu_models")
    del sys.modules["gpu_models"]


@pytest.mark.parametrize("name", ["Gemma 4 E2B", "Gemma 4 31B", "Gemma 3n E2B"])
def test_a_gemmas_twin_has_its_weights_in_the_same_memory_and_its_logits(gpu_models: ModuleType, name: str) -> None:
    model = gpu_models.gemma(name, "cpu", torch.float32, tiny=True)
    other = gpu_models.twin(model)
    own, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(own[key].data_ptr() == theirs[key].data_ptr() for key in own)
    tokens = torch.randint(3, 256, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_whispers_twin_writes_the_same_tokens(gpu_models: ModuleType) -> None:
    model = gpu_models.whisper("turbo", "cpu", torch.float32, tiny=True)
    features = torch.randn(1, 128, 3000)
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 12, "min_new_tokens": 12}
    own = model.generate(features, return_timestamps=False, **options)
    assert own.tolist() == gpu_models.twin(model).generate(features, return_timestamps=False, **options).tolist()
