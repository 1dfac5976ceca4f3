"""The attention kernels' launches for ahead-of-time compilation: what forward and backward would launch, recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moba.backends.triton import by_block
from moba.backends.triton.attend import plan_attend, plan_attend_backward
from moba.backends.triton.case import Case
from moba.backends.triton.launch import make_plan
from moba.backends.triton.primitives import bounds_of
from moba.layout import Sequences

HEAD_DIMS = {
    torch.bfloat16: (16, 64, 80, 128, 256),
    torch.float16: (64, 128, 256),
    torch.float32: (16, 64, 128, 256),
}
BLOCK_SIZES = (80, 128, 512)
# The least and the most shared memory.
REPRESENTATIVE_ARCHITECTURES = (86, 90)
NUM_TOKENS = 16384
# So many that strides are numbers of 64 bits.
FAR_TOKENS = 1 << 24
# Small enough that the dQ of large blocks, and chunks of query rows, are compiled as well.
TIGHT_BYTES_PER_KEY = 64


def aot_cases(arch: int) -> Iterator[Case]:
    """Launches to compile ahead of time: every dtype, head dim and block size; each layout once."""
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for block_size in BLOCK_SIZES:
                representative = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                representative = representative and arch in REPRESENTATIVE_ARCHITECTURES
                yield from _cases(arch, dtype, head_dim, block_size, "plain", representative)
    for layout in ("padded", "packed", "one query"):
        yield from _cases(arch, torch.bfloat16, 128, 128, layout, representative=False)
    for block_size in (128, 512):
        yield from _cases(arch, torch.bfloat16, 128, block_size, "far", representative=arch == 90)


def _cases(
    arch: int, dtype: torch.dtype, head_dim: int, block_size: int, layout: str, representative: bool
) -> Iterator[Case]:
    names = set()
    for is_tight in (False, True):
        for kernel, arguments in _launches(arch, dtype, head_dim, block_size, layout, is_tight):
            kind = "fused" if arguments.get("WITH_D_Q") else layout
            name = f"{kernel.__name__} {str(dtype)[6:]} D{head_dim} block {block_size} {kind}"
            if name not in names:
                names.add(name)
                yield Case(name, kernel, arguments, representative)


def _launches(
    arch: int, dtype: torch.dtype, head_dim: int, block_size: int, layout: str, is_tight: bool
) -> list[tuple[Any, dict[str, Any]]]:
    num_rows = 2 if layout == "padded" else 1
    num_keys = FAR_TOKENS if layout == "far" else NUM_TOKENS
    num_queries = 1 if layout == "one query" else num_keys
    num_heads, num_kv_heads, topk = 4, 2, 4

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    start = empty(num_rows, kind=torch.int32) if layout == "padded" else None
    cu = empty(5, kind=torch.int32) if layout == "packed" else None
    sequences = Sequences(num_rows, num_queries, num_keys, key_start=start, key_end=start, cu_q=cu, cu_k=cu)
    q = empty(num_rows, num_queries, num_heads, head_dim)
    k, v = (empty(num_rows, num_keys, num_kv_heads, head_dim) for _ in range(2))
    if layout == "far":
        # Head after head, one of two key/value heads: the strides of rows and of heads are both beyond 2^31.
        q = empty(num_rows, num_heads, num_queries, head_dim).transpose(1, 2)
        k, v = (empty(num_rows, num_kv_heads, num_keys, head_dim).transpose(1, 2)[:, :, :1] for _ in range(2))
    indices = empty(num_rows, num_queries, num_heads, topk, kind=torch.int32)
    view = by_block.new_view(indices, sequences, block_size)
    options: dict[str, Any] = {
        "block_size": block_size, "scale": head_dim**-0.5, "arch": arch, "keys_aligned": True,
        "workspace_bytes": TIGHT_BYTES_PER_KEY * num_keys if is_tight else 1 << 40,
    }  # fmt: skip
    lse = empty(num_rows, num_queries, num_heads, kind=torch.float32)
    bounds = bounds_of(sequences)
    forward = make_plan(plan_attend, q, k, v, indices, *view, q, lse, *bounds, **options)
    inputs = (q, lse, q, k, v, q, lse, indices, *view)
    backward = make_plan(plan_attend_backward, *inputs, q, k, v, *bounds, **options)
    launches = (*forward.launches(), *backward.launches())
    return [(kernel, arguments) for kernel, arguments in launches if kernel.module != by_block.__name__]
