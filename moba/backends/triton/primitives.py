"""What the routing kernels share: where queries and blocks lie, without the host reading a device tensor.

Letters, in all kernels: R tensor rows, T query tokens, S key tokens, H query heads, G key/value heads, D head dim,
K = topk. A *query row* is a query's index in the flattened R · T.

Blocks are numbered globally, over all sequences of a call. A padded row r holds `blocks_per_row` = ceil(S / block_size)
numbers from r · blocks_per_row. Packed sequence i holds the numbers from cu_k[i] // block_size + i: enough for its
blocks wherever it begins, and known without a sum over the sequences before it. Some numbers stand for no block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.layout import Sequences


def bounds_of(sequences: Sequences) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors that say where sequences lie, in the order in which operators and `Sequences` take them."""
    return sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k


def num_global_blocks(sequences: Sequences, block_size: int) -> int:
    """How many global block numbers a call has; some may stand for no block."""
    if sequences.cu_k is None:
        return sequences.num_rows * sequences.num_blocks(block_size)
    return sequences.num_keys // block_size + sequences.cu_k.numel() - 1


@triton.jit
def _last_at_most(ptr, count, values, divisor, step):
    """For each value the largest i in 0 … count - 1 with ptr[i] // divisor + step · i <= value; 0 if there is none."""
    found = tl.zeros_like(values)
    span = count
    while span > 1:
        half = span // 2
        middle = found + half
        found = tl.where(tl.load(ptr + middle) // divisor + step * middle <= values, middle, found)
        span -= half
    return found


@triton.jit
def query_places(
    row,
    queries,
    num_queries,
    num_keys,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_sequences,
    blocks_per_row,
    block_size,
):
    """Where queries [M] of one tensor row stand.

    Returns:
        own: int32 [M], own block within the sequence, -1 for padding.
        first_block: int32 [M], global number of the sequence's first block.
    """
    if cu_q_ptr is not None:
        sequence = _last_at_most(cu_q_ptr, num_sequences, queries, 1, 0)
        key_begin = tl.load(cu_k_ptr + sequence)
        query_end = tl.load(cu_q_ptr + sequence + 1)
        position = tl.load(cu_k_ptr + sequence + 1) - key_begin - query_end + queries
        position = tl.where(queries < query_end, position, -1)
        first_block = key_begin // block_size + sequence
    else:
        key_begin = 0
        key_end = num_keys
        if key_start_ptr is not None:
            key_begin = tl.load(key_start_ptr + row)
        if key_end_ptr is not None:
            key_end = tl.load(key_end_ptr + row)
        position = key_end - key_begin - num_queries + queries
        first_block = tl.zeros_like(queries) + row * blocks_per_row
    is_real = (position >= 0) & (queries < num_queries)
    return tl.where(is_real, tl.maximum(position, 0) // block_size, -1), first_block


@triton.jit
def block_places(
    blocks, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, block_size
):
    """Where global blocks [M] lie.

    Returns:
        row: int32 [M], tensor row. first_key: int32 [M], key token of the block's first position.
        size: int32 [M], real keys in the block, at most block_size; <= 0 for numbers that stand for no block.
    """
    if cu_k_ptr is not None:
        sequence = _last_at_most(cu_k_ptr, num_sequences, blocks, block_size, 1)
        key_begin = tl.load(cu_k_ptr + sequence)
        key_end = tl.load(cu_k_ptr + sequence + 1)
        row = tl.zeros_like(blocks)
        first_key = key_begin + (blocks - key_begin // block_size - sequence) * block_size
    else:
        row = tl.minimum(blocks, num_blocks - 1) // blocks_per_row
        key_begin = tl.zeros_like(blocks)
        key_end = tl.zeros_like(blocks) + num_keys
        if key_start_ptr is not None:
            key_begin = tl.load(key_start_ptr + row)
        if key_end_ptr is not None:
            key_end = tl.load(key_end_ptr + row)
        first_key = key_begin + (blocks - row * blocks_per_row) * block_size
    size = tl.minimum(key_end - first_key, block_size)
    return row, first_key, tl.where(blocks < num_blocks, size, 0)
