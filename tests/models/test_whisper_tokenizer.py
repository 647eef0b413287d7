"""Whisper's tokenizer: prefix, prompts, times, words, on a vocabulary made here and on the real one where it is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from audiomm.base.errors import CheckpointNotFoundError, ConfigError, InputError
from audiomm.base.languages import ALIASES, LANGUAGES, TO_LANGUAGE_CODE, language_code
from audiomm.models.whisper.tokenizer import WhisperTokenizer, WhisperTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
END = len(ALPHABET) + len(MERGES)


def vocabulary() -> dict[str, int]:
    return {token: number for number, token in enumerate([*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)])}


def added(languages: list[str]) -> list[str]:
    """Special and timestamp tokens in the order that Whisper's checkpoints have them."""
    names = ["endoftext", "startoftranscript", *languages, "translate", "transcribe", "startoflm", "startofprev"]
    names += ["nospeech", "notimestamps", *(f"{step * 0.02:.2f}" for step in range(1501))]
    return [f"<|{name}|>" for name in names]


def write_checkpoint(folder: Path, languages: list[str]) -> Path:
    """The older pair of files, as the first Whisper checkpoints have them."""
    tokens = added(languages)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({token: END + i for i, token in enumerate(tokens)}))
    config = {"additional_special_tokens": tokens[:-1501], "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whisper") / "v2", [code for code in LANGUAGES if code != "yue"])


@pytest.fixture
def tokenizer(folder: Path) -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(folder)


def names(tokenizer: WhisperTokenizer, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def at(tokenizer: WhisperTokenizer, seconds: float) -> int:
    return tokenizer.convert_tokens_to_ids(f"<|{seconds:.2f}|>")


# ---------------------------------------------------------------------------------------------------- languages


def test_every_language_is_found_by_code_name_and_token():
    assert len(LANGUAGES) == 100
    assert list(LANGUAGES)[:3] == ["en", "zh", "de"]
    assert list(LANGUAGES)[-1] == "yue"
    for code, name in LANGUAGES.items():
        assert {language_code(text) for text in (code, name, name.title(), code.upper(), f"<|{code}|>")} == {code}
    for alias, code in ALIASES.items():
        assert language_code(alias) == TO_LANGUAGE_CODE[alias] == code


def test_a_misspelt_language_gets_a_suggestion():
    with pytest.raises(InputError, match=r"'germn'.*Did you mean 'german'"):
        language_code("germn")
    with pytest.raises(InputError, match="100 languages"):
        language_code("klingon!")
    with pytest.raises(TypeError, match="not int"):
        language_code(5)


# ---------------------------------------------------------------------------------------------------- prefix


def test_the_prefix_says_language_task_and_times(tokenizer):
    ids = tokenizer(" hello").input_ids
    assert names(tokenizer, ids) == ["<|startoftranscript|>", "<|notimestamps|>", "Ġhello", "<|endoftext|>"]
    tokenizer.set_prefix_tokens(language="Castilian", task="translate")
    assert names(tokenizer, tokenizer.prefix_tokens) == [
        "<|startoftranscript|>", "<|es|>", "<|translate|>", "<|notimestamps|>",
    ]  # fmt: skip
    tokenizer.set_prefix_tokens(predict_timestamps=True)
    assert names(tokenizer, tokenizer("").input_ids) == [
        "<|startoftranscript|>", "<|es|>", "<|translate|>", "<|endoftext|>",
    ]  # fmt: skip
    assert tokenizer(" hello", add_special_tokens=False).input_ids == tokenizer.convert_tokens_to_ids(["Ġhello"])


def test_the_prefix_can_be_given_when_loading_and_is_saved(folder, tmp_path: Path):
    options = {"language": "<|fr|>", "task": "transcribe", "predict_timestamps": True}
    tokenizer = WhisperTokenizerFast.from_pretrained(folder, **options)
    paths = tokenizer.save_pretrained(tmp_path)
    assert {Path(path).name for path in paths} == {"tokenizer.json", "tokenizer_config.json"}
    again = WhisperTokenizer.from_pretrained(tmp_path)
    assert again.prefix_tokens == tokenizer.prefix_tokens
    assert names(again, again.prefix_tokens) == ["<|startoftranscript|>", "<|fr|>", "<|transcribe|>"]
    assert again(" hello <|2.00|> x") == tokenizer(" hello <|2.00|> x")
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.get_vocab() == tokenizer.get_vocab()
    assert pickle.loads(pickle.dumps(again)).prefix_tokens == tokenizer.prefix_tokens


def test_a_bad_prefix_changes_nothing(tokenizer):
    before = tokenizer.prefix_tokens
    with pytest.raises(ValueError, match="klingon"):
        tokenizer.set_prefix_tokens(language="klingon", task="translate")
    with pytest.raises(ValueError, match=r"task='sing' is not one of 'translate', 'transcribe'"):
        tokenizer.set_prefix_tokens(task="sing")
    assert tokenizer.prefix_tokens == before
    assert (tokenizer.language, tokenizer.task) == (None, None)


def test_cantonese_is_an_error_where_the_vocabulary_lacks_it(tokenizer, tmp_path: Path):
    with pytest.raises(InputError, match=r"no <\|yue\|>.*large-v3"):
        tokenizer.set_prefix_tokens(language="cantonese")
    newer = WhisperTokenizer.from_pretrained(write_checkpoint(tmp_path / "v3", list(LANGUAGES)), language="cantonese")
    assert names(newer, newer.prefix_tokens)[1] == "<|yue|>"


def test_ids_are_looked_up_so_a_vocabulary_of_one_language_works(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "one", ["gsw"])
    tokenizer = WhisperTokenizer.from_pretrained(folder, language="gsw", task="translate")
    assert tokenizer.prefix_tokens == [END + 1, END + 2, END + 3, END + 8]
    assert tokenizer.timestamp_begin == END + 9
    assert tokenizer.language_tokens == {"<|gsw|>": END + 2}
    with pytest.raises(InputError, match=r"no <\|de\|>; it knows 1 languages"):
        tokenizer.language_id("de")


def test_decoder_prompt_ids_are_the_prefix_with_places_and_change_nothing(tokenizer):
    before = tokenizer.prefix_tokens
    prompt = tokenizer.get_decoder_prompt_ids(task="transcribe", language="japanese")
    assert [place for place, _ in prompt] == [1, 2, 3]
    assert names(tokenizer, [token for _, token in prompt]) == ["<|ja|>", "<|transcribe|>", "<|notimestamps|>"]
    assert len(tokenizer.get_decoder_prompt_ids(task="transcribe", no_timestamps=False)) == 1
    assert tokenizer.prefix_tokens == before


def test_a_prompt_is_earlier_text_without_special_tokens(tokenizer):
    ids = tokenizer.get_prompt_ids("  hello ")
    assert isinstance(ids, np.ndarray)
    assert names(tokenizer, ids.tolist()) == ["<|startofprev|>", "Ġhello"]
    assert tokenizer.get_prompt_ids("hello", return_tensors="pt").tolist() == ids.tolist()
    assert tokenizer.get_prompt_ids("hello", return_tensors=None) == ids.tolist()
    with pytest.raises(ValueError, match=r"special token '<\|en\|>'"):
        tokenizer.get_prompt_ids("<|en|> hello")
    with pytest.raises(InputError, match="special token '<|0.02|>'".replace("|", r"\|")):
        tokenizer.get_prompt_ids("at <|0.02|> hello")
    with pytest.raises(InputError, match="return_tensors='tf' is not known"):
        tokenizer.get_prompt_ids("hello", return_tensors="tf")
    with pytest.raises(TypeError, match="not list"):
        tokenizer.get_prompt_ids(["hello"])


def test_special_tokens_mask_fits_the_built_inputs(tokenizer):
    built = tokenizer.build_inputs_with_special_tokens([1, 2], [3])
    assert built == [*tokenizer.prefix_tokens, 1, 2, 3, tokenizer.eos_token_id]
    mask = tokenizer.get_special_tokens_mask([1, 2], [3])
    assert mask == tokenizer.get_special_tokens_mask(built, already_has_special_tokens=True) == [1, 1, 0, 0, 0, 1]


# ---------------------------------------------------------------------------------------------------- decoding


def test_times_are_left_out_unless_asked_for(tokenizer):
    ids = tokenizer("<|0.00|> hello<|1.50|><|1.50|> hello<|2.00|>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == " hello hello"
    assert tokenizer.decode(ids, decode_with_timestamps=True) == "<|0.00|> hello<|1.50|><|1.50|> hello<|2.00|>"
    offsets = tokenizer.decode(torch.tensor(ids), output_offsets=True)
    assert offsets == {
        "text": " hello hello",
        "offsets": [{"text": " hello", "timestamp": (0.0, 1.5)}, {"text": " hello", "timestamp": (1.5, 2.0)}],
    }
    slower = tokenizer.decode(ids, output_offsets=True, time_precision=0.04)
    assert slower["offsets"][0]["timestamp"] == (0.0, 3.0)
    assert tokenizer.batch_decode([ids, ids[:2]]) == [" hello hello", " hello"]


def test_times_that_fall_back_belong_to_the_next_window(tokenizer):
    hello = tokenizer.convert_tokens_to_ids("Ġhello")
    single = [at(tokenizer, 1), hello, at(tokenizer, 25), at(tokenizer, 0), hello, at(tokenizer, 3)]
    pair = [at(tokenizer, 1), hello, at(tokenizer, 20), at(tokenizer, 20), at(tokenizer, 0), hello, at(tokenizer, 3)]
    found = tokenizer.batch_decode([single, pair], output_offsets=True)
    assert [piece["timestamp"] for piece in found[0]["offsets"]] == [(1, 25), (30, 33)]
    assert [piece["timestamp"] for piece in found[1]["offsets"]] == [(1, 20), (20, 23)]
    assert tokenizer.decode(single, decode_with_timestamps=True).endswith("<|30.00|> hello<|33.00|>")
    assert tokenizer.decode(pair, decode_with_timestamps=True) == "<|1.00|> hello<|20.00|><|20.00|> hello<|23.00|>"


def test_text_that_only_looks_like_a_time_stays(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<|2.005|> hello"), skip_special_tokens=True) == "<|2.005|> hello"


def test_bytes_on_two_sides_of_a_time_are_not_put_together(tokenizer):
    first, second = tokenizer.encode("é", add_special_tokens=False)
    assert tokenizer.decode([first, second]) == "é"
    assert tokenizer.decode([first, at(tokenizer, 1), second]) == "\ufffd\ufffd"


def test_the_prompt_is_left_out_with_the_special_tokens(tokenizer):
    hello = tokenizer.convert_tokens_to_ids("Ġhello")
    prompt = tokenizer.get_prompt_ids("x", return_tensors=None)
    whole = [*prompt, *tokenizer.prefix_tokens, hello]
    assert tokenizer.decode(whole, skip_special_tokens=True) == " hello"
    assert tokenizer.decode(whole).startswith("<|startofprev|> x<|startoftranscript|>")
    assert tokenizer.decode(prompt, skip_special_tokens=True) == ""


def test_decoded_text_can_be_normalised(tokenizer):
    ids = tokenizer.encode("Mr. Müller's colours, [noise] TWENTY one!")
    options = {"skip_special_tokens": True}
    assert tokenizer.decode(ids, normalize=True, **options) == "mister muller is colors 21"
    assert tokenizer.decode(ids, basic_normalize=True, **options) == "mr müller s colours twenty one "
    assert "muller" in tokenizer.decode(ids, basic_normalize=True, remove_diacritics=True, **options)
    with pytest.raises(TypeError, match="loudly"):
        tokenizer.decode(ids, loudly=True)


def test_a_checkpoints_own_spellings_are_used_and_saved(folder, tmp_path: Path):
    (tmp_path / "own.json").write_text(json.dumps({"foo": "bar"}))
    tokenizer = WhisperTokenizer.from_pretrained(folder, normalizer_file=tmp_path / "own.json")
    assert tokenizer.normalize("foo colour") == "bar colour"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert WhisperTokenizer.from_pretrained(tmp_path / "saved").normalize("foo") == "bar"


def test_only_timestamp_tokens_are_times(tokenizer):
    assert tokenizer.timestamp_begin == at(tokenizer, 0)
    assert tokenizer.timestamp_ids() == list(range(at(tokenizer, 0), at(tokenizer, 30) + 1))
    coarse = tokenizer.timestamp_ids(0.5)
    assert coarse[:3] == [at(tokenizer, 0), at(tokenizer, 0.5), at(tokenizer, 1)]
    assert len(coarse) == 1501 and set(coarse[61:]) == {tokenizer.unk_token_id}
    tokenizer.add_tokens("<later>")
    later = tokenizer.convert_tokens_to_ids("<later>")
    assert later == at(tokenizer, 30) + 1
    assert not tokenizer.is_timestamp(later)
    assert not tokenizer.is_timestamp(at(tokenizer, 0) - 1)
    assert tokenizer.decode([later]) == "<later>"


# ---------------------------------------------------------------------------------------------------- words


def test_words_are_split_at_spaces_and_punctuation(tokenizer):
    ids = tokenizer.encode(" hello, é x!", add_special_tokens=False)
    words, tokens = tokenizer.split_to_word_tokens(ids, "en")
    assert words == [" hello", ",", " é", " x", "!"]
    assert [token for word in tokens for token in word] == ids
    joined = tokenizer.combine_tokens_into_words(ids, "en")
    assert [word.text for word in joined] == [" hello,", " é", " x!"]
    assert [index for word in joined for index in word.indices] == list(range(len(ids)))


@pytest.mark.parametrize("language", ["zh", "chinese", "<|zh|>", "Mandarin"])
def test_languages_without_spaces_have_a_word_per_character_however_they_are_written(tokenizer, language):
    ids = tokenizer.encode("今天好，去。", add_special_tokens=False)
    assert [word.text for word in tokenizer.combine_tokens_into_words(ids, language)] == ["今", "天", "好，", "去。"]
    tokenizer.set_prefix_tokens(language=language)
    assert len(tokenizer.split_to_word_tokens(ids)[0]) == 6


def test_cut_characters_and_special_tokens_are_words_of_their_own(tokenizer):
    half = tokenizer.encode("é", add_special_tokens=False)[:1]
    hello, end = tokenizer.convert_tokens_to_ids(["Ġhello", "<|endoftext|>"])
    words, tokens = tokenizer.split_to_word_tokens([hello, *half, end])
    assert words == [" hello\ufffd", "<|endoftext|>"]
    assert tokens == [[hello, *half], [end]]
    assert tokenizer.split_to_word_tokens([]) == ([], [])


def test_opening_marks_belong_to_the_next_word(tokenizer):
    ids = tokenizer.encode(' hello "x" (y) ¿z?', add_special_tokens=False)
    texts = [word.text for word in tokenizer.combine_tokens_into_words(ids)]
    assert texts == [" hello", ' "x"', " (y)", " ¿z?"]


# ---------------------------------------------------------------------------------------------------- files


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer\.json"):
        WhisperTokenizer.from_pretrained(tmp_path)


def test_files_that_do_not_fit_together_are_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="do not make a tokenizer"):
        WhisperTokenizer(vocab={"a": 0}, merges=["a b"])
    with pytest.raises(ConfigError, match=r"no <\|startoftranscript\|>; is it a Whisper tokenizer"):
        WhisperTokenizer(vocab=vocabulary(), merges=MERGES)


def test_the_real_vocabulary_gives_the_documented_ids(golden):
    folder = golden / "tokenizers/whisper-multilingual"
    tokenizer = WhisperTokenizer.from_pretrained(folder, language="fr", task="transcribe")
    assert tokenizer("bonjour").input_ids == [50258, 50265, 50359, 50363, 4351, 8696, 50257]
    ids = [8404, 871, 287, 6, 246, 526, 3210, 20378]
    assert tokenizer.split_to_word_tokens(ids, "zh")[0] == [" elle", " est", " l", "'", "\ufffd", "é", "rit", "oire"]
    assert tokenizer.split_to_word_tokens(ids, "fr")[0] == [" elle", " est", " l", "'\ufffdéritoire"]
    english = WhisperTokenizer.from_pretrained(golden / "tokenizers/whisper-en")
    assert english.prefix_tokens == [50257, 50362]
    assert english.timestamp_begin == 50363
