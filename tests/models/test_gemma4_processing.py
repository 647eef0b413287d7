"""Gemma4Processor: exact counts, times of frames, thoughts and tools through the template, answers read back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from audiomm.base.errors import AudioLimitError, ConfigError, EmptyAudioError, InputError, PlaceholderError
from audiomm.feature_extraction.image import Gemma4UnifiedImageProcessor
from audiomm.feature_extraction.raw_frames import Gemma4UnifiedAudioFeatureExtractor
from audiomm.feature_extraction.video import Gemma4UnifiedVideoProcessor
from audiomm.models.gemma4.answer import parse_answer
from audiomm.models.gemma4.config import Gemma4AudioConfig
from audiomm.models.gemma4.processing import Gemma4Processor, Gemma4UnifiedProcessor, time_stamp
from audiomm.models.gemma4.tokenizer import GemmaTokenizer

Maker = Callable[..., np.ndarray]
IMAGE, SOUND, VIDEO = "<|image|>", "<|audio|>", "<|video|>"


def shown(processor: Gemma4Processor, inputs: Any) -> list[str]:
    """Texts with runs of media tokens written as their number."""
    texts = []
    for text in processor.batch_decode(inputs["input_ids"]):
        for mark in (IMAGE, SOUND, VIDEO):
            while mark in text:
                start = text.index(mark)
                count = 0
                while text.startswith(mark, start + count * len(mark)):
                    count += 1
                text = text[:start] + f"({count})" + text[start + count * len(mark) :]
        texts.append(text.replace("<pad>", ""))
    return texts


def test_clips_need_the_mask_that_counts_them(gemma4_processor: Gemma4Processor, clip: Maker) -> None:
    with pytest.raises(InputError, match="return_attention_mask=False leaves out input_features_mask"):
        gemma4_processor(text=SOUND, audio=clip(), audio_kwargs={"return_attention_mask": False})


def test_every_medium_costs_what_it_has(
    gemma4_processor: Gemma4Processor, picture: Maker, clip: Maker, movie: Maker
) -> None:
    inputs = gemma4_processor(
        text=[f"{SOUND} {IMAGE} {VIDEO} {IMAGE}", f"{IMAGE}"],
        images=[[picture(), picture(9, 90)], [picture(50, 50)]],
        audio=[clip(0.5)],
        videos=[[movie(5)], []],
        videos_kwargs={"video_metadata": [{"fps": 0.1}]},
        return_tensors="pt",
    )
    counts = gemma4_processor.image_processor([picture(), picture(9, 90), picture(50, 50)])["num_soft_tokens_per_image"]
    frames = gemma4_processor.video_processor([movie(5)])["num_soft_tokens_per_video"][0]
    times = " ".join(f"{time} <|image>({frames})<image|>" for time in ("00:00", "00:10", "00:30"))
    heard = Gemma4AudioConfig().audio_tokens(int(inputs["input_features_mask"][0].sum()))
    assert shown(gemma4_processor, inputs) == [
        f"<bos><|audio>({heard})<audio|> <|image>({counts[0]})<image|> {times} <|image>({counts[1]})<image|>",
        f"<bos><|image>({counts[2]})<image|>",
    ]
    types = inputs["mm_token_type_ids"]
    assert [(types == kind).sum().item() for kind in (1, 2, 3)] == [sum(counts), 3 * frames, heard]
    assert inputs["num_frames_per_video"].tolist() == [3]
    assert not {"num_soft_tokens_per_image", "num_soft_tokens_per_video", "video_metadata"} & set(inputs)
    assert set(inputs) <= set(gemma4_processor.model_input_names) | {"input_features_mask"}


def test_a_clip_of_more_tokens_than_the_model_was_made_for_is_refused(
    gemma4_processor: Gemma4Processor, clip: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemma4_processor, "audio_seq_length", 5)
    with pytest.raises(AudioLimitError, match="clip 0 lasts 0.5 s and has 13 tokens; at most 5 are accepted"):
        gemma4_processor(text=SOUND, audio=clip(0.5))


@pytest.mark.parametrize("samples", [400, 1600, 8000, 12345])
def test_the_tokens_of_a_clip_are_those_of_its_features(gemma4_processor: Gemma4Processor, samples: int) -> None:
    inputs = gemma4_processor(text=SOUND, audio=np.zeros(samples, np.float32), return_tensors="pt")
    halves = inputs["input_features_mask"][0][::2][::2].sum().item()
    assert inputs["input_ids"][0].tolist().count(gemma4_processor.audio_token_id) == halves


def test_budgets_and_irregular_frame_times_are_told_by_call(
    gemma4_processor: Gemma4Processor, picture: Maker, movie: Maker
) -> None:
    few = gemma4_processor(text=IMAGE, images=picture(), max_soft_tokens=70)["input_ids"][0]
    many = gemma4_processor(text=IMAGE, images=picture(), images_kwargs={"max_soft_tokens": 140})["input_ids"][0]
    assert few.count(gemma4_processor.image_token_id) <= 70 < many.count(gemma4_processor.image_token_id) <= 140
    inputs = gemma4_processor(
        text=VIDEO,
        videos=movie(3),
        videos_kwargs={"video_metadata": [{"timestamps": [0.0, 61.5, 3665.0]}], "do_sample_frames": False},
        return_tensors="pt",
        return_metadata=True,
    )
    text = shown(gemma4_processor, inputs)[0]
    assert [text.index(stamp) for stamp in ("00:00 ", "01:01 ", "61:05 ")] == sorted(
        text.index(stamp) for stamp in ("00:00 ", "01:01 ", "61:05 ")
    )
    assert inputs["video_metadata"][0].timestamps == [0.0, 61.5, 3665.0]


def test_a_video_that_does_not_tell_its_rate_is_taken_at_24_and_says_so(
    gemma4_processor: Gemma4Processor, movie: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            inputs = gemma4_processor(text=VIDEO, videos=movie(3), return_tensors="pt")
        assert "24.0 is taken" in caplog.text
    assert shown(gemma4_processor, inputs)[0].count("00:00 ") == 3


def test_seconds_are_written_as_minutes_and_seconds() -> None:
    assert [time_stamp(seconds) for seconds in (0, 59.99, 60, 3665)] == ["00:00", "00:59", "01:00", "61:05"]


def test_texts_are_padded_unless_told_otherwise(gemma4_processor: Gemma4Processor) -> None:
    assert len({len(row) for row in gemma4_processor(text=["a", "hello the"])["input_ids"]}) == 1
    assert len({len(row) for row in gemma4_processor(text=["a", "hello the"], padding=False)["input_ids"]}) == 2
    plain = gemma4_processor(text="a", return_mm_token_type_ids=False)
    assert "mm_token_type_ids" not in plain


def test_a_model_that_does_not_listen_refuses_audio(
    gemma4_processor: Gemma4Processor, clip: Maker, tmp_path: Path
) -> None:
    deaf = Gemma4Processor(
        None, gemma4_processor.image_processor, gemma4_processor.tokenizer, gemma4_processor.video_processor
    )
    with pytest.raises(InputError, match="1 clips were passed, but this Gemma4Processor has no feature_extractor"):
        deaf(text=SOUND, audio=clip())
    deaf.save_pretrained(tmp_path)
    again = Gemma4Processor.from_pretrained(tmp_path)
    assert again.feature_extractor is None and again.video_processor.num_frames == 3


def test_a_clip_of_nothing_is_refused(gemma4_processor: Gemma4Processor) -> None:
    with pytest.raises(EmptyAudioError):
        gemma4_processor(text=SOUND, audio=np.zeros(80, np.float32))


@pytest.mark.parametrize("name", ["images", "audio", "videos"])
def test_marks_without_media_are_an_error(gemma4_processor: Gemma4Processor, name: str) -> None:
    mark = {"images": IMAGE, "audio": SOUND, "videos": VIDEO}[name]
    with pytest.raises(PlaceholderError, match=r"1 of the mark .* but 0"):
        gemma4_processor(text=f"a {mark}")


def test_a_vocabulary_without_media_tokens_is_named(gemma4_processor: Gemma4Processor, backend_of: Any) -> None:
    bare = GemmaTokenizer(tokenizer_object=backend_of([]))
    assert bare.video_token is None and len(bare) == len(backend_of([]).get_vocab())
    with pytest.raises(ConfigError, match="no image_token, boi_token, eoi_token for image_processor"):
        Gemma4Processor(None, gemma4_processor.image_processor, bare, None)


def vocabulary(names: dict[int, str]) -> Tokenizer:
    """300 pieces with these names at these ids, the others not used."""
    pieces = {names.get(number, f"<unused{number}>"): number for number in range(300)}
    return Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))


def test_the_video_token_has_its_published_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published vocabulary on a smaller scale: `<|image|>` at 280, `<|video|>` four places on."""
    monkeypatch.setattr("audiomm.models.gemma4.tokenizer._IMAGE_ID", 280)
    monkeypatch.setattr("audiomm.models.gemma4.tokenizer._VIDEO_ID", 284)
    special = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 280: "<|image|>"}
    lacking = GemmaTokenizer(tokenizer_object=vocabulary(special), extra_special_tokens=["<|video|>"])
    having = GemmaTokenizer(tokenizer_object=vocabulary({**special, 284: "<|video|>"}))
    assert (lacking.video_token_id, len(lacking)) == (having.video_token_id, len(having)) == (284, 300)
    assert lacking("<|video|>")["input_ids"] == [2, 284]
    with pytest.raises(ConfigError, match="284 is 'word'"):
        GemmaTokenizer(tokenizer_object=vocabulary({**special, 284: "word"}))


def test_the_processor_of_the_12b_counts_raw_frames(
    gemma4_tokenizer: GemmaTokenizer, picture: Maker, clip: Maker, movie: Maker, tmp_path: Path
) -> None:
    processor = Gemma4UnifiedProcessor(
        Gemma4UnifiedAudioFeatureExtractor(),
        Gemma4UnifiedImageProcessor(max_soft_tokens=70),
        gemma4_tokenizer,
        Gemma4UnifiedVideoProcessor(max_soft_tokens=70, num_frames=2),
    )
    processor.save_pretrained(tmp_path)
    again = Gemma4UnifiedProcessor.from_pretrained(tmp_path)
    for made in (processor, again):
        inputs = made(text=f"{SOUND}{IMAGE}", audio=clip(0.5), images=picture(), return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(made.audio_token_id) == int(inputs["input_features_mask"].sum()) == 13
        assert ids.count(made.image_token_id) == int((inputs["image_position_ids"] >= 0).all(-1).sum())
    with pytest.raises(TypeError, match="needs a Gemma4UnifiedAudioFeatureExtractor"):
        Gemma4UnifiedProcessor(Gemma4Processor.feature_extractor_class(), None, gemma4_tokenizer, None)


# ------------------------------------------------------------------------------------------------ chats

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Tells the weather<|"|>,parameters:{properties:{city:{description:'
    '<|"|>Where<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>INTEGER<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT'
    '<|"|>}}<tool|>'
)


def test_thinking_is_off_unless_asked_for(gemma4_processor: Gemma4Processor) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " hi "}]
    assert gemma4_processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )
    assert gemma4_processor.apply_chat_template(chat[1:], add_generation_prompt=True, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
    )


def test_tools_their_calls_and_results_go_through_the_template(gemma4_processor: Gemma4Processor) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "weather", "arguments": {"days": 2, "city": "Rome"}}}
    question = {"role": "user", "content": "weather?"}
    begin = f"<bos><|turn>system\n{DECLARED}<turn|>\n<|turn>user\nweather?<turn|>\n<|turn>model\n"
    called = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
    answered = '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
    by_openai = [question, {"role": "assistant", "content": None, "tool_calls": [call]},
                 {"role": "tool", "tool_call_id": "7", "content": "sunny"}]  # fmt: skip
    by_google = [question, {"role": "assistant", "tool_calls": [call],
                            "tool_responses": [{"name": "weather", "response": "sunny"}]}]  # fmt: skip
    for chat in (by_openai, by_google):
        text = gemma4_processor.apply_chat_template(
            chat, tools=[WEATHER], add_generation_prompt=True, enable_thinking=True
        )
        assert text == (begin + called + answered).replace("system\n", "system\n<|think|>\n")
    more = [*by_openai, {"role": "assistant", "content": "Sun."}, {"role": "user", "content": "thanks"}]
    assert gemma4_processor.apply_chat_template(more, tools=[WEATHER]).endswith(
        f"{called}{answered}Sun.<turn|>\n<|turn>user\nthanks<turn|>\n"
    )


def test_old_thoughts_are_left_out_and_new_ones_kept_between_calls(gemma4_processor: Gemma4Processor) -> None:
    call = {"function": {"name": "f", "arguments": {"x": [1, True, {"y": "z"}], "n": None}}}
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<|channel>thought\nold<channel|>said"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "reasoning_content": "new", "tool_calls": [call]},
    ]
    text = gemma4_processor.apply_chat_template(chat)
    assert "old" not in text and "<|turn>model\nsaid<turn|>" in text
    assert '<|channel>thought\nnew<channel|><|tool_call>call:f{n:None,x:[1,true,{y:<|"|>z<|"|>}]}<tool_call|>' in text


def test_several_turns_with_media_become_one_batch_of_inputs(
    gemma4_processor: Gemma4Processor, picture: Maker, clip: Maker, movie: Maker
) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "video", "video": movie(3)}, {"type": "audio", "audio": clip()},
                                     {"type": "image", "image": picture(50, 50)}]},
    ]  # fmt: skip
    inputs = gemma4_processor.apply_chat_template(
        [chat, chat[:1]], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"videos_kwargs": {"video_metadata": [{"fps": 1.0}]}},
    )  # fmt: skip
    assert inputs["input_ids"].shape[0] == 2 and inputs["pixel_values"].shape[0] == 3
    assert "00:02 <|image>" in shown(gemma4_processor, inputs)[0]
    assert inputs["input_ids"][:, -1].unique().numel() == 1
    by_itself = gemma4_processor.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True)
    assert [token for token in inputs["input_ids"][1].tolist() if token] == by_itself[0]


def test_a_url_of_a_video_is_refused(gemma4_processor: Gemma4Processor) -> None:
    chat = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "http://example.invalid/a.mp4"}}]}]
    with pytest.raises(InputError, match="URLs are not fetched"):
        gemma4_processor.apply_chat_template(chat, tokenize=True)


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("text", "prefix", "wanted"),
    [
        ("Hello.<turn|>", "", {"content": "Hello."}),
        (
            "<|channel>thought\nHm.\n<channel|>Hello.<turn|>\n<|turn>user",
            "",
            {"content": "Hello.", "reasoning_content": "Hm."},
        ),
        ("so<channel|>Yes<eos>", "<|turn>model\n<|channel>thought\n", {"content": "Yes", "reasoning_content": "so"}),
        ("Yes", "<|turn>model\n<|channel>thought\n<channel|>", {"content": "Yes"}),
        ("Yes", "<|turn>model\nold<turn|>\n<|turn>user\nq<turn|>\n", {"content": "Yes"}),
        ("<|channel>thought\nnever ends", "", {"content": "", "reasoning_content": "never ends"}),
    ],
)
def test_thoughts_and_text_are_told_apart(text: str, prefix: str, wanted: dict[str, str]) -> None:
    assert parse_answer(text, prefix) == {"role": "assistant", **wanted}


def test_calls_are_read_with_their_types() -> None:
    text = (
        'I look.<|tool_call>call:weather{city:<|"|>Rome, {IT}<|"|>,days:2,deep:{<|"|>a b<|"|>:[1.5,-2,true,null,[]]},'
        "e:{}}<tool_call|><|tool_call>call:stop{}<tool_call|><|tool_response>"
    )
    message = parse_answer(text)
    assert message["content"] == "I look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {
            "name": "weather",
            "arguments": {"city": "Rome, {IT}", "days": 2, "deep": {"a b": [1.5, -2, True, None, []]}, "e": {}},
        },
        {"name": "stop", "arguments": {}},
    ]


def test_arguments_take_the_declared_types() -> None:
    text = '<|tool_call>call:weather{city:5,days:<|"|>3<|"|>}<tool_call|>'
    arguments = parse_answer(text, tools=[WEATHER])["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "5", "days": 3}
    text = "<|tool_call>call:weather{days:3.0}<tool_call|>"
    assert parse_answer(text, tools=[WEATHER])["tool_calls"][0]["function"]["arguments"] == {"days": 3}


def test_arguments_that_cannot_be_read_stay_text() -> None:
    message = parse_answer('<|tool_call>call:f{a:<|"|>b}<tool_call|>')
    assert message["tool_calls"][0]["function"]["arguments"] == '{a:<|"|>b}'


def test_answers_are_parsed_from_text_ids_and_batches(gemma4_processor: Gemma4Processor) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b", "n": [1, 2.5]}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = gemma4_processor.apply_chat_template([{"role": "user", "content": "q"}, said])
    answer = text.rpartition("<|turn>model\n")[2]
    ids = gemma4_processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert gemma4_processor.parse_response(answer) == said
    assert gemma4_processor.parse_response(ids[0]) == said
    assert gemma4_processor.parse_response(ids) == [said]
    assert gemma4_processor.parse_response([answer, "hello"], prefix=text) == [
        said,
        {"role": "assistant", "content": "hello"},
    ]
    with pytest.raises(InputError, match="2 answers but 3 prefixes"):
        gemma4_processor.parse_response(["a", "b"], prefix=["", "", ""])


def test_everything_is_saved_and_read_again(
    gemma4_processor: Gemma4Processor, picture: Maker, clip: Maker, movie: Maker, tmp_path: Path
) -> None:
    gemma4_processor.save_pretrained(tmp_path)
    again = Gemma4Processor.from_pretrained(tmp_path)
    assert again.to_dict() == gemma4_processor.to_dict()
    call = {
        "text": IMAGE + SOUND + VIDEO,
        "images": picture(),
        "audio": clip(),
        "videos": movie(3),
        "return_tensors": "pt",
    }
    one, other = gemma4_processor(**call), again(**call)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_settings_are_replaced_when_it_is_loaded(gemma4_processor: Gemma4Processor, tmp_path: Path) -> None:
    gemma4_processor.save_pretrained(tmp_path)
    settings = {"max_soft_tokens": 140, "do_rescale": False, "num_frames": 7, "mel_floor": 0.5, "padding_side": "left"}
    other = Gemma4Processor.from_pretrained(tmp_path, **settings)
    for part in (other.image_processor, other.video_processor):
        assert (part.max_soft_tokens, part.do_rescale) == (140, False)
    assert (other.video_processor.num_frames, other.feature_extractor.mel_floor) == (7, 0.5)
    assert (other.tokenizer.padding_side, other.feature_extractor.padding_side) == ("left", "right")
