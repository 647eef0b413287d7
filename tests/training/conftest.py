"""A task that a tiny Whisper learns in a few steps, and a Trainer for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import audiomm

#: Label tokens of sample i: between 2 and 6 of them.
SAMPLES = 20


class Tones(Dataset):
    """Noise with one loud band; the labels name the band, several times for some samples."""

    def __init__(self, samples: int = SAMPLES, noise: bool = False) -> None:
        self.samples, self.noise = samples, noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        features = 0.1 * torch.randn(8, 40, generator=generator)
        features[index % 8] += 1.0
        if self.noise:
            features = features + 0.05 * torch.randn(8, 40)
        labels = [10 + index % 8] * (1 + index % 5) + [2]
        return {"input_features": features, "labels": labels}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(sample["labels"]) for sample in samples)
    labels = [sample["labels"] + [-100] * (longest - len(sample["labels"])) for sample in samples]
    features = torch.stack([sample["input_features"] for sample in samples])
    return {"input_features": features, "labels": torch.tensor(labels)}


@pytest.fixture
def tones() -> type[Tones]:
    return Tones


@pytest.fixture
def make_model(tiny_whisper_config: Any) -> Callable[..., Any]:
    """Makes the same small model every time."""

    def make(**overrides: Any) -> Any:
        torch.manual_seed(5)
        values = {"encoder_layers": 1, "decoder_layers": 1, "init_std": 0.1}
        return audiomm.WhisperForConditionalGeneration(tiny_whisper_config(**(values | overrides)))

    return make


@pytest.fixture
def make_trainer(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., audiomm.Trainer]:
    """Makes a Trainer of the small model on tones; keywords are arguments, those of Trainer, or of the model."""

    def make(
        folder: str = "run", seq2seq: bool = False, trainer_class: Any = None, model: Any = None, **options: Any
    ) -> audiomm.Trainer:
        own = ("train_dataset", "eval_dataset", "compute_metrics", "callbacks", "compute_loss_func", "model_init",
               "preprocess_logits_for_metrics", "optimizers", "processing_class", "data_collator")  # fmt: skip
        given = {name: options.pop(name) for name in own if name in options}
        dropout = options.pop("dropout", 0.0)
        values = {
            "output_dir": str(tmp_path / folder), "per_device_train_batch_size": 4, "max_steps": 10,
            "learning_rate": 3e-3, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        }  # fmt: skip
        arguments_class = audiomm.Seq2SeqTrainingArguments if seq2seq else audiomm.TrainingArguments
        trainer_class = trainer_class or (audiomm.Seq2SeqTrainer if seq2seq else audiomm.Trainer)
        if model is None and "model_init" not in given:
            model = make_model(dropout=dropout)
        given = {"train_dataset": Tones(), "data_collator": collate, **given}
        return trainer_class(model=model, args=arguments_class(**(values | options)), **given)

    return make


@pytest.fixture
def losses() -> Callable[[Any], list[float]]:
    """The logged training losses of a Trainer."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def same_weights() -> Callable[[Any, Any], bool]:
    def same(one: Any, other: Any) -> bool:
        mine, theirs = one.state_dict(), other.state_dict()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    return same


@pytest.fixture(autouse=True)
def _log_level() -> Any:
    """Arguments may change the level of the library's logger."""
    level = logging.getLogger("audiomm").level
    yield
    logging.getLogger("audiomm").setLevel(level)
