"""The problems that `moba bench attention` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One problem: batch 1, standard-normal q, k and v (routing close to uniform, the hardest case for sparsity)."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype
    backward: bool = True
    dense: bool = True
    reference: bool = False

    @property
    def name(self) -> str:
        """Short, for tables."""
        return (
            f"{length_name(self.tokens)}, {heads_name(self.heads, self.kv_heads)} heads, D {self.head_dim}, "
            f"{self.block_size}/{self.topk}, {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def dense_shape(self) -> tuple[int, int, int, int, torch.dtype, bool]:
        """What dense attention's time depends on."""
        return self.tokens, self.heads, self.kv_heads, self.head_dim, self.dtype, self.backward

    @property
    def moba_flops(self) -> float:
        """Operations of the forward's two products over the keys attended to: 4 · D a (query, key) pair."""
        size, total = self.block_size, 0
        whole, rest = divmod(self.tokens, size)
        for block in range(whole + (rest > 0)):
            queries = size if block < whole else rest
            total += queries * min(block, self.topk - 1) * size + queries * (queries + 1) // 2
        return 4.0 * self.heads * self.head_dim * total

    @property
    def dense_flops(self) -> float:
        """The same for full causal attention."""
        return 2.0 * self.heads * self.head_dim * self.tokens * (self.tokens + 1)


def heads_name(heads: int, kv_heads: int) -> str:
    """16 of 16 query and key/value heads, 32/8 of 32 and 8."""
    return str(heads) if heads == kv_heads else f"{heads}/{kv_heads}"


def length_name(tokens: int) -> str:
    """8192 -> "8K", 1048576 -> "1M"; other numbers in full."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens}"


def cpu_suite() -> list[Case]:
    """Lengths and shapes of small models that a laptop meets."""
    fp32, bf16 = torch.float32, torch.bfloat16
    cases = [Case(32768, 1, 1, 128, 2048, 3, fp32, reference=True)]
    for dtype in (fp32, bf16):
        for tokens in (2048, 8192, 32768):
            for block_size, topk in ((128, 8), (512, 3)):
                cases.append(Case(tokens, 9, 3, 64, block_size, topk, dtype))
    for block_size, topk in ((128, 8), (512, 3)):
        cases.append(Case(65536, 9, 3, 64, block_size, topk, fp32, dense=False))
    return cases


def cuda_suite() -> list[Case]:
    """Lengths and shapes of the paper and of the fastest published kernels."""
    bf16, k = torch.bfloat16, 1024
    cases = [
        Case(32 * k, 1, 1, 128, 2048, 3, bf16, reference=True),
        Case(32 * k, 1, 1, 128, 512, 3, bf16, reference=True),
    ]
    for tokens in (8 * k, 32 * k, 128 * k):
        for block_size, topk in ((128, 8), (512, 3), (512, 8), (2048, 3)):
            cases.append(Case(tokens, 16, 16, 128, block_size, topk, bf16))
    for block_size, topk in ((128, 8), (512, 3), (2048, 3)):
        cases.append(Case(512 * k, 16, 16, 128, block_size, topk, bf16))
    cases.append(Case(128 * k, 32, 8, 128, 4096, 12, bf16))
    cases.append(Case(1024 * k, 32, 8, 128, 4096, 12, bf16, backward=False, dense=False))
    return cases


def fixed_blocks_suite() -> list[Case]:
    """The paper's Figure 2b: 64 blocks and top-k 3 at every length, one head, to 10M tokens."""
    lengths = [8192, 32768, 131072, 524288, 1048576, 4194304, 10485760]
    return [Case(n, 1, 1, 128, n // 64, 3, torch.bfloat16, backward=False, dense=n <= 1048576) for n in lengths]
