"""Checkpoints of a training run: everything that exact resuming needs, without a pickle, written aside and renamed.

A checkpoint is a model folder with three more things: `trainer_state.json` (where the run stands), `training.json` and
`training.safetensors` (optimizer, schedule, place in the data), and `random-<rank>` (every random state of a process).
A folder named checkpoint-N is complete: it is filled under another name, flushed to the disk, listed with the digests
of its files in `manifest.json`, and renamed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, SaveError
from ..base.hub import Source, read_json, write_json
from ..base.staging import check_space, flush
from ..base.weights import find_checkpoint as find_checkpoint_files

logger = logging.getLogger("audiomm.training")

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
_TENSOR = "$tensor"


class ResumeError(ConfigError):
    """A checkpoint does not fit the run that is to go on from it."""


# ----------------------------------------------------------------------------------------------------- nested values


def save_nested(folder: Path, name: str, value: Any) -> None:
    """Write nested dicts and lists of numbers, texts and tensors as <name>.json and <name>.safetensors."""
    tensors: dict[str, Tensor] = {}

    def packed(part: Any) -> Any:
        if isinstance(part, Tensor):
            key = str(len(tensors))
            tensors[key] = part.detach().cpu().contiguous().clone()
            return {_TENSOR: key}
        if isinstance(part, dict):
            return {"$dict": [[key, packed(item)] for key, item in part.items()]}
        if isinstance(part, (list, tuple)):
            return [packed(item) for item in part]
        return part

    write_json(folder / f"{name}.json", {"value": packed(value)})
    try:
        save_file(tensors, folder / f"{name}.safetensors")
    except Exception as error:
        raise SaveError(f"{folder / name}.safetensors could not be written: {error}") from error


def load_nested(folder: Path, name: str) -> Any:
    """The value that `save_nested` wrote."""
    tensors = load_file(folder / f"{name}.safetensors")

    def unpacked(part: Any) -> Any:
        if isinstance(part, dict) and _TENSOR in part:
            return tensors[part[_TENSOR]]
        if isinstance(part, dict):
            return {key: unpacked(item) for key, item in part["$dict"]}
        if isinstance(part, list):
            return [unpacked(item) for item in part]
        return part

    return unpacked(read_json(folder / f"{name}.json")["value"])


# ----------------------------------------------------------------------------------------------------- random states


def set_seed(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all generators of random numbers in this process."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put all generators into the states that `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


# -------------------------------------------------------------------------------------------------- optimizer states


def whole(value: Any) -> Any:
    """A tensor that is spread over processes, in one piece on the host; all processes must ask together."""
    if hasattr(value, "ds_id"):  # the third stage of DeepSpeed
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([value]):
            return value.detach().cpu().clone()
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """The optimizer's state by names of weights; `names` maps id(parameter) to its name."""
    state = {
        names[id(parameter)]: {key: whole(value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], saved: dict[str, Any], with_options: bool
) -> None:
    """Put a saved state into an optimizer over the same weights, however these are spread over processes.

    Args:
        optimizer: The optimizer.
        names: Name of each weight by its id.
        saved: What `optimizer_state` gave.
        with_options: Take the groups' options (rate, betas, ...) from the state, too, not only what was learnt.

    Raises:
        ResumeError: The checkpoint trained other weights.
    """
    if len(optimizer.param_groups) != len(saved["groups"]):
        raise ResumeError(
            f"the optimizer has {len(optimizer.param_groups)} groups of weights and had {len(saved['groups'])} when "
            "the checkpoint was made: make it as it was."
        )
    for group, old in zip(optimizer.param_groups, saved["groups"], strict=True):
        mine = [names[id(parameter)] for parameter in group["params"]]
        if sorted(mine) != sorted(old["params"]):
            other = sorted(set(mine) ^ set(old["params"]))
            raise ResumeError(
                f"{len(other)} weights are trained in the checkpoint or in this run but not in both, like {other[0]}: "
                "freeze and add the same parts as when the checkpoint was made."
            )
        if with_options:
            group.update({key: value for key, value in old.items() if key != "params"})
        for parameter in group["params"]:
            values = saved["state"].get(names[id(parameter)])
            if values is not None:
                optimizer.state[parameter] = {key: _like(parameter, key, value) for key, value in values.items()}


def _like(parameter: Tensor, key: str, value: Any) -> Any:
    """A saved value of the optimizer where and how it belongs to `parameter`."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and value.dim() == 0 and parameter.device.type == "cpu":
        return value
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and value.dim() > 0:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
    return value.to(parameter.device)


# ------------------------------------------------------------------------------------------------------------ folders


@contextmanager
def new_checkpoint(
    output_dir: str, step: int, is_main: bool, wait: Callable[[], None], needed: int = 0
) -> Iterator[Path]:
    """A folder that all processes fill, and that becomes checkpoint-<step> when the block has ended without an error.

    Args:
        output_dir: Folder of the run.
        step: Of the checkpoint.
        is_main: Whether this process makes the folder and gives it its name.
        wait: Lets processes wait for each other.
        needed: Bytes that must be free, about.

    Raises:
        SaveError: They are not, or the disk fails; earlier checkpoints are as they were.
    """
    target = Path(output_dir) / f"{PREFIX}{step}"
    partial = target.with_name(f".partial-{target.name}")
    try:
        if is_main:
            remove_litter(output_dir)
            check_space(Path(output_dir), needed)
            partial.mkdir(parents=True)
        wait()
        yield partial
        wait()
        if is_main:
            seal(partial)
            if target.exists():
                _discard(target)
            partial.rename(target)
            flush(target.parent)
        wait()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(
            f"{target} could not be written ({error}); earlier checkpoints are unchanged, and training can go on from "
            "the last one."
        ) from error


def seal(folder: Path) -> None:
    """Flush all files to the disk and write the list of them with their sizes and digests."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    write_json(folder / MANIFEST, {"files": listed})
    flush(folder)


def _digests(paths: list[Path]) -> list[str]:
    """The SHA-256 of files, several at once: about a second for each gigabyte of the largest."""

    def digest(path: Path) -> str:
        found = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
        return found.hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, paths))


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listed = {folder / name: about for name, about in read_json(folder / MANIFEST)["files"].items()}
    except (OSError, ConfigError, KeyError):
        return f"it has no {MANIFEST}, which is written last"
    for path, about in listed.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != about["bytes"]:
            return f"{path.name} has {path.stat().st_size:,} bytes instead of {about['bytes']:,}"
    for (path, about), digest in zip(listed.items(), _digests(list(listed)), strict=True):
        if digest != about["sha256"]:
            return f"{path.name} is not what was written: its SHA-256 has changed"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def get_last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a folder; says which newer ones are not complete."""
    for path in reversed(checkpoints(folder)):
        problem = fault(path)
        if problem is None:
            return str(path)
        logger.warning("%s is passed over: %s.", path, problem)
    return None


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means.

    Raises:
        CheckpointNotFoundError: There is none.
        CorruptCheckpointError: It is not complete.
    """
    if not wanted:
        return None
    if wanted is True:
        last = get_last_checkpoint(output_dir)
        if last is None:
            raise CheckpointNotFoundError(f"resume_from_checkpoint=True: {output_dir} holds no complete checkpoint.")
        return Path(last)
    path = Path(wanted)
    if not path.is_dir():
        raise CheckpointNotFoundError(f"resume_from_checkpoint={str(wanted)!r} is not a folder.")
    problem = fault(path)
    if problem is not None:
        raise CorruptCheckpointError(
            f"{path} is not a complete checkpoint: {problem}. Pass resume_from_checkpoint=True for the newest complete "
            "one."
        )
    return path


def rotate(output_dir: str, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but neither the one just saved nor the best.

    Checkpoints of later steps belong to another run: they are neither counted nor deleted.
    """
    if limit is None:
        return
    mine = checkpoints(output_dir)
    mine = mine[: mine.index(newest) + 1]
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    deletable = [path for path in mine if path.resolve() not in kept]
    for path in deletable[: max(0, len(mine) - limit)]:
        _discard(path)


def _discard(path: Path) -> None:
    """Delete a folder so that a kill in between leaves no torn one under its name."""
    doomed = path.with_name(f".partial-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_litter(output_dir: str) -> None:
    """Delete what a killed run left half written."""
    for path in Path(output_dir).glob(f".partial-*{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in a checkpoint, by name."""
    files = find_checkpoint_files(Source(str(folder)))
    return {name: tensor.clone() for name, tensor in files.tensors(list(files.files))}
