"""In which precision things are computed."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Those with autocast. A list, as torch.compile cannot trace torch's own question in every version.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FullPrecision:
    """The process's precision of fp32 matrix products, raised while any thread is inside.

    Torch keeps it in one place for all threads, so the first thread in raises it and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._allowed: str | None = None  # None where it was set by backend, of which torch's getter refuses to speak
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
    """Matrix products of fp32 tensors keep fp32 precision inside, whatever the user allowed outside (TF32, bf16).

    Threads may be inside at once. Products of other threads are as precise meanwhile.
    """
    return _full_precision


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold neither NaN nor inf; False also where a sum of them overflows. Waits for their device."""
    return all(bool(torch.isfinite(x.sum(dtype=accumulation_dtype(x.dtype)))) for x in tensors)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with the same logits: torch's kernels multiply a mask's -inf by the scale."""
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
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own does."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)
