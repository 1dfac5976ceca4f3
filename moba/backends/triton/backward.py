"""Backward of attention over a routing: dK and dV by block, dQ by partials that are added in the order of slots.

Letters and words as in forward.py. With P the softmax weights and delta = Σ_d dO · O - dLSE,

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   dK = scale · dSᵀ Q,   dQ = scale · dS K.

No program adds to memory that another one adds to, so gradients repeat bit for bit. A program holds a tile of one
block's keys and takes all their queries, of every head of the group; the queries of a block that very many chose are
cut into *segments* of fixed length, whose sums are added in order by `_reduce_segments_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.dkv import _count_segments_kernel, _dkv_kernel, _reduce_segments_kernel, plan_segments
from moba.backends.triton.dq import _dq_own_kernel, _dq_past_kernel
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2
from moba.backends.triton.plan import (
    LOG2_E,
    Chunk,
    View,
    chunk_bounds,
    chunks,
    key_sources,
    padded_head_dim,
    tile_sizes,
    windows,
)
from moba.backends.triton.primitives import num_query_tiles
from moba.backends.triton.tiles import LN_2, load_rows, row_offsets
from moba.layout import Sequences


@triton.jit
def _delta_kernel(
    out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, lse2_ptr, delta_ptr, stride_dr, stride_dt, stride_dh,
    total_rows, num_queries, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_M: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """delta, and lse in log2, both as [H, R · T]: what a gathered query needs lies together by head."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    mask = rows < total_rows
    place = rows.to(tl.int64) * num_heads + head
    d_out_offsets = row_offsets(rows, num_queries, stride_dr, stride_dt, ONE_ROW) + head * stride_dh
    out = load_rows(out_ptr, place * HEAD_DIM, mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    d_out = load_rows(d_out_ptr, d_out_offsets, mask, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(out * d_out, 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + place, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + place, mask=mask, other=0.0)
    place = head * total_rows + rows
    tl.store(delta_ptr + place, delta, mask=mask)
    tl.store(lse2_ptr + place, lse / LN_2, mask=mask)


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
    workspace_bytes: int,
    arch: int,
    keys_aligned: bool,
) -> None:
    """Gradients of `plan_forward`.

    Args:
        d_out: [R, T, H, D], any strides with a contiguous last dimension. d_lse: [R, T, H], contiguous; None for zeros.
        out, lse: what the forward made.
        d_q, d_k, d_v: like q, k and v, contiguous, which the plan fills: with exact zeros for keys that no query
            attends to. The rest is as in `plan_forward`.

    Numerics: sums in fp32; weights and logit gradients rounded to q's dtype before they are multiplied, the dQ of one
        query from one block to q's dtype before they are added.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, topk = k.shape[1], k.shape[2], indices.shape[3]
    if not sequences.is_plain:
        # Padding belongs to no block, so no kernel writes its gradients.
        plan.zero(d_k)
        plan.zero(d_v)

    total_rows = num_rows * num_queries
    group = num_heads // num_kv_heads
    lse2, delta = (plan.buffer(num_heads, total_rows, dtype=torch.float32) for _ in range(2))
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    one_row = {"ONE_ROW": num_rows == 1}
    tile_m = 64
    plan.launch(_delta_kernel, (cdiv(total_rows, tile_m), num_heads),
        out, d_out, lse, d_lse, lse2, delta, *d_out.stride()[:3], total_rows, num_queries, num_heads,
        **shape, **one_row, TILE_M=tile_m, num_warps=4,
    )  # fmt: skip

    layout = {
        "num_queries": num_queries, "num_keys": num_keys,
        "key_start_ptr": sequences.key_start, "key_end_ptr": sequences.key_end, "cu_k_ptr": sequences.cu_k,
        "num_sequences": 0 if sequences.cu_k is None else sequences.cu_k.numel() - 1,
    }  # fmt: skip
    num_blocks = view.offsets.shape[1] - 1
    blocks = {"num_blocks": num_blocks, "blocks_per_row": sequences.num_blocks(block_size)}
    scales = {"scale": scale, "scale_log2": scale * LOG2_E, "total_rows": total_rows}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    sparse = {"TOPK": topk, "BLOCK_SIZE": block_size, "GROUP": group}
    dkv = tile_sizes("dkv", arch, q, block_size)
    dkv["TILE_N"] = min(dkv["TILE_N"], max(16, next_power_of_2(block_size)))
    past, own = tile_sizes("dq_past", arch, q, block_size), tile_sizes("dq_own", arch, q, block_size)

    past_keys = key_sources(k, v, past["TILE_N"], arch, keys_aligned and block_size % past["TILE_N"] == 0)
    own_keys = key_sources(k, v, own["TILE_N"], arch, keys_aligned and sequences.is_plain)

    num_entries = view.entries.shape[1]
    segment_length, num_extra = plan_segments(q, k, num_entries * group, block_size)
    sums_bytes = 16 * num_extra * block_size * head_dim
    row_bytes = (topk - 1) * head_dim * q.element_size()
    fits = group * total_rows * row_bytes + sums_bytes <= workspace_bytes
    is_fused = block_size <= dkv["TILE_N"] and topk > 1 and fits
    kv_head_bytes = sums_bytes + (group * total_rows * row_bytes if is_fused else 0)
    num_tiles, tiles_per_row = num_query_tiles(sequences, own["TILE_M"])

    def add_own(partial: Tensor, chunk: Chunk) -> None:
        plan.launch(_dq_own_kernel, (num_tiles, chunk.num_heads),
            q, *own_keys, d_out, lse2, delta, indices, partial, d_q, *strides, *indices.stride()[:3],
            chunk.first_head, chunk.row_begin, chunk.num_rows, num_heads=num_heads,
            cu_q_ptr=sequences.cu_q, tiles_per_row=tiles_per_row, **layout, **scales, **shape, **sparse,
            WITH_TMA=own_keys[0] is not k, **own,
        )  # fmt: skip

    at_once = max(1, min(num_kv_heads, workspace_bytes // max(1, kv_head_bytes)))
    at_once = cdiv(num_kv_heads, cdiv(num_kv_heads, at_once))
    extra = sums = partial = None
    if num_extra:
        extra = plan.buffer(at_once, num_blocks + 1, dtype=torch.int32)
        sums = plan.buffer(at_once, 2 * num_extra, 2, block_size, head_dim, dtype=torch.float32)
    if is_fused:
        partial = plan.buffer(at_once * group, topk - 1, total_rows, head_dim, dtype=q.dtype)
    for first_kv_head in range(0, num_kv_heads, at_once):
        kv_heads = min(at_once, num_kv_heads - first_kv_head)
        if num_extra:
            plan.launch(_count_segments_kernel, (kv_heads,),
                view.offsets, extra, first_kv_head, segment_length, num_blocks, GROUP=group, TILE=1024,
            )  # fmt: skip
        key_tiles = cdiv(block_size, dkv["TILE_N"])
        plan.launch(_dkv_kernel, ((num_extra + num_blocks) * key_tiles, kv_heads),
            q, k, v, d_out, lse2, delta, view.offsets, view.entries, extra, d_k, d_v, sums, partial, *strides,
            num_entries, first_kv_head, num_kv_heads, segment_length, num_extra, cu_q_ptr=sequences.cu_q,
            **layout, **blocks, **scales, **shape, **sparse, **one_row,
            **dkv, WITH_D_Q=is_fused,
        )  # fmt: skip
        if num_extra:
            plan.launch(_reduce_segments_kernel, (num_extra, cdiv(block_size, 32), kv_heads),
                extra, sums, d_k, d_v, first_kv_head, num_kv_heads, num_extra, cu_q_ptr=sequences.cu_q,
                **layout, **blocks, **shape, BLOCK_SIZE=block_size, TILE_N=32, num_warps=4,
            )  # fmt: skip
        if partial is not None:
            add_own(partial, Chunk(first_kv_head * group, kv_heads * group, 0, total_rows))
    if is_fused:
        return

    parts = chunks(num_heads, total_rows, row_bytes, workspace_bytes)
    partial = plan.buffer(topk - 1, parts[0].num_heads * parts[0].num_rows * head_dim, dtype=q.dtype)
    bounds_memory = plan.buffer(2, parts[0].num_heads, num_blocks, dtype=torch.int32)
    for chunk in parts:
        if topk > 1:
            first, last, stride_first = chunk_bounds(plan, view, chunk, total_rows, topk, bounds_memory)
            plan.launch(_dq_past_kernel, (windows(view, past), chunk.num_heads),
                q, *past_keys, d_out, lse2, delta, view.offsets, first, last, view.entries, partial, *strides,
                stride_first, num_entries, chunk.first_head, chunk.row_begin, chunk.num_rows,
                **layout, **blocks, **scales, **shape, **sparse, **one_row,
                WITH_TMA=past_keys[0] is not k, **past,
            )  # fmt: skip
        add_own(partial, chunk)
