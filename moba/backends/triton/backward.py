"""Backward of attention over a routing: dK and dV by block, dQ by partials that are added in the order of slots.

Letters and words as in forward.py. With P the softmax weights and delta = Σ_d dO · O - dLSE,

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   dK = scale · dSᵀ Q,   dQ = scale · dS K.

No program adds to memory that another one adds to, so gradients repeat bit for bit. A program holds a tile of one
block's keys and takes all their queries, of every head of the group; the queries of a block that very many chose are
cut into *segments* of fixed length, whose sums are added in order by `_reduce_segments_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton.dkv import _count_segments_kernel, _dkv_kernel, _reduce_segments_kernel, plan_segments
from moba.backends.triton.dq import _dq_own_kernel, _dq_past_kernel
from moba.backends.triton.launch import Launch, launch
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
from moba.backends.triton.spans import num_query_tiles
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
    delta = tl.sum(out * d_out, 1) - tl.load(d_lse_ptr + place, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + place, mask=mask, other=0.0)
    place = head * total_rows + rows
    tl.store(delta_ptr + place, delta, mask=mask)
    tl.store(lse2_ptr + place, lse / LN_2, mask=mask)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    view: View,
    sequences: Sequences,
    *,
    block_size: int,
    scale: float,
    workspace_bytes: int,
    arch: int,
    run: Launch = launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        d_out: [R, T, H, D], any strides with a contiguous last dimension. d_lse: [R, T, H], contiguous.
        out, lse: what `forward` returned. The rest is as it was given there.

    Returns:
        d_q, d_k, d_v in q's dtype, contiguous; exact zeros for keys that no query attends to.

    Numerics: sums in fp32; weights and logit gradients rounded to q's dtype before they are multiplied, the dQ of one
        query from one block to q's dtype before they are added.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, topk = k.shape[1], k.shape[2], indices.shape[3]
    # Padding belongs to no block, so no kernel writes its gradients.
    new_like_k = k.new_empty if sequences.is_plain else k.new_zeros
    d_q, d_k, d_v = q.new_empty(q.shape), new_like_k(k.shape), new_like_k(v.shape)
    if q.numel() == 0:
        return d_q, d_k.zero_(), d_v.zero_()

    total_rows = num_rows * num_queries
    group = num_heads // num_kv_heads
    lse2, delta = lse.new_empty(num_heads, total_rows), lse.new_empty(num_heads, total_rows)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    one_row = {"ONE_ROW": num_rows == 1}
    tile_m = 64
    run(_delta_kernel, (triton.cdiv(total_rows, tile_m), num_heads),
        out, d_out, lse, d_lse, lse2, delta, *d_out.stride()[:3], total_rows, num_queries, num_heads,
        **shape, **one_row, TILE_M=tile_m, num_warps=4,
    )  # fmt: skip

    layout = {
        "num_queries": num_queries, "num_keys": num_keys,
        "key_start_ptr": sequences.key_start, "key_end_ptr": sequences.key_end, "cu_k_ptr": sequences.cu_k,
        "num_sequences": 0 if sequences.cu_k is None else sequences.cu_k.numel() - 1,
    }  # fmt: skip
    blocks = {"num_blocks": view.offsets.shape[1] - 1, "blocks_per_row": sequences.num_blocks(block_size)}
    scales = {"scale": scale, "scale_log2": scale * LOG2_E, "total_rows": total_rows}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    sparse = {"TOPK": topk, "BLOCK_SIZE": block_size, "GROUP": group}
    dkv = tile_sizes("dkv", arch, q, block_size)
    dkv["TILE_N"] = min(dkv["TILE_N"], max(16, triton.next_power_of_2(block_size)))
    past, own = tile_sizes("dq_past", arch, q, block_size), tile_sizes("dq_own", arch, q, block_size)

    past_keys = key_sources(k, v, past["TILE_N"], arch, allowed=block_size % past["TILE_N"] == 0)
    own_keys = key_sources(k, v, own["TILE_N"], arch, allowed=sequences.is_plain)

    num_entries = view.entries.shape[1]
    segment_length, num_extra = plan_segments(q, k, num_entries * group, block_size)
    sums_bytes = 16 * num_extra * block_size * head_dim
    row_bytes = (topk - 1) * head_dim * q.element_size()
    fits = group * total_rows * row_bytes + sums_bytes <= workspace_bytes
    is_fused = block_size <= dkv["TILE_N"] and topk > 1 and fits
    kv_head_bytes = sums_bytes + (group * total_rows * row_bytes if is_fused else 0)
    num_tiles, tiles_per_row = num_query_tiles(sequences, own["TILE_M"])

    def add_own(partial: Tensor | None, chunk: Chunk) -> None:
        run(_dq_own_kernel, (num_tiles, chunk.num_heads),
            q, *own_keys, d_out, lse2, delta, indices, partial, d_q, *strides, *indices.stride()[:3],
            chunk.first_head, chunk.row_begin, chunk.num_rows, num_heads=num_heads,
            cu_q_ptr=sequences.cu_q, tiles_per_row=tiles_per_row, **layout, **scales, **shape, **sparse,
            WITH_TMA=own_keys[0] is not k, **own,
        )  # fmt: skip

    kv_heads_at_once = max(1, min(num_kv_heads, workspace_bytes // max(1, kv_head_bytes)))
    kv_heads_at_once = triton.cdiv(num_kv_heads, triton.cdiv(num_kv_heads, kv_heads_at_once))
    for first_kv_head in range(0, num_kv_heads, kv_heads_at_once):
        kv_heads = min(kv_heads_at_once, num_kv_heads - first_kv_head)
        extra = sums = partial = None
        if num_extra:
            extra = view.offsets.new_empty(kv_heads, blocks["num_blocks"] + 1)
            sums = lse.new_empty(kv_heads, 2 * num_extra, 2, block_size, head_dim)
            run(
                _count_segments_kernel,
                (kv_heads,),
                view.offsets,
                extra,
                first_kv_head,
                segment_length,
                blocks["num_blocks"],
                GROUP=group,
                TILE=1024,
            )
        if is_fused:
            partial = q.new_empty(kv_heads * group, topk - 1, total_rows, head_dim)
        key_tiles = triton.cdiv(block_size, dkv["TILE_N"])
        run(_dkv_kernel, ((num_extra + blocks["num_blocks"]) * key_tiles, kv_heads),
            q, k, v, d_out, lse2, delta, view.offsets, view.entries, extra, d_k, d_v, sums, partial, *strides,
            num_entries, first_kv_head, num_kv_heads, segment_length, num_extra, cu_q_ptr=sequences.cu_q,
            **layout, **blocks, **scales, **shape, **sparse, **one_row,
            **dkv, WITH_D_Q=is_fused,
        )  # fmt: skip
        if num_extra:
            run(_reduce_segments_kernel, (num_extra, triton.cdiv(block_size, 32), kv_heads),
                extra, sums, d_k, d_v, first_kv_head, num_kv_heads, num_extra, cu_q_ptr=sequences.cu_q,
                **layout, **blocks, **shape, BLOCK_SIZE=block_size, TILE_N=32, num_warps=4,
            )  # fmt: skip
        if is_fused:
            add_own(partial, Chunk(first_kv_head * group, kv_heads * group, 0, total_rows))
        del extra, sums, partial
    if is_fused:
        return d_q, d_k, d_v

    for chunk in chunks(num_heads, total_rows, row_bytes, workspace_bytes):
        partial = q.new_empty(chunk.num_heads, topk - 1, chunk.num_rows, head_dim)
        if topk > 1:
            num_windows = windows(view, past)
            first, last, stride_first = chunk_bounds(view, chunk, total_rows, topk, run)
            run(_dq_past_kernel, (num_windows, chunk.num_heads),
                q, *past_keys, d_out, lse2, delta, view.offsets, first, last, view.entries, partial, *strides,
                stride_first, num_entries, chunk.first_head, chunk.row_begin, chunk.num_rows,
                **layout, **blocks, **scales, **shape, **sparse, **one_row,
                WITH_TMA=past_keys[0] is not k, **past,
            )  # fmt: skip
        add_own(partial, chunk)
    return d_q, d_k, d_v
