"""In which precision things are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Those with autocast. A list, as torch.compile cannot trace torch's own question in every version.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


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


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold neither NaN nor inf; False also where a sum of them overflows. Waits for their device."""
    return all(bool(torch.isfinite(x.sum(dtype=accumulation_dtype(x.dtype)))) for x in tensors)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with the same logits: torch's kernels multiply a mask's -inf by the scale."""
    least = torch.finfo(torch.float32).tiny
    if scale >= least:
        return q, scale
    return (-q, -scale) if scale <= -least else (q * scale, 1.0)


def to_autocast_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own does."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)
