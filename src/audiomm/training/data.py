"""Which sample goes where and when: the order of an epoch, the share of a process, and the place to go on from.

The order depends on the seed, the epoch and the number of samples only, so a resumed run sees what an uninterrupted one
would have seen, and every number of processes sees the same global batches.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..base.errors import ConfigError, InputError

#: Batches whose samples are sorted by length together.
_LENGTH_POOL = 50


class EpochBatches:
    """The batches of indices that one process takes in one epoch.

    Args:
        count: Samples.
        batch_size: Of one process.
        rank, world: Which process of how many.
        order: All indices in the order of this epoch.
        drop_last: Leave out the last global batch if it is not full.
        start: Batches to leave out at the beginning.

    Iterating gives lists of indices. In the last global batch a process may get fewer samples than the others. One
    that would get none gets the batch's first sample i as -1 - i: it takes part and learns nothing (see `Idle`).
    """

    def __init__(
        self, order: Sequence[int], batch_size: int, rank: int, world: int, drop_last: bool = False, start: int = 0
    ) -> None:
        self.order, self.batch_size, self.rank, self.world = order, batch_size, rank, world
        self.drop_last, self.start = drop_last, start

    def __len__(self) -> int:
        return max(0, batches_in(len(self.order), self.batch_size * self.world, self.drop_last) - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.world
        for number in range(self.start, self.start + len(self)):
            whole = self.order[number * size : (number + 1) * size]
            yield share_of(whole, self.rank, self.world) or [-1 - whole[0]]


def share_of(whole: Sequence[Any], rank: int, world: int) -> list[Any]:
    """What one of `world` processes takes of a global batch: as equal parts as can be, in order."""
    return list(whole[len(whole) * rank // world : len(whole) * (rank + 1) // world])


@dataclass(frozen=True)
class Idle:
    """A sample that keeps a process busy which has nothing to learn from a batch, so that no other waits for it."""

    sample: Any


def batches_in(count: int, size: int, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return count // size if drop_last else -(-count // size)


def epoch_order(
    count: int, seed: int, epoch: int, strategy: str, lengths: Sequence[int] | None, batch: int
) -> list[int]:
    """All indices in the order of one epoch.

    Args:
        count: Samples.
        seed, epoch: Of the shuffle.
        strategy: "random", "sequential" or "group_by_length" (samples of like length share a batch; the longest batch
            comes first, so that memory that does not suffice shows at once).
        lengths: For the last.
        batch: Samples of a global batch.
    """
    if strategy == "sequential":
        return list(range(count))
    # Drawn as accelerate's loaders draw, so that the order is the one which transformers' Trainer takes.
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    if strategy == "random":
        return order
    assert lengths is not None, "the Trainer looks the lengths up"
    pool = batch * _LENGTH_POOL
    pools = [sorted(order[at : at + pool], key=lambda i: -lengths[i]) for at in range(0, count, pool)]
    batches = [part[at : at + batch] for part in pools for at in range(0, len(part), batch)]
    first = max(range(len(batches)), key=lambda i: lengths[batches[i][0]])
    last = batches.pop() if len(batches[-1]) < batch and first != len(batches) - 1 else []
    batches[0], batches[first] = batches[first], batches[0]
    return [index for part in batches for index in part] + last


class OwnRandomness:
    """A block whose random numbers follow from `parts` alone, and that leaves those of the training where they were.

    Entered again, the same object goes on with its numbers.
    """

    def __init__(self, *parts: int) -> None:
        self.parts = parts
        self.inner: tuple[Any, Any, Tensor] | None = None

    def __enter__(self) -> None:
        self.outer = _states()
        if self.inner is not None:
            _set_states(self.inner)
            return
        seed = int(np.random.SeedSequence(self.parts).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)

    def __exit__(self, *error: object) -> None:
        self.inner = _states()
        _set_states(self.outer)


def _states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_states(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


class SeededDataset(Dataset[Any]):
    """A dataset whose samples draw the same random numbers in whichever process and at whichever time they are made."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            return Idle(self[-1 - index])
        with OwnRandomness(self.seed, self.epoch, index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class ProcessShare(IterableDataset[Any]):
    """The samples of a stream that one process takes: of each global batch its part, without doubles.

    Worker processes of a loader split the stream by whole batches, so the order of batches stays what it is. Each reads
    the whole stream, with the same random numbers.
    """

    def __init__(
        self,
        stream: Any,
        batch_size: int,
        rank: int,
        world: int,
        start: int = 0,
        drop_last: bool = False,
        seed: tuple[int, int] = (0, 0),
    ) -> None:
        self.stream, self.batch_size, self.rank, self.world, self.start = stream, batch_size, rank, world, start
        self.drop_last, self.seed = drop_last, seed

    def __iter__(self) -> Iterator[list[Any]]:
        worker = torch.utils.data.get_worker_info()
        number_of_workers, worker_number = (worker.num_workers, worker.id) if worker else (1, 0)
        randomness, size = OwnRandomness(*self.seed), self.batch_size * self.world
        with randomness:
            samples = iter(self.stream)
        for number in itertools.count():
            with randomness:
                whole = list(itertools.islice(samples, size))
            if not whole or (self.drop_last and len(whole) < size):
                return
            if self._is_mine(number, number_of_workers, worker_number):
                yield self._share(whole)

    def _is_mine(self, number: int, workers: int, worker: int) -> bool:
        return number >= self.start and (number - self.start) % workers == worker

    def _share(self, whole: list[Any]) -> list[Any]:
        return share_of(whole, self.rank, self.world) or [Idle(whole[0])]


def make_loader(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batches: EpochBatches | None,
    share: ProcessShare | None,
    seed: int,
    epoch: int,
    workers: int,
    pin_memory: bool,
    prefetch_factor: int | None,
) -> DataLoader[Any]:
    """The loader of one epoch (or what is left of it); its items are what `collate` makes of a batch's samples."""
    options: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "prefetch_factor": prefetch_factor if workers else None,
        "worker_init_fn": obey_the_parent,
        # Whatever draws from the global generator would shift the numbers of the training itself.
        "generator": torch.Generator().manual_seed(seed * 1_000_003 + epoch),
    }
    if share is not None:
        return DataLoader(share, batch_size=None, collate_fn=collate, **options)
    return DataLoader(SeededDataset(dataset, seed, epoch), batch_sampler=batches, collate_fn=collate, **options)


def obey_the_parent(worker: int) -> None:
    """Let the training process alone decide when a worker ends: Ctrl-C reaches both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def sample_lengths(dataset: Any, column: str) -> list[int]:
    """The lengths of all samples, from a column, or from their input_ids, input_features or labels.

    Raises:
        ConfigError: There is no telling them.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column in columns:
        return [int(value) for value in dataset[column]]
    lengths = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if isinstance(sample, dict) and column in sample:
            lengths.append(int(sample[column]))
            continue
        names = ("input_ids", "input_features", "labels")
        found = next((sample[name] for name in names if isinstance(sample, dict) and name in sample), None)
        if found is None:
            raise ConfigError(
                f"train_sampling_strategy='group_by_length': sample {index} has neither {column!r} nor input_ids, "
                "input_features or labels; add a column of lengths and name it in length_column_name."
            )
        lengths.append(len(found) if getattr(found, "ndim", 1) < 2 else int(np.shape(found)[-1]))
    return lengths


def has_length(dataset: Any) -> bool:
    """True for map-style datasets: they have a length and can be indexed."""
    is_stream = isinstance(dataset, IterableDataset)
    return not is_stream and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


class Batch(dict[str, Any]):
    """Model inputs, and in `count` how many samples they count for (0: see `Idle`)."""

    def __init__(self, inputs: Mapping[str, Any], count: int) -> None:
        super().__init__(inputs)
        self.count = count

    def pin_memory(self) -> Batch:
        """Called by the loader."""
        return Batch({name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in self.items()}, self.count)


class GivenLoader:
    """The batches of a loader that a user made, from `start` on, as `Batch`es."""

    def __init__(self, loader: Any, start: int = 0) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[Batch]:
        for inputs in itertools.islice(self.loader, self.start, None):
            count = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)
            yield Batch(inputs, count)


class Collate:
    """Samples to a `Batch`, by the user's collator."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Batch:
        if isinstance(samples[0], Idle):
            return Batch(self.collate([samples[0].sample]), 0)
        return Batch(self.collate(samples), len(samples))


class KeepColumns:
    """A collator that first leaves out the keys of samples which the model does not take."""

    def __init__(self, collate: Callable[[list[Any]], Any], names: set[str]) -> None:
        self.collate, self.names = collate, names

    def __call__(self, samples: list[Any]) -> Any:
        if samples and isinstance(samples[0], dict):
            samples = [{name: sample[name] for name in sample if name in self.names} for sample in samples]
            if not samples[0]:
                raise InputError(
                    "no key of the samples is an argument of the model's forward; rename the columns, or pass "
                    "remove_unused_columns=False and a data_collator that makes such arguments of them."
                )
        return self.collate(samples)
