"""The by-block view of a routing: for each head and block, the queries that chose it, in ascending order.

A stable counting sort in three steps, with no atomics and no host:

1. Each tile of queries counts how often it chose each block.
2. Counts become places: exclusive sums over tiles within a block, then over blocks.
3. Each tile walks its queries in order, a few at a time, and puts each entry at its block's place, plus its rank among
   the equal ones of the same step; the block's place moves on by how many there were.

A tile's counts are one integer a block: tiles have at least as many queries as a row has blocks, so all counts together
are no larger than the routing's own block numbers. A program holds RANGE blocks' counts, other programs the other ranges.

Letters: see primitives.py; E entries (query, slot) of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.case import Case
from moba.backends.triton.primitives import num_global_blocks, query_places
from moba.backends.triton.tuning import arch_of, lookup
from moba.layout import Sequences

MIN_TILE_QUERIES = 256
# Blocks whose counts a program holds in registers and shared memory.
MAX_RANGE = 4096


@triton.jit
def _chosen_blocks(
    indices_ptr,
    row,
    head,
    queries,
    slots,
    num_queries,
    num_keys,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_sequences,
    blocks_per_row,
    block_size,
    topk,
    indices_stride_r,
    indices_stride_t,
    indices_stride_h,
):
    """Past blocks in the entries (queries, slots), [E]: numbers within the tensor row's blocks, -1 for none."""
    own, first_block = query_places(
        row, queries, num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences,
        blocks_per_row, block_size,
    )  # fmt: skip
    base = indices_ptr + row.to(tl.int64) * indices_stride_r + head * indices_stride_h
    is_entry = (own > 0) & (slots < topk - 1)
    index = tl.load(base + queries.to(tl.int64) * indices_stride_t + slots, mask=is_entry, other=-1)
    is_past = (index >= 0) & (index < own)
    return tl.where(is_past, first_block - row * blocks_per_row + index, -1)


@triton.jit
def _count_kernel(
    indices_ptr,
    counts_ptr,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_queries,
    num_keys,
    num_sequences,
    blocks_per_row,
    block_size,
    topk,
    num_rows,
    num_tiles,
    num_row_blocks,
    indices_stride_r,
    indices_stride_t,
    indices_stride_h,
    TILE_QUERIES,
    RANGE: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (tile of a row, head, range of blocks): counts[head, row, tile, block]."""
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    low = tl.program_id(2) * RANGE
    entry = tl.arange(0, STEP)
    counts = tl.zeros([RANGE], tl.int32)
    end = tl.minimum((tile + 1) * TILE_QUERIES, num_queries)
    for start in range(tile * TILE_QUERIES, end, STEP // SLOTS):
        block = _chosen_blocks(
            indices_ptr, row, head, start + entry // SLOTS, entry % SLOTS, num_queries, num_keys, key_start_ptr,
            key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, blocks_per_row, block_size, topk,
            indices_stride_r, indices_stride_t, indices_stride_h,
        )  # fmt: skip
        is_here = (block >= low) & (block < low + RANGE) & (start + entry // SLOTS < end)
        counts += tl.histogram(tl.where(is_here, block - low, 0), RANGE, mask=is_here)
    blocks = low + tl.arange(0, RANGE)
    base = counts_ptr + ((head * num_rows + row).to(tl.int64) * num_tiles + tile) * num_row_blocks
    tl.store(base + blocks, counts, mask=blocks < num_row_blocks)


@triton.jit
def _scan_tiles_kernel(counts_ptr, totals_ptr, num_tiles, num_row_blocks, TILE_N: tl.constexpr, STEP: tl.constexpr):
    """Program (head and row, TILE_N blocks): counts become sums over the tiles before; totals get the sum of all."""
    blocks = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    mask = blocks < num_row_blocks
    base = counts_ptr + tl.program_id(0).to(tl.int64) * num_tiles * num_row_blocks
    total = tl.zeros([TILE_N], tl.int32)
    for start in range(0, num_tiles, STEP):
        tiles = start + tl.arange(0, STEP)
        pointers = base + tiles.to(tl.int64)[:, None] * num_row_blocks + blocks[None, :]
        tile_mask = (tiles < num_tiles)[:, None] & mask[None, :]
        counts = tl.load(pointers, mask=tile_mask, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=tile_mask)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + tl.program_id(0).to(tl.int64) * num_row_blocks + blocks, total, mask=mask)


@triton.jit
def _place_kernel(
    indices_ptr,
    counts_ptr,
    offsets_ptr,
    entries_ptr,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_queries,
    num_keys,
    num_sequences,
    blocks_per_row,
    block_size,
    topk,
    num_rows,
    num_tiles,
    num_row_blocks,
    max_entries,
    indices_stride_r,
    indices_stride_t,
    indices_stride_h,
    TILE_QUERIES,
    RANGE: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (tile of a row, head, range of blocks): every entry to its place."""
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    low = tl.program_id(2) * RANGE
    blocks = low + tl.arange(0, RANGE)
    mask = blocks < num_row_blocks
    base = counts_ptr + ((head * num_rows + row).to(tl.int64) * num_tiles + tile) * num_row_blocks
    offsets_base = offsets_ptr + head.to(tl.int64) * (num_rows * num_row_blocks + 1) + row * num_row_blocks
    places = tl.load(base + blocks, mask=mask, other=0) + tl.load(offsets_base + blocks, mask=mask, other=0)
    entry = tl.arange(0, STEP)
    is_earlier = entry[None, :] < entry[:, None]
    end = tl.minimum((tile + 1) * TILE_QUERIES, num_queries)
    for start in range(tile * TILE_QUERIES, end, STEP // SLOTS):
        queries = start + entry // SLOTS
        block = _chosen_blocks(
            indices_ptr, row, head, queries, entry % SLOTS, num_queries, num_keys, key_start_ptr,
            key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, blocks_per_row, block_size, topk,
            indices_stride_r, indices_stride_t, indices_stride_h,
        )  # fmt: skip
        is_here = (block >= low) & (block < low + RANGE) & (queries < end)
        local = tl.where(is_here, block - low, -1)
        rank = tl.sum(((local[:, None] == local[None, :]) & is_earlier).to(tl.int32), axis=1)
        local = tl.maximum(local, 0)
        place = tl.gather(places, local, axis=0) + rank
        value = (row * num_queries + queries) * topk + entry % SLOTS
        tl.store(entries_ptr + head.to(tl.int64) * max_entries + place, value, mask=is_here)
        places += tl.histogram(local, RANGE, mask=is_here)


def group_by_block(indices: Tensor, sequences: Sequences, block_size: int) -> tuple[Tensor, Tensor]:
    """For each head and global block, the queries that chose it as a past block, in ascending order.

    Args:
        indices: int32 [R, T, H, K], the routing, any strides with a contiguous last dimension (a slice of heads, say).
            A row ascends, so past blocks stand in its first K - 1 slots; of these, numbers outside 0 … own block - 1
            are left out. No query names a block twice.

    Returns:
        offsets: int32 [H, num_global_blocks + 1]; block j's entries of head h are offsets[h, j] … offsets[h, j + 1] - 1.
        entries: int32 [H, R · T · (K - 1)], each query_row · K + slot, with query_row = r · T + t and `slot` the place
            in the row of `indices`; undefined from offsets[h, -1] on.

    Raises:
        ValueError: if R · T · K does not fit int32.
    """
    num_rows, num_queries, _, topk = indices.shape
    if num_rows * num_queries * topk >= 2**31:
        raise ValueError(f"query rows · topk must be below 2^31, got {num_rows} · {num_queries} · {topk}")
    return _group(indices, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k,
                  sequences.num_keys, block_size)  # fmt: skip


def _group(
    indices: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    num_keys: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    num_rows, num_queries, num_heads, topk = indices.shape
    sequences = Sequences(num_rows, num_queries, num_keys, key_start, key_end, cu_q, cu_k)
    num_blocks = num_global_blocks(sequences, block_size)
    offsets = indices.new_zeros(num_heads, num_blocks + 1)
    entries = indices.new_empty(num_heads, num_rows * num_queries * (topk - 1))
    if entries.numel() == 0 or num_blocks == 0 or (cu_q is not None and cu_q.numel() == 1):
        return offsets, entries
    arguments = group_arguments(indices, entries, sequences, block_size, arch_of(indices.device))
    num_tiles, num_row_blocks = arguments["num_tiles"], arguments["num_row_blocks"]
    counts = indices.new_empty(num_heads, num_rows, num_tiles, num_row_blocks)
    totals = indices.new_empty(num_heads, num_blocks)
    grid = (num_rows * num_tiles, num_heads, triton.cdiv(num_row_blocks, arguments["RANGE"]))
    shared = {name: value for name, value in arguments.items() if name not in ("entries_ptr", "max_entries")}
    _count_kernel[grid](counts_ptr=counts, **shared)
    scan_grid = (num_heads * num_rows, triton.cdiv(num_row_blocks, SCAN_TILE["TILE_N"]))
    _scan_tiles_kernel[scan_grid](counts, totals, num_tiles, num_row_blocks, **SCAN_TILE)
    torch.cumsum(totals, dim=1, dtype=torch.int32, out=offsets[:, 1:])
    _place_kernel[grid](counts_ptr=counts, offsets_ptr=offsets, **arguments)
    return offsets, entries


SCAN_TILE = {"TILE_N": 64, "STEP": 32, "num_warps": 4}


def group_arguments(
    indices: Tensor, entries: Tensor, sequences: Sequences, block_size: int, arch: int
) -> dict[str, Any]:
    """Arguments that the count and place kernels share."""
    num_rows, num_queries, _, topk = indices.shape
    num_row_blocks = num_global_blocks(sequences, block_size) // num_rows
    tile_queries = max(MIN_TILE_QUERIES, triton.next_power_of_2(num_row_blocks))
    slots = triton.next_power_of_2(max(1, topk - 1))
    config = dict(lookup("by_block", arch, head_dim=16, block_size=block_size, element_bytes=4))
    config["STEP"] = max(config["STEP"], slots)
    return {
        "indices_ptr": indices,
        "entries_ptr": entries,
        "key_start_ptr": sequences.key_start,
        "key_end_ptr": sequences.key_end,
        "cu_q_ptr": sequences.cu_q,
        "cu_k_ptr": sequences.cu_k,
        "num_queries": num_queries,
        "num_keys": sequences.num_keys,
        "num_sequences": 0 if sequences.cu_q is None else sequences.cu_q.numel() - 1,
        "blocks_per_row": sequences.num_blocks(block_size),
        "block_size": block_size,
        "topk": topk,
        "num_rows": num_rows,
        "num_tiles": triton.cdiv(num_queries, tile_queries),
        "num_row_blocks": num_row_blocks,
        "max_entries": entries.shape[1],
        "indices_stride_r": indices.stride(0),
        "indices_stride_t": indices.stride(1),
        "indices_stride_h": indices.stride(2),
        "TILE_QUERIES": tile_queries,
        "RANGE": min(MAX_RANGE, max(32, triton.next_power_of_2(num_row_blocks))),
        "SLOTS": slots,
        **config,
    }


def aot_cases(arch: int) -> Iterator[Case]:
    """Counting, scanning and placing for few and many blocks."""
    counts = torch.empty(1, dtype=torch.int32, device="meta")
    yield Case("by_block scan", _scan_tiles_kernel, dict(counts_ptr=counts, totals_ptr=counts, num_tiles=128,
               num_row_blocks=1024, **SCAN_TILE), representative=True)  # fmt: skip
    for topk in (3, 8, 16, 200):
        for block_size in (32, 128, 2048):
            for packed in (False, True):
                indices = torch.empty(1, 131072, 16, topk, dtype=torch.int32, device="meta")
                cu = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
                sequences = Sequences(1, 131072, 131072, cu_q=cu, cu_k=cu)
                arguments = group_arguments(indices, indices[0], sequences, block_size, arch)
                name = f"topk={topk} block={block_size} {'packed' if packed else 'plain'}"
                representative = (topk, block_size, packed) == (8, 128, True)
                shared = {key: value for key, value in arguments.items() if key not in ("entries_ptr", "max_entries")}
                yield Case(f"by_block count {name}", _count_kernel, {"counts_ptr": counts, **shared})
                yield Case(
                    f"by_block place {name}",
                    _place_kernel,
                    {"counts_ptr": counts, "offsets_ptr": counts, **arguments},
                    representative,
                )
