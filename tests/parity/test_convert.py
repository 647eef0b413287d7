"""Checkpoints that other programs wrote themselves, converted: their numbers, their tokens, their alignment heads."""

from __future__ import annotations

import base64
import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer
from audiomm.convert import convert
from audiomm.models.whisper.published import alignment_heads, special_ids

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 51865, "num_mel_bins": 8, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 256, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 256,
    "max_source_positions": 50, "max_target_positions": 40,
}  # fmt: skip
TEXTS = [
    "hello world, it's 2026!",
    " Grüße an 你好 🎤 12,345.67",
    "  two  spaces\n\nand lines\t",
    "♪♪ [music] «ça va?»",
]


@pytest.fixture(scope="module")
def openai() -> Any:
    return pytest.importorskip("whisper", reason="openai-whisper is not installed")


@pytest.fixture(scope="module")
def assets(openai: Any) -> Path:
    return Path(openai.__file__).parent / "assets"


@pytest.fixture(scope="module")
def original(openai: Any) -> Any:
    """A tiny random model of openai-whisper."""
    torch.manual_seed(3)
    dims = openai.model.ModelDimensions(8, 50, 64, 2, 2, 51865, 40, 64, 2, 2)
    model = openai.model.Whisper(dims).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3))
    return model


@pytest.fixture(scope="module")
def folder(original: Any, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, saved the way openai-whisper's files are, and converted."""
    place = tmp_path_factory.mktemp("openai")
    torch.save({"dims": original.dims.__dict__, "model_state_dict": original.state_dict()}, place / "custom.pt")
    return convert(place / "custom.pt", place / "out", tokenizer=assets / "multilingual.tiktoken")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return {
        "input_features": torch.randn(2, 8, 100),
        "decoder_input_ids": torch.tensor([[50258, 50259, 50359, 5, 900], [50258, 50261, 50359, 77, 50000]]),
    }


def test_logits_of_an_openai_model_are_the_same_here_and_in_transformers(
    original: Any, folder: Path, inputs: dict[str, torch.Tensor], reference: Any
) -> None:
    with torch.no_grad():
        wanted = original(inputs["input_features"], inputs["decoder_input_ids"])
        for package in (WhisperForConditionalGeneration, reference.WhisperForConditionalGeneration):
            found = package.from_pretrained(folder).eval()(**inputs).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_tokenizer_of_the_converted_folder_is_the_one_openai_has(openai: Any, folder: Path, reference: Any) -> None:
    theirs = openai.tokenizer.get_tokenizer(True, num_languages=99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packages = [WhisperTokenizer.from_pretrained(folder), reference.WhisperTokenizer.from_pretrained(folder)]
    for tokenizer in packages:
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == theirs.encoding.encode(text)
            assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_ids("<|30.00|>") == 51864
        assert tokenizer("a")["input_ids"][0] == theirs.sot
    generation = json.loads((folder / "generation_config.json").read_text())
    special = {theirs.sot, theirs.translate, theirs.transcribe, theirs.sot_lm, theirs.sot_prev, theirs.no_speech}
    assert generation["suppress_tokens"] == sorted({*theirs.non_speech_tokens, *special})
    assert generation["begin_suppress_tokens"] == [220, theirs.eot]
    assert generation["lang_to_id"] == {
        f"<|{code}|>": token for code, token in zip(theirs.all_language_codes, theirs.all_language_tokens, strict=True)
    }


def test_english_tokens_are_those_of_openai(openai: Any, assets: Path, tmp_path: Path) -> None:
    theirs = openai.tokenizer.get_tokenizer(False)
    dims = openai.model.ModelDimensions(8, 50, 64, 2, 1, 51864, 40, 64, 2, 1)
    model = openai.model.Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)
    torch.save({"dims": dims.__dict__, "model_state_dict": model.state_dict()}, tmp_path / "x.en.pt")
    folder = convert(tmp_path / "x.en.pt", tmp_path / "out", tokenizer=assets / "gpt2.tiktoken")
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    assert tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] == theirs.encoding.encode(TEXTS[0])
    generation = json.loads((folder / "generation_config.json").read_text())
    special = {theirs.sot, theirs.translate, theirs.transcribe, theirs.sot_lm, theirs.sot_prev, theirs.no_speech}
    assert generation["suppress_tokens"] == sorted({*theirs.non_speech_tokens, *special})
    assert generation["is_multilingual"] is False
    assert "lang_to_id" not in generation
    assert tokenizer.prefix_tokens == [theirs.sot, theirs.no_timestamps]


@pytest.mark.parametrize(("size", "languages"), [(51864, 99), (51865, 99), (51866, 100)])
def test_special_tokens_have_the_numbers_openai_gives_them(openai: Any, size: int, languages: int) -> None:
    theirs = openai.tokenizer.get_tokenizer(size > 51864, num_languages=languages)
    assert special_ids(size) == theirs.encoding._special_tokens


def test_alignment_heads_are_those_openai_lists(openai: Any) -> None:
    layers = {"tiny": (4, 4, 384), "base": (6, 6, 512), "small": (12, 12, 768), "medium": (24, 24, 1024),
              "large": (32, 32, 1280), "turbo": (32, 4, 1280)}  # fmt: skip
    checked = 0
    for name, packed in openai._ALIGNMENT_HEADS.items():
        family = "turbo" if "turbo" in name else name.split(".")[0].split("-")[0]
        encoder, decoder, width = layers[family]
        version3 = family == "turbo" or name in ("large", "large-v3")
        vocabulary = 51864 if name.endswith(".en") else 51866 if version3 else 51865
        config = WhisperConfig(
            vocab_size=vocabulary, d_model=width, encoder_layers=encoder, decoder_layers=decoder,
            encoder_attention_heads=width // 64, decoder_attention_heads=width // 64,
        )  # fmt: skip
        flags = np.frombuffer(gzip.decompress(base64.b85decode(packed)), dtype=bool).reshape(decoder, width // 64)
        assert alignment_heads(config, f"{name}.pt") == np.argwhere(flags).tolist(), name
        checked += 1
    assert checked >= 12


@pytest.mark.parametrize("quantization", [None, "bfloat16", "int8", "int16"])
def test_folders_that_ctranslate2_wrote(
    quantization: str | None, folder: Path, tmp_path: Path, inputs: dict[str, torch.Tensor], reference: Any
) -> None:
    converters = pytest.importorskip("ctranslate2.converters", reason="ctranslate2 is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"), quantization=quantization)
        model = reference.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    again = WhisperForConditionalGeneration.from_pretrained(
        convert(tmp_path / "ct2", tmp_path / "out"), dtype="float32"
    )
    # Rounding to the type: exact, then 8, 8 and 10 bits of the largest number of a row or matrix.
    error = {None: 0.0, "bfloat16": 1 / 256, "int8": 1 / 254, "int16": 1 / 1024}
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert (state[name] - tensor).abs().max() <= error[quantization] * tensor.abs().max(), name
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    wanted = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert tokens == wanted
    if quantization is None:
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_transformers_reads_every_part_of_a_converted_pickle(
    folder: Path, tmp_path: Path, inputs: dict[str, torch.Tensor], reference: Any
) -> None:
    model = reference.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    source = tmp_path / "source"
    source.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    result = convert(source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = reference.WhisperProcessor.from_pretrained(result)
        again = reference.WhisperForConditionalGeneration.from_pretrained(result).eval()
    assert processor.feature_extractor.feature_size == 8
    assert processor.tokenizer.convert_tokens_to_ids("<|su|>") == 50357
    assert again.generation_config.lang_to_id["<|de|>"] == 50261
    assert again.generation_config.no_timestamps_token_id == 50363
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_transformers_misses_no_weight_and_finds_none_too_many(folder: Path, reference: Any) -> None:
    _, info = reference.WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
