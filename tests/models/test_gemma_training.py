"""Fine-tuning of both Gemmas as users do it: chats through the collator, towers, adapters, and several processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from audiomm import DataCollatorForCausalLM, LoraConfig, add_lora, freeze, trainable_report


@pytest.fixture(params=["gemma3n", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def parts(family: str, gemmas: Any) -> tuple[Any, Any]:
    """(model, collator)."""
    make_processor, make_model = gemmas.FAMILIES[family]
    processor = make_processor()
    return make_model(processor), DataCollatorForCausalLM(processor)


def sample(answer: str, *media: dict[str, Any]) -> dict[str, Any]:
    content = [*media, {"type": "text", "text": "say it"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def heard(gemmas: Any, answer: str, seed: int = 0) -> dict[str, Any]:
    return sample(answer, {"type": "audio", "audio": gemmas.noise(0.35, seed, level=0.02 * 2**seed)})


def seen(gemmas: Any, answer: str, seed: int = 0) -> dict[str, Any]:
    return sample(answer, {"type": "image", "image": gemmas.picture(seed)})


@pytest.mark.slow
def test_eight_pairs_of_sound_and_text_are_learnt_by_heart(parts, gemmas) -> None:
    model, collate = parts
    batch = collate([heard(gemmas, answer, seed) for seed, answer in enumerate("abcdefgh")])
    assert batch["labels"].shape == batch["input_ids"].shape
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    while len(losses) < 300 and (not losses or losses[-1] > 0.02):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02
    start = int((batch["labels"][0] != -100).int().argmax())
    sound = {name: batch[name] for name in ("input_features", "input_features_mask")}
    written = model.generate(batch["input_ids"][:, :start], **sound, do_sample=False, max_new_tokens=3)[:, start:]
    answers = collate.processor.batch_decode(written, skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == list("abcdefgh")


def test_recomputed_gradients_are_the_plain_ones_with_sound_and_pictures(parts, gemmas) -> None:
    model, collate = parts
    batch = collate([heard(gemmas, "one"), seen(gemmas, "the other one")])
    gradients = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            twin.gradient_checkpointing_enable()
        twin(**batch).loss.backward()
        gradients.append({name: one.grad for name, one in twin.named_parameters() if one.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert any("audio_tower" in name for name in plain)
    assert any("vision_tower" in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6), name


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides")
def test_batches_of_one_kind_train_without_a_search_for_unused_weights(parts, gemmas, one_process: None) -> None:
    """Complaints LlamaFactory#8693, trl#5032, axolotl#3584: text, sound or pictures alone, 3 steps each."""
    model, collate = parts
    wrapped = DistributedDataParallel(model.train(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [
        collate([sample("one"), sample("two")]),
        collate([heard(gemmas, "one"), heard(gemmas, "two", 1)]),
        collate([seen(gemmas, "one"), seen(gemmas, "two", 1)]),
    ]
    assert "input_features" not in batches[0]
    assert "pixel_values" not in batches[1]
    for batch in batches:
        for _ in range(3):
            loss = wrapped(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
    assert all(weight.grad is not None for weight in model.parameters())


def test_token_types_need_not_be_passed(parts, gemmas) -> None:
    model, collate = parts
    batch = collate([seen(gemmas, "one")])
    expected = model(**batch).loss
    for name in ("mm_token_type_ids", "token_type_ids"):
        batch.pop(name, None)
    assert torch.allclose(model(**batch).loss, expected)


@pytest.mark.parametrize("part", ["audio_tower", "language_model"])
def test_adapters_of_one_part_learn_and_nothing_else_does(parts, gemmas, part: str) -> None:
    model, collate = parts
    batch = collate([heard(gemmas, "one"), heard(gemmas, "two", 1)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, LoraConfig(r=2, target_modules=rf".*{part}.*(q_proj|v_proj|post|ffw_layer_1|down_proj).*"))
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert all(part in name and "lora_" in name for name in trained)
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_training_the_sound_tower_trains_it(parts, gemmas) -> None:
    """Complaint unsloth notebooks#295: an audio fine-tune that trained no audio weights."""
    model, collate = parts
    report = freeze(model, except_="audio_tower")
    trainable, every = report["model.audio_tower"]
    assert trainable == every > 0
    assert sum(trained for trained, _ in trainable_report(model).values()) == trainable
    model.train()(**collate([heard(gemmas, "one")])).loss.backward()
    names = {name for name, value in model.named_parameters() if value.grad is not None}
    assert names
    assert all("audio_tower" in name for name in names)
