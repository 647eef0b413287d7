"""Small vocabularies of the Gemma kind and processors made of them, for the tests of both families."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from audiomm.feature_extraction.image import Gemma4ImageProcessor, SiglipImageProcessor
from audiomm.feature_extraction.usm import Gemma3nAudioFeatureExtractor, Gemma4AudioFeatureExtractor
from audiomm.feature_extraction.video import Gemma4VideoProcessor
from audiomm.models.gemma3n.processing import Gemma3nProcessor
from audiomm.models.gemma3n.tokenizer import GemmaTokenizer as Gemma3nTokenizer
from audiomm.models.gemma4.processing import Gemma4Processor
from audiomm.models.gemma4.tokenizer import GemmaTokenizer as Gemma4Tokenizer

_WORDS = ["he", "hel", "lo", "hello", "th", "the"]
_MERGES = [("h", "e"), ("he", "l"), ("l", "o"), ("hel", "lo"), ("t", "h"), ("th", "e")]


def gemma_backend(marks: list[str]) -> Tokenizer:
    """Letters, bytes and a few merges; `<bos>` before every text; `marks` are special tokens behind the rest."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*string.ascii_letters, *string.digits, *".,:;?!'-<>|_", "▁", "\n", *_WORDS]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in [*pieces[:5], *marks]])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    return core


@pytest.fixture
def gemma3n_tokenizer() -> Gemma3nTokenizer:
    marks = [*Gemma3nTokenizer.media_tokens.values(), "<start_of_turn>", "<end_of_turn>"]
    return Gemma3nTokenizer(tokenizer_object=gemma_backend(marks))


@pytest.fixture
def gemma4_tokenizer() -> Gemma4Tokenizer:
    marks = [*Gemma4Tokenizer.media_tokens.values(), "<|video|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
    marks += ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>"]
    return Gemma4Tokenizer(tokenizer_object=gemma_backend(marks))


@pytest.fixture
def gemma3n_processor(gemma3n_tokenizer: Gemma3nTokenizer) -> Gemma3nProcessor:
    """Pictures of 32 x 32 that cost 4 tokens, clips that cost 3."""
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2, do_normalize=False)
    return Gemma3nProcessor(Gemma3nAudioFeatureExtractor(feature_size=16), pictures, gemma3n_tokenizer, None, 3, 4)


@pytest.fixture
def gemma4_processor(gemma4_tokenizer: Gemma4Tokenizer) -> Gemma4Processor:
    """Patches of 4 x 4, so that small pictures have many tokens; videos of 3 frames."""
    return Gemma4Processor(
        Gemma4AudioFeatureExtractor(feature_size=16),
        Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        gemma4_tokenizer,
        Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70, num_frames=3),
    )


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Makes a picture of noise, (height, width, 3) uint8."""

    def make(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def clip() -> Callable[..., np.ndarray]:
    """Makes a mono clip of noise at 16 kHz, float32."""

    def make(seconds: float = 0.5, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)

    return make


@pytest.fixture
def movie() -> Callable[..., np.ndarray]:
    """Makes a video of noise, (frames, height, width, 3) uint8."""

    def make(frames: int = 5, height: int = 30, width: int = 44, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def backend_of() -> Any:
    return gemma_backend
