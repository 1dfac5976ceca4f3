"""In which precision sums are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Matrix products of fp32 tensors keep fp32 precision inside, whatever the user allowed outside (TF32, bf16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
