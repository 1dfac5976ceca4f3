"""The selection kernel: scores of a tile of queries against streamed block means, and the blocks that score highest.

A row has `places` for scored blocks. The kernel streams the block means twice and keeps no scores:

1. *Threshold.* The places-th largest score of every row. Scores of a tile are kept apart in COLUMNS column classes; each
   keeps its largest values in sorting networks (top_values.py), and the classes are merged at the end. Rows with more
   places than those lists hold search the threshold by bisection, counting scores in one pass a bit.
2. *Collection.* The same products again, so the same scores bit for bit. Every score that reaches the threshold sets a
   bit; the bits of a class are adjacent blocks, so block numbers leave in ascending order. Of scores that equal the
   threshold, only as many as there are places left are taken, lowest block first.

So a selection depends on the scores alone, never on tile sizes.

Letters: M queries of a tile, C its blocks, W = COLUMNS. See also primitives.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moba.backends.triton.primitives import query_places
from moba.backends.triton.bit_strings import bit_at_rank, byte_sums, row_strings, total_bits
from moba.backends.triton.top_values import fold_columns, merge_lists, pieces, share_columns, sorted_list

# Classes that a tile's columns fall into. A matrix product leaves columns that are equal modulo 8 in one thread.
COLUMNS = tl.constexpr(8)
# Scores that are NaN or below count as this, which any candidate reaches and masked places (-inf) do not.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tile_blocks(start, TILE_N: tl.constexpr):
    """Blocks [TILE_N] of a tile's columns: those that are equal modulo W hold adjacent blocks."""
    column = tl.arange(0, TILE_N)
    return start + (column % COLUMNS) * (TILE_N // COLUMNS) + column // COLUMNS


@triton.jit
def _scores(
    q,
    means_ptr,
    means_stride_n,
    start,
    low,
    high,
    inner_low,
    inner_high,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Scores [M, TILE_N] of blocks start … start + TILE_N - 1; -inf for blocks outside low … high - 1 of their row.

    Columns are as in `_tile_blocks`. No row masks blocks of inner_low … inner_high - 1.
    """
    blocks = _tile_blocks(start, TILE_N)
    dims = tl.arange(0, PADDED_DIM)
    loaded = tl.minimum(blocks, num_blocks - 1).to(tl.int64)
    pointers = means_ptr + loaded[:, None] * means_stride_n + dims[None, :]
    if HEAD_DIM == PADDED_DIM:
        means = tl.load(pointers)
    else:
        means = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    scores = tl.maximum(tl.dot(q, tl.trans(means), input_precision="ieee"), LOWEST)
    if (start < inner_low) | (start + TILE_N > inner_high):
        is_candidate = (blocks[None, :] >= low[:, None]) & (blocks[None, :] < high[:, None])
        scores = tl.where(is_candidate, scores, float("-inf"))
    return scores


@triton.jit
def _largest_scores(
    q,
    means_ptr,
    means_stride_n,
    low,
    high,
    begin,
    end,
    inner_low,
    inner_high,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The list of every row's LENGTH largest scores: LENGTH tensors [M, W] of equal columns."""
    largest = ()
    for _ in tl.static_range(LENGTH):
        largest = largest + (tl.full([TILE_M, COLUMNS], float("-inf"), tl.float32),)
    for start in range(begin, end, TILE_N):
        scores = _scores(
            q, means_ptr, means_stride_n, start, low, high, inner_low, inner_high, num_blocks,
            HEAD_DIM, PADDED_DIM, TILE_N,
        )  # fmt: skip
        tile = sorted_list(pieces(scores, LENGTH), LENGTH)
        tile = fold_columns(tile, LENGTH, TILE_N // LENGTH, COLUMNS)
        largest = merge_lists(largest, tile, LENGTH)
    return share_columns(largest, LENGTH, COLUMNS, 1)


@triton.jit
def _pick_threshold(largest, places, TILE_M: tl.constexpr, LENGTH: tl.constexpr):
    """From a row's list: its places-th score, how many of the places go to equal ones, whether more are equal."""
    threshold = tl.full([TILE_M, COLUMNS], LOWEST, tl.float32)
    following = tl.full([TILE_M, COLUMNS], float("-inf"), tl.float32)
    for i in tl.static_range(LENGTH):
        threshold = tl.where(places == i + 1, tl.maximum(largest[i], LOWEST), threshold)
        following = tl.where(places == i, largest[i], following)
    num_above = tl.zeros([TILE_M, COLUMNS], tl.int32)
    for i in tl.static_range(LENGTH):
        num_above += (largest[i] > threshold).to(tl.int32)
    is_tied = tl.max((following == threshold).to(tl.int32)) > 0
    return tl.max(threshold, 1, keep_dims=True), places - tl.max(num_above, 1, keep_dims=True), is_tied


@triton.jit
def _float_of_rank(rank):
    """The fp32 number of a rank among the ordered bit patterns (int32, negative numbers below 0)."""
    return tl.where(rank >= 0, rank, rank ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _bisect_threshold(
    q,
    means_ptr,
    means_stride_n,
    low,
    high,
    begin,
    end,
    inner_low,
    inner_high,
    num_blocks,
    places,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The places-th score of every row [M, 1], and how many of the places go to equal ones: one pass a bit."""
    lower = tl.full([TILE_M, 1], -0x7F800000, tl.int64)
    upper = tl.full([TILE_M, 1], 0x7F800000, tl.int64)
    num_above = tl.zeros([TILE_M, 1], tl.int32)
    # 32 bits, and a pass in which `middle` stands just above the threshold found.
    for _ in range(33):
        middle = lower + (upper - lower + 1) // 2
        middle = tl.where(lower == upper, upper + 1, middle)
        bound = _float_of_rank(middle.to(tl.int32))
        count = tl.zeros([TILE_M, 1], tl.int32)
        for start in range(begin, end, TILE_N):
            scores = _scores(
                q, means_ptr, means_stride_n, start, low, high, inner_low, inner_high, num_blocks,
                HEAD_DIM, PADDED_DIM, TILE_N,
            )  # fmt: skip
            count += tl.sum((scores >= bound).to(tl.int32), axis=1, keep_dims=True)
        num_above = tl.where(lower == upper, count, num_above)
        is_reached = (count >= places) & (lower < upper)
        upper = tl.where((lower < upper) & (count < places), middle - 1, upper)
        lower = tl.where(is_reached, middle, lower)
    return _float_of_rank(lower.to(tl.int32)), places - num_above


@triton.jit
def _blocks_at_ranks(
    q,
    means_ptr,
    means_stride_n,
    low,
    high,
    begin,
    end,
    inner_low,
    inner_high,
    num_blocks,
    threshold,
    bound,
    has_bound,
    ranks,
    ONLY_EQUAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Of the blocks whose score reaches the threshold, those of the given ranks in block order.

    Args:
        threshold, bound: [M, 1]. Scores that equal the threshold count only in blocks below `bound`, if has_bound.
        ranks: int32 [M, P].
        ONLY_EQUAL: take only scores that equal the threshold.

    Returns:
        int32 [M, P], num_blocks where there is none; int32 [M, 1], how many blocks there are in all.
    """
    BITS: tl.constexpr = TILE_N // COLUMNS
    found = tl.zeros_like(ranks) + num_blocks
    num_passed = tl.zeros_like(threshold).to(tl.int32)
    for start in range(begin, end, TILE_N):
        scores = _scores(
            q, means_ptr, means_stride_n, start, low, high, inner_low, inner_high, num_blocks,
            HEAD_DIM, PADDED_DIM, TILE_N,
        )  # fmt: skip
        if has_bound:
            is_surplus = (scores == threshold) & (_tile_blocks(start, TILE_N)[None, :] >= bound)
            scores = tl.where(is_surplus, float("-inf"), scores)
        by_bit = pieces(scores, BITS)
        flags = ()
        for i in tl.static_range(BITS):
            flags = flags + (by_bit[i] == threshold if ONLY_EQUAL else by_bit[i] >= threshold,)
        head, tail = row_strings(flags, BITS)
        head_sums = byte_sums(head)
        tail_sums = byte_sums(tail)
        head_total = total_bits(head_sums)
        rank = ranks - num_passed
        num_passed += head_total + total_bits(tail_sums)
        in_tail = rank >= head_total
        bit = bit_at_rank(
            tl.where(in_tail, tail, head),
            tl.where(in_tail, tail_sums, head_sums),
            tl.where(in_tail, rank - head_total, rank),
        )
        bit += tl.where(in_tail, 64, 0)
        found = tl.where((rank >= 0) & (ranks < num_passed), start + bit, found)
    return found, num_passed


@triton.jit
def _select_kernel(
    q_ptr,
    means_ptr,
    indices_ptr,
    key_start_ptr,
    key_end_ptr,
    cu_q_ptr,
    cu_k_ptr,
    num_queries,
    num_keys,
    num_sequences,
    blocks_per_row,
    num_blocks,
    block_size,
    topk,
    keep_first,
    keep_recent,
    num_tiles,
    num_heads,
    heads_per_kv_head,
    q_stride_r,
    q_stride_t,
    q_stride_h,
    means_stride_n,
    means_stride_g,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """A program routes TILE_M queries of one head. LENGTH is that of the lists, 0 for bisection."""
    program = tl.program_id(0)
    # The last tiles have the most candidates: they start first.
    tile = num_tiles - 1 - program % num_tiles
    head = (program // num_tiles) % num_heads
    row = program // num_tiles // num_heads
    queries = tile * TILE_M + tl.arange(0, TILE_M)
    own, first_block = query_places(
        row, queries, num_queries, num_keys, key_start_ptr, key_end_ptr, cu_q_ptr, cu_k_ptr, num_sequences,
        blocks_per_row, block_size,
    )  # fmt: skip

    num_first = tl.minimum(keep_first, tl.maximum(own, 0))
    num_recent = tl.minimum(keep_recent, tl.maximum(own, 0) - num_first)
    places = topk - 1 - keep_first - keep_recent
    low = first_block + num_first
    high = first_block + tl.maximum(own, 0) - num_recent
    is_scored = high > low
    begin = tl.min(tl.where(is_scored, low, num_blocks))
    end = tl.max(tl.where(is_scored, high, 0))
    inner_low = tl.max(low)
    inner_high = tl.min(high)

    dims = tl.arange(0, PADDED_DIM)
    q_base = q_ptr + row.to(tl.int64) * q_stride_r + head.to(tl.int64) * q_stride_h
    q_mask = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_base + queries.to(tl.int64)[:, None] * q_stride_t + dims[None, :], mask=q_mask, other=0.0)
    means_base = means_ptr + (head // heads_per_kv_head).to(tl.int64) * means_stride_g

    threshold = tl.full([TILE_M, 1], LOWEST, tl.float32)
    bound = tl.zeros([TILE_M, 1], tl.int32) + num_blocks
    has_ties = False
    if tl.max(high - low) > places:
        if LENGTH == 0:
            threshold, num_equal = _bisect_threshold(
                q, means_base, means_stride_n, low, high, begin, end, inner_low, inner_high, num_blocks, places,
                HEAD_DIM, PADDED_DIM, TILE_M, TILE_N,
            )  # fmt: skip
            has_ties = True
        else:
            largest = _largest_scores(
                q, means_base, means_stride_n, low, high, begin, end, inner_low, inner_high, num_blocks,
                HEAD_DIM, PADDED_DIM, TILE_M, TILE_N, LENGTH,
            )  # fmt: skip
            threshold, num_equal, has_ties = _pick_threshold(largest, places, TILE_M, LENGTH)
        if has_ties:
            # The first block of an equal score that finds no place.
            bound, _ = _blocks_at_ranks(
                q, means_base, means_stride_n, low, high, begin, end, inner_low, inner_high, num_blocks, threshold,
                bound, False, num_equal, True, HEAD_DIM, PADDED_DIM, TILE_N,
            )  # fmt: skip

    SLOTS: tl.constexpr = LENGTH if LENGTH > 0 else 16
    indices_base = indices_ptr + ((row.to(tl.int64) * num_queries + queries) * num_heads + head) * topk
    num_taken = tl.zeros([TILE_M, 1], tl.int32)
    for first_slot in range(0, places, SLOTS):
        slots = tl.zeros([TILE_M, SLOTS], tl.int32) + first_slot + tl.arange(0, SLOTS)[None, :]
        found, num_taken = _blocks_at_ranks(
            q, means_base, means_stride_n, low, high, begin, end, inner_low, inner_high, num_blocks, threshold,
            bound, has_ties, slots, False, HEAD_DIM, PADDED_DIM, TILE_N,
        )  # fmt: skip
        pointers = (indices_base + num_first)[:, None] + slots
        tl.store(pointers, found - first_block[:, None], mask=slots < num_taken)

    num_scored = num_first + tl.sum(num_taken, axis=1)
    for first_slot in range(0, topk, 16):
        slot = first_slot + tl.arange(0, 16)[None, :]
        behind = slot - num_scored[:, None]
        last = tl.where(behind <= num_recent[:, None], (own - num_recent)[:, None] + behind, -1)
        value = tl.where(slot < num_first[:, None], slot, last)
        value = tl.where(own[:, None] < 0, -1, value)
        is_open = (slot < num_first[:, None]) | (behind >= 0)
        tl.store(indices_base[:, None] + slot, value, mask=is_open & (slot < topk) & (queries < num_queries)[:, None])
