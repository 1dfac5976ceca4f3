"""What the plans of attention share: tile sizes, matrices for the tensor memory accelerator, and the chunks that bound
the workspace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import Rows, View, padded_head_dim, rows_of
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2
from moba.backends.triton.tuning import lookup
from moba.backends.triton.variants import Matrix
from moba.sequences import Sequences

# Most bytes of K, and of V, that a program keeps on chip.
KEPT_BYTES = 32 << 10
# Chunks of query rows are multiples of this.
ROW_MULTIPLE = 128


class Chunk(NamedTuple):
    """Heads and flattened query rows whose partials are in memory at one time."""

    first_head: int
    num_heads: int
    row_begin: int
    num_rows: int


def tile_sizes(kernel: str, arch: int, q: Tensor, v: Tensor, block_size: int) -> dict[str, int]:
    """Launch configuration of a kernel for these tensors, from the table in tuning.py."""
    head_dim = padded_head_dim(max(q.shape[-1], v.shape[-1]))
    return dict(lookup(kernel, arch, head_dim=head_dim, block_size=block_size, element_bytes=q.element_size()))


def num_elements(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Elements of attention's inputs and outputs: of q, k, v and out."""
    num_outputs = q.numel() // q.shape[-1] * v.shape[-1]
    return q.numel() + k.numel() + v.numel() + num_outputs


def windows(view: View, sizes: dict[str, int]) -> int:
    """How many windows cover every entry and the cost of every block.

    Raises:
        ValueError: if kernels, which count both together in int32, could not.
    """
    num_entries, num_blocks = view.entries.shape[1], view.offsets.shape[1] - 1
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


def spacings(*tensors: Tensor) -> tuple[bool, ...]:
    """Whether query rows of these tensors [R, T, H, D] are evenly spaced; then the contrary, if so in other batches.

    A single tensor row is even whatever the strides.
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


def chunks(num_heads: int, num_rows: int, row_bytes: int, budget_bytes: int) -> list[Chunk]:
    """Cut heads, and where one head is too large query rows too, so that a chunk's partials fit the budget.

    Args:
        row_bytes: bytes of partials of one query of one head.
    """
    heads = min(num_heads, max(1, budget_bytes // max(1, num_rows * row_bytes)))
    heads = cdiv(num_heads, cdiv(num_heads, heads))
    rows = num_rows
    if num_rows * row_bytes > budget_bytes:
        rows = max(1, budget_bytes // (row_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [
        Chunk(head, min(heads, num_heads - head), row, min(rows, num_rows - row))
        for head in range(0, num_heads, heads)
        for row in range(0, num_rows, rows)
    ]


class Bounds(NamedTuple):
    """First entry of every block among a chunk's query rows, one past the last, and how far apart its heads lie."""

    begin: Any
    end: Any
    stride_h: Any


def chunk_bounds(plan: Plan, view: View, chunk: Chunk, total_rows: int, topk: int, memory: Tensor) -> Bounds:
    """Find a chunk's bounds, where it has not all query rows in `memory` [2, heads, blocks]."""
    heads = slice(chunk.first_head, chunk.first_head + chunk.num_heads)
    offsets, entries = view.offsets[heads], view.entries[heads]
    num_blocks = offsets.shape[1] - 1
    search = (
        View(offsets, entries), memory, chunk.row_begin * topk, chunk.num_rows * topk, entries.shape[1], num_blocks,
        memory.stride(0), 256,
    )  # fmt: skip
    if chunk.num_rows == total_rows:
        plan.foresee(_chunk_bounds_kernel, *search)
        return Bounds(offsets, offsets[:, 1:], offsets.stride(0))
    plan.launch(_chunk_bounds_kernel, (cdiv(num_blocks, 256), chunk.num_heads, 2), *search)
    return Bounds(memory[0], memory[1], num_blocks)


@triton.jit
def _chunk_bounds_kernel(view, bounds_ptr, begin, length, num_entries, num_blocks, stride, TILE: tl.constexpr):
    """For every block, the first of its entries that is at least `begin`, and that is at least begin + length."""
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    mask = block < num_blocks
    value = begin + tl.program_id(2) * length
    offsets_ptr = view.offsets + head.to(tl.int64) * (num_blocks + 1)
    entries_ptr = view.entries + head.to(tl.int64) * num_entries
    low = tl.load(offsets_ptr + block, mask=mask, other=0)
    high = tl.load(offsets_ptr + block + 1, mask=mask, other=0)
    while tl.max(high - low, 0) > 0:
        middle = low + (high - low) // 2
        searching = low < high
        is_before = tl.load(entries_ptr + middle, mask=searching, other=0) < value
        low = tl.where(searching & is_before, middle + 1, low)
        high = tl.where(searching & (is_before == 0), middle, high)
    index = tl.program_id(2).to(tl.int64) * stride + head.to(tl.int64) * num_blocks + block
    tl.store(bounds_ptr + index, low, mask=mask)
