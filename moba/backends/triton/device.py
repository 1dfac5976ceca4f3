"""What all kernels share: the arguments that tensors and sequences become, and the device helpers that read them.

Letters, in all kernels: R tensor rows, T query tokens, S key tokens, H query heads, G key/value heads, D head dim of
queries and keys, Dv that of values, K = topk. A *query row* is a query's index in the flattened R · T. A *slot* is an
index into a query's row of the routing.

A routing [R, T, H, K] has a row for every query head, or one for the PACKED query heads of a key/value head. These
then fill adjacent rows of a tile: row i is *member* i % PACKED of the tile's query or entry i // PACKED. A kernel's
`head` is one of the routing's, and GROUP says how many of these a key/value head has; so GROUP · PACKED = H / G.

Blocks are numbered globally, over all sequences of a call. A padded row r holds `blocks_per_row` = ceil(S / block_size)
numbers from r · blocks_per_row. Packed sequence i holds the numbers from cu_k[i] // block_size + i: enough for its
blocks wherever it begins, and known without a sum over the sequences before it. Some numbers stand for no block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.launch import cdiv
from moba.sequences import Sequences

LN_2 = tl.constexpr(0.6931471805599453)
# Below any logit, and finite: a row may meet masked keys before its first real one, and -inf - -inf is not a number.
LOWEST_LOGIT = tl.constexpr(-3.0e38)
# Scores that are NaN or below count as this, which any candidate reaches and masked scores (-inf) do not.
LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)
# Slots of a query's routing whose state fits one number.
MAX_SLOT_BITS = tl.constexpr(32)


class Rows(NamedTuple):
    """A tensor [R, T, H, D], its last dimension contiguous: pointer, and strides in elements."""

    ptr: Any
    stride_r: Any
    stride_t: Any
    stride_h: Any


class Layout(NamedTuple):
    """Where the sequences of a call lie (`moba.sequences.Sequences`; pointers are None where absent) and its blocks."""

    num_queries: Any
    num_keys: Any
    key_start_ptr: Any
    key_end_ptr: Any
    cu_q_ptr: Any
    cu_k_ptr: Any
    num_sequences: Any
    blocks_per_row: Any
    num_blocks: Any


class View(NamedTuple):
    """The by-block view of a routing: each block's entries, query row · K + slot, in ascending order.

    `offsets`: int32 [H, blocks + 1]; `entries`: int32 [H, num_entries = R · T · (K - 1)], H heads of the routing. Head
    h's entries of block j are offsets[h, j] … offsets[h, j + 1] - 1.
    """

    offsets: Any
    entries: Any
    num_entries: Any


def view_of(offsets: Tensor, entries: Tensor) -> View:
    """The by-block view as an argument of kernels."""
    return View(offsets, entries, entries.shape[1])


def rows_of(x: Tensor) -> Rows:
    """A tensor [R, T, H, D] as an argument of kernels."""
    return Rows(x, *x.stride()[:3])


def layout_of(sequences: Sequences, block_size: int) -> Layout:
    """The sequences of a call as an argument of kernels."""
    return Layout(
        sequences.num_queries, sequences.num_keys, *bounds_of(sequences),
        sequences.num_sequences,
        sequences.num_blocks(block_size), num_global_blocks(sequences, block_size),
    )  # fmt: skip


def bounds_of(sequences: Sequences) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors that say where sequences lie, in the order in which operators and `Sequences` take them."""
    return sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k


def num_global_blocks(sequences: Sequences, block_size: int) -> int:
    """How many global block numbers a call has; some may stand for no block."""
    if sequences.cu_k is None:
        return sequences.num_rows * sequences.num_blocks(block_size)
    return sequences.num_keys // block_size + sequences.num_sequences


def num_query_tiles(sequences: Sequences, tile_m: int) -> tuple[int, int]:
    """Grid size for `query_tile_span`, and its tiles_per_row."""
    if sequences.cu_q is not None:
        return sequences.num_queries // tile_m + 2 * sequences.cu_q.numel(), 0
    tiles_per_row = cdiv(sequences.num_queries, tile_m) + (0 if sequences.num_queries == 1 else 1)
    return sequences.num_rows * tiles_per_row, tiles_per_row


@triton.constexpr_function
def padded_head_dim(head_dim):
    """Head dims are padded on chip to a power of two of at least 16, the least that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


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
def row_bounds(row, layout):
    """First and one past the last real key of padded rows: of a number or of a tensor."""
    start = row * 0
    end = start + layout.num_keys
    if layout.key_start_ptr is not None:
        start = tl.load(layout.key_start_ptr + row)
    if layout.key_end_ptr is not None:
        end = tl.load(layout.key_end_ptr + row)
    return start, end


@triton.jit
def locate_queries(row, queries, layout, block_size):
    """Where queries [M] of one tensor row stand.

    Returns:
        own: int32 [M], own block within the sequence, -1 for padding.
        first_block: int32 [M], global number of the sequence's first block.
    """
    if layout.cu_q_ptr is not None:
        sequence = last_at_most(layout.cu_q_ptr, layout.num_sequences, queries, 1, 0)
        key_begin = tl.load(layout.cu_k_ptr + sequence)
        query_end = tl.load(layout.cu_q_ptr + sequence + 1)
        position = tl.load(layout.cu_k_ptr + sequence + 1) - key_begin - query_end + queries
        position = tl.where(queries < query_end, position, -1)
        first_block = key_begin // block_size + sequence
    else:
        key_begin, key_end = row_bounds(row, layout)
        position = key_end - key_begin - layout.num_queries + queries
        first_block = queries * 0 + row * layout.blocks_per_row
    is_real = (position >= 0) & (queries < layout.num_queries)
    return tl.where(is_real, tl.maximum(position, 0) // block_size, -1), first_block


@triton.jit
def locate_blocks(block, layout, block_size):
    """Where global blocks lie: of a number or of a tensor.

    Returns:
        row: tensor row. sequence: number of the sequence, which is the row unless sequences are packed.
        first_key: key token of the block's first position. position: that in the sequence.
        size: real keys in the block, at most block_size; <= 0 for numbers that stand for no block.
    """
    if layout.cu_k_ptr is not None:
        sequence = last_at_most(layout.cu_k_ptr, layout.num_sequences, block, block_size, 1)
        row = block * 0
        key_begin = tl.load(layout.cu_k_ptr + sequence)
        key_end = tl.load(layout.cu_k_ptr + sequence + 1)
        position = (block - key_begin // block_size - sequence) * block_size
    else:
        row = tl.minimum(block, layout.num_blocks - 1) // layout.blocks_per_row
        sequence = row
        key_begin, key_end = row_bounds(row, layout)
        position = (block - row * layout.blocks_per_row) * block_size
    first_key = key_begin + position
    size = tl.where(block < layout.num_blocks, tl.minimum(key_end - first_key, block_size), 0)
    return row, sequence, first_key, position, size


@triton.jit
def block_span(block, layout, BLOCK_SIZE: tl.constexpr):
    """A global block and the queries that own it.

    Returns:
        row: its tensor row. first_key, size: its real keys (none if size <= 0).
        first_query: query index, possibly before the sequence's first, of the block's first position.
        query_begin, query_end: the sequence's queries.
    """
    row, sequence, first_key, position, size = locate_blocks(block, layout, BLOCK_SIZE)
    if layout.cu_q_ptr is not None:
        key_count = tl.load(layout.cu_k_ptr + sequence + 1) - tl.load(layout.cu_k_ptr + sequence)
        query_begin = tl.load(layout.cu_q_ptr + sequence)
        query_end = tl.load(layout.cu_q_ptr + sequence + 1)
    else:
        start, end = row_bounds(row, layout)
        key_count = end - start
        query_begin = 0
        query_end = layout.num_queries
    return row, first_key, size, position - (key_count - query_end), query_begin, query_end


@triton.jit
def query_tile_span(tile, layout, tiles_per_row, TILE_M: tl.constexpr):
    """Queries of one tile. Tiles are aligned to positions, not rows, so that none crosses a multiple of TILE_M.

    The tiles of all sequences together cover every query row of the tensor, those of padding too, exactly once.

    Returns:
        row: tensor row. first_query: the tile's first query index, possibly before query_begin.
        query_begin, query_end: the sequence's queries, or a stretch of padding.
        offset: position of query t is t + offset, negative for padding. sequence_start: key index of position 0.
    """
    if layout.cu_q_ptr is not None:
        # Rows behind the last sequence form one more, of no keys.
        sequence = last_at_most(layout.cu_q_ptr, layout.num_sequences + 1, tile, TILE_M, 2)
        query_begin = tl.load(layout.cu_q_ptr + sequence)
        is_real = sequence < layout.num_sequences
        query_end = tl.load(layout.cu_q_ptr + sequence + 1, mask=is_real, other=layout.num_queries)
        sequence_start = tl.load(layout.cu_k_ptr + sequence)
        sequence_end = tl.load(layout.cu_k_ptr + sequence + 1, mask=is_real, other=0)
        key_count = tl.where(is_real, sequence_end - sequence_start, 0)
        row = 0
        tile = tile - query_begin // TILE_M - 2 * sequence
    else:
        row = tile // tiles_per_row
        tile = tile % tiles_per_row
        sequence_start, sequence_end = row_bounds(row, layout)
        key_count = sequence_end - sequence_start
        query_begin = 0
        query_end = layout.num_queries
    offset = key_count - query_end
    shift = ((query_begin + offset) % TILE_M + TILE_M) % TILE_M
    first_query = query_begin + tile * TILE_M - shift
    return row, first_query, query_begin, query_end, offset, sequence_start


@triton.jit
def load_rows(ptr, offsets, mask, HEAD_DIM: tl.constexpr):
    """Rows [len(offsets), padded D] that begin at `offsets`; zeros where masked and beyond HEAD_DIM."""
    PADDED_DIM: tl.constexpr = padded_head_dim(HEAD_DIM)
    columns = tl.arange(0, PADDED_DIM)
    pointers = ptr + offsets[:, None] + columns[None, :]
    if HEAD_DIM == PADDED_DIM:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offsets, values, mask, HEAD_DIM: tl.constexpr, IS_PARTIAL: tl.constexpr = False):
    """The inverse of `load_rows`, in the dtype of `ptr`. Partials are read once, much later: they need no cache."""
    PADDED_DIM: tl.constexpr = padded_head_dim(HEAD_DIM)
    columns = tl.arange(0, PADDED_DIM)
    pointers = ptr + offsets[:, None] + columns[None, :]
    mask = mask[:, None] if HEAD_DIM == PADDED_DIM else mask[:, None] & (columns < HEAD_DIM)[None, :]
    if IS_PARTIAL:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    else:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(keys, tiles, row, kv_head, first_key, mask, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr):
    """Keys or values first_key … first_key + TILE_N - 1 of one tensor row and key/value head: [TILE_N, padded D].

    `keys` are Rows. Where there is a descriptor of `tiles` (see `workspace.key_matrix`), it is read instead: `keys`
    then say how many of the matrix's rows and columns lie between tensor rows and heads, and the mask is ignored.
    """
    if tiles is not None:
        matrix_row = tl.cast(row * keys.stride_r, tl.int32) + first_key
        result = tiles.load([matrix_row, tl.cast(kv_head * keys.stride_h, tl.int32)])
    else:
        start = tl.full([], row, tl.int64) * keys.stride_r + tl.full([], kv_head, tl.int64) * keys.stride_h
        start += tl.full([], first_key, tl.int64) * keys.stride_t
        result = load_rows(keys.ptr + start, tl.arange(0, TILE_N).to(tl.int64) * keys.stride_t, mask, HEAD_DIM)
    return result


@triton.jit
def online_softmax(logits, values, maximum, total, acc):
    """One step of the streaming softmax: logits [M, N] of N more keys with values [N, Dv]."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def past_slots(indices_ptr, query, stride_t, position, is_real, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Which slots of the queries' routing hold past blocks, as bits: int32 [M], of the first 32 slots."""
    slots = tl.arange(0, MAX_SLOT_BITS if TOPK > MAX_SLOT_BITS else triton.next_power_of_2(TOPK))
    pointers = indices_ptr + query.to(tl.int64)[:, None] * stride_t + slots[None, :]
    block = tl.load(pointers, mask=is_real[:, None] & (slots < TOPK - 1)[None, :], other=-1)
    is_past = (block >= 0) & (block < (position // BLOCK_SIZE)[:, None])
    return tl.sum(tl.where(is_past, 1 << slots[None, :], 0), 1)


@triton.jit
def holds_past_block(
    bits, indices_ptr, query, stride_t, slot, position, is_real, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Whether one slot of the queries' routing holds a past block: [M]. `bits` are those of `past_slots`."""
    if TOPK - 1 <= MAX_SLOT_BITS:
        holds = ((bits >> slot) & 1) == 1
    else:
        block = tl.load(indices_ptr + query.to(tl.int64) * stride_t + slot, mask=is_real, other=-1)
        holds = (block >= 0) & (block < position // BLOCK_SIZE)
    return holds


@triton.jit
def own_key_range(
    position, is_real, tile_position, BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr
):
    """Keys that a tile of queries may see in own blocks: all of begin … middle - 1, some of middle … end - 1."""
    end = tl.max(tl.where(is_real, position, -1), 0) + 1
    if (BLOCK_SIZE % TILE_M == 0) & (TILE_M % TILE_N == 0):
        middle = tl.minimum(tl.maximum(tile_position, 0), end)
        begin = middle // BLOCK_SIZE * BLOCK_SIZE
    else:
        middle = tl.min(tl.where(is_real, position, end), 0) // BLOCK_SIZE * BLOCK_SIZE
        begin = middle
    return begin, middle, end


@triton.jit
def own_keys_visible(key, position, BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr):
    """Whether queries at `position` see keys of their own blocks: [M, N]."""
    visible = key[None, :] <= position[:, None]
    if BLOCK_SIZE % TILE_M != 0:
        visible = visible & (key[None, :] >= (position // BLOCK_SIZE * BLOCK_SIZE)[:, None])
    return visible
