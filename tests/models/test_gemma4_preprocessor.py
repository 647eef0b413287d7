"""Gemma4CausalLMPreprocessor: packing, labels and weights, places of media, times of frames, limits, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.errors import CheckpointNotFoundError, ConfigError, InputError, PlaceholderError
from audiomm.feature_extraction.audio_converter import Gemma4AudioConverter
from audiomm.models.gemma4.packing import indices_of, shares
from audiomm.models.gemma4.preprocessor import Gemma4CausalLMPreprocessor
from audiomm.models.gemma4.processing import Gemma4Processor, Gemma4UnifiedProcessor
from audiomm.models.gemma4.tokenizer import GemmaTokenizer

Maker = Callable[..., np.ndarray]


def ids(tokenizer: GemmaTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def text_only(gemma4_tokenizer: GemmaTokenizer) -> Gemma4CausalLMPreprocessor:
    return Gemma4CausalLMPreprocessor(
        gemma4_tokenizer, sequence_length=8, max_images_per_prompt=0, num_vision_tokens_per_image=0
    )


@pytest.fixture
def everything(gemma4_processor: Gemma4Processor) -> Gemma4CausalLMPreprocessor:
    return Gemma4CausalLMPreprocessor(
        gemma4_processor.tokenizer,
        gemma4_processor.image_processor,
        gemma4_processor.feature_extractor,
        gemma4_processor.video_processor,
        sequence_length=500,
        num_vision_tokens_per_image=70,
        max_audio_clips_per_prompt=2,
        num_frames_per_video=3,
    )


# ------------------------------------------------------------------------------------------------ text


def test_a_row_is_start_prompt_response_end_and_padding(
    text_only: Gemma4CausalLMPreprocessor, gemma4_tokenizer: GemmaTokenizer
) -> None:
    prompt, response = ids(gemma4_tokenizer, "hello"), ids(gemma4_tokenizer, "he")
    x, y, weight = text_only({"prompts": ["hello"] * 2, "responses": ["he"] * 2})
    row = [2, *prompt, *response, 1]
    assert len(prompt) == len(response) == 1
    assert set(x) == {"token_ids", "padding_mask", "position_ids"}
    assert x["token_ids"].tolist() == [row + [0] * 4] * 2
    assert x["padding_mask"].tolist() == [[True] * 4 + [False] * 4] * 2
    assert x["position_ids"].tolist() == [list(range(8))] * 2
    assert y.tolist() == [row[1:] + [0] * 5] * 2
    assert weight.tolist() == [[False, True, True] + [False] * 5] * 2
    assert (x["token_ids"].dtype, y.dtype, weight.dtype) == (torch.int64, torch.int64, torch.bool)


def test_without_start_and_end_tokens(gemma4_tokenizer: GemmaTokenizer) -> None:
    bare = Gemma4CausalLMPreprocessor(gemma4_tokenizer, sequence_length=4, add_start_token=False, add_end_token=False)
    x, y, weight = bare({"prompts": ["hello"], "responses": ["he"]})
    both = [*ids(gemma4_tokenizer, "hello"), *ids(gemma4_tokenizer, "he")]
    assert x["token_ids"].tolist() == [[*both, 0, 0]]
    assert y.tolist() == [[both[1], 0, 0, 0]] and weight.tolist() == [[True, False, False, False]]


def test_one_prompt_comes_out_without_the_batch_axis(text_only: Gemma4CausalLMPreprocessor) -> None:
    x, y, weight = text_only({"prompts": "hello", "responses": "he"}, sequence_length=5)
    assert x["token_ids"].shape == y.shape == weight.shape == (5,)
    batch = text_only({"prompts": ["hello"], "responses": ["he"]}, sequence_length=5)
    assert batch[0]["token_ids"][0].equal(x["token_ids"])


def test_a_prompt_that_begins_with_the_start_token_gets_no_second(text_only: Gemma4CausalLMPreprocessor) -> None:
    one = text_only.generate_preprocess("<bos>hello")["token_ids"]
    assert one.equal(text_only.generate_preprocess("hello")["token_ids"])


def test_long_texts_share_the_row_in_turns(text_only: Gemma4CausalLMPreprocessor) -> None:
    x, y, weight = text_only({"prompts": "a" * 20, "responses": "b" * 20}, sequence_length=9)
    # 10 places: start, end, four of each text.
    assert x["token_ids"].tolist()[:1] == [2] and y.tolist()[-1] == 1
    assert weight.tolist() == [False] * 4 + [True] * 5
    assert [shares(pair, 7) for pair in ([10, 10], [2, 10], [10, 2], [3, 4], [0, 9])] == [
        [4, 3], [2, 5], [5, 2], [3, 4], [0, 7],
    ]  # fmt: skip


def test_generation_gets_rows_without_labels_and_continues_responses(text_only: Gemma4CausalLMPreprocessor) -> None:
    x = text_only.generate_preprocess("hello")
    assert set(x) == {"token_ids", "padding_mask"} and x["token_ids"].shape == (8,)
    assert x["padding_mask"].sum() == 2
    more = text_only.generate_preprocess({"prompts": ["hello"], "responses": ["he"]}, sequence_length=6)
    assert more["token_ids"].shape == (1, 6) and more["padding_mask"].sum() == 3


def test_generated_rows_become_text(text_only: Gemma4CausalLMPreprocessor, gemma4_tokenizer: GemmaTokenizer) -> None:
    row = ids(gemma4_tokenizer, "<bos>hello the <|image><|image|><|image|><image|><|audio><|audio|><audio|><eos>")
    entry = {"token_ids": torch.tensor([*row, 0, 0]), "padding_mask": torch.tensor([True] * len(row) + [False] * 2)}
    assert text_only.generate_postprocess(entry) == "hello the <|image>"
    batch = {name: value[None] for name, value in entry.items()}
    assert text_only.generate_postprocess(batch) == ["hello the <|image>"]
    assert text_only.generate_postprocess(text_only.generate_preprocess("the he")) == "the he"
    with pytest.raises(InputError, match="'padding_mask'"):
        text_only.generate_postprocess({"token_ids": row})


def test_marks_of_turns_stay_in_the_text_though_they_are_special(gemma4_tokenizer: GemmaTokenizer) -> None:
    turns = ["<|turn>", "<turn|>", "<|channel>", "<channel|>"]
    gemma4_tokenizer.add_special_tokens({"additional_special_tokens": turns}, replace_extra_special_tokens=False)
    assert set(turns) <= set(gemma4_tokenizer.all_special_tokens)
    preprocessor = Gemma4CausalLMPreprocessor(gemma4_tokenizer)
    chat = "<|turn>user\nhello<turn|>\n<|turn>model\n<|channel>he<channel|>the<turn|>"
    assert preprocessor.generate_postprocess(preprocessor.generate_preprocess(chat + "<eos>")) == chat


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"prompts": ["a", "b"], "responses": [""]}, "2 prompts but 1 responses"),
        ({"prompts": ["a"]}, "'prompts' and 'responses' are needed"),
        ("a", "a dictionary with 'prompts' and 'responses' is needed; got a str"),
        ({"prompts": ["a"], "responses": ["b"], "audio": [np.zeros(9)]}, "is text-only, but audio"),
        ({"prompts": ["a"], "responses": ["b"], "images": [np.zeros((2, 2, 3))]}, "is text-only, but images"),
    ],
)
def test_what_a_text_only_preprocessor_cannot_use_is_told(
    text_only: Gemma4CausalLMPreprocessor, x: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        text_only(x)


# ------------------------------------------------------------------------------------------------ media


def test_all_media_in_one_batch_have_exact_counts_in_reading_order(
    everything: Gemma4CausalLMPreprocessor, picture: Maker, clip: Maker, movie: Maker
) -> None:
    x, _, weight = everything(
        {
            "prompts": ["a <|video|> b <|audio|> <|image|>", "<|image|><|image|>", "none"],
            "responses": ["yes", "no", ""],
            "images": [picture(), [picture(30, 30), picture(20, 50)], None],
            "audio": [[clip()], None, None],
            "videos": [movie(3), None, None],
        }
    )
    tokenizer = everything.tokenizer
    for row in range(3):
        tokens = x["token_ids"][row]
        vision = (tokens == tokenizer.image_token_id) | (tokens == tokenizer.video_token_id)
        assert vision.equal(x["vision_mask"][row])
        places = vision.nonzero()[:, 0]
        assert x["vision_indices"][row, : len(places)].equal(places)
        assert not x["vision_indices"][row, len(places) :].any()
        # As many tokens as the pictures and frames of this row have pooled patches.
        assert len(places) == int((x["pixel_position_ids"][row] >= 0).all(-1).sum()) // 9
        heard = (tokens == tokenizer.audio_token_id).nonzero()[:, 0]
        frames = int(x["audio_mel_mask"][row].sum())
        assert len(heard) == ((frames + 1) // 2 + 1) // 2 and x["audio_indices"][row, : len(heard)].equal(heard)
    assert x["pixel_values"].shape[:2] == (3, 4) and x["audio_mel"].shape[:2] == (3, 1)
    # Three frames of 70 are the usual width; this batch needs more.
    assert x["vision_indices"].shape[1] == x["vision_mask"].sum(1).max() == 240
    frame = everything.video_converter([movie(3)], return_tensors="pt")["pixel_values_videos"][0]
    assert x["pixel_values"][0, 0, : frame.shape[0]].equal(frame)
    still = everything.image_converter([picture()], return_tensors="pt")["pixel_values"][0]
    assert x["pixel_values"][0, 3, : still.shape[0]].equal(still)
    # The empty response has only its end.
    assert weight.sum(1).tolist() == [len(ids(tokenizer, "yes")) + 1, len(ids(tokenizer, "no")) + 1, 1]


def test_entries_without_media_are_empty(everything: Gemma4CausalLMPreprocessor) -> None:
    x, _, _ = everything({"prompts": ["a"], "responses": ["b"]})
    assert x["pixel_values"].shape == (1, 0, 0, 48) and x["pixel_position_ids"].shape == (1, 0, 0, 2)
    assert x["audio_mel"].shape == (1, 0, 1, 128) and x["audio_indices"].shape == (1, 0)
    assert not x["vision_mask"].any() and not x["audio_mask"].any()


def test_a_converter_of_keras_hub_is_taken(gemma4_tokenizer: GemmaTokenizer, clip: Maker) -> None:
    batch = {"prompts": ["a <|audio|>"], "responses": ["x"], "audio": [np.tile(clip(), 3)]}
    converter = Gemma4AudioConverter(mel_floor=1e-3)
    found, wanted = (
        Gemma4CausalLMPreprocessor(gemma4_tokenizer, audio_converter=each, sequence_length=200)(batch)[0]
        for each in (converter, converter.extractor)
    )
    assert all(found[name].equal(wanted[name]) for name in wanted)
    short = Gemma4CausalLMPreprocessor(gemma4_tokenizer, audio_converter=Gemma4AudioConverter(max_audio_length=1))
    assert int(short({**batch, "audio": [np.zeros(40_000)]})[0]["audio_mask"].sum()) == 25


def test_mel_frames_made_before_are_taken(everything: Gemma4CausalLMPreprocessor, clip: Maker) -> None:
    batch: dict[str, Any] = {"prompts": ["a <|audio|> b", "c"], "responses": ["x", "y"]}
    wanted = everything({**batch, "audio": [clip(), None]})[0]
    made = {name: wanted[name] for name in ("audio_mel", "audio_mel_mask")}
    tokens = int(wanted["audio_mask"].sum())
    expanded = "<|audio>" + "<|audio|>" * tokens + "<audio|>"
    for prompt in (batch["prompts"][0], f"a {expanded} b"):
        found = everything({**batch, "prompts": [prompt, "c"], **made})[0]
        assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in found)
    alone = everything({"prompts": "a <|audio|> b", "responses": "x", **{name: made[name][0] for name in made}})[0]
    assert alone["token_ids"].equal(wanted["token_ids"][0]) and alone["audio_mel"].equal(wanted["audio_mel"][0])
    with pytest.raises(PlaceholderError, match=f"holds 2 of the mark .* of 1 clips, {tokens} tokens"):
        everything({**batch, "prompts": ["<|audio|> <|audio|>", "c"], **made})
    with pytest.raises(InputError, match="'audio_mel' needs 'audio_mel_mask'"):
        everything({**batch, "audio_mel": made["audio_mel"]})
    with pytest.raises(InputError, match="audio_mel of shape"):
        everything({**batch, **made, "audio_mel": made["audio_mel"][0]})
    with pytest.raises(InputError, match="1 prompts but audio_mel for 2"):
        everything({"prompts": ["a <|audio|>"], "responses": ["x"], **made})


def test_features_made_before_are_taken(
    everything: Gemma4CausalLMPreprocessor, gemma4_tokenizer: GemmaTokenizer
) -> None:
    few = Gemma4CausalLMPreprocessor(
        gemma4_tokenizer, everything.image_converter, sequence_length=20, num_vision_tokens_per_image=5
    )
    made = {"pixel_values": np.ones((1, 2, 1, 48)), "pixel_position_ids": np.ones((1, 2, 1, 2))}
    x, _, weight = few({"prompts": ["hello <|image|>"], "responses": ["he"], **made})
    first = 1 + len(ids(gemma4_tokenizer, "hello ")) + 1
    assert x["vision_indices"].tolist() == [[*range(first, first + 5), 0, 0, 0, 0, 0]]
    assert x["pixel_values"].shape == (1, 2, 1, 48)
    assert weight[0].nonzero()[:, 0].tolist() == [first + 5, first + 6]
    one = few.generate_preprocess({"prompts": "hello <|image|>", **{name: value[0] for name, value in made.items()}})
    assert one["pixel_values"].shape == (2, 1, 48) and one["vision_mask"].sum() == 5
    exact = {"pixel_values": np.ones((1, 1, 18, 48)), "pixel_position_ids": np.ones((1, 1, 18, 2))}
    assert few({"prompts": ["<|image|>"], "responses": [""], **exact})[0]["vision_mask"].sum() == 2
    with pytest.raises(InputError, match="pixel_position_ids"):
        few({"prompts": ["<|image|>"], "responses": [""], "pixel_values": made["pixel_values"]})
    with pytest.raises(PlaceholderError, match="3 marks of pictures but pixel_values of 2"):
        few({"prompts": ["<|image|>" * 3], "responses": [""], **made})
    with pytest.raises(InputError, match="2 prompts but pixel_values for 1"):
        few({"prompts": ["a", "b"], "responses": ["", ""], **made})


def test_every_picture_can_have_a_fixed_number_of_tokens(
    everything: Gemma4CausalLMPreprocessor, picture: Maker
) -> None:
    padded = Gemma4CausalLMPreprocessor(
        everything.tokenizer, everything.image_converter, sequence_length=200, num_vision_tokens_per_image=70,
        pad_images_to=70,
    )  # fmt: skip
    x, _, _ = padded({"prompts": "<|image|>", "responses": "", "images": picture()})
    assert x["vision_mask"].sum() == 70


@pytest.mark.parametrize("where", ["attribute", "argument"])
def test_frames_of_irregular_times_are_stamped(
    everything: Gemma4CausalLMPreprocessor, movie: Maker, where: str
) -> None:
    told = [{"frames_indices": [0, 8, 300, 1950], "fps": 30.0}]
    call = {"prompts": ["<|video|>"], "responses": [""], "videos": [movie(4)]}
    if where == "attribute":
        everything.video_metadata = told
        x, _, _ = everything(call)
        everything.video_metadata = None
    else:
        x, _, _ = everything(call, video_metadata=told)
    text = everything.tokenizer.decode(x["token_ids"][0][~x["vision_mask"][0] & x["padding_mask"][0]])
    stamped = " ".join(f"{time} <|image><image|>" for time in ("00:00", "00:00", "00:10", "01:05"))
    assert text == f"<bos>{stamped}<eos>"
    assert x["pixel_values"].shape[1] == 4


def test_frames_without_times_count_on_at_the_rate_of_the_preprocessor(
    everything: Gemma4CausalLMPreprocessor, movie: Maker
) -> None:
    everything.video_fps = 0.5
    x = everything.generate_preprocess({"prompts": "<|video|>", "videos": movie(6)})
    text = everything.tokenizer.decode(x["token_ids"][~x["vision_mask"] & x["padding_mask"]])
    assert text == "<bos>00:00 <|image><image|> 00:02 <|image><image|> 00:04 <|image><image|>"
    short = everything.generate_preprocess({"prompts": "<|video|>", "videos": movie(6)}, video_metadata={
        "frames_indices": [0, 1, 2, 3, 4, 5]})  # fmt: skip
    assert "00:10 " in everything.generate_postprocess(short)


def test_a_video_mark_without_a_video_keeps_its_place(everything: Gemma4CausalLMPreprocessor) -> None:
    x = everything.generate_preprocess("<|video|>")
    assert x["vision_mask"].sum() == 3 * 70 and x["pixel_values"].shape[0] == 0


@pytest.mark.parametrize(
    ("prompt", "media", "error", "words"),
    [
        ("<|image|>" * 3, {"images": 3}, InputError, "3 pictures; max_images_per_prompt=2"),
        ("<|audio|>" * 3, {"audio": 3}, InputError, "3 clips; max_audio_clips_per_prompt=2"),
        ("<|image|>", {"images": 2}, PlaceholderError, "1 of the mark <|image|> but 2 images"),
        ("<|image|>", {}, PlaceholderError, "1 of the mark <|image|>, but nothing was passed"),
        ("<|audio|>", {}, PlaceholderError, r"1 of the mark <|audio|>, but nothing"),
        ("", {"audio": 1}, PlaceholderError, r"0 of the mark <|audio|> but 1 clips"),
    ],
)
def test_limits_and_counts_are_kept(
    everything: Gemma4CausalLMPreprocessor,
    picture: Maker,
    clip: Maker,
    prompt: str,
    media: dict[str, int],
    error: type[Exception],
    words: str,
) -> None:
    made = {"images": picture, "audio": clip}
    x = {name: [[made[name]() for _ in range(count)]] for name, count in media.items()}
    with pytest.raises(error, match=words.replace("|", r"\|")):
        everything({"prompts": [prompt], "responses": ["a"], **x})


def test_a_block_of_media_is_never_cut(everything: Gemma4CausalLMPreprocessor, picture: Maker) -> None:
    call = {"prompts": ["hello <|image|> " + "a" * 60], "responses": ["b" * 20], "images": [picture()]}
    x, _, weight = everything(call, sequence_length=100)
    assert x["vision_mask"].sum() == 60 and weight.sum() == 21
    with pytest.raises(PlaceholderError, match="of 61 tokens but only 39 are left for the prompt"):
        everything(call, sequence_length=60)


def test_media_are_given_for_each_prompt(everything: Gemma4CausalLMPreprocessor, picture: Maker) -> None:
    with pytest.raises(InputError, match="2 prompts but media for 1"):
        everything({"prompts": ["<|image|>", "a"], "responses": ["", ""], "images": [picture()]})
    both = {"prompts": ["<|image|>", "<|image|>"], "responses": ["", ""]}
    stacked = everything({**both, "images": np.stack([picture(), picture(seed=1)])})[0]
    listed = everything({**both, "images": [[picture()], [picture(seed=1)]]})[0]
    assert all(stacked[name].equal(listed[name]) for name in stacked)
    several = np.stack([np.stack([picture(), picture(seed=1)])])
    x, _, _ = everything({"prompts": ["<|image|><|image|>"], "responses": [""], "images": several})
    assert x["pixel_values"].shape[:2] == (1, 2)


def test_the_only_prompt_of_a_batch_takes_its_medium_as_it_is(
    everything: Gemma4CausalLMPreprocessor, picture: Maker, clip: Maker
) -> None:
    frames = np.stack([picture(seed=seed) for seed in range(4)])
    for mark, name, medium in (
        ("<|image|>", "images", picture()),
        ("<|audio|>", "audio", clip()),
        ("<|audio|>", "audio", clip().tolist()),
        ("<|video|>", "videos", frames),
        ("<|video|>", "videos", list(frames)),
    ):
        texts = {"prompts": [f"a {mark} b"], "responses": ["c"]}
        found, listed = everything({**texts, name: medium})[0], everything({**texts, name: [medium]})[0]
        assert all(found[entry].equal(listed[entry]) for entry in listed)
    with pytest.raises(InputError, match="2 prompts but media for"):
        everything({"prompts": ["<|audio|>"] * 2, "responses": [""] * 2, "audio": clip()})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequence_length": 560}, "sequence_length=560 is not more than max_images_per_prompt=2 x"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"video_fps": 0.0}, "video_fps=0.0"),
        ({"num_frames_per_video": 1.5}, "num_frames_per_video=1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    everything: Gemma4CausalLMPreprocessor, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Gemma4CausalLMPreprocessor(everything.tokenizer, everything.image_converter, **settings)


def test_a_picture_above_the_bound_is_refused(everything: Gemma4CausalLMPreprocessor, picture: Maker) -> None:
    few = Gemma4CausalLMPreprocessor(
        everything.tokenizer, everything.image_converter, sequence_length=300, num_vision_tokens_per_image=10
    )
    with pytest.raises(InputError, match="60 tokens but num_vision_tokens_per_image=10"):
        few({"prompts": "<|image|>", "responses": "", "images": picture()})


def test_a_preprocessor_comes_from_a_checkpoint(
    gemma4_processor: Gemma4Processor, tmp_path: Path, picture: Maker
) -> None:
    gemma4_processor.save_pretrained(tmp_path)
    made = Gemma4CausalLMPreprocessor.from_preset(
        tmp_path, sequence_length=200, max_images_per_prompt=1, num_vision_tokens_per_image=70
    )
    assert made.audio_converter is not None and made.sequence_length == 200
    assert (made.num_frames_per_video, made.num_vision_tokens_per_frame) == (3, 70)  # the folder's
    assert Gemma4CausalLMPreprocessor.from_preset(tmp_path, num_frames_per_video=5).num_frames_per_video == 5
    assert made.generate_preprocess({"prompts": "<|image|>", "images": picture()})["vision_mask"].sum() == 60
    assert set(Gemma4CausalLMPreprocessor.presets) >= {"gemma4_2b", "gemma4_instruct_31b"}
    with pytest.raises(CheckpointNotFoundError, match="did you mean|Did you mean 'gemma4_31b'"):
        Gemma4CausalLMPreprocessor.from_preset("gemma4_31")
    with pytest.raises(CheckpointNotFoundError, match="preset of whisper"):
        Gemma4CausalLMPreprocessor.from_preset("whisper_tiny_en")


def test_indices_are_filled_up_with_zeros() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert indices_of(mask, 0).tolist() == [[1, 2], [0, 0]]
    assert indices_of(mask, 3).tolist() == [[1, 2, 0], [0, 0, 0]]


def test_the_12b_has_its_own_processor(gemma4_tokenizer: GemmaTokenizer, clip: Maker) -> None:
    unified = Gemma4CausalLMPreprocessor(
        gemma4_tokenizer, audio_converter=Gemma4UnifiedProcessor.feature_extractor_class(), sequence_length=60
    )
    x = unified.generate_preprocess({"prompts": "<|audio|>", "audio": clip(0.5)})
    assert x["audio_mask"].sum() == 13 == x["audio_mel_mask"].sum()
