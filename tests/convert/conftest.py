"""A tiny Whisper with a vocabulary of its own, and writers of its weights in the formats of other programs."""

from __future__ import annotations

import base64
import json
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

_TYPE_IDS = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
_HIDDEN = [byte for byte in range(256) if not (0x21 <= byte < 0x7F or 0xA1 <= byte < 0xAD or byte >= 0xAE)]


class _Arrays:
    """The arrays of a model.bin, and the weights they stand for."""

    def __init__(self, weights: dict[str, torch.Tensor], kind: str) -> None:
        self.weights, self.kind = weights, kind
        self.stored: dict[str, np.ndarray] = {}
        self.meant: dict[str, torch.Tensor] = {}

    def put(self, name: str, *parts: str) -> None:
        """Weight and bias of one or several modules as one; keys have no bias, which is zeros in between."""
        for ending in ("weight", "bias"):
            values = [self.weights.get(f"model.{part}.{ending}") for part in parts]
            known = next((value for value in values if value is not None), None)
            if known is None:
                continue
            whole = torch.cat([torch.zeros(len(known)) if value is None else value for value in values]).numpy()
            is_norm = "layer_norm" in name
            meant = self._store(f"{name}/{self._spelled(ending, is_norm)}", whole, ending == "weight" and not is_norm)
            for part, value in zip(parts, np.split(meant, len(parts)), strict=True):
                if f"model.{part}.{ending}" in self.weights:
                    self.meant[f"model.{part}.{ending}"] = torch.from_numpy(value.copy())

    def put_positions(self, stack: str) -> None:
        name = f"model.{stack}.embed_positions.weight"
        meant = self._store(f"{stack}/position_encodings/encodings", self.weights[name].numpy(), False)
        self.meant[name] = torch.from_numpy(meant.copy())

    @staticmethod
    def _spelled(ending: str, is_norm: bool) -> str:
        return {"weight": "gamma", "bias": "beta"}[ending] if is_norm else ending

    def _store(self, name: str, whole: np.ndarray, is_matrix: bool) -> np.ndarray:
        if self.kind in ("float32", "float16") or not is_matrix:
            self.stored[name] = whole.astype(np.float16 if self.kind == "float16" else np.float32)
            return self.stored[name].astype(np.float32)
        rows = whole.reshape(len(whole), -1)
        largest = np.abs(rows).max(axis=1) if self.kind == "int8" else np.abs(rows).max()
        scale = np.float32((127 if self.kind == "int8" else 1024) / np.where(largest == 0, 127, largest))
        expanded = scale.reshape(-1, *[1] * (whole.ndim - 1)) if self.kind == "int8" else scale
        self.stored[name], self.stored[f"{name}_scale"] = np.rint(whole * expanded).astype(self.kind), scale
        return self.stored[name].astype(np.float32) / expanded


def _ctranslate2_arrays(weights: dict[str, torch.Tensor], kind: str) -> _Arrays:
    arrays = _Arrays(weights, kind)
    for stack in ("encoder", "decoder"):
        arrays.stored[f"{stack}/num_heads"] = np.int16(SIZES[f"{stack}_attention_heads"])
        arrays.put(f"{stack}/layer_norm", f"{stack}.layer_norm")
        arrays.put_positions(stack)
        for index in range(SIZES[f"{stack}_layers"]):
            old, new = f"{stack}/layer_{index}", f"{stack}.layers.{index}"
            arrays.put(f"{old}/self_attention/linear_0", *(f"{new}.self_attn.{one}_proj" for one in "qkv"))
            arrays.put(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            arrays.put(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            arrays.put(f"{old}/ffn/linear_0", f"{new}.fc1")
            arrays.put(f"{old}/ffn/linear_1", f"{new}.fc2")
            arrays.put(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            if stack == "decoder":
                arrays.put(f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                arrays.put(f"{old}/attention/linear_1", f"{new}.encoder_attn.k_proj", f"{new}.encoder_attn.v_proj")
                arrays.put(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
                arrays.put(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
    arrays.put("encoder/conv1", "encoder.conv1")
    arrays.put("encoder/conv2", "encoder.conv2")
    arrays.put("decoder/embeddings", "decoder.embed_tokens")
    return arrays


@pytest.fixture
def ctranslate2_folder(
    tmp_path: Path, weights: dict[str, torch.Tensor], special_tokens: list[str]
) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a model of CTranslate2; gives the folder and the weights it stands for."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    def write(kind: str = "float32", version: int = 6, specification: str = "WhisperSpec",
              old_vocabulary: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:  # fmt: skip
        folder = tmp_path / f"ct2-{kind}"
        folder.mkdir()
        arrays = _ctranslate2_arrays(weights, kind)
        with open(folder / "model.bin", "wb") as file:
            file.write(struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(arrays.stored)))
            for name, array in arrays.stored.items():
                shape, data = np.shape(array), np.asarray(array).tobytes()
                file.write(text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
                file.write(struct.pack("<BI", _TYPE_IDS[np.asarray(array).dtype.name], len(data)) + data)
            file.write(struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight"))
        spelled = [
            "".join(chr(256 + _HIDDEN.index(byte)) if byte in _HIDDEN else chr(byte) for byte in token)
            for token in TOKENS
        ]
        if old_vocabulary:
            lines = "".join(f"{token}\n" for token in (*spelled, *special_tokens))
            (folder / "vocabulary.txt").write_text(lines, encoding="utf-8")
        else:
            (folder / "vocabulary.json").write_text(json.dumps([*spelled, *special_tokens]), encoding="utf-8")
        settings = {"alignment_heads": [[1, 0], [2, 1]], "suppress_ids": [1, 2, END + 1],
                    "suppress_ids_begin": [32, END], "lang_ids": [END + 2, END + 3, END + 4]}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        return folder, arrays.meant

    return write
