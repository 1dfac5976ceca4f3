"""Measuring a run: its peak memory."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

_INTERVAL_S = 0.01


class PeakMemory:
    """Peak memory while a `with` block runs: allocated on a CUDA device, else resident in this process (sampled).

    Attributes:
        num_bytes: the peak, once the block has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0
        self._device = device
        self._process = psutil.Process()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, self._process.memory_info().rss)
            if self._done.wait(_INTERVAL_S):
                return
