"""MoBA in plain torch: gather each block's queries, attend, merge. CPU, Apple MPS, any CUDA card; trains."""

from __future__ import annotations

from torch import Tensor

from moba.backends import reference
from moba.routing import route as route


def unsupported(q: Tensor, k: Tensor) -> str | None:
    """Why this backend cannot run on these tensors: None, it always can."""
    return None


attend = reference.attend
