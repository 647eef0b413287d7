"""Many recordings at once: the next takes the row of one that is done, results stay in order, little is read ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from audiomm.pipelines.assembly import Heard
from audiomm.pipelines.clips import Clip, Piece
from audiomm.pipelines.rows import BATCHES_AHEAD, SideBySide


class Machine:
    """Hears a long piece in as many rounds as it has samples, `size` side by side, and notes what was under way."""

    def __init__(self, lengths: list[int], size: int) -> None:
        self.lengths, self.size, self.read = lengths, size, 0
        self.rounds: list[list[int]] = []
        self.batches: list[list[int]] = []

    def pieces(self) -> Any:
        for number, length in enumerate(self.lengths):
            self.read = number + 1
            yield Piece(Clip(f"input {number}", number, np.zeros(length)), np.zeros(length))

    def hear(self, pieces: list[Piece]) -> list[Heard]:
        self.batches.append([piece.clip.number for piece in pieces])
        return [Heard(piece) for piece in pieces]

    def hear_long(self, first: Piece, more: Any) -> Any:
        left, active = {first.clip.number: len(first.samples)}, [first]
        while active:
            while len(active) < self.size and (piece := more()) is not None:
                left[piece.clip.number] = len(piece.samples)
                active.append(piece)
            self.rounds.append([piece.clip.number for piece in active])
            for piece in list(active):
                left[piece.clip.number] -= 1
                if not left[piece.clip.number]:
                    active.remove(piece)
                    yield Heard(piece)

    def results(self) -> Any:
        queue = SideBySide(self.pieces(), self.size, lambda piece: len(piece.samples) > 1, self.hear, self.hear_long)
        return (heard.piece.clip.number for heard in queue)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_recording_is_heard_once_and_results_are_in_order(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    machine = Machine(rng.choice([1, 1, 2, 3, 9], size=rng.integers(1, 40)).tolist(), size)
    assert list(machine.results()) == list(range(len(machine.lengths)))
    assert all(len(batch) <= size for batch in machine.batches)
    assert all(len(active) <= size for active in machine.rounds)


def test_the_next_file_takes_the_row_of_one_that_is_done() -> None:
    machine = Machine([9, 2, 2, 3, 2], 2)
    assert list(machine.results()) == [0, 1, 2, 3, 4]
    assert machine.rounds == [[0, 1], [0, 1], [0, 2], [0, 2], [0, 3], [0, 3], [0, 3], [0, 4], [0, 4]]


def test_short_files_come_out_batch_by_batch() -> None:
    machine = Machine([1] * 100, 4)
    results = machine.results()
    assert next(results) == 0
    assert machine.read == 4


def test_one_long_file_does_not_make_the_rest_of_the_stream_be_read() -> None:
    machine = Machine([1000, *[1] * 500], 2)
    results = machine.results()
    assert next(results) == 0
    assert machine.read <= 2 * (BATCHES_AHEAD + 3)


def test_a_pipeline_hears_many_files_as_each_alone(pipe: Any, make_sound: Any) -> None:
    items = [make_sound(seconds, 1, seconds - 2) for seconds in (70, 5, 31, 40, 9, 33, 95, 6)]
    alone = [pipe(item, return_timestamps=True) for item in items]
    pipe.model.calls.clear()
    assert pipe(items, batch_size=3, return_timestamps=True) == alone
    assert list(pipe(iter(items), batch_size=2, return_timestamps=True)) == alone
    assert max(call["shape"][0] for call in pipe.model.calls) == 3


def test_samples_of_a_file_that_is_done_are_forgotten(
    pipe: Any, make_sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    inner = pipe.model.stream_recordings

    def spy(features: Any, *args: Any, **kwargs: Any) -> Any:
        for found in inner(features, *args, **kwargs):
            yield found
            kept.append(sum(len(clip) > 0 for clip in features.clips))

    monkeypatch.setattr(pipe.model, "stream_recordings", spy)
    pipe([make_sound(40, 1) for _ in range(6)], batch_size=2)
    assert kept == [1, 0, 1, 0, 1, 0]


def test_a_bar_for_many_files_grows_with_them(pipe: Any, make_sound: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe([make_sound(40, 1), make_sound(50, 1)], batch_size=2, progress=True)
    assert "90/90 s" in capsys.readouterr().err
