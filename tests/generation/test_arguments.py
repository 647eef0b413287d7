"""What callers of generate() and forward() pass by mistake: every model says what it was and what is needed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from audiomm import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    GenerationError,
    InputError,
    NumericalError,
    ShapeError,
    TextIteratorStreamer,
)
from audiomm.base.encoding import BatchEncoding

IDS = torch.tensor([[2, 261, 335]])
GUESTS = [
    ({"generation_config": {"max_new_tokens": 3}}, "generation_config is a dict: pass a GenerationConfig"),
    ({"logits_processor": lambda ids, scores: scores}, r"logits_processor is a function: pass a list: .*=\[\.\.\.\]"),
    ({"logits_processor": [3]}, "an entry of logits_processor is a int: pass a function"),
    ({"stopping_criteria": lambda ids, scores: True}, "stopping_criteria is a function: pass a list"),
    ({"stopping_criteria": ["stop"]}, r"an entry of stopping_criteria is a str \('stop'\)"),
    ({"prefix_allowed_tokens_fn": [1, 2]}, "prefix_allowed_tokens_fn is a list: pass a function"),
    ({"streamer": print}, r"streamer is a builtin_function_or_method: pass an object with put\(tokens\) and end\(\)"),
    ({"assistant_model": "openai/whisper-tiny"}, r"assistant_model is a str \('openai/whisper-tiny'\): pass a model"),
    ({"logits_processor": [lambda ids, scores: None]}, r"<lambda> returned a NoneType: scores of shape \(1, \d+\)"),
    ({"logits_processor": [lambda ids, scores: scores[:, :3]]}, r"returned shape \(1, 3\)"),
    ({"stopping_criteria": [lambda ids, scores: None]}, "<lambda> returned None: True, False or a tensor"),
    ({"stopping_criteria": [lambda ids, scores: torch.ones(7)]}, r"returned shape \(7,\).*one for each of 1 rows"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: None}, "allows no token for batch item 0"),
    ({"prefix_allowed_tokens_fn": lambda row, ids: [10**6]}, r"allows \[1000000\] .* from 0 to \d+"),
]


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def gemma(request, gemma_folders):
    return AutoModelForMultimodalLM.from_pretrained(gemma_folders[request.param])


@pytest.fixture
def features():
    return torch.randn(1, 8, 40)


@pytest.mark.parametrize(("options", "message"), GUESTS, ids=range(len(GUESTS)))
def test_guests_of_a_gemma_are_named(gemma, options, message):
    with pytest.raises(GenerationError, match=message):
        gemma.generate(IDS, max_new_tokens=2, **options)


@pytest.mark.parametrize(("options", "message"), GUESTS, ids=range(len(GUESTS)))
def test_guests_of_a_whisper_are_named(tiny_whisper, features, options, message):
    with pytest.raises(GenerationError, match=message):
        tiny_whisper.generate(features, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "hot"}, "temperature='hot': a number is needed"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"logprob_threshold": "low"}, "logprob_threshold='low': a number is needed"),
        ({"no_speech_threshold": "x"}, "no_speech_threshold='x': a number is needed"),
        ({"prompt_ids": "Ørsted"}, "prompt_ids='Ørsted' is a text: pass its tokens"),
        ({"prompt_ids": [100]}, "prompt_ids holds 100: ids of this model are 0 to 99"),
        ({"prompt_ids": torch.tensor([1.5])}, "prompt_ids is of dtype torch.float32"),
        ({"prefix_ids": [-1]}, "prefix_ids holds -1"),
        ({"decoder_start_token_id": 100}, "decoder_start_token_id holds 100"),
        ({"language": 3}, "language=3: a code"),
        ({"attention_mask": "x"}, r"attention_mask is a str \('x'\)"),
    ],
)
def test_numbers_and_tokens_for_whisper_are_checked(tiny_whisper, features, options, message):
    with pytest.raises(GenerationError, match=message):
        tiny_whisper.generate(features, **options)


def test_a_language_is_not_chosen_among_numbers_that_are_none(tiny_whisper, features):
    languages = {"<|en|>": 4, "<|de|>": 5}
    config = GenerationConfig(decoder_start_token_id=3, lang_to_id=languages)
    assert tiny_whisper.detect_language(features, generation_config=config).item() in languages.values()
    with torch.no_grad():
        tiny_whisper.model.decoder.layer_norm.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="scores of the languages hold NaN"):
        tiny_whisper.detect_language(features, generation_config=config)


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 8, 40), np.float32), "a.wav", BatchFeature({"input_features": torch.zeros(1, 8, 40)})]
)
def test_what_is_no_tensor_of_features_is_named(tiny_whisper, wrong):
    with pytest.raises(ShapeError, match=f"input_features is a {type(wrong).__name__}.*return_tensors='pt'.*answer"):
        tiny_whisper.generate(wrong)
    with pytest.raises(ShapeError, match=f"input_features is a {type(wrong).__name__}"):
        tiny_whisper(wrong, decoder_input_ids=torch.ones(1, 2, dtype=torch.long))


def test_the_encoder_of_another_model_is_noticed(tiny_whisper):
    other = torch.zeros(1, 20, 7)
    with pytest.raises(ShapeError, match=r"encoder_outputs are of shape \(1, 20, 7\).*d_model=24"):
        tiny_whisper(encoder_outputs=other, decoder_input_ids=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match="are they another model's"):
        tiny_whisper.generate(encoder_outputs=other)


@pytest.mark.parametrize("wrong", ["hello", ["hello", "you"], BatchEncoding({"input_ids": IDS})])
def test_a_prompt_that_is_no_ids_is_named(gemma, wrong):
    with pytest.raises(GenerationError, match=f"input_ids is a {type(wrong).__name__}.*the answer of a tokenizer"):
        gemma.generate(wrong)
    with pytest.raises(InputError, match=f"input_ids is a {type(wrong).__name__}"):
        gemma(wrong)


@pytest.mark.parametrize("wrong", [10**6, -5])
def test_ids_that_no_embedding_has_are_named(gemma, wrong):
    with pytest.raises(InputError, match=f"input_ids holds {wrong}: ids of this model are 0 to"):
        gemma.generate(IDS.clone().fill_(wrong))
    with pytest.raises(InputError, match="input_ids holds"):
        gemma(IDS.clone().fill_(wrong))
    with pytest.raises(InputError, match="labels holds"):
        gemma(IDS, labels=IDS.clone().fill_(wrong))
    assert gemma(IDS, labels=IDS.clone().index_fill_(1, torch.tensor([0]), -100)).loss.isfinite()


def test_a_text_of_numbers_is_no_text(gemma_folders):
    for folder in gemma_folders.values():
        with pytest.raises(TypeError, match="text must be a string or a list of strings, not int"):
            AutoProcessor.from_pretrained(folder)(text=3)


def test_ids_of_another_shape_or_type_are_named(gemma):
    for wrong in (IDS[0], IDS[:, :0]):
        with pytest.raises(ShapeError, match="is of shape"):
            gemma(wrong)
    with pytest.raises(InputError, match="is of dtype torch.float32: token ids are whole numbers"):
        gemma(IDS.float())
    with pytest.raises(ShapeError, match="labels are of shape"):
        gemma(IDS, labels=IDS[:, :2])
    with pytest.raises(ShapeError, match="labels are "):
        gemma(IDS, labels=IDS[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[5, 100]]), "labels holds 100: ids of this model are 0 to 99"),
        (torch.tensor([[100]]), "labels holds 100"),
        (torch.tensor([[-1, 5]]), "labels holds -1"),
        (torch.tensor([[1.0, 2.0]]), "labels is of dtype torch.float32"),
        (torch.tensor([1, 2]), r"labels is of shape \(2,\)"),
        ([[1, 2]], "labels is a list: a tensor of token ids"),
    ],
)
def test_labels_of_a_whisper_are_checked(tiny_whisper, features, labels, message):
    with pytest.raises(InputError, match=message):
        tiny_whisper(features, labels=labels)


def test_ids_of_a_whisper_and_their_mask_are_checked(tiny_whisper, features):
    with pytest.raises(InputError, match="decoder_input_ids holds 100"):
        tiny_whisper(features, decoder_input_ids=torch.tensor([[100]]))
    with pytest.raises(ShapeError, match=r"mask is of shape \(1, 2\), but there are 3 tokens"):
        ids = torch.ones(1, 3, dtype=torch.long)
        tiny_whisper(features, decoder_input_ids=ids, decoder_attention_mask=torch.ones(1, 2))


@pytest.mark.parametrize("options", [{"language": "klingon"}, {"logits_processor": [3]}, {"temperature": -1.0}])
def test_who_reads_from_a_streamer_hears_of_an_error_before_the_first_token(tiny_whisper, features, options):
    streamer = TextIteratorStreamer(None, timeout=5.0)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            tiny_whisper.generate(features, streamer=streamer, **options)
        except GenerationError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert "".join(streamer) == ""
    thread.join()
    assert len(failed) == 1
