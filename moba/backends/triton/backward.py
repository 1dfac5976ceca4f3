"""Backward of attention over a routing: dK and dV by block, dQ by partials that are added in the order of slots.

Letters and words as in device.py and forward.py. With P the softmax weights and delta = Σ_d dO · O - dLSE,

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   dK = scale · dSᵀ Q,   dQ = scale · dS K,

where a softcap c multiplies dS by 1 - (logit / c)².

No program adds to memory that another one adds to, so gradients repeat bit for bit. A program holds a tile of one
block's keys and takes all their queries, of every head of the group; the queries of a block that very many chose are
cut into *segments* of one length a head, whose sums are added in order by `_reduce_segments_kernel`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.device import (
    LN_2,
    View,
    layout_of,
    load_rows,
    num_query_tiles,
    rows_of,
)
from moba.backends.triton.dkv import (
    SEGMENT_LENGTHS,
    Segments,
    _count_segments_kernel,
    _dkv_kernel,
    _reduce_segments_kernel,
    plan_segments,
)
from moba.backends.triton.dq import _dq_own_kernel, _dq_past_kernel
from moba.backends.triton.entries import load_query_rows, packed_rows, tile_queries
from moba.backends.triton.forward import Partials
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2
from moba.backends.triton.logits import logit_scaling
from moba.backends.triton.variants import HAS_GLUON
from moba.backends.triton.workspace import (
    Bounds,
    Chunk,
    chunk_query_tiles,
    chunks_with_bounds,
    hopper_sizes,
    keys_of,
    own_keys_of,
    tile_sizes,
    uniform_stride,
    windows,
)
from moba.sequences import Sequences

if HAS_GLUON:
    from moba.backends.triton.dkv_hopper import _dkv_hopper_kernel


class Softmax(NamedTuple):
    """What the backward knows of every query row's softmax: lse in log2 and delta, fp32 [heads, query rows, PACKED]."""

    lse2_ptr: Any
    delta_ptr: Any
    num_rows: Any


@triton.jit
def _delta_kernel(
    out_ptr, lse_ptr, d_outs, d_lse_ptr, softmax, num_queries, num_heads, VALUE_DIM: tl.constexpr, TILE_M: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """delta, and lse in log2, both as [heads, R · T, PACKED]: what a gathered query needs lies together by head."""
    head = tl.program_id(1).to(tl.int64)
    query_rows = tl.program_id(0) * (TILE_M // PACKED) + tile_queries(TILE_M, PACKED)
    mask = query_rows < softmax.num_rows
    out_row = packed_rows(query_rows.to(tl.int64) * (num_heads // PACKED) + head, PACKED)
    out = load_rows(out_ptr, out_row * VALUE_DIM, mask, VALUE_DIM).to(tl.float32)
    d_out = load_query_rows(d_outs, head, query_rows, num_queries, mask, VALUE_DIM, False, PACKED).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + out_row, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + out_row, mask=mask, other=0.0)
    head_row = packed_rows(head * softmax.num_rows + query_rows, PACKED)
    tl.store(softmax.delta_ptr + head_row, delta, mask=mask)
    tl.store(softmax.lse2_ptr + head_row, lse / LN_2, mask=mask)


def plan_backward(
    plan: Plan,
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    view: View,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    sequences: Sequences,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    workspace_bytes: int,
    arch: int,
) -> None:
    """Gradients of `plan_forward`.

    Args:
        d_out: [R, T, H, Dv], any strides with a contiguous last dimension. d_lse: [R, T, H], contiguous; None: zeros.
        out, lse: what the forward made.
        d_q, d_k, d_v: like q, k and v, contiguous, which the plan fills: with exact zeros for keys that no query
            attends to. The rest is as in `plan_forward`.

    Numerics: sums in fp32; weights and logit gradients rounded to q's dtype before they are multiplied, the dQ of one
        query from one block to q's dtype before they are added.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, topk, value_dim = k.shape[2], indices.shape[3], v.shape[3]
    if not sequences.is_plain:
        # Padding belongs to no block, so no kernel writes its gradients.
        plan.zero(d_k)
        plan.zero(d_v)

    total_rows, routing_heads = num_rows * num_queries, indices.shape[2]
    num_blocks = view.offsets.shape[1] - 1
    group, packed = routing_heads // num_kv_heads, num_heads // routing_heads
    lse2, delta = (plan.buffer(routing_heads, total_rows * packed, dtype=torch.float32) for _ in range(2))
    softmax = Softmax(lse2, delta, total_rows)
    tile_m = 64
    plan.launch(
        _delta_kernel, (cdiv(total_rows, tile_m // packed), routing_heads), out, lse, rows_of(d_out), d_lse, softmax,
        num_queries, num_heads, VALUE_DIM=value_dim, TILE_M=tile_m, PACKED=packed, num_warps=4,
    )  # fmt: skip

    layout, scaling = layout_of(sequences, block_size), logit_scaling(scale, softcap)
    shape = {
        "GROUP": group, "TOPK": topk, "BLOCK_SIZE": block_size, "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "PACKED": packed,
    }  # fmt: skip
    uniform = uniform_stride(q, d_out)
    dkv, dkv_kernel = tile_sizes("dkv", arch, q, v, block_size, packed), _dkv_kernel
    dkv["TILE_N"] = min(dkv["TILE_N"], max(16, next_power_of_2(block_size)))
    for_hopper = hopper_sizes(plan, arch, q, v, d_out, block_size, packed, softcap)
    if for_hopper:
        dkv, dkv_kernel = for_hopper, _dkv_hopper_kernel
    past, own = (tile_sizes(name, arch, q, v, block_size, packed) for name in ("dq_past", "dq_own"))
    past_keys = keys_of(plan, k, v, past["TILE_N"], arch, allowed=block_size % past["TILE_N"] == 0)
    own_keys = own_keys_of(plan, k, v, own["TILE_N"], arch, sequences, block_size)

    shortest, longest, num_segments = plan_segments(q, k, v, view.num_entries * group, packed, block_size)
    sums_dim = max(head_dim, value_dim)
    sums_bytes = 16 * num_segments * block_size * sums_dim
    row_bytes = (topk - 1) * head_dim * q.element_size() * packed
    fits = group * total_rows * row_bytes + sums_bytes <= workspace_bytes
    can_fuse = block_size <= dkv["TILE_N"] and topk > 1
    is_fused = can_fuse and fits
    kv_head_bytes = sums_bytes + (group * total_rows * row_bytes if is_fused else 0)
    tiles_per_row = num_query_tiles(sequences, own["TILE_M"] // packed)[1]

    def add_own(partial: Tensor, chunk: Chunk) -> None:
        tiles, first_tile = chunk_query_tiles(sequences, own["TILE_M"], packed, chunk)
        partials = Partials(partial, None, chunk.first_head, chunk.row_begin, chunk.num_rows, first_tile)
        others = (rows_of(d_out), softmax, rows_of(indices), partials, d_q, scaling)
        sizes = (num_heads, layout, tiles_per_row)
        grid = (tiles, chunk.num_heads)
        plan.launch(_dq_own_kernel, grid, rows_of(q), *own_keys[0], *others, *sizes, **shape, **own)
        for keys in own_keys[1:]:
            plan.foresee(_dq_own_kernel, rows_of(q), *keys, *others, *sizes, **shape, **own)

    at_once = max(1, min(num_kv_heads, workspace_bytes // max(1, kv_head_bytes)))
    at_once = cdiv(num_kv_heads, cdiv(num_kv_heads, at_once))
    extra = plan.buffer(at_once, num_blocks + 2, dtype=torch.int32)
    sums = plan.buffer(at_once, max(1, 2 * num_segments * 2 * block_size * sums_dim), dtype=torch.float32)
    segments = Segments(extra, sums, shortest, longest, num_segments)
    by_key = (rows_of(q), rows_of(k), rows_of(v), rows_of(d_out), softmax, view, segments, d_k, d_v)
    for is_uniform in uniform:
        for partial in (None, d_q) if can_fuse else (None,):
            plan.foresee(
                dkv_kernel, *by_key, partial, 0, num_kv_heads, scaling, layout, **shape, **dkv,
                UNIFORM_STRIDE=is_uniform,
            )  # fmt: skip
    partial = plan.buffer(at_once * group, topk - 1, total_rows * packed, head_dim, dtype=q.dtype) if is_fused else None
    for first_kv_head in range(0, num_kv_heads, at_once):
        kv_heads = min(at_once, num_kv_heads - first_kv_head)
        plan.launch(
            _count_segments_kernel, (kv_heads,), view, segments, first_kv_head, num_blocks,
            GROUP=group, TILE=1024, LENGTHS=SEGMENT_LENGTHS, num_warps=8,
        )  # fmt: skip
        plan.launch(
            dkv_kernel, ((num_segments + num_blocks) * cdiv(block_size, dkv["TILE_N"]), kv_heads),
            *by_key, partial, first_kv_head, num_kv_heads, scaling, layout, **shape, **dkv, UNIFORM_STRIDE=uniform[0],
        )  # fmt: skip
        plan.launch(
            _reduce_segments_kernel, (max(1, num_segments), cdiv(block_size, 32), kv_heads),
            segments, d_k, d_v, first_kv_head, num_kv_heads, layout,
            BLOCK_SIZE=block_size, HEAD_DIM=head_dim, VALUE_DIM=value_dim, TILE_N=32, num_warps=4,
        )  # fmt: skip
        if partial is not None:
            add_own(partial, Chunk(first_kv_head * group, kv_heads * group, 0, total_rows))

    def past_arguments(partial: Tensor, chunk: Chunk, bounds: Bounds) -> tuple[Any, ...]:
        partials = Partials(partial, None, chunk.first_head, chunk.row_begin, chunk.num_rows, None)
        return rows_of(q), *past_keys, rows_of(d_out), softmax, view, bounds, partials, scaling, layout

    if topk > 1:
        offsets = view.offsets
        bounds = Bounds(offsets, offsets[:, 1:], offsets.stride(0), None if packed == 1 else offsets)
        arguments = past_arguments(d_q, Chunk(0, 1, 0, total_rows), bounds)
        for is_uniform in uniform:
            plan.foresee(_dq_past_kernel, *arguments, **shape, **past, UNIFORM_STRIDE=is_uniform)
    if is_fused:
        return
    gathered_bytes = (head_dim + value_dim) * q.element_size()
    parts = chunks_with_bounds(plan, view, total_rows, topk, packed, row_bytes, gathered_bytes, workspace_bytes)
    size = parts[0][0].num_heads * parts[0][0].num_rows * packed
    partial = plan.buffer(topk - 1, size * head_dim, dtype=q.dtype)
    for chunk, bounds in parts:
        if topk > 1:
            num_entries = view.num_entries if packed == 1 else chunk.num_rows * (topk - 1)
            grid = (windows(num_entries, num_blocks, past), chunk.num_heads)
            plan.launch(
                _dq_past_kernel, grid, *past_arguments(partial, chunk, bounds), **shape, **past,
                UNIFORM_STRIDE=uniform[0],
            )  # fmt: skip
        add_own(partial, chunk)
