"""Routing in Triton: block means, then scores and the selection in one kernel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moba import routing
from moba.backends.triton.case import Case
from moba.layout import Sequences
from moba.routing import Selection


def route(q: Tensor, k: Tensor, sequences: Sequences, selection: Selection) -> Tensor:
    """The routing of every query: int32 [R, T, H, K]. See `moba.backends` for the contract."""
    return routing.route(q, k, sequences, selection)


def aot_cases(arch: int) -> Iterator[Case]:
    """Launches to compile ahead of time."""
    return iter(())
