"""Every format to a folder that loads, with the very numbers that the file holds."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm import WhisperForConditionalGeneration, WhisperProcessor
from audiomm.base.errors import ConfigError, UnsafeCheckpointError
from audiomm.base.hub import Source
from audiomm.base.weights import find_checkpoint
from audiomm.convert import convert

Weights = dict[str, torch.Tensor]


def check(
    folder: Path, expected: Weights, sizes: dict[str, Any], exact: bool = True
) -> WhisperForConditionalGeneration:
    """The folder loads, and holds `expected` and the sizes of the tiny model."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype="float32")
    found = model.state_dict()
    for name, tensor in expected.items():
        if exact:
            assert torch.equal(found[name], tensor.float()), name
        else:
            torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-7, msg=name)
    assert set(found) == {*expected, "proj_out.weight"}
    assert torch.equal(found["proj_out.weight"], found["model.decoder.embed_tokens.weight"])
    for name, value in sizes.items():
        assert getattr(model.config, name) == value, name
    return model


def check_text(folder: Path, tokens: list[bytes], special_tokens: list[str]) -> None:
    """The processor of the folder reads and writes with the vocabulary of the file."""
    tokenizer = WhisperProcessor.from_pretrained(folder).tokenizer
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in special_tokens] == list(
        range(len(tokens), len(tokens) + len(special_tokens))
    )
    ids = tokenizer.encode("hello the", add_special_tokens=False)
    assert ids == [tokens.index(piece) for piece in (b"he", b"ll", b"o", b" the")]
    assert tokenizer.decode(ids) == "hello the"
    assert tokenizer.decode(tokenizer.encode("Grüße 你好 🎤", add_special_tokens=False)) == "Grüße 你好 🎤"
    assert tokenizer.language_id("zh") == len(tokens) + 3


def generation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return content


# ---------------------------------------------------------------------- openai-whisper


def test_a_pt_file_of_openai_whisper(
    openai_file: Callable[..., Path], tiktoken_file: Path, tmp_path: Path, weights: Weights, sizes: dict[str, Any],
    tokens: list[bytes], special_tokens: list[str],
) -> None:  # fmt: skip
    folder = convert(openai_file(), tmp_path / "out", tokenizer=tiktoken_file)
    check(folder, weights, sizes)
    check_text(folder, tokens, special_tokens)
    config = generation(folder)
    end = len(tokens)
    assert config["lang_to_id"] == {"<|en|>": end + 2, "<|zh|>": end + 3, "<|de|>": end + 4}
    assert config["task_to_id"] == {"translate": end + 5, "transcribe": end + 6}
    assert config["no_timestamps_token_id"] == end + 10
    assert config["prev_sot_token_id"] == end + 8
    assert config["begin_suppress_tokens"] == [tokens.index(b" "), end]
    assert {tokens.index(b"#"), tokens.index(b"-")} & set(config["suppress_tokens"]) == {tokens.index(b"#")}
    assert {end + 1, end + 5, end + 6, end + 7, end + 8, end + 9} <= set(config["suppress_tokens"])
    assert "forced_decoder_ids" not in config
    assert "alignment_heads" not in config


def test_a_half_precision_file_stays_half_precision_and_another_type_can_be_asked_for(
    openai_file: Callable[..., Path], tiktoken_file: Path, tmp_path: Path, weights: Weights, sizes: dict[str, Any]
) -> None:
    path = openai_file(dtype=torch.float16)
    folder = convert(path, tmp_path / "half", tokenizer=tiktoken_file)
    assert set(find_checkpoint(Source(folder)).dtypes.values()) == {"F16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    check(folder, {name: tensor.half() for name, tensor in weights.items()}, sizes)
    wide = convert(path, tmp_path / "wide", tokenizer=tiktoken_file, dtype=torch.bfloat16)
    assert set(find_checkpoint(Source(wide)).dtypes.values()) == {"BF16"}


def test_the_converted_model_gives_the_logits_of_the_original(
    openai_file: Callable[..., Path], tiktoken_file: Path, tmp_path: Path, model: Any
) -> None:
    folder = convert(openai_file(), tmp_path / "out", tokenizer=tiktoken_file)
    again = WhisperForConditionalGeneration.from_pretrained(folder)
    inputs = {"input_features": torch.randn(1, 8, 100), "decoder_input_ids": torch.tensor([[263, 5, 7, 1500]])}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


# ---------------------------------------------------------------------- whisper.cpp


@pytest.mark.parametrize("kind", ["f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_a_ggml_file_of_whisper_cpp(
    kind: str, ggml_file: Callable[..., tuple[Path, Weights]], tmp_path: Path, sizes: dict[str, Any],
    tokens: list[bytes], special_tokens: list[str],
) -> None:  # fmt: skip
    path, meant = ggml_file(kind)
    folder = convert(path, tmp_path / "out")
    check(folder, meant, sizes, exact=not kind.endswith("_1"))
    if kind == "f16":
        check_text(folder, tokens, special_tokens)


def test_numbers_that_half_precision_holds_make_a_half_precision_folder(
    make_model: Any, ggml_file: Callable[..., tuple[Path, Weights]], weights: Weights, tmp_path: Path
) -> None:
    for tensor in weights.values():
        tensor.copy_(tensor.half())
    path, _ = ggml_file("f16")
    folder = convert(path, tmp_path / "out")
    assert set(find_checkpoint(Source(folder)).dtypes.values()) == {"F16"}


def test_the_text_length_of_a_fine_tuned_ggml_file_is_not_taken_for_its_positions(
    ggml_file: Callable[..., tuple[Path, Weights]], tmp_path: Path, sizes: dict[str, Any]
) -> None:
    path, meant = ggml_file("f32", text_ctx=25)
    check(convert(path, tmp_path / "out"), meant, sizes)


# ---------------------------------------------------------------------- CTranslate2


@pytest.mark.parametrize("kind", ["float32", "float16", "int16", "int8"])
def test_a_folder_of_ctranslate2(
    kind: str, ctranslate2_folder: Callable[..., tuple[Path, Weights]], tmp_path: Path, sizes: dict[str, Any],
    tokens: list[bytes], special_tokens: list[str],
) -> None:  # fmt: skip
    source, meant = ctranslate2_folder(kind)
    folder = convert(source, tmp_path / "out")
    check(folder, meant, sizes)
    config = generation(folder)
    assert config["alignment_heads"] == [[1, 0], [2, 1]]
    assert config["suppress_tokens"] == [1, 2, len(tokens) + 1]
    assert config["begin_suppress_tokens"] == [32, len(tokens)]
    if kind == "int8":
        check_text(folder, tokens, special_tokens)


def test_the_older_vocabulary_of_ctranslate2_is_read_too(
    ctranslate2_folder: Callable[..., tuple[Path, Weights]], tmp_path: Path, tokens: list[bytes],
    special_tokens: list[str],
) -> None:  # fmt: skip
    source, _ = ctranslate2_folder("float32", old_vocabulary=True)
    check_text(convert(source, tmp_path / "out"), tokens, special_tokens)


# ---------------------------------------------------------------------- folders in the hub's layout


@pytest.fixture
def hub_folder(tmp_path: Path, model: Any, ggml_file: Callable[..., tuple[Path, Weights]]) -> Callable[..., Path]:
    """A folder with config and tokenizer and no weights."""

    def make(**settings: Any) -> Path:
        folder = convert(ggml_file("f32")[0], tmp_path / "hub")
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        return folder

    return make


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_pytorch_model_bin(
    shards: int, prefix: str, hub_folder: Callable[..., Path], weights: Weights, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = hub_folder()
    state = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if prefix:
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    names = sorted(state)
    files = {name: f"pytorch_model-{place % shards + 1:05d}-of-{shards:05d}.bin" for place, name in enumerate(names)}
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        for file in set(files.values()):
            torch.save({name: state[name] for name in names if files[name] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check(convert(source, tmp_path / "out"), weights, sizes)


def test_a_pytorch_model_bin_of_the_old_form(
    hub_folder: Callable[..., Path], weights: Weights, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = hub_folder()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check(convert(source / "pytorch_model.bin", tmp_path / "out"), weights, sizes)


def _flax_tree(weights: Weights) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        array = tensor.numpy()
        if leaf == "weight" and "layer_norm" in name:
            leaf = "scale"
        elif leaf == "weight" and "embed" in name:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, array = "kernel", array.transpose(*reversed(range(array.ndim)))
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = np.ascontiguousarray(array)
    return tree


def _flax_bytes(tree: Any, pieces: bool) -> bytes:
    msgpack = pytest.importorskip("msgpack", reason="reading Flax files needs the extra audiomm[convert]")

    def array(value: Any) -> Any:
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True))

    def pack(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pack(item) for key, item in value.items()}
        if pieces and value.size > 1000:
            flat = np.array_split(value.reshape(-1), 3)
            return {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(value.shape)},
                    "chunks": {str(i): array(part) for i, part in enumerate(flat)}}  # fmt: skip
        return array(value)

    return bytes(msgpack.packb(pack(tree)))


@pytest.mark.parametrize("pieces", [False, True])
def test_a_flax_model(
    pieces: bool, hub_folder: Callable[..., Path], weights: Weights, sizes: dict[str, Any], tmp_path: Path
) -> None:
    content = _flax_bytes(_flax_tree(weights), pieces)
    source = hub_folder()
    (source / "flax_model.msgpack").write_bytes(content)
    check(convert(source, tmp_path / "out"), weights, sizes)


def _write_h5(path: Path, weights: Weights) -> Any:
    h5py = pytest.importorskip("h5py", reason="reading TensorFlow files needs the extra audiomm[convert]")
    with h5py.File(path, "w") as file:
        group = file.create_group("model")
        for name, tensor in weights.items():
            array, where = tensor.numpy(), name.replace("layers.", "layers@").split(".")
            *parents, leaf = [part.replace("@", ".") for part in where]
            if "layer_norm" in name:
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            elif leaf == "weight" and "encoder.embed_positions" in name:
                leaf = "embeddings"
            elif leaf == "weight" and "embed" not in name:
                leaf, array = "kernel", array.transpose(*reversed(range(array.ndim)))
            group["/".join(("tf_whisper_for_conditional_generation", *parents, f"{leaf}:0"))] = array
        file.create_group("top_level_model_weights")
    return h5py


def test_a_tensorflow_model(
    hub_folder: Callable[..., Path], weights: Weights, sizes: dict[str, Any], tmp_path: Path
) -> None:
    source = hub_folder()
    _write_h5(source / "tf_model.h5", weights)
    check(convert(source, tmp_path / "out"), weights, sizes)


def test_an_h5_file_that_points_elsewhere_is_refused(
    hub_folder: Callable[..., Path], weights: Weights, tmp_path: Path
) -> None:
    source = hub_folder()
    path = source / "tf_model.h5"
    h5py = _write_h5(path, weights)
    with h5py.File(path, "a") as file:
        file["model/secret"] = h5py.ExternalLink("/somewhere/else.h5", "/data")
    with pytest.raises(UnsafeCheckpointError, match="is a link"):
        convert(source, tmp_path / "out")
    with h5py.File(path, "a") as file:
        del file["model/secret"]
        file.create_dataset("model/encoder/kernel:0", (4,), "f4", external=[("other.bin", 0, 16)])
    with pytest.raises(UnsafeCheckpointError, match="in other files"):
        convert(source, tmp_path / "out")


def _with_weights(source: Path, model: Any) -> Path:
    model.save_pretrained(source / "weights")
    (source / "weights" / "model.safetensors").rename(source / "model.safetensors")
    return source


def test_older_settings_of_a_folder_are_brought_up_to_date(
    model: Any, hub_folder: Callable[..., Path], tmp_path: Path, tokens: list[bytes]
) -> None:
    german, translate, end = len(tokens) + 4, len(tokens) + 5, len(tokens)
    source = hub_folder(
        forced_decoder_ids=[[1, german], [2, translate]], suppress_tokens=[5, 6], max_length=225,
        begin_suppress_tokens=[1, 2],
    )  # fmt: skip
    (source / "generation_config.json").unlink()
    folder = convert(_with_weights(source, model), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert not {"forced_decoder_ids", "max_length"} & config.keys()
    assert config["suppress_tokens"] is None
    settled = generation(folder)
    assert "forced_decoder_ids" not in settled
    assert (settled["language"], settled["task"]) == ("<|de|>", "translate")
    assert settled["suppress_tokens"] == [5, 6]
    assert settled["begin_suppress_tokens"] == [1, 2]
    assert settled["max_length"] == 40
    again = WhisperForConditionalGeneration.from_pretrained(folder)
    ids = again.generate(torch.zeros(1, 8, 100), force_unique_generate_call=True, max_new_tokens=1)
    assert ids[0].tolist()[:4] == [end + 1, german, translate, end + 10]


def test_forced_tokens_that_are_no_language_are_kept_and_nonsense_is_refused(
    model: Any, hub_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = _with_weights(hub_folder(forced_decoder_ids=[[1, 7]]), model)
    assert generation(convert(source, tmp_path / "out"))["forced_decoder_ids"] == [[1, 7]]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "forced_decoder_ids": [7]}))
    with pytest.raises(ConfigError, match=r"forced_decoder_ids=.7.: .place, token. pairs are needed"):
        convert(source, tmp_path / "other")


def test_a_classifier_is_converted_without_a_tokenizer(tmp_path: Path, sizes: dict[str, Any]) -> None:
    from audiomm import WhisperConfig, WhisperForAudioClassification

    classifier = WhisperForAudioClassification(WhisperConfig(**sizes, num_labels=3))
    source = tmp_path / "classifier"
    classifier.save_pretrained(source)
    (source / "model.safetensors").unlink()
    torch.save(classifier.state_dict(), source / "pytorch_model.bin")
    folder = convert(source, tmp_path / "out")
    again = WhisperForAudioClassification.from_pretrained(folder)
    assert again.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip


def test_a_head_of_its_own_is_kept(
    make_model: Any, ctranslate2_folder: Callable[..., tuple[Path, Weights]], tmp_path: Path
) -> None:
    """CTranslate2 stores the head apart when it is not the table of token embeddings."""
    source, meant = ctranslate2_folder("float32")
    content = (source / "model.bin").read_bytes()
    alias = b"decoder/projection/weight\0"
    place = content.index(alias) - 2 - 4
    head = np.random.default_rng(1).normal(size=meant["model.decoder.embed_tokens.weight"].shape).astype("<f4")
    count_at = 4 + 2 + len("WhisperSpec\0") + 4
    count = struct.unpack_from("<I", content, count_at)[0]
    entry = (
        struct.pack("<H", len(alias)) + alias + struct.pack("<B2IBI", 2, *head.shape, 0, head.nbytes) + head.tobytes()
    )
    changed = content[:count_at] + struct.pack("<I", count + 1) + content[count_at + 4 : place] + entry + bytes(4)
    (source / "model.bin").write_bytes(changed)
    folder = convert(source, tmp_path / "out")
    again = WhisperForConditionalGeneration.from_pretrained(folder)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.proj_out.weight, torch.from_numpy(head))
