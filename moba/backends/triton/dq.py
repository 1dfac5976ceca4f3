"""dQ by query, for past blocks and for own blocks. See backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.primitives import block_places, last_at_most, query_tile_span
from moba.backends.triton.tiles import (
    holds_past_block,
    load_entries,
    load_keys,
    load_rows,
    own_key_range,
    own_keys_visible,
    past_slots,
    row_offsets,
    store_rows,
)


@triton.jit
def add_keys(q, d_out, k, v, lse2, delta, visible, d_q, scale_log2):
    """Add a tile of keys [N, D] to d_q [M, D]; `visible` is [M, N] or None."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    weights = tl.exp2(logits - lse2[:, None])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    d_weights = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    d_logits = weights * (d_weights - delta[:, None])
    return tl.dot(d_logits.to(k.dtype), k, d_q, input_precision="ieee")


@triton.jit
def _dq_past_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse2_ptr, delta_ptr, offsets_ptr, first_ptr, last_ptr, entries_ptr, partial_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_dr, stride_dt, stride_dh, stride_first, num_entries, first_head, row_begin, num_rows,
    scale, scale_log2, total_rows, num_queries, num_keys,
    key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, num_blocks, blocks_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr, ONE_ROW: tl.constexpr, NUM_STAGES: tl.constexpr,
    WITH_TMA: tl.constexpr, BLOCK_COST: tl.constexpr,
):  # fmt: skip
    """dQ partials: a tile of gathered queries stays on chip while their block's K and V stream past."""
    head = tl.program_id(1)
    partial_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows * HEAD_DIM
    first_ptr += head.to(tl.int64) * stride_first
    last_ptr += head.to(tl.int64) * stride_first
    head = head.to(tl.int64) + first_head
    offsets_ptr += head * (num_blocks + 1)
    entries_ptr += head * num_entries
    q_ptr += head * stride_qh
    d_out_ptr += head * stride_dh
    lse2_ptr += head * total_rows
    delta_ptr += head * total_rows
    kv_head = tl.program_id(1) + first_head
    kv_head = kv_head // GROUP

    begin = tl.program_id(0) * WINDOW
    end = begin + WINDOW
    block = last_at_most(offsets_ptr, num_blocks, begin, 1, BLOCK_COST)
    while (block < num_blocks) & (tl.load(offsets_ptr + block) + block * BLOCK_COST < end):
        key_row, _, first_key, _, _ = block_places(
            block, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, BLOCK_SIZE
        )
        first = tl.load(first_ptr + block)
        last = tl.load(last_ptr + block)
        first_tile = first + tl.cdiv(tl.maximum(begin - block * BLOCK_COST - first, 0), TILE_M) * TILE_M
        for tile in range(first_tile, tl.minimum(last, end - block * BLOCK_COST), TILE_M):
            rows, slots, mask = load_entries(entries_ptr, tile, last, TOPK, TILE_M)
            q = load_rows(q_ptr, row_offsets(rows, num_queries, stride_qr, stride_qt, ONE_ROW), mask, HEAD_DIM, BLOCK_D)
            d_out = load_rows(d_out_ptr, row_offsets(rows, num_queries, stride_dr, stride_dt, ONE_ROW), mask, HEAD_DIM,
                              BLOCK_D)  # fmt: skip
            lse2 = tl.load(lse2_ptr + rows, mask=mask, other=0.0)
            delta = tl.load(delta_ptr + rows, mask=mask, other=0.0)
            d_q = tl.zeros([TILE_M, BLOCK_D], tl.float32)
            for start in tl.range(0, BLOCK_SIZE, TILE_N, num_stages=NUM_STAGES):
                keys = start + tl.arange(0, TILE_N)
                key_mask = keys < BLOCK_SIZE
                k = load_keys(k_ptr, key_row, kv_head, first_key + start, key_mask, stride_kr, stride_ks, stride_kg,
                              HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
                v = load_keys(v_ptr, key_row, kv_head, first_key + start, key_mask, stride_vr, stride_vs, stride_vg,
                              HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
                visible = None if BLOCK_SIZE % TILE_N == 0 else key_mask[None, :]
                d_q = add_keys(q, d_out, k, v, lse2, delta, visible, d_q, scale_log2)
            place = slots.to(tl.int64) * num_rows + (rows - row_begin)
            store_rows(partial_ptr, place * HEAD_DIM, d_q, mask, HEAD_DIM, BLOCK_D, True)
        block += 1


@triton.jit
def _dq_own_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse2_ptr, delta_ptr, indices_ptr, partial_ptr, d_q_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_dr, stride_dt, stride_dh, stride_ir, stride_it, stride_ih, first_head, row_begin, num_rows,
    scale, scale_log2, total_rows, num_queries, num_keys, num_heads,
    key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, tiles_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_STAGES: tl.constexpr, WITH_TMA: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries: their partials in the order of slots, then their own blocks."""
    head = tl.program_id(1).to(tl.int64)
    partial_ptr += head * (TOPK - 1) * num_rows * HEAD_DIM
    head += first_head
    tensor_row, first_query, query_begin, query_end, offset, sequence_start = query_tile_span(
        tl.program_id(0), num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences,
        tiles_per_row, TILE_M,
    )  # fmt: skip
    query = first_query + tl.arange(0, TILE_M)
    query_row = tensor_row * num_queries + query
    writes = (query >= query_begin) & (query < query_end)
    writes = writes & (query_row >= row_begin) & (query_row < row_begin + num_rows)
    position = query + offset
    is_real = writes & (position >= 0)

    long_row = tl.full([], tensor_row, tl.int64)
    kv_head = (tl.program_id(1) + first_head) // GROUP
    q = load_rows(q_ptr + long_row * stride_qr + head * stride_qh, query.to(tl.int64) * stride_qt, is_real, HEAD_DIM,
                  BLOCK_D)  # fmt: skip
    d_out = load_rows(d_out_ptr + long_row * stride_dr + head * stride_dh, query.to(tl.int64) * stride_dt, is_real,
                      HEAD_DIM, BLOCK_D)  # fmt: skip
    lse2 = tl.load(lse2_ptr + head * total_rows + query_row, mask=is_real, other=0.0)
    delta = tl.load(delta_ptr + head * total_rows + query_row, mask=is_real, other=0.0)

    all_keys = tl.full([TILE_N], True, tl.int1)
    d_q = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    if TOPK > 1:
        indices_ptr += long_row * stride_ir + head * stride_ih
        bits = past_slots(indices_ptr, query, stride_it, position, is_real, TOPK, BLOCK_SIZE)
        place = query_row.to(tl.int64) - row_begin
        slot_rows = tl.full([], num_rows, tl.int64)
        for slot in tl.range(0, TOPK - 1, num_stages=MERGE_STAGES):
            exists = holds_past_block(
                bits, indices_ptr, query, stride_it, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            offsets = (place + slot * slot_rows) * HEAD_DIM
            d_q += load_rows(partial_ptr, offsets, exists, HEAD_DIM, BLOCK_D).to(tl.float32)

    begin, middle, end = own_key_range(position, is_real, first_query + offset, BLOCK_SIZE, TILE_M, TILE_N)
    for start in tl.range(begin, middle, TILE_N, num_stages=NUM_STAGES):
        k = load_keys(k_ptr, tensor_row, kv_head, sequence_start + start, all_keys, stride_kr, stride_ks, stride_kg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        v = load_keys(v_ptr, tensor_row, kv_head, sequence_start + start, all_keys, stride_vr, stride_vs, stride_vg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        d_q = add_keys(q, d_out, k, v, lse2, delta, None, d_q, scale_log2)
    for start in tl.range(middle, end, TILE_N, num_stages=NUM_STAGES):
        key = start + tl.arange(0, TILE_N)
        k = load_keys(k_ptr, tensor_row, kv_head, sequence_start + start, key < end, stride_kr, stride_ks, stride_kg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        v = load_keys(v_ptr, tensor_row, kv_head, sequence_start + start, key < end, stride_vr, stride_vs, stride_vg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        visible = own_keys_visible(key, position, BLOCK_SIZE, TILE_M)
        d_q = add_keys(q, d_out, k, v, lse2, delta, visible, d_q, scale_log2)
    place = query_row.to(tl.int64) * num_heads + head
    store_rows(d_q_ptr, place * HEAD_DIM, d_q * scale, writes, HEAD_DIM, BLOCK_D)
