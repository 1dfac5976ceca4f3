"""The by-block view of a routing: for each head and block, the queries that chose it, in ascending order.

A stable counting sort in three steps, without the host:

1. Each tile of queries counts how often it chose each block.
2. Counts become offsets: exclusive sums over tiles within a block, then over blocks.
3. Each tile walks its queries in order, E entries (query, slot) a step. A step's entries are sorted by block in
   registers; the first of a block's run takes as many positions of its block as the run is long, the others follow it.

Atomics only add integers, and one program takes a tile's positions in order, so nothing depends on timing. A tile has
at least as many queries as a row has blocks, so all counts together are no larger than the routing's block numbers.

Letters: see device.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import bounds_of, layout_of, locate_queries, num_global_blocks, rows_of, view_of
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2, run_planned
from moba.backends.triton.tuning import arch_of, lookup
from moba.sequences import Sequences

MIN_TILE_QUERIES = 256
SUM_CONFIG = {"TILE_N": 64, "STEP": 32, "num_warps": 4}
OFFSETS_CONFIG = {"TILE": 2048, "num_warps": 8}


class Tiles(NamedTuple):
    """How a tensor row's queries are cut: queries of a tile, tensor rows, tiles and block numbers of each."""

    num_queries: Any
    num_rows: Any
    num_tiles: Any
    num_blocks: Any


@triton.jit
def _chosen_blocks(indices, row, head, queries, slots, layout, block_size, topk):
    """Past blocks in the entries (queries, slots), [E]: numbers within the tensor row's blocks, -1 for none."""
    own, first_block = locate_queries(row, queries, layout, block_size)
    base = indices.ptr + row.to(tl.int64) * indices.stride_r + head.to(tl.int64) * indices.stride_h
    is_entry = (own > 0) & (slots < topk - 1)
    index = tl.load(base + queries.to(tl.int64) * indices.stride_t + slots, mask=is_entry, other=-1)
    is_past = (index >= 0) & (index < own)
    return tl.where(is_past, first_block - row * layout.blocks_per_row + index, -1)


@triton.jit
def _count_kernel(indices, counts_ptr, layout, tiles, block_size, topk, SLOTS: tl.constexpr, STEP: tl.constexpr):
    """Program (step of a row, head): adds to the zeroed counts[head, row, tile, block]."""
    steps_per_row = tl.cdiv(layout.num_queries, STEP // SLOTS)
    row = tl.program_id(0) // steps_per_row
    head = tl.program_id(1)
    entry = tl.arange(0, STEP)
    queries = tl.program_id(0) % steps_per_row * (STEP // SLOTS) + entry // SLOTS
    block = _chosen_blocks(indices, row, head, queries, entry % SLOTS, layout, block_size, topk)
    tile = (head * tiles.num_rows + row).to(tl.int64) * tiles.num_tiles + queries // tiles.num_queries
    tl.atomic_add(counts_ptr + tile * tiles.num_blocks + block, 1, mask=block >= 0, sem="relaxed")


@triton.jit
def _sum_tiles_kernel(counts_ptr, totals_ptr, num_tiles, num_row_blocks, TILE_N: tl.constexpr, STEP: tl.constexpr):
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
def _offsets_kernel(totals_ptr, offsets_ptr, num_blocks, TILE: tl.constexpr):
    """Program (head): offsets [blocks + 1] of a head's totals [blocks], the sums over the blocks before."""
    head = tl.program_id(0).to(tl.int64)
    totals_ptr += head * num_blocks
    offsets_ptr += head * (num_blocks + 1)
    before = 0
    for start in range(0, num_blocks, TILE):
        blocks = start + tl.arange(0, TILE)
        totals = tl.load(totals_ptr + blocks, mask=blocks < num_blocks, other=0)
        tl.store(offsets_ptr + blocks, before + tl.cumsum(totals, axis=0) - totals, mask=blocks < num_blocks)
        before += tl.sum(totals, axis=0)
    tl.store(offsets_ptr + num_blocks, before)


@triton.jit
def _run_length(last_a, count_a, last_b, count_b):
    """Length of the run that ends in b, from that of a before it."""
    return last_b, tl.where(last_a == last_b, count_a + count_b, count_b)


@triton.jit
def _scatter_kernel(
    indices, next_ptr, view, layout, tiles, block_size, topk,
    SLOTS: tl.constexpr, STEP: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """Program (tile of a row, head): scatter its entries; next[head, row, tile, block] moves past them."""
    row = tl.program_id(0) // tiles.num_tiles
    tile = tl.program_id(0) % tiles.num_tiles
    head = tl.program_id(1)
    next_base = next_ptr + ((head * tiles.num_rows + row).to(tl.int64) * tiles.num_tiles + tile) * tiles.num_blocks
    offsets_base = view.offsets + head.to(tl.int64) * (layout.num_blocks + 1) + row * tiles.num_blocks
    entries_base = view.entries + head.to(tl.int64) * view.num_entries
    entry = tl.arange(0, STEP)
    end = tl.minimum((tile + 1) * tiles.num_queries, layout.num_queries)
    for start in range(tile * tiles.num_queries, end, STEP // SLOTS):
        queries = start + entry // SLOTS
        block = _chosen_blocks(indices, row, head, queries, entry % SLOTS, layout, block_size, topk)
        is_entry = (block >= 0) & (queries < end)
        key = tl.sort(tl.where(is_entry, block, tiles.num_blocks).to(KEY) * STEP + entry)
        block = (key // STEP).to(tl.int32)
        entry_of_key = (key % STEP).to(tl.int32)
        ones = tl.full([STEP], 1, tl.int32)
        _, number = tl.associative_scan((block, ones), 0, _run_length)
        _, number_left = tl.associative_scan((block, ones), 0, _run_length, reverse=True)
        is_entry = block < tiles.num_blocks
        is_first = is_entry & (number == 1)
        length = number + number_left - 1
        position = tl.atomic_add(next_base + block, length, mask=is_first, sem="relaxed")
        position += tl.load(offsets_base + block, mask=is_first, other=0)
        position = tl.gather(position, entry - number + 1, axis=0) + number - 1
        value = (row * layout.num_queries + start + entry_of_key // SLOTS) * topk + entry_of_key % SLOTS
        tl.store(entries_base + position, value, mask=is_entry)


def group_by_block(indices: Tensor, sequences: Sequences, block_size: int) -> tuple[Tensor, Tensor]:
    """For each head and global block, the queries that chose it as a past block, in ascending order.

    Args:
        indices: int32 [R, T, H, K], the routing, any strides with a contiguous last dimension (a slice of heads, say).
            A row ascends, so past blocks stand in its first K - 1 slots; of these, numbers outside 0 … own block - 1
            are left out. No query names a block twice.

    Returns:
        offsets: int32 [H, num_global_blocks + 1]; head h's entries of block j are offsets[h, j] … offsets[h, j+1] - 1.
        entries: int32 [H, R · T · (K - 1)], each query_row · K + slot, with query_row = r · T + t and `slot` its
            index in the row of `indices`; undefined from offsets[h, -1] on.

    Raises:
        ValueError: if R · T · K does not fit int32.
    """
    offsets, entries = new_view(indices, sequences, block_size)
    run_planned(
        _plan, indices, offsets, entries, *bounds_of(sequences), device=indices.device, num_keys=sequences.num_keys,
        block_size=block_size, arch=arch_of(indices.device),
    )  # fmt: skip
    return offsets, entries


def new_view(indices: Tensor, sequences: Sequences, block_size: int) -> tuple[Tensor, Tensor]:
    """Memory for the offsets and entries of `group_by_block`; raises as it does."""
    num_rows, num_queries, num_heads, topk = indices.shape
    if num_rows * num_queries * topk >= 2**31:
        raise ValueError(f"query rows · topk must be below 2^31, got {num_rows} · {num_queries} · {topk}")
    offsets = indices.new_empty(num_heads, num_global_blocks(sequences, block_size) + 1)
    return offsets, indices.new_empty(num_heads, num_rows * num_queries * (topk - 1))


def _plan(
    plan: Plan, indices: Tensor, offsets: Tensor, entries: Tensor, *bounds: Tensor | None,
    num_keys: int, block_size: int, arch: int,
) -> None:  # fmt: skip
    sequences = Sequences(indices.shape[0], indices.shape[1], num_keys, *bounds)
    plan_group_by_block(plan, indices, offsets, entries, sequences, block_size, arch)


def plan_group_by_block(
    plan: Plan, indices: Tensor, offsets: Tensor, entries: Tensor, sequences: Sequences, block_size: int, arch: int
) -> None:
    """`group_by_block` as steps of a plan."""
    num_rows, num_queries, num_heads, topk = indices.shape
    num_blocks = offsets.shape[1] - 1
    if entries.numel() == 0 or num_blocks == 0 or (sequences.cu_q is not None and sequences.cu_q.numel() == 1):
        plan.zero(offsets)
        return
    num_row_blocks = num_blocks // num_rows
    tile_queries = max(MIN_TILE_QUERIES, next_power_of_2(num_row_blocks))
    tiles = Tiles(tile_queries, num_rows, cdiv(num_queries, tile_queries), num_row_blocks)
    layout, shape = layout_of(sequences, block_size), (tiles, block_size, topk)
    count, scatter = group_configs(topk, num_row_blocks, arch)
    counts = plan.buffer(num_heads, num_rows, tiles.num_tiles, num_row_blocks, dtype=torch.int32)
    totals = plan.buffer(num_heads, num_blocks, dtype=torch.int32)
    plan.zero(counts)
    steps_per_row = cdiv(num_queries, count["STEP"] // count["SLOTS"])
    plan.launch(_count_kernel, (num_rows * steps_per_row, num_heads), rows_of(indices), counts, layout, *shape, **count)
    sum_grid = (num_heads * num_rows, cdiv(num_row_blocks, SUM_CONFIG["TILE_N"]))
    plan.launch(_sum_tiles_kernel, sum_grid, counts, totals, tiles.num_tiles, num_row_blocks, **SUM_CONFIG)
    plan.launch(_offsets_kernel, (num_heads,), totals, offsets, num_blocks, **OFFSETS_CONFIG)
    plan.launch(
        _scatter_kernel, (num_rows * tiles.num_tiles, num_heads),
        rows_of(indices), counts, view_of(offsets, entries), layout, *shape, **scatter,
    )  # fmt: skip


def group_configs(topk: int, num_row_blocks: int, arch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments of the count and scatter kernels."""
    slots = next_power_of_2(max(1, topk - 1))

    def config(kernel: str) -> dict[str, Any]:
        row = dict(lookup(kernel, arch, head_dim=16, block_size=1, element_bytes=4))
        return {**row, "SLOTS": slots, "STEP": max(slots, row["STEP"])}

    scatter = config("scatter_entries")
    # A key holds a block and an entry of the step.
    scatter["KEY"] = tl.int32 if (num_row_blocks + 1) * scatter["STEP"] < 2**31 else tl.int64
    return config("count_entries"), scatter
