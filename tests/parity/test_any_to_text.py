"""The doors of the models that answer beside the reference's pipelines: the same calls give the same results."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import audiomm
import audiomm.models.gemma3n.processing as gemma3n
import audiomm.models.gemma4.processing as gemma4

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

GREEDY = {"do_sample": False, "max_new_tokens": 6}
TEMPLATES = {
    "gemma3n": gemma3n.Gemma3nProcessor.fallback_template,
    "gemma4": gemma4.Gemma4Processor.fallback_template,
}
MARKS = {"gemma3n": ("<image_soft_token>", "<audio_soft_token>"), "gemma4": ("<|image|>", "<|audio|>")}
CHAT = [{"role": "user", "content": "hello the"}]
CONTINUED = [*CHAT, {"role": "assistant", "content": "so"}]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def family(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, golden: Path, tmp_path_factory: Any) -> Path:
    """A small checkpoint with a chat template, which the reference cannot do without."""
    made = tmp_path_factory.mktemp(family) / "checkpoint"
    shutil.copytree(golden / family / "processor" / "checkpoint", made)
    (made / "chat_template.jinja").write_text(TEMPLATES[family])
    return made


@pytest.fixture(scope="module")
def pair(reference: Any, folder: Path) -> Any:
    """Makes (the reference's pipeline, ours) for a task."""

    def make(task: str) -> tuple[Any, Any]:
        try:
            theirs = reference.pipeline(task, model=str(folder), device="cpu")
        except ImportError as error:
            pytest.skip(f"the reference cannot make this pipeline here: {str(error).strip().splitlines()[0]}")
        return theirs, audiomm.pipeline(task, model=str(folder), device="cpu")

    return make


def comparable(value: Any) -> Any:
    """Results with tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: comparable(one) for name, one in value.items()}
    return [comparable(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("hello", {}),
        (["hello", "the hello"], {}),
        (["hello"], {}),
        (["hello", "the hello hello"], {"batch_size": 2}),
        ("hello", {"return_full_text": False}),
        ("hello", {"return_tensors": True}),
        ("", {}),
        ("hello", {"prefix": "the "}),
        ("hello", {"add_special_tokens": False}),
        ("hello", {"stop_sequence": "e"}),
        ("hello", {"tokenizer_encode_kwargs": {"add_special_tokens": False}}),
        (["hello", "the"], {"num_beams": 2, "num_return_sequences": 2}),
        (CHAT, {}),
        ([CHAT, CHAT], {}),
        ([CHAT], {"return_full_text": False}),
        (CONTINUED, {}),
        (CONTINUED, {"continue_final_message": False}),
    ],
)
def test_text_generation_gives_what_the_reference_gives(pair: Any, inputs: Any, options: dict[str, Any]) -> None:
    theirs, ours = pair("text-generation")
    assert ours(inputs, **options, **GREEDY) == theirs(inputs, **options, **GREEDY)


def test_scores_are_those_of_the_reference(pair: Any) -> None:
    theirs, ours = pair("text-generation")
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    (mine,), (expected,) = ours("hello", **options), theirs("hello", **options)
    np.testing.assert_allclose(mine["logits"], expected["logits"], atol=1e-4)


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_questions_about_media_give_what_the_reference_gives(pair: Any, family: str, task: str) -> None:
    from PIL import Image

    theirs, ours = pair(task)
    make = np.random.default_rng(0)
    image = Image.fromarray(make.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    clip = make.normal(0, 0.1, 8000).astype(np.float32)
    image_mark, audio_mark = MARKS[family]
    calls: list[dict[str, Any]] = [
        {"text": "hello"},
        {"text": ["hello", "the hello"]},
        {"text": "hello", "return_full_text": False},
        {"text": "hello", "return_tensors": True},
        {"images": image, "text": image_mark + " hello"},
        {"images": image, "text": image_mark + " hello", "return_full_text": False},
        # In text, the reference repeats a prompt that decoding does not give back letter by letter.
        {"images": [image, image], "text": f"{image_mark} hello {image_mark}", "return_tensors": True},
    ]
    if task == "any-to-any":
        calls += [
            {"audio": clip, "text": audio_mark + " hello"},
            {"audio": [clip, clip[:8000]], "text": [audio_mark + " hello", audio_mark]},
        ]
    for call in calls:
        # The reference writes into the options it is given.
        mine, expected = (
            pipe(**call, max_new_tokens=5, generate_kwargs={"do_sample": False}) for pipe in (ours, theirs)
        )
        assert comparable(mine) == comparable(expected), call
