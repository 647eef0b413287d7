"""Checkpoints from before generation_config.json: fine-tuned folders as they lie on the hub, and models of every kind.

Full-size vocabularies, everything else tiny: the numbers of the special tokens are what matters here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiomm import GenerationError, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer
from audiomm.base.errors import ConfigError, UnsafeCheckpointError
from audiomm.generation import GenerationConfig
from audiomm.models.whisper.alignment import alignment_heads
from audiomm.models.whisper.published import complete, special_ids, special_tokens

#: <|startoftranscript|>, languages and tasks of the multilingual vocabulary.
SOT, EN, DE, FR, TRANSLATE, TRANSCRIBE, NO_TIMES = 50258, 50259, 50261, 50265, 50358, 50359, 50363
SUPPRESSED = [1, 2, 7, 50257, 50360, 50361]
WINDOW = 40

#: What `generate(language="fr")` then begins with, whatever the old files said.
FRENCH = [SOT, FR, TRANSCRIBE, NO_TIMES]


def make_folder(folder: Path, generation: dict[str, Any] | None, config: dict[str, Any], **sizes: Any) -> Path:
    """A fine-tuned folder: `config` is what its config.json holds besides sizes, `generation` its generation config."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 51865, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
        "max_source_positions": WINDOW // 2, "max_target_positions": 32, **sizes,
    }  # fmt: skip
    WhisperForConditionalGeneration(WhisperConfig(**values)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    ids = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": SOT}
    written = {**values, **ids, "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., WhisperForConditionalGeneration]:
    def make(
        generation: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **sizes: Any
    ) -> WhisperForConditionalGeneration:
        folder = make_folder(tmp_path / "model", generation, config or {}, **sizes)
        model = WhisperForConditionalGeneration.from_pretrained(folder)
        complete(model.generation_config, model.config)
        return model

    return make


def start_of(model: WhisperForConditionalGeneration, **options: Any) -> list[int]:
    """The tokens that a transcription begins with."""
    features = torch.zeros(1, model.config.num_mel_bins, WINDOW)
    ids = model.generate(features, force_unique_generate_call=True, max_new_tokens=1, **options)
    return ids[0].tolist()[: len(FRENCH)]  # type: ignore[union-attr]


FORCED_GERMAN = [[1, DE], [2, TRANSCRIBE]]
OLD = {
    "no file": (None, {}),
    "forced in the config": (None, {"forced_decoder_ids": FORCED_GERMAN}),
    "forced in the generation config": ({"decoder_start_token_id": SOT, "forced_decoder_ids": FORCED_GERMAN}, {}),
    "forced in both, differently": (
        {"decoder_start_token_id": SOT, "forced_decoder_ids": [[1, None], [2, TRANSLATE]]},
        {"forced_decoder_ids": FORCED_GERMAN},
    ),
    "language left open": (None, {"forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]}),
    "no timestamps forced": (None, {"forced_decoder_ids": [*FORCED_GERMAN, [3, NO_TIMES]]}),
    "a null": (None, {"forced_decoder_ids": None, "suppress_tokens": None}),
    "an empty list": ({"forced_decoder_ids": [], "suppress_tokens": []}, {}),
    "a length of 20": (None, {"max_length": 20, "num_beams": 1, "early_stopping": False}),
    "an outdated generation config": ({"_from_model_config": True, "eos_token_id": 50257, "max_length": 32}, {}),
    "suppressed tokens in the config": (None, {"suppress_tokens": SUPPRESSED, "begin_suppress_tokens": [220, 50257]}),
    "settings of training": (
        None,
        {"apply_spec_augment": True, "use_cache": False, "dropout": 0.1, "torch_dtype": None},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_language_can_be_named_whatever_the_old_files_say(
    name: str, load: Callable[..., WhisperForConditionalGeneration], tmp_path: Path
) -> None:
    model = load(*OLD[name])
    # A model that was made to translate goes on translating.
    french = [SOT, FR, TRANSLATE, NO_TIMES] if name == "forced in both, differently" else FRENCH
    assert start_of(model, language="fr") == french
    assert start_of(model, language="fr", task="transcribe") == FRENCH
    assert start_of(model, language="english", task="translate") == [SOT, EN, TRANSLATE, NO_TIMES]
    model.save_pretrained(tmp_path / "again")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert start_of(again, language="fr") == french
    assert start_of(again) == start_of(model)
    for filename in ("config.json", "generation_config.json"):
        assert "forced_decoder_ids" not in json.loads((tmp_path / "again" / filename).read_text())


def test_forced_tokens_that_stand_for_nothing_known_are_kept() -> None:
    generation = GenerationConfig(forced_decoder_ids=[[1, 11]])
    complete(generation, WhisperConfig())
    assert generation.forced_decoder_ids == [[1, 11]]
    with pytest.raises(ConfigError, match=r"forced_decoder_ids=7.*pairs are needed|forced_decoder_ids=.7.: "):
        complete(GenerationConfig(forced_decoder_ids=[7]), WhisperConfig())


@pytest.mark.parametrize("name", ["forced in the config", "forced in the generation config", "no timestamps forced"])
def test_what_a_checkpoint_forces_is_done_when_nobody_asks_for_anything_else(
    name: str, load: Callable[..., WhisperForConditionalGeneration]
) -> None:
    assert start_of(load(*OLD[name])) == [SOT, DE, TRANSCRIBE, NO_TIMES]


def test_the_generation_config_wins_over_the_config(load: Callable[..., WhisperForConditionalGeneration]) -> None:
    start = start_of(load(*OLD["forced in both, differently"]))
    assert start[2] == TRANSLATE
    assert EN <= start[1] < TRANSLATE


def test_tokens_suppressed_by_the_config_are_never_written(
    load: Callable[..., WhisperForConditionalGeneration],
) -> None:
    model = load(None, {"suppress_tokens": SUPPRESSED, "begin_suppress_tokens": [220, 50257]})
    assert model.generation_config.suppress_tokens == SUPPRESSED
    assert model.generation_config.begin_suppress_tokens == [220, 50257]
    with torch.no_grad():
        model.model.decoder.layer_norm.bias.zero_()
        model.model.decoder.layer_norm.bias[0] = 50.0
        model.proj_out.weight[:, 0] = 0.0
        model.proj_out.weight[SUPPRESSED[:3], 0] = torch.tensor([3.0, 2.0, 1.5])
        model.proj_out.weight[9, 0] = 1.0
    ids = model.generate(torch.zeros(1, 8, WINDOW), language="en", max_new_tokens=3)
    assert ids[0].tolist() == [9, 9, 9]  # type: ignore[union-attr]


def test_a_length_of_20_in_the_config_does_not_cut_texts(load: Callable[..., WhisperForConditionalGeneration]) -> None:
    model = load(None, {"max_length": 20})
    with torch.no_grad():
        model.model.decoder.layer_norm.bias.zero_()
        model.model.decoder.layer_norm.bias[0] = 50.0
        model.proj_out.weight[:, 0] = 0.0
        model.proj_out.weight[9, 0] = 1.0
    ids = model.generate(torch.zeros(1, 8, WINDOW), language="en")
    assert ids.shape[1] == 32 - len(FRENCH)  # type: ignore[union-attr]


def test_words_are_timed_by_the_later_half_of_the_layers_where_no_heads_are_listed(
    load: Callable[..., WhisperForConditionalGeneration],
) -> None:
    model = load(decoder_layers=3)
    assert getattr(model.generation_config, "alignment_heads", None) is None
    assert alignment_heads(model.generation_config, model.config) == ((1, 0), (1, 1), (2, 0), (2, 1))
    result = model.generate(
        torch.zeros(1, 8, WINDOW), language="en", return_timestamps=True, return_token_timestamps=True
    )
    times = result["token_timestamps"]  # type: ignore[index,call-overload]
    assert bool((times >= 0).all())
    assert bool((times <= WINDOW / 100).all())


def test_heads_that_a_smaller_decoder_does_not_have_are_refused_by_name(
    load: Callable[..., WhisperForConditionalGeneration],
) -> None:
    """Distilled models that kept the generation config of their teacher."""
    model = load({"decoder_start_token_id": SOT, "alignment_heads": [[25, 6]]})
    with pytest.raises(GenerationError, match=r"\[25, 6\], but the decoder has layers 0 to 1 with heads 0 to 1"):
        model.generate(torch.zeros(1, 8, WINDOW), language="en", return_token_timestamps=True)


# ---------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize(
    ("vocabulary", "language", "start"),
    [
        (51865, "fr", FRENCH),
        (51866, "fr", [50258, 50265, 50360, 50364]),
        (51866, "yue", [50258, 50358, 50360, 50364]),
    ],
)
def test_v2_and_v3_vocabularies_number_languages_and_tasks_differently(
    vocabulary: int, language: str, start: list[int], load: Callable[..., WhisperForConditionalGeneration]
) -> None:
    model = load(vocab_size=vocabulary, num_mel_bins=128 if vocabulary == 51866 else 80, decoder_layers=1)
    assert start_of(model, language=language) == start


def test_cantonese_came_with_v3(load: Callable[..., WhisperForConditionalGeneration]) -> None:
    with pytest.raises(GenerationError, match="language='yue': this model does not know cantonese; it knows 99"):
        start_of(load(), language="yue")


def test_an_english_only_model_has_no_language_to_choose(load: Callable[..., WhisperForConditionalGeneration]) -> None:
    ids = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    for forced in (None, [[1, 50362]]):
        model = load(None, {**ids, "forced_decoder_ids": forced}, vocab_size=51864)
        assert start_of(model)[:2] == [50257, 50362]
        assert model.generation_config.is_multilingual is False
        with pytest.raises(GenerationError, match="English-only"):
            start_of(model, language="fr")


def test_a_vocabulary_of_its_own_is_not_filled_in(load: Callable[..., WhisperForConditionalGeneration]) -> None:
    model = load(vocab_size=51870)
    assert getattr(model.generation_config, "lang_to_id", None) is None
    other = WhisperConfig(vocab_size=51865)
    kept = GenerationConfig(decoder_start_token_id=7)
    complete(kept, other)
    assert getattr(kept, "lang_to_id", None) is None


def test_what_a_generation_config_says_is_kept() -> None:
    config = GenerationConfig(
        lang_to_id={"<|xx|>": 50259}, max_length=100, is_multilingual=True, alignment_heads=[[1, 1]]
    )
    complete(config, WhisperConfig())
    assert config.lang_to_id == {"<|xx|>": 50259}
    assert config.max_length == 100
    assert config.alignment_heads == [[1, 1]]
    assert config.task_to_id == {"transcribe": TRANSCRIBE, "translate": TRANSLATE}


def test_special_tokens_fill_the_vocabulary_to_its_end() -> None:
    for size, (end, last) in {51864: (50256, 51863), 51865: (50257, 51864), 51866: (50257, 51865)}.items():
        ids = special_ids(size)
        assert ids is not None
        assert ids["<|endoftext|>"] == end
        assert ids["<|30.00|>"] == last
    assert special_ids(50000) is None
    assert special_tokens(100, 100 + 1509) is None
    assert special_tokens(100, 100 + 1509 + 101) is None


def test_loading_completes_the_generation_config(tmp_path: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(make_folder(tmp_path / "model", None, {}))
    assert start_of(model, language="fr") == FRENCH


# ---------------------------------------------------------------------- other files of old folders


@pytest.mark.parametrize("filename", ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"])
def test_weights_in_another_format_are_refused_with_the_way_out(filename: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", None, {})
    (folder / "model.safetensors").rename(folder / filename)
    with pytest.raises(UnsafeCheckpointError, match=rf"holds only {filename}.*audiomm convert .*model OUTPUT"):
        WhisperForConditionalGeneration.from_pretrained(folder)


def test_a_tokenizer_in_the_three_old_files_is_read(tmp_path: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json, the times left out, as fine-tuning wrote them in 2022."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, "Ġt", "he", "Ġthe"]
    added = special_tokens(len(words) + 1, len(words) + 1 + 1509 + 3)
    assert added is not None
    named = [token.replace("nospeech", "nocaptions") for token in added[:-1501] if token != "<|endoftext|>"]
    end = len(words)
    (tmp_path / "vocab.json").write_text(
        json.dumps({word: place for place, word in enumerate([*words, "<|endoftext|>"])})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({token: end + 1 + place for place, token in enumerate(named)})
    )
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**names, "additional_special_tokens": named}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **names}))
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path, language="de", task="transcribe")
    vocabulary = {word: place for place, word in enumerate(words)}
    assert tokenizer.encode(" the", add_special_tokens=False) == [vocabulary["Ġthe"]]
    assert tokenizer.prefix_tokens == [end + 1, end + 4, end + 6, end + 10]
    text = tokenizer("the the").input_ids
    assert text[-1] == end
    assert tokenizer.decode(text, skip_special_tokens=True) == "the the"
    assert tokenizer.is_timestamp(tokenizer.timestamp_begin)
    times = [
        tokenizer.timestamp_begin,
        *tokenizer.encode(" the", add_special_tokens=False),
        tokenizer.timestamp_begin + 50,
    ]
    offsets = tokenizer.decode(times, output_offsets=True)["offsets"]
    assert offsets == [{"text": " the", "timestamp": (0.0, 1.0)}]
