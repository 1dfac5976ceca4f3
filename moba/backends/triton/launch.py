"""Launching a kernel, or recording the launch for ahead-of-time compilation: one host code does both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Launch = Callable[..., None]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on a grid."""
    kernel[grid](*args, **options)


def recorder(launches: list[tuple[Any, dict[str, Any]]]) -> Launch:
    """A `launch` that runs nothing and appends each kernel with its arguments by name, for tensors on "meta"."""

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launches.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **options}))

    return record
