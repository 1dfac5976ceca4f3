"""Block means beside a cache: those of the blocks that a row's last keys finished, by the sum of means.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.decode_attend import key_offsets
from moba.backends.triton.decode_select import mean_offsets
from moba.backends.triton.means import NUM_WARPS, sum_tokens, tile_sizes
from moba.backends.triton.primitives import row_bounds
from moba.layout import Sequences


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
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


def append_means_launch(
    means: Tensor, k: Tensor, sequences: Sequences, block_size: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and arguments of the one launch. See `moba.backends` for the contract."""
    tiles = tile_sizes(k.shape[3], block_size)
    most_finished = -(-min(sequences.num_queries, sequences.num_keys) // block_size)
    tiles["TILE_BLOCKS"] = min(tiles["TILE_BLOCKS"], triton.next_power_of_2(max(most_finished, 1)))
    table = sequences.page_table
    arguments = {
        "k_ptr": k,
        "means_ptr": means,
        "key_start_ptr": sequences.key_start,
        "key_end_ptr": sequences.key_end,
        "table_ptr": table,
        "num_queries": sequences.num_queries,
        "num_keys": sequences.num_keys,
        "stride_kr": k.stride(0),
        "stride_ks": k.stride(1),
        "stride_kg": k.stride(2),
        "stride_mr": means.stride(0),
        "stride_mn": means.stride(1),
        "stride_mg": means.stride(2),
        "stride_table": 0 if table is None else table.stride(0),
        "BLOCK_SIZE": block_size,
        "PAGE_SIZE": 0 if table is None else sequences.page_size,
        "HEAD_DIM": k.shape[3],
        **tiles,
        "num_warps": NUM_WARPS,
    }
    return (-(-most_finished // tiles["TILE_BLOCKS"]), k.shape[2], sequences.num_rows), arguments
