"""Arguments: the names users know, old ones refused, values checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

import audiomm
from audiomm.base.errors import ConfigError
from audiomm.training.arguments import RENAMED, WITHOUT_EFFECT

make = audiomm.TrainingArguments


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_old_names_are_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match=f"TrainingArguments has no '{name}'; {RENAMED[name].split('(')[0]}"[:60]):
        make(**{name: 1})


def test_misspelt_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="has no 'learning_rat'; did you mean 'learning_rate'"):
        make(learning_rat=1e-3)
    with pytest.raises(ConfigError, match="Seq2SeqTrainingArguments has no 'zzz'; check the spelling"):
        audiomm.Seq2SeqTrainingArguments(zzz=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_strategy": "sometimes"}, "eval_strategy='sometimes': expected one of no, steps, epoch"),
        ({"optim": "lion"}, "optim='lion': expected one of adamw_torch"),
        ({"lr_scheduler_type": "up"}, "lr_scheduler_type='up'"),
        ({"save_strategy": "worst"}, "save_strategy='worst'"),
        ({"train_sampling_strategy": "length"}, "train_sampling_strategy='length'"),
        ({"nan_policy": "hope"}, "nan_policy='hope'"),
        ({"hub_strategy": "never"}, "hub_strategy='never'"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"fp16": True, "use_cpu": True}, "fp16=True needs a CUDA device"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: a number of at least 1"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"gradient_accumulation_steps": "2"}, "gradient_accumulation_steps='2'"),
        ({"num_train_epochs": True}, "num_train_epochs=True"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0: it must be below 1"),
        ({"save_total_limit": 0}, "save_total_limit=0: at least 1"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0 with eval_strategy='steps'"),
        ({"save_steps": 0}, "save_steps=0 with save_strategy='steps'"),
        ({"logging_steps": 2.5}, "logging_steps=2.5: above 1 it is a number of steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "goes by evaluations: set eval_strategy"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "bf16_full_eval and fp16_full_eval exclude each other"),
        ({"lr_scheduler_kwargs": "{num_cycles: 2}"}, "lr_scheduler_kwargs=.{num_cycles: 2}. is no JSON"),
        ({"logging_steps": 0}, "logging_steps=0 with logging_strategy='steps'"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
            "make both 'steps' or both 'epoch'",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


def test_defaults_are_those_of_transformers() -> None:
    args = make()
    expected = {
        "output_dir": "trainer_output", "num_train_epochs": 3.0, "max_steps": -1, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "weight_decay": 0.0, "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "logging_strategy": "steps", "logging_steps": 500,
        "eval_strategy": "no", "save_strategy": "steps", "save_steps": 500, "seed": 42, "report_to": [],
        "remove_unused_columns": True, "average_tokens_across_devices": True, "data_seed": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_what_is_left_out_follows_from_the_rest() -> None:
    assert make(eval_strategy="steps", logging_steps=20).eval_steps == 20
    best = make(eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True)
    assert (best.metric_for_best_model, best.greater_is_better) == ("loss", False)
    assert make(metric_for_best_model="wer").greater_is_better is False
    assert make(metric_for_best_model="eval_accuracy").greater_is_better is True
    assert make(metric_for_best_model="wer", greater_is_better=True).greater_is_better is True
    assert make(report_to="tensorboard").report_to == ["tensorboard"]
    assert audiomm.Seq2SeqTrainingArguments(sortish_sampler=True).train_sampling_strategy == "group_by_length"


def test_what_transformers_says_by_itself_is_dropped_and_anything_else_refused() -> None:
    usual = {name: value[0] if isinstance(value, tuple) else value for name, value in WITHOUT_EFFECT.items()}
    assert make(**usual) == make()
    with pytest.raises(
        ConfigError, match="no 'include_num_input_tokens_seen'; it is not part of this library, so 'all'"
    ):
        make(include_num_input_tokens_seen="all")
    with pytest.raises(ConfigError, match="TrainingArguments has no 'use_liger_kernel'; leave it out: scores are made"):
        make(use_liger_kernel=True)


def test_one_argument_implies_another() -> None:
    assert make(eval_strategy="epoch").do_eval
    assert make(torch_compile_backend="eager").torch_compile
    assert make(output_dir=None).output_dir == "trainer_output"
    assert make(report_to=None).report_to == make(report_to=["none"]).report_to == []
    assert make(lr_scheduler_kwargs='{"num_cycles": 2}').lr_scheduler_kwargs == {"num_cycles": 2}
    assert make(eval_strategy="steps", lr_scheduler_type="reduce_lr_on_plateau").metric_for_best_model == "loss"


def test_shares_of_a_run_become_steps() -> None:
    assert make(warmup_steps=0.1).get_warmup_steps(200) == 20
    assert make(warmup_steps=7).get_warmup_steps(200) == 7
    assert make.every(0.25, 200) == 50
    assert make.every(0.001, 200) == 1
    assert make.every(0.3, 25) == 8, "a part of a step is a step, as in transformers"
    assert make(warmup_steps=0.1).get_warmup_steps(25) == 3
    assert make.every(30, 200) == 30
    assert make.every(None, 200) == 0


def test_arguments_are_written_without_secrets() -> None:
    text = make(hub_token="hf_secret").to_json_string()
    assert "hf_secret" not in text
    assert json.loads(text)["hub_token"] == "<HUB_TOKEN>"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp16_full_eval": True, "use_cpu": True}, "fp16_full_eval=True needs a CUDA device; on a CPU use bf16_full_"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "is known, which is how layers are recomputed"),
        ({"fsdp_config": {"offload": True}}, "fsdp_config does nothing without fsdp"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor does nothing without workers"),
        ({"fsdp": "full_shard hybrid"}, "fsdp='full_shard hybrid': known are full_shard, shard_grad_op, auto_wrap"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


def test_unknown_settings_of_accelerate_are_refused(make_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="accelerator_config: dispatch_batches cannot be set"):
        make_trainer(accelerator_config={"dispatch_batches": True})
    with pytest.raises(ConfigError, match="fsdp_config: color is not known; accepted are"):
        make_trainer(fsdp=True, fsdp_config={"color": "red"})
