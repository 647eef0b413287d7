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
