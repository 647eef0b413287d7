"""Whole tiny Gemmas whose vocabulary is that of their processor, as models and as folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from audiomm.feature_extraction.image import Gemma4ImageProcessor, SiglipImageProcessor
from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor
from audiomm.feature_extraction.video import Gemma4VideoProcessor
from audiomm.models import gemma3n, gemma4
from audiomm.models.gemma3n.processing import Gemma3nProcessor
from audiomm.models.gemma3n.tokenizer import GemmaTokenizer as Gemma3nTokenizer
from audiomm.models.gemma4.processing import Gemma4Processor
from audiomm.models.gemma4.tokenizer import GemmaTokenizer as Gemma4Tokenizer


def _conftest(*place: str) -> ModuleType:
    path = Path(__file__).parent.joinpath("models", *place, "conftest.py")
    spec = importlib.util.spec_from_file_location("_".join(("gemmas", *place)), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_COMMON, _SIZES_3N, _SIZES_4 = _conftest(), _conftest("gemma3n"), _conftest("gemma4")
#: Soft tokens of a clip of up to 2 s and of a picture of 32 x 32 pixels.
CLIP_PLACES, PICTURE_PLACES = 13, 4


def processor_3n() -> Gemma3nProcessor:
    marks = [*Gemma3nTokenizer.media_tokens.values(), "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Gemma3nTokenizer(tokenizer_object=_COMMON.gemma_backend(marks))
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2, do_normalize=False)
    extractor = Gemma3nAudioFeatureExtractor(feature_size=16)
    return Gemma3nProcessor(extractor, pictures, tokenizer, None, CLIP_PLACES, PICTURE_PLACES)


def processor_4() -> Gemma4Processor:
    marks = [*Gemma4Tokenizer.media_tokens.values(), "<|video|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
    marks += ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>"]
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(feature_size=32),
        Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        Gemma4Tokenizer(tokenizer_object=_COMMON.gemma_backend(marks)),
        Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70, num_frames=3),
    )


def _marks(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    names = ("image", "audio", "boi", "eoi", "boa", "eoa")
    return {f"{name}_token_id": ids(getattr(tokenizer, f"{name}_token")) for name in names}


def gemma3n_model(processor: Gemma3nProcessor, seed: int = 5) -> Any:
    size = len(processor.tokenizer)
    text = _SIZES_3N.TEXT | {"vocab_size": size + 16, "vocab_size_per_layer_input": size, "num_hidden_layers": 4}
    text |= {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "max_position_embeddings": 1024}
    config = gemma3n.Gemma3nConfig(
        text_config=text,
        vision_config=_SIZES_3N.VISION_SIZES | {"vocab_offset": size, "vocab_size": 8},
        audio_config=_SIZES_3N.AUDIO_SIZES | {"vocab_offset": size + 8, "vocab_size": 8},
        audio_soft_tokens_per_image=CLIP_PLACES,
        vision_soft_tokens_per_image=PICTURE_PLACES,
        **_marks(processor.tokenizer),
    )
    model = gemma3n.Gemma3nForConditionalGeneration(config).eval()
    _SIZES_3N.scatter(model, seed)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    return model


def gemma4_model(processor: Gemma4Processor, kind: str = "per-layer", seed: int = 5) -> Any:
    size = len(processor.tokenizer)
    text = {**_SIZES_4.TEXT, **_SIZES_4.KINDS[kind], "vocab_size": size, "vocab_size_per_layer_input": size}
    marks = _marks(processor.tokenizer) | {"video_token_id": processor.video_token_id}
    config = gemma4.Gemma4Config(
        text_config=text,
        vision_config=_SIZES_4.VISION | {"position_embedding_size": 1024},
        audio_config=_SIZES_4.SOUND,
        **marks,
    )
    model = _SIZES_4.widen(gemma4.Gemma4ForConditionalGeneration(config), seed)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>"])
    return model


FAMILIES = {"gemma3n": (processor_3n, gemma3n_model), "gemma4": (processor_4, gemma4_model)}
MARKS = {
    "gemma3n": {"image": "<image_soft_token>", "audio": "<audio_soft_token>"},
    "gemma4": {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"},
}


def save(family: str, folder: Path) -> Path:
    """A folder with a tiny model of a family and its processor."""
    torch.manual_seed(0)
    make_processor, make_model = FAMILIES[family]
    processor = make_processor()
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise(seconds: float = 0.5, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, round(16_000 * seconds)).astype(np.float32)


def movie(frames: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 30, 44, 3), dtype=np.uint8)
