"""Files that take their places together: a checkpoint saved over another is the old or the new one, never a mixture.

New files are written aside, in `.saving-<process>`. Renaming that folder to `.saved` is the moment at which they count;
then they move to their places one by one. Whoever reads or saves next ends a move that was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import CorruptCheckpointError, SaveError

_WRITING, _WRITTEN, _REPLACED = ".saving-", ".saved", "replaced.json"


@contextmanager
def staged(folder: Path, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to fill, whose files move to `folder` when the block has ended without an error.

    Args:
        folder: Where the files go; it exists.
        replaced: Names of files there that are no part of the new set and go when it comes.

    Raises:
        SaveError: The disk is full or the folder cannot be written; what stood there stays whole.
    """
    stage = folder / f"{_WRITING}{os.getpid()}"
    try:
        settle(folder)
        _remove_litter(folder)
        stage.mkdir()
        yield stage
        with open(stage / _REPLACED, "w", encoding="utf-8") as file:
            json.dump(list(replaced), file)
            file.flush()
            os.fsync(file.fileno())
        flush(stage)
        stage.rename(folder / _WRITTEN)
        settle(folder)
        flush(folder)
    except OSError as error:
        cause = error.__cause__ or error
        raise SaveError(f"{folder} could not be written ({cause}); what stood there is unchanged.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def settle(folder: Path) -> None:
    """End the move of a save that was interrupted, if there is one.

    Raises:
        CorruptCheckpointError: The folder cannot be changed.
    """
    stage = folder / _WRITTEN
    if not stage.is_dir() or stage.is_symlink():
        return
    try:
        with contextlib.suppress(FileNotFoundError):  # another process ends it, too
            listing = stage / _REPLACED
            if listing.is_file():
                for name in json.loads(listing.read_text(encoding="utf-8")):
                    (folder / Path(name).name).unlink(missing_ok=True)
                listing.unlink()
            for path in sorted(stage.iterdir()):
                path.replace(folder / path.name)
            stage.rmdir()
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(
            f"a save into {folder} was interrupted, and what it left cannot be moved to its place ({error}): move the "
            f"files of {stage} to {folder}."
        ) from error


def flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_space(folder: Path, needed: int) -> None:
    """Look whether so many bytes fit, before anything is written.

    Raises:
        SaveError: They do not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SaveError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free on its disk. Nothing was written; make room, "
            "or save elsewhere."
        )


def _remove_litter(folder: Path) -> None:
    """Delete what killed processes left half written."""
    for path in folder.glob(f"{_WRITING}*"):
        if not _is_running(path.name.removeprefix(_WRITING)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
