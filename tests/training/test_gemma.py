"""The Trainer on chats with sound and pictures: it learns, accumulates exactly, and goes on with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm


@pytest.fixture(params=["gemma3n", "gemma4"])
def parts(request: Any, gemmas: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """(makes the model, its collator, chats of three kinds)."""
    make_processor, make_model = gemmas.FAMILIES[request.param]
    processor = make_processor()

    def chat(index: int) -> dict[str, Any]:
        media = [
            [{"type": "audio", "audio": gemmas.noise(0.3 + index / 20, index)}],
            [{"type": "image", "image": gemmas.picture(index)}],
            [],
        ][index % 3]
        question = [*media, {"type": "text", "text": "hello"}]
        answer = ["the", "hello hello", "lo"][index % 3]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    return (lambda: make_model(processor)), audiomm.DataCollatorForCausalLM(processor), [chat(i) for i in range(12)]


def test_mixed_chats_are_learnt_and_accumulated_exactly(parts: Any, make_trainer: Any, losses: Any) -> None:
    make_model, collator, chats = parts
    runs = []
    for size, batches in ((4, 1), (2, 2)):
        trainer = make_trainer(
            f"{size}", model=make_model(), train_dataset=chats, data_collator=collator, max_steps=4,
            per_device_train_batch_size=size, gradient_accumulation_steps=batches, optim="sgd", learning_rate=0.02,
        )  # fmt: skip
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][-1] < runs[0][0]


def test_adapters_of_the_language_model_go_on_exactly(
    parts: Any, make_trainer: Any, losses: Any, same_weights: Any
) -> None:
    make_model, collator, chats = parts

    def run(folder: str) -> Any:
        torch.manual_seed(1)
        config = audiomm.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)", lora_dropout=0.1)
        model = audiomm.add_lora(make_model(), config)
        return make_trainer(
            folder, model=model, train_dataset=chats, data_collator=collator, max_steps=4, save_strategy="steps",
            save_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
        )  # fmt: skip

    whole, resumed = run("whole"), None
    whole.train()
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    assert same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_positions_that_an_answer_asks_for_are_scored(
    checkpointing: bool, parts: Any, make_trainer: Any, monkeypatch: Any
) -> None:
    make_model, collator, chats = parts
    runs = []
    for is_whole in (False, True):
        model, scored = make_model(), []
        model.lm_head.register_forward_hook(lambda head, args, out, scored=scored: scored.append(out.shape[1]))
        trainer = make_trainer(
            str(is_whole), model=model, train_dataset=chats, eval_dataset=chats, data_collator=collator, max_steps=3,
            gradient_checkpointing=checkpointing, learning_rate=0.02,
        )  # fmt: skip
        if is_whole:
            monkeypatch.setattr(type(trainer), "_can_skip_positions", False)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((scored, history, trainer.evaluate()["eval_loss"]))
    (few, history, loss), (whole, expected, whole_loss) = runs
    assert all(one < other / 2 for one, other in zip(few, whole, strict=True)), (few, whole)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for one, other in zip(history, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_batch_without_an_answer_spoils_nothing(parts: Any, make_trainer: Any) -> None:
    make_model, collator, chats = parts

    def collate(samples: Any) -> Any:
        batch = collator(samples)
        if samples[0]["messages"] is chats[1]["messages"]:
            batch["labels"][:] = -100
        return batch

    collate.columns = collator.columns
    norms = []
    for data in (chats[:1], chats[:2]):
        trainer = make_trainer(
            model=make_model(), train_dataset=data, data_collator=collate, per_device_train_batch_size=1, max_steps=1,
            gradient_accumulation_steps=2, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        norms.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
