"""The reference's answers for logits processors and stopping criteria, where the golden cases are at hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"


@pytest.mark.skipif(not (GOLDEN / "replay.py").is_file(), reason="the golden cases are not beside this repository")
def test_every_rule_gives_the_references_scores():
    spec = importlib.util.spec_from_file_location("golden_replay", GOLDEN / "replay.py")
    replay = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(replay)
    report = replay.Case(GOLDEN / "generation" / "logits_processors", "audiomm").check()
    assert len(report) > 50
    assert [entry for entry in report if not entry["ok"]] == []
