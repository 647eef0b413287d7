"""Collators: one start token, labels that do not count, and samples named when they cannot be learnt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import audiomm
from audiomm.base.errors import InputError
from audiomm.training.collators import pad_samples, padding_collator

_path = Path(__file__).parent.parent / "models" / "conftest.py"
_spec = importlib.util.spec_from_file_location("small_gemmas", _path)
assert _spec is not None
assert _spec.loader is not None
_small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small)
gemma3n_tokenizer, gemma3n_processor = _small.gemma3n_tokenizer, _small.gemma3n_processor
gemma4_tokenizer, gemma4_processor = _small.gemma4_tokenizer, _small.gemma4_processor
picture = _small.picture


@pytest.fixture(scope="module")
def processor() -> Any:
    return audiomm.WhisperProcessor.from_pretrained("audiomm/whisper-commands")


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((80, 3000)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- speech


def test_the_start_token_stands_once_in_what_the_decoder_reads(processor: Any) -> None:
    """The tokenizer writes it, and the model puts it before the labels: one of the two must go."""
    model_start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    collate = audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor)
    texts = [" one two", " three"]
    samples = [{"input_features": features(), "labels": processor.tokenizer(text).input_ids} for text in texts]
    assert samples[0]["labels"][0] == model_start
    batch = collate(samples)
    assert not bool((batch["labels"] == model_start).any())
    assert batch["labels"][0].tolist() == samples[0]["labels"][1:]
    shorter = samples[1]["labels"][1:]
    missing = batch["labels"].shape[1] - len(shorter)
    assert batch["labels"][1].tolist() == shorter + [-100] * missing
    assert missing > 0
    assert batch["input_features"].shape == (2, 80, 3000)
    without = [{**sample, "labels": sample["labels"][1:]} for sample in samples]
    assert torch.equal(collate(without)["labels"], batch["labels"])
    assert torch.equal(collate([samples[0], without[1]])["labels"], batch["labels"]), "each row by itself"
    real = batch["labels"][1][batch["labels"][1] != -100]
    assert processor.tokenizer.decode(real, skip_special_tokens=True).strip() == "three"


def test_the_end_token_is_learnt_although_it_pads(processor: Any) -> None:
    labels = processor.tokenizer("one").input_ids
    batch = audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor)([{"input_features": features(), "labels": labels}])
    assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id


def test_text_before_the_start_token_is_not_learnt(processor: Any) -> None:
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    labels = [7, 8, start, 9, 10]
    samples = [{"input_features": features(), "labels": labels}]
    batch = audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor)(samples)
    assert batch["labels"].tolist() == [[-100, -100, start, 9, 10]]
    learnt = audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor, mask_prompt=False)(samples)
    assert learnt["labels"].tolist() == [labels]


@pytest.mark.parametrize(
    ("more", "name"),
    [({}, "sample 1 of the batch has"), ({"id": "talk-7"}, r"sample 1 of the batch \(id 'talk-7'\) has"),
     ({"audio": {"path": "x/y.wav"}}, r"\(audio 'x/y.wav'\) has")],
)  # fmt: skip
def test_too_many_labels_name_the_sample(more: dict[str, Any], name: str, processor: Any) -> None:
    samples = [{"input_features": features(), "labels": [1] * length} for length in (448, 449)]
    samples[1].update(more)
    with pytest.raises(InputError, match=rf"{name} 449 label tokens; the decoder has 448 positions"):
        audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor)(samples)


def test_recordings_are_read_and_texts_tokenized_here(processor: Any, tmp_path: Path) -> None:
    wave = (np.sin(np.arange(8000) / 9) / 2).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    collate = audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor, forward_attention_mask=True)
    twice = np.repeat(wave, 2)
    batch = collate(
        [
            {"audio": str(tmp_path / "a.wav"), "text": "one"},
            {"audio": {"array": twice, "sampling_rate": 16000}, "text": "one"},
        ]
    )
    assert batch["labels"][0].tolist() == processor.tokenizer("one").input_ids[1:]
    assert batch["attention_mask"].sum(1).tolist() == [100, 100], "one second each"
    expected = processor.feature_extractor(twice, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    assert torch.equal(batch["input_features"][1], expected)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"labels": [1]}, "has neither 'input_features' nor 'audio'"),
        ({"input_features": np.zeros((80, 3000))}, "has neither 'labels' nor 'text'"),
        ({"audio": np.zeros(31 * 16000, np.float32), "text": "a"}, "lasts 31.0 s; the model hears 30 s at once"),
    ],
)
def test_samples_that_lack_a_part_or_are_too_long_are_named(sample: Any, words: str, processor: Any) -> None:
    with pytest.raises(InputError, match=words):
        audiomm.DataCollatorSpeechSeq2SeqWithPadding(processor)([sample])


def test_columns_that_a_collator_reads_reach_it(make_trainer: Any, processor: Any) -> None:
    """remove_unused_columns leaves out what neither the model nor the collator takes."""
    seen: list[set[str]] = []

    class Collator(audiomm.DataCollatorSpeechSeq2SeqWithPadding):
        def __call__(self, samples: Any) -> Any:
            seen.append(set(samples[0]))
            return {"input_features": torch.zeros(len(samples), 8, 40), "labels": torch.ones(len(samples), 2).long()}

    data = [{"audio": "a.wav", "text": "a", "speaker": 3, "labels": [1]}] * 8
    make_trainer(train_dataset=data, data_collator=Collator(processor), max_steps=1).train()
    assert seen == [{"audio", "text", "labels"}]


# ------------------------------------------------------------------------------------------------------------ chats


def chat(answer: str, sound: np.ndarray, words: str = "hello the") -> dict[str, Any]:
    question = [{"type": "audio", "audio": sound}, {"type": "text", "text": words}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


@pytest.fixture(params=["gemma3n_processor", "gemma4_processor"])
def chat_processor(request: Any) -> Any:
    return request.getfixturevalue(request.param)


def test_only_the_answer_of_a_chat_is_learnt(chat_processor: Any) -> None:
    sound = np.sin(np.arange(8000) / 9).astype(np.float32)
    samples = [chat("hello hello the end", sound), chat("the", sound[:4000], "a much longer question, this one?")]
    batch = audiomm.DataCollatorForCausalLM(chat_processor)(samples)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert "input_features" in batch
    tokenizer = chat_processor.tokenizer
    for row, words in enumerate(("hello hello the end", "the")):
        learnt = batch["labels"][row] != -100
        text = tokenizer.decode(batch["input_ids"][row][learnt])
        assert text.startswith(words), text
        assert torch.equal(batch["labels"][row][learnt], batch["input_ids"][row][learnt])
        rest = tokenizer.decode(batch["input_ids"][row][~learnt & (batch["attention_mask"][row] == 1)])
        asked = chat_processor.apply_chat_template(
            samples[row]["messages"][:-1], add_generation_prompt=True, tokenize=True
        )
        given = batch["input_ids"][row][~learnt & (batch["attention_mask"][row] == 1)]
        assert given.tolist() == asked[0], "what the model reads when it is asked, an empty thought included"
        assert rest.rstrip().endswith(("model", "<|channel>thought\n<channel|>"))
        assert not bool(learnt[batch["attention_mask"][row] == 0].any())
        end = tokenizer.convert_tokens_to_ids("<end_of_turn>" if "<end_of_turn>" in text else "<turn|>")
        assert end in batch["labels"][row], "the end of the turn is learnt, too"
    everything = audiomm.DataCollatorForCausalLM(chat_processor, train_on_prompt=True)(samples)
    media = everything["input_ids"] == chat_processor.audio_token_id
    assert bool(media.any())
    assert bool((everything["labels"][media] == -100).all()), "placeholders are never learnt"
    real = (everything["attention_mask"] == 1) & ~media
    assert torch.equal(everything["labels"][real], everything["input_ids"][real])


TURNS = [("user", "hello"), ("assistant", "the first"), ("user", "the"), ("assistant", "last one")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


def test_each_answer_of_a_chat_is_learnt_where_the_model_was_asked_for_it(chat_processor: Any) -> None:
    batch = audiomm.DataCollatorForCausalLM(chat_processor)([{"messages": MESSAGES}])
    assert len(batch["labels"]) == 2
    types = batch[chat_processor.type_ids_name]
    assert types.shape == batch["attention_mask"].shape == batch["input_ids"].shape
    for row, turn in enumerate((1, 3)):
        real = batch["attention_mask"][row] == 1
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        asked = chat_processor.apply_chat_template(MESSAGES[:turn], add_generation_prompt=True, tokenize=True)[0]
        assert ids[: len(asked)].tolist() == asked
        assert bool((labels[: len(asked)] == -100).all())
        assert torch.equal(labels[len(asked) :], ids[len(asked) :])
        written = chat_processor.tokenizer.decode(labels[len(asked) :])
        assert written.rstrip() in (TURNS[turn][1] + "<end_of_turn>", TURNS[turn][1] + "<turn|>")


@pytest.mark.parametrize("options", [{"last_answer_only": True}, {"train_on_prompt": True}])
def test_a_chat_can_be_one_row(options: dict[str, bool], chat_processor: Any) -> None:
    batch = audiomm.DataCollatorForCausalLM(chat_processor, **options)([{"messages": MESSAGES}])
    assert len(batch["labels"]) == 1
    learnt = chat_processor.tokenizer.decode(batch["input_ids"][batch["labels"] != -100])
    assert learnt.startswith("last one") or options == {"train_on_prompt": True}
    assert ("first" in learnt) == ("train_on_prompt" in options)


def test_a_call_whose_result_follows_is_given_not_learnt(gemma4_processor: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": {"zone": "the"}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "the"},
        {"role": "assistant", "content": "last one"},
    ]
    batch = audiomm.DataCollatorForCausalLM(gemma4_processor)([{"messages": messages}])
    assert len(batch["labels"]) == 1
    assert gemma4_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "last one<turn|>\n"
    batch = audiomm.DataCollatorForCausalLM(gemma4_processor)([{"messages": messages[:2]}])
    text = gemma4_processor.tokenizer.decode(batch["input_ids"][0])
    assert "<|turn>model\n<|channel>thought\n<channel|><|tool_call>call:time{" in text


def test_an_answer_with_a_picture_is_refused(chat_processor: Any, picture: Any) -> None:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": content}]
    with pytest.raises(InputError, match="sample 0 of the batch: its answer holds a picture or sound; answers are te"):
        audiomm.DataCollatorForCausalLM(chat_processor)([{"messages": messages}])


def test_a_template_that_opens_answers_in_two_ways_is_refused(gemma3n_processor: Any) -> None:
    gemma3n_processor.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' ~ (m.role if m.content|length < 2 else 'sage') ~ m.content }}"
        "{% endfor %}"
    )
    with pytest.raises(InputError, match="does not open the answer '.*sagethe first. as it opens others"):
        audiomm.DataCollatorForCausalLM(gemma3n_processor)([{"messages": MESSAGES}])


def test_pictures_in_a_chat_come_along(chat_processor: Any, picture: Any) -> None:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the"}]
    batch = audiomm.DataCollatorForCausalLM(chat_processor)([{"messages": messages}])
    assert "pixel_values" in batch
    assert not bool((batch["labels"] == chat_processor.image_token_id).any())


@pytest.mark.parametrize(
    ("sample", "options", "words"),
    [
        ({}, {}, "sample 0 of the batch: the last of its 'messages' must be the assistant's answer"),
        ({"id": 3, "messages": [{"role": "user", "content": "a"}]}, {}, r"\(id 3\): the last of its 'messages'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"max_length": 3},
            "tokens; max_length is 3",
        ),
    ],
)
def test_chats_that_cannot_be_learnt_are_named(sample: Any, options: Any, words: str, chat_processor: Any) -> None:
    with pytest.raises(InputError, match=words):
        audiomm.DataCollatorForCausalLM(chat_processor, **options)([sample])


# ------------------------------------------------------------------------------------------------------------- plain


def test_samples_of_one_shape_are_stacked() -> None:
    batch = audiomm.default_data_collator(
        [{"x": [1, 2], "label": 3, "name": "a"}, {"x": [3, 4], "label": 4, "name": "b"}]
    )
    assert batch["x"].tolist() == [[1, 2], [3, 4]]
    assert batch["labels"].tolist() == [3, 4]
    assert set(batch) == {"x", "labels"}
    with pytest.raises(InputError, match=r"'x' has the shapes \(1,\), \(2,\) in one batch"):
        audiomm.default_data_collator([{"x": [1]}, {"x": [1, 2]}])


def test_texts_are_padded_at_the_tokenizers_side(gemma3n_tokenizer: Any) -> None:
    samples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    pad = gemma3n_tokenizer.pad_token_id
    gemma3n_tokenizer.padding_side = "left"
    batch = pad_samples(gemma3n_tokenizer, samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert batch["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    gemma3n_tokenizer.padding_side = "right"
    assert padding_collator(gemma3n_tokenizer)(samples)["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert padding_collator(object()) is audiomm.default_data_collator
