"""dK and dV by block on compute capability 9.0, for blocks of several tiles of keys. See backward.py and dkv.py.

What `_dkv_kernel` does, with the order of instructions stated (Gluon) rather than left to a compiler: products run
asynchronously, those of dO Vᵀ while the softmax is computed and those of dV and dK while the next queries are copied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from moba.backends.triton.device import block_span
from moba.backends.triton.dkv import segment_of_item
from moba.backends.triton.entries import row_offsets

# Two groups of four warps, each with 64 rows of a tile of keys.
NUM_WARPS = gl.constexpr(8)


@gluon.jit
def list_bounds(view, number, seen, span, GROUP: gl.constexpr, TOPK: gl.constexpr):
    """Begin and end of a program's list of queries, and how many entries of its block the lists up to it have.

    Lists 0 … GROUP - 1 are the own queries of every head of the group, the next GROUP those entries of the block that
    are the segment's; all others are empty. `span`: see `_dkv_hopper_kernel`.
    """
    own_begin, own_end, begin, end, first_head, block, num_blocks = span
    first = own_begin
    last = own_end
    if TOPK > 1:
        head = first_head + gl.minimum(gl.maximum(number - GROUP, 0), GROUP - 1)
        offsets_ptr = view.offsets + head * (num_blocks + 1) + block
        block_entry = gl.load(offsets_ptr)
        count = gl.load(offsets_ptr + 1) - block_entry
        is_past = (number >= GROUP) & (number < 2 * GROUP)
        count = gl.where(is_past, count, 0)
        first = gl.where(is_past, block_entry + gl.minimum(gl.maximum(begin - seen, 0), count), first)
        last = gl.where(is_past, block_entry + gl.minimum(gl.maximum(end - seen, 0), count), last)
        seen += count
    last = gl.where(number < 2 * GROUP if TOPK > 1 else number < GROUP, last, first)
    return first, last, seen


@gluon.jit
def load_tile_entries(view, number, at, end, first_head, GROUP: gl.constexpr, TOPK: gl.constexpr, TILE_M: gl.constexpr,
                      LAYOUT: gl.constexpr):  # fmt: skip
    """The entries at … at + TILE_M - 1 of a list: [TILE_M]; zeros for own queries."""
    index = at + gl.arange(0, TILE_M, layout=LAYOUT)
    if TOPK > 1:
        head = first_head + gl.minimum(gl.maximum(number - GROUP, 0), GROUP - 1)
        pointers = view.entries + head * view.num_entries + index
        result = gl.load(pointers, mask=(index < end) & (number >= GROUP), other=0)
    else:
        result = index * 0
    return result


@gluon.jit
def tile_rows(entries, number, at, end, row_begin, GROUP: gl.constexpr, TOPK: gl.constexpr, TILE_M: gl.constexpr,
              LAYOUT: gl.constexpr):  # fmt: skip
    """Query rows of a tile, and which of them are there: [TILE_M]."""
    index = at + gl.arange(0, TILE_M, layout=LAYOUT)
    return gl.where(number < GROUP, row_begin + index, entries // TOPK), index < end


@gluon.jit
def copy_rows(tile, x, head, rows, mask, num_queries, HEAD_DIM: gl.constexpr, UNIFORM_STRIDE: gl.constexpr,
              LAYOUT: gl.constexpr):  # fmt: skip
    """Begin to copy query rows of one head to shared memory, zeros where masked. See `entries.load_query_rows`."""
    offsets = row_offsets(x, rows, num_queries, UNIFORM_STRIDE)
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    pointers = x.ptr + head * x.stride_h + offsets[:, None] + columns[None, :]
    async_copy.async_copy_global_to_shared(tile, pointers, mask=mask[:, None])


@gluon.jit
def load_key_tile(x, long_row, kv_head, key, is_key, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile of keys or values, zeros where there are none."""
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    pointers = x.ptr + long_row * x.stride_r + kv_head * x.stride_h
    pointers = pointers + key.to(gl.int64)[:, None] * x.stride_t + columns[None, :]
    return gl.load(pointers, mask=is_key[:, None], other=0.0)


@gluon.jit
def copy_tile(tiles, slot, position, q, d_outs, softmax, view, span, row_begin, num_queries, GROUP: gl.constexpr,
              TOPK: gl.constexpr, UNIFORM_STRIDE: gl.constexpr, COPY_LAYOUT: gl.constexpr,
              NUMBER_LAYOUT: gl.constexpr):  # fmt: skip
    """Begin to copy a tile of queries to a slot of the ring, as one group of copies, and go on to the next tile.

    `position`: where the tile stands. `number`, `at`, `end`: its list, first entry, the list's end. `next_at` and
    `next_end`: the list behind it, `seen` what `list_bounds` says of that. `entries`: the tile's entries, in both
    layouts. All of it was loaded a tile ago, so that no copy waits for its addresses.
    """
    queries, d_out_tiles, lse2s, deltas = tiles
    number, at, end, next_at, next_end, seen, entries, few_entries = position
    TILE_M: gl.constexpr = queries.shape[1]
    HEAD_DIM: gl.constexpr = queries.shape[2]
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, COPY_LAYOUT)
    first_head = span[4]
    head = first_head + gl.minimum(gl.where(number < GROUP, number, number - GROUP), GROUP - 1)
    rows, mask = tile_rows(entries, number, at, end, row_begin, GROUP, TOPK, TILE_M, ROW_LAYOUT)
    copy_rows(queries.index(slot), q, head, rows, mask, num_queries, HEAD_DIM, UNIFORM_STRIDE, COPY_LAYOUT)
    copy_rows(d_out_tiles.index(slot), d_outs, head, rows, mask, num_queries, HEAD_DIM, UNIFORM_STRIDE, COPY_LAYOUT)
    rows, mask = tile_rows(few_entries, number, at, end, row_begin, GROUP, TOPK, TILE_M, NUMBER_LAYOUT)
    numbers = head * softmax.num_rows + rows
    async_copy.async_copy_global_to_shared(lse2s.index(slot), softmax.lse2_ptr + numbers, mask=mask)
    async_copy.async_copy_global_to_shared(deltas.index(slot), softmax.delta_ptr + numbers, mask=mask)
    async_copy.commit_group()

    at += TILE_M
    is_done = at >= end
    number = gl.where(is_done, number + 1, number)
    at = gl.where(is_done, next_at, at)
    end = gl.where(is_done, next_end, end)
    entries = load_tile_entries(view, number, at, end, first_head, GROUP, TOPK, TILE_M, ROW_LAYOUT)
    few_entries = load_tile_entries(view, number, at, end, first_head, GROUP, TOPK, TILE_M, NUMBER_LAYOUT)
    later_at, later_end, later_seen = list_bounds(view, number + 1, seen, span, GROUP, TOPK)
    next_at = gl.where(is_done, later_at, next_at)
    next_end = gl.where(is_done, later_end, next_end)
    seen = gl.where(is_done, later_seen, seen)
    return number, at, end, next_at, next_end, seen, entries, few_entries


@gluon.jit
def store_sums(ptr, rows, values, mask, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of dK or dV, in the dtype of `ptr`."""
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    pointers = ptr + rows[:, None] * HEAD_DIM + columns[None, :]
    values = gl.convert_layout(values.to(ptr.dtype.element_ty), LAYOUT)
    gl.store(pointers, values, mask=mask[:, None])


@gluon.jit
def tile_weights(s, lse2, limit, key_in_block, scale, S_LAYOUT: gl.constexpr, TILE_M: gl.constexpr):
    """Softmax weights of a tile; query i sees the block's keys up to limit + i."""
    weights = gl.exp2(s * scale - lse2.load(gl.SliceLayout(0, S_LAYOUT))[None, :])
    column = gl.arange(0, TILE_M, layout=gl.SliceLayout(0, S_LAYOUT))
    return gl.where((key_in_block - limit)[:, None] <= column[None, :], weights, 0.0)


@gluon.jit
def _dkv_hopper_kernel(
    q, k, v, d_outs, softmax, view, segments, d_k_ptr, d_v_ptr, partial_ptr, first_kv_head, num_kv_heads, scaling,
    layout, GROUP: gl.constexpr, TOPK: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, NUM_STAGES: gl.constexpr,
    UNIFORM_STRIDE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """`_dkv_kernel` for what `workspace.hopper_sizes` says, with its arguments."""
    gl.static_assert(HEAD_DIM == VALUE_DIM and TILE_N == 16 * NUM_WARPS and PACKED == 1)
    gl.static_assert(partial_ptr is None and scaling.softcap is None)
    KEY_TILES: gl.constexpr = BLOCK_SIZE // TILE_N
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    LANES: gl.constexpr = HEAD_DIM // 8
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, TILE_M, 16])
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HEAD_DIM, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUM_LAYOUT, 2)
    COPY_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [NUM_WARPS, 1], [1, 0])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, COPY_LAYOUT)
    NUMBER_LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    TILE_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    NUMBER_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    item = gl.program_id(0) // KEY_TILES
    key_tile = gl.program_id(0) % KEY_TILES
    local_kv_head = gl.program_id(1)
    kv_head = (local_kv_head + first_kv_head).to(gl.int64)
    extra_ptr = segments.extra_ptr + local_kv_head * (layout.num_blocks + 2)
    block, segment, sums_index, exists = segment_of_item(segments, extra_ptr, item, layout.num_blocks)
    if exists == 0:
        return

    row, first_key, size, first_query, query_begin, query_end = block_span(block, layout, BLOCK_SIZE)
    long_row = row.to(gl.int64)
    key_in_tile = gl.arange(0, TILE_N, layout=ROW_LAYOUT) + key_tile * TILE_N
    is_key = key_in_tile < size
    k_tile = load_key_tile(k, long_row, kv_head, first_key + key_in_tile, is_key, HEAD_DIM, COPY_LAYOUT)
    keys = gl.allocate_shared_memory(DTYPE, [TILE_N, HEAD_DIM], TILE_SHARED, k_tile)
    v_tile = load_key_tile(v, long_row, kv_head, first_key + key_in_tile, is_key, HEAD_DIM, COPY_LAYOUT)
    values = gl.allocate_shared_memory(DTYPE, [TILE_N, HEAD_DIM], TILE_SHARED, v_tile)
    queries = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE_M, HEAD_DIM], TILE_SHARED)
    d_out_tiles = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TILE_M, HEAD_DIM], TILE_SHARED)
    lse2s = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, TILE_M], NUMBER_SHARED)
    deltas = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, TILE_M], NUMBER_SHARED)

    # The queries: lists that are taken one after another, in tiles of one list each.
    segment_length = gl.load(extra_ptr + layout.num_blocks + 1)
    begin = segment * segment_length
    own_begin = gl.maximum(first_query + key_tile * TILE_N, query_begin)
    own_end = gl.minimum(first_query + size, query_end)
    own_end = gl.where(segment > 0, own_begin, gl.maximum(own_end, own_begin))
    first_head = kv_head * GROUP
    span = (own_begin, own_end, begin, begin + segment_length, first_head, block, layout.num_blocks)
    row_begin = row * layout.num_queries
    own_tiles = gl.cdiv(own_end - own_begin, TILE_M)
    num_tiles = own_tiles * GROUP
    seen = segment * 0
    if TOPK > 1:
        for member in range(GROUP):
            first, last, seen = list_bounds(view, GROUP + member, seen, span, GROUP, TOPK)
            num_tiles += gl.maximum(gl.cdiv(last - first, TILE_M), 1)
    num_tiles = gl.maximum(num_tiles, 1)

    # The tile to copy next: of list `number`, from `at`; behind it the list that begins at `next_at`.
    number = gl.where(own_tiles > 0, 0, GROUP)
    at, end, seen = list_bounds(view, number, segment * 0, span, GROUP, TOPK)
    next_at, next_end, seen = list_bounds(view, number + 1, seen, span, GROUP, TOPK)
    entries = load_tile_entries(view, number, at, end, first_head, GROUP, TOPK, TILE_M, ROW_LAYOUT)
    few_entries = load_tile_entries(view, number, at, end, first_head, GROUP, TOPK, TILE_M, NUMBER_LAYOUT)

    tiles = (queries, d_out_tiles, lse2s, deltas)
    position = (number, at, end, next_at, next_end, seen, entries, few_entries)
    for ahead in gl.static_range(NUM_STAGES - 1):
        position = copy_tile(tiles, ahead, position, q, d_outs, softmax, view, span, row_begin, layout.num_queries,
                             GROUP, TOPK, UNIFORM_STRIDE, COPY_LAYOUT, NUMBER_LAYOUT)  # fmt: skip

    key_in_block = gl.arange(0, TILE_N, layout=gl.SliceLayout(1, S_LAYOUT)) + key_tile * TILE_N
    zeros = gl.zeros([TILE_N, TILE_M], gl.float32, S_LAYOUT)
    d_k = warpgroup_mma_init(gl.zeros([TILE_N, HEAD_DIM], gl.float32, SUM_LAYOUT))
    d_v = warpgroup_mma_init(gl.zeros([TILE_N, HEAD_DIM], gl.float32, SUM_LAYOUT))
    own_at = own_begin
    slot = 0
    for tile in range(num_tiles):
        query_tile = queries.index(slot)
        d_out_tile = d_out_tiles.index(slot)
        async_copy.wait_group(NUM_STAGES - 2)
        fence_async_shared()
        s = warpgroup_mma(keys, query_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
        d_p = warpgroup_mma(values, d_out_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
        s, d_k, d_v = warpgroup_mma_wait(1, [s, d_k, d_v])
        limit = gl.where(tile < own_tiles * GROUP, own_at - first_query, BLOCK_SIZE)
        own_at = gl.where(own_at + TILE_M >= own_end, own_begin, own_at + TILE_M)
        weights = tile_weights(s, lse2s.index(slot), limit, key_in_block, scaling.scale, S_LAYOUT, TILE_M)
        d_v = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), A_LAYOUT), d_out_tile, d_v, is_async=True)
        d_p = warpgroup_mma_wait(1, [d_p])
        delta = deltas.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        d_logits = gl.convert_layout((weights * (d_p - delta[None, :])).to(DTYPE), A_LAYOUT)
        d_k = warpgroup_mma(d_logits, query_tile, d_k, is_async=True)

        free_slot = gl.where(slot == 0, NUM_STAGES - 1, slot - 1)
        position = copy_tile(tiles, free_slot, position, q, d_outs, softmax, view, span, row_begin,
                             layout.num_queries, GROUP, TOPK, UNIFORM_STRIDE, COPY_LAYOUT, NUMBER_LAYOUT)  # fmt: skip
        slot = gl.where(slot == NUM_STAGES - 1, 0, slot + 1)
    d_k, d_v = warpgroup_mma_wait(0, [d_k, d_v])
    async_copy.wait_group(0)

    d_k = d_k * scaling.product_scale
    if sums_index >= 0:
        sums_row = (local_kv_head.to(gl.int64) * 2 * segments.count + sums_index) * 2 * BLOCK_SIZE + key_in_tile
        everywhere = key_in_tile < BLOCK_SIZE
        store_sums(segments.sums_ptr, sums_row, d_k, everywhere, HEAD_DIM, COPY_LAYOUT)
        store_sums(segments.sums_ptr, sums_row + BLOCK_SIZE, d_v, everywhere, HEAD_DIM, COPY_LAYOUT)
    else:
        out_row = (long_row * layout.num_keys + first_key + key_in_tile) * num_kv_heads + kv_head
        store_sums(d_k_ptr, out_row, d_k, is_key, HEAD_DIM, COPY_LAYOUT)
        store_sums(d_v_ptr, out_row, d_v, is_key, HEAD_DIM, COPY_LAYOUT)
