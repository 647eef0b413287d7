"""On a GPU: what is captured, made ahead or read in 8 bits gives what the plain way gives, there or on the processor.

Run with `-m gpu`; AUDIOMM_TEST_DEVICE=cpu goes through the same lines where there is no GPU.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, pipeline
from audiomm.layers import fused, rounded
from audiomm.layers.experts import Experts
from audiomm.media import load_audio
from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig, streams
from audiomm.pipelines.features import FeaturesAhead, RecordingFeatures

DEVICE = torch.device(os.environ.get("AUDIOMM_TEST_DEVICE", "cuda:0"))
CPU = torch.device("cpu")
RATE = 16000

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float().cpu() - wanted.float().cpu()).norm() / wanted.float().cpu().norm())


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=400, num_mel_bins=8, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=160, max_source_positions=100,
        max_target_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        init_std=0.3,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval().to(DEVICE)


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_features_made_ahead_on_the_device_are_those_of_the_processor(is_long: bool, whole_numbers: bool) -> None:
    extractor, generator = WhisperFeatureExtractor(chunk_length=2), np.random.default_rng(0)
    seconds = (40.013, 3.0, 7.77) if is_long else (2.0, 0.5, 1.234)
    clips = [(generator.standard_normal(round(one * RATE)) * 0.1).astype(np.float32) for one in seconds]
    if whole_numbers:
        clips = [(np.round(clip * 2**15) / 2**15).astype(np.float32) for clip in clips]
    ahead = FeaturesAhead(extractor, clips, is_long, DEVICE, torch.float32)
    lazy = RecordingFeatures(extractor, clips, is_long, CPU, torch.float32)
    for row in range(3):
        for start in (0, 57):
            found = ahead[row : row + 1, :, start : start + 200]
            assert found.device == DEVICE
            wanted = lazy[row : row + 1, :, start : start + 200]
            torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_steps_write_what_plain_steps_write(whisper: Any, kind: str | None, rows: int) -> None:
    features = torch.randn(rows, 8, 200, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    options = {"max_new_tokens": 60, "cross_cache_dtype": kind, "eos_token_id": 399}
    wanted = whisper.generate(features, disable_compile=True, **options)
    for _ in range(2):
        assert torch.equal(whisper.generate(features, **options), wanted)


@pytest.mark.parametrize("rows", [1, 3])
def test_captured_rounds_of_drafts_write_what_plain_steps_write(whisper: Any, rows: int) -> None:
    features = torch.randn(rows, 8, 200, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    assistant, generator = copy.deepcopy(whisper), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator).to(DEVICE) * weight.abs().mean()
    options = {"max_new_tokens": 60, "eos_token_id": 399}
    wanted = whisper.generate(features, disable_compile=True, **options)
    for drafts in ({"assistant_model": assistant, "num_assistant_tokens": 3}, {"prompt_lookup_num_tokens": 3}):
        for _ in range(2):
            assert torch.equal(whisper.generate(features, **drafts, **options), wanted)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("folds", [1, 5])
def test_what_is_read_in_eight_bits_is_near_what_was_stored(kind: str, dtype: torch.dtype, folds: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 6, 1500, 64).to(DEVICE, dtype)
    queries = torch.randn(2 * folds, 6, 64).to(DEVICE, dtype)
    like = keys[0].transpose(0, 1)
    kept = [rounded.store(rounded.room(like, 2, rounded.KINDS[kind]), exact) for exact in (keys, values)]
    found = rounded.read_rounded(queries, *kept, None, scale=0.125)
    exact = [rounded.exact(one, torch.float32).repeat_interleave(folds, dim=0) for one in kept]
    weights = (queries.float()[:, :, None] @ exact[0].transpose(-1, -2) * 0.125).softmax(-1)
    wanted = (weights @ exact[1])[:, :, 0].flatten(1)
    assert relative(found, wanted) < 0.02


@pytest.mark.parametrize("tokens", [1, 4, 200])
@torch.no_grad()
def test_experts_give_what_the_loop_gives(tokens: int) -> None:
    torch.manual_seed(0)
    experts = Experts(16, 64, 32)
    for weight in experts.parameters():
        weight.normal_(std=0.2)
    chosen = torch.stack([torch.randperm(16)[:4] for _ in range(tokens)])
    weights, hidden = torch.rand(tokens, 4), torch.randn(tokens, 64)
    wanted = experts.looped(hidden, weights, chosen)
    low = copy.deepcopy(experts).to(DEVICE, torch.bfloat16)
    given = hidden.to(DEVICE, torch.bfloat16), weights.to(DEVICE), chosen.to(DEVICE)
    for road in (low.forward, low._gathered, low._grouped):
        assert relative(road(*given), wanted) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_trusted_where_triton_is(dtype: torch.dtype) -> None:
    from torch.utils._triton import has_triton

    like = torch.ones(1, dtype=dtype, device=DEVICE)
    trusted = DEVICE.type == "cuda" and has_triton()
    assert (fused.has_kernels(like), streams.has_kernels(like)) == (trusted, trusted)


@pytest.mark.parametrize("kind", ["dense", "per-layer", "experts", "gemma3n"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_gemma_writes_with_kernels_what_it_writes_without(gemmas: Any, monkeypatch: Any, kind: str, captured: bool):
    if kind == "gemma3n":
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**gemmas._SIZES_3N.TEXT)).eval()
        gemmas._SIZES_3N.scatter(model, 3)
    else:
        model = gemmas._SIZES_4.make(kind)
    model = model.to(DEVICE)
    ids = torch.randint(5, 90, (3, 9)).to(DEVICE)
    options = {"max_new_tokens": 60, "eos_token_id": None, "do_sample": False, "disable_compile": not captured}
    found = [model.generate(ids, **options) for _ in range(2)]
    monkeypatch.setenv("AUDIOMM_KERNELS", "0")
    other = copy.deepcopy(model)
    wanted = other.generate(ids, **options)
    assert torch.equal(found[0], wanted)
    assert torch.equal(found[1], wanted)


def test_a_pipeline_writes_the_same_text_as_on_the_processor() -> None:
    files = sorted((Path(__file__).parents[2] / "examples" / "audio").glob("*.flac"))[:3]
    clips = [load_audio(file, RATE) for file in files]
    recordings = [np.concatenate([*clips, *clips[: 1 + place]])[: (31 + place) * RATE] for place in range(3)]
    for batch in (clips, recordings):
        texts = [
            [one["text"] for one in pipeline("automatic-speech-recognition", device=device, dtype="float32")(
                batch, batch_size=2, return_timestamps=True)]
            for device in (CPU, DEVICE)
        ]  # fmt: skip
        assert texts[0] == texts[1]
        assert all(text.split() for text in texts[0])
