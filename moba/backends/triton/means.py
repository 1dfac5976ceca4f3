"""Block means: the mean key of every finished block."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import bounds_of, layout_of, locate_blocks, num_global_blocks, padded_head_dim, rows_of
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2, run_planned
from moba.sequences import Sequences

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


class Means(NamedTuple):
    """Block means by global block number, one key/value head's after another's: pointer, elements from head to head."""

    ptr: Any
    stride_g: Any


@triton.jit
def _block_means_kernel(
    k, means, layout, block_size, HEAD_DIM: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_TOKENS: tl.constexpr
):  # fmt: skip
    """Program (i, g): TILE_BLOCKS blocks of kv head g."""
    PADDED_DIM: tl.constexpr = padded_head_dim(HEAD_DIM)
    blocks = tl.program_id(0) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    head = tl.program_id(1).to(tl.int64)
    row, _, first_key, _, size = locate_blocks(blocks, layout, block_size)
    is_finished = size == block_size
    columns = tl.arange(0, PADDED_DIM)
    base = k.ptr + row.to(tl.int64) * k.stride_r + head * k.stride_h
    total = tl.zeros([TILE_BLOCKS, TILE_TOKENS, PADDED_DIM], tl.float32)
    for start in range(0, block_size, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        keys = (first_key[:, None] + tokens[None, :]).to(tl.int64)
        pointers = base[:, None, None] + keys[:, :, None] * k.stride_t + columns[None, None, :]
        mask = (is_finished[:, None] & (tokens < block_size)[None, :])[:, :, None]
        if HEAD_DIM != PADDED_DIM:
            mask = mask & (columns < HEAD_DIM)[None, None, :]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(sum_tokens(total, TILE_TOKENS), tl.full([TILE_BLOCKS, PADDED_DIM], 1.0, tl.float32) * block_size)
    pointers = means.ptr + head * means.stride_g + blocks.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
    mask = is_finished[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, mean.to(means.ptr.dtype.element_ty), mask=mask)


def mean_keys(k: Tensor, sequences: Sequences, block_size: int) -> Tensor:
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
    num_blocks = num_global_blocks(sequences, block_size)
    means = k.new_empty(means_shape(k, num_blocks)).transpose(0, 1)[:num_blocks]
    if means.numel():
        run_planned(_plan, k, means, *bounds_of(sequences), device=k.device, block_size=block_size)
    return means


def means_shape(k: Tensor, num_blocks: int) -> tuple[int, int, int]:
    """Shape [G, blocks, D] of memory for block means: a query head streams those of one kv head, in whole tiles.

    Heads are multiples of 16 elements apart, whatever the number of blocks: kernels are compiled for that.
    """
    return k.shape[2], cdiv(num_blocks + SPARE_BLOCKS, 16) * 16, k.shape[3]


def global_means(means: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """Means [R, N, G, D] of each row's blocks as `block_means` would return them, by global block number."""
    num_rows, num_blocks = sequences.num_rows, sequences.num_blocks(block_size)
    memory = means.new_empty(means_shape(means, num_rows * num_blocks))[:, : num_rows * num_blocks]
    count = min(num_blocks, means.shape[1])
    memory.unflatten(1, (num_rows, num_blocks))[:, :, :count] = means[:, :count].permute(2, 0, 1, 3)
    return memory.transpose(0, 1)


def plan_block_means(plan: Plan, k: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """`block_means` as a step of a plan."""
    num_blocks = num_global_blocks(sequences, block_size)
    means = plan.buffer(*means_shape(k, num_blocks), dtype=k.dtype).transpose(0, 1)[:num_blocks]
    if means.numel():
        _launch(plan, k, means, sequences, block_size)
    return means


def _plan(plan: Plan, k: Tensor, means: Tensor, *bounds: Tensor | None, block_size: int) -> None:
    _launch(plan, k, means, Sequences(k.shape[0], 0, k.shape[1], *bounds), block_size)


def _launch(plan: Plan, k: Tensor, means: Tensor, sequences: Sequences, block_size: int) -> None:
    tiles = tile_sizes(k.shape[3], block_size)
    plan.launch(
        _block_means_kernel, (cdiv(means.shape[0], tiles["TILE_BLOCKS"]), k.shape[2]),
        rows_of(k), Means(means, means.stride(1)), layout_of(sequences, block_size), block_size,
        HEAD_DIM=k.shape[3], **tiles, num_warps=NUM_WARPS,
    )  # fmt: skip


def tile_sizes(head_dim: int, block_size: int) -> dict[str, int]:
    """The tile that a program sums. TILE_TOKENS and the padded D settle the order of a sum; TILE_BLOCKS does not."""
    tokens = min(MAX_TOKENS, ELEMENTS // padded_head_dim(head_dim))
    tile_tokens = min(next_power_of_2(block_size), tokens)
    return {"TILE_BLOCKS": tokens // tile_tokens, "TILE_TOKENS": tile_tokens}
