"""A tiny Whisper with a vocabulary of its own, and writers of its weights in the formats of other programs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.languages import LANGUAGES
from audiomm.models.whisper import WhisperConfig, WhisperForConditionalGeneration

#: Text: all bytes, and a few merges of them.
TOKENS = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the", b"ll", b"o ", b"ello"]
LANGUAGE_COUNT = 3
END = len(TOKENS)
VOCABULARY = END + 8 + LANGUAGE_COUNT + 1501

SIZES = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 32,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 96,
    "max_source_positions": 50, "max_target_positions": 40,
    "pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": END + 1,
}  # fmt: skip


@pytest.fixture
def tokens() -> list[bytes]:
    return list(TOKENS)


@pytest.fixture
def special_tokens() -> list[str]:
    """Everything after the text, as openai-whisper numbers it."""
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:LANGUAGE_COUNT]]
    middle = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    return ["<|endoftext|>", "<|startoftranscript|>", *languages, *middle, *times]


@pytest.fixture
def sizes() -> dict[str, Any]:
    return dict(SIZES)


@pytest.fixture
def make_model() -> Callable[..., WhisperForConditionalGeneration]:
    def make(**overrides: Any) -> WhisperForConditionalGeneration:
        torch.manual_seed(5)
        model = WhisperForConditionalGeneration(WhisperConfig(**{**SIZES, "init_std": 0.3, **overrides})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "layer_norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def model(make_model: Callable[..., WhisperForConditionalGeneration]) -> WhisperForConditionalGeneration:
    return make_model()


@pytest.fixture
def weights(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights by the hub's names, without the tied head."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "proj_out.weight"}


def _openai_name(name: str) -> str:
    parts = name.removeprefix("model.").split(".")
    layer = {"self_attn": "attn", "encoder_attn": "cross_attn", "self_attn_layer_norm": "attn_ln", "fc1": "mlp.0",
             "encoder_attn_layer_norm": "cross_attn_ln", "fc2": "mlp.2", "final_layer_norm": "mlp_ln"}  # fmt: skip
    projection = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    if parts[1] == "layers":
        rest = [projection.get(part, part) for part in parts[4:]]
        return ".".join([parts[0], "blocks", parts[2], layer[parts[3]], *rest])
    top = {"embed_positions": "positional_embedding", "embed_tokens": "token_embedding",
           "layer_norm": "ln_post" if parts[0] == "encoder" else "ln"}  # fmt: skip
    name = ".".join([parts[0], top.get(parts[1], parts[1]), *parts[2:]])
    return name.replace("positional_embedding.weight", "positional_embedding")


@pytest.fixture
def openai_name() -> Callable[[str], str]:
    return _openai_name


@pytest.fixture
def dims() -> dict[str, int]:
    """The sizes as openai-whisper has them."""
    return {
        "n_mels": SIZES["num_mel_bins"], "n_audio_ctx": SIZES["max_source_positions"],
        "n_audio_state": SIZES["d_model"], "n_audio_head": SIZES["encoder_attention_heads"],
        "n_audio_layer": SIZES["encoder_layers"], "n_vocab": SIZES["vocab_size"],
        "n_text_ctx": SIZES["max_target_positions"], "n_text_state": SIZES["d_model"],
        "n_text_head": SIZES["decoder_attention_heads"], "n_text_layer": SIZES["decoder_layers"],
    }  # fmt: skip


@pytest.fixture
def openai_file(tmp_path: Path, weights: dict[str, torch.Tensor], dims: dict[str, int]) -> Callable[..., Path]:
    """Writes a .pt of openai-whisper."""

    def write(name: str = "tiny.pt", dtype: torch.dtype = torch.float32, **other: Any) -> Path:
        state = {_openai_name(key): value.to(dtype) for key, value in weights.items()}
        torch.save({"dims": dims, "model_state_dict": state, **other}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def tiktoken_file(tmp_path: Path) -> Path:
    import base64

    path = tmp_path / "tiny.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(TOKENS)))
    return path


# ---------------------------------------------------------------------- ggml


def _quantise(values: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """Blocks of 32 numbers as whisper.cpp packs them, and the numbers they stand for, one block at a time."""
    bits = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}[kind]
    data, meant = b"", []
    for block in values.reshape(-1, 32).astype(np.float32):
        if kind.endswith("_1"):
            offset = np.float16(block.min())
            step = np.float16((block.max() - block.min()) / (2**bits - 1))
            levels = np.clip(np.rint((block - np.float32(offset)) / max(float(step), 1e-9)), 0, 2**bits - 1).astype(int)
            data += struct.pack("<ee", step, offset)
            meant += [float(step) * int(level) + float(offset) for level in levels]
        else:
            step = np.float16(np.abs(block).max() / (2 ** (bits - 1) - 1))
            half = 0 if bits == 8 else 2 ** (bits - 1)
            signed = np.clip(np.rint(block / max(float(step), 1e-9)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(
                int
            )
            levels = signed + half
            data += struct.pack("<e", step)
            meant += [float(step) * int(level) for level in signed]
        if bits == 8:
            data += struct.pack("<32b", *levels)
            continue
        if bits == 5:
            data += struct.pack("<I", sum((int(level) >> 4 & 1) << place for place, level in enumerate(levels)))
        data += bytes(int(levels[place] & 15) | int(levels[place + 16] & 15) << 4 for place in range(16))
    return data, np.array(meant, dtype=np.float32).reshape(values.shape)


@pytest.fixture
def ggml_file(
    tmp_path: Path, weights: dict[str, torch.Tensor], dims: dict[str, int]
) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a model of whisper.cpp; gives its path and the weights it stands for."""
    types = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
    file_types = {"f32": 0, "f16": 1, "q4_0": 2002, "q4_1": 2003, "q8_0": 2007, "q5_0": 2008, "q5_1": 2009}

    def write(kind: str = "f16", tokens: list[bytes] = TOKENS, text_ctx: int | None = None,
              file_type: int | None = None) -> tuple[Path, dict[str, torch.Tensor]]:  # fmt: skip
        path, meant = tmp_path / f"ggml-{kind}.bin", {}
        header = {**dims, "n_text_ctx": text_ctx or dims["n_text_ctx"]}
        names = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_text_ctx",
                 "n_text_state", "n_text_head", "n_text_layer", "n_mels")  # fmt: skip
        with open(path, "wb") as file:
            written_type = file_types[kind] if file_type is None else file_type
            file.write(struct.pack("<12i", 0x67676D6C, *(header[name] for name in names), written_type))
            file.write(struct.pack("<2i", dims["n_mels"], 201) + bytes(4 * 201 * dims["n_mels"]))
            file.write(struct.pack("<i", len(tokens)))
            for token in tokens:
                file.write(struct.pack("<i", len(token)) + token)
            for key, tensor in weights.items():
                name, array = _openai_name(key), tensor.numpy()
                if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
                    array = array[:, None]
                is_small = array.ndim < 2 or "positional" in name or "conv" in name
                used = "f32" if array.ndim < 2 or "positional" in name or name.endswith("bias") else kind
                used = "f16" if is_small and used.startswith("q") else used
                if used in ("f32", "f16"):
                    array = array.astype(np.float32 if used == "f32" else np.float16)
                    data, value = array.tobytes(), array.astype(np.float32)
                else:
                    data, value = _quantise(array, used)
                file.write(struct.pack("<3i", array.ndim, len(name), types[used]))
                file.write(struct.pack(f"<{array.ndim}i", *array.shape[::-1]) + name.encode() + data)
                meant[key] = torch.from_numpy(value.copy()).reshape(tensor.shape)
        return path, meant

    return write


# ---------------------------------------------------------------------- CTranslate2


@pytest.fixture
def ctranslate2_folder(
    tmp_path: Path, weights: dict[str, torch.Tensor], special_tokens: list[str]
) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a model of CTranslate2; gives the folder and the weights it stands for."""
    type_ids = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}

    def write(kind: str = "float32", version: int = 6, specification: str = "WhisperSpec",
              old_vocabulary: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:  # fmt: skip
        folder = tmp_path / f"ct2-{kind}"
        folder.mkdir()
        meant: dict[str, torch.Tensor] = {}
        arrays: dict[str, np.ndarray] = {}

        def put(name: str, parts: list[str], ending: str) -> None:
            """One array made of one or several weights; keys have no bias, which is zeros in between."""
            values = [weights.get(f"model.{part}.{ending}") for part in parts]
            width = next(value for value in values if value is not None).shape[0]
            whole = torch.cat([torch.zeros(width) if value is None else value for value in values]).numpy()
            spelled = {("weight", True): "gamma", ("bias", True): "beta"}.get((ending, "layer_norm" in name), ending)
            stored, scale = whole.astype(np.float16 if kind == "float16" else np.float32), None
            if kind in ("int8", "int16") and ending == "weight" and "layer_norm" not in name:
                rows = whole.reshape(len(whole), -1)
                largest = np.abs(rows).max(axis=1) if kind == "int8" else np.abs(rows).max()
                scale = np.float32((127 if kind == "int8" else 1024) / np.where(largest == 0, 127, largest))
                expanded = scale.reshape(-1, *[1] * (whole.ndim - 1)) if kind == "int8" else scale
                stored = np.rint(whole * expanded).astype(kind)
                arrays[f"{name}/{spelled}_scale"] = scale
                whole = stored.astype(np.float32) / expanded
            else:
                whole = stored.astype(np.float32)
            arrays[f"{name}/{spelled}"] = stored
            for part, value in zip(parts, np.split(whole, len(parts)), strict=True):
                if f"model.{part}.{ending}" in weights:
                    meant[f"model.{part}.{ending}"] = torch.from_numpy(value.copy())

        def both(name: str, *parts: str) -> None:
            put(name, list(parts), "weight")
            put(name, list(parts), "bias")

        for stack in ("encoder", "decoder"):
            arrays[f"{stack}/num_heads"] = np.int16(SIZES[f"{stack}_attention_heads"])
            both(f"{stack}/layer_norm", f"{stack}.layer_norm")
            table = weights[f"model.{stack}.embed_positions.weight"]
            stored = table.numpy().astype(np.float16 if kind == "float16" else np.float32)
            arrays[f"{stack}/position_encodings/encodings"] = stored
            meant[f"model.{stack}.embed_positions.weight"] = torch.from_numpy(stored.astype(np.float32))
            for index in range(SIZES[f"{stack}_layers"]):
                old, new = f"{stack}/layer_{index}", f"{stack}.layers.{index}"
                both(f"{old}/self_attention/linear_0", *(f"{new}.self_attn.{one}_proj" for one in "qkv"))
                both(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
                both(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
                both(f"{old}/ffn/linear_0", f"{new}.fc1")
                both(f"{old}/ffn/linear_1", f"{new}.fc2")
                both(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
                if stack == "decoder":
                    both(f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                    both(f"{old}/attention/linear_1", f"{new}.encoder_attn.k_proj", f"{new}.encoder_attn.v_proj")
                    both(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
                    both(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
        both("encoder/conv1", "encoder.conv1")
        both("encoder/conv2", "encoder.conv2")
        put("decoder/embeddings", ["decoder.embed_tokens"], "weight")
        aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}

        def text(value: str) -> bytes:
            return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

        with open(folder / "model.bin", "wb") as file:
            file.write(struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(arrays)))
            for name, array in arrays.items():
                shape = np.shape(array)
                file.write(text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
                data = np.asarray(array).tobytes()
                file.write(struct.pack("<BI", type_ids[np.asarray(array).dtype.name], len(data)) + data)
            file.write(struct.pack("<I", len(aliases)))
            for alias, target in aliases.items():
                file.write(text(alias) + text(target))
        import json

        from tokenizers.pre_tokenizers import ByteLevel

        spelled = [ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token.decode("latin-1"))
                   for token in TOKENS if token.isascii()]  # fmt: skip
        ascii_spelling = {token: pieces[0][0] for token, pieces in zip(
            [token for token in TOKENS if token.isascii()], spelled, strict=True)}  # fmt: skip
        hidden = [byte for byte in range(256) if not (0x21 <= byte < 0x7F or 0xA1 <= byte < 0xAD or byte >= 0xAE)]
        listed = [
            ascii_spelling.get(token) or (chr(256 + hidden.index(token[0])) if token[0] in hidden else chr(token[0]))
            for token in TOKENS
        ]
        everything = [*listed, *special_tokens]
        if old_vocabulary:
            (folder / "vocabulary.txt").write_text("\n".join(everything) + "\n", encoding="utf-8")
        else:
            (folder / "vocabulary.json").write_text(json.dumps(everything), encoding="utf-8")
        settings = {"alignment_heads": [[1, 0], [2, 1]], "suppress_ids": [1, 2, END + 1], "suppress_ids_begin": [32, END],
                    "lang_ids": [END + 2, END + 3, END + 4]}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        return folder, meant

    return write
