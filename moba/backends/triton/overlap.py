"""Kernels that start while the one before them ends: programmatic dependent launch, from compute capability 9.0 on.

A kernel of such a chain calls `release_next` first, and `await_previous` before it reads what the kernel before it
wrote; only what was written before the chain began may be read earlier. All but the chain's first kernel are launched
with `launch_options`, so the next chain begins when the last kernel of this one has ended.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ARCHITECTURES = (90, 100)


@triton.jit
def release_next(EARLY: tl.constexpr):
    """Let the next kernel start once all programs of this one have."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Wait until the kernel before this one has ended and its writes are seen."""
    if EARLY:
        gdc_wait()


def is_early(arch: int) -> bool:
    """Whether kernels are chained on this architecture: the value of their EARLY."""
    return arch in ARCHITECTURES


def launch_options(arch: int) -> dict[str, Any]:
    """Options for the launch of every kernel of a chain but the first."""
    return {"launch_pdl": True} if is_early(arch) else {}
