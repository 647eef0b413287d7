"""`pipeline(...)`: tasks, where parts come from, where the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from audiomm import pipelines
from audiomm.base.errors import CheckpointNotFoundError, InputError
from audiomm.pipelines import AutomaticSpeechRecognitionPipeline, Pipeline, pipeline


@pytest.fixture
def parts(pipe: Any) -> dict[str, Any]:
    return {"model": pipe.model, "tokenizer": pipe.tokenizer, "feature_extractor": pipe.feature_extractor}


class Loader:
    """Stands for an Auto class; remembers what it was asked for."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def from_pretrained(self, name: Any, **kwargs: Any) -> Any:
        self.calls.append((name, kwargs))
        return self.part


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> dict[str, Loader]:
    found = {
        "AutoTokenizer": Loader(pipe.tokenizer),
        "AutoFeatureExtractor": Loader(pipe.feature_extractor),
        "AutoConfig": Loader(pipe.model.config),
    }
    for name, loader in found.items():
        monkeypatch.setattr(pipelines, name, loader)
    found["model"] = Loader(pipe.model)
    row = pipelines.TASKS["automatic-speech-recognition"]
    monkeypatch.setitem(
        pipelines.TASKS,
        "automatic-speech-recognition",
        pipelines.Task(row.pipeline_class, found["model"], row.families, row.default_model),
    )
    return found


def test_parts_that_are_given_are_used(parts: dict[str, Any], make_sound: Any) -> None:
    pipe = pipeline("automatic-speech-recognition", **parts, device="cpu")
    assert isinstance(pipe, AutomaticSpeechRecognitionPipeline)
    assert pipe.task == "automatic-speech-recognition"
    assert pipe(make_sound(3, 2)) == {"text": " w2"}


def test_the_task_follows_from_the_model(parts: dict[str, Any]) -> None:
    assert isinstance(pipeline(**parts, device="cpu"), AutomaticSpeechRecognitionPipeline)
    parts["model"].config.model_type = "sonar"
    with pytest.raises(InputError, match="model_type='sonar': no task"):
        pipeline(**parts)


def test_a_processor_brings_both_parts(parts: dict[str, Any], make_sound: Any) -> None:
    class Processor:
        tokenizer = parts["tokenizer"]
        feature_extractor = parts["feature_extractor"]

    pipe = pipeline("automatic-speech-recognition", model=parts["model"], processor=Processor(), device="cpu")
    assert pipe(make_sound(3, 2)) == {"text": " w2"}


def test_everything_is_loaded_from_one_name(loaders: dict[str, Loader]) -> None:
    pipeline(
        "automatic-speech-recognition",
        model="someone/model",
        revision="v2",
        dtype="float32",
        device="cpu",
        model_kwargs={"cache_dir": "cache", "attn_implementation": "eager"},
        use_fast=False,
        trust_remote_code=True,
    )
    hub = {"revision": "v2", "cache_dir": "cache"}
    assert loaders["model"].calls == [
        ("someone/model", {"dtype": "float32", "attn_implementation": "eager", "device": torch.device("cpu"), **hub}),
    ]
    assert loaders["AutoTokenizer"].calls == loaders["AutoFeatureExtractor"].calls == [("someone/model", hub)]


def test_the_model_that_ships_with_the_package_is_the_default(loaders: dict[str, Loader]) -> None:
    pipeline("automatic-speech-recognition", device="cpu")
    assert loaders["model"].calls == [("audiomm/whisper-commands", {"dtype": "auto", "device": torch.device("cpu")})]


def test_float16_is_not_computed_in_on_a_processor_unless_asked_for(loaders: dict[str, Loader]) -> None:
    loaders["model"].part.half()
    assert pipeline("automatic-speech-recognition", device="cpu", dtype="float16").dtype == torch.float16
    assert pipeline("automatic-speech-recognition", device="cpu").dtype == torch.float32


def test_a_device_map_places_the_model_while_it_is_loaded(loaders: dict[str, Loader]) -> None:
    pipe = pipeline("automatic-speech-recognition", model="someone/model", device_map="cpu")
    assert loaders["model"].calls == [("someone/model", {"dtype": "auto", "device_map": "cpu"})]
    assert pipe.device == torch.device("cpu")


def test_a_model_knows_where_its_other_parts_are(loaders: dict[str, Loader], parts: dict[str, Any]) -> None:
    parts["model"].name_or_path = "someone/model"
    pipeline("automatic-speech-recognition", model=parts["model"], tokenizer="other/tokenizer", device="cpu")
    assert loaders["AutoTokenizer"].calls == [("other/tokenizer", {})]
    assert loaders["AutoFeatureExtractor"].calls == [("someone/model", {})]


def test_dtype_and_device_move_the_model(parts: dict[str, Any], make_sound: Any) -> None:
    pipe = pipeline("automatic-speech-recognition", **parts, torch_dtype="bfloat16", device=-1)
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    assert pipe(make_sound(3, 2)) == {"text": " w2"}


def test_defaults_of_the_pipeline_hold_for_its_calls(parts: dict[str, Any], make_sound: Any) -> None:
    pipe = pipeline("automatic-speech-recognition", **parts, device="cpu", batch_size=2, return_timestamps=True)
    results = pipe([make_sound(3, 2), make_sound(3, 1)])
    assert [result["chunks"][0]["timestamp"] for result in results] == [(2.0, 3.0), (1.0, 2.0)]
    assert [call["shape"][0] for call in pipe.model.calls] == [2]


def test_save_pretrained_saves_every_part(parts: dict[str, Any], tmp_path: Path) -> None:
    saved = []
    for name in parts:
        parts[name].save_pretrained = lambda folder, name=name, **_: saved.append((name, folder))
    pipeline("automatic-speech-recognition", **parts, device="cpu").save_pretrained(tmp_path)
    assert sorted(saved) == [(name, tmp_path) for name in sorted(parts)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "automatic-speach-recognition"}, "did you mean 'automatic-speech-recognition'"),
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"task": "zzz"}, "The tasks are 'automatic-speech-recognition'"),
        ({"task": None, "model": None}, "needs a task, a model or both"),
        ({"tokenizer": None}, "tokenizer: this model does not know where it was loaded from"),
        ({"feature_extractor": None}, "feature_extractor: this model does not know"),
        ({"model": torch.nn.Linear(1, 1)}, "a Linear, which writes no text"),
        ({"decoder": object()}, "decoder= is for CTC models"),
        ({"device": "tpu9"}, "device='tpu9'"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"return_timestamps": "char"}, "no times for characters"),
        ({"task": 3}, "task=3: The tasks are"),
        ({"tokenizer": object()}, "tokenizer is a object, not that of a"),
        ({"feature_extractor": object()}, "feature_extractor is a object, not that of a"),
        ({"device": 1.5}, "device=1.5: expected 'cpu'"),
        ({"model": torch.nn.Linear}, "model=<class .*a folder, a hub id or a loaded model is needed"),
        ({"model": 3}, "model=3: a folder, a hub id or a loaded model"),
        ({"model_kwargs": "float16"}, "model_kwargs is a str; a dict"),
        ({"generate_kwargs": "german"}, "generate_kwargs is a str; a dict of options"),
        ({"generate_kwargs": {"generation_config": {}}}, "generation_config is a dict; a GenerationConfig"),
    ],
)
def test_what_cannot_be_is_refused(parts: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pipeline(**{"task": "automatic-speech-recognition", "device": "cpu", **parts, **arguments})


def test_a_spread_model_stays_where_it_is(parts: dict[str, Any]) -> None:
    parts["model"].hf_device_map = {"": "cpu"}
    assert pipeline("automatic-speech-recognition", **parts).device == torch.device("cpu")
    with pytest.raises(InputError, match="device_map"):
        pipeline("automatic-speech-recognition", **parts, device="cpu")


def test_parts_cannot_be_left_out_of_the_class(parts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="tokenizer: FakeModel needs one"):
        AutomaticSpeechRecognitionPipeline(parts["model"], feature_extractor=parts["feature_extractor"])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        pipeline("automatic-speech-recognition", model=str(tmp_path / "nowhere"))


def test_another_class_can_be_used(parts: dict[str, Any]) -> None:
    class Mine(AutomaticSpeechRecognitionPipeline):
        pass

    assert type(pipeline("automatic-speech-recognition", **parts, device="cpu", pipeline_class=Mine)) is Mine
    assert issubclass(Mine, Pipeline)
