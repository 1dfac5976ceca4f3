"""Forward of attention over a routing: past blocks by gathered queries, then the own block and the merge.

Letters: R tensor rows, T query tokens, S key tokens, H query heads, G key/value heads, D head dim, K = topk.
A *query row* is a query's index in the flattened R · T. A *slot* is a place in a query's row of the routing. A
*partial* is the attention of one query to one past block: its normalised output and its log2-sum-exp. Logits are kept
in log2.

The by-block view (`offsets` [H, blocks + 1], `entries` [H, …] = query row · K + slot) lists each block's queries. Its
entries, with BLOCK_COST more for every block, are cut into windows of equal length, so that work is balanced without
knowing the routing: a program takes the tiles of queries that begin in its window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.launch import Plan, next_power_of_2
from moba.backends.triton.plan import (
    LOG2_E,
    View,
    chunk_bounds,
    chunks,
    keeps_keys,
    key_sources,
    padded_head_dim,
    tile_sizes,
    windows,
)
from moba.backends.triton.primitives import block_places, last_at_most, num_query_tiles, query_tile_span
from moba.backends.triton.tiles import (
    LN_2,
    LOWEST,
    holds_past_block,
    load_entries,
    load_keys,
    load_rows,
    online_softmax,
    own_key_range,
    own_keys_visible,
    past_slots,
    row_offsets,
    store_partials,
    store_rows,
)
from moba.layout import Sequences


@triton.jit
def _attend_past_stationary_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, first_ptr, last_ptr, entries_ptr, partial_ptr, partial_lse_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_first, num_entries, first_head, row_begin, num_rows, scale_log2, num_queries, num_keys,
    key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, num_blocks, blocks_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr, ONE_ROW: tl.constexpr, NUM_STAGES: tl.constexpr,
    WITH_TMA: tl.constexpr, BLOCK_COST: tl.constexpr,
):  # fmt: skip
    """Partials of small blocks: a whole block's K and V stay on chip while its queries stream past. TILE_N >= block."""
    head = tl.program_id(1)
    partial_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows * HEAD_DIM
    partial_lse_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows
    first_ptr += head.to(tl.int64) * stride_first
    last_ptr += head.to(tl.int64) * stride_first
    head += first_head
    offsets_ptr += head.to(tl.int64) * (num_blocks + 1)
    entries_ptr += head.to(tl.int64) * num_entries
    q_ptr += head.to(tl.int64) * stride_qh

    begin = tl.program_id(0) * WINDOW
    end = begin + WINDOW
    keys = tl.arange(0, TILE_N)
    block = last_at_most(offsets_ptr, num_blocks, begin, 1, BLOCK_COST)
    while (block < num_blocks) & (tl.load(offsets_ptr + block) + block * BLOCK_COST < end):
        key_row, _, first_key, _, _ = block_places(
            block, num_keys, key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, blocks_per_row, num_blocks, BLOCK_SIZE
        )
        k = load_keys(k_ptr, key_row, head // GROUP, first_key, keys < BLOCK_SIZE, stride_kr, stride_ks, stride_kg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        v = load_keys(v_ptr, key_row, head // GROUP, first_key, keys < BLOCK_SIZE, stride_vr, stride_vs, stride_vg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        first = tl.load(first_ptr + block)
        last = tl.load(last_ptr + block)
        first_tile = first + tl.cdiv(tl.maximum(begin - block * BLOCK_COST - first, 0), TILE_M) * TILE_M
        for tile in tl.range(first_tile, tl.minimum(last, end - block * BLOCK_COST), TILE_M, num_stages=NUM_STAGES):
            rows, slots, mask = load_entries(entries_ptr, tile, last, TOPK, TILE_M)
            q = load_rows(q_ptr, row_offsets(rows, num_queries, stride_qr, stride_qt, ONE_ROW), mask, HEAD_DIM, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if BLOCK_SIZE != TILE_N:
                logits = tl.where((keys < BLOCK_SIZE)[None, :], logits, float("-inf"))
            maximum = tl.max(logits, 1)
            weights = tl.exp2(logits - maximum[:, None])
            total = tl.sum(weights, 1)
            outputs = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
            store_partials(partial_ptr, partial_lse_ptr, rows, slots, mask, row_begin, num_rows, outputs,
                           maximum + tl.log2(total), HEAD_DIM, BLOCK_D)  # fmt: skip
        block += 1


@triton.jit
def _attend_past_streaming_kernel(
    q_ptr, k_ptr, v_ptr, offsets_ptr, first_ptr, last_ptr, entries_ptr, partial_ptr, partial_lse_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_first, num_entries, first_head, row_begin, num_rows, scale_log2, num_queries, num_keys,
    key_start_ptr, key_end_ptr, cu_k_ptr, num_sequences, num_blocks, blocks_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WINDOW: tl.constexpr, ONE_ROW: tl.constexpr, NUM_STAGES: tl.constexpr,
    WITH_TMA: tl.constexpr, BLOCK_COST: tl.constexpr,
):  # fmt: skip
    """Partials of large blocks: a tile of queries stays on chip while the block's K and V stream past."""
    head = tl.program_id(1)
    partial_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows * HEAD_DIM
    partial_lse_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows
    first_ptr += head.to(tl.int64) * stride_first
    last_ptr += head.to(tl.int64) * stride_first
    head += first_head
    offsets_ptr += head.to(tl.int64) * (num_blocks + 1)
    entries_ptr += head.to(tl.int64) * num_entries
    q_ptr += head.to(tl.int64) * stride_qh

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
            maximum = tl.full([TILE_M], LOWEST, tl.float32)
            total = tl.zeros([TILE_M], tl.float32)
            acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)
            for start in tl.range(0, BLOCK_SIZE, TILE_N, num_stages=NUM_STAGES):
                keys = start + tl.arange(0, TILE_N)
                key_mask = keys < BLOCK_SIZE
                k = load_keys(k_ptr, key_row, head // GROUP, first_key + start, key_mask, stride_kr, stride_ks,
                              stride_kg, HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
                v = load_keys(v_ptr, key_row, head // GROUP, first_key + start, key_mask, stride_vr, stride_vs,
                              stride_vg, HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
                if BLOCK_SIZE % TILE_N != 0:
                    logits = tl.where(key_mask[None, :], logits, float("-inf"))
                maximum, total, acc = online_softmax(logits, v, maximum, total, acc)
            outputs = acc * (1.0 / total)[:, None]
            store_partials(partial_ptr, partial_lse_ptr, rows, slots, mask, row_begin, num_rows, outputs,
                           maximum + tl.log2(total), HEAD_DIM, BLOCK_D)  # fmt: skip
        block += 1


@triton.jit
def _attend_own_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, partial_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_ir, stride_it, stride_ih, first_head, row_begin, num_rows, scale_log2, num_queries, num_keys, num_heads,
    key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, tiles_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_STAGES: tl.constexpr, WITH_TMA: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the partials of a tile of queries in the order of slots, then add causal attention to their own blocks."""
    head = tl.program_id(1)
    partial_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows * HEAD_DIM
    partial_lse_ptr += head.to(tl.int64) * (TOPK - 1) * num_rows
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
    kv_head = head // GROUP
    head = head.to(tl.int64)
    q_ptr += long_row * stride_qr + head * stride_qh
    q = load_rows(q_ptr, query.to(tl.int64) * stride_qt, is_real, HEAD_DIM, BLOCK_D)

    all_keys = tl.full([TILE_N], True, tl.int1)
    maximum = tl.full([TILE_M], LOWEST, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, BLOCK_D], tl.float32)
    if TOPK > 1:
        indices_ptr += long_row * stride_ir + head * stride_ih
        bits = past_slots(indices_ptr, query, stride_it, position, is_real, TOPK, BLOCK_SIZE)
        place = query_row.to(tl.int64) - row_begin
        slot_rows = tl.full([], num_rows, tl.int64)
        for slot in tl.static_range(TOPK - 1):
            exists = holds_past_block(
                bits, indices_ptr, query, stride_it, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            partial_lse = tl.load(partial_lse_ptr + place + slot * slot_rows, mask=exists, other=LOWEST)
            maximum = tl.maximum(maximum, partial_lse)
        for slot in tl.range(0, TOPK - 1, num_stages=MERGE_STAGES):
            exists = holds_past_block(
                bits, indices_ptr, query, stride_it, slot, position, is_real, TOPK, BLOCK_SIZE
            )  # fmt: skip
            index = place + slot * slot_rows
            partial_lse = tl.load(partial_lse_ptr + index, mask=exists, other=LOWEST)
            weight = tl.where(exists, tl.exp2(partial_lse - maximum), 0.0)
            total += weight
            acc += weight[:, None] * load_rows(partial_ptr, index * HEAD_DIM, exists, HEAD_DIM, BLOCK_D).to(tl.float32)

    begin, middle, end = own_key_range(position, is_real, first_query + offset, BLOCK_SIZE, TILE_M, TILE_N)
    for start in tl.range(begin, middle, TILE_N, num_stages=NUM_STAGES):
        k = load_keys(k_ptr, tensor_row, kv_head, sequence_start + start, all_keys, stride_kr, stride_ks, stride_kg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        v = load_keys(v_ptr, tensor_row, kv_head, sequence_start + start, all_keys, stride_vr, stride_vs, stride_vg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        maximum, total, acc = online_softmax(logits, v, maximum, total, acc)
    for start in tl.range(middle, end, TILE_N, num_stages=NUM_STAGES):
        key = start + tl.arange(0, TILE_N)
        k = load_keys(k_ptr, tensor_row, kv_head, sequence_start + start, key < end, stride_kr, stride_ks, stride_kg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        v = load_keys(v_ptr, tensor_row, kv_head, sequence_start + start, key < end, stride_vr, stride_vs, stride_vg,
                      HEAD_DIM, BLOCK_D, TILE_N, WITH_TMA)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        logits = tl.where(own_keys_visible(key, position, BLOCK_SIZE, TILE_M), logits, float("-inf"))
        maximum, total, acc = online_softmax(logits, v, maximum, total, acc)

    out = tl.where(is_real[:, None], acc * (1.0 / total)[:, None], 0.0)
    lse = tl.where(is_real, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    place = query_row.to(tl.int64) * num_heads + head
    store_rows(out_ptr, place * HEAD_DIM, out, writes, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + place, lse, mask=writes)


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
    workspace_bytes: int,
    arch: int,
    keys_aligned: bool,
) -> None:
    """Attention over a routing. See `moba.backends` for the contract.

    Args:
        indices: int32 [R, T, H, K]. view: the same routing by block.
        out: [R, T, H, D] in q's dtype and lse: fp32 [R, T, H], both contiguous, which the plan fills.
        workspace_bytes: bound on the memory of partials; more heads than fit are taken in turn.
        arch: compute capability whose row of the tuning table is taken.
        keys_aligned: whether k and v begin at multiples of 16 bytes.

    Numerics: logits, softmax and sums in fp32; weights rounded to v's dtype before they multiply it, a block's partial
        to q's dtype before the merge.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, topk = k.shape[1], k.shape[2], indices.shape[3]
    bounds = (sequences.key_start, sequences.key_end)
    num_sequences = 0 if sequences.cu_k is None else sequences.cu_k.numel() - 1
    if keeps_keys(q, block_size):
        past_kernel, past = _attend_past_stationary_kernel, tile_sizes("attend_past_stationary", arch, q, block_size)
        past["TILE_N"] = max(16, next_power_of_2(block_size))
    else:
        past_kernel, past = _attend_past_streaming_kernel, tile_sizes("attend_past_streaming", arch, q, block_size)
    own = tile_sizes("attend_own", arch, q, block_size)
    shape = {
        "GROUP": num_heads // num_kv_heads, "TOPK": topk, "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim),
    }  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    num_tiles, tiles_per_row = num_query_tiles(sequences, own["TILE_M"])
    past_keys = key_sources(k, v, past["TILE_N"], arch, keys_aligned and block_size % past["TILE_N"] == 0)
    # Tiles at a sequence's end reach past it, where a descriptor would read another one's keys or padding.
    own_keys = key_sources(k, v, own["TILE_N"], arch, keys_aligned and sequences.is_plain)
    row_bytes = (topk - 1) * (head_dim * q.element_size() + 4)
    total_rows = num_rows * num_queries

    parts = chunks(num_heads, total_rows, row_bytes, workspace_bytes)
    partial = plan.buffer(topk - 1, parts[0].num_heads * parts[0].num_rows * head_dim, dtype=q.dtype)
    partial_lse = plan.buffer(topk - 1, parts[0].num_heads * parts[0].num_rows, dtype=torch.float32)
    bounds_memory = plan.buffer(2, parts[0].num_heads, view.offsets.shape[1] - 1, dtype=torch.int32)
    for chunk in parts:
        if topk > 1:
            first, last, stride_first = chunk_bounds(plan, view, chunk, total_rows, topk, bounds_memory)
            plan.launch(past_kernel, (windows(view, past), chunk.num_heads),
                q, *past_keys, view.offsets, first, last, view.entries, partial, partial_lse, *strides,
                stride_first, view.entries.shape[1], chunk.first_head, chunk.row_begin, chunk.num_rows,
                scale * LOG2_E, num_queries, num_keys, *bounds, sequences.cu_k, num_sequences,
                view.offsets.shape[1] - 1, sequences.num_blocks(block_size), **shape,
                ONE_ROW=num_rows == 1, WITH_TMA=past_keys[0] is not k, **past,
            )  # fmt: skip
        plan.launch(_attend_own_kernel, (num_tiles, chunk.num_heads),
            q, *own_keys, indices, partial, partial_lse, out, lse, *strides, *indices.stride()[:3],
            chunk.first_head, chunk.row_begin, chunk.num_rows, scale * LOG2_E, num_queries, num_keys, num_heads,
            *bounds, sequences.cu_q, sequences.cu_k, num_sequences, tiles_per_row, **shape,
            WITH_TMA=own_keys[0] is not k, **own,
        )  # fmt: skip
