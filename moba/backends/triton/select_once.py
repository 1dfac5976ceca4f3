"""Selection by one pass over the block means, for so many blocks that their scores are what selecting costs.

`_select_kernel` computes all scores twice, as a sorted list of scores does not say whose they are. Here each score's
lowest mantissa bits are replaced by the number of its *piece*, CLASSES adjacent blocks: one list of such *keys* holds
both. Blocks of a piece fall into CLASSES, each of which keeps a list of its LIST largest keys.

That decides all rows but few, which are left open; `_select_kernel` routes these. A row is open

- if the score of its last slot and the next one differ in the replaced bits alone, as equal ones do, or are zeros;
- if one class holds LIST scores that find slots, since it may have lost another one;
- if a score is not finite, or so low that it cannot be told from a masked one.

So a selection is that of `_select_kernel`, and none depends on the order in which rows are listed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.device import LOWEST_LOGIT, LOWEST_SCORE
from moba.backends.triton.select import TILE_N, row_candidates, store_kept
from moba.backends.triton.top_values import list_halves, merge_columns, merge_lists, odd_even_merge, pieces, sorted_list

CLASSES = tl.constexpr(16)
LIST = tl.constexpr(4)


@triton.jit
def _list_of(tensors, COUNT: tl.constexpr):
    """The list of the LIST largest of COUNT >= LIST unordered tensors."""
    if COUNT == LIST:
        result = sorted_list(tensors, LIST)
    else:
        first = _list_of(tensors[: COUNT // 2], COUNT // 2)
        result = merge_lists(first, _list_of(tensors[COUNT // 2 :], COUNT // 2), LIST, LIST)
    return result


@triton.jit
def _row_list(lists, LENGTH: tl.constexpr):
    """One list of LENGTH, LIST or twice that, from those of a row's classes: tensors [M, 4] of equal columns."""
    first, last = list_halves(lists, LIST)
    merged = merge_lists(first, last, LIST, LIST) if LENGTH == LIST else odd_even_merge(first, last, LIST)
    return merge_columns(merged, LENGTH, CLASSES // 2)


@triton.jit
def _select_once_kernel(
    q, means, indices_ptr, open_rows, layout, block_size, topk, keep_first, keep_recent, num_tiles, heads_per_kv_head,
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr, LENGTH: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Program (tile of a row, head) routes TILE_M queries of 16 bits, and lists those that it leaves open.

    LENGTH is that of a row's list, above `num_scored_slots`.
    """
    row = tl.program_id(0) // num_tiles
    # The last tiles have the most candidates: they start first.
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    token = tile * TILE_M + tl.arange(0, TILE_M)
    is_query = (token < layout.num_queries)[:, None]
    own, first_block, num_first, num_recent, candidates = row_candidates(
        row, token, layout, block_size, keep_first, keep_recent
    )
    low, high, begin, end, inner_low, inner_high = candidates
    num_scored_slots = topk - 1 - keep_first - keep_recent

    dims = tl.arange(0, TILE_D)
    q_base = q.ptr + row.to(tl.int64) * q.stride_r + head.to(tl.int64) * q.stride_h
    q_pointers = q_base + token.to(tl.int64)[:, None] * q.stride_t + dims[None, :]
    q_tile = tl.load(q_pointers, mask=is_query & (dims < HEAD_DIM)[None, :], other=0.0)
    columns = tl.arange(0, TILE_N)
    means_ptr = means.ptr + (head // heads_per_kv_head).to(tl.int64) * means.stride_g
    means_ptrs = means_ptr + (columns[:, None] * HEAD_DIM + dims[None, :])

    COUNT: tl.constexpr = TILE_N // CLASSES
    # As many low bits as the largest code, (end - begin) / CLASSES, has.
    last_code = tl.maximum(tl.cdiv(end - begin, TILE_N) * COUNT, 1)
    num_bits = (last_code.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    kept_bits = tl.full([], -1, tl.int32) << num_bits
    nothing = tl.full([TILE_M, CLASSES], float("-inf"), tl.float32)
    largest = (nothing,) * 4
    not_finite = tl.zeros([TILE_M, CLASSES], tl.float32)
    num_candidates = tl.maximum(high - low, 0)
    for start in range(begin, end, TILE_N):
        pointers = means_ptrs + tl.cast(start, tl.int64) * HEAD_DIM
        if TILE_D == HEAD_DIM:
            block_means = tl.load(pointers)
        else:
            block_means = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q_tile, tl.trans(block_means), input_precision="ieee")
        if (start < inner_low) | (start + TILE_N > inner_high):
            block = start + columns[None, :]
            # One comparison of unsigned numbers: predicates are few.
            is_candidate = (block - low).to(tl.uint32) < num_candidates.to(tl.uint32)
            scores = tl.where(is_candidate, scores, LOWEST_SCORE)
        code = (start - begin) // CLASSES
        of_classes = pieces(scores, COUNT)
        keys = of_classes[:0]
        for i in tl.static_range(COUNT):
            not_finite += of_classes[i] * 0.0
            bits = of_classes[i].to(tl.int32, bitcast=True)
            keys += (((bits & kept_bits) | (code + i)).to(tl.float32, bitcast=True),)
        largest = merge_lists(largest, _list_of(keys, COUNT), LIST, LIST)

    row_list = _row_list(largest, LENGTH)
    num_taken = tl.minimum(num_candidates, num_scored_slots)
    last = tl.full(row_list[0].shape, float("inf"), tl.float32)
    following = tl.full(row_list[0].shape, float("-inf"), tl.float32)
    num_real = tl.zeros(row_list[0].shape, tl.int32)
    for i in tl.static_range(LENGTH):
        last = tl.where(num_taken == i + 1, row_list[i], last)
        following = tl.where(num_taken == i, row_list[i], following)
        num_real += (row_list[i] > LOWEST_LOGIT).to(tl.int32)
    last_bits, following_bits = last.to(tl.int32, bitcast=True), following.to(tl.int32, bitcast=True)
    # Zeros are equal whatever their signs.
    is_zero = ((last_bits | following_bits) & kept_bits & 0x7FFFFFFF) == 0
    is_tied = (((last_bits ^ following_bits) & kept_bits) == 0) | is_zero
    is_open = ((num_candidates > num_scored_slots) & is_tied) | (num_real < num_taken)
    is_open = tl.max(is_open.to(tl.int32), axis=1, keep_dims=True)
    last = tl.max(last, axis=1, keep_dims=True)
    is_doubtful = not_finite != not_finite
    if LIST < LENGTH:
        is_doubtful = is_doubtful | (largest[LIST - 1] >= last)
    is_open = is_open | tl.max(is_doubtful.to(tl.int32), axis=1, keep_dims=True)

    # Numbers of the blocks whose keys find slots, negative, in a list: in ascending order.
    classes = tl.arange(0, CLASSES)[None, :]
    blocks = row_list[:0]
    for i in tl.static_range(LIST):
        block = begin + (largest[i].to(tl.int32, bitcast=True) & ~kept_bits) * CLASSES + classes
        blocks += (tl.where(largest[i] >= last, -block, -0x7FFFFFFF),)
    blocks = _row_list(sorted_list(blocks, LIST), LENGTH)
    indices_base = indices_ptr + ((row.to(tl.int64) * layout.num_queries + token) * num_heads + head) * topk
    WIDTH: tl.constexpr = CLASSES // 4
    copy = tl.arange(0, WIDTH)[None, :]
    for first_slot in tl.static_range(0, LENGTH, WIDTH):
        found = blocks[first_slot]
        for i in tl.static_range(1, WIDTH):
            found = tl.where(copy == i, blocks[first_slot + i], found)
        slots = first_slot + copy
        pointers = (indices_base + num_first)[:, None] + slots
        tl.store(pointers, -found - first_block[:, None], mask=(slots < num_taken) & is_query)
    scored_end = num_first + tl.sum(num_taken, axis=1)
    store_kept(indices_base, own, num_first, num_recent, scored_end, topk, is_query)

    is_open = tl.sum(tl.where(is_query & (num_taken > 0), is_open, 0), axis=1)
    num_open = tl.sum(is_open)
    if num_open > 0:
        row_head = (row * num_heads + head).to(tl.int64)
        begin_open = tl.atomic_add(open_rows.counts + row_head, num_open)
        rank = begin_open + tl.cumsum(is_open) - is_open
        tl.store(open_rows.tokens + row_head * layout.num_queries + rank, token, mask=is_open > 0)
