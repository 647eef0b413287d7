"""The Trainer: what it learns, how it counts, and what it tells."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import audiomm
from audiomm.base.errors import ConfigError, InputError, NumericalError
from audiomm.training.callbacks import EVENTS


def test_the_loss_falls_and_the_history_is_the_one_users_know(make_trainer: Any, losses: Any) -> None:
    trainer = make_trainer(max_steps=30, logging_steps=5, learning_rate=5e-3)
    result = trainer.train()
    curve = losses(trainer)
    assert len(curve) == 6
    assert curve[-1] < 0.6 * curve[0], curve
    steps, loss, metrics = result
    assert (steps, loss) == (result.global_step, result.training_loss) == (30, pytest.approx(np.mean(curve)))
    assert metrics is result.metrics
    expected = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"}
    assert set(metrics) == expected
    assert set(trainer.state.log_history[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(5e-3 * (1 - 4 / 30)), "of the step itself"
    assert trainer.state.log_history[0]["epoch"] == 1.0
    lines = (Path(trainer.args.output_dir) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("loss") for line in lines][:6] == curve


def test_the_training_loss_is_known_without_logs(make_trainer: Any, losses: Any) -> None:
    loud = make_trainer("loud", max_steps=4)
    expected = loud.train().training_loss
    assert make_trainer("quiet", max_steps=4, logging_strategy="no").train().training_loss == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_accumulated_batches_are_the_one_big_batch(smoothing: float, make_trainer: Any, losses: Any) -> None:
    """The rows have different numbers of label tokens, so a mean of means would differ."""
    runs = []
    for size, parts in ((8, 1), (4, 2), (1, 8)):
        trainer = make_trainer(
            f"run{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=4,
            label_smoothing_factor=smoothing,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        runs.append((losses(trainer), torch.cat([value.detach().flatten() for value in trainer.model.parameters()])))
    for curve, weights in runs[1:]:
        assert curve == pytest.approx(runs[0][0], abs=2e-6)
        assert float((weights - runs[0][1]).abs().max()) < 1e-6


def test_a_batch_without_any_label_token_spoils_nothing(make_trainer: Any, tones: Any) -> None:
    class Gaps(tones):  # type: ignore[misc, name-defined]
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            return {**sample, "labels": [-100] * 3} if index in (2, 3) else sample

    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(train_dataset=Gaps(8), train_sampling_strategy="sequential", **options)
    assert math.isfinite(trainer.train().training_loss)


def test_label_smoothing_is_the_loss_of_the_paper(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(label_smoothing_factor=0.1, eval_dataset=tones(4))
    batch = trainer._collate()([tones()[index] for index in range(4)])
    with torch.no_grad():
        logits = trainer.model(**batch).logits
        logs = logits.log_softmax(-1)
        real = batch["labels"] != -100
        picked = logs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        expected = -(0.9 * picked + 0.1 * logs.mean(-1))[real].mean()
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_function_of_the_users_gets_the_tokens_of_the_whole_step(make_trainer: Any, losses: Any) -> None:
    def mean_over_all(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        flat = outputs.logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum") / num_items_in_batch

    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    plain, own = make_trainer("a", **options), make_trainer("b", compute_loss_func=mean_over_all, **options)
    plain.train()
    own.train()
    assert losses(own) == pytest.approx(losses(plain), rel=1e-6)


def test_gradient_checkpointing_changes_no_number(make_trainer: Any, same_weights: Any) -> None:
    runs = []
    for flag in (False, True):
        runs.append(make_trainer(f"{flag}", gradient_checkpointing=flag, max_steps=3, dropout=0.1))
        runs[-1].train()
    assert same_weights(runs[0].model, runs[1].model)


def test_bf16_trains_and_gives_the_model_back_as_it_came(make_trainer: Any, losses: Any) -> None:
    exact, mixed = make_trainer("exact"), make_trainer("mixed", bf16=True)
    exact.train()
    mixed.train()
    assert losses(mixed) == pytest.approx(losses(exact), rel=0.02)
    assert losses(mixed) != losses(exact)
    assert all(value.dtype is torch.float32 for value in mixed.model.parameters())
    assert not {"forward", "_original_forward"} & set(vars(mixed.model))


def test_float16_weights_are_warned_of_unless_they_are_frozen(make_trainer: Any, make_model: Any, caplog: Any) -> None:
    adapted = audiomm.add_lora(make_model().half(), audiomm.LoraConfig(target_modules=["q_proj"]))
    assert {value.dtype for value in adapted.parameters() if value.requires_grad} == {torch.float32}
    for model, is_told in ((adapted, False), (make_model().half(), True)):
        caplog.clear()
        make_trainer(model=model, max_steps=0, num_train_epochs=0).train()
        assert ("the weights to be trained are float16" in caplog.text) is is_told


def test_a_second_run_starts_anew(make_trainer: Any, losses: Any) -> None:
    trainer = make_trainer(max_steps=3)
    trainer.train()
    first = losses(trainer)
    assert trainer.train().global_step == 3
    second = losses(trainer)
    assert len(second) == 3
    assert second[0] < first[0], "the weights go on"
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(3e-3), "the schedule does not"


def test_model_init_may_take_a_trial(make_trainer: Any, make_model: Any) -> None:
    trials: list[Any] = []
    make_trainer(model_init=lambda trial: trials.append(trial) or make_model())
    assert trials == [None]


def test_model_init_makes_every_run_the_same(make_trainer: Any, make_model: Any, losses: Any) -> None:
    trainer = make_trainer(max_steps=3, model_init=make_model)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == first


def test_frozen_parts_stay_as_they_are(make_trainer: Any, make_model: Any) -> None:
    model = make_model()
    model.freeze_encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(model=model, max_steps=2, weight_decay=0.1).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if ".encoder." in name]


def test_a_model_without_trainable_weights_is_refused(make_trainer: Any, make_model: Any) -> None:
    with pytest.raises(ConfigError, match="no weight of the model is trainable"):
        make_trainer(model=make_model().requires_grad_(False)).train()


def test_noise_on_the_embeddings_lasts_as_long_as_the_run(make_trainer: Any, losses: Any) -> None:
    plain, noisy = make_trainer("a", max_steps=2), make_trainer("b", max_steps=2, neftune_noise_alpha=5.0)
    plain.train()
    noisy.train()
    assert losses(plain) != losses(noisy)
    assert not noisy.model.get_input_embeddings()._forward_hooks


def test_full_determinism_can_be_asked_for(make_trainer: Any, losses: Any) -> None:
    try:
        runs = [make_trainer(f"{index}", full_determinism=True, max_steps=2, dropout=0.1) for index in range(2)]
        for trainer in runs:
            torch.manual_seed(3)
            trainer.train()
        assert torch.are_deterministic_algorithms_enabled()
        assert losses(runs[0]) == losses(runs[1])
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------------------ data


def test_a_stream_needs_max_steps_and_then_trains(make_trainer: Any, tones: Any) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (tones()[index] for index in range(10))

        def __len__(self) -> int:
            return 10

    with pytest.raises(ConfigError, match="max_steps must say when to end"):
        make_trainer(train_dataset=Stream(), max_steps=-1).train()
    trainer = make_trainer(train_dataset=Stream(), max_steps=5)
    assert trainer.train().global_step == 5, "more than one pass over the stream"


def test_data_that_fill_no_batch_are_refused(make_trainer: Any, tones: Any) -> None:
    with pytest.raises(ConfigError, match="3 training samples do not fill one batch of 4"):
        make_trainer(train_dataset=tones(3), dataloader_drop_last=True).train()
    with pytest.raises(ConfigError, match="needs a train_dataset"):
        make_trainer(train_dataset=None).train()


def test_an_empty_stream_is_an_error(make_trainer: Any) -> None:
    with pytest.raises(InputError, match="gave no batch"):
        make_trainer(train_dataset=iter([])).train()


def test_samples_without_any_argument_of_the_model_are_refused(make_trainer: Any) -> None:
    with pytest.raises(InputError, match="no key of the samples is an argument"):
        make_trainer(train_dataset=[{"sound": 1}] * 8).train()


def test_a_batch_without_labels_gives_no_loss_and_says_so(make_trainer: Any, tones: Any) -> None:
    def unlabelled(samples: Any) -> Any:
        features = torch.stack([sample["input_features"] for sample in samples])
        return {"input_features": features, "decoder_input_ids": torch.full((len(samples), 2), 3)}

    with pytest.raises(InputError, match="the model gave no loss"):
        make_trainer(data_collator=unlabelled).train()


def test_what_cannot_be_a_run_is_refused(make_trainer: Any, make_model: Any) -> None:
    with pytest.raises(ConfigError, match="either model or model_init"):
        audiomm.Trainer(args=audiomm.TrainingArguments(use_cpu=True))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        make_trainer().evaluate()
    with pytest.raises(ConfigError, match="hyper-parameter search is not part"):
        make_trainer().train(trial={"lr": 1})


# ------------------------------------------------------------------------------------------------------- evaluation


def accuracy(prediction: Any) -> dict[str, float]:
    real = prediction.label_ids != -100
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[real].mean())}


def test_evaluation_gives_loss_speed_and_metrics(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(eval_dataset=tones(10), compute_metrics=accuracy)
    metrics = trainer.evaluate()
    expected = {"loss", "accuracy", "runtime", "samples_per_second", "steps_per_second"}
    assert set(metrics) == {f"eval_{name}" for name in expected} | {"epoch"}
    assert set(trainer.evaluate(metric_key_prefix="dev")) == {f"dev_{name}" for name in expected} | {"epoch"}
    batch = trainer._collate()([tones()[index] for index in range(8)])
    rest = trainer._collate()([tones()[index] for index in (8, 9)])
    with torch.no_grad():
        loss = (8 * trainer.model(**batch).loss + 2 * trainer.model(**rest).loss) / 10
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_several_evaluation_sets_come_under_their_names(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(eval_dataset={"short": tones(3), "long": tones(9)}, eval_strategy="steps", eval_steps=5)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_short_loss", "eval_long_loss"} <= names
    assert set(trainer.evaluate("short")) == set(trainer.evaluate(tones(3)))


def test_predictions_come_whole_and_in_order(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(per_device_eval_batch_size=3)
    output = trainer.predict(tones(10))
    assert output.predictions.shape == (10, 6, 100)
    assert output.label_ids.shape == (10, 6)
    assert [row[0] for row in output.label_ids] == [10 + index % 8 for index in range(10)]
    assert "test_loss" in output.metrics
    assert output.predictions[0, 5, 0] == -100, "padding between batches of different length"


def test_evaluation_keeps_no_logits_that_nobody_asked_for(make_trainer: Any, tones: Any, monkeypatch: Any) -> None:
    from audiomm.training import evaluating

    kept = []
    monkeypatch.setattr(evaluating, "on_host", lambda value: kept.append(value))
    make_trainer(eval_dataset=tones(10)).evaluate()
    assert kept == []
    make_trainer(eval_dataset=tones(10), compute_metrics=accuracy, prediction_loss_only=True).evaluate()
    assert kept == []


def test_logits_can_be_made_small_before_they_are_kept(make_trainer: Any, tones: Any) -> None:
    shapes = []

    def note(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    options = {"compute_metrics": note, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    make_trainer(eval_dataset=tones(10), **options).evaluate()
    assert shapes == [(10, 6)]


def test_metrics_may_see_inputs_and_losses_or_come_batch_by_batch(make_trainer: Any, tones: Any) -> None:
    seen: list[Any] = []

    def note(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        if isinstance(prediction.predictions, torch.Tensor):
            assert prediction.label_ids.dtype == torch.int64
            prediction = dataclasses.replace(prediction, inputs=prediction.inputs["input_features"])
        seen.append((tuple(prediction.inputs.shape), tuple(prediction.losses.shape), compute_result))
        return {"batches": float(len(seen))}

    options = {"eval_dataset": tones(10), "compute_metrics": note, "include_for_metrics": ["inputs", "loss"]}
    make_trainer(**options).evaluate()
    assert seen == [((10, 8, 40), (10,), True)], "each sample has the loss of its batch"
    seen.clear()
    assert make_trainer(batch_eval_metrics=True, **options).evaluate()["eval_batches"] == 2.0
    assert seen == [((8, 8, 40), (8,), False), ((2, 8, 40), (2,), True)], "tensors, and all inputs of a batch"


def test_predict_with_generate_hands_over_tokens(make_trainer: Any, tones: Any) -> None:
    shapes = []

    def note(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.predictions.dtype.kind, prediction.label_ids.shape))
        return {"wer": 1.0}

    trainer = make_trainer(
        seq2seq=True,
        predict_with_generate=True,
        generation_max_length=5,
        eval_dataset=tones(6),
        compute_metrics=note,
    )
    metrics = trainer.evaluate()
    (rows, length), kind, labels = shapes[0]
    assert (rows, kind, labels) == (6, "i", (6, 6))
    assert length <= 5
    assert {"eval_loss", "eval_wer"} <= set(metrics)
    assert trainer.evaluate({"a": tones(2)}, max_length=3)["eval_a_wer"] == 1.0
    assert shapes[-1][0][1] <= 3, "keywords reach generate for each of several sets"


def test_full_precision_comes_back_only_after_training(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(eval_dataset=tones(4), eval_strategy="steps", eval_steps=2, bf16_full_eval=True, max_steps=4)
    trainer.train()
    assert trainer.model.dtype is torch.float32, "evaluation while training leaves the weights alone"
    trainer.evaluate()
    assert trainer.model.dtype is torch.bfloat16


# ---------------------------------------------------------------------------------------------------------- callbacks


class Recorder(audiomm.TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.given: dict[str, set[str]] = {}


def _record(name: str) -> Any:
    def event(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(name)
        self.given[name] = {key for key, value in kwargs.items() if value is not None}

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _record(_name))


def test_the_sixteen_events_come_in_their_order(make_trainer: Any, tones: Any) -> None:
    assert len(EVENTS) == 16
    recorder = Recorder()
    trainer = make_trainer(
        callbacks=[recorder], train_dataset=tones(8), max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, eval_dataset=tones(2), eval_strategy="epoch", save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    step = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    end = ["on_epoch_end", "on_prediction_step", "on_log", "on_evaluate", "on_save", "on_log", "on_train_end"]
    assert recorder.events == ["on_init_end", "on_train_begin", "on_epoch_begin", *step, *step, *end]
    trainer.predict(tones(2))
    assert recorder.events[-1] == "on_predict"
    common = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}
    assert recorder.given["on_step_end"] == common - {"processing_class", "eval_dataloader"}
    assert recorder.given["on_log"] >= {"logs", "model", "optimizer"}
    assert recorder.given["on_evaluate"] >= {"metrics"}
    assert recorder.given["on_predict"] >= {"metrics"}


def test_callbacks_can_stop_a_run_and_be_taken_away(make_trainer: Any) -> None:
    class StopAtThree(audiomm.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    trainer = make_trainer(callbacks=[StopAtThree])
    assert trainer.train().global_step == 3
    assert isinstance(trainer.pop_callback(StopAtThree), StopAtThree)
    assert trainer.pop_callback(StopAtThree) is None
    assert trainer.train().global_step == 10


def test_a_run_stops_early_and_ends_with_the_best_weights(make_trainer: Any, tones: Any, same_weights: Any) -> None:
    scores = iter([0.5, 0.4, 0.45, 0.47, 0.2])
    trainer = make_trainer(
        callbacks=[audiomm.EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=lambda prediction: {"wer": next(scores)},
        eval_dataset=tones(4), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="wer", save_total_limit=1, max_steps=50,
    )  # fmt: skip
    trainer.train()
    state = trainer.state
    assert (state.global_step, state.best_metric, state.best_global_step) == (8, 0.4, 4)
    folder = Path(trainer.args.output_dir)
    assert state.best_model_checkpoint == str(folder / "checkpoint-4")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    best = audiomm.WhisperForConditionalGeneration.from_pretrained(folder / "checkpoint-4")
    assert same_weights(trainer.model, best)


def test_early_stopping_without_a_metric_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="EarlyStoppingCallback needs metric_for_best_model"):
        make_trainer(callbacks=[audiomm.EarlyStoppingCallback()]).train()


def test_the_best_weights_are_saved_although_no_checkpoint_was_due(make_trainer: Any, tones: Any) -> None:
    scores = iter([0.3, 0.1, 0.2, 0.4, 0.5])
    trainer = make_trainer(
        compute_metrics=lambda prediction: {"wer": next(scores)}, eval_dataset=tones(4), eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=10, load_best_model_at_end=True, metric_for_best_model="wer",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert Path(trainer.state.best_model_checkpoint).is_dir()


def test_save_strategy_best_saves_nothing_else(make_trainer: Any, tones: Any) -> None:
    scores = iter([0.3, 0.1, 0.2, 0.4, 0.5])
    trainer = make_trainer(
        compute_metrics=lambda prediction: {"wer": next(scores)}, eval_dataset=tones(4), eval_strategy="steps",
        eval_steps=2, save_strategy="best", metric_for_best_model="wer",
    )  # fmt: skip
    trainer.train()
    found = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-4"]


def test_a_metric_that_was_not_measured_is_named(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(
        eval_dataset=tones(4), eval_strategy="steps", eval_steps=2, save_strategy="best", metric_for_best_model="bleu"
    )
    with pytest.raises(ConfigError, match="metric_for_best_model='bleu': the evaluation gave .*eval_loss"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------- bad numbers


class Poison(audiomm.TrainerCallback):
    """Makes one gradient NaN at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.handle = None
        if state.global_step + 1 in self.steps:
            self.handle = model.proj_out.register_forward_hook(lambda *parts: parts[-1] * float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def test_a_nan_ends_the_run_and_names_the_step(make_trainer: Any) -> None:
    with pytest.raises(NumericalError, match=r"step 3: the loss is nan .* the first of them"):
        make_trainer(callbacks=[Poison(3)]).train()


def test_nan_steps_can_be_left_out(make_trainer: Any, caplog: Any) -> None:
    trainer = make_trainer(callbacks=[Poison(3, 4)], nan_policy="skip", max_steps=6)
    assert math.isfinite(trainer.train().training_loss)
    assert [record.message for record in caplog.records if "is left out" in record.message] == [
        "step 3 is left out: its loss is nan.",
        "step 4 is left out: its loss is nan.",
    ]
    assert all(bool(value.isfinite().all()) for value in trainer.model.parameters())


def test_leaving_steps_out_has_an_end(make_trainer: Any) -> None:
    with pytest.raises(NumericalError, match="step 11"):
        make_trainer(callbacks=[Poison(*range(1, 40))], nan_policy="skip", max_steps=40).train()


# ------------------------------------------------------------------------------------------------------------- doors


def test_a_plateau_schedule_listens_to_the_evaluation(make_trainer: Any, make_model: Any, tones: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    trainer = make_trainer(
        model=model, optimizers=(optimizer, schedule), compute_metrics=lambda prediction: {"wer": 1.0},
        eval_dataset=tones(4), eval_strategy="steps", eval_steps=2, metric_for_best_model="wer", max_steps=6,
    )  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05]


def test_batches_shrink_until_they_fit(make_trainer: Any, tones: Any) -> None:
    sizes = []

    class TooBig(audiomm.Trainer):
        def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
            sizes.append(len(inputs["labels"]))
            if sizes[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *more)

    trainer = make_trainer(trainer_class=TooBig, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=2)
    assert trainer.train().global_step == 2
    assert sizes[:2] == [16, 8] or sizes[0] == 16
    assert sizes[-1] <= 4


def test_results_are_written_where_scripts_look_for_them(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=2)
    metrics = trainer.train().metrics
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", {"eval_loss": 1.0})
    trainer.log_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert json.loads((folder / "all_results.json").read_text()) == {**metrics, "eval_loss": 1.0}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert audiomm.WhisperForConditionalGeneration.from_pretrained(folder).config.d_model == 24


def test_a_progress_bar_goes_to_stderr(make_trainer: Any, capsys: Any) -> None:
    make_trainer(disable_tqdm=False, max_steps=2).train()
    out, err = capsys.readouterr()
    assert not out
    assert "2/2" in err


def test_what_goes_to_the_hub_is_the_model_without_its_checkpoints(make_trainer: Any, monkeypatch: Any) -> None:
    trainer = make_trainer("my-model", max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True)
    sent: list[Any] = []
    cards: list[str] = []

    def push(name: str, *, folder: Path, **options: Any) -> str:
        sent.append((name, options["commit_message"], sorted(path.name for path in folder.iterdir())))
        cards.extend(path.read_text() for path in folder.glob("README.md"))
        return "https://hub"

    monkeypatch.setattr(trainer.model, "push_to_hub", push)
    trainer.train()
    files = ["config.json", "generation_config.json", "model.safetensors"]
    progress = [("my-model", f"Training in progress, step {step}", files) for step in (1, 2)]
    assert sent == [*progress, ("my-model", "End of training", files)]
    # As the guides of transformers end.
    card = {"language": "es", "finetuned_from": "openai/whisper-small", "tasks": "automatic-speech-recognition"}
    trainer.push_to_hub(**card, model_name="Mine", dataset="Common Voice", tags="speech", blocking=False)
    assert sent[-1] == ("my-model", "End of training", ["README.md", *files])
    assert "base_model: openai/whisper-small\nlanguage: es\npipeline_tag: automatic-speech-recognition" in cards[-1]
    assert cards[-1].endswith("# Mine\n\nFine-tuned from: openai/whisper-small\n\nData: Common Voice\n\n")
    with pytest.raises(TypeError, match="langauge"):
        trainer.push_to_hub(langauge="es")
    assert not (Path(trainer.args.output_dir) / ".upload").exists()


def test_a_model_that_predicts_the_next_token_counts_those_it_predicts(make_trainer: Any, losses: Any) -> None:
    """The first label of a row is nobody's target."""
    config = audiomm.Gemma4TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, global_head_dim=8, sliding_window=4, max_position_embeddings=32,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0, pad_token_id=0,
        num_kv_shared_layers=0,
    )  # fmt: skip
    samples = [{"input_ids": [(3 * i + j) % 39 + 1 for j in range(8)], "labels": [-100] * (i % 6)} for i in range(12)]
    for sample in samples:
        sample["labels"] = sample["labels"] + sample["input_ids"][len(sample["labels"]) :]
    runs = []
    for size, parts in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        trainer = make_trainer(
            f"{size}", model=audiomm.Gemma4ForCausalLM(config), train_dataset=samples, max_steps=6,
            data_collator=audiomm.default_data_collator, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][-1] < runs[0][0]


@pytest.mark.slow
def test_torch_compile_gives_the_same_losses(make_trainer: Any, losses: Any) -> None:
    plain = make_trainer("plain", max_steps=3)
    compiled = make_trainer("compiled", max_steps=3, torch_compile=True, torch_compile_backend="aot_eager")
    plain.train()
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_a_decoder_of_whisper_is_smoothed_where_it_learns(make_trainer: Any, make_model: Any, losses: Any) -> None:
    """Its scores and labels stand at the same positions, unlike those of other models without an encoder."""
    samples = [{"input_ids": [3, 10 + i, 11 + i], "labels": [10 + i, 11 + i, 2]} for i in range(8)]
    runs = []
    for smoothing in (0.0, 1e-7):
        torch.manual_seed(0)
        model = audiomm.WhisperForCausalLM(make_model().config)
        trainer = make_trainer(
            f"{smoothing}", model=model, train_dataset=samples, data_collator=audiomm.default_data_collator,
            label_smoothing_factor=smoothing, max_steps=3, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        assert trainer.state.num_input_tokens_seen == 3 * 4 * 3, "the first label of a row counts, too"
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_predictions_and_labels_unpack(make_trainer: Any, tones: Any) -> None:
    found = {}

    def measure(prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        found["same"] = logits is prediction[0] and labels is prediction.label_ids
        return {"right": float((logits.argmax(-1) == labels).mean())}

    assert "eval_right" in make_trainer(eval_dataset=tones(4), compute_metrics=measure).evaluate()
    assert found["same"]


def test_epochs_that_a_callback_cuts_short_are_not_made_up_for(make_trainer: Any) -> None:
    class Half(audiomm.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_epoch_stop = state.global_step in (2, 4)

    trainer = make_trainer(callbacks=[Half()], max_steps=-1, num_train_epochs=2)
    assert trainer.train().global_step == 4
    assert trainer.state.epoch == pytest.approx(1.4)


def test_epochs_are_told_by_batches(make_trainer: Any, tones: Any) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return (tones()[index] for index in range(20))

    logged = {"max_steps": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer(**logged)
    trainer.train()
    assert [entry["epoch"] for entry in trainer.state.log_history[:3]] == pytest.approx([0.4, 0.8, 1.0])
    trainer = make_trainer("stream", train_dataset=Stream(), **logged)
    trainer.train()
    assert [entry["epoch"] for entry in trainer.state.log_history[:3]] == pytest.approx([1 / 3, 2 / 3, 5 / 6])


def test_evaluations_without_data_are_refused_before_anything_is_learnt(make_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="eval_strategy='steps' needs an eval_dataset"):
        make_trainer(eval_strategy="steps")


def test_callbacks_see_a_flag_taken_back_once_it_is_answered(make_trainer: Any, tones: Any) -> None:
    seen = []

    class Look(audiomm.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(("log", control.should_log, control.should_evaluate))

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(("evaluate", control.should_log, control.should_evaluate))

    options = {"eval_dataset": tones(4), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    make_trainer(callbacks=[Look()], **options).train()
    assert seen == [("log", False, True), ("log", False, True), ("evaluate", False, False), ("log", False, False)]


def test_the_norm_is_logged_although_nothing_is_clipped(make_trainer: Any) -> None:
    trainer = make_trainer(max_steps=1, max_grad_norm=0)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_best_checkpoint_is_named_only_where_there_is_one(make_trainer: Any, tones: Any) -> None:
    scores = iter([0.5, 0.4, 0.6, 0.7])
    options = {
        "eval_dataset": tones(4), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "save_steps": 4,
        "metric_for_best_model": "wer", "compute_metrics": lambda prediction: {"wer": next(scores)},
    }  # fmt: skip
    trainer = make_trainer(save_strategy="steps", **options)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.4, 2)
    assert trainer.state.best_model_checkpoint is None


def test_a_rate_falls_when_evaluations_get_no_better(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(
        eval_dataset=tones(4), eval_strategy="steps", eval_steps=1, max_steps=4, learning_rate=1.0, optim="sgd",
        lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="wer",
        lr_scheduler_kwargs='{"factor": 0.5, "patience": 0}', compute_metrics=lambda prediction: {"wer": 1.0},
    )  # fmt: skip
    trainer.train()
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry] == [1, 1, 0.5, 0.25]


def test_loaders_of_a_subclass_are_read(make_trainer: Any, tones: Any) -> None:
    data = tones()
    chosen = [data[index] for index in (3, 3, 3, 3, 7, 7)]

    class Chosen(audiomm.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(chosen, batch_size=2, collate_fn=self.data_collator)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return torch.utils.data.DataLoader(eval_dataset, batch_size=3, collate_fn=self.data_collator)

    seen = []

    class Noted(Chosen):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            seen.append(inputs["labels"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make_trainer(trainer_class=Noted, max_steps=-1, num_train_epochs=2, eval_dataset=tones(7))
    assert trainer.train().global_step == 6
    assert seen == [[13, 13], [13, 13], [17, 17]] * 2
    whole = trainer.evaluate()["eval_loss"]
    plain = make_trainer(model=trainer.model, eval_dataset=tones(7), per_device_eval_batch_size=3)
    assert whole == pytest.approx(plain.evaluate()["eval_loss"])


def test_loaders_give_what_the_model_takes(make_trainer: Any, tones: Any) -> None:
    trainer = make_trainer(eval_dataset={"few": tones(3)}, per_device_eval_batch_size=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch) == ["input_features", "labels"]
    assert [len(batch["labels"]) for batch in trainer.get_eval_dataloader("few")] == [2, 1]
    assert [len(batch["labels"]) for batch in trainer.get_test_dataloader(tones(2))] == [2]
    with pytest.raises(ConfigError, match="there is nothing to evaluate"):
        make_trainer().get_eval_dataloader()
    assert trainer.get_num_trainable_parameters() == trainer.model.num_parameters(only_trainable=True)
    assert trainer.get_learning_rates() == [3e-3, 3e-3]
    assert "proj_out.weight" not in trainer.get_decay_parameter_names(trainer.model), "it is tied"


def test_a_loss_function_is_told_the_tokens_of_an_evaluation(make_trainer: Any, tones: Any) -> None:
    told = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        told.append(int(num_items_in_batch))
        return outputs["logits"].square().sum() / num_items_in_batch

    make_trainer(eval_dataset=tones(4), compute_loss_func=loss).evaluate()
    assert told == [2 + 3 + 4 + 5]
