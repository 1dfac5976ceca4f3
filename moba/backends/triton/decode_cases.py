"""The launches of a decode step for ahead-of-time compilation, recorded from the plans that run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba.backends.triton.case import Case
from moba.backends.triton.decode import _plan_append, _plan_decode
from moba.backends.triton.launch import make_plan

HEAD_DIMS = {
    torch.bfloat16: (16, 64, 80, 128, 256),
    torch.float16: (64, 128, 256),
    torch.float32: (16, 64, 128, 256),
}
# Block size and topk: one family of blocks a query and several, one part of a block and several, and few tokens.
RULES = ((128, 16), (4096, 12), (16, 64))
NUM_KEYS = 131072
PAGE_SIZE = 256
# The least and the most shared memory.
REPRESENTATIVE_ARCHITECTURES = (86, 90)


def aot_cases(arch: int) -> Iterator[Case]:
    """Every dtype, head dim and rule; each layout, several queries and the streamed selection once."""
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for block_size, topk in RULES:
                representative = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                representative = representative and arch in REPRESENTATIVE_ARCHITECTURES
                yield from _cases(arch, dtype, head_dim, block_size, topk, "plain", representative)
    for layout in ("padded", "pages", "alone", "many queries"):
        yield from _cases(arch, torch.bfloat16, 128, 128, 16, layout, representative=False)
    yield from _cases(arch, torch.bfloat16, 64, 16, 1024, "plain", representative=False)


def _cases(
    arch: int, dtype: torch.dtype, head_dim: int, block_size: int, topk: int, layout: str, representative: bool
) -> Iterator[Case]:
    num_rows, num_queries = (2, 1) if layout in ("padded", "pages") else (1, 16 if layout == "many queries" else 1)
    num_heads, num_kv_heads = (8, 8) if layout == "alone" else (32, 8)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q = empty(num_rows, num_queries, num_heads, head_dim)
    k, v = (empty(num_rows, NUM_KEYS, num_kv_heads, head_dim) for _ in range(2))
    means = empty(num_rows, NUM_KEYS // block_size, num_kv_heads, head_dim)
    bound = empty(num_rows, kind=torch.int32)
    bounds: tuple[Tensor | None, ...] = (None, None, None)
    if layout == "padded":
        bounds = (bound, bound, None)
    elif layout == "pages":
        bounds = (None, bound, empty(num_rows, NUM_KEYS // PAGE_SIZE, kind=torch.int32))
        k, v = (empty(1024, PAGE_SIZE, num_kv_heads, head_dim) for _ in range(2))
        means = empty(1024, PAGE_SIZE // block_size, num_kv_heads, head_dim)
    page_size = PAGE_SIZE if layout == "pages" else 0
    indices = empty(num_rows, num_queries, num_heads, topk, kind=torch.int32)
    results = (empty(*q.shape), empty(*q.shape[:3], kind=torch.float32), indices)
    decoding = make_plan(
        _plan_decode, q, k, v, means, *bounds, *results,
        block_size=block_size, keep_first=0, keep_recent=0, scale=head_dim**-0.5, arch=arch,
        capacity=NUM_KEYS, page_size=page_size,
    )  # fmt: skip
    appending = make_plan(
        _plan_append, means, k, *bounds, num_new=num_queries, block_size=block_size, page_size=page_size
    )
    for kernel, arguments in (*decoding.launches(), *appending.launches()):
        name = f"{kernel.__name__} {str(dtype)[6:]} D{head_dim} {block_size}/{topk} {layout}"
        yield Case(name, kernel, arguments, representative)
