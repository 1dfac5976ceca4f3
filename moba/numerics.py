"""The precision that things are computed in."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Devices with autocast. Listed here because torch.compile cannot trace torch's own query in every version.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FullPrecision:
    """The process's precision of fp32 matrix products, raised while any thread is inside.

    Torch keeps it once for all threads, so the first thread to enter raises it and the last to leave restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._allowed: str | None = None  # None if it was set for each backend: torch's getter then raises
        self._by_backend: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside > 1:
                return
            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
            self._by_backend = [(x, x.fp32_precision) for x in backends if hasattr(x, "fp32_precision")]
            try:
                self._allowed = torch.get_float32_matmul_precision()
            except RuntimeError:
                self._allowed = None
            if self._allowed not in (None, "highest"):
                torch.set_float32_matmul_precision("highest")
            for backend, _ in self._by_backend:
                if backend.fp32_precision not in ("none", "ieee"):
                    backend.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside:
                return
            if self._allowed not in (None, "highest"):
                torch.set_float32_matmul_precision(self._allowed)
            for backend, precision in self._by_backend:
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision


_full_precision = _FullPrecision()


def full_fp32_matmul() -> AbstractContextManager[None]:
    """Compute fp32 matrix products in full fp32 inside this context, even if the user allowed TF32 or bf16.

    Several threads may be inside at once. Meanwhile, products of other threads are as precise.
    """
    return _full_precision


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold neither NaN nor inf. Also False if a tensor's sum overflows. Waits for their device."""
    return all(bool(torch.isfinite(x.sum(dtype=accumulation_dtype(x.dtype)))) for x in tensors)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a positive scale that give the same logits.

    torch's kernels multiply a mask's -inf by the scale, so a scale that is 0 or negative would undo the mask.
    """
    least = torch.finfo(torch.float32).tiny
    if scale >= least:
        return q, scale
    return (-q, -scale) if scale <= -least else (q * scale, 1.0)


def padded_to(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows [.., D] with zeros behind them up to the width, which leave products of rows as they are. Copies shorter
    rows only, and once those that an expanded second dimension repeats.
    """

    def padded(x: Tensor) -> Tensor:
        if x.shape[-1] == width:
            return x
        if x.stride(1) == 0:
            return F.pad(x[:, :1], (0, width - x.shape[-1])).expand(*x.shape[:-1], width)
        return F.pad(x, (0, width - x.shape[-1]))

    return tuple(padded(x) for x in tensors)


def to_autocast_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to the autocast dtype under torch.autocast, as torch's own attention does."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)
