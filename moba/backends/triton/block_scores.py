"""One number for every query and each of its blocks: the largest product with the block's keys, or their log mass.

A program streams the keys of some blocks past a tile of queries and keeps one number a block, so products of all tokens
are nowhere in memory.

Letters: M queries of a tile, N keys of a tile: PARTS tiles are one block, or one tile is BLOCKS blocks of PADDED keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import (
    LN_2,
    LOWEST_LOGIT,
    last_at_most,
    layout_of,
    load_rows,
    locate_queries,
    num_global_blocks,
    padded_head_dim,
    row_bounds,
    rows_of,
)
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2, run_planned
from moba.backends.triton.logits import LogitScaling, logit_scaling, scaled
from moba.backends.triton.registration import fake, operator
from moba.backends.triton.tuning import arch_of, lookup
from moba.sequences import Sequences

# Most tiles of keys that a program streams.
MAX_TILES = 64
# Query rows of a chunk are multiples of this, which tiles divide.
ROW_MULTIPLE = 128


class Scores(NamedTuple):
    """fp32 [rows · heads, blocks, queries of a chunk]: pointer, elements from head to head and from block to block.

    A tensor row's blocks are numbered as global ones, less those of the rows before it. Queries lie one after another,
    so that neighbours are stored and loaded together.
    """

    ptr: Any
    stride_r: Any
    stride_n: Any


def scores_shape(sequences: Sequences, num_heads: int, block_size: int, num_queries: int) -> tuple[int, int, int]:
    """Shape of memory for `Scores`. Strides are multiples of 16, whatever the lengths: kernels are compiled for that.

    Packed sequences share the block numbers of their one row.
    """
    num_blocks = num_global_blocks(sequences, block_size) // (1 if sequences.cu_k is not None else sequences.num_rows)
    return sequences.num_rows * num_heads, num_blocks, cdiv(num_queries, 16) * 16


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _products(q, q_pointers, is_query, k_ptr, offsets, is_key, HEAD_DIM: tl.constexpr):
    """Products [M, N] of the tile of queries and the keys at `offsets`. For fp32, the tile has not all D dims."""
    if q.shape[1] >= HEAD_DIM:
        keys = load_rows(k_ptr, offsets, is_key, HEAD_DIM)
        products = tl.dot(q, tl.trans(keys), input_precision="ieee")
    else:
        products = tl.zeros([q.shape[0], offsets.shape[0]], tl.float32)
        dims = tl.arange(0, q.shape[1])
        for first_dim in range(0, HEAD_DIM, q.shape[1]):
            is_dim = (first_dim + dims < HEAD_DIM)[None, :]
            part = tl.load(q_pointers + first_dim, mask=is_query[:, None] & is_dim, other=0.0)
            pointers = k_ptr + offsets[:, None] + first_dim + dims[None, :]
            keys = tl.load(pointers, mask=is_key[:, None] & is_dim, other=0.0)
            products = tl.dot(part, tl.trans(keys), acc=products, input_precision="ieee")
    return products


@triton.jit
def _score_blocks(
    queries, position, num_blocks, k_ptr, stride_t, num_keys, pointers, stride_n, scaling, begin, end,
    IS_MASS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Score blocks begin … end - 1 of one sequence.

    Args:
        queries: their tile [M, TILE_D], its pointers, which exist [M]. position: [M].
        num_blocks: [M], those of the first blocks that a query scores.
        k_ptr: the sequence's first key. pointers: [M], where the score of its first block goes.
        scaling: of the logits of log masses, with IS_MASS.
    """
    q, q_pointers, is_query = queries
    PADDED: tl.constexpr = min(triton.next_power_of_2(BLOCK_SIZE), TILE_N)
    BLOCKS: tl.constexpr = TILE_N // PADDED
    PARTS: tl.constexpr = (BLOCK_SIZE + PADDED - 1) // PADDED
    LOWEST: tl.constexpr = LOWEST_LOGIT if IS_MASS else float("-inf")
    column = tl.arange(0, TILE_N)
    key_in_part = column % PADDED
    best = tl.full([q.shape[0], BLOCKS], LOWEST, tl.float32)
    total = tl.zeros([q.shape[0], BLOCKS], tl.float32)
    for step in range(begin // BLOCKS * PARTS, (end + BLOCKS - 1) // BLOCKS * PARTS):
        first_block = step // PARTS * BLOCKS
        part = step % PARTS
        key = (first_block + column // PADDED) * BLOCK_SIZE + part * PADDED + key_in_part
        is_token = part * PADDED + key_in_part < BLOCK_SIZE
        is_key = is_token & (key < num_keys)
        values = _products(q, q_pointers, is_query, k_ptr, key.to(tl.int64) * stride_t, is_key, HEAD_DIM)
        if IS_MASS:
            is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
            values = tl.where(is_seen, scaled(values, scaling), LOWEST)
        elif BLOCK_SIZE % PADDED != 0:
            values = tl.where(is_token[None, :], values, LOWEST)
        values = tl.reshape(values, [q.shape[0], BLOCKS, PADDED])
        before = tl.where(part == 0, LOWEST, best)
        best = _largest(before, tl.reduce(values, 2, _largest))
        score = best
        if IS_MASS:
            mass = tl.sum(tl.exp2(values - best[:, :, None]), axis=2)
            total = tl.where(part == 0, 0.0, total) * tl.exp2(before - best) + mass
            score = (best + tl.log2(total)) * LN_2
        block = first_block + tl.arange(0, BLOCKS)[None, :]
        is_stored = (block < num_blocks[:, None]) & (part == PARTS - 1)
        tl.store(pointers[:, None] + block.to(tl.int64) * stride_n, score, mask=is_stored)


@triton.jit
def _block_scores_kernel(
    q, k, scores, layout, scaling, first_query, num_tiles, num_blocks, heads_per_kv_head,
    IS_MASS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Program (tile of a row, head, i): TILE_M queries and the blocks from i · num_blocks on of each sequence.

    Largest products are of past blocks; log masses (IS_MASS, with `scaling`) of the own block's visible keys as well.
    """
    row = tl.program_id(0) // num_tiles
    # The last tiles have the most blocks: they start first.
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(1)
    query_in_chunk = tile * TILE_M + tl.arange(0, TILE_M)
    token = first_query + query_in_chunk
    is_query = token < layout.num_queries
    own, _ = locate_queries(row, token, layout, BLOCK_SIZE)
    count = own + 1 if IS_MASS else own

    dims = tl.arange(0, TILE_D)
    q_ptr = q.ptr + row.to(tl.int64) * q.stride_r + head.to(tl.int64) * q.stride_h
    q_pointers = q_ptr + token.to(tl.int64)[:, None] * q.stride_t + dims[None, :]
    q_tile = tl.load(q_pointers, mask=is_query[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    queries = (q_tile, q_pointers, is_query)
    kv_head = head // heads_per_kv_head
    k_ptr = k.ptr + row.to(tl.int64) * k.stride_r + kv_head.to(tl.int64) * k.stride_h
    pointers = scores.ptr + (row * tl.num_programs(1) + head).to(tl.int64) * scores.stride_r + query_in_chunk
    begin = tl.program_id(2) * num_blocks

    if layout.cu_q_ptr is not None:
        sequence = last_at_most(layout.cu_q_ptr, layout.num_sequences, token, 1, 0)
        for i in range(tl.min(sequence), tl.max(sequence) + 1):
            start = tl.load(layout.cu_k_ptr + i)
            stop = tl.load(layout.cu_k_ptr + i + 1)
            position = stop - start - tl.load(layout.cu_q_ptr + i + 1) + token
            of_sequence = tl.where(sequence == i, count, 0)
            first = (start // BLOCK_SIZE + i).to(tl.int64)
            _score_blocks(
                queries, position, of_sequence, k_ptr + start.to(tl.int64) * k.stride_t, k.stride_t, stop - start,
                pointers + first * scores.stride_n, scores.stride_n, scaling, begin,
                tl.minimum(begin + num_blocks, tl.max(of_sequence)), IS_MASS, BLOCK_SIZE, HEAD_DIM, TILE_N,
            )  # fmt: skip
    else:
        start, stop = row_bounds(row, layout)
        position = stop - start - layout.num_queries + token
        _score_blocks(
            queries, position, count, k_ptr + tl.cast(start, tl.int64) * k.stride_t, k.stride_t, stop - start,
            pointers, scores.stride_n, scaling, begin,
            tl.minimum(begin + num_blocks, tl.max(count)), IS_MASS, BLOCK_SIZE, HEAD_DIM, TILE_N,
        )  # fmt: skip


def plan_block_scores(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    scores: Tensor,
    scaling: LogitScaling | None,
    sequences: Sequences,
    block_size: int,
    first_query: int,
    num_queries: int,
    arch: int,
) -> Scores:
    """Score the blocks of queries first_query … first_query + num_queries - 1 of every row into `scores`.

    Args:
        q: [R, T, H, D]. k: [R, S, G, D]. scores: of `scores_shape`.
    """
    result = Scores(scores, scores.stride(0), scores.stride(1))
    head_dim, element_bytes = q.shape[3], q.element_size()
    padded_dim = padded_head_dim(head_dim)
    config = lookup("block_scores", arch, head_dim=padded_dim, block_size=block_size, element_bytes=element_bytes)
    num_tiles, tile_n = cdiv(num_queries, config["TILE_M"]), config["TILE_N"]
    padded_block = min(next_power_of_2(block_size), tile_n)
    tile_blocks = tile_n // padded_block
    num_blocks = max(1, MAX_TILES // cdiv(block_size, padded_block)) * tile_blocks
    plan.launch(
        _block_scores_kernel, (q.shape[0] * num_tiles, q.shape[2], cdiv(scores.shape[1], num_blocks)),
        rows_of(q), rows_of(k), result, layout_of(sequences, block_size), scaling, first_query, num_tiles, num_blocks,
        q.shape[2] // k.shape[2], IS_MASS=scaling is not None, BLOCK_SIZE=block_size, HEAD_DIM=head_dim,
        TILE_D=padded_dim if element_bytes == 2 else min(padded_dim, 32), **config,
    )  # fmt: skip
    return result


def largest_products(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The largest product with each past block's keys. See `moba.backends` for the contract.

    Numerics: fp32 sums of exact products of 16-bit inputs, full fp32 for fp32 ones.
    """
    return _block_numbers(q, k, block_size, None, None)[..., : q.shape[0]].transpose(1, 2)


def log_masses(q: Tensor, k: Tensor, block_size: int, scale: float, softcap: float | None) -> Tensor:
    """log Σ exp(logit) over each block's keys up to the query. See `moba.backends` for the contract.

    Numerics: as `largest_products`.
    """
    return _block_numbers(q, k, block_size, scale, softcap)[..., : q.shape[0]].transpose(1, 2)


@operator("triton_block_numbers")
def _block_numbers(q: Tensor, k: Tensor, block_size: int, scale: float | None, softcap: float | None) -> Tensor:
    """Largest products, or with a scale log masses: fp32 [H, N, at least T]."""
    sequences = Sequences(1, q.shape[0], k.shape[0])
    numbers = q.new_empty(scores_shape(sequences, q.shape[1], block_size, q.shape[0]), dtype=torch.float32)
    if numbers.numel():
        run_planned(
            plan_block_numbers, q[None], k[None], numbers, device=q.device, block_size=block_size, scale=scale,
            softcap=softcap, arch=arch_of(q.device),
        )  # fmt: skip
    return numbers


def plan_block_numbers(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    numbers: Tensor,
    *,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    arch: int,
) -> None:
    """The launches of `moba::triton_block_numbers`."""
    sequences = Sequences(1, q.shape[1], k.shape[1])
    scaling = None if scale is None else logit_scaling(scale, softcap)
    plan_block_scores(plan, q, k, numbers, scaling, sequences, block_size, 0, q.shape[1], arch)


@fake(_block_numbers)
def _(q: Tensor, k: Tensor, block_size: int, scale: float | None, softcap: float | None) -> Tensor:
    shape = scores_shape(Sequences(1, q.shape[0], k.shape[0]), q.shape[1], block_size, q.shape[0])
    return q.new_empty(shape, dtype=torch.float32)
