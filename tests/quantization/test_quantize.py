"""from_pretrained(quantize=...): what is rounded and what is not, and what a rounded model refuses to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from audiomm import AutoModelForSpeechSeq2Seq, LoraConfig, WhisperForConditionalGeneration, pipeline
from audiomm.base import quantization
from audiomm.base.errors import ConfigError, MissingExtra, SaveError
from audiomm.layers.experts import Experts
from audiomm.layers.int8_experts import Int8Experts
from audiomm.layers.quantized import Int8Linear
from audiomm.training.lora import add_lora

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tiny_whisper_config, tmp_path) -> Path:
    WhisperForConditionalGeneration(tiny_whisper_config()).save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def load(folder: Path, **kwargs):
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder, **kwargs)


def difference(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.float() - wanted.float()).norm() / wanted.float().norm())


def test_every_linear_map_and_the_tied_head_are_in_eight_bits_and_the_rest_is_as_it_was(folder):
    plain, rounded = load(folder), load(folder, quantize="int8")
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in rounded.named_modules() if isinstance(module, Int8Linear)} == linears
    assert "proj_out" in linears
    kept = dict(rounded.named_parameters())
    table = "model.decoder.embed_tokens.weight"
    assert torch.equal(kept[table], dict(plain.named_parameters())[table])
    assert torch.equal(rounded.model.encoder.conv1.weight, plain.model.encoder.conv1.weight)
    assert not any(weight.requires_grad for weight in kept.values())
    assert not any(weight.is_meta for weight in (*kept.values(), *rounded.buffers()))
    assert (plain.quantization, rounded.quantization) == (None, "int8")


def test_logits_of_whisper_are_near_those_of_float32_and_rows_do_not_see_each_other(folder):
    plain, rounded = load(folder), load(folder, quantize="int8")
    features, ids = torch.randn(3, 8, 40), torch.randint(4, 100, (3, 6))
    with torch.no_grad():
        wanted = plain(features, decoder_input_ids=ids).logits
        made = rounded(features, decoder_input_ids=ids).logits
        alone = rounded(features[1:2], decoder_input_ids=ids[1:2]).logits
    assert 1e-5 < difference(made, wanted) < 0.1
    assert (made[1:2] - alone).abs().max() <= 1e-5 * max(1.0, float(made.abs().max()))


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_gemmas_load_in_eight_bits_with_towers_and_answer_nearly_alike(gemmas, gemma_folders, family):
    model_class = type(gemmas.FAMILIES[family][1](gemmas.FAMILIES[family][0]()))
    plain = model_class.from_pretrained(gemma_folders[family])
    rounded = model_class.from_pretrained(gemma_folders[family], quantize="int8")
    names = [name for name, module in rounded.named_modules() if isinstance(module, Int8Linear)]
    for part in ("lm_head", "language_model.layers.0.self_attn.q_proj", "audio_tower", "embed_audio"):
        assert any(part in name for name in names), part
    assert not any("router" in name for name in names)
    ids = torch.randint(5, 30, (2, 9))
    with torch.no_grad():
        wanted, made = plain(input_ids=ids).logits, rounded(input_ids=ids).logits
        alone = rounded(input_ids=ids[:1]).logits
    assert 1e-5 < difference(made, wanted) < 0.2
    assert (made[:1] - alone).abs().max() <= 1e-5 * max(1.0, float(made.abs().max()))
    assert rounded.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.fixture
def experts_folder(gemmas, tmp_path) -> Path:
    gemmas.gemma4_model(gemmas.processor_4(), "experts").save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def test_experts_are_in_eight_bits_too_and_answer_nearly_alike(gemmas, experts_folder, caplog):
    kind = type(gemmas.gemma4_model(gemmas.processor_4(), "experts"))
    plain = kind.from_pretrained(experts_folder)
    with caplog.at_level(logging.WARNING):
        rounded = kind.from_pretrained(experts_folder, quantize="int8")
    assert caplog.text == ""
    stacks = [module for module in rounded.modules() if isinstance(module, Int8Experts)]
    assert len(stacks) == sum(isinstance(module, Experts) for module in plain.modules()) > 0
    assert not any(isinstance(module, Experts) for module in rounded.modules())
    assert not any(weight.is_meta for weight in (*rounded.parameters(), *rounded.buffers()))
    ids = torch.randint(5, 30, (2, 9))
    with torch.no_grad():
        wanted, made = plain(input_ids=ids).logits, rounded(input_ids=ids).logits
        alone = rounded(input_ids=ids[:1]).logits
    assert 1e-5 < difference(made, wanted) < 0.2
    assert (made[:1] - alone).abs().max() <= 1e-5 * max(1.0, float(made.abs().max()))
    assert rounded.quick_step() is not None
    with pytest.raises(SaveError, match="loaded with quantize='int8' and cannot be saved"):
        rounded.save_pretrained(experts_folder / "new")


def test_quick_and_slow_steps_of_experts_in_eight_bits_write_the_same(gemmas, experts_folder, monkeypatch):
    kind = type(gemmas.gemma4_model(gemmas.processor_4(), "experts"))
    rounded, ids = kind.from_pretrained(experts_folder, quantize="int8"), torch.randint(5, 30, (2, 9))
    quick = rounded.generate(ids, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(kind, "quick_step", lambda self: None)
    assert torch.equal(rounded.generate(ids, max_new_tokens=8, do_sample=False), quick)


def test_schemes_of_torchao_say_that_they_leave_experts_as_they_are(gemmas, experts_folder, monkeypatch, caplog):
    scheme = SimpleNamespace(Int8WeightOnlyConfig=object, quantize_=lambda *args, **kwargs: None)
    monkeypatch.setattr(quantization, "_torchao", lambda: scheme)
    with caplog.at_level(logging.WARNING):
        type(gemmas.gemma4_model(gemmas.processor_4(), "experts")).from_pretrained(experts_folder, quantize="int8wo")
    assert "quantize='int8wo' leaves the weights of experts as they are" in caplog.text


def test_what_is_saved_in_float16_is_calculated_in_float32_beside_the_rounded_maps(folder, tmp_path):
    load(folder).half().save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.float16
    assert load(tmp_path / "half", quantize="int8").dtype == torch.float32
    assert load(tmp_path / "half", quantize="int8", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("abilities", "scheme", "dtype"),
    [
        ({"_is_vnni_supported"}, "int8", torch.float32),
        ({"_is_amx_tile_supported"}, "int8", torch.float32),
        ({"_is_avx512_bf16_supported"}, None, torch.bfloat16),
        (set(), None, torch.float32),
    ],
)
def test_auto_takes_what_the_processor_is_made_for(folder, monkeypatch, abilities, scheme, dtype):
    monkeypatch.setattr(quantization, "_cpu_can", abilities.__contains__)
    model = load(folder, quantize="auto")
    assert (model.quantization, model.dtype) == (scheme, dtype)


def test_auto_leaves_models_on_a_gpu_alone():
    place = {"": torch.device("cuda")}
    assert quantization.settle_scheme("auto", "auto", torch.bfloat16, place) == (None, torch.bfloat16)


def test_wrong_schemes_and_places_are_named(folder):
    with pytest.raises(ConfigError, match="quantize='int3': accepted are None, 'auto', 'int8'"):
        load(folder, quantize="int3")
    with pytest.raises(ConfigError, match="for models on the CPU, and this one goes to cuda"):
        quantization.settle_scheme("int8", "auto", torch.float32, {"": torch.device("cuda")})
    with pytest.raises(ConfigError, match="one device; device_map spreads it"):
        quantization.settle_scheme("int8wo", "auto", torch.float32, {"a": "cpu", "b": "cuda:0"})


def test_saving_training_resizing_and_adapting_a_rounded_model_say_what_to_do(folder, tmp_path):
    rounded = load(folder, quantize="int8")
    with pytest.raises(SaveError, match="loaded with quantize='int8' and cannot be saved.*without quantize="):
        rounded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="cannot be trained.*without quantize="):
        rounded.train()
    assert not any(module.training for module in rounded.modules())
    with pytest.raises(ConfigError, match="cannot be given another vocabulary"):
        rounded.resize_token_embeddings(50)
    with pytest.raises(ConfigError, match="cannot be adapted.*without quantize="):
        add_lora(rounded, LoraConfig(target_modules=["q_proj"]))


def test_a_model_of_a_kind_without_a_rounded_form_is_refused(monkeypatch, folder):
    monkeypatch.setattr(WhisperForConditionalGeneration, "quantized_linear", None)
    with pytest.raises(ConfigError, match="WhisperForConditionalGeneration cannot be quantised"):
        load(folder, quantize="int8")


def test_schemes_of_torchao_ask_for_the_extra_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtra, match=r"audiomm\[torchao\]"):
        load(folder, quantize="int8wo")


def test_torchao_replaces_the_weights_of_linear_maps(folder):
    pytest.importorskip("torchao")
    plain, rounded = load(folder), load(folder, quantize="int8wo")
    features, ids = torch.randn(1, 8, 40), torch.randint(4, 100, (1, 6))
    with torch.no_grad():
        wanted = plain(features, decoder_input_ids=ids).logits
        assert 1e-6 < difference(rounded(features, decoder_input_ids=ids).logits, wanted) < 0.1
    assert rounded.generate(features, max_new_tokens=3).shape[0] == 1
    assert type(rounded.model.decoder.embed_tokens.weight) is nn.Parameter


def test_the_bundled_model_hears_real_recordings_in_eight_bits_as_in_float32():
    files = sorted((ROOT / "examples" / "audio").glob("*.flac"))
    texts = [
        [pipeline("automatic-speech-recognition", device="cpu", model_kwargs=kwargs)(file)["text"] for file in files]
        for kwargs in ({"dtype": "float32"}, {"quantize": "int8"})
    ]
    assert texts[0] == texts[1]
    assert all(len(text.split()) >= 7 for text in texts[0])
