"""The Auto classes: classes of one's own, and folders that hold one part alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import audiomm
from audiomm import auto
from audiomm.base.errors import CheckpointNotFoundError, ConfigError


class OwnConfig(audiomm.WhisperConfig):
    model_type = "own"


class OwnModel(audiomm.WhisperForConditionalGeneration):
    config_class = OwnConfig


class OwnTokenizer(audiomm.WhisperTokenizer):
    pass


class OwnExtractor(audiomm.WhisperFeatureExtractor):
    pass


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    before = dict(auto.FAMILIES)
    yield
    auto.FAMILIES.clear()
    auto.FAMILIES.update(before)


@pytest.fixture
def config(tiny_whisper_config: Any) -> OwnConfig:
    return OwnConfig(**{name: value for name, value in tiny_whisper_config().to_dict().items() if name != "model_type"})


def test_classes_of_ones_own_are_loaded_by_their_model_type(config: OwnConfig, tmp_path: Path) -> None:
    audiomm.AutoModelForSpeechSeq2Seq.register(OwnConfig, OwnModel)
    audiomm.AutoConfig.register("own", OwnConfig)
    audiomm.AutoFeatureExtractor.register(OwnConfig, OwnExtractor)
    audiomm.AutoModelForSpeechSeq2Seq.from_config(config).save_pretrained(tmp_path)
    audiomm.WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    assert type(audiomm.AutoConfig.from_pretrained(tmp_path)) is OwnConfig
    assert type(audiomm.AutoConfig.for_model("own", d_model=96)) is OwnConfig
    assert type(audiomm.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)) is OwnModel
    assert type(audiomm.AutoFeatureExtractor.from_pretrained(tmp_path)) is OwnExtractor
    with pytest.raises(ConfigError, match="own family has no model for AutoModelForCausalLM"):
        audiomm.AutoModelForCausalLM.from_config(config)


def test_tokenizers_and_image_processors_register_under_their_older_names() -> None:
    class Fast(OwnTokenizer):
        pass

    audiomm.AutoTokenizer.register(OwnConfig, slow_tokenizer_class=OwnTokenizer, fast_tokenizer_class=Fast)
    audiomm.AutoImageProcessor.register(OwnConfig, image_processor_classes={"pil": audiomm.SiglipImageProcessor})
    audiomm.AutoProcessor.register(OwnConfig, audiomm.WhisperProcessor)
    row = auto.FAMILIES["own"]
    assert row.load(row.tokenizer) is Fast
    assert row.load(row.image_processor) is audiomm.SiglipImageProcessor
    assert row.load(row.processor) is audiomm.WhisperProcessor
    with pytest.raises(ConfigError, match="needs a tokenizer_class"):
        audiomm.AutoTokenizer.register(OwnConfig)
    with pytest.raises(ConfigError, match="needs a class, as in image_processor_classes"):
        audiomm.AutoImageProcessor.register(OwnConfig)


def test_a_place_that_is_taken_is_replaced_only_if_asked_for() -> None:
    class Mine(audiomm.WhisperForConditionalGeneration):
        pass

    taken = "has WhisperForConditionalGeneration already; pass exist_ok=True to put Mine there"
    with pytest.raises(ConfigError, match=taken):
        audiomm.AutoModelForSpeechSeq2Seq.register(audiomm.WhisperConfig, Mine)
    audiomm.AutoModelForSpeechSeq2Seq.register(audiomm.WhisperConfig, Mine, exist_ok=True)
    assert auto.FAMILIES["whisper"].load("Mine") is Mine
    audiomm.AutoConfig.register("whisper", audiomm.WhisperConfig)  # the same again is no clash


def test_classes_that_do_not_fit_are_refused() -> None:
    class Nameless(audiomm.PreTrainedConfig):
        model_type = ""

    class Twin(audiomm.WhisperConfig):
        pass

    with pytest.raises(ConfigError, match="OwnConfig.model_type is 'own' and not 'other'"):
        audiomm.AutoConfig.register("other", OwnConfig)
    with pytest.raises(ConfigError, match="OwnModel.config_class is OwnConfig and not WhisperConfig"):
        audiomm.AutoModel.register(audiomm.WhisperConfig, OwnModel)
    with pytest.raises(ConfigError, match="Nameless has no model_type"):
        audiomm.AutoFeatureExtractor.register(Nameless, OwnExtractor)
    with pytest.raises(ConfigError, match="Twin: model_type='whisper' is that of WhisperConfig"):
        audiomm.AutoFeatureExtractor.register(Twin, OwnExtractor, exist_ok=True)
    with pytest.raises(ConfigError, match="has WhisperConfig already"):
        audiomm.AutoConfig.register("whisper", Twin)


@pytest.mark.parametrize("part", ["Gemma4AudioFeatureExtractor", "WhisperFeatureExtractor", "SiglipImageProcessor"])
def test_a_part_that_stands_alone_is_what_the_processor_is(part: str, tmp_path: Path) -> None:
    getattr(audiomm, part)().save_pretrained(tmp_path)
    assert type(audiomm.AutoProcessor.from_pretrained(tmp_path)).__name__ == part


def test_a_tokenizer_that_stands_alone_is_what_the_processor_is(gemma_folders: Any, tmp_path: Path) -> None:
    whole = audiomm.AutoProcessor.from_pretrained(gemma_folders["gemma4"])
    whole.tokenizer.save_pretrained(tmp_path)
    values = (tmp_path / "tokenizer_config.json").read_text()
    assert type(audiomm.AutoProcessor.from_pretrained(tmp_path)) is type(whole.tokenizer), values
    whole.save_pretrained(tmp_path)
    assert type(audiomm.AutoProcessor.from_pretrained(tmp_path)) is type(whole)


def test_an_empty_folder_is_no_processor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"holds no config\.json"):
        audiomm.AutoProcessor.from_pretrained(tmp_path)
