"""What the arguments say of the process they are in: its device, its place among the others, and what falls to it.

Read from what `torchrun` and `accelerate launch` put into the environment, by accelerate's rules, so that a script may
ask before there is a Trainer and nothing is started by asking.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from .arguments import TrainingArguments

logger = logging.getLogger("audiomm.training")

LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")


class ParallelMode(Enum):
    """Whether a process works with others; one process uses one device."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


class _Place(NamedTuple):
    """The number of processes, and which of them this is, of all and of those on its machine."""

    processes: int = 1
    rank: int = 0
    local_rank: int = 0


class ProcessView:
    """The part of TrainingArguments that is read and never given."""

    use_cpu: bool
    save_on_each_node: bool
    log_on_each_node: bool
    log_level: str
    log_level_replica: str
    per_device_train_batch_size: int
    per_device_eval_batch_size: int

    @property
    def _stays_on_cpu(self) -> bool:
        return self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")

    @property
    def _place(self) -> _Place:
        local = int(os.environ.get("LOCAL_RANK", -1))
        world = int(os.environ.get("WORLD_SIZE", 1))
        joined = world > 1 if self._stays_on_cpu else local >= 0 and torch.cuda.is_available()
        return _Place(world, int(os.environ.get("RANK", 0)), max(local, 0)) if joined else _Place()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        named = os.environ.get("ACCELERATE_TORCH_DEVICE")
        if self._stays_on_cpu or named:
            return torch.device("cpu" if self._stays_on_cpu else named or "")
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_process_index % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    @property
    def n_gpu(self) -> int:
        """GPUs this process uses: one or none."""
        return int(self.device.type != "cpu")

    @property
    def parallel_mode(self) -> ParallelMode:
        return ParallelMode.DISTRIBUTED if self._place.processes > 1 else ParallelMode.NOT_PARALLEL

    @property
    def train_batch_size(self) -> int:
        """Samples this process trains on at once."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples this process evaluates at once."""
        return self.per_device_eval_batch_size

    @property
    def world_size(self) -> int:
        return self._place.processes

    @property
    def process_index(self) -> int:
        return self._place.rank

    @property
    def local_process_index(self) -> int:
        return self._place.local_rank

    @property
    def should_log(self) -> bool:
        """Whether this process logs at log_level; the others do at log_level_replica."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes checkpoints."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    def get_process_log_level(self) -> int:
        """The number of this process's log level; of "passive", the level that the library's logger has."""
        level = self.log_level if self.should_log else self.log_level_replica
        if level == "passive":
            return logging.getLogger("audiomm").getEffectiveLevel()
        return int(getattr(logging, level.upper()))

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Let the first process do something, such as filling a cache, before the others do it.

        Args:
            local: The first of each machine; False is the first of all.
            desc: What is done, for the log.
        """
        if self.world_size == 1:
            yield
            return
        from .foundation import join_processes  # accelerate is there

        state = join_processes(cast("TrainingArguments", self))
        logger.debug("process %d of %d: %s, the first process first", self.process_index, self.world_size, desc)
        with state.local_main_process_first() if local else state.main_process_first():
            yield


@atexit.register
def _leave_processes() -> None:
    """Leave the group of processes while there is an interpreter.

    A thread of gloo frees an exchange's tensors after the exchange is known to be over, under the interpreter's lock;
    without an interpreter that aborts the process. The pause lets it have the lock. A process that failed just goes.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and not hasattr(sys, "last_type"):
        time.sleep(0.1)
        group.destroy_process_group()
