"""Files that are written whole, so that a killed process or a full disk leaves the old one, and JSON read from them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside `path` and move it there in one step, once all of it is on the disk.

    After an error in the body `path` is what it was. What is no regular file, such as /dev/null, is written in place.

    Yields:
        a binary file, open for writing and reading.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    in_place = target.exists() and not target.is_file()
    draft = target if in_place else target.with_name(f"{target.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with draft.open("w+b" if in_place else "x+b") as file:
            yield file
            file.flush()
            if not in_place:
                os.fsync(file.fileno())
        if not in_place:
            if target.exists():
                shutil.copymode(target, draft)
            draft.replace(target)
    except BaseException as error:
        if not in_place:
            with suppress(OSError):
                draft.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(draft)):
            error.filename = str(path)
        raise


def write_json(path: str | os.PathLike[str], values: dict[str, Any], indent: int | None = None) -> None:
    """Replace a file by a JSON object."""
    with replacing(path) as file:
        file.write(json.dumps(values, indent=indent).encode() + b"\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: naming the file, if it holds something else.
        OSError: if it cannot be read.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values
