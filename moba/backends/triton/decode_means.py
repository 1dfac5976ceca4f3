"""Block means beside a cache: those of the blocks that a row's last keys finished, by the sum of means.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.decode_attend import key_offsets
from moba.backends.triton.decode_select import mean_offsets
from moba.backends.triton.launch import Number, Plan, cdiv, next_power_of_2
from moba.backends.triton.means import NUM_WARPS, sum_tokens, tile_sizes
from moba.backends.triton.primitives import row_bounds


@triton.jit(do_not_specialize=["num_queries", "num_keys", "stride_table"])
def _append_means_kernel(
    k_ptr, means_ptr, key_start_ptr, key_end_ptr, table_ptr, num_queries, num_keys,
    stride_kr, stride_ks, stride_kg, stride_mr, stride_mn, stride_mg, stride_table,
    BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (tile of blocks, kv head, row), from the first block that the last num_queries keys may have finished."""
    row = tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    start, end = row_bounds(row, num_keys, key_start_ptr, key_end_ptr)
    first_block = tl.maximum(end - start - num_queries, 0) // BLOCK_SIZE + tl.program_id(0) * TILE_BLOCKS
    num_finished = tl.maximum(end - start, 0) // BLOCK_SIZE
    if first_block < num_finished:
        blocks = first_block + tl.arange(0, TILE_BLOCKS)
        is_finished = blocks < num_finished
        dims = tl.arange(0, PADDED_DIM)
        is_dim = dims < HEAD_DIM
        total = tl.zeros([TILE_BLOCKS, TILE_TOKENS, PADDED_DIM], tl.float32)
        for first in range(0, BLOCK_SIZE, TILE_TOKENS):
            tokens = first + tl.arange(0, TILE_TOKENS)
            mask = is_finished[:, None] & (tokens < BLOCK_SIZE)[None, :]
            positions = blocks[:, None] * BLOCK_SIZE + tokens[None, :]
            offsets = key_offsets(row, start, positions, mask, stride_kr, stride_ks, table_ptr, stride_table, PAGE_SIZE)
            pointers = k_ptr + head * stride_kg + offsets[:, :, None] + dims[None, None, :]
            total += tl.load(pointers, mask=mask[:, :, None] & is_dim[None, None, :], other=0.0).to(tl.float32)
        size = tl.full([TILE_BLOCKS, PADDED_DIM], 1.0, tl.float32) * BLOCK_SIZE
        means = tl.div_rn(sum_tokens(total, TILE_TOKENS), size)
        offsets = mean_offsets(
            row, blocks, is_finished, stride_mr, stride_mn, table_ptr, stride_table, BLOCK_SIZE, PAGE_SIZE
        )
        pointers = means_ptr + head * stride_mg + offsets[:, None] + dims[None, :]
        tl.store(pointers, means.to(means_ptr.dtype.element_ty), mask=is_finished[:, None] & is_dim[None, :])


def launch_append_means(
    plan: Plan,
    means: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    *,
    num_rows: int,
    num_new: int,
    num_keys: Number,
    stride_table: Number,
    page_size: int,
    block_size: int,
) -> None:
    """The one launch. See `moba.backends` for the contract."""
    tiles = tile_sizes(k.shape[3], block_size)
    most_finished = cdiv(num_new, block_size)
    tiles["TILE_BLOCKS"] = min(tiles["TILE_BLOCKS"], next_power_of_2(most_finished))
    plan.launch(
        _append_means_kernel, (cdiv(most_finished, tiles["TILE_BLOCKS"]), k.shape[2], num_rows),
        k, means, key_start, key_end, page_table, num_new, num_keys,
        *k.stride()[:3], *means.stride()[:3], stride_table,
        BLOCK_SIZE=block_size, PAGE_SIZE=page_size, HEAD_DIM=k.shape[3], **tiles, num_warps=NUM_WARPS,
    )  # fmt: skip
