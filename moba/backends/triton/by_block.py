"""The by-block view of a routing: for each head and block, the queries that chose it, in ascending order."""

from __future__ import annotations

from collections.abc import Iterator

from moba.backends.triton.case import Case


def aot_cases(arch: int) -> Iterator[Case]:
    """Launches to compile ahead of time."""
    return iter(())
