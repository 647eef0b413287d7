"""Processors, tokenizers and chats of both Gemmas beside the reference's, over random samples, and files both ways."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import audiomm.models.gemma3n.processing as gemma3n
import audiomm.models.gemma4.processing as gemma4
from audiomm.base.chat import conversations_of, render_chat
from audiomm.base.errors import AudiommError
from audiomm.base.tool_schema import function_schema

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FAMILIES = {
    "gemma3n": (gemma3n.Gemma3nProcessor, "Gemma3nProcessor"),
    "gemma4": (gemma4.Gemma4Processor, "Gemma4Processor"),
}
MARKS = {
    "gemma3n": {"image": "<image_soft_token>", "audio": "<audio_soft_token>"},
    "gemma4": {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"},
}
WORDS = ["Where", " is", "the cat ", "\n", "  ", "naïve", "日本", "🎧", "1,234.5", "don't", "?", "<", "|>", ""]
PIXEL_TOLERANCE = 1.05 / 255


@pytest.fixture(scope="module", params=list(FAMILIES))
def processors(request: Any, reference: Any, golden: Path) -> tuple[str, Any, Any]:
    """(family, the reference's processor, ours) of one small checkpoint."""
    ours, name = FAMILIES[request.param]
    folder = golden / request.param / "processor" / "checkpoint"
    try:
        theirs = getattr(reference, name).from_pretrained(folder)
    except ImportError as error:
        pytest.skip(f"the reference cannot make a {name} here: {error}")
    return request.param, theirs, ours.from_pretrained(folder)


def text(choose: random.Random, most: int = 6) -> str:
    return "".join(choose.choice(WORDS) for _ in range(choose.randrange(most)))


def medium(kind: str, seed: int, long: bool = False) -> np.ndarray:
    make = np.random.default_rng(seed)
    if kind == "audio":
        return make.normal(0, 0.1, 9000 + 700 * (seed % 5) * long).astype(np.float32)
    height, width = 20 + seed % 40, 20 + seed * 7 % 60
    return make.integers(0, 256, ((6,) if kind == "video" else ()) + (height, width, 3), dtype=np.uint8)


def sample(family: str, seed: int) -> dict[str, Any]:
    """Arguments of a call: texts with marks among words, and media for them, nested or flat."""
    choose = random.Random(seed)
    marks = MARKS[family]
    texts: list[str] = []
    lists: dict[str, list[list[Any]]] = {kind: [] for kind in marks}
    for row in range(choose.randrange(1, 4)):
        kinds = [choose.choice(list(marks)) for _ in range(choose.randrange(4))]
        pieces = [text(choose) + marks[kind] for kind in kinds]
        texts.append("".join(pieces) + text(choose))
        for kind in marks:
            # The reference's clips of one batch must be equally long: it gives others other features than alone.
            made = [medium(kind, seed * 31 + row * 7 + n, family == "gemma4") for n in range(kinds.count(kind))]
            lists[kind].append(made)
    call: dict[str, Any] = {"text": texts if len(texts) > 1 or choose.random() < 0.5 else texts[0]}
    names = {"image": "images", "audio": "audio", "video": "videos"}
    for kind, rows in lists.items():
        flat = [item for row in rows for item in row]
        if flat:
            # Its clips and videos are flat lists, its pictures nested ones.
            call[names[kind]] = rows if kind == "image" else flat
    if "videos" in call:
        metadata = [{"total_num_frames": 6, "fps": choose.choice([0.05, 1.0, 24.0])} for _ in call["videos"]]
        call["videos_kwargs"] = {"video_metadata": metadata}
    return call | {"padding": True, "return_tensors": "pt"}


def compare(theirs: Any, ours: Any, where: Any) -> None:
    assert set(theirs) == set(ours), where
    for name in theirs:
        one, other = torch.as_tensor(theirs[name]), torch.as_tensor(ours[name])
        assert one.shape == other.shape, (name, where)
        if one.is_floating_point():
            close = PIXEL_TOLERANCE if "pixel" in name else 2e-4
            assert float((one - other).abs().max()) <= close, (name, where)
        else:
            assert torch.equal(one.long(), other.long()), (name, where)


def test_random_mixed_samples_give_the_same_inputs(processors: tuple[str, Any, Any]) -> None:
    family, theirs, ours = processors
    for seed in range(50):
        call = sample(family, seed)
        compare(theirs(**call), ours(**call), seed)


def test_wrong_counts_are_refused_by_both(processors: tuple[str, Any, Any]) -> None:
    family, theirs, ours = processors
    mark = MARKS[family]["image"]
    for call in (
        {"text": mark}, {"text": "a", "images": medium("image", 1)}, {"text": MARKS[family]["audio"]},
        {"text": mark, "images": [medium("image", 1), medium("image", 2)]},
        {"text": [mark, mark], "images": [[medium("image", 1)]]}, {},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            theirs(**call)
        with pytest.raises(AudiommError):
            ours(**call)


def test_media_without_text_give_the_same_inputs(processors: tuple[str, Any, Any]) -> None:
    _, theirs, ours = processors
    pictures = [medium("image", seed) for seed in (1, 2)]
    for call in (
        {"images": pictures},
        {"audio": [medium("audio", 1)]},
        {"images": [[pictures[0]], pictures], "padding": True},
    ):
        compare(theirs(**call, return_tensors="pt"), ours(**call, return_tensors="pt"), sorted(call))


def test_tokenizers_agree_and_files_go_both_ways(processors: tuple[str, Any, Any], tmp_path: Path) -> None:
    family, theirs, ours = processors
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = type(theirs).from_pretrained(tmp_path / "ours")
    again = type(ours).from_pretrained(tmp_path / "theirs")
    choose = random.Random(1)
    marks = [*MARKS[family].values(), "<bos>", "<eos>"]
    for _ in range(150):
        words = "".join(choose.choice([*WORDS, *marks]) for _ in range(choose.randrange(9)))
        ids = [p.tokenizer(words)["input_ids"] for p in (theirs, ours, back, again)]
        assert ids[0] == ids[1] == ids[2] == ids[3], repr(words)
        for skip in (True, False):
            texts = [p.decode(ids[0], skip_special_tokens=skip) for p in (theirs, ours, back, again)]
            assert len(set(texts)) == 1, repr(words)
    for seed in range(5):
        call = sample(family, seed)
        compare(theirs(**call), back(**call), seed)
        compare(theirs(**call), again(**call), seed)
    assert theirs.tokenizer.padding_side == ours.tokenizer.padding_side == "left"


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is string else m.content | "
    "map(attribute='type') | join(',') }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}",
    "{%- for m in messages %}\n  {%- if loop.first and m['role'] == 'system' %}{% set s = m['content'] %}{% continue %}"
    "{% endif %}\n<{{ loop.index0 }}{{ ' last' if loop.last }}>{{ m | tojson }}\n{% endfor -%}"
    "{{ tools | tojson(indent=2) }}",
    "{% macro show(x, deep=2) %}{% if x is mapping %}{% for k, v in x | dictsort %}{{ k }}={{ show(v) }};{% endfor %}"
    "{% else %}{{ x | string | upper }}{% endif %}{% endmacro %}{{ show(messages[0]) }}"
    "{{ enable_thinking | default('?') }}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}"
    "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }}{{ ns.seen }}{{ messages | selectattr('role', 'eq', "
    "'user') | list | length }}{{ '%s-%d' % ('a', 3) }}{{ 'x' * 3 ~ 1.50 ~ true }}",
    gemma3n.Gemma3nProcessor.fallback_template,
    gemma4.Gemma4Processor.fallback_template,
]


def tool(
    city: str, days: int = 1, unit: Literal["c", "f"] = "c", tags: list[str] | None = None, more: dict | None = None
) -> str:
    """
    Tell the weather.

    Args:
        city: Where it is,
            in full.
        days: How many.
        unit: Of the temperature.
        tags: Further wishes. (choices: ["rain", "sun"])
        more: The rest.

    Returns:
        What the weather will be.
    """
    return city


def chats(seed: int) -> list[dict[str, Any]]:
    choose = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if choose.random() < 0.4:
        messages.append({"role": "system", "content": text(choose) + "s"})
    for turn in range(choose.randrange(1, 5)):
        words: Any = text(choose)
        if choose.random() < 0.5 and turn % 2 == 0:
            words = [{"type": "text", "text": words}, {"type": "image"}, {"type": "text", "text": " and "}]
        message = {"role": "assistant" if turn % 2 else "user", "content": words}
        if turn % 2 and choose.random() < 0.5:
            arguments = {"b": [1, True, {"c": "d"}], "a": text(choose), "n": 1.5}
            message |= {"tool_calls": [{"function": {"name": "tool", "arguments": arguments}}], "thinking": "hm"}
        messages.append(message)
    return messages


def test_templates_write_the_same_text(reference: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in TEMPLATES:
        for seed in range(25):
            messages = chats(seed)
            options: dict[str, Any] = {"bos_token": "<bos>"}
            options |= {"enable_thinking": True} if seed % 3 == 0 else {}
            more = {"add_generation_prompt": seed % 2 == 0, "tools": [tool] if seed % 4 else None}
            theirs, _ = render_jinja_template([messages], chat_template=template, **more, **options)
            ours, _ = render_chat(template, conversations_of(messages)[0][0], **more, **options)
            assert ours == theirs[0], (template, seed)


def test_the_last_message_is_continued_alike(reference: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</t>\n{% endfor %}"
    for template in (plain, plain.replace("m.content", "m.content | trim")):
        for words in ("It is", "It is ", " a\n", "x"):
            messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": words}]
            theirs, _ = render_jinja_template([messages], chat_template=template, continue_final_message=True)
            ours, _ = render_chat(template, messages, continue_final_message=True)
            assert ours == theirs[0], (template, words)


def test_functions_become_the_same_schemas(reference: Any) -> None:
    from transformers.utils.chat_template_utils import get_json_schema

    def other(
        a: int | float, b: dict[str, list[int]], c: bool | None, d: dict[str, int], e: list, f: int | str | None = 3
    ) -> None:
        """Do it
        all.

        Args:
            a: One.
            b: Two: with a colon.
            c: Three.
            d: Four.
            e: Five.
            f: Six.
        """

    assert function_schema(tool) == get_json_schema(tool)
    ours, theirs = function_schema(other)["function"], get_json_schema(other)["function"]
    assert ours == theirs


def test_chats_with_media_give_the_same_inputs(processors: tuple[str, Any, Any]) -> None:
    _, theirs, ours = processors
    template = type(ours).fallback_template
    for seed in range(12):
        messages = chats(seed)
        for number, message in enumerate(messages):
            if isinstance(message["content"], list):
                message["content"][1] = {"type": "image", "image": medium("image", seed + number)}
                message["content"].append({"type": "audio", "audio": medium("audio", seed)})
        options = {
            "chat_template": template, "tokenize": True, "return_dict": True, "return_tensors": "pt",
            "add_generation_prompt": seed % 2 == 0,
        }  # fmt: skip
        compare(theirs.apply_chat_template(messages, **options), ours.apply_chat_template(messages, **options), seed)
        batch = [messages, chats(seed + 100)[:1]]
        batch[1][0]["content"] = "hi"
        options |= {"processor_kwargs": {"padding": True}}
        compare(theirs.apply_chat_template(batch, **options), ours.apply_chat_template(batch, **options), seed)


def test_control_tokens_that_are_typed_become_the_same_text(processors: tuple[str, Any, Any]) -> None:
    family, theirs, ours = processors
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    mark = MARKS[family]["image"]
    for words in (f"a {mark} b", f"{mark}{mark}", "<bos>", "the <eos> is", "plain"):
        messages = [{"role": "user", "content": words}]
        for whole in (theirs, theirs.tokenizer), (ours, ours.tokenizer):
            assert whole[0].tokenizer is whole[1]
        options = {"chat_template": template, "tokenize": True, "sanitize_control_tokens": True}
        one = theirs.tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert ours.tokenizer.apply_chat_template(messages, **options)["input_ids"] == one, words
        assert ours.apply_chat_template(messages, **options)[0] == one, words


def test_assistant_masks_agree(processors: tuple[str, Any, Any]) -> None:
    family, theirs, ours = processors
    mark = MARKS[family]["image"]
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}" + mark + "{{ m.content[1].text }}{% endif %}|{% endfor %}"
    )
    messages = []
    for turn in range(3):
        content = [{"type": "image", "image": medium("image", turn)}, {"type": "text", "text": "what is"}]
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "the cat stands" * (turn + 1)},
        ]
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    one, other = (p.apply_chat_template(messages, return_tensors="pt", **options) for p in (theirs, ours))
    assert torch.equal(torch.as_tensor(one["assistant_masks"]), other["assistant_masks"])


def test_the_processor_of_the_12b_agrees(reference: Any, golden: Path, tmp_path: Path) -> None:
    folder = golden / "gemma4" / "processor" / "checkpoint"
    try:
        parts = (
            reference.Gemma4UnifiedAudioFeatureExtractor(),
            reference.Gemma4UnifiedImageProcessor(max_soft_tokens=70),
            reference.GemmaTokenizer.from_pretrained(folder),
            reference.Gemma4UnifiedVideoProcessor(max_soft_tokens=70, num_frames=2),
        )
        theirs = reference.Gemma4UnifiedProcessor(*parts)
    except ImportError as error:
        pytest.skip(f"the reference cannot make its processor here: {error}")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = gemma4.Gemma4UnifiedProcessor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = reference.Gemma4UnifiedProcessor.from_pretrained(tmp_path / "ours")
    for seed in range(8):
        call = sample("gemma4", seed)
        compare(theirs(**call), ours(**call), seed)
        compare(theirs(**call), back(**call), seed)


def test_inputs_have_the_same_names(processors: tuple[str, Any, Any]) -> None:
    _, theirs, ours = processors
    assert set(theirs.model_input_names) == set(ours.model_input_names)
