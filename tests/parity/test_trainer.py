"""Twenty steps of our Trainer and of the reference's: the same losses, norms, rates and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-4
STEPS = 20
#: The start token of the tiny models of these tests.
START = 101


class Noise(torch.utils.data.Dataset):
    """Samples drawn by their number. For evaluation 40 of them: theirs counts a smaller last batch as a whole one."""

    def __init__(self, samples: int = 37) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 99, (9,), generator=generator)
        labels[3 + index % 6 :] = -100
        return {"input_features": torch.randn(8, 60, generator=generator), "labels": labels}


class Even(Noise):
    """Samples with what stands before their labels: theirs smooths without giving the model any labels."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        labels = sample["labels"][:3]
        before = torch.cat((torch.tensor([START]), labels[:-1]))
        return {**sample, "labels": labels, "decoder_input_ids": before}


@pytest.fixture
def loaded(reference: Any, reference_model: Any, tmp_path: Path) -> Any:
    """Makes (the reference's model, ours), both loaded from one folder."""

    def make(seed: int) -> tuple[Any, Any]:
        kind = "WhisperForConditionalGeneration"
        reference_model(kind, seed=seed).save_pretrained(tmp_path / "model")
        return tuple(getattr(package, kind).from_pretrained(tmp_path / "model") for package in (reference, audiomm))

    return make


def run(package: Any, model: Any, folder: Path, options: dict[str, Any], **given: Any) -> Any:
    arguments = package.Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=STEPS, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none",
        train_sampling_strategy="sequential", disable_tqdm=True, **{"per_device_train_batch_size": 4, **options},
    )  # fmt: skip
    data = Even(36) if options.get("label_smoothing_factor") else Noise()
    given = {"train_dataset": data, **given}
    trainer = package.Seq2SeqTrainer(model=model, args=arguments, **given)
    result = trainer.train()
    return trainer, result


def close(one: float, other: float) -> bool:
    return abs(one - other) <= CLOSE * max(abs(one), 1e-3)


RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {"learning_rate": 1e-3},
    "cosine": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1},
    "warm-up as a share": {"learning_rate": 1e-3, "warmup_steps": 0.25, "max_grad_norm": 0.3, "adam_beta2": 0.95},
    "evaluations": {"learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 8, "eval_on_start": True},
    # Theirs averages accumulated batches of Whisper as if each had been given alone: one of as many samples instead.
    "accumulation": {"learning_rate": 1e-3, "per_device_train_batch_size": 12, "max_grad_norm": 0.5},
    "smoothing": {"learning_rate": 1e-3, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 10},
    "restarts": {
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3},
    },
    "cosine to a floor": {
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4},
        "warmup_steps": 2,
    },
    "polynomial": {
        "learning_rate": 1e-3, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0},
        "warmup_steps": 3,
    },
    "checkpointing": {"learning_rate": 1e-3, "gradient_checkpointing": True},
    "plain descent": {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps_are_the_same(name: str, reference: Any, loaded: Any, tmp_path: Path) -> None:
    theirs, ours = loaded(3)
    data = Even if name == "smoothing" else Noise
    given = {"eval_dataset": data(40)} if "eval_strategy" in RECIPES[name] else {}
    expected, expected_result = run(reference, theirs, tmp_path / "theirs", RECIPES[name], **given)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3} if name == "accumulation" else {}
    found, result = run(audiomm, ours, tmp_path / "ours", RECIPES[name] | split, **given)
    theirs_log, ours_log = expected.state.log_history, found.state.log_history
    assert len(theirs_log) == len(ours_log)
    for one, other in zip(theirs_log, ours_log, strict=True):
        assert set(one) - {"total_flos", "eval_model_preparation_time"} == set(other), (one, other)
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "step", "eval_loss", "train_loss"):
            if key in one and not (key == "epoch" and split):  # fractions of an epoch are told by batches
                assert close(one[key], other[key]), (key, one, other)
    assert close(expected_result.training_loss, result.training_loss)
    assert expected_result.global_step == result.global_step == STEPS
    final = dict(ours.named_parameters())
    worst = max(float((value - final[key]).norm() / value.norm()) for key, value in theirs.named_parameters())
    assert worst < CLOSE, worst
    losses = [entry["loss"] for entry in ours_log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_state_and_the_evaluation_have_the_same_names(reference: Any, loaded: Any, tmp_path: Path) -> None:
    theirs, ours = loaded(4)
    options = {"learning_rate": 1e-3}
    metrics = []
    for package, model in ((reference, theirs), (audiomm, ours)):
        trainer, _ = run(package, model, tmp_path / package.__name__, options, eval_dataset=Noise(40))
        metrics.append((trainer.evaluate(), trainer.predict(Noise(), metric_key_prefix="p"), trainer.state))
    (evaluated, predicted, state), (mine, own, my_state) = metrics
    ignored = {"eval_model_preparation_time", "p_model_preparation_time"}
    assert set(evaluated) - ignored == set(mine)
    assert close(evaluated["eval_loss"], mine["eval_loss"])
    assert set(predicted.metrics) - ignored == set(own.metrics)
    assert predicted.label_ids.tolist() == own.label_ids.tolist()
    assert predicted.predictions[0].shape == own.predictions.shape, "theirs holds states of the encoder, too"
    assert abs(predicted.predictions[0] - own.predictions).max() < 1e-3
    for name in ("epoch", "global_step", "max_steps", "num_train_epochs", "train_batch_size"):
        assert getattr(state, name) == getattr(my_state, name), name


def test_evaluation_writes_the_same_tokens(reference: Any, loaded: Any, tmp_path: Path) -> None:
    theirs, ours = loaded(5)
    for model in (theirs, ours):
        model.generation_config.language, model.generation_config.task = "en", "transcribe"
    seen: dict[str, list[Any]] = {}
    results = []
    options = {
        "learning_rate": 1e-3, "predict_with_generate": True, "generation_max_length": 12, "eval_strategy": "steps",
        "eval_steps": 10,
    }  # fmt: skip
    for package, model in ((reference, theirs), (audiomm, ours)):
        kept = seen.setdefault(package.__name__, [])

        def measure(prediction: Any, kept: list[Any] = kept) -> dict[str, float]:
            kept.append(prediction)
            return {"wer": float((prediction.predictions > 50).mean())}

        trainer, _ = run(
            package, model, tmp_path / package.__name__, options, eval_dataset=Noise(24), compute_metrics=measure
        )
        results.append((trainer.predict(Noise(16)), trainer.state.log_history))
    (predicted, history), (mine, my_history) = results
    for one, other in zip(seen["transformers"], seen["audiomm"], strict=True):
        labels = other.label_ids.shape[1]
        assert one.label_ids[:, :labels].tolist() == other.label_ids.tolist(), "theirs are padded to the longest answer"
        width = min(one.predictions.shape[1], other.predictions.shape[1])
        assert one.predictions[:, :width].tolist() == other.predictions[:, :width].tolist()
        assert width > 4
    assert mine.metrics["test_loss"] == pytest.approx(predicted.metrics["test_loss"], rel=CLOSE)
    evaluated = [[e for e in log if "eval_loss" in e] for log in (history, my_history)]
    for one, other in zip(*evaluated, strict=True):
        assert close(one["eval_loss"], other["eval_loss"])
        assert {"eval_wer", "eval_loss"} <= set(other)
