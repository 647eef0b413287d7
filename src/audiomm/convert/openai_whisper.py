"""Checkpoints of openai-whisper (.pt): `{"dims", "model_state_dict"}`, read without running what a pickle may hold.

They hold no tokenizer: name one with tokenizer=, or openai-whisper's own multilingual.tiktoken or gpt2.tiktoken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.errors import CorruptCheckpointError
from .foreign import Foreign, rename, size_of
from .torch_bin import load_torch

#: Names of openai-whisper -> names of the hub, replaced in this order; ggml files use them too.
RULES = (
    (".blocks.", ".layers."),
    (".mlp_ln.", ".final_layer_norm."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    (".cross_attn_ln.", ".encoder_attn_layer_norm."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".cross_attn.", ".encoder_attn."),
    (".attn.", ".self_attn."),
    ("attn.query.", "attn.q_proj."),
    ("attn.key.", "attn.k_proj."),
    ("attn.value.", "attn.v_proj."),
    ("attn.out.", "attn.out_proj."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("encoder.ln_post.", "encoder.layer_norm."),
    ("token_embedding.", "embed_tokens."),
    ("positional_embedding", "embed_positions.weight"),
)

#: Sizes in the file -> fields of the config; ggml's header has the same under the same names.
DIMENSIONS = {
    "n_mels": "num_mel_bins",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def is_openai(content: Any) -> bool:
    """Whether a loaded .pt file is openai-whisper's."""
    return isinstance(content, dict) and {"dims", "model_state_dict"} <= content.keys()


def read_openai(path: Path) -> Foreign:
    """Read a .pt file of openai-whisper.

    Raises:
        UnsafeCheckpointError: Reading it would run code.
        CorruptCheckpointError: It is cut short, or not of that form.
    """
    content = load_torch(path)
    if not is_openai(content):
        found = sorted(map(str, content))[:6] if isinstance(content, dict) else type(content).__name__
        raise CorruptCheckpointError(
            f"{path}: 'dims' and 'model_state_dict' of openai-whisper are not both there; it holds {found}. For "
            "weights in the hub's layout pass the folder that holds them and config.json."
        )
    dims, state = content["dims"], content["model_state_dict"]
    if not isinstance(dims, dict) or not isinstance(state, dict) or not state:
        raise CorruptCheckpointError(f"{path}: dims and model_state_dict must be dictionaries, and not empty.")
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CorruptCheckpointError(f"{path}: {strange[0]!r} in model_state_dict is not a tensor.")
    # Which heads align words is no weight; some programs save the mask all the same.
    weights = rename({name: value for name, value in state.items() if name != "alignment_heads"}, RULES, "model.")
    return Foreign(path.name, weights, sizes(dims, weights, str(path)))


def sizes(dims: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of the config that openai-whisper's dimensions give; the widths within layers are the weights'.

    Raises:
        CorruptCheckpointError: A dimension is missing or not a whole number.
    """
    for name in DIMENSIONS:
        if not isinstance(dims.get(name), int):
            raise CorruptCheckpointError(f"{where}: the dimension {name} is {dims.get(name)!r}, not a whole number.")
    if dims.get("n_text_state", dims["n_audio_state"]) != dims["n_audio_state"]:
        raise CorruptCheckpointError(
            f"{where}: n_text_state={dims['n_text_state']} and n_audio_state={dims['n_audio_state']} differ; Whisper's "
            "encoder and decoder are equally wide."
        )
    config = {field: dims[name] for name, field in DIMENSIONS.items()}
    config["encoder_ffn_dim"] = size_of(weights, "model.encoder.layers.0.fc1.weight", 0, where)
    config["decoder_ffn_dim"] = size_of(weights, "model.decoder.layers.0.fc1.weight", 0, where)
    return config
