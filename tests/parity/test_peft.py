"""PEFT on models of this library: its adapters train, are saved, go on exactly, load, merge, and travel to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm
from audiomm.base.errors import GenerationError

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


class Noise(torch.utils.data.Dataset):
    """Samples drawn by their number, with a key that no model takes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 99, (6,), generator=generator)
        return {"input_features": torch.randn(8, 60, generator=generator), "labels": labels, "speaker": index}


@pytest.fixture
def peft(reference: Any) -> Any:
    return pytest.importorskip("peft")


@pytest.fixture
def adapted(peft: Any, pair: Any) -> Any:
    """Makes the same model of ours in PEFT's wrapper each time."""

    def make(**options: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(pair()[1], peft.LoraConfig(**(TARGETS | options)))

    return make


def train(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    values = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 3, "logging_steps": 1} | options
    arguments = audiomm.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, disable_tqdm=True, use_cpu=True, **values
    )
    trainer = audiomm.Trainer(model, arguments, train_dataset=Noise(), eval_dataset=Noise())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_wrapped_model_trains_is_saved_and_goes_on_exactly(adapted: Any, tmp_path: Path) -> None:
    whole = train(adapted(lora_dropout=0.1), tmp_path / "whole")
    assert losses(whole)[-1] < losses(whole)[0]
    half = tmp_path / "whole" / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in half.iterdir()}
    assert not (half / "model.safetensors").exists(), "the frozen weights are not saved again"
    resumed = train(adapted(lora_dropout=0.1), tmp_path / "resumed", half)
    assert losses(resumed) == losses(whole)
    theirs = resumed.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.model.state_dict().items())
    best = train(
        adapted(), tmp_path / "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, label_names=None
    )
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric, rel=1e-6)


def test_a_checkpoint_of_other_adapters_is_refused(adapted: Any, tmp_path: Path) -> None:
    train(adapted(), tmp_path / "run", max_steps=3)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    for other in (["q_proj"], ["q_proj", "v_proj", "k_proj"]):
        with pytest.raises(audiomm.ResumeError, match="does not hold the weights of the adapter 'default'"):
            train(adapted(target_modules=other), tmp_path / "other", checkpoint)


def test_what_was_trained_loads_merges_and_travels(
    adapted: Any, peft: Any, pair: Any, inputs_for: Any, tmp_path: Path
) -> None:
    inputs = inputs_for("WhisperForConditionalGeneration")
    trainer = train(adapted(), tmp_path / "run", max_steps=3)
    trainer.save_model()
    expected = logits(trainer.model, inputs)
    theirs, ours = pair()
    assert float((logits(ours, inputs) - expected).abs().max()) > 1e-3
    again = peft.PeftModel.from_pretrained(ours, tmp_path / "run")
    assert torch.allclose(logits(again, inputs), expected, atol=1e-5)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "run")
    assert torch.allclose(logits(read, inputs), expected, atol=1e-4), "on the reference's model, too"
    written = again.generate(input_features=inputs["input_features"], max_new_tokens=4, do_sample=False)
    merged = again.merge_and_unload()
    assert type(merged) is audiomm.WhisperForConditionalGeneration
    assert torch.allclose(logits(merged, inputs), expected, atol=1e-5)
    assert torch.equal(
        merged.generate(input_features=inputs["input_features"], max_new_tokens=4, do_sample=False), written
    )
    mine = audiomm.load_lora(pair()[1], tmp_path / "run")
    assert torch.allclose(logits(mine, inputs), expected, atol=1e-5)


def test_adapters_of_this_library_load_into_a_wrapped_model(
    peft: Any, pair: Any, inputs_for: Any, tmp_path: Path
) -> None:
    inputs = inputs_for("WhisperForConditionalGeneration")
    model = audiomm.add_lora(pair()[1], audiomm.LoraConfig(**TARGETS))
    trainer = train(model, tmp_path / "run", max_steps=3)
    expected = logits(trainer.model, inputs)
    wrapped = peft.PeftModel.from_pretrained(pair()[1], tmp_path / "run" / "checkpoint-3", is_trainable=True)
    assert torch.allclose(logits(wrapped, inputs), expected, atol=1e-5)
    assert losses(train(wrapped, tmp_path / "more", max_steps=3))[-1] < losses(trainer)[0]


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_wrapped_gemmas_learn_answer_and_load(
    family: str, targets: Any, peft: Any, gemmas: Any, tmp_path: Path
) -> None:
    make_processor, make_model = gemmas.FAMILIES[family]
    processor = make_processor()
    question = [{"type": "audio", "audio": gemmas.noise()}, {"type": "text", "text": "hello"}]
    asked = [{"role": "user", "content": question}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    before = logits(make_model(processor), inputs)
    config = peft.LoraConfig(**(TARGETS | {"target_modules": targets, "task_type": "CAUSAL_LM"}))
    arguments = audiomm.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, logging_steps=1, disable_tqdm=True, use_cpu=True
    )
    trainer = audiomm.Trainer(
        peft.get_peft_model(make_model(processor), config), arguments, audiomm.DataCollatorForCausalLM(processor),
        [{"messages": [*asked, {"role": "assistant", "content": "the end"}]}] * 8,
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    again = peft.PeftModel.from_pretrained(make_model(processor), tmp_path / "checkpoint-4")
    expected = logits(trainer.model, inputs)
    assert float((expected - before).abs().max()) > 1e-2
    assert torch.equal(logits(again, inputs), expected)
    written = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]
    mine = audiomm.load_lora(make_model(processor), tmp_path / "checkpoint-4")
    assert torch.allclose(logits(mine, inputs), expected, atol=1e-4)


def test_virtual_tokens_are_refused_where_they_would_be_left_out(peft: Any, gemmas: Any) -> None:
    make_processor, make_model = gemmas.FAMILIES["gemma4"]
    processor = make_processor()
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(processor), config)
    with pytest.raises(GenerationError, match="cannot put virtual tokens in front of a prompt"):
        model.generate(**processor(text="hello", return_tensors="pt"), max_new_tokens=3)
