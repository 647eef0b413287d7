"""Fixtures that several folders of tests share: tiny random models and the reference cases, where they are at hand."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference cases; tests that need it are skipped where it is not."""
    if not GOLDEN.is_dir():
        pytest.skip("the reference cases are not at hand")
    return GOLDEN


@pytest.fixture(scope="session")
def gemmas() -> ModuleType:
    """Makers of tiny Gemmas with their processors, and media for them; see tiny_gemmas.py."""
    return _beside("tiny_gemmas.py")


@pytest.fixture(scope="session")
def launches() -> ModuleType:
    """Counters of what a step would ask of a GPU; see generation/launches.py."""
    return _beside("generation", "launches.py")


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has decode steps built as for a GPU from then on: with Triton's kernels, or torch's only."""
    from audiomm.layers import experts, fused, heads, norm
    from audiomm.models.gemma3n import streams

    def build(kernels: bool) -> None:
        for module in (norm, heads, experts):
            monkeypatch.setattr(module, "has_norm_kernel", lambda device: True)
        for module in (fused, streams):
            monkeypatch.setattr(module, "has_kernels", lambda like: kernels)
        if os.environ.get("TRITON_INTERPRET") == "1":
            # The kernels themselves, and not their twins; see layers/test_kernels.py.
            monkeypatch.setattr(fused, "is_on_gpu", lambda tensor: True)

    return build


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, launches: ModuleType) -> Any:
    """A machine that can capture, or believes so; see generation/graphs.py."""
    from audiomm.generation import runners

    fake = _beside("generation", "graphs.py").FakeGraphs
    fake.is_view = staticmethod(launches.is_view)
    monkeypatch.setattr(runners, "_can_capture", lambda device: True)
    monkeypatch.setattr(runners, "Graphs", fake)
    monkeypatch.setattr(runners, "_GRAPHS", {})
    return fake


def _beside(*place: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(place[-1][:-3], Path(__file__).parent.joinpath(*place))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gemma_folders(gemmas: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: folder with a tiny model and its processor}."""
    return {family: gemmas.save(family, tmp_path_factory.mktemp(family)) for family in gemmas.FAMILIES}


@pytest.fixture
def tiny_whisper_config():
    """Makes configs of a Whisper that runs in milliseconds: 2 + 2 layers, 24 wide, windows of 40 frames, 100 tokens."""
    return _tiny_whisper_config


def _tiny_whisper_config(**overrides: object):
    from audiomm import WhisperConfig

    values = {
        "vocab_size": 100, "num_mel_bins": 8, "d_model": 24,
        "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 48,
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40,
        "max_source_positions": 20, "max_target_positions": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
        "begin_suppress_tokens": [], "init_std": 0.3,
    }  # fmt: skip
    return WhisperConfig(**(values | overrides))


@pytest.fixture
def tiny_whisper():
    """A tiny random WhisperForConditionalGeneration in which every weight matters."""
    from audiomm import WhisperForConditionalGeneration

    torch.manual_seed(11)
    model = WhisperForConditionalGeneration(_tiny_whisper_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tiny_whisper_folder(tiny_whisper, tmp_path: Path) -> Path:
    """The same model, saved."""
    folder = tmp_path / "tiny-whisper"
    tiny_whisper.save_pretrained(folder)
    return folder
