"""Write files whole, so that a killed process or a full disk leaves the old file; read and check JSON."""

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

    After an error in the body, `path` is unchanged. A target that is not a regular file, such as /dev/null, is written
    in place.

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


def check_text(where: str, text: str) -> None:
    """Check that a string is text: JSON and file names can hold halves of surrogate pairs, which have no encoding.

    Raises:
        ValueError: naming `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not text: half of a surrogate pair, {text[error.start]!a}") from None


def parse_json(data: bytes, where: str) -> Any:
    """The value of a line of JSON.

    Raises:
        ValueError: naming `where`.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: naming the file, if it holds something else.
        OSError: if it cannot be read.
    """
    values = parse_json(Path(path).read_bytes(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values
