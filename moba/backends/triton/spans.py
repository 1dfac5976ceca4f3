"""Where a program's queries and keys lie: kernels read bounds and cu_seqlens themselves, no host waits.

The arguments `key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr` are those of `moba.layout.Sequences`, None where absent.
"""

import triton
import triton.language as tl

from moba.backends.triton.launch import cdiv
from moba.layout import Sequences


@triton.jit
def last_at_most(ptr, count, value, DIVISOR: tl.constexpr, STEP: tl.constexpr):
    """The largest i in 0 … count - 1 with ptr[i] // DIVISOR + STEP · i <= value; 0 if there is none."""
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(ptr + middle) // DIVISOR + STEP * middle <= value:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def row_bounds(row, num_keys, key_start_ptr, key_end_ptr):
    """First and one past the last real key of a padded row."""
    start = 0
    end = num_keys
    if key_start_ptr is not None:
        start = tl.load(key_start_ptr + row)
    if key_end_ptr is not None:
        end = tl.load(key_end_ptr + row)
    return start, end


@triton.jit
def block_keys(
    block, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, BLOCK_SIZE: tl.constexpr
):
    """Tensor row and key index where a global block begins."""
    if cu_k_ptr is not None:
        sequence = last_at_most(cu_k_ptr, num_sequences, block, BLOCK_SIZE, 1)
        sequence_start = tl.load(cu_k_ptr + sequence)
        row = 0
        first_key = sequence_start + (block - sequence_start // BLOCK_SIZE - sequence) * BLOCK_SIZE
    else:
        row = block // blocks_per_row
        start, _ = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        first_key = start + (block % blocks_per_row) * BLOCK_SIZE
    return row, first_key


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
    BLOCK_SIZE: tl.constexpr,
):
    """A global block and the queries that own it.

    Returns:
        row: its tensor row. first_key, end_key: its real keys (none if end_key <= first_key).
        first_query: query index, possibly before the sequence's first, of the block's first position.
        query_begin, query_end: the sequence's queries.
    """
    if cu_q_ptr is not None:
        sequence = last_at_most(cu_k_ptr, num_sequences, block, BLOCK_SIZE, 1)
        sequence_start = tl.load(cu_k_ptr + sequence)
        sequence_end = tl.load(cu_k_ptr + sequence + 1)
        query_begin = tl.load(cu_q_ptr + sequence)
        query_end = tl.load(cu_q_ptr + sequence + 1)
        row = 0
        position = (block - sequence_start // BLOCK_SIZE - sequence) * BLOCK_SIZE
    else:
        row = block // blocks_per_row
        position = (block % blocks_per_row) * BLOCK_SIZE
        sequence_start, sequence_end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
        query_begin = 0
        query_end = num_queries
    first_key = sequence_start + position
    end_key = tl.minimum(first_key + BLOCK_SIZE, sequence_end)
    first_query = position - (sequence_end - sequence_start - query_end)
    return row, first_key, end_key, first_query, query_begin, query_end


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


def num_query_tiles(sequences: Sequences, tile_m: int) -> tuple[int, int]:
    """Grid size for `query_tile_span`, and its tiles_per_row."""
    if sequences.cu_q is not None:
        return sequences.num_queries // tile_m + 2 * sequences.cu_q.numel(), 0
    tiles_per_row = cdiv(sequences.num_queries, tile_m) + (0 if sequences.num_queries == 1 else 1)
    return sequences.num_rows * tiles_per_row, tiles_per_row
