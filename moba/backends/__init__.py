"""The contract of a backend, and the one table that resolves "auto".

A backend is a module with three functions over tensors q [R, T, H, D], k and v [R, S, G, D] (any strides with a
contiguous last dimension) and the `Sequences` that lie in them:

    unsupported(q, k) -> str | None
        Why this backend cannot run on these tensors, or None if it can.
    route(q, k, sequences, selection) -> indices
        int32 [R, T, H, K]: ascending block numbers, own block included, then -1; -1 everywhere in padded rows.
    attend(q, k, v, indices, sequences, *, block_size, scale) -> (out, lse)
        out like q, zeros in padded rows; lse fp32 (fp64 for fp64) [R, T, H], -inf there. Differentiable in q, k and v
        through both results. Entries of `indices` outside 0 … own block are ignored.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("moba")

NAMES = ("reference", "pytorch", "triton")

# What "auto" tries, in order, by the device type of the tensors.
AUTO = {"cuda": ("triton", "pytorch")}
AUTO_OTHERWISE = ("pytorch",)

_announced: set[tuple[str, str]] = set()


def load(name: str) -> ModuleType:
    """The backend's module, imported at its first use.

    Raises:
        ValueError: if what it needs is not installed.
    """
    try:
        # Import statements, which torch.compile can trace.
        if name == "triton":
            from moba.backends import triton

            return triton
        if name == "pytorch":
            from moba.backends import pytorch

            return pytorch
        from moba.backends import reference

        return reference
    except ImportError as error:
        raise ValueError(f"backend={name!r} is not available here: {error}") from error


def unavailable(name: str, q: Tensor, k: Tensor) -> str | None:
    """Why the backend cannot run on these tensors here, or None if it can."""
    try:
        return load(name).unsupported(q, k)
    except ValueError as error:
        return str(error)


def resolve(name: str, q: Tensor, k: Tensor) -> ModuleType:
    """The module of the named backend, or of the one that "auto" takes for these tensors.

    Raises:
        ValueError: if the named backend cannot run on them; it says why.
    """
    if name != "auto":
        backend = load(name)
        if reason := backend.unsupported(q, k):
            raise ValueError(f"backend={name!r} cannot run here: {reason}")
        return backend
    candidates = AUTO.get(q.device.type, AUTO_OTHERWISE)
    chosen = next((c for c in candidates if unavailable(c, q, k) is None), candidates[-1])
    if (q.device.type, chosen) not in _announced and not torch.compiler.is_compiling():
        _announced.add((q.device.type, chosen))
        logger.info('backend="auto" takes %r on %s', chosen, q.device)
    return load(chosen)
