"""Device helpers that read entries, and the queries that they stand for. Letters and words as in device.py."""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.device import load_rows


@triton.jit
def tile_queries(TILE_M: tl.constexpr, PACKED: tl.constexpr):
    """Which of a tile's queries or entries each of its rows stands for: [TILE_M]."""
    result = tl.arange(0, TILE_M)
    if PACKED > 1:
        result = result // PACKED
    return result


@triton.jit
def packed_rows(rows, PACKED: tl.constexpr):
    """Rows [M] of members, where `rows` [M] are those of their queries: rows · PACKED + member."""
    result = rows
    if PACKED > 1:
        result = rows.to(tl.int64) * PACKED + tl.arange(0, rows.shape[0]) % PACKED
    return result


@triton.jit
def member_offsets(offsets, stride_h, PACKED: tl.constexpr):
    """Offsets [M] of members in a tensor, where `offsets` [M] are those of their query's first head."""
    result = offsets
    if PACKED > 1:
        result = offsets + (tl.arange(0, offsets.shape[0]) % PACKED).to(tl.int64) * stride_h
    return result


@triton.jit
def row_offsets(x, query_rows, num_queries, UNIFORM_STRIDE: tl.constexpr):
    """Where query rows [M], flattened over R · T, begin in x [R, T, H, D]: [M].

    UNIFORM_STRIDE: query rows are stride_t apart, across tensor rows too. Otherwise a division by a run-time number
    finds each one's tensor row, which is 6 % of a backward.
    """
    if UNIFORM_STRIDE:
        offsets = query_rows.to(tl.int64) * x.stride_t
    else:
        tensor_row = query_rows // num_queries
        token = query_rows - tensor_row * num_queries
        offsets = tensor_row.to(tl.int64) * x.stride_r + token.to(tl.int64) * x.stride_t
    return offsets


@triton.jit
def load_query_rows(
    x, head, query_rows, num_queries, mask, HEAD_DIM: tl.constexpr, UNIFORM_STRIDE: tl.constexpr, PACKED: tl.constexpr
):
    """Query rows [M], flattened over R · T, of one head of the routing, from x [R, T, H, D]: [M, padded D]."""
    offsets = row_offsets(x, query_rows, num_queries, UNIFORM_STRIDE)
    offsets = member_offsets(offsets, x.stride_h, PACKED)
    return load_rows(x.ptr + head.to(tl.int64) * PACKED * x.stride_h, offsets, mask, HEAD_DIM)


@triton.jit
def load_entries(entries_ptr, begin, end, TOPK: tl.constexpr, TILE_M: tl.constexpr, PACKED: tl.constexpr):
    """Query rows and slots of the entries begin … begin + TILE_M / PACKED - 1, and which of them lie before `end`: each
    PACKED times, [TILE_M].
    """
    index = begin + tile_queries(TILE_M, PACKED)
    mask = index < end
    entry = tl.load(entries_ptr + index, mask=mask, other=0)
    query_rows = entry // TOPK
    slots = entry - query_rows * TOPK
    return query_rows, slots, mask & (slots < TOPK - 1)


@triton.jit
def chunk_tile(partials):
    """The tile of queries that a program takes, one of those that the chunk needs."""
    tile = tl.program_id(0)
    if partials.first_tile is not None:
        tile += partials.first_tile
    return tile


@triton.jit
def window_offsets(view, bounds, head, chunk_head, num_blocks):
    """Offsets [blocks + 1] by which windows are cut: of a head's entries, or of those of a chunk of query rows."""
    if bounds.starts is not None:
        result = bounds.starts + chunk_head.to(tl.int64) * (num_blocks + 1)
    else:
        result = view.offsets + head.to(tl.int64) * (num_blocks + 1)
    return result


@triton.jit
def tiles_in_window(bounds, chunk_head, block, begin, end, TILE_ENTRIES: tl.constexpr, BLOCK_COST: tl.constexpr):
    """The tiles of TILE_ENTRIES of a block's entries that begin in the window begin … end - 1.

    Returns:
        first_entry: first entry of the first such tile. stop_entry: tiles from this entry on are another window's.
        entry_end: one past the block's last entry.
    """
    index = chunk_head.to(tl.int64) * bounds.stride_h + block
    entry_begin = tl.load(bounds.begin + index)
    entry_end = tl.load(bounds.end + index)
    if bounds.starts is not None:
        # The window counts the chunk's entries only.
        others = entry_begin - tl.load(bounds.starts + index + chunk_head)
        begin += others
        end += others
    before = tl.maximum(begin - block * BLOCK_COST - entry_begin, 0)
    first_entry = entry_begin + tl.cdiv(before, TILE_ENTRIES) * TILE_ENTRIES
    return first_entry, tl.minimum(entry_end, end - block * BLOCK_COST), entry_end
