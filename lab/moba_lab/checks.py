"""What commands are given, checked."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any


def require_folder(name: str, path: Path) -> None:
    """Raise a ValueError that names the argument unless `path` is a folder to write into, or one that can be made."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{name}={str(path)!r}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{name}={str(path)!r}: {there} cannot be written to")


def require_seed(name: str, value: Any) -> int:
    """Return `value` if every generator of random numbers takes it; raise a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{name} must be an integer from 0 to 2**32 - 1, got {value!r}")
    return value


def require_packages(*names: str) -> None:
    """Raise a ModuleNotFoundError for the first of these packages that is missing, before anything slow is done."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
