"""Attention of a few queries a row to their selected blocks: partial results block by block, then their merge.

Query heads of one kv head, and queries that follow one another, often choose the same block. A program is started for
every slot of the routing, but of the programs whose query rows chose one block only the first row's goes on: it reads
the block once, for all of them. Blocks of more than PART keys are cut, so that long ones too are read by many programs.

Letters as in decode_select.py. A *tile* is TILE_M of the M query rows that share a row's kv head. A *partial* is the
attention of one query row to one part of one block: its normalised output and its log2-sum-exp, -inf if it has no key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.device import (
    LN_2,
    LOWEST_LOGIT,
    load_rows,
    online_softmax,
    padded_head_dim,
    row_bounds,
    store_rows,
)
from moba.backends.triton.logits import scaled


@triton.jit
def key_offsets(row, start, positions, is_key, x, table, PAGE_SIZE: tl.constexpr):
    """Where the keys of x at positions of a row begin: behind the row's start, or PAGE_SIZE > 0 in their pages."""
    if PAGE_SIZE == 0:
        offsets = tl.cast(row, tl.int64) * x.stride_r + (start + positions).to(tl.int64) * x.stride_t
    else:
        positions = tl.where(is_key, positions, 0)
        page_ptr = table.ptr + tl.cast(row, tl.int64) * table.stride_r
        page = tl.load(page_ptr + positions // PAGE_SIZE, mask=is_key, other=0)
        offsets = page.to(tl.int64) * x.stride_r + (positions % PAGE_SIZE).to(tl.int64) * x.stride_t
    return offsets


@triton.jit
def _decode_attend_kernel(
    q, k, v, indices_ptr, partial_ptr, partial_lse_ptr, step, table, scaling,
    GROUP: tl.constexpr, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, IS_ALONE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Program ((query row of the tile, slot, part), row · G + kv head, tile). IS_ALONE: M = 1."""
    part = tl.program_id(0) % PARTS
    slot = tl.program_id(0) // PARTS % TOPK
    first_member = tl.program_id(0) // (PARTS * TOPK)
    row = tl.program_id(1) // step.num_kv_heads
    kv_head = tl.program_id(1) % step.num_kv_heads
    member = tl.program_id(2) * TILE_M + tl.arange(0, TILE_M)
    query = member // GROUP
    head = kv_head * GROUP + member % GROUP
    is_query = query < step.num_queries
    query_row = ((row * step.num_queries + query) * step.num_kv_heads * GROUP + head).to(tl.int64)
    is_first = tl.arange(0, TILE_M) == first_member
    exists = tl.max((is_first & is_query).to(tl.int32)) > 0
    first_row = tl.sum(tl.where(is_first, query_row, 0))
    start, end = row_bounds(row, step)
    q_offsets = query.to(tl.int64) * q.stride_t + head.to(tl.int64) * q.stride_h
    q_tile = load_rows(q.ptr + tl.cast(row, tl.int64) * q.stride_r, q_offsets, is_query, HEAD_DIM)
    block = tl.load(indices_ptr + first_row * TOPK + slot, mask=exists, other=-1)

    if IS_ALONE:
        slots = tl.zeros([TILE_M], tl.int32) + slot
        chose = is_first
        is_leader = True
    else:
        # One more than the slot in which each query row holds the block, 0 where it does not.
        found = tl.zeros([TILE_M], tl.int32)
        for first_slot in range(0, TOPK, TILE_K):
            some = first_slot + tl.arange(0, TILE_K)
            mask = is_query[:, None] & (some < TOPK)[None, :]
            chosen = tl.load(indices_ptr + query_row[:, None] * TOPK + some[None, :], mask=mask, other=-1)
            found += tl.sum(tl.where(chosen == block, some[None, :] + 1, 0), axis=1)
        chose = (found > 0) & is_query
        slots = found - 1
        is_leader = tl.min(tl.where(chose, tl.arange(0, TILE_M), TILE_M)) == first_member

    if block < 0:
        tl.store(partial_lse_ptr + (first_row * TOPK + slot) * PARTS + part, float("-inf"), mask=exists)
    elif is_leader:
        position = tl.where(chose, end - start - step.num_queries + query, -1)
        first_key = block * BLOCK_SIZE
        begin = part * PART
        stop = tl.minimum(tl.minimum(begin + PART, BLOCK_SIZE), tl.max(position) + 1 - first_key)
        k_ptr = k.ptr + tl.cast(kv_head, tl.int64) * k.stride_h
        v_ptr = v.ptr + tl.cast(kv_head, tl.int64) * v.stride_h
        maximum = tl.full([TILE_M], LOWEST_LOGIT, tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        acc = tl.zeros([TILE_M, padded_head_dim(VALUE_DIM)], tl.float32)
        for first in tl.range(begin, stop, TILE_N, num_stages=NUM_STAGES):
            keys = first + tl.arange(0, TILE_N)
            is_key = keys < stop
            offsets = key_offsets(row, start, first_key + keys, is_key, k, table, PAGE_SIZE)
            k_tile = load_rows(k_ptr, offsets, is_key, HEAD_DIM)
            offsets = key_offsets(row, start, first_key + keys, is_key, v, table, PAGE_SIZE)
            v_tile = load_rows(v_ptr, offsets, is_key, VALUE_DIM)
            logits = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scaling)
            is_visible = is_key[None, :] & ((first_key + keys)[None, :] <= position[:, None])
            logits = tl.where(is_visible, logits, float("-inf"))
            maximum, total, acc = online_softmax(logits, v_tile, maximum, total, acc)
        is_empty = total == 0.0
        outputs = acc * (1.0 / tl.where(is_empty, 1.0, total))[:, None]
        lse = tl.where(is_empty, float("-inf"), maximum + tl.log2(tl.where(is_empty, 1.0, total)))
        partial_row = (query_row * TOPK + slots) * PARTS + part
        store_rows(partial_ptr, partial_row * VALUE_DIM, outputs, chose & ~is_empty, VALUE_DIM)
        tl.store(partial_lse_ptr + partial_row, lse, mask=chose)


@triton.jit
def _decode_merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    NUM_PARTIALS: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_D: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """Program (query row, tile of dims): lse = log Σ exp(lse_p), out = Σ exp(lse_p - lse) · out_p, in a fixed order."""
    query_row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    is_dim = dims < VALUE_DIM
    partial_ptr += query_row * NUM_PARTIALS * VALUE_DIM
    partial_lse_ptr += query_row * NUM_PARTIALS
    largest = tl.full([TILE_P], LOWEST_LOGIT, tl.float32)
    for first in range(0, NUM_PARTIALS, TILE_P):
        index = first + tl.arange(0, TILE_P)
        lse = tl.load(partial_lse_ptr + index, mask=index < NUM_PARTIALS, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    maximum = tl.max(largest)
    total = 0.0
    acc = tl.zeros([TILE_D], tl.float32)
    for first in range(0, NUM_PARTIALS, TILE_P):
        index = first + tl.arange(0, TILE_P)
        lse = tl.load(partial_lse_ptr + index, mask=index < NUM_PARTIALS, other=float("-inf"))
        exists = lse > float("-inf")
        weights = tl.where(exists, tl.exp2(lse - maximum), 0.0)
        pointers = partial_ptr + index.to(tl.int64)[:, None] * VALUE_DIM + dims[None, :]
        partials = tl.load(pointers, mask=exists[:, None] & is_dim[None, :], other=0.0)
        total += tl.sum(weights)
        acc += tl.sum(weights[:, None] * partials, axis=0)
    is_empty = total == 0.0
    safe = tl.where(is_empty, 1.0, total)
    out = acc * (1.0 / safe)
    tl.store(out_ptr + query_row * VALUE_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=is_dim)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + query_row, tl.where(is_empty, float("-inf"), (maximum + tl.log2(safe)) * LN_2))
