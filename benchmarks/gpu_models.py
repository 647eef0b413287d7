"""Models of published sizes with random weights, made on the device, and their twins of transformers.

Sizes are those of the published config.json files. A twin shares its weights with the model: nothing is held twice.
"""

from __future__ import annotations

from typing import Any

import torch

_TURBO = {
    "num_mel_bins": 128, "vocab_size": 51866, "d_model": 1280, "encoder_layers": 32, "decoder_layers": 4,
    "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
}  # fmt: skip
WHISPERS: dict[str, dict[str, Any]] = {"turbo": _TURBO, "large-v3": {**_TURBO, "decoder_layers": 32}}

_SPARSE = [0.95] * 10
_PER_LAYER = {"hidden_size_per_layer_input": 256, "final_logit_softcapping": 30.0}
_SLIDING, _FULL = "sliding_attention", "full_attention"
#: Name -> class, and the arguments of its text config.
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 4 E2B": (
        "Gemma4",
        {
            **_PER_LAYER, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
            "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
            "layer_types": ([_SLIDING] * 4 + [_FULL]) * 7,
        },
    ),
    "Gemma 4 E4B": (
        "Gemma4",
        {
            **_PER_LAYER, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42,
            "num_key_value_heads": 2, "num_kv_shared_layers": 18,
        },
    ),
    "Gemma 3n E2B": (
        "Gemma3n",
        {
            "num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10,
            "activation_sparsity_pattern": _SPARSE + [0.0] * 20,
        },
    ),
    "Gemma 3n E4B": ("Gemma3n", {"activation_sparsity_pattern": _SPARSE + [0.0] * 25}),
    "Gemma 4 31B": (
        "Gemma4",
        {
            "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32,
            "num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "sliding_window": 1024, "final_logit_softcapping": 30.0,
        },
    ),
}  # fmt: skip
#: What is put in their place for a smoke test.
_TINY_WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
_TINY_GEMMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 256, "vocab_size_per_layer_input": 256, "num_hidden_layers": 5, "num_kv_shared_layers": 0,
}  # fmt: skip


def whisper(name: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """A WhisperForConditionalGeneration with the special tokens of the published ones."""
    import audiomm

    config = audiomm.WhisperConfig(**WHISPERS[name] | (_TINY_WHISPER if tiny else {}))
    model = _made(audiomm.WhisperForConditionalGeneration, config, device, dtype)
    # Those of a vocabulary of 51,866 tokens.
    tokens = {
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
        "bos_token_id": 50257,
        "no_timestamps_token_id": 50364,
        "prev_sot_token_id": 50362,
        "lang_to_id": {"<|en|>": 50259},
        "task_to_id": {"translate": 50359, "transcribe": 50360},
        "is_multilingual": True,
        "max_length": 448,
    }
    for field, value in tokens.items():
        setattr(model.generation_config, field, value)
    return model


def gemma(name: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """A Gemma's text model with a head."""
    import audiomm

    family, values = GEMMAS[name]
    if tiny:
        values = {**values, **_TINY_GEMMA, "layer_types": [_SLIDING] * 4 + [_FULL]}
        if values.get("hidden_size_per_layer_input"):
            values["hidden_size_per_layer_input"] = 8
        if family == "Gemma3n":
            values |= {"laurel_rank": 8, "hidden_size_per_layer_input": 8}
            values["activation_sparsity_pattern"] = [0.95] * 2 + [0.0] * 3
        if "num_global_key_value_heads" in values:
            values["num_global_key_value_heads"] = 1
        if "global_head_dim" not in values and family == "Gemma4":
            values["global_head_dim"] = 32
    config = getattr(audiomm, f"{family}TextConfig")(**values)
    return _made(getattr(audiomm, f"{family}ForCausalLM"), config, device, dtype)


def _made(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """The model of transformers of the same class, config and weights: the same memory."""
    import transformers
    from accelerate import init_empty_weights

    transformers.utils.logging.set_verbosity_error()
    config_class = getattr(transformers, type(model.config).__name__)
    config = config_class(**model.config.to_dict())
    config.dtype = model.dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        # Buffers, like tables of rotary positions, are computed and not in the weights.
        with init_empty_weights(include_buffers=False):
            other = getattr(transformers, type(model).__name__)(config)
    finally:
        torch.set_default_dtype(before)
    missing = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    other.tie_weights()
    left = [name for name, value in other.named_parameters() if value.is_meta]
    if left:
        raise RuntimeError(f"the twin lacks weights: {left[:4]} ({missing})")
    other = other.to(model.device).eval()
    for name, value in vars(model.generation_config).items():
        if value is not None and not name.startswith("_"):
            setattr(other.generation_config, name, value)
    return other


def read_bytes(model: Any) -> int:
    """Bytes of weights that a decoding step reads: all but the encoder and the tables that only rows are taken from."""
    skipped = ("embed_tokens_per_layer", "encoder.", "embed_positions")
    # The pairs of the encoder's output are computed once a window.
    once = ("encoder_attn.k_proj", "encoder_attn.v_proj")
    names = [name for name, _ in model.named_parameters() if not any(part in name for part in (*skipped, *once))]
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() * parameters[name].element_size() for name in names)


def state_bytes(model: Any, batch: int) -> int:
    """Bytes of keys and values of the encoder's output that a step of Whisper reads."""
    config = model.config
    if not hasattr(config, "max_source_positions"):
        return 0
    pairs = 2 * config.decoder_layers * config.max_source_positions * config.d_model
    return batch * pairs * model.dtype.itemsize
