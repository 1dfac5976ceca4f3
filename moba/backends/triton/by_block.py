"""The by-block view of a routing: for each head and block, the queries that chose it, in ascending order.

A stable counting sort in three steps, without the host:

1. Each tile of queries counts how often it chose each block.
2. Counts become places: exclusive sums over tiles within a block, then over blocks.
3. Each tile walks its queries in order, E entries (query, slot) a step. A step's entries are sorted by block in
   registers; the first of a block's run takes as many places of its block as the run is long, the others follow it.

Atomics only add integers, and one program takes a tile's places in order, so nothing depends on timing. A tile has
at least as many queries as a row has blocks, so all counts together are no larger than the routing's block numbers.

Letters: see primitives.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.case import Case
from moba.backends.triton.launch import Plan, cdiv, make_plan, next_power_of_2, run_planned
from moba.backends.triton.primitives import bounds_of, num_global_blocks, query_places
from moba.backends.triton.tuning import arch_of, lookup
from moba.layout import Sequences

MIN_TILE_QUERIES = 256
SUM_CONFIG = {"TILE_N": 64, "STEP": 32, "num_warps": 4}
OFFSETS_CONFIG = {"TILE": 2048, "num_warps": 8}


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
    base = indices_ptr + row.to(tl.int64) * indices_stride_r + head.to(tl.int64) * indices_stride_h
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
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (step of a row, head): adds to the zeroed counts[head, row, tile, block]."""
    steps_per_row = tl.cdiv(num_queries, STEP // SLOTS)
    row = tl.program_id(0) // steps_per_row
    head = tl.program_id(1)
    entry = tl.arange(0, STEP)
    queries = tl.program_id(0) % steps_per_row * (STEP // SLOTS) + entry // SLOTS
    block = _chosen_blocks(
        indices_ptr, row, head, queries, entry % SLOTS, num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr,
        cu_k_ptr, num_sequences, blocks_per_row, block_size, topk, indices_stride_r, indices_stride_t,
        indices_stride_h,
    )  # fmt: skip
    tile = (head * num_rows + row).to(tl.int64) * num_tiles + queries // TILE_QUERIES
    tl.atomic_add(counts_ptr + tile * num_row_blocks + block, 1, mask=block >= 0, sem="relaxed")


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
def _place_kernel(
    indices_ptr,
    places_ptr,
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
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    KEY: tl.constexpr,
):
    """Program (tile of a row, head): every entry to its place; places[head, row, tile, block] move past them."""
    row = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    places_base = places_ptr + ((head * num_rows + row).to(tl.int64) * num_tiles + tile) * num_row_blocks
    offsets_base = offsets_ptr + head.to(tl.int64) * (num_rows * num_row_blocks + 1) + row * num_row_blocks
    entry = tl.arange(0, STEP)
    end = tl.minimum((tile + 1) * TILE_QUERIES, num_queries)
    for start in range(tile * TILE_QUERIES, end, STEP // SLOTS):
        queries = start + entry // SLOTS
        block = _chosen_blocks(
            indices_ptr, row, head, queries, entry % SLOTS, num_queries, num_keys, key_start_ptr, key_end_ptr,
            cu_q_ptr, cu_k_ptr, num_sequences, blocks_per_row, block_size, topk, indices_stride_r, indices_stride_t,
            indices_stride_h,
        )  # fmt: skip
        is_entry = (block >= 0) & (queries < end)
        key = tl.sort(tl.where(is_entry, block, num_row_blocks).to(KEY) * STEP + entry)
        block = (key // STEP).to(tl.int32)
        entry_of_key = (key % STEP).to(tl.int32)
        ones = tl.full([STEP], 1, tl.int32)
        _, number = tl.associative_scan((block, ones), 0, _run_length)
        _, number_left = tl.associative_scan((block, ones), 0, _run_length, reverse=True)
        is_entry = block < num_row_blocks
        is_first = is_entry & (number == 1)
        length = number + number_left - 1
        place = tl.atomic_add(places_base + block, length, mask=is_first, sem="relaxed")
        place += tl.load(offsets_base + block, mask=is_first, other=0)
        place = tl.gather(place, entry - number + 1, axis=0) + number - 1
        value = (row * num_queries + start + entry_of_key // SLOTS) * topk + entry_of_key % SLOTS
        tl.store(entries_ptr + head.to(tl.int64) * max_entries + place, value, mask=is_entry)


def group_by_block(indices: Tensor, sequences: Sequences, block_size: int) -> tuple[Tensor, Tensor]:
    """For each head and global block, the queries that chose it as a past block, in ascending order.

    Args:
        indices: int32 [R, T, H, K], the routing, any strides with a contiguous last dimension (a slice of heads, say).
            A row ascends, so past blocks stand in its first K - 1 slots; of these, numbers outside 0 … own block - 1
            are left out. No query names a block twice.

    Returns:
        offsets: int32 [H, num_global_blocks + 1]; head h's entries of block j are offsets[h, j] … offsets[h, j+1] - 1.
        entries: int32 [H, R · T · (K - 1)], each query_row · K + slot, with query_row = r · T + t and `slot` the place
            in the row of `indices`; undefined from offsets[h, -1] on.

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
    arguments = group_arguments(indices, sequences, block_size)
    num_tiles, num_row_blocks = arguments["num_tiles"], arguments["num_row_blocks"]
    count_config, place_config = group_configs(num_queries, topk, num_row_blocks, arch)
    counts = plan.buffer(num_heads, num_rows, num_tiles, num_row_blocks, dtype=torch.int32)
    totals = plan.buffer(num_heads, num_blocks, dtype=torch.int32)
    plan.zero(counts)
    steps_per_row = cdiv(num_queries, count_config["STEP"] // count_config["SLOTS"])
    plan.launch(_count_kernel, (num_rows * steps_per_row, num_heads), counts_ptr=counts, **arguments, **count_config)
    sum_grid = (num_heads * num_rows, cdiv(num_row_blocks, SUM_CONFIG["TILE_N"]))
    plan.launch(_sum_tiles_kernel, sum_grid, counts, totals, num_tiles, num_row_blocks, **SUM_CONFIG)
    plan.launch(_offsets_kernel, (num_heads,), totals, offsets, num_blocks, **OFFSETS_CONFIG)
    plan.launch(
        _place_kernel,
        (num_rows * num_tiles, num_heads),
        places_ptr=counts,
        offsets_ptr=offsets,
        entries_ptr=entries,
        max_entries=entries.shape[1],
        **arguments,
        **place_config,
    )


def group_arguments(indices: Tensor, sequences: Sequences, block_size: int) -> dict[str, Any]:
    """Arguments that the count and place kernels share."""
    num_rows, num_queries, _, topk = indices.shape
    num_row_blocks = num_global_blocks(sequences, block_size) // num_rows
    tile_queries = max(MIN_TILE_QUERIES, next_power_of_2(num_row_blocks))
    return {
        "indices_ptr": indices,
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
        "num_tiles": cdiv(num_queries, tile_queries),
        "num_row_blocks": num_row_blocks,
        "indices_stride_r": indices.stride(0),
        "indices_stride_t": indices.stride(1),
        "indices_stride_h": indices.stride(2),
        "TILE_QUERIES": tile_queries,
    }


def group_configs(num_queries: int, topk: int, num_row_blocks: int, arch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments of the count and place kernels."""
    slots = next_power_of_2(max(1, topk - 1))
    row_entries = next_power_of_2(num_queries * slots)

    def config(kernel: str) -> dict[str, Any]:
        row = dict(lookup(kernel, arch, head_dim=16, block_size=1, element_bytes=4))
        return {**row, "SLOTS": slots, "STEP": min(row_entries, max(slots, row["STEP"]))}

    place = config("place_entries")
    # A key holds a block and an entry of the step.
    place["KEY"] = tl.int32 if (num_row_blocks + 1) * place["STEP"] < 2**31 else tl.int64
    return config("count_entries"), place


def aot_cases(arch: int) -> Iterator[Case]:
    """Counting, summing and placing for short and long rows of the routing."""
    for topk in (3, 8, 16, 200):
        for kind in ("plain", "packed"):
            indices = torch.empty(1, 131072, 16, topk, dtype=torch.int32, device="meta")
            cu = torch.empty(5, dtype=torch.int32, device="meta") if kind == "packed" else None
            view = new_view(indices, Sequences(1, 131072, 131072, cu_q=cu, cu_k=cu), 128)
            options = {"num_keys": 131072, "block_size": 128, "arch": arch}
            plan = make_plan(_plan, indices, *view, None, None, cu, cu, **options)
            is_common = kind == "packed" and topk == 8 and arch in (86, 90)
            for kernel, arguments in plan.launches():
                yield Case(f"by_block {kernel.__name__} topk={topk} {kind}", kernel, arguments, is_common)
