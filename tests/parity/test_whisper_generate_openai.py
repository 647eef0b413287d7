"""transcribe() gives openai-whisper's tokens and times on random models with the same weights, drawn wide.

Here the reference is openai-whisper itself: its windows, fallback, prompts, searches and clips.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import audiomm
from audiomm.models.whisper.segments import without_closing_pair

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SEEDS = range(3)
RATE, BEGIN, END = 16000, 50364, 50257
DIMENSIONS = {
    "n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 32, "n_audio_head": 2, "n_audio_layer": 1,
    "n_vocab": 51865, "n_text_ctx": 64, "n_text_state": 32, "n_text_head": 2, "n_text_layer": 2,
}  # fmt: skip
#: OpenAI's names and ours; a pattern and what takes its place.
NAMES = [
    (r"\bblocks\b", "layers"), (r"mlp\.0", "fc1"), (r"mlp\.2", "fc2"), (r"mlp_ln", "final_layer_norm"),
    (r"cross_attn_ln", "encoder_attn_layer_norm"), (r"cross_attn\b", "encoder_attn"),
    (r"\battn_ln", "self_attn_layer_norm"), (r"\battn\b", "self_attn"),
    (r"\bquery\b", "q_proj"), (r"\bkey\b", "k_proj"), (r"\bvalue\b", "v_proj"), (r"\bout\b", "out_proj"),
    (r"ln_post", "layer_norm"), (r"decoder\.ln\b", "decoder.layer_norm"), (r"token_embedding", "embed_tokens"),
    (r"positional_embedding", "embed_positions.weight"),
]  # fmt: skip


@pytest.fixture(scope="session")
def openai() -> Any:
    return pytest.importorskip("whisper")


@pytest.fixture(scope="session")
def tokenizer(openai: Any) -> Any:
    return openai.tokenizer.get_tokenizer(True, num_languages=99, language="en", task="transcribe")


@pytest.fixture(scope="session")
def processor(tokenizer: Any) -> Any:
    """Ours of the features, and OpenAI's words under the names of ours."""

    def decode(tokens: list[int], skip_special_tokens: bool = False) -> str:
        return str(tokenizer.encoding.decode([token for token in tokens if token < END]))

    words = SimpleNamespace(
        decode=decode,
        timestamp_begin=tokenizer.timestamp_begin,
        get_prompt_ids=lambda text: [tokenizer.sot_prev, *tokenizer.encode(" " + text.strip())],
        convert_tokens_to_ids=lambda token: tokenizer.special_tokens[token],
    )
    return SimpleNamespace(tokenizer=words, feature_extractor=audiomm.WhisperFeatureExtractor())


@torch.no_grad()
def _models(openai: Any, tokenizer: Any, seed: int) -> tuple[Any, Any]:
    theirs = openai.model.Whisper(openai.model.ModelDimensions(**DIMENSIONS)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(theirs.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "ln" in name:
            parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "embedding" in name:
            parameter.copy_(noise * (3 if "positional" in name else 1))
        else:
            parameter.copy_(1.3 * noise / parameter[0].numel() ** 0.5)
    # Timestamps and the end come now and then, as in a trained model.
    embedding = theirs.decoder.token_embedding.weight
    embedding[BEGIN:] *= 1.15
    embedding[END] *= 1.2
    ours = audiomm.WhisperForConditionalGeneration(_config())
    weights = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours_name in NAMES:
            name = re.sub(pattern, ours_name, name)
        weights["model." + name] = value
    ours.load_state_dict({**weights, "proj_out.weight": weights["model.decoder.embed_tokens.weight"]})
    ours.tie_weights()
    for name, value in {
        "pad_token_id": END, "eos_token_id": END, "decoder_start_token_id": tokenizer.sot, "is_multilingual": True,
        "begin_suppress_tokens": [220, END], "suppress_tokens": list(tokenizer.non_speech_tokens),
        "lang_to_id": {f"<|{code}|>": tokenizer.to_language_token(code) for code in tokenizer.all_language_codes},
        "task_to_id": {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate},
        "no_timestamps_token_id": tokenizer.no_timestamps, "prev_sot_token_id": tokenizer.sot_prev,
        "max_initial_timestamp_index": 50, "max_length": 64,
    }.items():  # fmt: skip
        setattr(ours.generation_config, name, value)
    return theirs, ours.eval()


def _config() -> audiomm.WhisperConfig:
    return audiomm.WhisperConfig(
        vocab_size=51865, num_mel_bins=80, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        max_source_positions=1500, max_target_positions=64, pad_token_id=END, bos_token_id=END, eos_token_id=END,
        decoder_start_token_id=50258,
    )  # fmt: skip


@pytest.fixture(scope="session")
def models(openai: Any, tokenizer: Any) -> dict[int, tuple[Any, Any]]:
    return {seed: _models(openai, tokenizer, seed) for seed in SEEDS}


def recording(seconds: float, seed: int) -> np.ndarray:
    """Noise that is now louder and now softer."""
    generator = np.random.default_rng(seed)
    loudness = np.repeat(generator.uniform(0.01, 0.6, int(seconds * 4) + 1), RATE // 4)[: int(seconds * RATE)]
    return (generator.standard_normal(len(loudness)) * loudness).astype(np.float32)


def bounded(segments: list[dict[str, Any]], seconds: float) -> list[tuple[int, float, float]]:
    """Window, start and end of each segment; those of random models lie outside the recording and overlap."""
    times, latest = [], 0.0
    for one in segments:
        start = min(max(one["start"], latest), seconds)
        latest = min(max(one["end"], start), seconds)
        times.append((one["seek"], start, latest))
    return times


OPEN = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {**OPEN, "temperature": 0.0},
    "no context": {**OPEN, "temperature": 0.0, "condition_on_previous_text": False},
    "beams": {**OPEN, "temperature": 0.0, "beam_size": 3},
    "patient beams": {**OPEN, "temperature": 0.0, "beam_size": 3, "patience": 2.0, "length_penalty": 0.6},
    "impatient beams": {**OPEN, "temperature": 0.0, "beam_size": 4, "patience": 0.3},
    "a prompt": {
        **OPEN,
        "temperature": 0.0,
        "initial_prompt": "Dr. Ørsted, Aarhus",
        "condition_on_previous_text": False,
    },
    "a prompt and context": {**OPEN, "temperature": 0.0, "initial_prompt": "Dr. Ørsted, Aarhus"},
    "a carried prompt": {**OPEN, "temperature": 0.0, "initial_prompt": "Ørsted", "carry_initial_prompt": True},
    "clips": {**OPEN, "temperature": 0.0, "clip_timestamps": "2,5.5,6,8"},
    "translation": {**OPEN, "temperature": 0.0, "task": "translate"},
    "no timestamps": {
        **OPEN,
        "temperature": 0.0,
        "without_timestamps": True,
        "suppress_tokens": [-1, *range(BEGIN, 51865)],
    },
    "any first timestamp": {**OPEN, "temperature": 0.0, "max_initial_timestamp": None},
    "blanks allowed": {**OPEN, "temperature": 0.0, "suppress_blank": False, "suppress_tokens": "5,6"},
    "thresholds that never hold": {"temperature": (0.0, 0.3, 0.9), "logprob_threshold": 0.0, "best_of": 1},
    "compression that is never good": {
        **OPEN,
        "temperature": (0.0, 0.6),
        "compression_ratio_threshold": 0.1,
        "best_of": 3,
    },
    "silence everywhere": {"temperature": 0.0, "no_speech_threshold": 0.0},
    "the defaults with two drawn texts": {"best_of": 2},
}


@pytest.mark.parametrize("seconds", [8.3, 47.2])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_text_at_the_same_times(
    name: str, seconds: float, openai: Any, models: dict[int, tuple[Any, Any]], processor: Any
) -> None:
    for seed in SEEDS:
        theirs, ours = models[seed]
        audio = recording(seconds, seed)
        options = {"language": "en", **CALLS[name]}
        torch.manual_seed(seed)
        expected = openai.transcribe(theirs, audio, fp16=False, **options)
        torch.manual_seed(seed)
        found = ours.transcribe(audio, processor=processor, break_loops=False, **{"best_of": None, **options})
        said = [one for one in expected["segments"] if one["text"].strip()]
        assert [without_closing_pair(torch.tensor(one.tokens), BEGIN).tolist() for one in found.segments] == [
            one["tokens"] for one in said
        ], f"seed {seed}"
        times = bounded(said, seconds)
        mine = [(one.seek, one.start, one.end) for one in found.segments]
        assert np.allclose(times, mine, atol=1e-6), f"seed {seed}: {times} and {mine}"
        for one, other in zip(said, found.segments, strict=True):
            assert one["temperature"] == other.temperature
            assert one["avg_logprob"] == pytest.approx(other.avg_logprob, abs=1e-3)
            assert one["compression_ratio"] == pytest.approx(other.compression_ratio, abs=1e-6)
            assert one["no_speech_prob"] == pytest.approx(other.no_speech_prob, abs=1e-4)
