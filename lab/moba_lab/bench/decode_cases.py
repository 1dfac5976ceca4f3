"""The problems that `moba bench decode` measures: one step of decoding of one attention layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moba.routing import Routing
from moba_lab.bench.cases import length_name

# Bytes that a measurement's layers read together, so that no cache holds what the next round of them reads.
COLD_BYTES = 256 << 20
# Most layers, and most bytes of their keys and values: making them takes time.
MOST_LAYERS = 24
MOST_BYTES = {"cpu": 4 << 30, "cuda": 48 << 30}
# Share of the free memory that a case may take.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class DecodeCase:
    """One step: `queries` tokens of each of `batch` sequences, over `tokens` keys each; standard-normal q, k and v."""

    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype
    queries: int = 1

    @property
    def name(self) -> str:
        """Short, for tables."""
        queries = "" if self.queries == 1 else f", {self.queries} queries"
        return f"{length_name(self.tokens)}, batch {self.batch}, {self.block_size}/{self.topk}{queries}"

    @property
    def dense_shape(self) -> tuple[int, int, int, int, int, int, torch.dtype]:
        """What dense attention's time depends on."""
        return self.tokens, self.batch, self.queries, self.heads, self.kv_heads, self.head_dim, self.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token's key in all heads."""
        return self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """Keys and values, each read once."""
        return 2 * self.batch * self.tokens * self.token_bytes

    @property
    def means_bytes(self) -> int:
        """The means of all finished blocks."""
        return self.batch * (self.tokens // self.block_size) * self.token_bytes

    def bytes_read(self, routing: Routing) -> int:
        """Means, and the keys and values of the blocks that any query of a kv head chose, each counted once."""
        blocks = routing.block_mask(-(-self.tokens // self.block_size)).any(dim=1)  # [B, H, N]
        chosen = blocks.unflatten(1, (self.kv_heads, -1)).any(dim=2)
        sizes = torch.full((chosen.shape[-1],), self.block_size, device=chosen.device)
        sizes[-1] = self.tokens - (chosen.shape[-1] - 1) * self.block_size
        return self.means_bytes + 2 * int((chosen * sizes).sum()) * self.head_dim * self.dtype.itemsize

    def num_layers(self, device: torch.device, free_bytes: int) -> int:
        """How many layers' keys and values a measurement goes through; 0 if not even one fits the memory."""
        layer_bytes = self.dense_bytes + self.means_bytes
        chosen = min(self.tokens * self.kv_heads, self.queries * self.heads * self.topk * self.block_size)
        read = self.means_bytes + 2 * self.batch * chosen * self.head_dim * self.dtype.itemsize
        wanted = min(MOST_LAYERS, -(-COLD_BYTES // read) + 1)
        wanted = min(wanted, max(1, MOST_BYTES[device.type] // layer_bytes))
        return min(wanted, int(MEMORY_SHARE * free_bytes) // layer_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cuda_suite() -> list[DecodeCase]:
    """Llama's heads at 8K to 1M tokens, the paper's blocks and small ones."""
    k = 1024
    lengths = [(n * k, 1) for n in (8, 32, 128, 512, 1024)] + [(n * k, 16) for n in (8, 32, 128, 512)]
    return [
        DecodeCase(tokens, batch, 32, 8, 128, block_size, topk, torch.bfloat16)
        for tokens, batch in lengths
        for block_size, topk in ((128, 16), (4096, 12))
    ]


def cpu_suite() -> list[DecodeCase]:
    """The heads of a small model at 8K to 1M tokens."""
    k = 1024
    lengths = [(n * k, 1) for n in (8, 32, 128, 1024)] + [(n * k, 16) for n in (8, 32)]
    return [
        DecodeCase(tokens, batch, 9, 3, 64, block_size, topk, torch.float32)
        for tokens, batch in lengths
        for block_size, topk in ((128, 16), (4096, 12))
        if block_size * topk < tokens
    ]
