"""dK and dV by block. See backward.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import (
    block_span,
    last_at_most,
    load_rows,
    padded_head_dim,
    store_rows,
)
from moba.backends.triton.entries import load_entries, load_query_rows, member_offsets, packed_rows, tile_queries
from moba.backends.triton.launch import cdiv
from moba.backends.triton.logits import scaled, through_cap
from moba.backends.triton.workspace import num_elements

# Memory that the sums of split blocks may take, and the fewest queries that are worth a segment of their own.
SEGMENT_SHARE = 0.06
MIN_SEGMENT_BYTES = 64 << 20
MIN_SEGMENT_LENGTH = 4096
# Of a segment that may be chosen: the longest, and its halves, quarters …
SEGMENT_LENGTHS = 8


class Segments(NamedTuple):
    """The full segments of split blocks, by key/value head of a launch.

    `extra_ptr`: int32 [heads, blocks + 2], how many there are before each block, and last the entries of a segment.
    `sums_ptr`: fp32 [heads, 2 · count, 2, block_size, the larger of D and Dv], dK and dV of each, and of the last
    segments of split blocks. `shortest`, `longest`: bounds of a segment's entries. `count`: how many a head can have.
    """

    extra_ptr: Any
    sums_ptr: Any
    shortest: Any
    longest: Any
    count: Any


def plan_segments(
    q: Tensor, k: Tensor, v: Tensor, num_entries: int, packed: int, block_size: int
) -> tuple[int, int, int]:
    """Shortest and longest segment, and how many full ones a key/value head's `num_entries` can have in split blocks.

    The partial sums of split blocks take at most SEGMENT_SHARE of the inputs and outputs, or a share of
    MIN_SEGMENT_BYTES: of the longest segments there are never more than that holds. Depends on shapes alone, so that
    gradients do not depend on the memory at hand. An entry stands for `packed` query heads.
    """
    num_kv_heads = k.shape[2]
    inputs_bytes = num_elements(q, k, v) * q.element_size() // num_kv_heads
    budget = max(int(SEGMENT_SHARE * inputs_bytes), MIN_SEGMENT_BYTES // num_kv_heads)
    bytes_per_extra = 16 * block_size * max(q.shape[-1], v.shape[-1])
    shortest = cdiv(MIN_SEGMENT_LENGTH, packed)
    longest = max(shortest, cdiv(num_entries * bytes_per_extra, max(budget, 1)))
    return shortest, longest, num_entries // longest


@triton.jit
def add_tile(q, d_out, k, v, lse2, delta, visible, d_k, d_v, scaling):
    """Add a tile of queries [M, D] to d_k [N, D] and d_v [N, Dv]; `visible` is [N, M] or None. Returns them and dSᵀ.

    A query of zeros with lse2, delta and d_out of zero adds nothing, so rows that were masked when loaded need no mask.
    """
    logits = scaled(tl.dot(k, tl.trans(q), input_precision="ieee"), scaling)
    weights = tl.exp2(logits - lse2[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision="ieee")
    d_weights = tl.dot(v, tl.trans(d_out), input_precision="ieee")
    d_logits = through_cap(weights * (d_weights - delta[None, :]), logits, scaling).to(q.dtype)
    d_k = tl.dot(d_logits, q, d_k, input_precision="ieee")
    return d_k, d_v, d_logits


@triton.jit
def segment_of_item(segments, extra_ptr, item, num_blocks):
    """Block and segment of a work item, and where the block's sums go if it has several segments.

    Items 0 … count - 1 are the full segments of split blocks, item count + b the last segment of block b.

    Returns:
        block, segment, index among the 2 · count sums or -1, and whether the item exists.
    """
    is_extra = item < segments.count
    # One-line conditionals would run the search for every item.
    if is_extra:  # noqa: SIM108
        block = last_at_most(extra_ptr, num_blocks, item, 1, 0)
    else:
        block = item - segments.count
    before = tl.load(extra_ptr + block)
    after = tl.load(extra_ptr + block + 1)
    segment = tl.where(is_extra, item - before, after - before)
    sums_index = tl.where(is_extra, item, tl.where(after > before, segments.count + before, -1))
    exists = (is_extra == 0) | (item < tl.load(extra_ptr + num_blocks))
    return block, segment, sums_index, exists


@triton.jit
def _dkv_kernel(
    q, k, v, d_outs, softmax, view, segments, d_k_ptr, d_v_ptr, partial_ptr, first_kv_head, num_kv_heads,
    scaling, layout,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, NUM_STAGES: tl.constexpr, UNIFORM_STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys; with `partial_ptr`, where a block is one tile, also dQ partials, not yet scaled."""
    TILE_QUERIES: tl.constexpr = TILE_M // PACKED
    SUMS_DIM: tl.constexpr = HEAD_DIM if HEAD_DIM > VALUE_DIM else VALUE_DIM
    KEY_TILES: tl.constexpr = (BLOCK_SIZE + TILE_N - 1) // TILE_N
    item = tl.program_id(0) // KEY_TILES
    key_tile = tl.program_id(0) % KEY_TILES
    local_kv_head = tl.program_id(1)
    kv_head = (local_kv_head + first_kv_head).to(tl.int64)
    extra_ptr = segments.extra_ptr + local_kv_head * (layout.num_blocks + 2)
    block, segment, sums_index, exists = segment_of_item(segments, extra_ptr, item, layout.num_blocks)
    if exists == 0:
        return

    row, first_key, size, first_query, query_begin, query_end = block_span(block, layout, BLOCK_SIZE)
    key_in_block = key_tile * TILE_N + tl.arange(0, TILE_N)
    key = first_key + key_in_block
    is_key = key_in_block < size
    long_row = tl.full([], row, tl.int64)
    k_tile = load_rows(k.ptr + long_row * k.stride_r + kv_head * k.stride_h, key.to(tl.int64) * k.stride_t, is_key,
                       HEAD_DIM)  # fmt: skip
    v_tile = load_rows(v.ptr + long_row * v.stride_r + kv_head * v.stride_h, key.to(tl.int64) * v.stride_t, is_key,
                       VALUE_DIM)  # fmt: skip
    d_k = tl.zeros([TILE_N, padded_head_dim(HEAD_DIM)], tl.float32)
    d_v = tl.zeros([TILE_N, padded_head_dim(VALUE_DIM)], tl.float32)

    # The group's entries of this block count as one list, head after head.
    segment_length = tl.load(extra_ptr + layout.num_blocks + 1)
    begin = segment * segment_length
    end = begin + segment_length
    own_begin = tl.maximum(first_query + key_tile * TILE_N, query_begin)
    own_end = tl.minimum(first_query + size, query_end)
    if segment > 0:
        own_end = own_begin
    seen = 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_ptr = q.ptr + long_row * q.stride_r + head * PACKED * q.stride_h
        d_out_ptr = d_outs.ptr + long_row * d_outs.stride_r + head * PACKED * d_outs.stride_h
        lse2_ptr = softmax.lse2_ptr + head * softmax.num_rows * PACKED
        delta_ptr = softmax.delta_ptr + head * softmax.num_rows * PACKED

        for start in tl.range(own_begin, own_end, TILE_QUERIES, num_stages=NUM_STAGES):
            query = start + tile_queries(TILE_M, PACKED)
            mask = query < own_end
            softmax_rows = packed_rows(row * layout.num_queries + query, PACKED)
            q_offsets = member_offsets(query.to(tl.int64) * q.stride_t, q.stride_h, PACKED)
            d_out_offsets = member_offsets(query.to(tl.int64) * d_outs.stride_t, d_outs.stride_h, PACKED)
            q_tile = load_rows(q_ptr, q_offsets, mask, HEAD_DIM)
            d_out = load_rows(d_out_ptr, d_out_offsets, mask, VALUE_DIM)
            lse2 = tl.load(lse2_ptr + softmax_rows, mask=mask, other=0.0)
            delta = tl.load(delta_ptr + softmax_rows, mask=mask, other=0.0)
            visible = (key_in_block[:, None] <= (query - first_query)[None, :]) & is_key[:, None]
            d_k, d_v, _ = add_tile(q_tile, d_out, k_tile, v_tile, lse2, delta, visible, d_k, d_v, scaling)

        if TOPK > 1:
            offsets_ptr = view.offsets + head * (layout.num_blocks + 1)
            block_entry = tl.load(offsets_ptr + block)
            count = tl.load(offsets_ptr + block + 1) - block_entry
            entries_ptr = view.entries + head * view.num_entries
            first_entry = block_entry + tl.minimum(tl.maximum(begin - seen, 0), count)
            entry_end = block_entry + tl.minimum(tl.maximum(end - seen, 0), count)
            for tile_entry in tl.range(first_entry, entry_end, TILE_QUERIES, num_stages=NUM_STAGES):
                query_rows, slots, mask = load_entries(entries_ptr, tile_entry, entry_end, TOPK, TILE_M, PACKED)
                q_tile = load_query_rows(
                    q, head, query_rows, layout.num_queries, mask, HEAD_DIM, UNIFORM_STRIDE, PACKED
                )
                d_out = load_query_rows(
                    d_outs, head, query_rows, layout.num_queries, mask, VALUE_DIM, UNIFORM_STRIDE, PACKED
                )
                softmax_rows = packed_rows(query_rows, PACKED)
                lse2 = tl.load(lse2_ptr + softmax_rows, mask=mask, other=0.0)
                delta = tl.load(delta_ptr + softmax_rows, mask=mask, other=0.0)
                visible = None if BLOCK_SIZE % TILE_N == 0 else is_key[:, None]
                d_k, d_v, d_logits = add_tile(
                    q_tile, d_out, k_tile, v_tile, lse2, delta, visible, d_k, d_v, scaling
                )  # fmt: skip
                if partial_ptr is not None:
                    d_q = tl.dot(tl.trans(d_logits), k_tile, input_precision="ieee")
                    local_head = local_kv_head.to(tl.int64) * GROUP + member
                    partial_row = (local_head * (TOPK - 1) + slots) * softmax.num_rows + query_rows
                    partial_row = packed_rows(partial_row, PACKED)
                    store_rows(partial_ptr, partial_row * HEAD_DIM, d_q, mask, HEAD_DIM, True)
            seen += count

    d_k *= scaling.product_scale
    sums_row = (local_kv_head.to(tl.int64) * 2 * segments.count + sums_index) * 2 * BLOCK_SIZE + key_in_block
    sums_mask = (key_in_block < BLOCK_SIZE) & (sums_index >= 0)
    store_rows(segments.sums_ptr, sums_row * SUMS_DIM, d_k, sums_mask, HEAD_DIM)
    store_rows(segments.sums_ptr, (sums_row + BLOCK_SIZE) * SUMS_DIM, d_v, sums_mask, VALUE_DIM)
    is_whole = is_key & (sums_index < 0)
    out_row = (long_row * layout.num_keys + key) * num_kv_heads + kv_head
    store_rows(d_k_ptr, out_row * HEAD_DIM, d_k, is_whole, HEAD_DIM)
    store_rows(d_v_ptr, out_row * VALUE_DIM, d_v, is_whole, VALUE_DIM)


@triton.jit
def entries_to_split(view, first_head, start, num_blocks, GROUP: tl.constexpr, TILE: tl.constexpr):
    """All entries but one of each of the blocks start … start + TILE - 1, of a group of heads: [TILE]."""
    block = start + tl.arange(0, TILE)
    mask = block < num_blocks
    count = tl.zeros([TILE], tl.int32)
    for member in range(GROUP):
        pointers = view.offsets + (first_head + member) * (num_blocks + 1) + block
        count += tl.load(pointers + 1, mask=mask, other=0) - tl.load(pointers, mask=mask, other=0)
    return tl.maximum(count - 1, 0)


@triton.jit
def _count_segments_kernel(
    view, segments, first_kv_head, num_blocks, GROUP: tl.constexpr, TILE: tl.constexpr, LENGTHS: tl.constexpr
):
    """`extra` of one key/value head: the length of a segment and the running count of full ones.

    A trained model has blocks that twenty times as many queries choose as the mean one, and the program that takes all
    of them ends long after the others. So the length is the shortest of longest / 2, / 4, … with whose segments the
    head's sums still have room.
    """
    local_kv_head = tl.program_id(0)
    extra_ptr = segments.extra_ptr + local_kv_head * (num_blocks + 2)
    first_head = (local_kv_head + first_kv_head).to(tl.int64) * GROUP
    lengths = tl.maximum(segments.longest >> tl.arange(0, LENGTHS), segments.shortest)
    needed = tl.zeros([LENGTHS], tl.int32)
    for start in range(0, num_blocks, TILE):
        entries = entries_to_split(view, first_head, start, num_blocks, GROUP, TILE)
        needed += tl.sum(entries[:, None] // lengths[None, :], 0)
    length = tl.min(tl.where(needed <= segments.count, lengths, segments.longest), 0)
    tl.store(extra_ptr + num_blocks + 1, length)

    total = 0
    for start in range(0, num_blocks, TILE):
        extra = entries_to_split(view, first_head, start, num_blocks, GROUP, TILE) // length
        block = start + tl.arange(0, TILE)
        tl.store(extra_ptr + block, total + tl.cumsum(extra, 0) - extra, mask=block < num_blocks)
        total += tl.sum(extra, 0)
    tl.store(extra_ptr + num_blocks, total)


@triton.jit
def _reduce_segments_kernel(
    segments, d_k_ptr, d_v_ptr, first_kv_head, num_kv_heads, layout, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Add the sums of a split block's segments, the last one first, then in order, and write its dK and dV."""
    SUMS_DIM: tl.constexpr = HEAD_DIM if HEAD_DIM > VALUE_DIM else VALUE_DIM
    item = tl.program_id(0)
    local_kv_head = tl.program_id(2)
    extra_ptr = segments.extra_ptr + local_kv_head * (layout.num_blocks + 2)
    if item >= tl.load(extra_ptr + layout.num_blocks):
        return
    block = last_at_most(extra_ptr, layout.num_blocks, item, 1, 0)
    if tl.load(extra_ptr + block) != item:
        return
    row, first_key, size, _, _, _ = block_span(block, layout, BLOCK_SIZE)
    key_in_block = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    mask = key_in_block < BLOCK_SIZE
    sums_ptr = segments.sums_ptr + local_kv_head.to(tl.int64) * 4 * segments.count * BLOCK_SIZE * SUMS_DIM
    sums_row = (segments.count + item).to(tl.int64) * 2 * BLOCK_SIZE + key_in_block
    d_k = load_rows(sums_ptr, sums_row * SUMS_DIM, mask, HEAD_DIM)
    d_v = load_rows(sums_ptr, (sums_row + BLOCK_SIZE) * SUMS_DIM, mask, VALUE_DIM)
    for segment in range(item, tl.load(extra_ptr + block + 1)):
        sums_row = tl.full([], segment, tl.int64) * 2 * BLOCK_SIZE + key_in_block
        d_k += load_rows(sums_ptr, sums_row * SUMS_DIM, mask, HEAD_DIM)
        d_v += load_rows(sums_ptr, (sums_row + BLOCK_SIZE) * SUMS_DIM, mask, VALUE_DIM)
    key = first_key + key_in_block
    mask = key_in_block < size
    out_row = (tl.full([], row, tl.int64) * layout.num_keys + key) * num_kv_heads + first_kv_head + local_kv_head
    store_rows(d_k_ptr, out_row * HEAD_DIM, d_k, mask, HEAD_DIM)
    store_rows(d_v_ptr, out_row * VALUE_DIM, d_v, mask, VALUE_DIM)
