"""Records of an evaluation in a file of JSON lines: a killed run loses none, and goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moba.locking import locked_file


class Records:
    """The file: a first line with the settings, then one record a line.

    Attributes:
        rows: the records so far.
    """

    def __init__(self, path: Path, file: int, settings: dict[str, Any]) -> None:
        self.path, self._file = path, file
        self.rows: list[dict[str, Any]] = []
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a line that was being written when its run was killed
            os.ftruncate(file, whole)
        if not whole:
            self._write({"settings": settings})
            return
        try:
            first, *self.rows = [json.loads(line) for line in data[:whole].splitlines()]
            before = first["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a file of records; choose another --out") from None
        settings = json.loads(json.dumps(settings))
        if before != settings:
            differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            raise ValueError(f"{path} was made with another {', '.join(differing)}; choose another --out, or remove it")

    def holds(self, **cell: Any) -> bool:
        """Whether there is a record with these values."""
        return any(all(row.get(key) == value for key, value in cell.items()) for row in self.rows)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; when this returns it is on the disk."""
        self._write(record)
        self.rows.append(record)

    def _write(self, value: dict[str, Any]) -> None:
        data = memoryview(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


@contextmanager
def open_records(path: Path, settings: dict[str, Any]) -> Iterator[Records]:
    """Open or make a file of records, for this process alone.

    Args:
        path: of the file; its folder is made.
        settings: everything that changes all records; a file made with others is refused.

    Raises:
        ValueError: if it holds something else, or another process is writing to it.
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path) as file:
        yield Records(path, file, settings)
