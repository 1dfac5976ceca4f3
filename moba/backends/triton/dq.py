"""dQ by query, for past blocks and for own blocks. See backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.device import (
    holds_past_block,
    last_at_most,
    load_keys,
    load_rows,
    locate_blocks,
    own_key_range,
    own_keys_visible,
    padded_head_dim,
    past_slots,
    query_tile_span,
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
from moba.backends.triton.logits import scaled, through_cap


@triton.jit
def add_keys(q, d_out, k, v, lse2, delta, visible, d_q, scaling):
    """Add a tile of keys [N, D] and values [N, Dv] to d_q [M, D]; `visible` is [M, N] or None."""
    logits = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scaling)
    weights = tl.exp2(logits - lse2[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    d_logits = through_cap(weights * (d_weights - delta[:, None]), logits, scaling)
    return tl.dot(d_logits.to(k.dtype), k, d_q, input_precision="ieee")


@triton.jit
def _dq_past_kernel(
    q, k, v, k_matrix, v_matrix, d_outs, softmax, view, bounds, partials, scaling, layout,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr, BLOCK_COST: tl.constexpr,
    NUM_STAGES: tl.constexpr, UNIFORM_STRIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dQ partials: a tile of gathered queries stays on chip while their block's K and V stream past."""
    PADDED_DIM: tl.constexpr = padded_head_dim(HEAD_DIM)
    TILE_ENTRIES: tl.constexpr = TILE_M // PACKED
    chunk_head = tl.program_id(1)
    head = chunk_head + partials.first_head
    kv_head = head // GROUP
    long_head = head.to(tl.int64)
    offsets_ptr = window_offsets(view, bounds, head, chunk_head, layout.num_blocks)
    entries_ptr = view.entries + long_head * view.num_entries
    lse2_ptr = softmax.lse2_ptr + long_head * softmax.num_rows * PACKED
    delta_ptr = softmax.delta_ptr + long_head * softmax.num_rows * PACKED

    begin = tl.program_id(0) * WINDOW
    end = begin + WINDOW
    block = last_at_most(offsets_ptr, layout.num_blocks, begin, 1, BLOCK_COST)
    while (block < layout.num_blocks) & (tl.load(offsets_ptr + block) + block * BLOCK_COST < end):
        first_entry, stop_entry, entry_end = tiles_in_window(
            bounds, chunk_head, block, begin, end, TILE_ENTRIES, BLOCK_COST
        )
        row, _, first_key, _, _ = locate_blocks(block, layout, BLOCK_SIZE)
        for tile_entry in tl.range(first_entry, stop_entry, TILE_ENTRIES, num_stages=1):
            query_rows, slots, mask = load_entries(entries_ptr, tile_entry, entry_end, TOPK, TILE_M, PACKED)
            q_tile = load_query_rows(q, head, query_rows, layout.num_queries, mask, HEAD_DIM, UNIFORM_STRIDE, PACKED)
            d_out = load_query_rows(
                d_outs, head, query_rows, layout.num_queries, mask, VALUE_DIM, UNIFORM_STRIDE, PACKED
            )
            softmax_rows = packed_rows(query_rows, PACKED)
            lse2 = tl.load(lse2_ptr + softmax_rows, mask=mask, other=0.0)
            delta = tl.load(delta_ptr + softmax_rows, mask=mask, other=0.0)
            d_q = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
            for start in tl.range(0, BLOCK_SIZE, TILE_N, num_stages=NUM_STAGES):
                keys = start + tl.arange(0, TILE_N)
                is_key = keys < BLOCK_SIZE
                k_tile = load_keys(k, k_matrix, row, kv_head, first_key + start, is_key, HEAD_DIM, TILE_N)
                v_tile = load_keys(v, v_matrix, row, kv_head, first_key + start, is_key, VALUE_DIM, TILE_N)
                visible = None if BLOCK_SIZE % TILE_N == 0 else is_key[None, :]
                d_q = add_keys(q_tile, d_out, k_tile, v_tile, lse2, delta, visible, d_q, scaling)
            partial_row = (chunk_head.to(tl.int64) * (TOPK - 1) + slots) * partials.num_rows
            partial_row = packed_rows(partial_row + (query_rows - partials.row_begin), PACKED)
            store_rows(partials.ptr, partial_row * HEAD_DIM, d_q, mask, HEAD_DIM, True)
        block += 1


@triton.jit
def _dq_own_kernel(
    q, k, v, k_matrix, v_matrix, d_outs, softmax, indices, partials, d_q_ptr, scaling, num_heads, layout,
    tiles_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_STAGES: tl.constexpr, MERGE_STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries: add up their past blocks' partials in the order of slots, then add their own blocks'."""
    TILE_QUERIES: tl.constexpr = TILE_M // PACKED
    chunk_head = tl.program_id(1)
    kv_head = (chunk_head + partials.first_head) // GROUP
    head = (chunk_head + partials.first_head).to(tl.int64)
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
    d_out_ptr = d_outs.ptr + long_row * d_outs.stride_r + head * PACKED * d_outs.stride_h
    q_offsets = member_offsets(query.to(tl.int64) * q.stride_t, q.stride_h, PACKED)
    d_out_offsets = member_offsets(query.to(tl.int64) * d_outs.stride_t, d_outs.stride_h, PACKED)
    q_tile = load_rows(q_ptr, q_offsets, is_real, HEAD_DIM)
    d_out = load_rows(d_out_ptr, d_out_offsets, is_real, VALUE_DIM)
    first_row = head * softmax.num_rows * PACKED
    lse2 = tl.load(softmax.lse2_ptr + first_row + packed_rows(query_row, PACKED), mask=is_real, other=0.0)
    delta = tl.load(softmax.delta_ptr + first_row + packed_rows(query_row, PACKED), mask=is_real, other=0.0)

    d_q = tl.zeros([TILE_M, padded_head_dim(HEAD_DIM)], tl.float32)
    if TOPK > 1:
        indices_ptr = indices.ptr + long_row * indices.stride_r + head * indices.stride_h
        bits = past_slots(indices_ptr, query, indices.stride_t, position, is_real, TOPK, BLOCK_SIZE)
        partial_row = chunk_row + chunk_head.to(tl.int64) * (TOPK - 1) * partials.num_rows
        partial_row = packed_rows(partial_row, PACKED)
        slot_rows = tl.full([], partials.num_rows, tl.int64) * PACKED
        for slot in tl.range(0, TOPK - 1, num_stages=MERGE_STAGES):
            exists = holds_past_block(
                bits, indices_ptr, query, indices.stride_t, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            offsets = (partial_row + slot * slot_rows) * HEAD_DIM
            d_q += load_rows(partials.ptr, offsets, exists, HEAD_DIM).to(tl.float32)

    all_keys = tl.full([TILE_N], True, tl.int1)
    begin, middle, end = own_key_range(position, is_real, first_query + offset, BLOCK_SIZE, TILE_QUERIES, TILE_N)
    for start in tl.range(begin, middle, TILE_N, num_stages=NUM_STAGES):
        k_tile = load_keys(k, k_matrix, row, kv_head, sequence_start + start, all_keys, HEAD_DIM, TILE_N)
        v_tile = load_keys(v, v_matrix, row, kv_head, sequence_start + start, all_keys, VALUE_DIM, TILE_N)
        d_q = add_keys(q_tile, d_out, k_tile, v_tile, lse2, delta, None, d_q, scaling)
    for start in tl.range(middle, end, TILE_N, num_stages=NUM_STAGES):
        key = start + tl.arange(0, TILE_N)
        k_tile = load_keys(k, k_matrix, row, kv_head, sequence_start + start, key < end, HEAD_DIM, TILE_N)
        v_tile = load_keys(v, v_matrix, row, kv_head, sequence_start + start, key < end, VALUE_DIM, TILE_N)
        visible = own_keys_visible(key, position, BLOCK_SIZE, TILE_QUERIES)
        d_q = add_keys(q_tile, d_out, k_tile, v_tile, lse2, delta, visible, d_q, scaling)
    out_row = packed_rows(query_row.to(tl.int64) * (num_heads // PACKED) + head, PACKED)
    store_rows(d_q_ptr, out_row * HEAD_DIM, d_q * scaling.product_scale, writes, HEAD_DIM)
