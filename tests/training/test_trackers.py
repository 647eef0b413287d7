"""Trackers of accelerate get what the log gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from audiomm.base.errors import ConfigError


def test_tensorboard_gets_the_numbers_of_the_log(make_trainer: Any, losses: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(report_to="tensorboard", run_name="mine", max_steps=3)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "runs" / "mine"
    events = EventAccumulator(str(folder))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(step, pytest.approx(loss)) for step, loss in enumerate(losses(trainer), 1)]
    assert "learning_rate" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_tracker_that_is_not_installed_is_no_silent_loss(make_trainer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="report_to: the package of wandb is not installed"):
        make_trainer(report_to="wandb")
