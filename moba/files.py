"""Files that are written whole: a killed process or a full disk leaves the old file, never half of the new one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


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
