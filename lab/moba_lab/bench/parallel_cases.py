"""The problems that `moba bench parallel` measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moba import backends
from moba.config import BACKENDS, require_one_of
from moba.validate import MAX_HEAD_DIM, check_heads
from moba_lab.bench.cases import heads_name, length_name

# Blocks that queries look for in clustered cases.
POPULAR_BLOCKS = 16


@dataclass(frozen=True)
class ParallelCase:
    """One problem: batch 1. `clustered`: queries resemble keys of a few blocks, so that routings touch few blocks."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype
    clustered: bool = False
    backward: bool = True

    @property
    def name(self) -> str:
        """Short, for tables."""
        heads = heads_name(self.heads, self.kv_heads)
        kind = ", clustered" if self.clustered else ""
        return f"{length_name(self.tokens)}, {heads} heads, {self.block_size}/{self.topk}{kind}"

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "case": self.name, "tokens": self.tokens, "heads": self.heads, "kv_heads": self.kv_heads,
            "head_dim": self.head_dim, "block_size": self.block_size, "topk": self.topk, "clustered": self.clustered,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


def suite(device: torch.device, num_ranks: int) -> list[ParallelCase]:
    """A fixed total, a fixed length a rank, few key/value heads, and clustered routings; the longest last."""
    if device.type != "cuda":
        fp32 = torch.float32
        return [ParallelCase(4096, 4, 4, 32, 64, 4, fp32), ParallelCase(4096, 4, 4, 32, 64, 4, fp32, clustered=True)]
    bf16, k = torch.bfloat16, 1024
    return [
        ParallelCase(512 * k, 16, 16, 128, 512, 8, bf16),
        ParallelCase(512 * k, 16, 16, 128, 512, 8, bf16, clustered=True),
        ParallelCase(128 * k * num_ranks, 16, 16, 128, 512, 3, bf16),
        ParallelCase(128 * k * num_ranks, 32, 8, 128, 4096, 12, bf16),
        ParallelCase(1024 * k, 16, 16, 128, 128, 8, bf16),
        ParallelCase(2048 * k, 32, 8, 128, 4096, 12, bf16, backward=False),
    ]


def make_inputs(case: ParallelCase, device: torch.device, num_tokens: int, first: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of out of the whole sequence, or of a shard that begins at token `first`."""
    generator = torch.Generator(device).manual_seed(first)
    widths = [case.heads, case.kv_heads, case.kv_heads, *([case.heads] if case.backward else [])]
    q, k, v, *d_out = (
        torch.randn(1, num_tokens, n, case.head_dim, generator=generator, device=device, dtype=case.dtype)
        for n in widths
    )
    if case.clustered:
        # A direction for each of the popular blocks; all queries of a block look for one of them.
        size, shared = case.block_size, torch.Generator(device).manual_seed(POPULAR_BLOCKS)
        towards = torch.randn(POPULAR_BLOCKS, case.kv_heads, case.head_dim, generator=shared, device=device)
        block = torch.arange(first, first + num_tokens, device=device) // size
        every = max(1, case.tokens // size // POPULAR_BLOCKS)
        is_popular = (block % every == 0) & (block // every < POPULAR_BLOCKS)
        k += (towards[(block // every).clamp(max=POPULAR_BLOCKS - 1)] * is_popular[:, None, None]).to(case.dtype)
        looked = towards[block * 7 % POPULAR_BLOCKS].repeat_interleave(case.heads // case.kv_heads, dim=1)
        q += (4 * looked).to(case.dtype)
    return [q, k, v, *d_out]
