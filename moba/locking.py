"""Files that one process at a time appends to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked_file(path: Path) -> Iterator[int]:
    """Open or make a file to read and append to, for this process alone: its descriptor.

    Raises:
        ValueError: if another process has it.
        OSError: if it cannot be written.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another run") from None
        yield file
    finally:
        os.close(file)
