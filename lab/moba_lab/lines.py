"""What one run at a time may write: folders, and files of JSON lines that a killed run goes on from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOT_OURS = "not a line that this command wrote"
# What file systems say that have no locks, such as some on clusters.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Lines:
    """An open file: the JSON objects of its whole lines, and a way to add to them.

    A last line without an end was being written when its run was killed; it goes when the next one is added.

    Attributes:
        path: of the file.
        rows: the objects, in order.
    """

    def __init__(self, path: Path, file: int, begins: tuple[str, ...], advice: str) -> None:
        self.path, self._file = path, file
        self._advice = advice
        *whole, rest = path.read_bytes().split(b"\n")
        self.rows: list[dict[str, Any]] = [self._parse(line, number) for number, line in enumerate(whole, start=1)]
        self._num_torn = len(rest)
        # Zeros are what a power cut can leave of a write.
        written = rest.rstrip(b"\0")
        beginnings = [f'{{"{key}": '.encode() for key in begins]
        if not any(beginning.startswith(written[: len(beginning)]) for beginning in beginnings):
            raise self.error(len(whole) + 1, NOT_OURS)

    def add(self, row: dict[str, Any]) -> None:
        """Append an object; when this returns it is on the disk."""
        if self._num_torn:
            os.ftruncate(self._file, os.fstat(self._file).st_size - self._num_torn)
            self._num_torn = 0
        data = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.rows.append(row)

    def clear(self) -> None:
        """Forget every row."""
        os.ftruncate(self._file, 0)
        self._num_torn = 0
        self.rows.clear()

    def error(self, number: int, what: str) -> ValueError:
        """What to raise because of a line, counted from 1."""
        return ValueError(f"{self.path}, line {number}: {what}; {self._advice}")

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise self.error(number, NOT_OURS)
        return row


@contextmanager
def open_lines(path: Path, *, begins: tuple[str, ...], advice: str) -> Iterator[Lines]:
    """Open or make a file of JSON lines, for this process alone, if its file system has locks.

    Args:
        path: of the file.
        begins: the keys that a line may begin with; a last line without an end is taken for ours if it does.
        advice: what to do about a file that cannot be gone on from, for messages.

    Raises:
        ValueError: if it holds something else, is a device or a pipe, or another process is writing to it.
        OSError: if it cannot be written.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError(f"{path} is no regular file: choose another")
        _take(file, path)
        yield Lines(path, file, begins, advice)
    finally:
        os.close(file)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make a folder if it is not there, and keep other runs out of it, if its file system has locks.

    Args:
        folder: the folder.
        wait: until another run has left it, instead of refusing.

    Raises:
        ValueError: if another run has it and `wait` is not set.
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        _take(lock.fileno(), folder, wait)
        yield


def _take(file: int, path: Path, wait: bool = False) -> None:
    """Lock an open file until it is closed, if its file system has locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another run") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
