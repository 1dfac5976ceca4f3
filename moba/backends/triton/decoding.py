"""Decoding: a few queries a row, over the means of finished blocks that a cache keeps and the selected keys alone.

A step is four kernels: scores, selection (decode_select.py), attention by block, merge (decode_attend.py). Bounds, page
tables and routings stay on the device and grids follow from shapes, so a step records into a CUDA graph and serves any
context that fits the tensors: programs past a row's end have nothing to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba import routers, routing
from moba.backends.triton import decode_attend, decode_select
from moba.backends.triton.decode_means import launch_append_means
from moba.backends.triton.decode_select import Step, Table
from moba.backends.triton.device import padded_head_dim, rows_of
from moba.backends.triton.launch import Number, Plan, cdiv, next_power_of_2, run_planned
from moba.backends.triton.logits import logit_scaling
from moba.backends.triton.registration import fake, operator
from moba.backends.triton.tuning import arch_of
from moba.backends.triton.workspace import tile_sizes
from moba.routing import Selection
from moba.sequences import Sequences

# What differs from step to step: the length of a cache that grows, and with it the stride of some page tables.
NUM_KEYS, STRIDE_TABLE = Number(0), Number(1)
# Slots of the routing that a program compares at a time.
MAX_TILE_K = 64
# Keys that a warp holds as it selects: by families, which is short work, or among all blocks at once.
HELD_BY_FAMILIES, HELD_AT_ONCE = 512, 256


def decode(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, sequences: Sequences, selection: Selection, *, scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Route by the means of finished blocks and attend. See `moba.backends` for the contract.

    A router that is a user's function runs in plain torch, as no kernel can call it, and waits for the device.

    Numerics: scores as `route`'s: exact products of 16-bit inputs summed in fp32, full fp32 for fp32 ones. Softmax,
        sums and partial results in fp32, weights rounded to v's dtype before they multiply it.
    """
    bounds = (sequences.key_start, sequences.key_end, sequences.page_table)
    if selection.score not in (None, routers.mean_key_scores):
        if sequences.page_table is not None:
            means = means[sequences.mean_places(selection.block_size)]
        indices = routing.route(q, None, sequences.without_pages(), selection, means)
        return (*_attend(q, k, v, indices, *bounds, selection.block_size, scale, softcap), indices)
    return _decode(
        q, k, v, means, *bounds, selection.block_size, selection.topk, selection.keep_first, selection.keep_recent,
        scale, softcap,
    )  # fmt: skip


def attend_step(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sequences: Sequences, *, block_size: int, scale: float,
    softcap: float | None = None, own_block: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a routing, block by block. See `moba.backends` for the contract; numerics as `decode`."""
    bounds = (sequences.key_start, sequences.key_end, sequences.page_table)
    return _attend(q, k, v, indices, *bounds, block_size, scale, softcap)


def append_means(means: Tensor, k: Tensor, sequences: Sequences, block_size: int) -> None:
    """Write the means of the blocks that each row's last keys finished. See `moba.backends` for the contract.

    Numerics: bit for bit the means of `means.mean_keys`.
    """
    _append_means(
        means, k, sequences.key_start, sequences.key_end, sequences.page_table, sequences.num_queries, block_size
    )


def _numbers(k: Tensor, page_table: Tensor | None) -> tuple[int, int]:
    """What NUM_KEYS and STRIDE_TABLE stand for."""
    return (k.shape[1], 0) if page_table is None else (k.shape[1] * page_table.shape[1], page_table.stride(0))


def _page_size(k: Tensor, page_table: Tensor | None) -> int:
    """Keys in a page, 0 without pages."""
    return 0 if page_table is None else k.shape[1]


def _capacity(num_keys: int) -> int:
    """Keys that the scores of a plan have room for: at least num_keys, and seldom another as that grows."""
    step = max(1024, next_power_of_2(num_keys) // 8)
    return cdiv(num_keys, step) * step


def _begin(x: Tensor | None) -> Tensor | None:
    """What a plan needs of a tensor [R, S, ...]: where it lies, and no size that grows with the context."""
    return None if x is None else x[:, :1]


@operator("triton_decode")
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
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, indices = _empty_results(q, v, topk)
    if q.numel():
        numbers = _numbers(k, page_table)
        run_planned(
            plan_decode, q, _begin(k), _begin(v), _begin(means), key_start, key_end, _begin(page_table), out, lse,
            indices, device=q.device, block_size=block_size, keep_first=keep_first, keep_recent=keep_recent,
            scale=scale, softcap=softcap, arch=arch_of(q.device), numbers=numbers, capacity=_capacity(numbers[0]),
            page_size=_page_size(k, page_table),
        )  # fmt: skip
    return out, lse, indices


@fake(_decode)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, topk, _keep_first, _keep_recent, _scale, _softcap = rest
    return _empty_results(q, v, topk)


@operator("triton_decode_attend")
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
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    out, lse, _ = _empty_results(q, v, 0)
    if q.numel():
        run_planned(
            _plan_attend, q, _begin(k), _begin(v), key_start, key_end, _begin(page_table), out, lse,
            indices.contiguous(), device=q.device, numbers=_numbers(k, page_table), block_size=block_size, scale=scale,
            softcap=softcap, arch=arch_of(q.device), page_size=_page_size(k, page_table),
        )  # fmt: skip
    return out, lse


@fake(_attend)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v, 0)[:2]


@operator("triton_append_means", mutates_args=("means",))
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
            plan_append, _begin(means), _begin(k), key_start, key_end, _begin(page_table), device=k.device,
            numbers=_numbers(k, page_table), num_new=num_new, block_size=block_size,
            page_size=_page_size(k, page_table),
        )  # fmt: skip


@fake(_append_means)
def _(*arguments: Any) -> None:
    pass


def _empty_results(q: Tensor, v: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for out, lse and the routing."""
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty((*q.shape[:3], topk), dtype=torch.int32),
    )


def plan_append(
    plan: Plan,
    means: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    page_table: Tensor | None,
    *,
    num_new: int,
    block_size: int,
    page_size: int,
) -> None:
    """The launch of `moba::triton_append_means`."""
    num_rows = (k if page_table is None else page_table).shape[0]
    step = Step(num_new, NUM_KEYS, k.shape[2], key_start, key_end)
    launch_append_means(
        plan, means, k, step, _table(page_table), num_rows=num_rows, block_size=block_size, page_size=page_size
    )


def _table(page_table: Tensor | None) -> Table:
    return Table(page_table, None if page_table is None else STRIDE_TABLE)


def plan_decode(
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
    softcap: float | None = None,
    arch: int,
    capacity: int,
    page_size: int,
) -> None:
    """The launches of `moba::triton_decode`."""
    selection = Selection(block_size, indices.shape[3], keep_first, keep_recent, None)
    bounds = (key_start, key_end, page_table)
    _plan_route(plan, q, means, indices, bounds, selection, arch=arch, capacity=capacity, page_size=page_size)
    _plan_attend(
        plan, q, k, v, *bounds, out, lse, indices, block_size=block_size, scale=scale, softcap=softcap, arch=arch,
        page_size=page_size,
    )  # fmt: skip


def _plan_route(
    plan: Plan,
    q: Tensor,
    means: Tensor,
    indices: Tensor,
    bounds: tuple[Tensor | None, Tensor | None, Tensor | None],
    selection: Selection,
    *,
    arch: int,
    capacity: int,
    page_size: int,
) -> None:
    """The launches that write the routing by the given means: scores, where scores fill any slot, and selection."""
    num_scored_slots = selection.topk - 1 - selection.keep_first - selection.keep_recent
    # No query chooses among more blocks by score.
    num_blocks = max(0, (capacity - 1) // selection.block_size)
    keys = maxima = indices
    num_columns = families = slots = 0
    if num_scored_slots and num_blocks:
        family = decode_select.FAMILY.value
        num_columns = cdiv(num_blocks, family) * family
        families = next_power_of_2(num_columns // family)
        is_small = families * family <= decode_select.MAX_AT_ONCE
        slots = families if is_small else min(next_power_of_2(num_scored_slots), families)
        if max(families, slots * family) > decode_select.MAX_HELD:
            slots = 0
        keys = plan.buffer(*q.shape[:3], num_columns, dtype=torch.int32)
        maxima = plan.buffer(*q.shape[:3], num_columns // family, dtype=torch.int32)
        _launch_scores(plan, q, means, keys, maxima, bounds, selection, arch=arch, page_size=page_size)
    held = max(families, slots * decode_select.FAMILY.value) if slots else decode_select.CHUNK.value
    held_by_warp = HELD_BY_FAMILIES if families > slots else HELD_AT_ONCE
    plan.launch(
        decode_select._decode_select_kernel, (indices.numel() // selection.topk,),
        keys, maxima, indices, Step(q.shape[1], NUM_KEYS, means.shape[2], *bounds[:2]),
        num_columns, q.shape[2], selection.topk, selection.keep_first, selection.keep_recent,
        BLOCK_SIZE=selection.block_size, FAMILIES=families, SLOTS=slots,
        num_warps=min(16, max(1, next_power_of_2(held // held_by_warp))),
    )  # fmt: skip


def _launch_scores(
    plan: Plan,
    q: Tensor,
    means: Tensor,
    keys: Tensor,
    maxima: Tensor,
    bounds: tuple[Tensor | None, Tensor | None, Tensor | None],
    selection: Selection,
    *,
    arch: int,
    page_size: int,
) -> None:
    num_rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = means.shape[2]
    group = num_heads // num_kv_heads
    padded_dim = padded_head_dim(head_dim)
    config = tile_sizes("decode_score", arch, q, means, selection.block_size)
    tile_n = config.pop("TILE_N")
    tile_m = _tile_m(num_queries * group)
    plan.launch(
        decode_select._score_kernel,
        (cdiv(keys.shape[3], tile_n), num_rows * num_kv_heads, cdiv(num_queries * group, tile_m)),
        rows_of(q), rows_of(means), keys, maxima, Step(num_queries, NUM_KEYS, num_kv_heads, *bounds[:2]),
        _table(bounds[2]), keys.shape[3], selection.keep_first, selection.keep_recent,
        GROUP=group, BLOCK_SIZE=selection.block_size, PAGE_SIZE=page_size,
        HEAD_DIM=head_dim, TILE_D=padded_dim if q.element_size() == 2 else min(padded_dim, 32), TILE_M=tile_m,
        TILE_N=tile_n, **config,
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
    softcap: float | None = None,
    arch: int,
    page_size: int,
) -> None:
    """The launches that attend over a routing: partial results, and their merge."""
    num_rows, num_queries, num_heads, head_dim = q.shape
    topk, value_dim = indices.shape[3], v.shape[3]
    group = num_heads // k.shape[2]
    members = num_queries * group
    tile_m = _tile_m(members)
    config = tile_sizes("decode_attend", arch, q, v, block_size)
    part = max(config["TILE_N"], min(config.pop("PART"), next_power_of_2(block_size)))
    parts = cdiv(block_size, part)
    partial = plan.buffer(num_rows, num_queries, num_heads, topk * parts, value_dim, dtype=torch.float32)
    partial_lse = plan.buffer(num_rows, num_queries, num_heads, topk * parts, dtype=torch.float32)
    plan.launch(
        decode_attend._decode_attend_kernel,
        (min(tile_m, members) * topk * parts, num_rows * k.shape[2], cdiv(members, tile_m)),
        rows_of(q), rows_of(k), rows_of(v), indices, partial, partial_lse,
        Step(num_queries, NUM_KEYS, k.shape[2], key_start, key_end), _table(page_table), logit_scaling(scale, softcap),
        GROUP=group, TOPK=topk, BLOCK_SIZE=block_size, PAGE_SIZE=page_size,
        PARTS=parts, PART=part, HEAD_DIM=head_dim, VALUE_DIM=value_dim, IS_ALONE=members == 1, TILE_M=tile_m,
        TILE_K=min(MAX_TILE_K, next_power_of_2(topk)), **config,
    )  # fmt: skip
    merge = tile_sizes("decode_merge", arch, q, v, block_size)
    tile_d = min(merge.pop("TILE_D"), padded_head_dim(value_dim))
    tile_p = min(merge.pop("TILE_P"), next_power_of_2(topk * parts))
    plan.launch(
        decode_attend._decode_merge_kernel, (num_rows * num_queries * num_heads, cdiv(value_dim, tile_d)),
        partial, partial_lse, out, lse, NUM_PARTIALS=topk * parts, VALUE_DIM=value_dim, TILE_D=tile_d, TILE_P=tile_p,
        **merge,
    )  # fmt: skip


def _tile_m(members: int) -> int:
    """Query rows of a tile: at least what a matrix product takes."""
    return min(64, max(16, next_power_of_2(members)))
