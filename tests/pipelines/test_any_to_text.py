"""The doors of models that answer: texts, chats and media in, results as in transformers, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audiomm.base.errors import AudiommError, InputError
from audiomm.pipelines import (
    AnyToTextPipeline,
    ImageTextToTextPipeline,
    TextGenerationPipeline,
    any_to_text,
    pipeline,
    prompted_recognition,
)

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipes(family: str, gemma_folders: dict[str, Path]) -> dict[str, Any]:
    """A pipeline for each task, on one tiny model."""
    first = pipeline("any-to-any", model=str(gemma_folders[family]), device="cpu")
    parts = {"model": first.model, "processor": first.processor, "device": "cpu"}
    tasks = ("text-generation", "image-text-to-text", "audio-text-to-text")
    return {"any-to-any": first} | {task: pipeline(task, **parts) for task in tasks}


@pytest.fixture
def marks(family: str, gemmas: Any) -> dict[str, str]:
    return gemmas.MARKS[family]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str = "hello") -> dict[str, str]:
    return {"type": "text", "text": words}


def test_each_task_has_the_class_of_that_name(pipes) -> None:
    assert isinstance(pipes["text-generation"], TextGenerationPipeline)
    assert isinstance(pipes["image-text-to-text"], ImageTextToTextPipeline)
    assert type(pipes["any-to-any"]) is type(pipes["audio-text-to-text"]) is AnyToTextPipeline
    assert pipes["audio-text-to-text"].task == "audio-text-to-text"


def test_a_model_alone_says_what_it_does(gemma_folders, family) -> None:
    assert pipeline(model=str(gemma_folders[family]), device="cpu").task == "any-to-any"


def test_texts_are_continued_one_by_one_or_as_a_list(pipes) -> None:
    pipe = pipes["text-generation"]
    (first,), (second,) = pipe("hello", **GREEDY), pipe(text_inputs="the hello", **GREEDY)
    assert first["generated_text"].startswith("hello")
    assert pipe(["hello", "the hello"], **GREEDY) == [[first], [second]]
    assert pipe(["hello", "the hello"], batch_size=2, **GREEDY) == [[first], [second]]
    stream = pipe((one for one in ("hello", "the hello")), **GREEDY)
    assert not isinstance(stream, list)
    assert list(stream) == [[first], [second]]
    assert pipe("hello", return_full_text=False, **GREEDY) == [{"generated_text": first["generated_text"][5:]}]
    assert pipe("", **GREEDY)[0]["generated_text"]


def test_lists_of_texts_come_flat_where_transformers_has_them_flat(pipes, marks, gemmas) -> None:
    (first,), (second,) = pipes["any-to-any"]("hello", **GREEDY), pipes["any-to-any"]("the hello", **GREEDY)
    assert first["input_text"] == "hello"
    assert pipes["any-to-any"](["hello", "the hello"], **GREEDY) == [first, second]
    assert pipes["image-text-to-text"](text=["hello", "the hello"], **GREEDY) == [[first], [second]]
    pictures, texts = [gemmas.picture(1), gemmas.picture(2)], [marks["image"] + " a", marks["image"]]
    found = pipes["image-text-to-text"](images=pictures, text=texts, **GREEDY)
    assert [one["input_text"] for one in found] == texts
    dicts = [{"text": words, "images": image} for words, image in zip(texts, pictures, strict=True)]
    assert pipes["any-to-any"](dicts, **GREEDY) == [[one] for one in found]


def test_a_chat_comes_back_with_the_answer(pipes) -> None:
    chat = [{"role": "user", "content": "hello"}]
    for task, pipe in pipes.items():
        (found,) = pipe(chat, **GREEDY)
        assert found["generated_text"][:1] == chat
        assert found["generated_text"][1]["role"] == "assistant"
        assert ("input_text" in found) == (task != "text-generation")
        assert pipe([chat], **GREEDY) == [[found]]
        (alone,) = pipe(chat, return_full_text=False, **GREEDY)
        assert alone["generated_text"] == found["generated_text"][1]["content"]
    assert chat == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("content", ["so", [{"type": "text", "text": "so"}]])
def test_a_chat_that_ends_with_the_assistant_is_continued(pipes, content) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]
    for pipe in (pipes["text-generation"], pipes["any-to-any"]):
        messages = pipe(chat, **GREEDY)[0]["generated_text"]
        assert len(messages) == 2
        last = messages[1]["content"]
        assert (last if isinstance(last, str) else last[0]["text"]).startswith("so")
        messages = pipe(chat, continue_final_message=False, **GREEDY)[0]["generated_text"]
        assert [message["role"] for message in messages] == ["user", "assistant", "assistant"]


def test_media_stand_in_chats_or_beside_them(pipes, gemmas) -> None:
    pipe = pipes["any-to-any"]
    picture, clip = gemmas.picture(), gemmas.noise()
    inside = user({"type": "image", "image": picture}, {"type": "audio", "audio": clip}, text())
    beside = user({"type": "image"}, {"type": "audio"}, text())
    expected = pipe(inside, return_full_text=False, **GREEDY)[0]["generated_text"]
    found = pipe(beside, images=[picture], audio=clip, return_full_text=False, **GREEDY)[0]
    assert found["generated_text"] == expected
    chats = pipe([inside, inside], batch_size=2, return_full_text=False, **GREEDY)
    assert [one["generated_text"] for (one,) in chats] == [expected] * 2
    with pytest.raises(InputError, match=r"2 image inputs were passed, but 1 of them have no place"):
        pipe(beside, images=[picture, picture], audio=clip, **GREEDY)
    with pytest.raises(InputError, match=r"the chat has more image parts than the 1 that were passed"):
        pipe(user({"type": "image"}, {"type": "image"}), images=picture, **GREEDY)


def test_rows_of_different_media_answer_as_they_do_alone(pipes, gemmas) -> None:
    pipe = pipes["any-to-any"]
    chats = [
        user({"type": "audio", "audio": gemmas.noise(1.9)}, text("what is said?")),
        user(text()),
        user({"type": "image", "image": gemmas.picture(3)}, {"type": "audio", "audio": gemmas.noise(0.4)}),
    ]
    alone = [pipe(chat, return_tensors=True, **GREEDY)[0]["generated_token_ids"] for chat in chats]
    together = [found[0]["generated_token_ids"] for found in pipe(chats, batch_size=3, return_tensors=True, **GREEDY)]
    assert all(torch.equal(one, other[: len(one)]) for one, other in zip(alone, together, strict=True))


def test_the_picture_comes_first_for_questions_about_pictures(pipes, marks, gemmas) -> None:
    pipe, picture, words = pipes["image-text-to-text"], gemmas.picture(), marks["image"] + " hello"
    expected = pipes["any-to-any"](words, picture, **GREEDY)
    assert pipe(picture, words, **GREEDY) == pipe(images=picture, text=words, **GREEDY) == expected
    assert pipe({"image": picture, "text": words}, **GREEDY) == expected
    chat = [{"role": "user", "content": "hello"}]
    assert pipe(chat, **GREEDY) == pipe(text=chat, **GREEDY)
    assert pipe(images=picture, **GREEDY)[0]["input_text"] == ""


def test_videos_are_watched_by_models_that_take_them(pipes, family, gemmas) -> None:
    pipe = pipes["any-to-any"]
    chat = user({"type": "video", "video": gemmas.movie()}, text())
    if family == "gemma3n":
        with pytest.raises(AudiommError, match="video"):
            pipe(chat, **GREEDY)
    else:
        assert pipe(chat, **GREEDY)[0]["generated_text"][1]["content"]


def test_several_answers_come_together(pipes) -> None:
    pipe = pipes["any-to-any"]
    assert len(pipe("hello", do_sample=True, num_return_sequences=3, max_new_tokens=3)) == 3
    beams = pipe(["hello", "the"], num_beams=2, num_return_sequences=2, do_sample=False, max_new_tokens=3)
    assert [one["input_text"] for one in beams] == ["hello", "hello", "the", "the"]
    nested = pipes["text-generation"](["hello", "the"], num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert [len(found) for found in nested] == [2, 2]


def test_tokens_come_in_place_of_text_without_the_padding_of_neighbours(pipes) -> None:
    pipe = pipes["text-generation"]
    (whole,) = pipe("hello", return_tensors=True, **GREEDY)
    assert isinstance(whole["generated_token_ids"], list)
    new = pipe("hello", return_tensors=True, return_full_text=False, **GREEDY)[0]["generated_token_ids"]
    assert whole["generated_token_ids"][-5:] == new
    pair = pipe(["hello", "the hello hello"], batch_size=2, return_tensors=True, **GREEDY)
    assert pair[0] == [whole]
    tokens = pipes["any-to-any"]("hello", return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert tokens.tolist() == whole["generated_token_ids"]


def test_scores_come_with_the_text_when_they_are_asked_for(pipes) -> None:
    (found,) = pipes["text-generation"]("hello", return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert len(found["logits"]) == 5
    assert len(found["logits"][0]) == pipes["text-generation"].model.config.get_text_config().vocab_size


def test_what_nobody_says_the_task_says(pipes, monkeypatch) -> None:
    """As in transformers: text generation samples, the others do what the model's file says; 256 tokens at most."""
    asked: dict[str, Any] = {}
    model = pipes["any-to-any"].model

    def generate(**kwargs: Any) -> torch.Tensor:
        asked.clear()
        asked.update({name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)})
        return torch.cat([kwargs["input_ids"]] * 2, dim=1)

    monkeypatch.setattr(model, "generate", generate)
    pipes["text-generation"]("hello")
    assert asked == {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
    pipes["text-generation"]("hello", do_sample=False, max_length=40)
    assert asked == {"max_length": 40, "do_sample": False}
    pipes["any-to-any"]("hello")
    assert asked == {"max_new_tokens": 256}
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 1.0)
    monkeypatch.setattr(model.generation_config, "max_length", 100)
    pipes["text-generation"]("hello")
    assert asked == {}
    pipes["any-to-any"]("hello", stop_sequence="end", generate_kwargs={"top_k": 3})
    assert asked == {"stop_strings": ["end"], "tokenizer": pipes["any-to-any"].tokenizer, "top_k": 3}


def test_what_a_call_says_counts_more_than_what_the_pipeline_was_made_with(pipes) -> None:
    parts = {"model": pipes["any-to-any"].model, "processor": pipes["any-to-any"].processor, "device": "cpu"}
    pipe = pipeline("any-to-any", **parts, return_tensors=True, return_full_text=False, generate_kwargs=GREEDY)

    def length(**options: Any) -> int:
        return len(pipe("hello", **options)[0]["generated_token_ids"])

    assert length() == 5
    assert length(max_new_tokens=3) == 3
    assert length(generate_kwargs={"max_new_tokens": 2}) == 2


def test_options_reach_tokenizer_template_and_processor(pipes) -> None:
    pipe = pipes["text-generation"]
    plain = pipe("hello", return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    without = pipe("hello", add_special_tokens=False, return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert without[0] == plain[1]
    same = pipe("hello", tokenizer_encode_kwargs={"add_special_tokens": False}, return_tensors=True, **GREEDY)
    assert same[0]["generated_token_ids"] == without
    prefixed = pipe("hello", prefix="the ", **GREEDY)[0]["generated_text"]
    assert prefixed == "hello" + pipe("the hello", return_full_text=False, **GREEDY)[0]["generated_text"]
    cut = pipe("hello " * 9, truncation=True, max_length=8, return_tensors=True, do_sample=False, max_new_tokens=2)
    assert len(cut[0]["generated_token_ids"]) == 10
    own = pipe([{"role": "user", "content": "hi"}], chat_template="hello", return_tensors=True, **GREEDY)[0]
    assert pipe.tokenizer.decode(own["generated_token_ids"], skip_special_tokens=True).startswith("hello")


def test_an_assistant_model_changes_no_answer(pipes, gemma_folders, family) -> None:
    pipe = pipes["text-generation"]
    helped = pipeline(
        "text-generation", model=pipe.model, processor=pipe.processor, device="cpu", assistant_model=pipe.model
    )
    assert helped("hello", **GREEDY) == pipe("hello", **GREEDY)


def test_a_model_that_drafts_is_read_where_it_is_named(pipes, gemma_folders, family, monkeypatch) -> None:
    pipe = pipes["text-generation"]
    asked = []
    loader = SimpleNamespace(from_pretrained=lambda name, **options: asked.append((name, options)) or pipe.model)
    for module, task in ((any_to_text, "text-generation"), (prompted_recognition, "automatic-speech-recognition")):
        monkeypatch.setattr(module, "AutoModelForCausalLM", loader)
        helped = pipeline(
            task, model=pipe.model, processor=pipe.processor, device="cpu", assistant_model="someone/drafter"
        )
        assert asked.pop() == ("someone/drafter", {"dtype": pipe.dtype, "device": pipe.device})
        assert helped.call_defaults["assistant_model"] is pipe.model


def test_an_answer_streams_in_pieces_and_stops_when_nobody_listens(pipes) -> None:
    pipe = pipes["any-to-any"]
    expected = pipe("hello", return_full_text=False, do_sample=False, max_new_tokens=30)[0]["generated_text"]
    pieces = list(pipe.stream("hello", do_sample=False, max_new_tokens=30))
    assert "".join(pieces) == expected
    before = threading.active_count()
    stream = pipe.stream("hello", do_sample=False, max_new_tokens=400, min_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(AudiommError, match="colour"):
        list(pipe.stream("hello", colour="red"))


def test_a_saved_pipeline_comes_back_with_its_processor(pipes, marks, gemmas, tmp_path: Path) -> None:
    pipe, words = pipes["any-to-any"], marks["image"] + " hello"
    pipe.save_pretrained(tmp_path)
    again = pipeline("any-to-any", model=str(tmp_path), device="cpu")
    assert again(words, gemmas.picture(), **GREEDY) == pipe(words, gemmas.picture(), **GREEDY)


def test_thoughts_and_tool_calls_of_an_answer_are_told_apart(gemma_folders, monkeypatch) -> None:
    pipe = pipeline("any-to-any", model=str(gemma_folders["gemma4"]), device="cpu")
    written = '<|channel>thought\nhm<channel|>yes<|tool_call>call:look{place:<|"|>here<|"|>}<tool_call|><turn|>'
    ids = torch.tensor(pipe.tokenizer(written, add_special_tokens=False).input_ids)

    def generate(**kwargs: Any) -> torch.Tensor:
        return torch.cat([kwargs["input_ids"], ids[None]], dim=1)

    monkeypatch.setattr(pipe.model, "generate", generate)
    chat = [{"role": "user", "content": "hello"}]
    message = pipe(chat)[0]["generated_text"][1]
    assert message["content"] == "yes"
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "here"}}
    raw = pipe(chat, skip_special_tokens=False)[0]["generated_text"][1]
    assert raw == {"role": "assistant", "content": written}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, r"any-to-any needs text=, images=, audio= or videos=; all are None"),
        (([],), {}, r"text is an empty list"),
        ((7,), {}, r"text is a int; a text, a chat or a list"),
        (([7],), {}, r"a prompt is '7'; a text or a chat"),
        (({"words": "x"},), {}, r"a prompt has the keys words; known are text"),
        ((["a", "b"],), {"images": ["x.png"]}, r"2 prompts, but images has 1 entries"),
        ((["a", "b"],), {"images": "x.png"}, r"2 prompts, but images has 1 entries"),
        ((iter(["a"]),), {"images": "x.png"}, r"images beside an iterator of prompts"),
        ((["a", [{"role": "user", "content": "a"}]],), {"batch_size": 2}, r"chats and texts in one batch"),
        (("a",), {"batch_size": 0}, r"batch_size=0: a whole number of at least 1"),
        (("a",), {"generation_mode": "audio"}, r"generation_mode='audio': .* writes 'text' only"),
        (("a",), {"handle_long_generation": "hole"}, r"prompts are never cut silently"),
        (("a",), {"generate_kwargs": "german"}, "generate_kwargs is a str; a dict"),
        (("a",), {"top_k": 2, "generate_kwargs": {"top_k": 3}}, r"top_k: passed both in generate_kwargs and directly"),
    ],
)
def test_calls_that_make_no_sense_are_refused(pipes, arguments, options, message) -> None:
    with pytest.raises(InputError, match=message):
        pipes["any-to-any"](*arguments, **options)


def test_a_pipeline_needs_something_that_reads(pipes) -> None:
    with pytest.raises(InputError, match=r"text-generation: the model needs a processor or a tokenizer"):
        TextGenerationPipeline(pipes["any-to-any"].model, device="cpu")


def test_a_model_of_text_alone_refuses_media(pipes, gemmas) -> None:
    pipe = AnyToTextPipeline(pipes["any-to-any"].model, tokenizer=pipes["any-to-any"].tokenizer, device="cpu")
    assert pipe("hello", **GREEDY) == pipes["any-to-any"]("hello", **GREEDY)
    assert pipe([{"role": "user", "content": "hello"}], chat_template="hello", **GREEDY)
    with pytest.raises(InputError, match=r"images were passed, but this model reads text alone"):
        pipe("hello", gemmas.picture(), **GREEDY)
