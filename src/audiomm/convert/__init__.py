"""Checkpoints of other programs to a folder that `from_pretrained` here and in transformers loads.

`convert("tiny.pt", "whisper-tiny", tokenizer="multilingual.tiktoken")`. Nothing in a file is ever run: pickles are read
for their tensors only, and every other format is data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import CheckpointNotFoundError, InputError
from ..base.hub import Source

if TYPE_CHECKING:
    import torch

    from .foreign import Foreign

#: format -> what a source in it is.
FORMATS = {
    "openai": "a .pt file of openai-whisper",
    "ggml": "a ggml-*.bin file of whisper.cpp, quantised or not",
    "ctranslate2": "a folder or hub id with CTranslate2's model.bin, as faster-whisper has them",
    "torch": "a folder or hub id with pytorch_model.bin, in one file or several",
    "flax": "a folder or hub id with flax_model.msgpack",
    "tensorflow": "a folder or hub id with tf_model.h5",
    "safetensors": "a folder or hub id with model.safetensors: older settings are brought up to date",
}

#: File that shows a folder's format -> the format, in order of preference.
_SIGNS = {
    "model.safetensors": "safetensors",
    "model.safetensors.index.json": "safetensors",
    "pytorch_model.bin": "torch",
    "pytorch_model.bin.index.json": "torch",
    "flax_model.msgpack": "flax",
    "flax_model.msgpack.index.json": "flax",
    "tf_model.h5": "tensorflow",
    "tf_model.h5.index.json": "tensorflow",
    "model.bin": "ctranslate2",
}
_FILES = ("openai", "ggml")
_GGML_START, _ZIP_START, _PICKLE_START = b"lmgg", b"PK\x03\x04", b"\x80"
_LIKE_GGML = (b"GGUF", b"fmgg", b"tjgg")


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a Whisper checkpoint of another program as a folder with config.json, safetensors and tokenizer.

    Args:
        source: A file, a folder or a hub id; see FORMATS.
        output: The folder to write, which must not exist or be empty.
        format: One of FORMATS; "auto" looks at the file or folder.
        dtype: Of the weights written: "float32", "float16", "bfloat16", or "auto" for the narrowest type that holds
            every number of the source as it is (float32 for quantised ones).
        tokenizer: Folder, hub id or .tiktoken file with the tokenizer; needed where the source holds none (.pt).

    Returns:
        The folder.

    Raises:
        CheckpointError: Its subclasses say what is wrong with the files.
        InputError: The format is not known or cannot be told, or the tokenizer is missing or another model's.
        ConfigError: The configuration is not a Whisper's.
        SaveError: The folder is not empty, or cannot be written.
        MissingExtra: Flax and TensorFlow files need the extra audiomm[convert].
    """
    from .target import write_folder

    if format != "auto" and format not in FORMATS:
        raise InputError(f"format={format!r}: accepted are auto, {', '.join(FORMATS)}.")
    path = Path(source).expanduser()
    form = format if format != "auto" else _format_of(path, source)
    target = Path(output).expanduser()
    write_folder(_read(form, path, source), target, dtype, tokenizer)
    return target


def _read(form: str, path: Path, source: str | os.PathLike[str]) -> Foreign:
    if form in _FILES:
        if not path.is_file():
            raise CheckpointNotFoundError(f"{str(source)!r}: there is no such file; this format is {FORMATS[form]}.")
        from .ggml import read_ggml
        from .openai_whisper import read_openai

        return read_openai(path) if form == "openai" else read_ggml(path)
    folder = Source(path.parent if path.is_file() else source)
    if form == "ctranslate2":
        from .ctranslate2 import read_ctranslate2

        return read_ctranslate2(folder)
    from .hub_folder import read_hub_folder

    return read_hub_folder(folder, form)


def _format_of(path: Path, source: str | os.PathLike[str]) -> str:
    """The format of a file by its name and first bytes, of a folder or repository by its files."""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4)
        if start == _GGML_START or start in _LIKE_GGML:
            return "ggml"
        if path.name in _SIGNS:
            return _SIGNS[path.name]
        if start == _ZIP_START or start[:1] == _PICKLE_START:
            return "openai"
        raise InputError(
            f"{path} begins with {start!r}, which is no format known here. Say which it is with format= (--format): "
            f"{', '.join(FORMATS)}."
        )
    if path.suffix in (".pt", ".bin") and not path.is_dir():
        raise CheckpointNotFoundError(f"{str(source)!r}: there is no such file.")
    folder = Source(source)
    found = next((form for filename, form in _SIGNS.items() if folder.find(filename) is not None), None)
    if found is None:
        raise CheckpointNotFoundError(
            f"{str(source)!r} holds none of {', '.join(_SIGNS)}: there is nothing to convert."
        )
    return found
