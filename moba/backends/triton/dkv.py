"""dK and dV by block. See backward.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.launch import cdiv
from moba.backends.triton.primitives import block_span, last_at_most
from moba.backends.triton.tiles import load_entries, load_rows, row_offsets, store_rows

# Memory that the sums of split blocks may take, and the fewest queries that are worth a segment of their own.
SEGMENT_SHARE = 0.06
MIN_SEGMENT_BYTES = 64 << 20
MIN_SEGMENT_LENGTH = 4096


def plan_segments(q: Tensor, k: Tensor, num_entries: int, block_size: int) -> tuple[int, int]:
    """Length of a segment, and how many full segments a key/value head's `num_entries` can have in split blocks.

    The partial sums of split blocks take at most SEGMENT_SHARE of the inputs and outputs, or a share of
    MIN_SEGMENT_BYTES. Depends on shapes alone, so that gradients do not depend on the memory at hand.
    """
    num_kv_heads = k.shape[2]
    inputs_bytes = 2 * (q.numel() + k.numel()) * q.element_size() // num_kv_heads
    budget = max(int(SEGMENT_SHARE * inputs_bytes), MIN_SEGMENT_BYTES // num_kv_heads)
    bytes_per_extra = 16 * block_size * q.shape[-1]
    length = max(MIN_SEGMENT_LENGTH, cdiv(num_entries * bytes_per_extra, max(budget, 1)))
    return length, num_entries // length


@triton.jit
def add_tile(q, d_out, k, v, lse2, delta, visible, d_k, d_v, scale_log2):
    """Add a tile of queries [M, D] to d_k and d_v [N, D]; `visible` is [N, M] or None. Returns them and dSᵀ [N, M].

    A query of zeros with lse2, delta and d_out of zero adds nothing, so rows that were masked when loaded need no mask.
    """
    logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
    weights = tl.exp2(logits - lse2[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision="ieee")
    d_weights = tl.dot(v, tl.trans(d_out), input_precision="ieee")
    d_logits = (weights * (d_weights - delta[None, :])).to(q.dtype)
    d_k = tl.dot(d_logits, q, d_k, input_precision="ieee")
    return d_k, d_v, d_logits


@triton.jit
def segment_of_item(extra_ptr, item, num_extra, num_blocks):
    """Block and segment of a work item, and where the block's sums go if it has several segments.

    Items 0 … num_extra - 1 are the full segments of split blocks, item num_extra + b the last segment of block b.
    `extra_ptr` [blocks + 1] counts the full segments of split blocks before each block.

    Returns:
        block, segment, place among the 2 · num_extra partial sums or -1, and whether the item exists.
    """
    if extra_ptr is None:
        block, segment, place, exists = item, 0, -1, True
    else:
        is_extra = item < num_extra
        # One-line conditionals would run the search for every item.
        if is_extra:  # noqa: SIM108
            block = last_at_most(extra_ptr, num_blocks, item, 1, 0)
        else:
            block = item - num_extra
        before = tl.load(extra_ptr + block)
        after = tl.load(extra_ptr + block + 1)
        segment = tl.where(is_extra, item - before, after - before)
        place = tl.where(is_extra, item, tl.where(after > before, num_extra + before, -1))
        exists = (is_extra == 0) | (item < tl.load(extra_ptr + num_blocks))
    return block, segment, place, exists


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse2_ptr, delta_ptr, offsets_ptr, entries_ptr, extra_ptr,
    d_k_ptr, d_v_ptr, sums_ptr, partial_ptr,
    stride_qr, stride_qt, stride_qh, stride_kr, stride_ks, stride_kg, stride_vr, stride_vs, stride_vg,
    stride_dr, stride_dt, stride_dh, num_entries, first_kv_head, num_kv_heads, segment_length, num_extra,
    scale, scale_log2, total_rows, num_queries, num_keys,
    key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, num_blocks, blocks_per_row,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ONE_ROW: tl.constexpr, NUM_STAGES: tl.constexpr,
    WITH_D_Q: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys; WITH_D_Q, where a block is one tile, also dQ partials, not yet scaled."""
    KEY_TILES: tl.constexpr = (BLOCK_SIZE + TILE_N - 1) // TILE_N
    item = tl.program_id(0) // KEY_TILES
    key_tile = tl.program_id(0) % KEY_TILES
    local_kv_head = tl.program_id(1)
    kv_head = local_kv_head + first_kv_head
    if extra_ptr is not None:
        extra_ptr += local_kv_head * (num_blocks + 1)
    block, segment, place, exists = segment_of_item(extra_ptr, item, num_extra, num_blocks)
    if exists == 0:
        return

    tensor_row, first_key, size, first_query, query_begin, query_end = block_span(
        block, num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, blocks_per_row,
        num_blocks, BLOCK_SIZE,
    )  # fmt: skip
    key_in_block = key_tile * TILE_N + tl.arange(0, TILE_N)
    key = first_key + key_in_block
    key_mask = key_in_block < size
    long_row = tl.full([], tensor_row, tl.int64)
    long_kv_head = kv_head.to(tl.int64)
    k = load_rows(k_ptr + long_row * stride_kr + long_kv_head * stride_kg, key.to(tl.int64) * stride_ks, key_mask,
                  HEAD_DIM, BLOCK_D)  # fmt: skip
    v = load_rows(v_ptr + long_row * stride_vr + long_kv_head * stride_vg, key.to(tl.int64) * stride_vs, key_mask,
                  HEAD_DIM, BLOCK_D)  # fmt: skip
    d_k = tl.zeros([TILE_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([TILE_N, BLOCK_D], tl.float32)

    # The group's entries of this block count as one list, head after head.
    begin = segment * segment_length
    end = begin + segment_length
    own_begin = tl.maximum(first_query + key_tile * TILE_N, query_begin)
    own_end = tl.minimum(first_query + size, query_end)
    if segment > 0:
        own_end = own_begin
    seen = 0
    for member in range(GROUP):
        head = long_kv_head * GROUP + member
        q_head_ptr = q_ptr + head * stride_qh
        d_out_head_ptr = d_out_ptr + head * stride_dh
        lse2_head_ptr = lse2_ptr + head * total_rows
        delta_head_ptr = delta_ptr + head * total_rows

        for start in tl.range(own_begin, own_end, TILE_M, num_stages=NUM_STAGES):
            query = start + tl.arange(0, TILE_M)
            mask = query < own_end
            rows = tensor_row * num_queries + query
            q = load_rows(q_head_ptr + long_row * stride_qr, query.to(tl.int64) * stride_qt, mask, HEAD_DIM, BLOCK_D)
            d_out = load_rows(d_out_head_ptr + long_row * stride_dr, query.to(tl.int64) * stride_dt, mask, HEAD_DIM,
                              BLOCK_D)  # fmt: skip
            lse2 = tl.load(lse2_head_ptr + rows, mask=mask, other=0.0)
            delta = tl.load(delta_head_ptr + rows, mask=mask, other=0.0)
            visible = (key_in_block[:, None] <= (query - first_query)[None, :]) & key_mask[:, None]
            d_k, d_v, _ = add_tile(q, d_out, k, v, lse2, delta, visible, d_k, d_v, scale_log2)

        if TOPK > 1:
            offsets_head_ptr = offsets_ptr + head * (num_blocks + 1)
            first = tl.load(offsets_head_ptr + block)
            count = tl.load(offsets_head_ptr + block + 1) - first
            entries_head_ptr = entries_ptr + head * num_entries
            last = first + tl.minimum(tl.maximum(end - seen, 0), count)
            for start in tl.range(first + tl.minimum(tl.maximum(begin - seen, 0), count), last, TILE_M,
                                  num_stages=NUM_STAGES):  # fmt: skip
                rows, slots, mask = load_entries(entries_head_ptr, start, last, TOPK, TILE_M)
                q = load_rows(q_head_ptr, row_offsets(rows, num_queries, stride_qr, stride_qt, ONE_ROW), mask,
                              HEAD_DIM, BLOCK_D)  # fmt: skip
                d_out = load_rows(d_out_head_ptr, row_offsets(rows, num_queries, stride_dr, stride_dt, ONE_ROW), mask,
                                  HEAD_DIM, BLOCK_D)  # fmt: skip
                lse2 = tl.load(lse2_head_ptr + rows, mask=mask, other=0.0)
                delta = tl.load(delta_head_ptr + rows, mask=mask, other=0.0)
                visible = None if BLOCK_SIZE % TILE_N == 0 else key_mask[:, None]
                d_k, d_v, d_logits = add_tile(q, d_out, k, v, lse2, delta, visible, d_k, d_v, scale_log2)
                if WITH_D_Q:
                    d_q = tl.dot(tl.trans(d_logits), k, input_precision="ieee")
                    local_head = local_kv_head.to(tl.int64) * GROUP + member
                    partial_place = (local_head * (TOPK - 1) + slots) * total_rows + rows
                    store_rows(partial_ptr, partial_place * HEAD_DIM, d_q, mask, HEAD_DIM, BLOCK_D, True)
            seen += count

    d_k *= scale
    is_whole = key_mask
    if sums_ptr is not None:
        is_whole = key_mask & (place < 0)
        sums_place = (local_kv_head.to(tl.int64) * 2 * num_extra + place) * 2 * BLOCK_SIZE + key_in_block
        sums_mask = (key_in_block < BLOCK_SIZE) & (place >= 0)
        store_rows(sums_ptr, sums_place * HEAD_DIM, d_k, sums_mask, HEAD_DIM, BLOCK_D)
        store_rows(sums_ptr, (sums_place + BLOCK_SIZE) * HEAD_DIM, d_v, sums_mask, HEAD_DIM, BLOCK_D)
    out_place = (long_row * num_keys + key) * num_kv_heads + kv_head
    store_rows(d_k_ptr, out_place * HEAD_DIM, d_k, is_whole, HEAD_DIM, BLOCK_D)
    store_rows(d_v_ptr, out_place * HEAD_DIM, d_v, is_whole, HEAD_DIM, BLOCK_D)


@triton.jit
def _count_segments_kernel(
    offsets_ptr, extra_ptr, first_kv_head, segment_length, num_blocks, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """`extra` of `segment_of_item` for one key/value head: running count of the full segments of split blocks."""
    local_kv_head = tl.program_id(0)
    extra_ptr += local_kv_head * (num_blocks + 1)
    head = (local_kv_head + first_kv_head).to(tl.int64) * GROUP
    total = 0
    for start in range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        mask = block < num_blocks
        count = tl.zeros([TILE], tl.int32)
        for member in range(GROUP):
            pointers = offsets_ptr + (head + member) * (num_blocks + 1) + block
            count += tl.load(pointers + 1, mask=mask, other=0) - tl.load(pointers, mask=mask, other=0)
        extra = tl.maximum(count - 1, 0) // segment_length
        running = tl.cumsum(extra, 0)
        tl.store(extra_ptr + block, total + running - extra, mask=mask)
        total += tl.sum(extra, 0)
    tl.store(extra_ptr + num_blocks, total)


@triton.jit
def _reduce_segments_kernel(
    extra_ptr, sums_ptr, d_k_ptr, d_v_ptr, first_kv_head, num_kv_heads, num_extra, num_queries, num_keys,
    key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, num_blocks, blocks_per_row,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Add the sums of a split block's segments, the last one first, then in order, and write its dK and dV."""
    item = tl.program_id(0)
    local_kv_head = tl.program_id(2)
    extra_ptr += local_kv_head * (num_blocks + 1)
    if item >= tl.load(extra_ptr + num_blocks):
        return
    block = last_at_most(extra_ptr, num_blocks, item, 1, 0)
    if tl.load(extra_ptr + block) != item:
        return
    tensor_row, first_key, size, _, _, _ = block_span(
        block, num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences, blocks_per_row,
        num_blocks, BLOCK_SIZE,
    )  # fmt: skip
    key_in_block = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    mask = key_in_block < BLOCK_SIZE
    sums_ptr += local_kv_head.to(tl.int64) * 4 * num_extra * BLOCK_SIZE * HEAD_DIM
    place = (num_extra + item).to(tl.int64) * 2 * BLOCK_SIZE + key_in_block
    d_k = load_rows(sums_ptr, place * HEAD_DIM, mask, HEAD_DIM, BLOCK_D)
    d_v = load_rows(sums_ptr, (place + BLOCK_SIZE) * HEAD_DIM, mask, HEAD_DIM, BLOCK_D)
    for segment in range(item, tl.load(extra_ptr + block + 1)):
        place = tl.full([], segment, tl.int64) * 2 * BLOCK_SIZE + key_in_block
        d_k += load_rows(sums_ptr, place * HEAD_DIM, mask, HEAD_DIM, BLOCK_D)
        d_v += load_rows(sums_ptr, (place + BLOCK_SIZE) * HEAD_DIM, mask, HEAD_DIM, BLOCK_D)
    key = first_key + key_in_block
    mask = key_in_block < size
    place = (tl.full([], tensor_row, tl.int64) * num_keys + key) * num_kv_heads + first_kv_head + local_kv_head
    store_rows(d_k_ptr, place * HEAD_DIM, d_k, mask, HEAD_DIM, BLOCK_D)
    store_rows(d_v_ptr, place * HEAD_DIM, d_v, mask, HEAD_DIM, BLOCK_D)
