"""What the attention kernels share on the device: tiles of rows, keys and entries, and the streaming softmax."""

from __future__ import annotations

import triton
import triton.language as tl

# Slots of a query's routing whose state fits one number.
MAX_SLOT_BITS = tl.constexpr(32)
LN_2 = tl.constexpr(0.6931471805599453)
# Below any logit, and finite: a row may meet masked keys before its first real one, and -inf - -inf is not a number.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def load_rows(ptr, offsets, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [len(offsets), BLOCK_D] that begin at `offsets`; zeros where masked and beyond HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + offsets[:, None] + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers, mask=mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(
    ptr, offsets, values, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_PARTIAL: tl.constexpr = False
):
    """The inverse of `load_rows`, in the dtype of `ptr`. Partials are read once, much later: they need no cache."""
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + offsets[:, None] + columns[None, :]
    mask = mask[:, None] if HEAD_DIM == BLOCK_D else mask[:, None] & (columns < HEAD_DIM)[None, :]
    if IS_PARTIAL:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    else:
        tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    source, row, group, first_key, mask, stride_r, stride_s, stride_g, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_N: tl.constexpr, WITH_TMA: tl.constexpr
):  # fmt: skip
    """Keys or values first_key … first_key + TILE_N - 1 of one tensor row and key/value head: [TILE_N, BLOCK_D].

    `source` is a pointer, or WITH_TMA a descriptor from `key_descriptor`, which ignores the mask.
    """
    if WITH_TMA:
        # Descriptors take 32-bit places, but strides beyond 2^31 make 64-bit numbers.
        matrix_row = tl.cast(row * (stride_r // stride_s), tl.int32) + first_key
        keys = source.load([matrix_row, tl.cast(group * stride_g, tl.int32)])
    else:
        start = tl.full([], row, tl.int64) * stride_r + tl.full([], group, tl.int64) * stride_g
        start += tl.full([], first_key, tl.int64) * stride_s
        keys = load_rows(source + start, tl.arange(0, TILE_N).to(tl.int64) * stride_s, mask, HEAD_DIM, BLOCK_D)
    return keys


@triton.jit
def row_offsets(rows, num_queries, stride_r, stride_t, ONE_ROW: tl.constexpr):
    """Element offsets of flattened query rows in a [R, T, …] tensor."""
    if ONE_ROW:
        return rows.to(tl.int64) * stride_t
    tensor_row = rows // num_queries
    return tensor_row.to(tl.int64) * stride_r + (rows - tensor_row * num_queries).to(tl.int64) * stride_t


@triton.jit
def load_entries(entries_ptr, begin, end, TOPK: tl.constexpr, TILE_M: tl.constexpr):
    """Query rows and slots of the entries begin … begin + TILE_M - 1, and which of them lie before `end`."""
    index = begin + tl.arange(0, TILE_M)
    mask = index < end
    entry = tl.load(entries_ptr + index, mask=mask, other=0)
    rows = entry // TOPK
    slots = entry - rows * TOPK
    return rows, slots, mask & (slots < TOPK - 1)


@triton.jit
def online_softmax(logits, values, maximum, total, acc):
    """One step of the streaming softmax: logits [M, N] of N more keys with values [N, D]."""
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def store_partials(
    partial_ptr, partial_lse_ptr, rows, slots, mask, row_begin, num_rows, outputs, lse, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """Partials lie as [K - 1, num_rows, D] of one head, from query row `row_begin` on."""
    place = slots.to(tl.int64) * num_rows + (rows - row_begin)
    store_rows(partial_ptr, place * HEAD_DIM, outputs, mask, HEAD_DIM, BLOCK_D, True)
    tl.store(partial_lse_ptr + place, lse, mask=mask)


@triton.jit
def past_slots(
    indices_ptr, query, stride_it, position, is_real, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Which slots of the queries' routing hold past blocks, as bits: int32 [M], of the first 32 slots."""
    slots = tl.arange(0, MAX_SLOT_BITS if TOPK > MAX_SLOT_BITS else triton.next_power_of_2(TOPK))
    pointers = indices_ptr + query.to(tl.int64)[:, None] * stride_it + slots[None, :]
    block = tl.load(pointers, mask=is_real[:, None] & (slots < TOPK - 1)[None, :], other=-1)
    is_past = (block >= 0) & (block < (position // BLOCK_SIZE)[:, None])
    return tl.sum(tl.where(is_past, 1 << slots[None, :], 0), 1)


@triton.jit
def holds_past_block(
    bits, indices_ptr, query, stride_it, slot, position, is_real, TOPK: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Whether one slot of the queries' routing holds a past block: [M]. `bits` are those of `past_slots`."""
    if TOPK - 1 <= MAX_SLOT_BITS:
        holds = ((bits >> slot) & 1) == 1
    else:
        block = tl.load(indices_ptr + query.to(tl.int64) * stride_it + slot, mask=is_real, other=-1)
        holds = (block >= 0) & (block < position // BLOCK_SIZE)
    return holds


@triton.jit
def own_key_range(
    position, is_real, tile_position, BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr
):
    """Keys that a tile of queries may see in own blocks: all of begin … middle - 1, some of middle … end - 1."""
    end = tl.max(tl.where(is_real, position, -1), 0) + 1
    if (BLOCK_SIZE % TILE_M == 0) & (TILE_M % TILE_N == 0):
        middle = tl.minimum(tl.maximum(tile_position, 0), end)
        begin = middle // BLOCK_SIZE * BLOCK_SIZE
    else:
        middle = tl.min(tl.where(is_real, position, end), 0) // BLOCK_SIZE * BLOCK_SIZE
        begin = middle
    return begin, middle, end


@triton.jit
def own_keys_visible(key, position, BLOCK_SIZE: tl.constexpr, TILE_M: tl.constexpr):
    """Whether queries at `position` see keys of their own blocks: [M, N]."""
    visible = key[None, :] <= position[:, None]
    if BLOCK_SIZE % TILE_M != 0:
        visible = visible & (key[None, :] >= (position // BLOCK_SIZE * BLOCK_SIZE)[:, None])
    return visible
