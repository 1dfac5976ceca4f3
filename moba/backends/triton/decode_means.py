"""Block means beside a cache: those of the blocks that a row's last keys finished, by the sum of means.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.decode_attend import key_offsets
from moba.backends.triton.decode_select import Step, Table, mean_offsets
from moba.backends.triton.device import padded_head_dim, row_bounds, rows_of
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2
from moba.backends.triton.means import NUM_WARPS, sum_tokens, tile_sizes


@triton.jit
def _append_means_kernel(
    k, means, step, table, BLOCK_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (tile of blocks, kv head, row), from the first block that the last num_queries keys may have finished."""
    PADDED_DIM: tl.constexpr = padded_head_dim(HEAD_DIM)
    row = tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    start, end = row_bounds(row, step)
    first_block = tl.maximum(end - start - step.num_queries, 0) // BLOCK_SIZE + tl.program_id(0) * TILE_BLOCKS
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
            offsets = key_offsets(row, start, positions, mask, k, table, PAGE_SIZE)
            pointers = k.ptr + head * k.stride_h + offsets[:, :, None] + dims[None, None, :]
            total += tl.load(pointers, mask=mask[:, :, None] & is_dim[None, None, :], other=0.0).to(tl.float32)
        size = tl.full([TILE_BLOCKS, PADDED_DIM], 1.0, tl.float32) * BLOCK_SIZE
        mean = tl.div_rn(sum_tokens(total, TILE_TOKENS), size)
        offsets = mean_offsets(row, blocks, is_finished, means, table, BLOCK_SIZE, PAGE_SIZE)
        pointers = means.ptr + head * means.stride_h + offsets[:, None] + dims[None, :]
        tl.store(pointers, mean.to(means.ptr.dtype.element_ty), mask=is_finished[:, None] & is_dim[None, :])


def launch_append_means(
    plan: Plan, means: Tensor, k: Tensor, step: Step, table: Table, *, num_rows: int, block_size: int, page_size: int
) -> None:
    """The one launch. See `moba.backends` for the contract."""
    tiles = tile_sizes(k.shape[3], block_size)
    most_finished = cdiv(step.num_queries, block_size)
    tiles["TILE_BLOCKS"] = min(tiles["TILE_BLOCKS"], next_power_of_2(most_finished))
    plan.launch(
        _append_means_kernel, (cdiv(most_finished, tiles["TILE_BLOCKS"]), k.shape[2], num_rows),
        rows_of(k), rows_of(means), step, table,
        BLOCK_SIZE=block_size, PAGE_SIZE=page_size, HEAD_DIM=k.shape[3], **tiles, num_warps=NUM_WARPS,
    )  # fmt: skip
