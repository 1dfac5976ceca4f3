"""Block means: the mean key of every finished block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.case import Case
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2, run_planned
from moba.backends.triton.primitives import block_places, bounds_of, num_global_blocks
from moba.layout import Sequences

# Elements that a program holds as it sums. A mean's order of summation follows from these, block_size and D alone, so
# they are no matter of tuning: a block's mean is the same bits wherever and whenever it is computed.
ELEMENTS = 8192
MAX_TOKENS = 128
NUM_WARPS = 4
# Memory behind each head's means that a reader may load, though it means nothing: tiles need not end with the blocks.
SPARE_BLOCKS = 64


@triton.jit
def sum_tokens(x, TOKENS: tl.constexpr):
    """Sum of [M, TOKENS, D] over its tokens, first half to last, so that the order is no choice of the compiler."""
    for _ in tl.static_range(TOKENS.bit_length() - 1):
        x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, x.shape[2]])
        first, last = tl.split(tl.permute(x, 0, 2, 3, 1))
        x = first + last
    return tl.reshape(x, [x.shape[0], x.shape[2]])


@triton.jit
def _block_means_kernel(
    k_ptr,
    means_ptr,
    key_start_ptr,
    key_end_ptr,
    cu_k_ptr,
    num_keys,
    num_sequences,
    blocks_per_row,
    num_blocks,
    block_size,
    k_stride_r,
    k_stride_s,
    k_stride_g,
    means_stride_n,
    means_stride_g,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """Program (i, g): TILE_BLOCKS blocks of kv head g."""
    blocks = tl.program_id(0) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    head = tl.program_id(1).to(tl.int64)
    row, _, first_key, _, size = block_places(
        blocks, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, block_size
    )
    is_finished = size == block_size
    columns = tl.arange(0, PADDED_DIM)
    base = k_ptr + row.to(tl.int64) * k_stride_r + head * k_stride_g
    total = tl.zeros([TILE_BLOCKS, TILE_TOKENS, PADDED_DIM], tl.float32)
    for start in range(0, block_size, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        keys = (first_key[:, None] + tokens[None, :]).to(tl.int64)
        pointers = base[:, None, None] + keys[:, :, None] * k_stride_s + columns[None, None, :]
        mask = (is_finished[:, None] & (tokens < block_size)[None, :])[:, :, None]
        if HEAD_DIM != PADDED_DIM:
            mask = mask & (columns < HEAD_DIM)[None, None, :]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    means = tl.div_rn(sum_tokens(total, TILE_TOKENS), tl.full([TILE_BLOCKS, PADDED_DIM], 1.0, tl.float32) * block_size)
    pointers = means_ptr + head * means_stride_g + blocks.to(tl.int64)[:, None] * means_stride_n + columns[None, :]
    mask = is_finished[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, means.to(means_ptr.dtype.element_ty), mask=mask)


def block_means(k: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """Mean key of every finished block of every sequence, by global block number. The host does not wait.

    mean(K_j) = 1/block_size · Σ_{i in block j} k_i

    Args:
        k: [R, S, G, D], any strides with a contiguous last dimension.

    Returns:
        [num_global_blocks, G, D] in k's dtype. Rows of unfinished blocks, and of numbers that stand for no block, are
        not written.

    Numerics: summed in fp32 in an order that depends on block_size and D alone, divided, and rounded once.
    Source: MoBA, eq. 6.
    """
    means = _head_major(k.new_empty(means_shape(k, sequences, block_size)))
    if means.numel():
        run_planned(_plan, k, means, *bounds_of(sequences), device=k.device, block_size=block_size)
    return means


def means_shape(k: Tensor, sequences: Sequences, block_size: int) -> tuple[int, int, int]:
    """Shape [G, blocks, D] of memory for block means: a query head streams those of one kv head, in whole tiles."""
    return k.shape[2], num_global_blocks(sequences, block_size) + SPARE_BLOCKS, k.shape[3]


def _head_major(memory: Tensor) -> Tensor:
    return memory.transpose(0, 1)[: memory.shape[1] - SPARE_BLOCKS]


def global_means(means: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """Means [R, N, G, D] of each row's blocks as `block_means` would return them, by global block number."""
    num_rows, num_blocks = sequences.num_rows, sequences.num_blocks(block_size)
    memory = means.new_empty(means.shape[2], num_rows * num_blocks + SPARE_BLOCKS, means.shape[3])
    count = min(num_blocks, means.shape[1])
    rows = memory[:, : num_rows * num_blocks].unflatten(1, (num_rows, num_blocks))
    rows[:, :, :count] = means[:, :count].permute(2, 0, 1, 3)
    return _head_major(memory)


def plan_block_means(plan: Plan, k: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """`block_means` as a step of a plan."""
    means = _head_major(plan.buffer(*means_shape(k, sequences, block_size), dtype=k.dtype))
    if means.numel():
        _launch(plan, k, means, sequences, block_size)
    return means


def _plan(plan: Plan, k: Tensor, means: Tensor, *bounds: Tensor | None, block_size: int) -> None:
    _launch(plan, k, means, Sequences(k.shape[0], 0, k.shape[1], *bounds), block_size)


def _launch(plan: Plan, k: Tensor, means: Tensor, sequences: Sequences, block_size: int) -> None:
    arguments = means_arguments(k, means, sequences, block_size)
    plan.launch(_block_means_kernel, (cdiv(means.shape[0], arguments["TILE_BLOCKS"]), k.shape[2]), **arguments)


def tile_sizes(head_dim: int, block_size: int) -> dict[str, int]:
    """The tile that a program sums. TILE_TOKENS and PADDED_DIM settle the order of a sum; TILE_BLOCKS does not."""
    padded_dim = max(16, next_power_of_2(head_dim))
    tokens = min(MAX_TOKENS, ELEMENTS // padded_dim)
    tile_tokens = min(next_power_of_2(block_size), tokens)
    return {"PADDED_DIM": padded_dim, "TILE_BLOCKS": tokens // tile_tokens, "TILE_TOKENS": tile_tokens}


def means_arguments(k: Tensor, means: Tensor, sequences: Sequences, block_size: int) -> dict[str, Any]:
    """Arguments of one launch of the block means kernel."""
    return {
        "k_ptr": k,
        "means_ptr": means,
        "key_start_ptr": sequences.key_start,
        "key_end_ptr": sequences.key_end,
        "cu_k_ptr": sequences.cu_k,
        "num_keys": sequences.num_keys,
        "num_sequences": 0 if sequences.cu_k is None else sequences.cu_k.numel() - 1,
        "blocks_per_row": sequences.num_blocks(block_size),
        "num_blocks": means.shape[0],
        "block_size": block_size,
        "k_stride_r": k.stride(0),
        "k_stride_s": k.stride(1),
        "k_stride_g": k.stride(2),
        "means_stride_n": means.stride(0),
        "means_stride_g": means.stride(1),
        "HEAD_DIM": k.shape[3],
        **tile_sizes(k.shape[3], block_size),
        "num_warps": NUM_WARPS,
    }


def aot_cases(arch: int) -> Iterator[Case]:
    """Block means of plain and packed keys."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 80, 128, 256):
            for block_size in (1, 16, 128):
                for packed in (False, True):
                    yield _aot_case(arch, dtype, head_dim, block_size, packed)


def _aot_case(arch: int, dtype: torch.dtype, head_dim: int, block_size: int, packed: bool) -> Case:
    k = torch.empty(1, 8192, 2, head_dim, dtype=dtype, device="meta")
    cu = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
    sequences = Sequences(1, 8192, 8192, cu_q=cu, cu_k=cu)
    means = k.new_empty(2, num_global_blocks(sequences, block_size), head_dim).transpose(0, 1)
    kind = "packed" if packed else "plain"
    return Case(
        f"block_means {str(dtype)[6:]} D={head_dim} block={block_size} {kind}",
        _block_means_kernel,
        means_arguments(k, means, sequences, block_size),
        representative=arch == 90 and packed and dtype == torch.bfloat16 and head_dim == 80,
    )
