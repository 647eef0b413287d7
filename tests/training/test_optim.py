"""Optimizers and schedules by name: known numbers, and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import audiomm
from audiomm.base.errors import ConfigError
from audiomm.layers.embedding import ScaledEmbedding
from audiomm.training.optim import build_optimizer, build_schedule, decayed_names


def rates(name: str, steps: int = 10, **options: Any) -> list[float]:
    """The rates of ten steps at a learning rate of 1."""
    kwargs = options.pop("lr_scheduler_kwargs", None)
    args = audiomm.TrainingArguments(
        learning_rate=1.0, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, **{"warmup_steps": 2, **options}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, args, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", {"warmup_steps": 0.5}, [0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2]),
        ("constant", {}, [1] * 10),
        ("constant_with_warmup", {}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", {}, [0, 0.5, 1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
        ("inverse_sqrt", {}, [0, 0.5, 1, 0.816497, 0.707107, 0.632456, 0.57735, 0.534522, 0.5, 0.471405]),
        ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}},
         [0, 0.5, 1, 0.765625, 0.5625, 0.390625, 0.25, 0.140625, 0.0625, 0.015625]),
        ("cosine_with_restarts", {"lr_scheduler_kwargs": {"num_cycles": 2}},
         [0, 0.5, 1, 0.853553, 0.5, 0.146447, 1, 0.853553, 0.5, 0.146447]),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr": 0.2}},
         [0, 0.5, 1, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448]),
        ("cosine_warmup_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
         [0.5, 1, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448, 0.2]),
        ("cosine_warmup_with_min_lr", {"warmup_steps": 3, "lr_scheduler_kwargs": {"min_lr": 0, "warmup_lr_rate": 0.4}},
         [0.4, 0.7, 1, 0.950484, 0.811745, 0.61126, 0.38874, 0.188255, 0.049516, 0]),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 4}},
         [0, 0.5, 1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447]),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 2, "num_stable_steps": 3,
          "min_lr_ratio": 0.2, "warmup_type": "1-sqrt", "decay_type": "linear"}},
         [0.2, 0.434315, 1, 1, 1, 1, 0.6, 0.2, 0.2, 0.2]),
    ],
)  # fmt: skip
def test_schedules_give_the_known_numbers(name: str, options: dict[str, Any], expected: list[float]) -> None:
    assert rates(name, **options) == pytest.approx(expected, abs=1e-5)


def test_options_that_a_schedule_does_not_know_are_refused() -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs: num_cycles is unknown for lr_scheduler_type='linear'"):
        rates("linear", lr_scheduler_kwargs={"num_cycles": 2})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cosine_with_min_lr", {}, "needs lr_scheduler_kwargs with min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "needs lr_scheduler_kwargs with min_lr or"),
        ("warmup_stable_decay", {}, "needs lr_scheduler_kwargs={'num_decay_steps': ...}"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "x"}, "decay_type='x'; expected one of linear"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "power": 2}, "power is unknown for lr_scheduler_type='warmup_"),
        ("reduce_lr_on_plateau", {"patients": 2}, "of lr_scheduler_type='reduce_lr_on_plateau': .*patients"),
    ],
)
def test_options_that_a_schedule_cannot_go_by_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rates(name, lr_scheduler_kwargs=options, eval_strategy="epoch")


def test_embeddings_decay_although_they_are_scaled() -> None:
    table = torch.nn.ModuleDict({"table": ScaledEmbedding(4, 4, None, 2.0), "norm": torch.nn.LayerNorm(4)})
    assert decayed_names(table) == {"table.weight"}


def test_biases_and_norms_do_not_decay(make_model: Any) -> None:
    model = make_model()
    decayed = decayed_names(model)
    rest = {name for name, _ in model.named_parameters()} - decayed
    assert any(name.endswith("q_proj.weight") for name in decayed)
    assert rest
    assert all(name.endswith("bias") or "layer_norm" in name for name in rest)
    optimizer = build_optimizer(model, audiomm.TrainingArguments(weight_decay=0.1))
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.1, len([name for name, value in model.named_parameters() if name in decayed and value.requires_grad])),
        (0.0, len(rest)),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_torch", "AdamW"), ("adamw_torch_fused", "AdamW"), ("sgd", "SGD"), ("adafactor", "Adafactor"),
     ("adagrad", "Adagrad"), ("rmsprop", "RMSprop")],
)  # fmt: skip
def test_every_optimizer_learns(name: str, kind: str, make_trainer: Any, losses: Any) -> None:
    trainer = make_trainer(optim=name, learning_rate=0.3 if name == "sgd" else 3e-3, max_steps=6, seed=1)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == kind
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_options_of_the_optimizer_come_as_text(make_model: Any) -> None:
    args = audiomm.TrainingArguments(optim="sgd", optim_args="momentum=0.9, nesterov=True")
    optimizer = build_optimizer(make_model(), args)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


@pytest.mark.parametrize(
    ("text", "words"), [("momentum", "expected name=value pairs"), ("momentum=much", "'much' is neither a number")]
)
def test_options_that_cannot_be_read_are_refused(text: str, words: str, make_model: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        build_optimizer(make_model(), audiomm.TrainingArguments(optim="sgd", optim_args=text))


def test_rmsprop_and_adamw_take_the_rate_of_the_arguments(make_model: Any) -> None:
    args = audiomm.TrainingArguments(learning_rate=0.01, adam_beta1=0.8, adam_epsilon=1e-6)
    optimizer = build_optimizer(make_model(), args)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.01, (0.8, 0.999))
    assert optimizer.defaults["eps"] == 1e-6
