"""The same tiny random Whisper in both packages, and inputs for it.

The reference builds every checkpoint here: the random weights are drawn wide, norms and biases too, so that no part of
the model can be wrong without the answers changing.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import audiomm

#: Ids of a vocabulary laid out like the multilingual one, only smaller: text, end, start, languages, tasks, timestamps.
END, START = 100, 101
LANGUAGES = {"<|en|>": 102, "<|zh|>": 103, "<|de|>": 104}
TASKS = {"translate": 105, "transcribe": 106}
PREVIOUS, NO_SPEECH, NO_TIMESTAMPS, TIMESTAMP_BEGIN = 108, 109, 110, 111
#: Encoder positions of a window: 60 frames, 0.6 s; timestamps count in 0.02 s like the positions.
POSITIONS = 30

TINY = {
    "vocab_size": TIMESTAMP_BEGIN + POSITIONS + 1,
    "num_mel_bins": 8,
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_layers": 3,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 72,
    "max_source_positions": POSITIONS,
    "max_target_positions": 64,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "begin_suppress_tokens": [7, END],
}
GENERATION = {
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "begin_suppress_tokens": [7, END],
    "suppress_tokens": [3, 50, START, 107, PREVIOUS, NO_SPEECH],
    "is_multilingual": True,
    "lang_to_id": LANGUAGES,
    "task_to_id": TASKS,
    "no_timestamps_token_id": NO_TIMESTAMPS,
    "prev_sot_token_id": PREVIOUS,
    "max_initial_timestamp_index": 20,
    "return_timestamps": True,
    "max_length": 64,
}


#: Kernels of torchvision, which builds for other devices lack beside torch's for the CPU; none of them is used here.
KERNELS = ("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
           "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
           "_deform_conv2d_backward")  # fmt: skip
#: What timm imports of torchvision, and does not use in its MobileNetV5.
UNUSED = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.models", "torchvision.datasets",
          "torchvision.models.feature_extraction", "torchvision.transforms",
          "torchvision.transforms.functional")  # fmt: skip


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, with the names of its kernels where it has none; None where it is not installed."""
    if not has("torchvision"):
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in KERNELS:
            library.define(f"{name}(Tensor input) -> Tensor")
        module = importlib.import_module("torchvision")
        module.kernel_names = library  # kept alive
        return module


@pytest.fixture(scope="session")
def reference(torchvision: Any) -> Any:
    """The reference package; without it the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers")
        if torchvision is None and has("timm"):
            _use_timm_alone(module)
        module.utils.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
    return module


def _use_timm_alone(reference: Any) -> None:
    """Let the reference build its MobileNetV5 where there is no torchvision."""
    # For as long as the import takes: the reference is to know that there is none.
    sys.modules.update({name: MagicMock() for name in UNUSED})
    try:
        importlib.import_module("timm")
    finally:
        for name in UNUSED:
            del sys.modules[name]
    for place in (reference.utils, reference.utils.import_utils):
        place.is_timm_available = lambda: True
    reference.utils.import_utils.BACKENDS_MAPPING["timm"] = (lambda: True, "")


@pytest.fixture(scope="session")
def timm(reference: Any) -> Any:
    """timm, which has the reference's MobileNetV5; without it the test is skipped."""
    return pytest.importorskip("timm")


@pytest.fixture
def randomise() -> Callable[[torch.nn.Module, int], torch.nn.Module]:
    return _randomise


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every weight of `model` random values at which all parts of it count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "layer_norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        elif "encoder.embed_positions" in name:
            continue
        elif "decoder.embed_positions" in name:
            # Wide, so that a token is not followed by itself for ever.
            parameter.copy_(3 * noise)
        elif "embed" in name or name == "layer_weights":
            parameter.copy_(noise)
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(1.3 * noise / fan_in**0.5)
    return model.eval()


@pytest.fixture
def reference_model(reference: Any) -> Callable[..., Any]:
    """Makes a random model of the reference: reference_model("WhisperModel", seed=3, encoder_layers=1)."""

    def make(kind: str = "WhisperForConditionalGeneration", seed: int = 0, **overrides: Any) -> Any:
        config = reference.WhisperConfig(**(TINY | overrides))
        model = _randomise(getattr(reference, kind)(config), seed)
        if kind == "WhisperForConditionalGeneration":
            model.generation_config = reference.GenerationConfig(**GENERATION)
        return model

    return make


@pytest.fixture
def pair(reference_model: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Makes (the reference's model, ours) with the same weights, ours loaded from what the reference saved."""

    def make(kind: str = "WhisperForConditionalGeneration", seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
        theirs = reference_model(kind, seed, **overrides)
        folder = tmp_path / f"{kind}-{seed}-{len(list(tmp_path.iterdir()))}"
        theirs.save_pretrained(folder)
        return theirs, getattr(audiomm, kind).from_pretrained(folder)

    return make


@pytest.fixture
def inputs_for() -> Callable[..., dict[str, Any]]:
    """Random arguments of forward() for a class."""

    def make(kind: str, seed: int = 0, batch: int = 2, tokens: int = 7, **_: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + seed)
        features = torch.randn(batch, TINY["num_mel_bins"], 2 * POSITIONS, generator=generator)
        ids = torch.randint(0, TINY["vocab_size"], (batch, tokens), generator=generator)
        if kind == "WhisperForCausalLM":
            hidden = torch.randn(batch, POSITIONS, TINY["d_model"], generator=generator)
            return {"input_ids": ids, "encoder_outputs": (hidden,)}
        if kind == "WhisperForAudioClassification":
            return {"input_features": features}
        return {"input_features": features, "decoder_input_ids": ids}

    return make


@pytest.fixture
def noise_features() -> Callable[..., torch.Tensor]:
    """Makes random log-mel features (batch, bins, frames) that change slowly enough to look like sound."""

    def make(seed: int, batch: int = 1, frames: int = 2 * POSITIONS, bins: int = TINY["num_mel_bins"]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(2000 + seed)
        steps = torch.randn(batch, bins, frames // 4 + 2, generator=generator)
        return torch.nn.functional.interpolate(steps, size=frames, mode="linear")

    return make
