"""What the plans of attention share: tile sizes, matrices for the tensor memory accelerator, and the chunks that bound
the workspace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import Rows, View, num_query_tiles, padded_head_dim, rows_of
from moba.backends.triton.launch import IS_INTERPRETED, Plan, cdiv, next_power_of_2
from moba.backends.triton.tuning import lookup
from moba.backends.triton.variants import HAS_GLUON, Matrix
from moba.sequences import Sequences

# Whose tiles hold members side by side.
PACKING_KERNELS = (
    "attend_past_stationary", "attend_past_streaming", "merge_and_attend_own", "dkv", "dq_past", "dq_own"
)  # fmt: skip
# Blocks, in tokens, and head dims that dkv_hopper.py is for.
HOPPER_MIN_BLOCK, HOPPER_BLOCK_MULTIPLE, HOPPER_HEAD_DIMS = 512, 128, (64, 128)
# Most bytes of K, and of V, that a program keeps on chip.
KEPT_BYTES = 32 << 10
# Chunks of query rows are multiples of this.
ROW_MULTIPLE = 128
# Where members are packed, most bytes of a chunk's query rows of one head, which are gathered once for every block: few
# enough that the second-level cache holds them.
GATHERED_BYTES = 32 << 20


class Chunk(NamedTuple):
    """Heads of the routing and flattened query rows whose partials are in memory at one time."""

    first_head: int
    num_heads: int
    row_begin: int
    num_rows: int


def tile_sizes(kernel: str, arch: int, q: Tensor, v: Tensor, block_size: int, packed: int = 1) -> dict[str, int]:
    """Launch configuration of a kernel for these tensors, from the table in tuning.py.

    Args:
        packed: members of an entry; the table counts windows and the cost of a block in members.
    """
    head_dim = padded_head_dim(max(q.shape[-1], v.shape[-1]))
    sizes = lookup(
        kernel, arch, head_dim=head_dim, block_size=block_size, element_bytes=q.element_size(), is_packed=packed > 1
    )
    return {name: max(1, x // packed) if name in ("WINDOW", "BLOCK_COST") else x for name, x in sizes.items()}


def hopper_sizes(
    plan: Plan, arch: int, q: Tensor, v: Tensor, d_out: Tensor, block_size: int, packed: int, softcap: float | None
) -> dict[str, int]:
    """Launch configuration of `_dkv_hopper_kernel`, or an empty one where `_dkv_kernel` is for these tensors.

    Query rows are copied to shared memory 16 bytes at a time, by threads that know nothing of the others' addresses.
    """
    fits = (
        HAS_GLUON
        and not IS_INTERPRETED
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in HOPPER_HEAD_DIMS
        and block_size >= HOPPER_MIN_BLOCK
        and block_size % HOPPER_BLOCK_MULTIPLE == 0
        and softcap is None
        and all(plan.is_aligned(x) and all(stride % 16 == 0 for stride in x.stride()[:3]) for x in (q, d_out))
    )
    return tile_sizes("dkv_hopper", arch, q, v, block_size, packed) if fits else {}


def routing_heads(q: Tensor, v: Tensor, indices: Tensor, block_size: int, arch: int) -> int:
    """Heads of the routing that kernels are given: those of `indices`, or H where tiles do not hold whole groups."""
    num_heads, group = q.shape[2], q.shape[2] // indices.shape[2]
    tiles = (tile_sizes(kernel, arch, q, v, block_size, group)["TILE_M"] for kernel in PACKING_KERNELS)
    return indices.shape[2] if group == 1 or all(tile % group == 0 for tile in tiles) else num_heads


def num_elements(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Elements of attention's inputs and outputs: of q, k, v and out."""
    num_outputs = q.numel() // q.shape[-1] * v.shape[-1]
    return q.numel() + k.numel() + v.numel() + num_outputs


def windows(num_entries: int, num_blocks: int, sizes: dict[str, int]) -> int:
    """How many windows cover so many entries of a head, and the cost of every block.

    Raises:
        ValueError: if kernels, which count both together in int32, could not.
    """
    cost, window = sizes["BLOCK_COST"], sizes["WINDOW"]
    count = cdiv(num_entries + num_blocks * cost, window)
    if count * window >= 2**31:
        raise ValueError(
            f"query rows · (topk - 1) + blocks · {cost} must be below 2^31, got {num_entries} + {num_blocks} · {cost}: "
            "take a larger block_size or a smaller topk"
        )
    return count


def keeps_keys(q: Tensor, v: Tensor, block_size: int) -> bool:
    """Whether a block's K and V are few enough bytes to stay on chip while its queries stream past.

    Products of fp32 run outside the tensor cores and need the registers that this would take.
    """
    head_dim = padded_head_dim(max(q.shape[-1], v.shape[-1]))
    block_bytes = next_power_of_2(block_size) * head_dim * q.element_size()
    return q.element_size() == 2 and block_bytes <= KEPT_BYTES


def key_matrix(x: Tensor, tile_n: int) -> Matrix | None:
    """k or v for the tensor memory accelerator, or None where strides or head dim rule it out.

    A tensor of rows [.., D] at any strides is read as one matrix whose rows are stride_s apart; a head is a column.
    """
    stride_r, stride_s, stride_g, _ = x.stride()
    num_rows, num_keys, num_kv_heads, head_dim = x.shape
    row_bytes = stride_s * x.element_size()
    columns = (num_kv_heads - 1) * stride_g + head_dim
    rows = num_keys if num_rows == 1 else (num_rows - 1) * (stride_r // max(stride_s, 1)) + num_keys
    if (
        head_dim != padded_head_dim(head_dim)
        or row_bytes <= 0
        or (row_bytes | stride_g * x.element_size()) % 16
        or (num_rows > 1 and stride_r % stride_s)
        or max(rows, columns) >= 2**31
    ):
        return None
    return Matrix(x, (rows, columns), (stride_s, 1), (tile_n, head_dim))


def uniform_stride(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether query rows of these tensors [R, T, H, D] have one stride, as if R and T were one dimension; then the
    contrary, if so in other batches.

    A single tensor row has one whatever the strides.
    """
    always = all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)
    if always:
        return (True,)
    return (True, False) if tensors[0].shape[0] == 1 else (False, True)


class Keys(NamedTuple):
    """Keys and values as `device.load_keys` takes them: as rows, and as matrices, or None where they cannot be that."""

    k: Rows
    v: Rows
    k_matrix: Matrix | None
    v_matrix: Matrix | None


def keys_of(plan: Plan, k: Tensor, v: Tensor, tile_n: int, arch: int, allowed: bool) -> Keys:
    """Keys and values as arguments of a kernel that reads them TILE_N at a time."""
    if allowed and arch >= 90 and plan.is_aligned(k) and plan.is_aligned(v):
        k_matrix, v_matrix = key_matrix(k, tile_n), key_matrix(v, tile_n)
        if k_matrix is not None and v_matrix is not None:
            in_k, in_v = (Rows(x, x.stride(0) // x.stride(1), 1, x.stride(2)) for x in (k, v))
            return Keys(in_k, in_v, k_matrix, v_matrix)
    return Keys(rows_of(k), rows_of(v), None, None)


def own_keys_of(
    plan: Plan, k: Tensor, v: Tensor, tile_n: int, arch: int, sequences: Sequences, block_size: int
) -> tuple[Keys, ...]:
    """Keys and values for a kernel that reads own blocks: for this call, then for other lengths and batches.

    The last tile of a sequence reaches past its end. A matrix gives zeros there only behind the last tensor row; behind
    another it gives that row's room or the next one's keys, and a weight of 0 times NaN is NaN.
    """
    rows = keys_of(plan, k, v, tile_n, arch, allowed=False)
    matrices = keys_of(plan, k, v, tile_n, arch, allowed=sequences.is_plain)
    if matrices.k_matrix is None:
        return (rows,)
    ends_with_a_tile = sequences.num_keys % tile_n == 0 and block_size % tile_n == 0
    return (matrices, rows) if sequences.num_rows == 1 or ends_with_a_tile else (rows, matrices)


def chunks(
    num_heads: int, num_rows: int, row_bytes: int, budget_bytes: int, most_rows: int | None = None
) -> list[Chunk]:
    """Cut heads, and where one head is too large query rows too, so that a chunk's partials fit the budget.

    Args:
        row_bytes: bytes of partials of one query of one head of the routing.
        most_rows: query rows of a chunk, whatever the budget.
    """
    rows = num_rows if most_rows is None else min(num_rows, most_rows)
    heads = min(num_heads, max(1, budget_bytes // max(1, rows * row_bytes)))
    heads = cdiv(num_heads, cdiv(num_heads, heads))
    if rows * row_bytes > budget_bytes:
        rows = max(1, budget_bytes // (row_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [
        Chunk(head, min(heads, num_heads - head), row, min(rows, num_rows - row))
        for head in range(0, num_heads, heads)
        for row in range(0, num_rows, rows)
    ]


class Bounds(NamedTuple):
    """First entry of every block among a chunk's query rows, one past the last, and how far apart its heads lie.

    `starts`: int32 [heads, blocks + 1], how many entries the chunk has before each block; None if windows are cut from
    all query rows.
    """

    begin: Any
    end: Any
    stride_h: Any
    starts: Any


def chunks_with_bounds(
    plan: Plan,
    view: View,
    total_rows: int,
    topk: int,
    packed: int,
    row_bytes: int,
    gathered_bytes: int,
    budget_bytes: int,
) -> list[tuple[Chunk, Bounds]]:
    """The chunks of an attention, and their bounds, found for all at once where a chunk has not all query rows.

    Args:
        packed: members of an entry. Where there are several, windows are cut from the entries of a chunk.
        row_bytes: as `chunks` takes it. gathered_bytes: what a past kernel gathers of a query row of a query head.
    """
    num_heads, num_blocks = view.offsets.shape[0], view.offsets.shape[1] - 1
    most_rows = None
    if packed > 1:
        most_rows = max(1, GATHERED_BYTES // (packed * gathered_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE
    parts = chunks(num_heads, total_rows, row_bytes, budget_bytes, most_rows)
    length = parts[0].num_rows
    is_cut = packed > 1 or length < total_rows
    count = cdiv(total_rows, length) if is_cut else 1
    bounds = plan.buffer(2, count, num_heads if is_cut else 1, num_blocks, dtype=torch.int32)
    starts = plan.buffer(count, num_heads if is_cut else 1, num_blocks + 1, dtype=torch.int32)
    search = (view, bounds, starts, length * topk, num_blocks, bounds.stride(0), 256)
    if is_cut and topk > 1:
        plan.launch(_row_chunks_kernel, (count, num_heads), *search)
    else:
        plan.foresee(_row_chunks_kernel, *search)

    def bounds_of_chunk(chunk: Chunk) -> Bounds:
        heads = slice(chunk.first_head, chunk.first_head + chunk.num_heads)
        if not is_cut:
            offsets = view.offsets[heads]
            return Bounds(offsets, offsets[:, 1:], offsets.stride(0), None)
        begin, end, of_chunk = (x[chunk.row_begin // length, heads] for x in (bounds[0], bounds[1], starts))
        return Bounds(begin, end, num_blocks, of_chunk if packed > 1 else None)

    return [(chunk, bounds_of_chunk(chunk)) for chunk in parts]


def chunk_query_tiles(sequences: Sequences, tile_m: int, packed: int, chunk: Chunk) -> tuple[int, int | None]:
    """How many tiles of queries may have query rows of a chunk, and the first; None if all tiles are taken."""
    num_tiles, tiles_per_row = num_query_tiles(sequences, tile_m // packed)
    if packed == 1:
        return num_tiles, None
    # A tile is aligned to positions, so that a query row is in the tile of its number or in the next one.
    begin, last = chunk.row_begin, chunk.row_begin + chunk.num_rows - 1
    if sequences.cu_q is not None:
        first, end = begin // (tile_m // packed), last // (tile_m // packed) + 2 * sequences.cu_q.numel()
    else:
        first, end = (
            row // sequences.num_queries * tiles_per_row + row % sequences.num_queries // (tile_m // packed)
            for row in (begin, last)
        )
        end += 2
    return min(end, num_tiles) - first, first


@triton.jit
def _first_entry(view, head, block, mask, value, num_blocks):
    """For blocks [TILE], the first of their entries that is at least `value`."""
    offsets_ptr = view.offsets + head.to(tl.int64) * (num_blocks + 1)
    entries_ptr = view.entries + head.to(tl.int64) * view.num_entries
    low = tl.load(offsets_ptr + block, mask=mask, other=0)
    high = tl.load(offsets_ptr + block + 1, mask=mask, other=0)
    while tl.max(high - low, 0) > 0:
        middle = low + (high - low) // 2
        searching = low < high
        is_before = tl.load(entries_ptr + middle, mask=searching, other=0) < value
        low = tl.where(searching & is_before, middle + 1, low)
        high = tl.where(searching & (is_before == 0), middle, high)
    return low


@triton.jit
def _row_chunks_kernel(view, bounds_ptr, starts_ptr, length, num_blocks, stride, TILE: tl.constexpr):
    """Program (chunk of query rows, head): the chunk's bounds, and the sums of its entries over the blocks before."""
    head = tl.program_id(1)
    chunk_head = tl.program_id(0) * tl.num_programs(1) + head
    bounds_ptr += chunk_head.to(tl.int64) * num_blocks
    starts_ptr += chunk_head.to(tl.int64) * (num_blocks + 1)
    # The last chunk may end beyond what int32 holds.
    value = tl.program_id(0).to(tl.int64) * length
    total = 0
    for first_block in range(0, num_blocks, TILE):
        block = first_block + tl.arange(0, TILE)
        mask = block < num_blocks
        begin = _first_entry(view, head, block, mask, value, num_blocks)
        end = _first_entry(view, head, block, mask, value + length, num_blocks)
        tl.store(bounds_ptr + block, begin, mask=mask)
        tl.store(bounds_ptr + stride + block, end, mask=mask)
        tl.store(starts_ptr + block, total + tl.cumsum(end - begin, 0) - (end - begin), mask=mask)
        total += tl.sum(end - begin, 0)
    tl.store(starts_ptr + num_blocks, total)
