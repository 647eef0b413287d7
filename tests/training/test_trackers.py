"""Trackers of accelerate get what the log gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


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
