"""Times and peak memory of a function, on CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

LEAST_SECONDS = 0.05
MOST_RUNS = 50

_SELF = Path("/proc/self")


class Measurement(NamedTuple):
    """Median time of a call in ms, and the most memory one took beyond what was held before it, in bytes."""

    ms: float
    peak_bytes: int | None


def measure_call(function: Callable[[], object], device: torch.device, *, warmups: int, repeats: int) -> Measurement:
    """Run `function` and report its median time and peak memory.

    Args:
        function: what to measure; its result is dropped.
        device: where it runs. CUDA is timed with events, the CPU with a clock.
        warmups: runs before the first measured one; one of them, or the first measured, gives the peak memory.
        repeats: measured runs. On CUDA both are raised for short functions, up to LEAST_SECONDS or MOST_RUNS each:
            the host, too, needs some runs to warm up.

    Returns:
        The median and the peak; the peak is None where the system does not tell it.
    """
    if device.type == "cuda":
        return _measure_cuda(function, warmups, repeats)
    peak = _cpu_peak(function) if warmups else None
    for _ in range(warmups - 1):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return Measurement(statistics.median(times), peak)


def seconds(call: Callable[[], object]) -> float:
    """Of one call, its work on the GPU included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _measure_cuda(function: Callable[[], object], warmups: int, repeats: int) -> Measurement:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    start_time = time.perf_counter()
    for _ in range(warmups - 1):
        function()
    torch.cuda.synchronize()
    if warmups > 1:
        runs = min(MOST_RUNS, int(LEAST_SECONDS * (warmups - 1) / (time.perf_counter() - start_time)))
        for _ in range(runs - warmups):
            function()
        repeats = max(repeats, runs)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return Measurement(statistics.median(start.elapsed_time(end) for start, end in pairs), peak)


def _cpu_peak(function: Callable[[], object]) -> int | None:
    """Growth of the process's peak resident memory over one call; None where the system does not offer it."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
        (_SELF / "clear_refs").write_text("5")  # resets the peak
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError):
        function()
        return None


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (_SELF / "status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(match.group(1)) * 1024
