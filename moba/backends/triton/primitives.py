"""What all kernels share: where queries, keys and blocks lie, without the host reading a device tensor.

Letters, in all kernels: R tensor rows, T query tokens, S key tokens, H query heads, G key/value heads, D head dim,
K = topk. A *query row* is a query's index in the flattened R · T.

Blocks are numbered globally, over all sequences of a call. A padded row r holds `blocks_per_row` = ceil(S / block_size)
numbers from r · blocks_per_row. Packed sequence i holds the numbers from cu_k[i] // block_size + i: enough for its
blocks wherever it begins, and known without a sum over the sequences before it. Some numbers stand for no block.

The arguments key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr are those of `moba.layout.Sequences`, None where absent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.launch import cdiv
from moba.layout import Sequences


def bounds_of(sequences: Sequences) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors that say where sequences lie, in the order in which operators and `Sequences` take them."""
    return sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k


def num_global_blocks(sequences: Sequences, block_size: int) -> int:
    """How many global block numbers a call has; some may stand for no block."""
    if sequences.cu_k is None:
        return sequences.num_rows * sequences.num_blocks(block_size)
    return sequences.num_keys // block_size + sequences.cu_k.numel() - 1


def num_query_tiles(sequences: Sequences, tile_m: int) -> tuple[int, int]:
    """Grid size for `query_tile_span`, and its tiles_per_row."""
    if sequences.cu_q is not None:
        return sequences.num_queries // tile_m + 2 * sequences.cu_q.numel(), 0
    tiles_per_row = cdiv(sequences.num_queries, tile_m) + (0 if sequences.num_queries == 1 else 1)
    return sequences.num_rows * tiles_per_row, tiles_per_row


@triton.jit
def last_at_most(ptr, count, value, divisor, step):
    """The largest i in 0 … count - 1 with ptr[i] // divisor + step · i <= value, or 0: of a number or of a tensor."""
    found = value * 0
    span = count
    while span > 1:
        half = span // 2
        middle = found + half
        found = tl.where(tl.load(ptr + middle) // divisor + step * middle <= value, middle, found)
        span -= half
    return found


@triton.jit
def row_bounds(row, num_keys, key_start_ptr, key_end_ptr):
    """First and one past the last real key of padded rows: of a number or of a tensor."""
    start = row * 0
    end = start + num_keys
    if key_start_ptr is not None:
        start = tl.load(key_start_ptr + row)
    if key_end_ptr is not None:
        end = tl.load(key_end_ptr + row)
    return start, end


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
        sequence = last_at_most(cu_q_ptr, num_sequences, queries, 1, 0)
        key_begin = tl.load(cu_k_ptr + sequence)
        query_end = tl.load(cu_q_ptr + sequence + 1)
        position = tl.load(cu_k_ptr + sequence + 1) - key_begin - query_end + queries
        position = tl.where(queries < query_end, position, -1)
        first_block = key_begin // block_size + sequence
    else:
        key_begin, key_end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        position = key_end - key_begin - num_queries + queries
        first_block = queries * 0 + row * blocks_per_row
    is_real = (position >= 0) & (queries < num_queries)
    return tl.where(is_real, tl.maximum(position, 0) // block_size, -1), first_block


@triton.jit
def block_places(
    block, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, block_size
):
    """Where global blocks lie: of a number or of a tensor.

    Returns:
        row: tensor row. sequence: number of the sequence, which is the row unless sequences are packed.
        first_key: key token of the block's first position. position: its place in the sequence.
        size: real keys in the block, at most block_size; <= 0 for numbers that stand for no block.
    """
    if cu_k_ptr is not None:
        sequence = last_at_most(cu_k_ptr, num_sequences, block, block_size, 1)
        row = block * 0
        key_begin = tl.load(cu_k_ptr + sequence)
        key_end = tl.load(cu_k_ptr + sequence + 1)
        position = (block - key_begin // block_size - sequence) * block_size
    else:
        row = tl.minimum(block, num_blocks - 1) // blocks_per_row
        sequence = row
        key_begin, key_end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        position = (block - row * blocks_per_row) * block_size
    first_key = key_begin + position
    size = tl.where(block < num_blocks, tl.minimum(key_end - first_key, block_size), 0)
    return row, sequence, first_key, position, size


@triton.jit
def block_span(
    block,
    num_queries,
    num_keys,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_sequences,
    blocks_per_row,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
):
    """A global block and the queries that own it.

    Returns:
        row: its tensor row. first_key, size: its real keys (none if size <= 0).
        first_query: query index, possibly before the sequence's first, of the block's first position.
        query_begin, query_end: the sequence's queries.
    """
    row, sequence, first_key, position, size = block_places(
        block, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, BLOCK_SIZE
    )
    if cu_q_ptr is not None:
        key_count = tl.load(cu_k_ptr + sequence + 1) - tl.load(cu_k_ptr + sequence)
        query_begin = tl.load(cu_q_ptr + sequence)
        query_end = tl.load(cu_q_ptr + sequence + 1)
    else:
        start, end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        key_count = end - start
        query_begin = 0
        query_end = num_queries
    return row, first_key, size, position - (key_count - query_end), query_begin, query_end


@triton.jit
def query_tile_span(
    tile,
    num_queries,
    num_keys,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_sequences,
    tiles_per_row,
    TILE_M: tl.constexpr,
):
    """Queries of one tile. Tiles are aligned to positions, not rows, so that none crosses a multiple of TILE_M.

    The tiles of all sequences together cover every query row of the tensor, those of padding too, exactly once.

    Returns:
        row: tensor row. first_query: the tile's first query index, possibly before query_begin.
        query_begin, query_end: the sequence's queries, or a stretch of padding.
        offset: position of query t is t + offset, negative for padding. sequence_start: key index of position 0.
    """
    if cu_q_ptr is not None:
        # Rows behind the last sequence form one more, of no keys.
        sequence = last_at_most(cu_q_ptr, num_sequences + 1, tile, TILE_M, 2)
        query_begin = tl.load(cu_q_ptr + sequence)
        is_real = sequence < num_sequences
        query_end = tl.load(cu_q_ptr + sequence + 1, mask=is_real, other=num_queries)
        sequence_start = tl.load(cu_k_ptr + sequence)
        sequence_end = tl.load(cu_k_ptr + sequence + 1, mask=is_real, other=0)
        key_count = tl.where(is_real, sequence_end - sequence_start, 0)
        row = 0
        tile = tile - query_begin // TILE_M - 2 * sequence
    else:
        row = tile // tiles_per_row
        tile = tile % tiles_per_row
        sequence_start, sequence_end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        key_count = sequence_end - sequence_start
        query_begin = 0
        query_end = num_queries
    offset = key_count - query_end
    shift = ((query_begin + offset) % TILE_M + TILE_M) % TILE_M
    first_query = query_begin + tile * TILE_M - shift
    return row, first_query, query_begin, query_end, offset, sequence_start
