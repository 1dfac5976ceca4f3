"""Selection for a few queries a row: scores of block means in one kernel, the blocks that score highest in a second.

Scores are kept as ordered integers (int32, larger is better), so that selecting compares, counts and never rounds. The
score kernel also writes the maximum of every *family* of FAMILY adjacent blocks. The `count` best blocks of a query
lie in its `count` best families, as each of those holds a block that is at least as good; the second kernel therefore
selects families first and then among their blocks, and one program holds all it compares in registers. Ties go to the
lower family and then to the lower block, hence to the lower block. Where even that is too much, it streams the scores.

Letters: R tensor rows, T query tokens, H query heads, G key/value heads, D head dim, K = topk, N = finished blocks that
the tensors can hold. A *query row* is (row · T + query) · H + head. M = T · H / G query rows share a row's kv head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moba.backends.triton.device import LOWEST_SCORE, row_bounds

FAMILY = tl.constexpr(32)
# Most families, and most blocks of selected families, that one program holds.
MAX_HELD = 16384
# So many blocks are selected among at once: selecting families first would take longer.
MAX_AT_ONCE = 1024
# Scores that a program takes at a time where it streams them.
CHUNK = tl.constexpr(4096)
# As LOWEST_SCORE: what NaN and below counts as; masked scores count as less.
LOWEST_KEY = tl.constexpr(-0x7F800000)
NO_KEY = tl.constexpr(-0x80000000)


class Step(NamedTuple):
    """What a step's kernels know of its rows; pointers are None where absent."""

    num_queries: Any
    num_keys: Any
    num_kv_heads: Any
    key_start_ptr: Any
    key_end_ptr: Any


class Table(NamedTuple):
    """A page table [R, pages]; None where keys lie in rows."""

    ptr: Any
    stride_r: Any


@triton.jit
def candidates(own, keep_first, keep_recent):
    """The blocks low … high - 1 that a query with this own block (< 0 for padding) chooses among by score."""
    num_past = tl.maximum(own, 0)
    low = tl.minimum(keep_first, num_past)
    return low, num_past - tl.minimum(keep_recent, num_past - low)


@triton.jit
def own_blocks(position, BLOCK_SIZE: tl.constexpr):
    """Own block of a position, -1 for padding."""
    return tl.where(position >= 0, tl.maximum(position, 0) // BLOCK_SIZE, -1)


@triton.jit
def mean_offsets(row, blocks, is_block, means, table, BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where the means of a row's blocks begin: beside the row, or PAGE_SIZE > 0 under the page of their first key."""
    if PAGE_SIZE == 0:
        offsets = tl.cast(row, tl.int64) * means.stride_r + blocks.to(tl.int64) * means.stride_t
    else:
        first_key = tl.where(is_block, blocks, 0) * BLOCK_SIZE
        page_ptr = table.ptr + tl.cast(row, tl.int64) * table.stride_r
        page = tl.load(page_ptr + first_key // PAGE_SIZE, mask=is_block, other=0)
        block_in_page = first_key % PAGE_SIZE // BLOCK_SIZE
        offsets = page.to(tl.int64) * means.stride_r + block_in_page.to(tl.int64) * means.stride_t
    return offsets


@triton.jit
def _ordered(scores):
    """int32 keys in the order of fp32 scores; both zeros are one, NaN counts as the least number."""
    scores = tl.maximum(scores, LOWEST_SCORE)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _score_kernel(
    q, means, keys_ptr, maxima_ptr, step, table, num_columns, keep_first, keep_recent,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of blocks, row · G + kv head, tile of query rows): their scores and the maxima of families.

    For fp32, TILE_D < D: products of all D dims would unroll into too much code.
    """
    row = tl.program_id(1) // step.num_kv_heads
    kv_head = tl.program_id(1) % step.num_kv_heads
    member = tl.program_id(2) * TILE_M + tl.arange(0, TILE_M)
    query = member // GROUP
    head = kv_head * GROUP + member % GROUP
    is_query = query < step.num_queries
    start, end = row_bounds(row, step)
    own = own_blocks(tl.where(is_query, end - start - step.num_queries + query, -1), BLOCK_SIZE)
    low, high = candidates(own, keep_first, keep_recent)
    last = tl.max(tl.where(high > low, high, 0))

    first_block = tl.program_id(0) * TILE_N
    if first_block < last:
        blocks = first_block + tl.arange(0, TILE_N)
        is_block = blocks < last
        dims = tl.arange(0, TILE_D)
        means_ptr = means.ptr + tl.cast(kv_head, tl.int64) * means.stride_h
        offsets = mean_offsets(row, blocks, is_block, means, table, BLOCK_SIZE, PAGE_SIZE)
        mean_pointers = means_ptr + offsets[:, None] + dims[None, :]
        q_ptr = q.ptr + tl.cast(row, tl.int64) * q.stride_r
        q_offsets = query.to(tl.int64) * q.stride_t + head.to(tl.int64) * q.stride_h
        q_pointers = q_ptr + q_offsets[:, None] + dims[None, :]
        scores = tl.zeros([TILE_N, TILE_M], tl.float32)
        for first_dim in tl.static_range(0, HEAD_DIM, TILE_D):
            is_dim = (first_dim + dims < HEAD_DIM)[None, :]
            mean = tl.load(mean_pointers + first_dim, mask=is_block[:, None] & is_dim, other=0.0)
            q_part = tl.load(q_pointers + first_dim, mask=is_query[:, None] & is_dim, other=0.0)
            scores = tl.dot(mean, tl.trans(q_part), acc=scores, input_precision="ieee")
        is_candidate = (blocks[:, None] >= low[None, :]) & (blocks[:, None] < high[None, :])
        keys = tl.where(is_candidate, _ordered(scores), NO_KEY)

        query_row = ((row * step.num_queries + query) * step.num_kv_heads * GROUP + head).to(tl.int64)
        tl.store(
            keys_ptr + query_row[None, :] * num_columns + blocks[:, None], keys,
            mask=is_query[None, :] & (blocks < num_columns)[:, None],
        )  # fmt: skip
        maxima = tl.max(tl.reshape(keys, [TILE_N // FAMILY, FAMILY, TILE_M]), axis=1)
        families = first_block // FAMILY + tl.arange(0, TILE_N // FAMILY)
        num_families = num_columns // FAMILY
        tl.store(
            maxima_ptr + query_row[None, :] * num_families + families[:, None], maxima,
            mask=is_query[None, :] & (families < num_families)[:, None],
        )  # fmt: skip


@triton.jit
def _ranks_of_largest(keys, need, num_above, num_equal, threshold):
    """Of keys [C], which count as the largest, and each one's rank among these in order of index.

    Args:
        need: how many keys equal to the threshold count, in all. num_above, num_equal: keys before these that are
            above the threshold, and equal to it.

    Returns:
        Flags and ranks [C], then both numbers after these keys.
    """
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    # Two counts in one scan: at most MAX_HELD, fewer than 2^15.
    both = tl.cumsum(above | (equal << 15), axis=0)
    above_so_far = num_above + (both & 0x7FFF)
    equal_so_far = num_equal + (both >> 15)
    taken = (above > 0) | ((equal > 0) & (equal_so_far <= need))
    rank = above_so_far + tl.minimum(equal_so_far, need) - 1
    total = tl.sum(above | (equal << 15))
    return taken, rank, num_above + (total & 0x7FFF), num_equal + (total >> 15)


@triton.jit
def _largest(keys, count):
    """Of keys [C], flags of the `count` largest (of all real ones, if fewer) and their ranks in order of index."""
    # Two bits a step: a step waits for a sum over all threads, and its sums do not wait for one another.
    threshold = NO_KEY
    for i in range(16):
        step = 1 << (30 - 2 * i)
        first = threshold + step
        second = first + step
        third = second + step
        counts = tl.sum((keys >= first).to(tl.int32) | ((keys >= second).to(tl.int32) << 15))
        num_third = tl.sum((keys >= third).to(tl.int32))
        threshold = tl.where((counts & 0x7FFF) >= count, first, threshold)
        threshold = tl.where((counts >> 15) >= count, second, threshold)
        threshold = tl.where(num_third >= count, third, threshold)
    threshold = tl.maximum(threshold, LOWEST_KEY)
    need = count - tl.sum((keys > threshold).to(tl.int32))
    taken, rank, _, _ = _ranks_of_largest(keys, need, 0, 0, threshold)
    return taken, rank


@triton.jit
def _count_reaching(keys_ptr, begin, end, bound):
    """How many of keys begin … end - 1 are at least `bound`."""
    total = 0
    for first in range(begin, end, CHUNK):
        index = first + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + index, mask=index < end, other=NO_KEY)
        total += tl.sum((keys >= bound).to(tl.int32))
    return total


@triton.jit
def _select_streamed(keys_ptr, result_ptr, begin, end, count):
    """Write the numbers of the `count` largest of keys begin … end - 1, ascending: one pass a bit."""
    threshold = tl.where(_count_reaching(keys_ptr, begin, end, 0) >= count, 0, NO_KEY)
    for i in range(31):
        trial = threshold + (1 << (30 - i))
        threshold = tl.where(_count_reaching(keys_ptr, begin, end, trial) >= count, trial, threshold)
    threshold = tl.maximum(threshold, LOWEST_KEY)
    need = count - _count_reaching(keys_ptr, begin, end, threshold + 1)
    num_above = 0
    num_equal = 0
    for first in range(begin, end, CHUNK):
        index = first + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + index, mask=index < end, other=NO_KEY)
        taken, rank, num_above, num_equal = _ranks_of_largest(keys, need, num_above, num_equal, threshold)
        tl.store(result_ptr + rank, index, mask=taken)


@triton.jit
def _select_held(keys_ptr, maxima_ptr, result_ptr, scratch_ptr, low, high, count, FAMILIES: tl.constexpr,
                 SLOTS: tl.constexpr):  # fmt: skip
    """The same, of blocks low … high - 1, by families. SLOTS >= count, or SLOTS = FAMILIES: all are looked into."""
    num_families = tl.cdiv(high, FAMILY)
    slot = tl.arange(0, SLOTS)
    if FAMILIES > SLOTS:
        family = tl.arange(0, FAMILIES)
        maxima = tl.load(maxima_ptr + family, mask=family < num_families, other=NO_KEY)
        taken, rank = _largest(maxima, count)
        tl.store(scratch_ptr + rank, family, mask=taken)
        tl.debug_barrier()
        num_taken = tl.minimum(count, num_families - low // FAMILY)
        family = tl.load(scratch_ptr + slot, mask=slot < num_taken, other=-1)
        tl.debug_barrier()
    else:
        family = tl.where(slot < num_families, slot, -1)
    blocks = family[:, None] * FAMILY + tl.arange(0, FAMILY)[None, :]
    keys = tl.load(keys_ptr + blocks, mask=(family >= 0)[:, None], other=NO_KEY)
    taken, rank = _largest(tl.reshape(keys, [SLOTS * FAMILY]), count)
    tl.store(result_ptr + rank, tl.reshape(blocks, [SLOTS * FAMILY]), mask=taken)


@triton.jit
def _decode_select_kernel(
    keys_ptr, maxima_ptr, indices_ptr, step, num_columns, num_heads, topk, keep_first, keep_recent,
    BLOCK_SIZE: tl.constexpr, FAMILIES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program: the routing of one query row. FAMILIES is 0 where kept blocks fill all slots, SLOTS 0 to stream."""
    query_row = tl.program_id(0)
    row = query_row // (step.num_queries * num_heads)
    query = query_row // num_heads % step.num_queries
    start, end = row_bounds(row, step)
    own = own_blocks(end - start - step.num_queries + query, BLOCK_SIZE)
    low, high = candidates(own, keep_first, keep_recent)
    count = tl.minimum(topk - 1 - keep_first - keep_recent, high - low)
    indices_ptr += query_row.to(tl.int64) * topk
    if FAMILIES > 0:  # noqa: SIM102 - settled as the kernel is compiled
        if count > 0:
            keys_ptr += query_row.to(tl.int64) * num_columns
            if SLOTS == 0:
                _select_streamed(keys_ptr, indices_ptr + low, low, high, count)
            else:
                maxima_ptr += query_row.to(tl.int64) * (num_columns // FAMILY)
                _select_held(keys_ptr, maxima_ptr, indices_ptr + low, indices_ptr, low, high, count, FAMILIES, SLOTS)
                # What was scratch is overwritten below.
                tl.debug_barrier()
    scored_end = low + count
    num_recent = tl.maximum(own, 0) - high
    for first_slot in range(0, topk, 32):
        slot = first_slot + tl.arange(0, 32)
        behind = slot - scored_end
        value = tl.where(slot < low, slot, tl.where(behind <= num_recent, own - num_recent + behind, -1))
        value = tl.where(own < 0, -1, value)
        tl.store(indices_ptr + slot, value, mask=((slot < low) | (behind >= 0)) & (slot < topk))
