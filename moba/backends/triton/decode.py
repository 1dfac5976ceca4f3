"""Decoding: a few queries a row, over the means of finished blocks that a cache keeps and the selected keys alone.

A step is four kernels: scores, selection (decode_select.py), attention by block, merge (decode_attend.py). Bounds, page
tables and routings stay on the device and grids follow from shapes, so a step records into a CUDA graph and serves any
context that fits the tensors: programs past a row's end have nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba import routing
from moba.backends.triton import decode_attend, decode_select
from moba.backends.triton.decode_means import _append_means_kernel, append_means_launch
from moba.backends.triton.launch import Plan, cdiv, next_power_of_2, run_planned
from moba.backends.triton.overlap import is_early, launch_options
from moba.backends.triton.tuning import arch_of, lookup
from moba.layout import Sequences
from moba.routing import Selection

LOG2_E = 1.4426950408889634
# Slots of the routing that a program compares at a time.
MAX_TILE_K = 64
# Keys that a warp holds as it selects.
VALUES_PER_WARP = 512


def decode(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, sequences: Sequences, selection: Selection, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by the means of finished blocks and attend. See `moba.backends` for the contract.

    A router that is a user's function runs in plain torch, as no kernel can call it, and waits for the device.

    Numerics: scores as `route`'s: exact products of 16-bit inputs summed in fp32, full fp32 for fp32 ones. Softmax,
        sums and partial results in fp32, weights rounded to v's dtype before they multiply it.
    """
    bounds = (sequences.key_start, sequences.key_end, sequences.page_table)
    if selection.score not in (None, routing.mean_key_scores):
        indices = _route_by_function(q, means, sequences, selection)
        return (*_attend(q, k, v, indices, *bounds, selection.block_size, scale), indices)
    return _decode(
        q, k, v, means, *bounds, selection.block_size, selection.topk, selection.keep_first, selection.keep_recent,
        scale,
    )  # fmt: skip


@routing.outside_graphs
def _route_by_function(q: Tensor, means: Tensor, sequences: Sequences, selection: Selection) -> Tensor:
    """The routing by a user's function, which sees the means of one sequence's past blocks at a time."""
    if sequences.page_table is not None:
        means = means[sequences.mean_places(selection.block_size)]
    indices = q.new_full((*q.shape[:3], selection.topk), -1, dtype=torch.int32)
    for span in sequences.spans():
        positions = torch.arange(span.offset, span.k_len, device=q.device)
        own = torch.div(positions, selection.block_size, rounding_mode="floor")
        num_past = (span.k_len - 1) // selection.block_size
        rows = slice(span.q_start, span.q_start + span.q_len)
        scores = selection.scores(q[span.row, rows], means[span.row, :num_past])
        chosen = routing.select_blocks(scores, own, selection)
        indices[span.row, rows, :, : chosen.shape[-1]] = chosen
    return indices


def append_means(means: Tensor, k: Tensor, sequences: Sequences, block_size: int) -> None:
    """Write the means of the blocks that each row's last keys finished. See `moba.backends` for the contract.

    Numerics: the bits of `means.block_means`.
    """
    _append_means(
        means, k, sequences.key_start, sequences.key_end, sequences.page_table, sequences.num_queries, block_size
    )


def _sequences(
    num_rows: int,
    num_queries: int,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
) -> Sequences:
    num_keys = k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]
    return Sequences(num_rows, num_queries, num_keys, key_start, key_end, page_table=page_table)


@torch.library.custom_op("moba::triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, indices = _empty_results(q, topk)
    if q.numel():
        run_planned(
            _plan_decode, q, k, v, means, key_start, key_end, page_table, out, lse, indices, device=q.device,
            block_size=block_size, keep_first=keep_first, keep_recent=keep_recent, scale=scale, arch=arch_of(q.device),
        )  # fmt: skip
    return out, lse, indices


@_decode.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(q, topk)


@torch.library.custom_op("moba::triton_decode_attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse, _ = _empty_results(q, 0)
    if q.numel():
        run_planned(
            _plan_attend, q, k, v, key_start, key_end, page_table, out, lse, indices.contiguous(), device=q.device,
            block_size=block_size, scale=scale, arch=arch_of(q.device), is_first=True,
        )  # fmt: skip
    return out, lse


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, 0)[:2]


@torch.library.custom_op("moba::triton_append_means", mutates_args=("means",))
def _append_means(
    means: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    num_new: int,
    block_size: int,
) -> None:
    if k.numel() and means.numel() and num_new:
        run_planned(
            _plan_append, means, k, key_start, key_end, page_table, device=k.device, num_new=num_new,
            block_size=block_size,
        )  # fmt: skip


def _empty_results(q: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for out, lse and the routing."""
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty((*q.shape[:3], topk), dtype=torch.int32),
    )


def _plan_append(plan: Plan, means: Tensor, k: Tensor, *bounds: Tensor | None, num_new: int, block_size: int) -> None:
    table = bounds[2]
    num_rows = k.shape[0] if table is None else table.shape[0]
    grid, arguments = append_means_launch(means, k, _sequences(num_rows, num_new, k, *bounds), block_size)
    plan.launch(_append_means_kernel, grid, **arguments)


def _plan_decode(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    keep_first: int,
    keep_recent: int,
    scale: float,
    arch: int,
) -> None:
    sequences = _sequences(q.shape[0], q.shape[1], k, key_start, key_end, page_table)
    selection = Selection(block_size, indices.shape[3], keep_first, keep_recent, None)
    plan_route(plan, q, means, indices, sequences, selection, arch)
    _plan_attend(
        plan, q, k, v, key_start, key_end, page_table, out, lse, indices, block_size=block_size, scale=scale,
        arch=arch, is_first=False,
    )  # fmt: skip


def plan_route(
    plan: Plan, q: Tensor, means: Tensor, indices: Tensor, sequences: Sequences, selection: Selection, arch: int
) -> None:
    """The launches that write the routing by the given means: scores, where any place goes by score, and selection."""
    places = selection.topk - 1 - selection.keep_first - selection.keep_recent
    # No query chooses among more blocks by score.
    num_blocks = max(0, (sequences.num_keys - 1) // selection.block_size)
    keys = maxima = indices
    num_columns = families = slots = 0
    if places and num_blocks:
        family = decode_select.FAMILY.value
        num_columns = cdiv(num_blocks, family) * family
        families = next_power_of_2(num_columns // family)
        is_small = families * family <= decode_select.MAX_AT_ONCE
        slots = families if is_small else min(next_power_of_2(places), families)
        if max(families, slots * family) > decode_select.MAX_HELD:
            slots = 0
        keys = plan.buffer(*q.shape[:3], num_columns, dtype=torch.int32)
        maxima = plan.buffer(*q.shape[:3], num_columns // family, dtype=torch.int32)
        _launch_scores(plan, q, means, keys, maxima, sequences, selection, arch)
    held = max(families, slots * decode_select.FAMILY.value) if slots else decode_select.CHUNK.value
    plan.launch(
        decode_select._decode_select_kernel, (indices.numel() // selection.topk,),
        keys, maxima, indices, sequences.key_start, sequences.key_end,
        sequences.num_queries, sequences.num_keys, num_columns, q.shape[2], selection.topk, selection.keep_first,
        selection.keep_recent, BLOCK_SIZE=selection.block_size, FAMILIES=families, SLOTS=slots,
        EARLY=is_early(arch), num_warps=min(16, max(1, next_power_of_2(held // VALUES_PER_WARP))),
        **(launch_options(arch) if families else {}),
    )  # fmt: skip


def _launch_scores(
    plan: Plan,
    q: Tensor,
    means: Tensor,
    keys: Tensor,
    maxima: Tensor,
    sequences: Sequences,
    selection: Selection,
    arch: int,
) -> None:
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = means.shape[2]
    group = num_heads // num_kv_heads
    padded_dim = max(16, next_power_of_2(head_dim))
    config = dict(_config("decode_score", arch, q, selection.block_size))
    tile_n = config.pop("TILE_N")
    tile_m = _tile_m(num_queries * group)
    table = sequences.page_table
    plan.launch(
        decode_select._score_kernel,
        (cdiv(keys.shape[3], tile_n), num_rows * num_kv_heads, cdiv(num_queries * group, tile_m)),
        q, means, keys, maxima, sequences.key_start, sequences.key_end, table,
        num_queries, sequences.num_keys, keys.shape[3], selection.keep_first, selection.keep_recent, num_kv_heads,
        *q.stride()[:3], *means.stride()[:3], 0 if table is None else table.stride(0),
        GROUP=group, BLOCK_SIZE=selection.block_size, PAGE_SIZE=0 if table is None else sequences.page_size,
        HEAD_DIM=head_dim, TILE_D=padded_dim if q.element_size() == 2 else min(padded_dim, 32), TILE_M=tile_m,
        TILE_N=tile_n, EARLY=is_early(arch), **config,
    )  # fmt: skip


def _plan_attend(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    scale: float,
    arch: int,
    is_first: bool,
) -> None:
    """The launches that attend over a routing: partial results, and their merge. is_first: no kernel of the plan
    wrote `indices`.
    """
    num_rows, num_queries, num_heads, head_dim = q.shape
    topk = indices.shape[3]
    sequences = _sequences(num_rows, num_queries, k, key_start, key_end, page_table)
    group = num_heads // k.shape[2]
    members = num_queries * group
    tile_m = _tile_m(members)
    config = dict(_config("decode_attend", arch, q, block_size))
    part = max(config["TILE_N"], min(config.pop("PART"), next_power_of_2(block_size)))
    parts = cdiv(block_size, part)
    partial = plan.buffer(num_rows, num_queries, num_heads, topk * parts, head_dim, dtype=torch.float32)
    partial_lse = plan.buffer(num_rows, num_queries, num_heads, topk * parts, dtype=torch.float32)
    padded_dim = max(16, next_power_of_2(head_dim))
    plan.launch(
        decode_attend._decode_attend_kernel,
        (min(tile_m, members) * topk * parts, num_rows * k.shape[2], cdiv(members, tile_m)),
        q, k, v, indices, partial, partial_lse, key_start, key_end, page_table,
        scale * LOG2_E, num_queries, sequences.num_keys, k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if page_table is None else page_table.stride(0),
        GROUP=group, TOPK=topk, BLOCK_SIZE=block_size, PAGE_SIZE=0 if page_table is None else sequences.page_size,
        PARTS=parts, PART=part, HEAD_DIM=head_dim, BLOCK_D=padded_dim, IS_ALONE=members == 1, TILE_M=tile_m,
        TILE_K=min(MAX_TILE_K, next_power_of_2(topk)), EARLY=is_early(arch), **config,
        **({} if is_first else launch_options(arch)),
    )  # fmt: skip
    merge = dict(_config("decode_merge", arch, q, block_size))
    tile_d = min(merge.pop("TILE_D"), padded_dim)
    tile_p = min(merge.pop("TILE_P"), next_power_of_2(topk * parts))
    plan.launch(
        decode_attend._decode_merge_kernel, (num_rows * num_queries * num_heads, cdiv(head_dim, tile_d)),
        partial, partial_lse, out, lse, NUM_PARTIALS=topk * parts, HEAD_DIM=head_dim, TILE_D=tile_d, TILE_P=tile_p,
        EARLY=is_early(arch), **merge, **launch_options(arch),
    )  # fmt: skip


def _tile_m(members: int) -> int:
    """Query rows of a tile: at least what a matrix product takes."""
    return min(64, max(16, next_power_of_2(members)))


def _config(kernel: str, arch: int, q: Tensor, block_size: int) -> Any:
    head_dim = max(16, next_power_of_2(q.shape[3]))
    return lookup(kernel, arch, head_dim=head_dim, block_size=block_size, element_bytes=q.element_size())
