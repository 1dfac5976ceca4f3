"""The selection kernel: scores of a tile of queries against streamed block means, and the blocks that score highest.

Of a row's slots, `num_scored_slots` go to the blocks that score highest. The kernel streams the block means twice and
keeps no scores. Scores that are not of means lie in memory (block_scores.py), as they cost a product a token: it then
streams these twice instead.

1. *Threshold.* The least score that finds a slot, of every row. Columns of a tile fall into W classes; each class keeps
   its largest scores in sorting networks (top_values.py), and the classes are merged at the end. Rows with more slots
   than such lists hold search the threshold by bisection, counting scores in one pass a bit.
2. *Collection.* The same products again, so the same scores bit for bit. A score that reaches the threshold sets a bit
   of its row's string (bit_strings.py); a slot takes the block of the bit that has its rank, so block numbers leave in
   ascending order. Of scores equal to the threshold only as many count as there are slots left, lowest block first.

So a selection depends on the scores alone, never on tile sizes.

Letters: M queries of a tile, W = COLUMNS; others in device.py. Two tuples are passed around:
- `queries`: their tile [M, TILE_D], the pointers it was loaded from, which rows exist [M, 1], and what 16 bits did not
  hold of the tile, twice, or None. For fp32, TILE_D < D, as products of all D dims would unroll into too much code;
  the other dims are loaded when needed. With HEAD_DIM = 0, of scores in memory: where those of global block 0 lie
  [M, 1], elements from block to block, and which rows exist.
- `candidates`: low, high [M, 1], a row's candidates being blocks low … high - 1; begin, end, the blocks that any row
  needs; inner_low, inner_high, those that no row masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moba.backends.triton.bit_strings import bit_at_rank_of_four, num_bits
from moba.backends.triton.device import LOWEST_SCORE, locate_queries
from moba.backends.triton.top_values import fold_columns, merge_columns, merge_lists, pieces, sorted_list

# Blocks of a tile: the bits of a string.
TILE_N = tl.constexpr(64)
# Classes of a tile's columns. A matrix product leaves columns that are equal modulo 8 in one thread.
COLUMNS = tl.constexpr(8)
BITS = tl.constexpr(8)


@triton.jit
def _tile_blocks():
    """Blocks [TILE_N] of a tile's columns, from its first: those of one class are adjacent."""
    column = tl.arange(0, TILE_N)
    return (column % COLUMNS) * BITS + column // COLUMNS


@triton.jit
def _mean_scores(queries, means_ptr, start, candidates, HEAD_DIM: tl.constexpr):
    """`_scores` by block means."""
    q, q_pointers, is_query, rest, rest_of_rest = queries
    low, high, _, _, inner_low, inner_high = candidates
    blocks = _tile_blocks()
    dims = tl.arange(0, q.shape[1])
    pointers = means_ptr + tl.cast(start, tl.int64) * HEAD_DIM + (blocks[:, None] * HEAD_DIM + dims[None, :])
    if q.shape[1] >= HEAD_DIM:
        if q.shape[1] == HEAD_DIM:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        if rest is not None:
            scores = tl.dot(rest_of_rest, tl.trans(tile), input_precision="ieee")
            scores = tl.dot(rest, tl.trans(tile), acc=scores, input_precision="ieee")
            scores = tl.dot(q, tl.trans(tile), acc=scores, input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(tile), input_precision="ieee")
    else:
        scores = tl.zeros([q.shape[0], TILE_N], tl.float32)
        for first_dim in range(0, HEAD_DIM, q.shape[1]):
            is_dim = (first_dim + dims < HEAD_DIM)[None, :]
            part = tl.load(q_pointers + first_dim, mask=is_query & is_dim, other=0.0)
            tile = tl.load(pointers + first_dim, mask=is_dim, other=0.0)
            scores = tl.dot(part, tl.trans(tile), acc=scores, input_precision="ieee")
    scores = tl.maximum(scores, LOWEST_SCORE)
    if (start < inner_low) | (start + TILE_N > inner_high):
        block = start + blocks[None, :]
        scores = tl.where((block >= low) & (block < high), scores, float("-inf"))
    return scores


@triton.jit
def _scores(queries, means_ptr, start, candidates, HEAD_DIM: tl.constexpr):
    """Scores [M, TILE_N] of blocks start … start + TILE_N - 1, columns as in `_tile_blocks`; -inf where masked."""
    if HEAD_DIM == 0:
        pointers, stride, _, _, _ = queries
        low, high, _, _, _, _ = candidates
        blocks = _tile_blocks()[None, :]
        is_candidate = (start + blocks >= low) & (start + blocks < high)
        pointers += tl.cast(start, tl.int64) * stride + blocks * stride
        scores = tl.maximum(tl.load(pointers, mask=is_candidate, other=0.0), LOWEST_SCORE)
        scores = tl.where(is_candidate, scores, float("-inf"))
    else:
        scores = _mean_scores(queries, means_ptr, start, candidates, HEAD_DIM)
    return scores


@triton.jit
def _largest_scores(queries, means_ptr, candidates, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr):
    """The list of every row's LENGTH largest scores: LENGTH tensors [M, W / 2] of equal columns."""
    COUNT: tl.constexpr = min(LENGTH, BITS)
    _, _, begin, end, _, _ = candidates
    largest = (tl.full([queries[0].shape[0], COLUMNS], float("-inf"), tl.float32),) * LENGTH
    for start in range(begin, end, TILE_N):
        scores = _scores(queries, means_ptr, start, candidates, HEAD_DIM)
        tile = sorted_list(pieces(scores, COUNT), COUNT)
        tile = fold_columns(tile, COUNT, TILE_N // COUNT, COLUMNS)
        largest = merge_lists(largest, tile, LENGTH, COUNT)
    return merge_columns(largest, LENGTH, COLUMNS)


@triton.jit
def _pick_threshold(largest, num_scored_slots, LENGTH: tl.constexpr):
    """From rows' lists: the threshold, how many slots go to scores equal to it [M, 1]; whether any has more equal."""
    threshold = tl.full(largest[0].shape, LOWEST_SCORE, tl.float32)
    following = tl.full(largest[0].shape, float("-inf"), tl.float32)
    for i in tl.static_range(LENGTH):
        threshold = tl.where(num_scored_slots == i + 1, tl.maximum(largest[i], LOWEST_SCORE), threshold)
        following = tl.where(num_scored_slots == i, largest[i], following)
    num_above = tl.zeros(largest[0].shape, tl.int32)
    for i in tl.static_range(LENGTH):
        num_above += (largest[i] > threshold).to(tl.int32)
    is_tied = tl.max((following == threshold).to(tl.int32)) > 0
    return tl.max(threshold, 1, keep_dims=True), num_scored_slots - tl.max(num_above, 1, keep_dims=True), is_tied


@triton.jit
def _float_of_rank(rank):
    """The fp32 number of a rank among the ordered bit patterns (int32, negative numbers below 0)."""
    return tl.where(rank >= 0, rank, rank ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _bisect_threshold(queries, means_ptr, candidates, num_scored_slots, HEAD_DIM: tl.constexpr):
    """Rows' thresholds, and how many slots go to scores equal to them [M, 1]: one pass a bit."""
    _, _, begin, end, _, _ = candidates
    lower = tl.full([queries[0].shape[0], 1], -0x7F800000, tl.int64)
    upper = tl.full([queries[0].shape[0], 1], 0x7F800000, tl.int64)
    num_above = tl.zeros([queries[0].shape[0], 1], tl.int32)
    # 32 bits, and one pass more: `middle` then stands just above the threshold found.
    for _ in range(33):
        middle = lower + (upper - lower) // 2 + 1
        bound = _float_of_rank(middle.to(tl.int32))
        count = tl.zeros([queries[0].shape[0], 1], tl.int32)
        for start in range(begin, end, TILE_N):
            scores = _scores(queries, means_ptr, start, candidates, HEAD_DIM)
            count += tl.sum((scores >= bound).to(tl.int32), axis=1, keep_dims=True)
        is_open = lower < upper
        num_above = tl.where(is_open, num_above, count)
        lower = tl.where(is_open & (count >= num_scored_slots), middle, lower)
        upper = tl.where(is_open & (count < num_scored_slots), middle - 1, upper)
    return _float_of_rank(lower.to(tl.int32)), num_scored_slots - num_above


@triton.jit
def _row_strings(flags):
    """Strings [M, 1] of the flags of a tile: BITS tensors [M, W], where flag i of class c is block c · BITS + i."""
    word = flags[0].to(tl.int32)
    for i in tl.static_range(1, BITS):
        word = word | tl.where(flags[i], 1 << i, 0)
    first_bit = (tl.arange(0, COLUMNS) * BITS)[None, :]
    word = word.to(tl.uint32) << (first_bit % 32).to(tl.uint32)
    low = tl.sum(tl.where(first_bit < 32, word, 0), axis=1, keep_dims=True)
    high = tl.sum(tl.where(first_bit < 32, 0, word), axis=1, keep_dims=True)
    return low.to(tl.uint64) | high.to(tl.uint64) << 32


@triton.jit
def _blocks_at_ranks(
    queries, means_ptr, candidates, threshold, bound, has_bound, ranks, ONLY_EQUAL: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Of the blocks whose score reaches the threshold, those of the given ranks in block order.

    Args:
        threshold, bound: [M, 1]. Scores that equal the threshold count only in blocks below `bound`, if has_bound.
        ranks: int32 [M, P].
        ONLY_EQUAL: count only scores that equal the threshold.

    Returns:
        int32 [M, P], `end` where there is none; int32 [M, 1], how many blocks there are in all.
    """
    _, _, begin, end, _, _ = candidates
    found = tl.zeros_like(ranks) + end
    num_passed = tl.zeros_like(threshold).to(tl.int32)
    # Finding a rank costs more than packing a string: it waits for four tiles.
    empty = tl.zeros(threshold.shape, tl.uint64)
    # Each its own value: Triton 3.6 does not carry a variable through a loop that is handed on to an identical one.
    first = tl.zeros(threshold.shape, tl.uint64)
    second = tl.zeros(threshold.shape, tl.uint64)
    third = tl.zeros(threshold.shape, tl.uint64)
    fourth = tl.zeros(threshold.shape, tl.uint64)
    for start in range(begin, end, TILE_N):
        scores = _scores(queries, means_ptr, start, candidates, HEAD_DIM)
        if has_bound:
            is_surplus = (scores == threshold) & (start + _tile_blocks()[None, :] >= bound)
            scores = tl.where(is_surplus, float("-inf"), scores)
        by_bit = pieces(scores, BITS)
        flags = by_bit[:0]
        for i in tl.static_range(BITS):
            flags += (by_bit[i] == threshold if ONLY_EQUAL else by_bit[i] >= threshold,)
        first = second
        second = third
        third = fourth
        fourth = _row_strings(flags)
        if ((start - begin) // TILE_N % 4 == 3) | (start + TILE_N >= end):
            rank = ranks - num_passed
            num_passed += num_bits(first) + num_bits(second) + num_bits(third) + num_bits(fourth)
            block = start - 3 * TILE_N + bit_at_rank_of_four(first, second, third, fourth, rank)
            found = tl.where((rank >= 0) & (ranks < num_passed), block, found)
            first = empty
            second = empty
            third = empty
            fourth = empty
    return found, num_passed


class OpenRows(NamedTuple):
    """Queries that `_select_once_kernel` left open: int32 [R, H], how many; int32 [R, H, T], which, in any order."""

    counts: Any
    tokens: Any


@triton.jit
def row_candidates(row, token, layout, block_size, keep_first, keep_recent):
    """Of queries [M]: own block, their sequence's first, how many first and recent ones are kept; `candidates`."""
    own, first_block = locate_queries(row, token, layout, block_size)
    num_first = tl.minimum(keep_first, tl.maximum(own, 0))
    num_recent = tl.minimum(keep_recent, tl.maximum(own, 0) - num_first)
    low = first_block + num_first
    high = first_block + tl.maximum(own, 0) - num_recent
    begin = tl.min(tl.where(high > low, low, layout.num_blocks))
    end = tl.max(tl.where(high > low, high, 0))
    candidates = (low[:, None], high[:, None], begin, end, tl.max(low), tl.min(high))
    return own, first_block, num_first, num_recent, candidates


@triton.jit
def store_kept(indices_base, own, num_first, num_recent, scored_end, topk, is_query):
    """Store the slots that scores do not decide: the first blocks, and from slot `scored_end` [M] what follows."""
    for first_slot in range(0, topk, 16):
        slot = first_slot + tl.arange(0, 16)[None, :]
        behind = slot - scored_end[:, None]
        last = tl.where(behind <= num_recent[:, None], (own - num_recent)[:, None] + behind, -1)
        value = tl.where(slot < num_first[:, None], slot, last)
        value = tl.where(own[:, None] < 0, -1, value)
        is_open = (slot < num_first[:, None]) | (behind >= 0)
        tl.store(indices_base[:, None] + slot, value, mask=is_open & (slot < topk) & is_query)


@triton.jit
def _summed(pointers, mask, stride_h, group, factor):
    """factor · the sum over `group` heads of 16-bit queries, as three tensors of their dtype that add up to it.

    Scores are linear in a query, so these are the sums of the heads' scores. The fp32 sum has 24 bits, each tensor 8 or
    11 of them; a power of two as the factor is exact and keeps fp16 from overflowing.
    """
    total = tl.zeros(pointers.shape, tl.float32)
    for member in range(group):
        total += tl.load(pointers + tl.cast(member, tl.int64) * stride_h, mask=mask, other=0.0).to(tl.float32)
    total *= factor
    dtype: tl.constexpr = pointers.dtype.element_ty
    high = total.to(dtype)
    # inf - inf is not a number.
    total = tl.where(high.to(tl.float32) == total, 0.0, total - high.to(tl.float32))
    rest = total.to(dtype)
    return high, rest, (total - rest.to(tl.float32)).to(dtype)


@triton.jit
def _select_kernel(
    q, means, scores, indices_ptr, layout, block_size, topk, keep_first, keep_recent, open_rows, first_query,
    num_tiles, heads_per_kv_head, factor,
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr, LENGTH: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Program (tile of a row, head) routes TILE_M queries, `first_query` being the first tile's first.

    LENGTH is that of the lists, 0 for bisection. Either q and means are given, or scores, and HEAD_DIM is 0. With
    `factor`, see `_summed`, `head` is a key/value head, whose query heads choose together. With `open_rows`, only these
    are routed.
    """
    row = tl.program_id(0) // num_tiles
    # The last tiles have the most candidates: they start first.
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    query_in_chunk = tile * TILE_M + tl.arange(0, TILE_M)
    num_heads = tl.num_programs(1)
    if open_rows.counts is not None:
        count = tl.load(open_rows.counts + row * num_heads + head)
        if tile * TILE_M >= count:
            return
        tokens = open_rows.tokens + (row * num_heads + head).to(tl.int64) * layout.num_queries
        query_in_chunk = tl.load(tokens + query_in_chunk, mask=query_in_chunk < count, other=layout.num_queries)
    token = first_query + query_in_chunk
    own, first_block, num_first, num_recent, candidates = row_candidates(
        row, token, layout, block_size, keep_first, keep_recent
    )
    low, high = candidates[:2]
    num_scored_slots = topk - 1 - keep_first - keep_recent

    is_query = (token < layout.num_queries)[:, None]
    if HEAD_DIM == 0:
        scores_ptr = scores.ptr + (row * num_heads + head).to(tl.int64) * scores.stride_r
        scores_ptr -= row.to(tl.int64) * layout.blocks_per_row * scores.stride_n
        queries = (scores_ptr + query_in_chunk[:, None], scores.stride_n, is_query, None, None)
        means_ptr = None
    else:
        dims = tl.arange(0, TILE_D)
        q_base = q.ptr + row.to(tl.int64) * q.stride_r
        kv_head = head
        if factor is not None:
            q_base += head.to(tl.int64) * heads_per_kv_head * q.stride_h
        else:
            q_base += head.to(tl.int64) * q.stride_h
            kv_head = head // heads_per_kv_head
        q_pointers = q_base + token.to(tl.int64)[:, None] * q.stride_t + dims[None, :]
        q_mask = is_query & (dims < HEAD_DIM)[None, :]
        if factor is not None:
            q_tile, rest, rest_of_rest = _summed(q_pointers, q_mask, q.stride_h, heads_per_kv_head, factor)
            queries = (q_tile, q_pointers, is_query, rest, rest_of_rest)
        else:
            queries = (tl.load(q_pointers, mask=q_mask, other=0.0), q_pointers, is_query, None, None)
        means_ptr = means.ptr + kv_head.to(tl.int64) * means.stride_g

    threshold = tl.full([TILE_M, 1], LOWEST_SCORE, tl.float32)
    bound = tl.zeros([TILE_M, 1], tl.int32)
    has_ties = False
    if tl.max(high - low) > num_scored_slots:
        if LENGTH == 0:
            threshold, num_equal = _bisect_threshold(queries, means_ptr, candidates, num_scored_slots, HEAD_DIM)
            has_ties = True
        else:
            largest = _largest_scores(queries, means_ptr, candidates, HEAD_DIM, LENGTH)
            threshold, num_equal, has_ties = _pick_threshold(largest, num_scored_slots, LENGTH)
        if has_ties:
            # The first block of an equal score that finds no slot.
            bound, _ = _blocks_at_ranks(
                queries, means_ptr, candidates, threshold, bound, False, num_equal, True, HEAD_DIM
            )

    SLOTS: tl.constexpr = LENGTH if LENGTH > 0 else 16
    indices_base = indices_ptr + ((row.to(tl.int64) * layout.num_queries + token) * num_heads + head) * topk
    num_taken = tl.zeros([TILE_M, 1], tl.int32)
    for first_slot in range(0, num_scored_slots, SLOTS):
        slots = tl.zeros([TILE_M, SLOTS], tl.int32) + first_slot + tl.arange(0, SLOTS)[None, :]
        found, num_taken = _blocks_at_ranks(
            queries, means_ptr, candidates, threshold, bound, has_ties, slots, False, HEAD_DIM
        )  # fmt: skip
        pointers = (indices_base + num_first)[:, None] + slots
        tl.store(pointers, found - first_block[:, None], mask=slots < num_taken)

    store_kept(indices_base, own, num_first, num_recent, num_first + tl.sum(num_taken, axis=1), topk, is_query)
