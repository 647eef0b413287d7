"""What people pass to a Trainer by mistake: each answer names it and says what is needed, before any training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import audiomm
from audiomm import ConfigError, InputError, Seq2SeqTrainingArguments, TrainingArguments

ROW = {"input_features": np.zeros((8, 40), np.float32), "labels": [5, 6, 7]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "openai/whisper-tiny"}, r"model is a str; a model is needed.*from_pretrained"),
        (
            {"train_dataset": {"train": [ROW], "test": [ROW]}},
            "train_dataset is a dict.*holds 'train', 'test': pass one",
        ),
        ({"train_dataset": "fsdd"}, "train_dataset is a str; samples"),
        (
            {"data_collator": audiomm.DataCollatorSpeechSeq2SeqWithPadding},
            "data_collator is the class DataCollatorSpee",
        ),
        ({"data_collator": 3}, "data_collator is a int; a function"),
        ({"compute_metrics": "wer"}, "compute_metrics is a str; a function"),
        ({"compute_loss_func": 3}, "compute_loss_func is a int"),
        ({"callbacks": audiomm.EarlyStoppingCallback(3)}, r"callbacks is a EarlyStoppingCallback: pass a list"),
        ({"callbacks": ["wandb"]}, "callbacks holds a str; objects or classes of TrainerCallback"),
        ({"optimizers": torch.optim.AdamW}, r"a pair \(optimizer, schedule\) of objects"),
        ({"optimizers": (torch.optim.AdamW, None)}, "classes go into optimizer_cls_and_kwargs"),
    ],
)
def test_parts_of_another_kind_are_named(make_trainer: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(**options)


def test_arguments_in_a_dict_are_none(make_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"args is a dict; TrainingArguments\(...\) are needed"):
        audiomm.Trainer(model=make_model(), args={"output_dir": "run"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": "10"}, "max_steps='10': a whole number"),
        ({"max_steps": 2.5}, "max_steps=2.5: a whole number"),
        ({"seed": "x"}, "seed='x': a whole number"),
        ({"output_dir": 3}, "output_dir=3: the path of a folder"),
    ],
)
def test_values_of_another_kind_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingArguments(**options)


@pytest.mark.parametrize(("evaluated", "saved"), [(3, 4), (4, 2), (0.1, 4), (0.2, 0.3)])
def test_the_best_model_is_only_promised_where_it_is_saved(evaluated: float, saved: float) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ConfigError, match=f"save_steps={saved} and eval_steps={evaluated}.*a multiple of eval_steps"):
        Seq2SeqTrainingArguments(eval_steps=evaluated, save_steps=saved, **best)
    Seq2SeqTrainingArguments(eval_steps=2, save_steps=4, **best)
    Seq2SeqTrainingArguments(eval_steps=0.1, save_steps=0.3, **best)


@pytest.mark.parametrize("answer", [None, 0.25])
def test_metrics_are_a_dict(make_trainer: Any, answer: Any) -> None:
    trainer = make_trainer(eval_dataset=[ROW], data_collator=None, compute_metrics=lambda prediction: answer)
    with pytest.raises(ConfigError, match=f"compute_metrics returned a {type(answer).__name__}; a dict"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([3, 4], "a batch holds a int; samples are dicts"),
        ([], "a batch holds nothing"),
        ([ROW, {**ROW, "labels": "one two"}], "sample 1 of the batch has the labels 'one two'.*goes into 'text'"),
        ([ROW, {**ROW, "labels": [[5, 6]]}], "sample 1 of the batch has the labels .*token ids in a row"),
        (
            [ROW, {**ROW, "input_features": np.zeros((8, 30), np.float32)}],
            r"sample 1 of the batch has input_features of shape \(8, 30\) and sample 0 of \(8, 40\)",
        ),
    ],
)
def test_samples_that_make_no_batch_are_named(rows: list[Any], words: str) -> None:
    collate = audiomm.DataCollatorSpeechSeq2SeqWithPadding(None, decoder_start_token_id=3)
    with pytest.raises(InputError, match=words):
        collate(rows)
