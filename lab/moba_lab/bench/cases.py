"""The problems that `moba bench` measures: shapes, operations and bytes, and the suites of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moba import backends
from moba.config import BACKENDS, require_one_of
from moba.routing import Routing
from moba.validate import MAX_HEAD_DIM, check_heads

K = 1024
# Bytes that a decoding measurement's layers read together, so that no cache holds what the next round of them reads.
COLD_BYTES = 256 << 20
# Most layers, and most bytes of their keys and values: making them takes time.
MOST_LAYERS = 24
MOST_BYTES = {"cpu": 4 << 30, "cuda": 48 << 30}
# Share of the free memory that a case may take.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Shape:
    """What every case has."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype

    @property
    def heads_name(self) -> str:
        """16 of 16 query and key/value heads, 32/8 of 32 and 8."""
        return str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Short, for tables."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        names = ("tokens", "heads", "kv_heads", "head_dim", "block_size", "topk")
        return {"case": self.name, **{name: getattr(self, name) for name in names}, "dtype": self.dtype_name}


@dataclass(frozen=True)
class Case(Shape):
    """A forward and a backward over one sequence, or over packed documents of one length.

    `routing` says where q and k come from: see `moba_lab.bench.inputs`.
    """

    backward: bool = True
    dense: bool = True
    reference: bool = False
    router: str = "mean"
    routing: str = "random"
    documents: int = 1

    @property
    def name(self) -> str:
        """Short, for tables."""
        length = f"{self.documents} × " if self.documents > 1 else ""
        length += length_name(self.tokens // self.documents)
        router = "" if self.router == "mean" else f", {self.router}"
        routing = "" if self.routing == "random" else f", {self.routing} routing"
        return (
            f"{length}, {self.heads_name} heads, D {self.head_dim}, "
            f"{self.block_size}/{self.topk}{router}{routing}, {self.dtype_name}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {**super().to_dict(), "routing": self.routing, "documents": self.documents}

    @property
    def dense_shape(self) -> tuple[Any, ...]:
        """What dense attention's time depends on."""
        return self.tokens, self.documents, self.heads, self.kv_heads, self.head_dim, self.dtype, self.backward

    @property
    def moba_flops(self) -> float:
        """Operations of the forward's two products over the keys attended to: 4 · D a (query, key) pair."""
        size, most = self.block_size, self.topk - 1
        whole, rest = divmod(self.tokens // self.documents, size)
        few = min(whole, self.topk)  # blocks that have fewer past ones than places
        past = few * (few - 1) // 2 + (whole - few) * most
        total = size**2 * past + whole * size * (size + 1) // 2
        total += rest * min(whole, most) * size + rest * (rest + 1) // 2
        return 4.0 * self.heads * self.head_dim * total * self.documents

    @property
    def dense_flops(self) -> float:
        """The same for full causal attention."""
        return 2.0 * self.heads * self.head_dim * self.tokens * (self.tokens // self.documents + 1)


@dataclass(frozen=True)
class DecodeCase(Shape):
    """One step of decoding: `queries` tokens of each of `batch` sequences, over `tokens` keys each."""

    batch: int = 1
    queries: int = 1

    @property
    def name(self) -> str:
        """Short, for tables."""
        queries = "" if self.queries == 1 else f", {self.queries} queries"
        return f"{length_name(self.tokens)}, batch {self.batch}, {self.block_size}/{self.topk}{queries}"

    @property
    def dense_shape(self) -> tuple[Any, ...]:
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


@dataclass(frozen=True)
class ParallelCase(Shape):
    """One sequence over many ranks."""

    backward: bool = True

    @property
    def name(self) -> str:
        """Short, for tables."""
        return f"{length_name(self.tokens)}, {self.heads_name} heads, {self.block_size}/{self.topk}"

    def for_ranks(self, num_ranks: int) -> ParallelCase:
        """The same with as many tokens as make equal shards of whole blocks."""
        return replace(self, tokens=max(1, self.tokens // (num_ranks * self.block_size)) * num_ranks * self.block_size)

    def check(self, num_ranks: int, backend: str, device: torch.device) -> None:
        """Raise a ValueError, naming the option, if ranks cannot share this problem, or the backend not compute it."""
        check_heads(self.heads, self.kv_heads)
        if not self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"--head-dim must be at most {MAX_HEAD_DIM}, got {self.head_dim}")
        whole = num_ranks * self.block_size
        if self.tokens % whole:
            raise ValueError(
                f"--tokens must be a multiple of {whole}, {num_ranks} ranks times --block-size {self.block_size}, "
                f"got {self.tokens}"
            )
        require_one_of("backend", backend, BACKENDS)
        head = torch.empty(1, 1, 1, self.head_dim, dtype=self.dtype, device=device)
        backends.resolve(backend, head, head)

    def make_inputs(self, device: torch.device, num_tokens: int, first: int = 0) -> list[Tensor]:
        """q, k, v and the gradient of out of the whole sequence, or of a shard that begins at token `first`."""
        generator = torch.Generator(device).manual_seed(first)
        widths = [self.heads, self.kv_heads, self.kv_heads, *([self.heads] if self.backward else [])]
        return [
            torch.randn(1, num_tokens, n, self.head_dim, generator=generator, device=device, dtype=self.dtype)
            for n in widths
        ]


def length_name(tokens: int) -> str:
    """8192 -> "8K", 1048576 -> "1M"; other numbers in full."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens}"


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def attention_suite(device: torch.device) -> list[Case]:
    """On a CPU small models' lengths and shapes; on a GPU those of the paper and of the fastest published kernels."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if device.type != "cuda":
        cases = [Case(32 * K, 1, 1, 128, 2048, 3, fp32, reference=True)]
        cases += [
            Case(tokens, 9, 3, 64, *blocks, dtype)
            for dtype in (fp32, bf16)
            for tokens in (2 * K, 8 * K, 32 * K)
            for blocks in ((128, 8), (512, 3))
        ]
        cases += [Case(8 * K, 9, 3, 64, 128, 8, bf16, routing=routing) for routing in ("clustered", "model")]
        return cases + [Case(64 * K, 9, 3, 64, *blocks, fp32, dense=False) for blocks in ((128, 8), (512, 3))]
    cases = [Case(32 * K, 1, 1, 128, size, 3, bf16, reference=True) for size in (2048, 512)]
    for tokens in (8 * K, 32 * K, 128 * K):
        cases += [Case(tokens, 16, 16, 128, *blocks, bf16) for blocks in ((128, 8), (512, 3), (512, 8), (2048, 3))]
    cases += [Case(512 * K, 16, 16, 128, *blocks, bf16) for blocks in ((128, 8), (512, 3), (2048, 3))]
    # MiniMax-M3's: one choice of blocks for the sixteen query heads of a key/value head.
    cases += [Case(tokens, 64, 4, 128, 128, 16, bf16, router="shared") for tokens in (32 * K, 128 * K, 512 * K)]
    for kind in ("clustered", "model"):
        for tokens in (32 * K, 128 * K):
            cases += [Case(tokens, 16, 16, 128, *blocks, bf16, routing=kind) for blocks in ((128, 8), (512, 8))]
        cases.append(Case(128 * K, 64, 4, 128, 128, 16, bf16, router="shared", routing=kind))
    cases += [Case(128 * K, 16, 16, 128, 128, 8, bf16, documents=documents) for documents in (64, 16)]
    cases.append(Case(128 * K, 32, 8, 128, 512, 8, bf16))
    cases.append(Case(128 * K, 32, 8, 128, 4096, 12, bf16))
    cases.append(Case(1024 * K, 16, 16, 128, 128, 8, bf16, backward=False, dense=False))
    return [*cases, Case(1024 * K, 32, 8, 128, 4096, 12, bf16, backward=False, dense=False)]


def fixed_blocks_suite() -> list[Case]:
    """The paper's Figure 2b: 64 blocks and top-k 3 at every length, one head, to 10M tokens."""
    lengths = [8192, 32768, 131072, 524288, 1048576, 4194304, 10485760]
    return [Case(n, 1, 1, 128, n // 64, 3, torch.bfloat16, backward=False, dense=n <= 1048576) for n in lengths]


def decode_suite(device: torch.device) -> list[DecodeCase]:
    """The heads of a small model on a CPU, Llama's on a GPU, the paper's blocks and small ones, to 1M tokens."""
    is_cuda = device.type == "cuda"
    heads, dtype = ((32, 8, 128), torch.bfloat16) if is_cuda else ((9, 3, 64), torch.float32)
    alone, in_batches = ((8, 32, 128, 512, 1024), (8, 32, 128, 512)) if is_cuda else ((8, 32, 128, 1024), (8, 32))
    return [
        DecodeCase(n * K, *heads, *blocks, dtype, batch)
        for lengths, batch in ((alone, 1), (in_batches, 16))
        for n in lengths
        for blocks in ((128, 16), (4096, 12))
        if is_cuda or blocks[0] * blocks[1] < n * K
    ]


def parallel_suite(device: torch.device) -> list[ParallelCase]:
    """Small blocks; smaller ones, whose routing takes longest; large ones and few key/value heads; the longest last."""
    if device.type != "cuda":
        return [ParallelCase(4096, 4, 4, 32, 64, 4, torch.float32)]
    bf16 = torch.bfloat16
    return [
        ParallelCase(512 * K, 16, 16, 128, 512, 8, bf16),
        ParallelCase(1024 * K, 16, 16, 128, 128, 8, bf16),
        ParallelCase(256 * K, 32, 8, 128, 4096, 12, bf16),
        ParallelCase(2048 * K, 32, 8, 128, 4096, 12, bf16, backward=False),
    ]
