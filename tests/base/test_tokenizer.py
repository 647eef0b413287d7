"""The tokenizer that every family shares: files, calls, padding, truncation, special tokens."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from audiomm.base.encoding import BatchEncoding
from audiomm.base.errors import CheckpointNotFoundError, ConfigError, InputError, SaveError
from audiomm.base.tokenizer import PreTrainedTokenizer, PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<bos>", "<eos>", "<image>"]


def letters() -> Tokenizer:
    """One token per byte, "ab" and " a" merged, <bos> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "ab", "Ġa"])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", bos)]
    )
    return backend


@pytest.fixture
def tokenizer() -> PreTrainedTokenizer:
    return PreTrainedTokenizer(
        letters(),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        image_token="<image>",
        model_max_length=16,
        unheard_of={"kept": 1},
    )


def ids(tokenizer: PreTrainedTokenizer, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def test_a_text_becomes_ids_and_a_mask(tokenizer):
    encoded = tokenizer("ab c")
    assert encoded["input_ids"] == ids(tokenizer, "<bos>", "ab", "Ġ", "c")
    assert encoded.attention_mask == [1, 1, 1, 1]
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert tokenizer.encode("ab c", add_special_tokens=False) == encoded.input_ids[1:]
    assert tokenizer.tokenize("ab c") == ["ab", "Ġ", "c"]


def test_decoding_gives_the_text_back_whatever_holds_the_ids(tokenizer):
    text = "ab ça 東\n"
    numbers = tokenizer.encode(text)
    for form in (numbers, tuple(numbers), np.array(numbers), torch.tensor(numbers)):
        assert tokenizer.decode(form, skip_special_tokens=True) == text
    assert tokenizer.decode(numbers) == "<bos>" + text
    assert tokenizer.decode(torch.tensor([numbers, numbers]), skip_special_tokens=True) == [text, text]
    assert tokenizer.batch_decode([torch.tensor(numbers), numbers[:2]], skip_special_tokens=True) == [text, "ab"]
    assert tokenizer.batch_decode(np.array([numbers]), skip_special_tokens=True) == [text]
    assert tokenizer.decode(numbers[1]) == "ab"
    assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_passed_over(tokenizer):
    assert tokenizer.decode([*ids(tokenizer, "c"), 9_999]) == "c"
    assert tokenizer.convert_ids_to_tokens([9_999]) == [None]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1, -100], InputError, "-100 is negative"),
        ([1.5], TypeError, "1.5"),
        ("text", TypeError, "not str"),
        (None, TypeError, "not NoneType"),
        ([[1], 2], TypeError, "list"),
    ],
)
def test_ids_that_are_none_are_refused(tokenizer, bad, error, message):
    with pytest.raises(error, match=message):
        tokenizer.decode(bad)


def test_padding_goes_to_the_longest_to_a_length_or_to_a_multiple(tokenizer):
    pad = tokenizer.pad_token_id
    batch = tokenizer(["c", "ab c"], padding=True)
    assert batch.input_ids[0] == [*ids(tokenizer, "<bos>", "c"), pad, pad]
    assert batch.attention_mask == [[1, 1, 0, 0], [1, 1, 1, 1]]
    left = tokenizer(["c", "ab c"], padding="longest", padding_side="left")
    assert left.input_ids[0][:2] == [pad, pad]
    assert left.attention_mask[0] == [0, 0, 1, 1]
    assert len(tokenizer("c", padding="max_length", max_length=7).input_ids) == 7
    assert len(tokenizer("c", padding="max_length").input_ids) == tokenizer.model_max_length
    assert len(tokenizer(["c", "ab c"], padding=True, pad_to_multiple_of=8).input_ids[0]) == 8
    # Padding alone never cuts.
    assert len(tokenizer("ab c", padding="max_length", max_length=2).input_ids) == 4


def test_truncation_counts_special_tokens_and_can_cut_either_end(tokenizer):
    assert tokenizer("cde", truncation=True, max_length=3).input_ids == ids(tokenizer, "<bos>", "c", "d")
    tokenizer.truncation_side = "left"
    assert tokenizer("cde", truncation=True, max_length=3).input_ids == ids(tokenizer, "<bos>", "d", "e")
    assert len(tokenizer("c" * 99, truncation=True).input_ids) == tokenizer.model_max_length


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("longest_first", ("cd", "xy")), ("only_first", ("c", "xyz")), ("only_second", ("cde", "x"))],
)
def test_a_pair_is_cut_where_the_strategy_says(tokenizer, strategy, kept):
    encoded = tokenizer("cde", "xyz", truncation=strategy, max_length=6, return_token_type_ids=True)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "".join(kept)
    assert encoded.token_type_ids == [0] * (1 + len(kept[0])) + [1] * (1 + len(kept[1]))


def test_longest_first_leaves_a_short_text_whole(tokenizer):
    encoded = tokenizer(["c", "cdefgh"], ["uvwxyz", "u"], truncation=True, max_length=6)
    assert tokenizer.batch_decode(encoded.input_ids, skip_special_tokens=True) == ["cuvw", "cdeu"]


def test_a_length_without_a_word_on_truncation_cuts_and_says_so(tokenizer, caplog):
    assert len(tokenizer("cdefgh", max_length=4).input_ids) == 4
    assert "truncation=True" in caplog.text


def test_tensors_arrays_and_lists_can_be_asked_for(tokenizer):
    batch = tokenizer(["c", "ab c"], padding=True, return_tensors="pt", return_offsets_mapping=True)
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_ids.shape == (2, 4)
    assert batch.offset_mapping[1].tolist() == [[0, 0], [0, 2], [2, 3], [3, 4]]
    assert tokenizer("c", return_tensors="np").input_ids.shape == (1, 2)
    assert tokenizer.encode("c", return_tensors="pt").shape == (1, 2)
    assert tokenizer([]).input_ids == []
    assert tokenizer([], return_tensors="pt").input_ids.dtype == torch.int64


def test_masks_and_lengths_can_be_asked_for(tokenizer):
    encoded = tokenizer("cd", return_special_tokens_mask=True, return_length=True, return_attention_mask=False)
    assert encoded.special_tokens_mask == [1, 0, 0]
    assert encoded.length == [3]  # as in transformers
    assert "attention_mask" not in encoded


def test_targets_become_labels(tokenizer):
    encoded = tokenizer("c", text_target="d")
    assert encoded.labels == ids(tokenizer, "<bos>", "d")
    assert tokenizer(text_target="d").input_ids == encoded.labels


def test_words_given_one_by_one_are_one_text(tokenizer):
    assert tokenizer(["c", "d"], is_split_into_words=True).input_ids == ids(tokenizer, "<bos>", "c", "d")
    assert len(tokenizer([["c"], ["d", "e"]], is_split_into_words=True).input_ids) == 2


def test_special_tokens_in_a_text_are_special_unless_asked_otherwise(tokenizer):
    assert tokenizer.encode("a<eos>") == ids(tokenizer, "<bos>", "a", "<eos>")
    plain = tokenizer.encode("a<eos>", split_special_tokens=True)
    assert plain == ids(tokenizer, "<bos>", "a", "<", "e", "o", "s", ">")
    assert tokenizer.encode("a<eos>") == ids(tokenizer, "<bos>", "a", "<eos>")
    tokenizer.add_tokens("<new>", special_tokens=True)
    assert tokenizer.encode("<new>", split_special_tokens=True)[1:] == ids(tokenizer, *"<new>")


def test_many_texts_give_what_each_gives_alone(tokenizer):
    texts = [f"ab {number} ç" for number in range(100)]
    assert tokenizer(texts).input_ids == [tokenizer(text).input_ids for text in texts]


def test_threads_may_share_a_tokenizer_and_ask_for_different_lengths(tokenizer):
    def run(length: int) -> bool:
        return all(
            len(tokenizer("abcdefghij" * 3, truncation=True, max_length=length).input_ids) == length for _ in range(50)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, [3, 5, 7, 9]))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, InputError, "both are None"),
        ((5,), {}, TypeError, "not int"),
        ((["c", 5],), {}, TypeError, "item 1 is int"),
        (("c", 5), {}, TypeError, "text_pair"),
        ((["c"], "d"), {}, TypeError, "text_pair"),
        ((["c"], ["d", "e"]), {}, InputError, "1 texts but 2"),
        (("c",), {"padding": "sideways"}, InputError, "sideways"),
        (("c",), {"truncation": "sideways"}, InputError, "sideways"),
        (("c",), {"padding": True, "padding_side": "top"}, InputError, "top"),
        (("c",), {"truncation": False, "max_length": 4}, InputError, "has no effect"),
        (("c",), {"padding": True, "max_length": 4}, InputError, "has no effect"),
        (("c",), {"truncation": True, "max_length": -1}, InputError, "0 or more"),
        (("c",), {"truncation": True, "max_length": 0}, InputError, "no room"),
        (("c",), {"truncation": "only_second", "max_length": 1}, InputError, "text_pair"),
        (("cdef", "xyz"), {"truncation": "only_second", "max_length": 4}, InputError, "longest_first"),
        (("c",), {"return_tensors": "tf"}, InputError, "'pt'"),
        ((["c", "cd"],), {"return_tensors": "pt"}, InputError, "padding=True"),
        (("c",), {"truncation": True, "padding": True, "max_length": 6, "pad_to_multiple_of": 4}, InputError, "Use 4"),
        (("c",), {"colour": 1}, TypeError, "colour"),
    ],
)
def test_calls_that_make_no_sense_say_why(tokenizer, arguments, options, error, message):
    with pytest.raises(error, match=message):
        tokenizer(*arguments, **options)


def test_tokenize_wants_one_string(tokenizer):
    with pytest.raises(TypeError, match="one string"):
        tokenizer.tokenize(["c"])


def test_padding_to_a_length_needs_a_length_and_a_pad_token():
    bare = PreTrainedTokenizer(letters())
    with pytest.raises(InputError, match="model_max_length"):
        bare("c", padding="max_length")
    with pytest.raises(InputError, match=r"pad_token = tokenizer\.eos_token"):
        bare(["c", "cd"], padding=True)
    bare.pad_token = "<eos>"
    assert bare(["c", "cd"], padding=True).attention_mask == [[1, 1, 0], [1, 1, 1]]


def test_pad_fills_what_was_encoded_before(tokenizer):
    pad = tokenizer.pad_token_id
    rows = [{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3])}]
    batch = tokenizer.pad(rows, return_tensors="pt", pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 2, pad, pad], [3, pad, pad, pad]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert tokenizer.pad({"input_ids": [[1, 2], [3]]}).input_ids == [[1, 2], [3, pad]]
    assert tokenizer.pad({"input_ids": [1]}, padding="max_length", max_length=3).input_ids == [1, pad, pad]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([], InputError, "empty"),
        ([1, 2], TypeError, "list of encodings"),
        ({"labels": [1]}, InputError, "input_ids"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], InputError, "encoding 1"),
    ],
)
def test_pad_says_what_it_cannot_fill(tokenizer, value, error, message):
    with pytest.raises(error, match=message):
        tokenizer.pad(value)


def test_special_tokens_are_attributes_that_can_be_set(tokenizer):
    assert tokenizer.bos_token == "<bos>"
    assert tokenizer.bos_token_id == ids(tokenizer, "<bos>")[0]
    assert tokenizer.unk_token is None
    assert tokenizer.unk_token_id is None
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<image>", ids(tokenizer, "<image>")[0])
    tokenizer.pad_token_id = tokenizer.eos_token_id
    assert tokenizer.pad_token == "<eos>"
    tokenizer.image_token = "<bos>"
    assert tokenizer.special_tokens_map["image_token"] == "<bos>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None


def test_special_tokens_that_are_not_there_are_named(tokenizer):
    with pytest.raises(InputError, match=r"not in the vocabulary.*add_special_tokens"):
        tokenizer.pad_token = "<nowhere>"
    with pytest.raises(InputError, match="9999 is not an id"):
        tokenizer.pad_token_id = 9999
    with pytest.raises(TypeError, match="pad_token must be a string"):
        tokenizer.pad_token = 5
    with pytest.raises(AttributeError, match="audio_token"):
        _ = tokenizer.audio_token
    with pytest.raises(InputError, match="'colour' does not name a special token"):
        tokenizer.add_special_tokens({"colour": "red"})
    with pytest.raises(TypeError, match="not int"):
        tokenizer.add_tokens([5])


def test_added_tokens_extend_the_vocabulary(tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<x>", "<x>", "ab"]) == 1
    assert tokenizer.add_special_tokens({"mask_token": "<mask>", "additional_special_tokens": ["<y>"]}) == 2
    assert len(tokenizer) == size + 3
    assert tokenizer.vocab_size == 258
    assert tokenizer.additional_special_tokens == ["<y>"]
    assert tokenizer.all_special_tokens == ["<bos>", "<eos>", "<pad>", "<mask>", "<image>", "<y>"]
    assert tokenizer.all_special_ids == tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer.encode("c<x><y>"), skip_special_tokens=True) == "c<x>"
    assert tokenizer.get_added_vocab()["<y>"] == size + 2


def test_tokens_and_ids_convert_both_ways(tokenizer):
    tokens = ["<bos>", "ab", "Ġa"]
    numbers = tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer.convert_ids_to_tokens(numbers) == tokens
    assert tokenizer.convert_ids_to_tokens(numbers, skip_special_tokens=True) == tokens[1:]
    assert tokenizer.convert_ids_to_tokens(numbers[1]) == "ab"
    assert tokenizer.convert_tokens_to_string(["ab", "Ġa"]) == "ab a"
    assert tokenizer.convert_tokens_to_ids("nowhere") is None
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert tokenizer.convert_tokens_to_ids(["nowhere"]) == [tokenizer.unk_token_id]
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer.convert_tokens_to_ids([5])


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path: Path):
    tokenizer.padding_side = "left"
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<y>"]})
    paths = tokenizer.save_pretrained(tmp_path / "saved")
    assert {Path(path).name for path in paths} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("ab <y>c") == tokenizer("ab <y>c")
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.additional_special_tokens == ["<y>"]
    assert (again.padding_side, again.model_max_length) == ("left", 16)
    assert again.chat_template == "{{ messages }}"
    assert again.init_kwargs["unheard_of"] == {"kept": 1}
    assert PreTrainedTokenizer.from_pretrained(tmp_path / "saved", padding_side="right").padding_side == "right"


def test_several_chat_templates_are_kept_by_name(tokenizer, tmp_path: Path):
    tokenizer.chat_template = {"default": "a", "tools": "b"}
    tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizer.from_pretrained(tmp_path).chat_template == {"default": "a", "tools": "b"}
    assert (tmp_path / "chat_template.jinja").read_text() == "a"
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("c")
    assert PreTrainedTokenizer.from_pretrained(tmp_path).chat_template == {"default": "a", "tools": "c"}
    tokenizer.chat_template = {"../outside": "a", "tools": "b"}
    tokenizer.save_pretrained(tmp_path / "again")
    assert PreTrainedTokenizer.from_pretrained(tmp_path / "again").chat_template == tokenizer.chat_template
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_older_files_beside_tokenizer_json_are_read(tmp_path: Path):
    letters().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>", "lstrip": False}, "additional_special_tokens": ["<image>"]})
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<late>": 262}))
    config = {"pad_token": {"__type": "AddedToken", "content": "<pad>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = PreTrainedTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<bos>", "<pad>")
    assert tokenizer.additional_special_tokens == ["<image>"]
    assert tokenizer.convert_tokens_to_ids("<late>") == 262
    tokenizer.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert saved["add_bos_token"] is True
    assert saved["pad_token"] == "<pad>"


def test_named_tokens_of_the_older_form_become_attributes():
    tokenizer = PreTrainedTokenizer(letters(), extra_special_tokens={"image_token": "<image>"})
    assert tokenizer.image_token == "<image>"


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path, tokenizer):
    with pytest.raises(CheckpointNotFoundError, match=r"no tokenizer\.json"):
        PreTrainedTokenizer.from_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        PreTrainedTokenizer.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a readable tokenizer"):
        PreTrainedTokenizer.from_pretrained(tmp_path)
    letters().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        PreTrainedTokenizer.from_pretrained(tmp_path)
    with pytest.raises(SaveError, match="cannot save"):
        tokenizer.save_pretrained(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="needs tokenizer_object"):
        PreTrainedTokenizer()
    with pytest.raises(InputError, match="padding_side='top'"):
        PreTrainedTokenizer(letters(), padding_side="top")


def test_settings_that_cannot_be_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="model_max_length='long'"):
        PreTrainedTokenizer(letters(), model_max_length="long")
    letters().save(str(tmp_path / "tokenizer.json"))
    for broken in ({"x": "<a>"}, [1], {"7": 5}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": broken}))
        with pytest.raises(ConfigError, match="must map ids to tokens"):
            PreTrainedTokenizer.from_pretrained(tmp_path)


def test_an_added_token_with_another_id_than_said_is_reported(caplog):
    PreTrainedTokenizer(letters(), added_tokens_decoder={5000: "<far>"})
    assert "'<far>' is said to be id 5000 but is 262" in caplog.text


def test_options_of_other_loaders_mean_nothing(tmp_path: Path):
    letters().save(str(tmp_path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizer.from_pretrained(tmp_path, use_fast=True, use_auth_token="secret")
    assert tokenizer.all_special_tokens == []
    assert "use_auth_token" not in tokenizer.init_kwargs


def test_a_tokenizer_file_beyond_all_measure_is_refused(tmp_path: Path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ConfigError, match="at most 67,108,864"):
        PreTrainedTokenizer.from_pretrained(tmp_path)


def test_a_setting_that_json_cannot_hold_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="strange"):
        PreTrainedTokenizer(letters(), strange=object()).save_pretrained(tmp_path)


def test_padding_and_truncation_in_the_file_are_not_applied(tmp_path: Path):
    backend = letters()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = PreTrainedTokenizer(backend)
    assert len(tokenizer("cdefg").input_ids) == 6
    assert backend.truncation is not None


def test_copies_and_pickles_are_independent(tokenizer):
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other("ab c") == tokenizer("ab c")
        other.add_tokens("<z>")
        other.pad_token = "<eos>"
        assert len(other) == len(tokenizer) + 1
        assert tokenizer.pad_token == "<pad>"


def test_an_encoding_moves_and_casts_only_floating_tensors(tokenizer):
    batch = tokenizer("c", return_tensors="pt")
    batch["input_features"] = torch.zeros(1, 2)
    assert batch.to("cpu", torch.float16) is batch
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_features.dtype == torch.float16
    assert {**batch}.keys() == {"input_ids", "attention_mask", "input_features"}
    with pytest.raises(TypeError, match="device and a dtype"):
        batch.to([1])
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = batch.nothing
    assert pickle.loads(pickle.dumps(BatchEncoding({"a": 1}))) == {"a": 1}


def test_an_encoding_tells_tokens_words_and_characters(tokenizer):
    encoded = tokenizer("ab c", "d")
    assert encoded.tokens() == ["<bos>", "ab", "Ġ", "c", "<bos>", "d"]
    assert encoded.sequence_ids() == [None, 0, 0, 0, None, 1]
    assert encoded.char_to_token(0, 1) == 1
    assert encoded.word_ids()[0] is None
    assert encoded[0].ids == encoded.input_ids


@pytest.mark.parametrize("name", ["gemma3n-tiny", "gemma4-tiny"])
def test_gemma_tokenizers_load_and_round_trip(golden, name, tmp_path: Path):
    tokenizer = PreTrainedTokenizer.from_pretrained(golden / "tokenizers" / name)
    text = "hello you, é 東"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id
    assert tokenizer.audio_token_id in tokenizer.all_special_ids
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "GemmaTokenizer"
