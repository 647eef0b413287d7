"""What is broken, foreign or dangerous is refused by name, and no folder is left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomm.base.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    InputError,
    MissingExtra,
    MissingShardError,
    SaveError,
    UnsafeCheckpointError,
)
from audiomm.convert import convert
from audiomm.convert.vocabulary import build_tokenizer, merges_of, read_tiktoken

Weights = dict[str, torch.Tensor]


@pytest.fixture
def out(tmp_path: Path) -> Any:
    """The output folder; whatever the test does, nothing may be left of it."""
    place = tmp_path / "results" / "out"
    place.parent.mkdir()
    yield place
    assert list(place.parent.iterdir()) == []


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


# ---------------------------------------------------------------------- pickles


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_runs_nothing(is_zip: bool, tmp_path: Path, out: Path) -> None:
    marker = tmp_path / "ran"
    content = {"dims": {"n_mels": 80}, "model_state_dict": {"a": Payload(marker)}}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafeCheckpointError, match=r"calls \w+\.system.*it was not read"):
        convert(tmp_path / "evil.pt", out)
    assert not marker.exists()
    # The payload is a real one: careless reading makes the file.
    assert pickle.loads(pickle.dumps(Payload(marker))) == 0
    assert marker.exists()


def test_a_plain_pickle_that_would_run_code_runs_nothing(tmp_path: Path, out: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(CheckpointError):
        convert(tmp_path / "evil.pt", out)
    assert not marker.exists()


def test_a_pytorch_model_bin_that_would_run_code_runs_nothing(tmp_path: Path, out: Path, sizes: dict[str, Any]) -> None:
    marker, source = tmp_path / "ran", tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**sizes, "model_type": "whisper"}))
    torch.save({"model.a": Payload(marker)}, source / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="pytorch_model.bin"):
        convert(source, out)
    assert not marker.exists()


def test_a_pt_file_cut_short_is_corrupt(openai_file: Callable[..., Path], out: Path) -> None:
    path = openai_file()
    content = path.read_bytes()
    for length in (len(content) - 100, len(content) // 2, 30):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match=rf"tiny.pt \({length:,} bytes\) is not a whole file"):
            convert(path, out)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": torch.zeros(2)}, "it holds .'weights'."),
        ([1, 2], "it holds list"),
        ({"dims": {}, "model_state_dict": {}}, "not empty"),
        ({"dims": {}, "model_state_dict": {"a": 3}}, "'a' in model_state_dict is not a tensor"),
        ({"dims": {"n_mels": "80"}, "model_state_dict": {"a": torch.zeros(1)}}, "n_mels is '80'"),
    ],
)
def test_a_pt_file_of_another_form_is_named(content: Any, words: str, tmp_path: Path, out: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CorruptCheckpointError, match=words):
        convert(tmp_path / "x.pt", out)


def test_weights_that_do_not_make_the_model_are_listed(
    openai_file: Callable[..., Path], tiktoken_file: Path, weights: Weights, out: Path
) -> None:
    del weights["model.decoder.layers.2.fc1.weight"]
    weights["model.decoder.layers.0.fc2.bias"] = torch.zeros(3)
    weights["model.encoder.conv3.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointMismatchError) as caught:
        convert(openai_file(), out, tokenizer=tiktoken_file)
    text = str(caught.value)
    assert "1 are missing: model.decoder.layers.2.fc1.weight" in text
    assert "1 are not part of Whisper: model.encoder.conv3.weight" in text
    assert "model.decoder.layers.0.fc2.bias is [3], needed [32]" in text


def test_numbers_that_are_none_are_refused(
    openai_file: Callable[..., Path], tiktoken_file: Path, weights: Weights, out: Path
) -> None:
    weights["model.encoder.conv1.weight"][0, 0, 0] = float("nan")
    with pytest.raises(CorruptCheckpointError, match=r"1 of 768 numbers of model.encoder.conv1.weight are NaN"):
        convert(openai_file(), out, tokenizer=tiktoken_file)
    weights["model.encoder.conv1.weight"][0, 0, 0] = 1e6
    with pytest.raises(CorruptCheckpointError, match="1e.06, which torch.float16 cannot hold"):
        convert(openai_file(), out, tokenizer=tiktoken_file, dtype="float16")


# ---------------------------------------------------------------------- ggml


def test_a_ggml_file_cut_short_anywhere_says_where(ggml_file: Callable[..., tuple[Path, Weights]], out: Path) -> None:
    path, _ = ggml_file("q5_0")
    content = path.read_bytes()
    for length in (0, 3, 20, 60, 5_000, 7_000, 10_000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match="more bytes are needed|is empty|magic|format known"):
            convert(path, out, format="ggml")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, 0x46554747, "gguf"),
        (0, 0x67676A74, "ggjt"),
        (48, 9, "9 mel filters for a model of n_mels=8"),
        (48, -1, "says -1 for the number of mel filters"),
        (56 + 4 * 8 * 201, 2**31 - 1, "says 2,147,483,647 for the number of tokens"),
    ],
)
def test_a_ggml_header_that_lies_is_caught(
    place: int, value: int, words: str, ggml_file: Callable[..., tuple[Path, Weights]], out: Path
) -> None:
    path, _ = ggml_file("f16")
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, place, value)
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=words):
        convert(path, out)


def test_an_unknown_type_an_old_one_and_a_doubled_tensor_are_refused(
    ggml_file: Callable[..., tuple[Path, Weights]], out: Path
) -> None:
    path, _ = ggml_file("q4_0", file_type=1002)
    with pytest.raises(CorruptCheckpointError, match="q4_0 numbers are of version 1; read is version 2"):
        convert(path, out)
    path, _ = ggml_file("f16")
    content = path.read_bytes()
    name = b"encoder.conv1.weight"
    start = content.index(name) - 4 * 6
    changed = bytearray(content)
    struct.pack_into("<i", changed, start + 8, 14)
    path.write_bytes(changed)
    with pytest.raises(
        CorruptCheckpointError, match="conv1.weight' .byte [0-9,]+. is of type 14; read are f32, f16, q4_0"
    ):
        convert(path, out)
    length = 4 * 6 + len(name) + 2 * 32 * 8 * 3
    path.write_bytes(content + content[start : start + length])
    with pytest.raises(CorruptCheckpointError, match="'encoder.conv1.weight' is there twice"):
        convert(path, out)
    path.write_bytes(content[:start] + content[start + length :])
    with pytest.raises(CheckpointMismatchError, match="1 are missing: model.encoder.conv1.weight"):
        convert(path, out)


def test_axes_that_multiply_beyond_all_files_are_caught(
    ggml_file: Callable[..., tuple[Path, Weights]], out: Path
) -> None:
    path, _ = ggml_file("f16")
    content = bytearray(path.read_bytes())
    place = content.index(b"encoder.conv1.weight") - 4 * 3
    struct.pack_into("<3i", content, place, 99_999_999, 99_999_999, 99_999_999)
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"ends at byte [0-9,]+, in encoder.conv1.weight: [0-9,]{30}"):
        convert(path, out)


def test_a_ggml_file_without_a_whole_vocabulary_is_refused(
    ggml_file: Callable[..., tuple[Path, Weights]], tokens: list[bytes], out: Path
) -> None:
    for changed, words in (
        (tokens[:-200], "leave out"),
        ([*tokens[:-1], b"a"], "only 261 of its 262 tokens are distinct"),
        ([*tokens, *(b"%d" % number for number in range(100, 200))], "362 tokens of text do not fit a model of 1,774"),
    ):
        path, _ = ggml_file("f16", tokens=changed)
        with pytest.raises((CorruptCheckpointError, InputError), match=words):
            convert(path, out)


# ---------------------------------------------------------------------- CTranslate2


def test_a_ctranslate2_model_of_another_kind_or_version_is_refused(
    ctranslate2_folder: Callable[..., tuple[Path, Weights]], out: Path
) -> None:
    source, _ = ctranslate2_folder("float16", specification="TransformerSpec")
    with pytest.raises(CorruptCheckpointError, match="of kind 'TransformerSpec'; only 'WhisperSpec' is read"):
        convert(source, out)
    source, _ = ctranslate2_folder("float32", version=3)
    with pytest.raises(CorruptCheckpointError, match="binary version 3; read are 4 to 6"):
        convert(source, out)


def test_a_broken_ctranslate2_folder_says_what_is_broken(
    ctranslate2_folder: Callable[..., tuple[Path, Weights]], out: Path
) -> None:
    source, _ = ctranslate2_folder("int8")
    model, vocabulary = source / "model.bin", source / "vocabulary.json"
    content, listed = model.read_bytes(), vocabulary.read_text()
    for length in (0, 2, 10, 100, len(content) // 2, len(content) - 1):
        model.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError, match="more bytes are needed|is empty"):
            convert(source, out)
    name = b"encoder/conv1/weight_scale"
    model.write_bytes(content.replace(name, b"encoder/conv1/weight_scule"))
    with pytest.raises(CorruptCheckpointError, match="encoder/conv1/weight holds whole numbers and no scale"):
        convert(source, out)
    model.write_bytes(content.replace(b"encoder/num_heads", b"encoder/num_hoods"))
    with pytest.raises(CorruptCheckpointError, match="encoder/num_heads is missing"):
        convert(source, out)
    at = content.index(b"decoder/embeddings/weight\0") + len(b"decoder/embeddings/weight\0")
    changed = bytearray(content)
    struct.pack_into("<I", changed, at + 1, 5)
    model.write_bytes(changed)
    with pytest.raises(CorruptCheckpointError, match=r"decoder/embeddings/weight of shape .5, 32. has 56,768 bytes"):
        convert(source, out)
    model.write_bytes(content.replace(b"decoder/embeddings/weight\0", b"decoder/embodding/weight2\0", 1))
    with pytest.raises(CorruptCheckpointError, match="stands for 'decoder/embeddings/weight', which is not there"):
        convert(source, out)
    model.write_bytes(content)
    for text, words in (
        ("[1", "is not readable"),
        ('["a", "b"]', "is not a list of tokens with <.endoftext.> in it"),
        (json.dumps(["a b", *json.loads(listed)]), "token 0, 'a b', is not in byte-level spelling"),
    ):
        vocabulary.write_text(text)
        with pytest.raises(ConfigError, match=words):
            convert(source, out)
    vocabulary.unlink()
    with pytest.raises(InputError, match="holds no vocabulary: pass tokenizer="):
        convert(source, out)
    model.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"model\.bin"):
        convert(source, out, format="ctranslate2")


# ---------------------------------------------------------------------- folders in the hub's layout


@pytest.fixture
def source(tmp_path: Path, sizes: dict[str, Any]) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**sizes, "model_type": "whisper"}))
    return folder


def test_broken_flax_files_are_corrupt(source: Path, out: Path) -> None:
    msgpack = pytest.importorskip("msgpack", reason="reading Flax files needs the extra audiomm[convert]")
    array = msgpack.packb(((2, 2), "float32", bytes(12)))
    wrong = {
        "is not a whole msgpack file": b"\xdf\xff\xff",
        "holds a int, not a tree": msgpack.packb(7),
        "is a str, not an array": msgpack.packb({"model": {"a": "text"}}),
        "has 3 numbers": msgpack.packb({"model": {"kernel": msgpack.ExtType(1, array)}}),
        "of the extension type 9": msgpack.packb({"model": {"kernel": msgpack.ExtType(9, b"")}}),
        "is of type 'object'": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"")))}),
        "do not fit together": msgpack.packb({"kernel": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}}),
        "ends in none of kernel": msgpack.packb(
            {"model": {"a": msgpack.ExtType(1, msgpack.packb(((1,), "float32", bytes(4))))}}
        ),
    }
    for words, content in wrong.items():
        (source / "flax_model.msgpack").write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=words):
            convert(source, out)


def test_broken_h5_files_are_corrupt(source: Path, out: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="reading TensorFlow files needs the extra audiomm[convert]")
    path = source / "tf_model.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    with pytest.raises(CorruptCheckpointError, match=r"tf_model.h5 \(28 bytes\) is not a whole HDF5 file"):
        convert(source, out)
    with h5py.File(path, "w") as file:
        file["model/bert/kernel:0"] = [1.0, 2.0]
    with pytest.raises(CorruptCheckpointError, match="'model/bert/kernel:0' is no weight of transformers' TensorFlow"):
        convert(source, out)
    with h5py.File(path, "w") as file:
        ring = file.create_group("ring")
        ring["again"] = ring
    with pytest.raises(CorruptCheckpointError, match="not a whole HDF5 file: maximum recursion depth"):
        convert(source, out)


@pytest.mark.parametrize(("filename", "package"), [("flax_model.msgpack", "msgpack"), ("tf_model.h5", "h5py")])
def test_a_missing_extra_is_named(
    filename: str, package: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    (source / filename).write_bytes(b"x")
    with pytest.raises(MissingExtra, match=rf"{package}: pip install 'audiomm\[convert\]'"):
        convert(source, out)


def test_an_index_may_not_point_elsewhere_and_its_files_must_be_there(source: Path, out: Path) -> None:
    index = source / "pytorch_model.bin.index.json"
    for content, kind, words in (
        ({"weight_map": {"a": "../x.bin"}}, UnsafeCheckpointError, "names '../x.bin'"),
        ({"weight_map": {"a": "/etc/passwd"}}, UnsafeCheckpointError, "names '/etc/passwd'"),
        ({"weight_map": {}}, CorruptCheckpointError, "weight_map is missing or empty"),
        ({"weight_map": {"a": "1.bin", "b": "2.bin"}}, MissingShardError, "2 of 2 weight files .* 1.bin, 2.bin"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(kind, match=words):
            convert(source, out)
    index.unlink()
    with pytest.raises(CheckpointNotFoundError, match="nothing to convert"):
        convert(source, out)
    with pytest.raises(CheckpointNotFoundError, match="neither pytorch_model.bin nor an index"):
        convert(source, out, format="torch")


def test_a_pickle_of_something_else_and_a_config_of_another_model_are_named(source: Path, out: Path) -> None:
    torch.save([1, 2], source / "pytorch_model.bin")
    with pytest.raises(CorruptCheckpointError, match="holds a list, not tensors by name"):
        convert(source, out)
    (source / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ConfigError, match="of model type 'wav2vec2'; only 'whisper' is read"):
        convert(source, out)


# ---------------------------------------------------------------------- tokenizers, formats, outputs


def test_a_pt_file_needs_a_tokenizer_that_is_its_own(
    openai_file: Callable[..., Path], tiktoken_file: Path, tmp_path: Path, out: Path
) -> None:
    path = openai_file()
    with pytest.raises(InputError, match=r"tiny.pt holds no vocabulary: pass tokenizer= \(--tokenizer\)"):
        convert(path, out)
    with pytest.raises(InputError, match="has ids up to 2,202, but the model knows 1,774 tokens"):
        convert(path, out, tokenizer="audiomm/whisper-commands")
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        convert(path, out, tokenizer=tmp_path / "missing.tiktoken")
    for text, words in (("YQ== 0\nYg== 2\n", "its 2 ranks"), ("hello\n", "is not a tiktoken"), ("", "its 0 ranks")):
        tiktoken_file.write_text(text)
        with pytest.raises(CorruptCheckpointError, match=words):
            convert(path, out, tokenizer=tiktoken_file)


def test_the_tokenizer_of_another_vocabulary_is_refused(
    make_model: Callable[..., Any], openai_name: Callable[[str], str], dims: dict[str, int], tokens: list[bytes],
    tmp_path: Path, out: Path,
) -> None:  # fmt: skip
    model = make_model(vocab_size=51865)
    state = {openai_name(name): value for name, value in model.state_dict().items() if name != "proj_out.weight"}
    torch.save({"dims": {**dims, "n_vocab": 51865}, "model_state_dict": state}, tmp_path / "big.pt")
    build_tokenizer(tokens, 1774, "tiny").save_pretrained(tmp_path / "tokenizer")
    words = "has <.notimestamps.> at 272; in a model of 51,865 tokens it is 50,363: it belongs to another model"
    with pytest.raises(InputError, match=words):
        convert(tmp_path / "big.pt", out, tokenizer=tmp_path / "tokenizer")


def test_what_is_no_known_format_is_said_so(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(InputError, match="begins with b'hell', which is no format known here"):
        convert(path, out)
    with pytest.raises(InputError, match="format='onnx': accepted are auto, openai, ggml"):
        convert(path, out, format="onnx")
    with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
        convert(tmp_path / "missing.bin", out, format="ggml")
    with pytest.raises(CheckpointNotFoundError, match=r"missing.pt': there is no such file"):
        convert(tmp_path / "missing.pt", out)
    with pytest.raises(CheckpointNotFoundError):
        convert(tmp_path / "missing", out)


def test_a_folder_with_something_in_it_is_never_written_over(
    openai_file: Callable[..., Path], tiktoken_file: Path, tmp_path: Path
) -> None:
    path, folder = openai_file(), tmp_path / "mine"
    folder.mkdir()
    assert convert(path, folder, tokenizer=tiktoken_file) == folder
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(SaveError, match="exists and is not an empty folder"):
        convert(path, folder, tokenizer=tiktoken_file)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    with pytest.raises(SaveError, match="is not an empty folder"):
        convert(path, path, tokenizer=tiktoken_file)


def test_a_disk_that_fails_half_way_leaves_nothing(
    openai_file: Callable[..., Path], tiktoken_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from audiomm.convert import target

    def fail(path: Path, content: Any) -> None:
        assert (path.parent / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "write_json", fail)
    with pytest.raises(SaveError, match="No space left"):
        convert(openai_file(), out, tokenizer=tiktoken_file)


def test_a_type_of_weights_that_is_none_is_refused(
    openai_file: Callable[..., Path], tiktoken_file: Path, out: Path
) -> None:
    with pytest.raises(TypeError, match="dtype='int8': accepted are"):
        convert(openai_file(), out, tokenizer=tiktoken_file, dtype="int8")


def test_tokens_that_no_merge_makes_are_left_to_decoding(tokens: list[bytes], tiktoken_file: Path) -> None:
    assert read_tiktoken(tiktoken_file) == tokens
    assert merges_of(tokens) == [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("l", "l"), ("o", "Ġ")]
