"""Gemma3nProcessor: marks expanded to exact counts, media in any order and number, chats, and files."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm import AutoImageProcessor, AutoTokenizer
from audiomm.base.chat import TYPED_END, TYPED_START
from audiomm.base.errors import (
    AudioLayoutError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    PlaceholderError,
    SampleRateError,
)
from audiomm.feature_extraction.base import BatchFeature
from audiomm.models.gemma3n.processing import Gemma3nProcessor
from audiomm.models.gemma3n.tokenizer import GemmaTokenizer

IMAGE, SOUND = "<image_soft_token>", "<audio_soft_token>"
IMAGE_BLOCK = "\n\n<start_of_image>" + 4 * IMAGE + "<end_of_image>\n\n"
SOUND_BLOCK = "\n\n<start_of_audio>" + 3 * SOUND + "<end_of_audio>\n\n"


def texts_of(processor: Gemma3nProcessor, inputs: BatchFeature) -> list[str]:
    return [text.replace("<pad>", "") for text in processor.batch_decode(inputs["input_ids"])]


def test_marks_become_blocks_of_tokens_in_any_order(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], clip: Callable[..., Any]
) -> None:
    inputs = gemma3n_processor(
        text=[f"{SOUND} and {IMAGE}{IMAGE}", f"{IMAGE}", "none"],
        images=[[picture(), picture(seed=1)], [picture(seed=2)], []],
        audio=[clip()],
        padding=True,
        return_tensors="pt",
    )
    assert texts_of(gemma3n_processor, inputs) == [
        f"<bos>{SOUND_BLOCK} and {IMAGE_BLOCK}{IMAGE_BLOCK}", f"<bos>{IMAGE_BLOCK}", "<bos>none",
    ]  # fmt: skip
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert inputs["input_features"].shape[0] == 1 and inputs["input_features_mask"].dtype == torch.bool
    types = inputs["token_type_ids"]
    assert types.shape == inputs["input_ids"].shape
    assert [(types == kind).sum().item() for kind in (1, 2, 3)] == [12, 0, 3]
    # Left padding, so that generation goes on where the text ends.
    assert inputs["attention_mask"][2].tolist() == sorted(inputs["attention_mask"][2].tolist())


def test_flat_lists_are_dealt_out_by_the_marks(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any]
) -> None:
    pictures = [picture(seed=seed) for seed in range(3)]
    text = [f"{IMAGE}{IMAGE}", IMAGE]
    flat = gemma3n_processor(text=text, images=pictures, padding=True, return_tensors="pt")
    nested = gemma3n_processor(text=text, images=[pictures[:2], pictures[2:]], padding=True, return_tensors="pt")
    assert flat["input_ids"].equal(nested["input_ids"]) and flat["pixel_values"].equal(nested["pixel_values"])


def test_a_lonely_start_mark_counts_as_a_mark(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], clip: Callable[..., Any]
) -> None:
    media = {"images": picture(), "audio": clip(), "return_tensors": "pt"}
    usual = gemma3n_processor(text=f"see {IMAGE} hear {SOUND}", **media)
    other = gemma3n_processor(text="see <start_of_image> hear <start_of_audio>", **media)
    assert usual["input_ids"].equal(other["input_ids"])


def test_media_without_text_get_marks(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], clip: Callable[..., Any]
) -> None:
    images = gemma3n_processor(images=[picture(), picture()], return_tensors="pt")
    assert texts_of(gemma3n_processor, images) == [f"<bos>{IMAGE_BLOCK} {IMAGE_BLOCK}"]
    audio = gemma3n_processor(audio=[clip(), clip()], return_tensors="pt")
    assert texts_of(gemma3n_processor, audio) == [f"<bos>{SOUND_BLOCK}"] * 2


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("none", 1, "0 of the mark <image_soft_token> but 1 images"),
        (f"{IMAGE}", 0, "1 of the mark <image_soft_token> but 0 images"),
        (f"{IMAGE}{IMAGE}", 1, "2 of the mark <image_soft_token> but 1 images"),
        ([IMAGE, IMAGE], [[0, 1], []], "text 0 holds 1 of the mark <image_soft_token> but 2 images"),
        ([IMAGE, IMAGE], [[0]], "2 texts but lists of images for 1"),
        ([IMAGE, "x"], 3, r"1 of the mark <image_soft_token> \(1, 0 in each\) but 3 images"),
    ],
)
def test_counts_that_do_not_agree_are_told_with_numbers(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], text: Any, images: Any, words: str
) -> None:
    if isinstance(images, int):
        images = [picture() for _ in range(images)] or None
    else:
        images = [[picture() for _ in row] for row in images]
    with pytest.raises(PlaceholderError, match=words):
        gemma3n_processor(text=text, images=images)


def test_a_limit_of_tokens_never_reaches_the_audio(
    gemma3n_processor: Gemma3nProcessor, clip: Callable[..., Any]
) -> None:
    free = gemma3n_processor(text=SOUND, audio=clip(2.0), return_tensors="pt")
    cut = gemma3n_processor(text=f"{SOUND} words", audio=clip(2.0), max_length=12, truncation=True, return_tensors="pt")
    assert cut["input_features"].equal(free["input_features"])
    assert cut["input_ids"].shape == (1, 12)


def test_truncation_that_cuts_media_off_is_an_error(
    gemma3n_processor: Gemma3nProcessor, clip: Callable[..., Any]
) -> None:
    with pytest.raises(PlaceholderError, match=r"audio tokens in its 4 ids but needs 3: max_length"):
        gemma3n_processor(text=SOUND, audio=clip(), max_length=4, truncation=True)


def test_a_wrong_rate_is_refused(gemma3n_processor: Gemma3nProcessor, clip: Callable[..., Any]) -> None:
    with pytest.raises(SampleRateError, match="8000"):
        gemma3n_processor(text=SOUND, audio=clip(), sampling_rate=8000)


@pytest.mark.parametrize("nested", [False, True])
def test_stereo_is_refused(gemma3n_processor: Gemma3nProcessor, clip: Callable[..., Any], nested: bool) -> None:
    """Not read as thousands of clips of two samples."""
    stereo = np.stack([clip(0.5), clip(0.5, seed=1)], axis=1)
    with pytest.raises(AudioLayoutError, match=r"\(8000, 2\).*Average the channels"):
        gemma3n_processor(text=SOUND, audio=[stereo] if nested else stereo)


def test_options_go_to_their_group_and_unknown_ones_are_named(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any]
) -> None:
    inputs = gemma3n_processor(
        text=["a", IMAGE], images=[picture()], text_kwargs={"padding": "max_length", "max_length": 30},
        images_kwargs={"do_rescale": False}, return_tensors="np",
    )  # fmt: skip
    assert inputs["input_ids"].shape == (2, 30) and isinstance(inputs["pixel_values"], np.ndarray)
    assert inputs["pixel_values"].max() > 1
    assert gemma3n_processor(text=IMAGE, images=picture(), do_rescale=False)["pixel_values"].max() > 1
    with pytest.raises(TypeError, match="'crop_mode'"):
        gemma3n_processor(text="a", crop_mode=1)
    with pytest.raises(TypeError, match="item 1 is int"):
        gemma3n_processor(text=["a", 3])
    with pytest.raises(InputError, match="all are None"):
        gemma3n_processor()


def test_videos_are_refused(gemma3n_processor: Gemma3nProcessor, movie: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="has no video_processor"):
        gemma3n_processor(text="a", videos=movie())


def test_a_text_that_begins_with_bos_gets_no_second_one(gemma3n_processor: Gemma3nProcessor) -> None:
    ids = gemma3n_processor(text=["<bos>hello", "hello"])["input_ids"]
    assert ids[0] == ids[1] and ids[0].count(2) == 1


# ------------------------------------------------------------------------------------------------ chats


def messages(*parts: Any, answer: str | None = None) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [{"role": "user", "content": list(parts)}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_chat_becomes_inputs_with_media_of_every_spelling(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], clip: Callable[..., Any], tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "a.wav", clip(), 16000)
    memory = io.BytesIO()
    soundfile.write(memory, clip(seed=1), 16000, format="WAV")
    sound = base64.b64encode(memory.getvalue()).decode()
    chat = messages(
        {"type": "audio", "path": str(tmp_path / "a.wav")}, text_part(" hear "), {"type": "image", "image": picture()},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "audio", "audio": clip(seed=2)},
    )  # fmt: skip
    inputs = gemma3n_processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert texts_of(gemma3n_processor, inputs) == [
        f"<bos><start_of_turn>user\n{SOUND_BLOCK}hear{IMAGE_BLOCK}{SOUND_BLOCK}{SOUND_BLOCK}<end_of_turn>\n"
        "<start_of_turn>model\n"
    ]
    assert inputs["input_features"].shape[0] == 3 and inputs["pixel_values"].shape[0] == 1


def test_a_batch_of_chats_with_unequal_media_is_padded_on_the_left(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any]
) -> None:
    chats = [
        messages({"type": "image", "image": picture()}, {"type": "image", "image": picture(seed=1)}, text_part("a")),
        messages(text_part("hello the"), answer="hello") + messages({"type": "image", "image": picture(seed=2)}),
    ]
    inputs = gemma3n_processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert inputs["pixel_values"].shape[0] == 3
    alone = gemma3n_processor.apply_chat_template(chats[0], tokenize=True, return_tensors="pt")
    assert inputs["input_ids"][0, -alone.shape[1] :].equal(alone[0])
    same = gemma3n_processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert same["input_ids"].equal(inputs["input_ids"])


def test_the_system_prompt_leads_the_first_turn_and_roles_alternate(gemma3n_processor: Gemma3nProcessor) -> None:
    chat = [{"role": "system", "content": [text_part("Be kind.")]}, *messages(text_part(" hi "), answer=" yes ")]
    assert gemma3n_processor.apply_chat_template(chat) == (
        "<bos><start_of_turn>user\nBe kind.\n\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
    )
    with pytest.raises(InputError, match="roles must alternate"):
        gemma3n_processor.apply_chat_template(messages(text_part("a")) + messages(text_part("b")))


def test_what_a_user_types_is_text_and_no_control(gemma3n_processor: Gemma3nProcessor) -> None:
    typed = f"look: {IMAGE} <end_of_turn>"
    ids = gemma3n_processor.apply_chat_template(messages(text_part(typed)), tokenize=True)
    assert gemma3n_processor.tokenizer.image_token_id not in ids[0]
    assert gemma3n_processor.batch_decode(ids) == [f"<bos><start_of_turn>user\n{typed}<end_of_turn>\n"]
    with pytest.raises(PlaceholderError, match="1 of the mark"):
        gemma3n_processor.apply_chat_template(messages(text_part(typed)), tokenize=True, sanitize_control_tokens=False)


def test_media_may_come_beside_the_messages(gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any]) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, text_part("a")]}]
    inputs = gemma3n_processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, processor_kwargs={"images": [picture()]}
    )
    assert inputs["input_ids"][0].count(gemma3n_processor.image_token_id) == 4
    with pytest.raises(PlaceholderError, match="1 of the mark <image_soft_token> but 0 images"):
        gemma3n_processor.apply_chat_template(chat, tokenize=True)
    with pytest.raises(InputError, match="pass them once"):
        gemma3n_processor.apply_chat_template(
            messages({"type": "image", "image": picture()}), tokenize=True, processor_kwargs={"images": [picture()]}
        )


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_urls_are_refused_unless_allowed(gemma3n_processor: Gemma3nProcessor, kind: str) -> None:
    chat = messages({"type": kind, "url": "http://example.invalid/file"})
    with pytest.raises(InputError, match="URLs are not fetched"):
        gemma3n_processor.apply_chat_template(chat, tokenize=True)
    with pytest.raises(InputError, match="not among allowed_hosts"):
        gemma3n_processor.apply_chat_template(chat, tokenize=True, processor_kwargs={"allowed_hosts": ["other.org"]})


def test_the_assistants_words_can_be_masked(gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}" + IMAGE + "q{% endif %}|{% endfor %}"
    )
    chat = messages({"type": "image", "image": picture()}, answer="hello")
    for begin, options in (("", {}), ("{{ bos_token }}", {}), ("{{ bos_token }}", {"add_special_tokens": True})):
        inputs = gemma3n_processor.apply_chat_template(
            chat, chat_template=begin + template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            return_tensors="pt", **options,
        )  # fmt: skip
        spoken = inputs["input_ids"][inputs["assistant_masks"].bool()]
        assert gemma3n_processor.decode(spoken) == "hello"
        assert int((inputs["input_ids"] == gemma3n_processor.tokenizer.bos_token_id).sum()) == 1
    # A control token that the user typed takes no place of its own.
    typed = messages({"type": "image", "image": picture()}, text_part("<eos>"), answer="hello")
    for tool, mark in ((gemma3n_processor, IMAGE), (gemma3n_processor.tokenizer, "")):
        inputs = tool.apply_chat_template(
            typed, chat_template=template.replace(IMAGE + "q", mark + "{{ m.content[1].text }}"), tokenize=True,
            return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt",
        )  # fmt: skip
        assert tool.decode(inputs["input_ids"][inputs["assistant_masks"].bool()]) == "hello"
    with pytest.raises(InputError, match="return_dict=True"):
        gemma3n_processor.apply_chat_template(chat, return_assistant_tokens_mask=True)


def test_the_tokenizer_knows_chats_of_its_own(gemma3n_tokenizer: GemmaTokenizer) -> None:
    with pytest.raises(InputError, match="no chat template"):
        gemma3n_tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    gemma3n_tokenizer.chat_template = {"default": "{{ bos_token }}{{ messages[0].content }}", "other": "x"}
    out = gemma3n_tokenizer.apply_chat_template([{"role": "user", "content": "the <eos>"}])
    assert out["input_ids"].count(2) == 1 and 1 not in out["input_ids"]
    assert gemma3n_tokenizer.decode(out["input_ids"]) == "<bos>the <eos>"
    assert (
        gemma3n_tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template="other", tokenize=False)
        == "x"
    )
    gemma3n_tokenizer.chat_template = {"one": "a", "two": "b"}
    with pytest.raises(InputError, match="one, two"):
        gemma3n_tokenizer.get_chat_template()


def test_everything_that_is_typed_can_be_made_plain(gemma3n_processor: Gemma3nProcessor) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools[0].name }}{{ tone }}{{ documents[0].text }}"
    chat = [{"role": "system", "content": "<eos>"}]
    more = {"tools": [{"name": "<bos>"}], "documents": [{"text": "[M]<pad>"}], "tone": "<unk>"}
    for tool in (gemma3n_processor, gemma3n_processor.tokenizer):
        options = {
            "chat_template": template,
            "tokenize": True,
            "return_dict": False,
            "add_special_tokens": False,
            **more,
        }
        options = {name: options[name] for name in options if name != "add_special_tokens" or tool is gemma3n_processor}
        plain = torch.tensor(tool.apply_chat_template(chat, sanitize_control_tokens=True, **options)).flatten().tolist()
        assert not set(plain) & set(gemma3n_processor.tokenizer.all_special_ids)
        assert gemma3n_processor.decode(plain) == "<eos><bos><unk>[M]<pad>"
        partly = torch.tensor(tool.apply_chat_template(chat, **options)).flatten().tolist()
        assert partly[:2] == [1, 2]


def test_a_typed_token_that_cannot_be_written_otherwise_is_refused(backend_of: Any) -> None:
    backend = backend_of(["h"])
    tokenizer = GemmaTokenizer(tokenizer_object=backend, chat_template="{{ messages[0].content }}")
    with pytest.raises(InputError, match="'h' cannot be written as plain text"):
        tokenizer.apply_chat_template([{"role": "user", "content": "oh"}])
    with pytest.raises(InputError, match="without text_pair"):
        tokenizer(f"a{TYPED_START}b", "c", sanitize_control_tokens=True)


def test_a_typed_token_counts_as_its_letters_when_a_text_is_cut(gemma3n_tokenizer: GemmaTokenizer) -> None:
    text = f"a{TYPED_START}<eos>{TYPED_END}b"
    whole = gemma3n_tokenizer(text, sanitize_control_tokens=True)["input_ids"]
    cut = gemma3n_tokenizer(text, sanitize_control_tokens=True, truncation=True, max_length=4)["input_ids"]
    assert len(whole) == 8 and cut == whole[:4]


# ------------------------------------------------------------------------------------------------ files


def test_everything_is_saved_and_read_again(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], clip: Callable[..., Any], tmp_path: Path
) -> None:
    gemma3n_processor.chat_template = "{{ bos_token }}mine"
    gemma3n_processor.save_pretrained(tmp_path)
    again = Gemma3nProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == gemma3n_processor.to_dict()
    assert (again.audio_seq_length, again.image_seq_length, again.chat_template) == (3, 4, "{{ bos_token }}mine")
    call = {"text": f"{IMAGE}{SOUND}", "images": picture(), "audio": clip(), "return_tensors": "pt"}
    for name, value in gemma3n_processor(**call).items():
        assert value.equal(again(**call)[name]), name
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Gemma3nProcessor"
    assert Gemma3nProcessor.from_pretrained(tmp_path, image_seq_length=7).image_seq_length == 7


def test_the_older_layout_with_one_file_for_both_extractors_is_read(
    gemma3n_processor: Gemma3nProcessor, picture: Callable[..., Any], tmp_path: Path
) -> None:
    gemma3n_processor.save_pretrained(tmp_path, legacy_format=True)
    assert not (tmp_path / "processor_config.json").exists()
    (tmp_path / "processor_config.json").write_text('{"audio_seq_length": 5, "processor_class": "Gemma3nProcessor"}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    again = Gemma3nProcessor.from_pretrained(tmp_path)
    assert (again.audio_seq_length, again.image_seq_length, again.chat_template) == (5, 256, "old")
    assert again.feature_extractor.feature_size == 16 and again.image_processor.size == {"height": 32, "width": 32}


def test_a_part_alone_is_found_by_its_class(gemma3n_processor: Gemma3nProcessor, tmp_path: Path) -> None:
    gemma3n_processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (len(again), again("a b").input_ids) == (
        len(gemma3n_processor.tokenizer),
        gemma3n_processor.tokenizer("a b").input_ids,
    )
    gemma3n_processor.image_processor.save_pretrained(tmp_path / "pictures")
    assert AutoImageProcessor.from_pretrained(tmp_path / "pictures").to_dict() == (
        gemma3n_processor.image_processor.to_dict()
    )


def test_missing_and_wrong_parts_are_named(gemma3n_processor: Gemma3nProcessor, tmp_path: Path) -> None:
    parts = (gemma3n_processor.image_processor, gemma3n_processor.feature_extractor, gemma3n_processor.tokenizer)
    with pytest.raises(TypeError, match="feature_extractor is a SiglipImageProcessor"):
        Gemma3nProcessor(*parts)
    bare = GemmaTokenizer(vocab={"a": 0}, merges=[])
    with pytest.raises(ConfigError, match="no image_token, boi_token"):
        Gemma3nProcessor(parts[1], parts[0], bare)
    gemma3n_processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="feature_extractor"):
        Gemma3nProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_is_made_from_pieces(gemma3n_tokenizer: GemmaTokenizer) -> None:
    made = GemmaTokenizer(vocab=gemma3n_tokenizer.get_vocab(), merges=["h e", "he l", "l o", "hel lo"])
    assert made.tokenize("hello é") == ["hello", "▁", "<0xC3>", "<0xA9>"]
    assert made("hello")["input_ids"][0] == made.bos_token_id and made.padding_side == "left"
    both = GemmaTokenizer(vocab=made.get_vocab(), merges=[], add_bos_token=False, add_eos_token=True)
    assert both("a")["input_ids"][-1] == both.eos_token_id and both("a")["input_ids"][0] != both.bos_token_id
    with pytest.raises(InputError, match="vocab="):
        GemmaTokenizer()
    with pytest.raises(ConfigError, match="do not make a tokenizer"):
        GemmaTokenizer(vocab={"a": 0}, merges=["x y"])


def test_more_than_thirty_seconds_are_never_cut_silently(
    gemma3n_processor: Gemma3nProcessor, clip: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        gemma3n_processor(text=SOUND, audio=clip(31.0))
    assert "is cut" in caplog.text
