"""Forward of attention over a routing: past blocks by gathered queries, then their merge, which own blocks continue.

Letters and words as in device.py. A *partial* is the attention of one query to one past block: its normalised output
and its log2-sum-exp. Logits are kept in log2.

An *entry* is one query that chose one past block; the by-block view (`View`, device.py) lists them block by block. An
entry costs 1, and a block, whose keys are to be loaded, BLOCK_COST more: block j begins at offsets[j] + j · BLOCK_COST.
Windows of equal cost balance the work without knowing the routing: a program takes the tiles of queries that begin in
its window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import (
    LN_2,
    LOWEST_LOGIT,
    View,
    holds_past_block,
    last_at_most,
    layout_of,
    load_keys,
    load_rows,
    locate_blocks,
    num_query_tiles,
    online_softmax,
    own_key_range,
    own_keys_visible,
    padded_head_dim,
    past_slots,
    query_tile_span,
    rows_of,
    store_rows,
)
from moba.backends.triton.entries import (
    chunk_tile,
    load_entries,
    load_query_rows,
    member_offsets,
    packed_rows,
    tile_queries,
    tiles_in_window,
    window_offsets,
)
from moba.backends.triton.launch import Plan, next_power_of_2
from moba.backends.triton.logits import logit_scaling, scaled
from moba.backends.triton.workspace import (
    chunk_query_tiles,
    chunks_with_bounds,
    keeps_keys,
    keys_of,
    own_keys_of,
    tile_sizes,
    uniform_stride,
    windows,
)
from moba.sequences import Sequences


class Partials(NamedTuple):
    """A chunk's partials, [heads, K - 1, query rows, PACKED, Dv], and which heads and query rows these are.

    `first_tile`: the first tile of queries that has some of these rows; None if all tiles are tried.
    """

    ptr: Any
    lse_ptr: Any
    first_head: Any
    row_begin: Any
    num_rows: Any
    first_tile: Any


@triton.jit
def store_partials(partials, chunk_head, query_rows, slots, mask, outputs, lse, TOPK: tl.constexpr,
                   VALUE_DIM: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Partials of one tile of entries, of a head of the chunk."""
    partial_row = (chunk_head.to(tl.int64) * (TOPK - 1) + slots) * partials.num_rows + (query_rows - partials.row_begin)
    partial_row = packed_rows(partial_row, PACKED)
    store_rows(partials.ptr, partial_row * VALUE_DIM, outputs, mask, VALUE_DIM, True)
    tl.store(partials.lse_ptr + partial_row, lse, mask=mask)


@triton.jit
def _attend_past_kernel(
    q, k, v, k_matrix, v_matrix, view, bounds, partials, scaling, layout,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr, BLOCK_COST: tl.constexpr,
    NUM_STAGES: tl.constexpr, KEEPS_KEYS: tl.constexpr, UNIFORM_STRIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Partials of past blocks: a program takes the tiles of queries that begin in its window.

    With KEEPS_KEYS a block's K and V stay on chip while its queries stream past, TILE_N >= BLOCK_SIZE. Otherwise a tile
    of queries stays on chip while the block's K and V stream past.
    """
    PADDED_VALUE_DIM: tl.constexpr = padded_head_dim(VALUE_DIM)
    QUERY_STAGES: tl.constexpr = NUM_STAGES if KEEPS_KEYS else 1
    TILE_ENTRIES: tl.constexpr = TILE_M // PACKED
    chunk_head = tl.program_id(1)
    head = chunk_head + partials.first_head
    kv_head = head // GROUP
    offsets_ptr = window_offsets(view, bounds, head, chunk_head, layout.num_blocks)
    entries_ptr = view.entries + head.to(tl.int64) * view.num_entries

    # The window, and the block that it begins in.
    begin = tl.program_id(0) * WINDOW
    end = begin + WINDOW
    block = last_at_most(offsets_ptr, layout.num_blocks, begin, 1, BLOCK_COST)
    while (block < layout.num_blocks) & (tl.load(offsets_ptr + block) + block * BLOCK_COST < end):
        first_entry, stop_entry, entry_end = tiles_in_window(
            bounds, chunk_head, block, begin, end, TILE_ENTRIES, BLOCK_COST
        )
        # A block that nobody chose is not read: it may be a short one, with nothing behind its keys.
        if first_entry < stop_entry:
            row, _, first_key, _, _ = locate_blocks(block, layout, BLOCK_SIZE)
            # 1. The block's keys and values, if they stay on chip.
            if KEEPS_KEYS:
                keys = tl.arange(0, TILE_N)
                is_key = keys < BLOCK_SIZE
                k_tile = load_keys(k, k_matrix, row, kv_head, first_key, is_key, HEAD_DIM, TILE_N)
                v_tile = load_keys(v, v_matrix, row, kv_head, first_key, is_key, VALUE_DIM, TILE_N)
            for tile_entry in tl.range(first_entry, stop_entry, TILE_ENTRIES, num_stages=QUERY_STAGES):
                # 2. The queries that chose the block, and the slot of `indices` in which each has it.
                query_rows, slots, mask = load_entries(entries_ptr, tile_entry, entry_end, TOPK, TILE_M, PACKED)
                q_tile = load_query_rows(
                    q, head, query_rows, layout.num_queries, mask, HEAD_DIM, UNIFORM_STRIDE, PACKED
                )
                # 3. The softmax over this block alone. A past block is whole, and all its keys lie in the past, so
                # nothing but its size masks.
                if KEEPS_KEYS:
                    logits = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scaling)
                    if BLOCK_SIZE != TILE_N:
                        logits = tl.where(is_key[None, :], logits, float("-inf"))
                    maximum = tl.max(logits, 1)
                    weights = tl.exp2(logits - maximum[:, None])
                    total = tl.sum(weights, 1)
                    acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
                else:
                    maximum = tl.full([TILE_M], LOWEST_LOGIT, tl.float32)
                    total = tl.zeros([TILE_M], tl.float32)
                    acc = tl.zeros([TILE_M, PADDED_VALUE_DIM], tl.float32)
                    for start in tl.range(0, BLOCK_SIZE, TILE_N, num_stages=NUM_STAGES):
                        keys = start + tl.arange(0, TILE_N)
                        is_key = keys < BLOCK_SIZE
                        k_tile = load_keys(k, k_matrix, row, kv_head, first_key + start, is_key, HEAD_DIM, TILE_N)
                        v_tile = load_keys(v, v_matrix, row, kv_head, first_key + start, is_key, VALUE_DIM, TILE_N)
                        logits = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scaling)
                        if BLOCK_SIZE % TILE_N != 0:
                            logits = tl.where(is_key[None, :], logits, float("-inf"))
                        maximum, total, acc = online_softmax(logits, v_tile, maximum, total, acc)
                # 4. Its result and log-sum-exp (base 2), where `_merge_and_attend_own_kernel` reads them.
                outputs = acc * (1.0 / total)[:, None]
                lse = maximum + tl.log2(total)
                store_partials(
                    partials, chunk_head, query_rows, slots, mask, outputs, lse, TOPK, VALUE_DIM, PACKED
                )  # fmt: skip
        block += 1


@triton.jit
def _merge_and_attend_own_kernel(
    q, k, v, k_matrix, v_matrix, indices, partials, out_ptr, lse_ptr, scaling, num_heads, layout, tiles_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_STAGES: tl.constexpr, MERGE_STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries: merge their past blocks' partials, then attend causally to their own blocks."""
    PADDED_VALUE_DIM: tl.constexpr = padded_head_dim(VALUE_DIM)
    TILE_QUERIES: tl.constexpr = TILE_M // PACKED
    chunk_head = tl.program_id(1)
    kv_head = (chunk_head + partials.first_head) // GROUP
    head = (chunk_head + partials.first_head).to(tl.int64)
    # 1. The tile's queries: where they lie, and which of them this chunk of heads and rows writes.
    row, first_query, query_begin, query_end, offset, sequence_start = query_tile_span(
        chunk_tile(partials), layout, tiles_per_row, TILE_QUERIES
    )
    query = first_query + tile_queries(TILE_M, PACKED)
    query_row = row * layout.num_queries + query
    chunk_row = query_row.to(tl.int64) - partials.row_begin
    writes = (query >= query_begin) & (query < query_end) & (chunk_row >= 0) & (chunk_row < partials.num_rows)
    position = query + offset
    is_real = writes & (position >= 0)

    long_row = tl.full([], row, tl.int64)
    q_ptr = q.ptr + long_row * q.stride_r + head * PACKED * q.stride_h
    q_tile = load_rows(q_ptr, member_offsets(query.to(tl.int64) * q.stride_t, q.stride_h, PACKED), is_real, HEAD_DIM)

    # 2. Past blocks: the sum of their partials, each weighed by exp2(its log-sum-exp - the largest one). The largest is
    # found first, so that no sum of partials is rescaled.
    maximum = tl.full([TILE_M], LOWEST_LOGIT, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, PADDED_VALUE_DIM], tl.float32)
    if TOPK > 1:
        indices_ptr = indices.ptr + long_row * indices.stride_r + head * indices.stride_h
        bits = past_slots(indices_ptr, query, indices.stride_t, position, is_real, TOPK, BLOCK_SIZE)
        partial_row = chunk_row + chunk_head.to(tl.int64) * (TOPK - 1) * partials.num_rows
        partial_row = packed_rows(partial_row, PACKED)
        slot_rows = tl.full([], partials.num_rows, tl.int64) * PACKED
        for slot in tl.static_range(TOPK - 1):
            exists = holds_past_block(
                bits, indices_ptr, query, indices.stride_t, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            partial_lse = tl.load(partials.lse_ptr + partial_row + slot * slot_rows, mask=exists, other=LOWEST_LOGIT)
            maximum = tl.maximum(maximum, partial_lse)
        for slot in tl.range(0, TOPK - 1, num_stages=MERGE_STAGES):
            exists = holds_past_block(
                bits, indices_ptr, query, indices.stride_t, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            slot_row = partial_row + slot * slot_rows
            partial_lse = tl.load(partials.lse_ptr + slot_row, mask=exists, other=LOWEST_LOGIT)
            weight = tl.where(exists, tl.exp2(partial_lse - maximum), 0.0)
            total += weight
            acc += weight[:, None] * load_rows(partials.ptr, slot_row * VALUE_DIM, exists, VALUE_DIM).to(tl.float32)

    # 3. The own blocks, on top: from begin to middle keys that every query of the tile sees (none unless tiles divide
    # blocks); then those that a mask decides on, up to the last query's own position.
    all_keys = tl.full([TILE_N], True, tl.int1)
    begin, middle, end = own_key_range(position, is_real, first_query + offset, BLOCK_SIZE, TILE_QUERIES, TILE_N)
    for start in tl.range(begin, middle, TILE_N, num_stages=NUM_STAGES):
        k_tile = load_keys(k, k_matrix, row, kv_head, sequence_start + start, all_keys, HEAD_DIM, TILE_N)
        v_tile = load_keys(v, v_matrix, row, kv_head, sequence_start + start, all_keys, VALUE_DIM, TILE_N)
        logits = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scaling)
        maximum, total, acc = online_softmax(logits, v_tile, maximum, total, acc)
    for start in tl.range(middle, end, TILE_N, num_stages=NUM_STAGES):
        key = start + tl.arange(0, TILE_N)
        k_tile = load_keys(k, k_matrix, row, kv_head, sequence_start + start, key < end, HEAD_DIM, TILE_N)
        v_tile = load_keys(v, v_matrix, row, kv_head, sequence_start + start, key < end, VALUE_DIM, TILE_N)
        logits = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scaling)
        logits = tl.where(own_keys_visible(key, position, BLOCK_SIZE, TILE_QUERIES), logits, float("-inf"))
        maximum, total, acc = online_softmax(logits, v_tile, maximum, total, acc)

    # 4. The merged softmax, divided once; padded query rows are zeros.
    out = tl.where(is_real[:, None], acc * (1.0 / total)[:, None], 0.0)
    lse = tl.where(is_real, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    out_row = packed_rows(query_row.to(tl.int64) * (num_heads // PACKED) + head, PACKED)
    store_rows(out_ptr, out_row * VALUE_DIM, out, writes, VALUE_DIM)
    tl.store(lse_ptr + out_row, lse, mask=writes)


def plan_forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    view: View,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    workspace_bytes: int,
    arch: int,
) -> None:
    """Attention over a routing. See `moba.backends` for the contract.

    Args:
        indices: int32 [R, T, H, K], or [R, T, G, K] as `routing_heads` allows. view: the same routing by block.
        out: [R, T, H, Dv] in q's dtype and lse: fp32 [R, T, H], both contiguous, which the plan fills.
        workspace_bytes: bound on the memory of partials; chunks of heads and query rows that fit are taken in turn.
        arch: compute capability whose row of the tuning table is taken.

    Numerics: logits, softmax and sums in fp32; weights rounded to v's dtype before they multiply it, a block's partial
        to q's dtype before the merge.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    routing_heads, topk = indices.shape[2:]
    num_blocks, value_dim, packed = view.offsets.shape[1] - 1, v.shape[3], num_heads // routing_heads
    keeps = keeps_keys(q, v, block_size)
    past = tile_sizes("attend_past_stationary" if keeps else "attend_past_streaming", arch, q, v, block_size, packed)
    if keeps:
        past["TILE_N"] = max(16, next_power_of_2(block_size))
    own = tile_sizes("merge_and_attend_own", arch, q, v, block_size, packed)
    shape = {
        "GROUP": routing_heads // k.shape[2], "TOPK": topk, "BLOCK_SIZE": block_size, "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim, "PACKED": packed,
    }  # fmt: skip
    tiles_per_row = num_query_tiles(sequences, own["TILE_M"] // packed)[1]
    past_keys = keys_of(plan, k, v, past["TILE_N"], arch, allowed=block_size % past["TILE_N"] == 0)
    own_keys = own_keys_of(plan, k, v, own["TILE_N"], arch, sequences, block_size)
    row_bytes = (topk - 1) * (value_dim * q.element_size() + 4) * packed
    total_rows = num_rows * num_queries
    layout, scaling = layout_of(sequences, block_size), logit_scaling(scale, softcap)

    uniform = uniform_stride(q)
    gathered_bytes = head_dim * q.element_size()
    parts = chunks_with_bounds(plan, view, total_rows, topk, packed, row_bytes, gathered_bytes, workspace_bytes)
    size = (parts[0][0].num_heads, topk - 1, parts[0][0].num_rows, packed)
    partial, partial_lse = plan.buffer(*size, value_dim, dtype=q.dtype), plan.buffer(*size, dtype=torch.float32)
    # The first of `uniform` and `own_keys` fits this call and is launched. Calls of other lengths and batch sizes need
    # the rest: they are compiled together with this, so that a new length never compiles.
    for chunk, bounds in parts:
        tiles, first_tile = chunk_query_tiles(sequences, own["TILE_M"], packed, chunk)
        partials = Partials(partial, partial_lse, chunk.first_head, chunk.row_begin, chunk.num_rows, first_tile)
        if topk > 1:
            num_entries = view.num_entries if packed == 1 else chunk.num_rows * (topk - 1)
            arguments = (rows_of(q), *past_keys, view, bounds, partials, scaling, layout)
            grid = (windows(num_entries, num_blocks, past), chunk.num_heads)
            plan.launch(
                _attend_past_kernel, grid, *arguments, **shape, **past, KEEPS_KEYS=keeps, UNIFORM_STRIDE=uniform[0]
            )
            for is_uniform in uniform[1:]:
                plan.foresee(
                    _attend_past_kernel, *arguments, **shape, **past, KEEPS_KEYS=keeps, UNIFORM_STRIDE=is_uniform
                )
        outputs = (rows_of(indices), partials, out, lse, scaling, num_heads, layout, tiles_per_row)
        grid = (tiles, chunk.num_heads)
        plan.launch(_merge_and_attend_own_kernel, grid, rows_of(q), *own_keys[0], *outputs, **shape, **own)
        for keys in own_keys[1:]:
            plan.foresee(_merge_and_attend_own_kernel, rows_of(q), *keys, *outputs, **shape, **own)
