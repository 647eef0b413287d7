"""Inputs that are read by threads while others are heard: the same results, in the same order, errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from audiomm.base.errors import AudioError, InputError
from audiomm.pipelines import speech_recognition
from audiomm.pipelines.clips import done_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_the_order_of_the_jobs(threads: int, count: int) -> None:
    assert list(done_ahead((partial(pow, number, 2) for number in range(count)), threads)) == [
        number**2 for number in range(count)
    ]


@pytest.mark.parametrize(("threads", "expected"), [(0, [1, 2, 3]), (2, [3, 4, 4])])
def test_no_more_is_asked_for_than_there_are_threads(threads: int, expected: list[int]) -> None:
    asked = 0

    def jobs() -> Iterator[Any]:
        nonlocal asked
        for _ in range(4):
            asked += 1
            yield int

    results = done_ahead(jobs(), threads)
    assert [(next(results), asked)[1] for _ in range(3)] == expected


def test_what_fails_is_told_when_its_turn_comes() -> None:
    results = done_ahead(iter([partial(int, "7"), partial(int, "x"), partial(int, "9")]), 2)
    assert next(results) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)


def test_a_pipeline_with_readers_gives_what_it_gives_without(pipe: Any, make_sound: Any, monkeypatch: Any) -> None:
    readers: set[str] = set()
    inner = speech_recognition.read_clip

    def spy(*args: Any, **options: Any) -> Any:
        readers.add(threading.current_thread().name)
        return inner(*args, **options)

    monkeypatch.setattr(speech_recognition, "read_clip", spy)
    sounds = [make_sound(seconds, 1) for seconds in (3, 40, 2, 65, 31)]
    for size in (1, 3):
        readers.clear()
        wanted = pipe(sounds, batch_size=size, return_timestamps=True)
        assert readers == {threading.current_thread().name}
        readers.clear()
        assert pipe(sounds, batch_size=size, return_timestamps=True, num_workers=2) == wanted
        assert list(pipe(iter(sounds), batch_size=size, return_timestamps=True, num_workers=1)) == wanted
        assert threading.current_thread().name not in readers


def test_errors_of_readers_name_the_input(pipe: Any, make_sound: Any) -> None:
    results = pipe(iter([make_sound(3, 1), b"no sound at all", make_sound(2, 1)]), num_workers=2)
    assert next(results)["text"] == " w1"
    with pytest.raises(AudioError, match="input 1"):
        next(results)
    with pytest.raises(InputError, match="num_workers=-1: a whole number of at least 1"):
        pipe([make_sound(3, 1)], num_workers=-1)


def test_lists_are_read_ahead_where_a_gpu_hears_and_iterators_are_not(pipe: Any, monkeypatch: Any) -> None:
    asked = [[], (), iter([]), "file"]
    assert [pipe._readers(inputs, None) for inputs in asked] == [0, 0, 0, 0]
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda", 0))
    assert [pipe._readers(inputs, None) for inputs in asked] == [1, 1, 0, 0]
    assert [pipe._readers([], number) for number in (0, 3)] == [0, 3]
    monkeypatch.setattr(pipe, "num_workers", 2)
    assert [pipe._readers(inputs, None) for inputs in asked] == [2, 2, 2, 2]
