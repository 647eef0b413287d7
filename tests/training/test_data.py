"""The order of samples: the same global batches for every number of processes, streams without doubles."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from audiomm.base.errors import ConfigError
from audiomm.training.data import (
    Batch,
    Collate,
    EpochBatches,
    Idle,
    OwnRandomness,
    ProcessShare,
    SeededDataset,
    epoch_order,
    has_length,
    make_loader,
    sample_lengths,
)


def global_batches(order: list[int], size: int, world: int, start: int = 0, drop_last: bool = False) -> list[list[int]]:
    """What all processes take together, batch by batch."""
    parts = [EpochBatches(order, size // world, rank, world, drop_last, start) for rank in range(world)]
    return [[index for part in row for index in part if index >= 0] for row in zip(*parts, strict=True)]


@pytest.mark.parametrize("count", [16, 17, 22, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_processes_sees_the_same_global_batches(count: int, world: int) -> None:
    order = epoch_order(count, 42, 0, "random", None, 8)
    alone = global_batches(order, 8, 1)
    together = global_batches(order, 8, world)
    assert together == alone
    assert sorted(index for batch in together for index in batch) == list(range(count))
    assert global_batches(order, 8, world, start=1) == alone[1:]
    assert global_batches(order, 8, world, drop_last=True) == [batch for batch in alone if len(batch) == 8]


def test_a_process_without_a_sample_gets_one_that_does_not_count() -> None:
    batches = [list(EpochBatches([5, 6, 7], 1, rank, 2)) for rank in range(2)]
    assert batches == [[[5], [-8]], [[6], [7]]]
    collated = Collate(lambda samples: {"x": torch.tensor(samples)})
    assert collated([Idle(3)]).count == 0
    assert collated([Idle(3)])["x"].tolist() == [3]
    assert SeededDataset([10, 11], 0, 0)[-2] == Idle(11)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_orders_follow_from_seed_and_epoch() -> None:
    assert epoch_order(50, 1, 0, "random", None, 8) == epoch_order(50, 1, 0, "random", None, 8)
    assert epoch_order(50, 1, 0, "random", None, 8) != epoch_order(50, 1, 1, "random", None, 8)
    assert epoch_order(50, 1, 0, "random", None, 8) != epoch_order(50, 2, 0, "random", None, 8)
    assert epoch_order(6, 42, 0, "random", None, 2) == torch.randperm(6, generator=seeded(42)).tolist()
    assert epoch_order(6, 42, 3, "random", None, 2) == torch.randperm(6, generator=seeded(45)).tolist()
    assert epoch_order(5, 1, 3, "sequential", None, 8) == [0, 1, 2, 3, 4]


def test_samples_of_like_length_share_a_batch_and_the_longest_come_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 1000).tolist()
    order = epoch_order(1000, 0, 0, "group_by_length", lengths, 8)
    assert sorted(order) == list(range(1000))
    batches = [order[at : at + 8] for at in range(0, 1000, 8)]
    assert max(lengths) in [lengths[index] for index in batches[0]]
    spread = np.mean([max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches])
    assert spread < 100, "of 1000"


def test_lengths_are_found_where_they_are() -> None:
    samples = [{"labels": [1] * number} for number in (3, 5)]
    assert sample_lengths(samples, "length") == [3, 5]
    assert sample_lengths([{"input_ids": [1, 2], "labels": [1]}], "length") == [2]
    assert sample_lengths([{"input_features": np.zeros((80, 30))}], "length") == [30]
    assert sample_lengths([{"seconds": 2.0, "labels": [1]}], "seconds") == [2]

    class Table(list):
        column_names = ["length"]

        def __getitem__(self, key: Any) -> Any:
            return [7, 8] if key == "length" else super().__getitem__(key)

    assert sample_lengths(Table([{}, {}]), "length") == [7, 8]
    with pytest.raises(ConfigError, match="sample 0 has neither 'length' nor input_ids"):
        sample_lengths([{"x": 1}], "length")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_is_shared_without_doubles_in_order(workers: int, world: int) -> None:
    stream = Numbers(19)
    seen = []
    for rank in range(world):
        share = ProcessShare(stream, 4 // world, rank, world)
        seen.append([batch["x"] for batch in loader(stream, share, workers)])
    together = [[x for part in row for x in part if not isinstance(x, Idle)] for row in zip(*seen, strict=True)]
    assert together == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18]]
    rest = [batch["x"] for batch in loader(stream, ProcessShare(stream, 4, 0, 1, start=3), workers)]
    assert rest == [[12, 13, 14, 15], [16, 17, 18]]
    whole = [batch["x"] for batch in loader(stream, ProcessShare(stream, 4, 0, 1, drop_last=True), workers)]
    assert len(whole) == 4


class Numbers(torch.utils.data.IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(range(self.count))


def listed(samples: list[Any]) -> dict[str, Any]:
    return {"x": samples}


def loader(dataset: Any, share: ProcessShare, workers: int) -> Any:
    return make_loader(
        dataset, Collate(listed), batches=None, share=share, seed=0, epoch=0, workers=workers, pin_memory=False,
        prefetch_factor=None,
    )  # fmt: skip


def test_random_samples_leave_the_numbers_of_the_training_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = draw()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    own = OwnRandomness(3, 4)
    with own:
        first = draw()
    with own:
        second = draw()
    assert draw() == expected
    again = OwnRandomness(3, 4)
    with again:
        assert (draw(), draw()) == (first, second)
    assert first != expected


def test_streams_are_no_maps_although_some_have_a_length() -> None:
    class Sized(Numbers):
        def __len__(self) -> int:
            return self.count

    assert not has_length(Sized(3))
    assert not has_length(iter([1]))
    assert has_length([1])


def test_a_batch_keeps_what_is_no_tensor() -> None:
    batch = Batch({"names": ["a"]}, 1).pin_memory()
    assert batch == {"names": ["a"]}
