"""Arguments: the names users know, old ones refused, values checked."""

from __future__ import annotations

import json
import logging
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


def test_setters_give_what_the_constructor_gives() -> None:
    own = make("x").set_training(1e-3, 2, 0.1, 5, 7, 3, 1, gradient_checkpointing=True)
    own.set_evaluate("steps", 9, 4, 2, None, True).set_save("epoch", total_limit=2, on_each_node=True)
    own.set_logging("epoch", report_to="tensorboard", level="info", replica_level="error", first_step=True)
    own.set_push_to_hub("me/mine", "end", "secret", True).set_testing(6)
    other = make(
        "x", do_train=True, learning_rate=1e-3, per_device_train_batch_size=2, weight_decay=0.1, num_train_epochs=5,
        max_steps=7, gradient_accumulation_steps=3, seed=1, gradient_checkpointing=True, do_eval=True,
        eval_strategy="steps", eval_steps=9, eval_accumulation_steps=2, save_strategy="epoch", save_total_limit=2,
        save_on_each_node=True, logging_strategy="epoch", report_to="tensorboard", log_level="info",
        log_level_replica="error", logging_first_step=True, logging_nan_inf_filter=False, log_on_each_node=False,
        push_to_hub=True, hub_model_id="me/mine", hub_strategy="end", hub_token="secret", hub_private_repo=True,
        do_predict=True, per_device_eval_batch_size=6,
    )  # fmt: skip
    assert own == other
    assert own.report_to == ["tensorboard"]
    own = make("x").set_optimizer("sgd", 1e-4, 0.2, 0.8, 0.9, 1e-6, "momentum=0.9")
    own.set_lr_scheduler("cosine", 2.0, 11, 0.5).set_dataloader(
        2, 3, True, 1, False, True, 4, None, True, True, True, 5
    )
    other = make(
        "x", optim="sgd", learning_rate=1e-4, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6,
        optim_args="momentum=0.9", lr_scheduler_type="cosine", num_train_epochs=2.0, max_steps=11, warmup_steps=0.5,
        per_device_train_batch_size=2, per_device_eval_batch_size=3, dataloader_drop_last=True,
        dataloader_num_workers=1, dataloader_pin_memory=False, dataloader_persistent_workers=True,
        dataloader_prefetch_factor=4, auto_find_batch_size=True, ignore_data_skip=True, data_seed=5,
    )  # fmt: skip
    assert own == other
    assert not own.set_evaluate().do_eval


def test_setters_refuse_what_the_constructor_refuses_and_set_nothing_then() -> None:
    args = make("x")
    for change, words in (
        (lambda: args.set_evaluate("steps", 0), "eval_steps=0 with eval_strategy='steps'"),
        (lambda: args.set_training(batch_size=0), "per_device_train_batch_size=0"),
        (lambda: args.set_logging(level="loud"), "log_level='loud': expected one of debug"),
        (lambda: args.set_push_to_hub("me/mine", always_push=True), "no 'hub_always_push'; it is not part of this"),
        (lambda: args.set_dataloader(in_order=False), "no 'dataloader_in_order'; it is not part of this library"),
        (lambda: args.set_optimizer("lion"), "optim='lion'"),
    ):
        with pytest.raises(ConfigError, match=words):
            change()
    assert args == make("x")


def test_values_that_do_not_go_together_are_found_when_all_are_set(make_trainer: Any) -> None:
    args = make("x", eval_strategy="steps", load_best_model_at_end=True)
    args.set_evaluate("epoch").set_save("epoch").check()
    args.set_save("steps").set_evaluate("no").set_lr_scheduler("reduce_lr_on_plateau")
    with pytest.raises(ConfigError, match="goes by evaluations"):
        args.check()
    with pytest.raises(ConfigError, match="goes by evaluations"):
        audiomm.Trainer(make_trainer().model, args)


def test_arguments_tell_of_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    args = make(per_device_train_batch_size=3, per_device_eval_batch_size=5, use_cpu=True, log_level="info")
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    assert (str(args.device), args.n_gpu, args.parallel_mode.value) == ("cpu", 0, "not_parallel")
    assert (args.train_batch_size, args.eval_batch_size, args.get_warmup_steps(10)) == (3, 5, 0)
    assert (args.should_log, args.should_save, args.get_process_log_level()) == (True, True, logging.INFO)
    with args.main_process_first():
        pass
    for name, value in {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (args.world_size, args.process_index, args.local_process_index) == (4, 3, 0)
    assert (args.parallel_mode.value, args.should_log, args.should_save) == ("distributed", True, False)
    args = make(use_cpu=True, log_on_each_node=False, save_on_each_node=True, log_level="info")
    assert (args.should_log, args.should_save, args.get_process_log_level()) == (False, True, logging.WARNING)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    args = make()
    assert (str(args.device), args.n_gpu, args.world_size) == ("cuda:1", 1, 4)
    monkeypatch.delenv("LOCAL_RANK")
    assert (str(args.device), args.world_size) == ("cuda:0", 1), "not launched: processes that know nothing of another"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    assert str(args.device) == "cuda:1"
