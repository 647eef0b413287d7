"""Silencing a C library that writes to standard error.

libmpg123 prints a line for every broken frame it meets, thousands for a damaged file, past Python's own sys.stderr.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_lock = threading.Lock()
_silenced: list[int] = []  # one saved descriptor while anyone wants silence, and a count of who
_users = 0


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere inside the block; the first thread in does it, the last one out undoes it."""
    global _users
    with _lock:
        if _users == 0:
            _silence()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore()


def _silence() -> None:
    try:
        saved = os.dup(_STDERR)
    except OSError:  # standard error is closed: nothing to silence
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
    _silenced.append(saved)


def _restore() -> None:
    while _silenced:
        saved = _silenced.pop()
        os.dup2(saved, _STDERR)
        os.close(saved)
