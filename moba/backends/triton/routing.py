"""Routing in Triton: block means, then scores and the selection in one kernel. No step waits for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba import routers, routing
from moba.backends.triton.attention import variants_after_routing
from moba.backends.triton.device import layout_of, padded_head_dim, rows_of
from moba.backends.triton.launch import Plan, cdiv, run_planned
from moba.backends.triton.means import Means, global_means, plan_block_means
from moba.backends.triton.registration import fake, operator
from moba.backends.triton.select import _select_kernel
from moba.backends.triton.tuning import arch_of, lookup
from moba.routing import Selection
from moba.sequences import Sequences

# Lengths of the sorted lists that the kernel is compiled for; a list holds one score more than there are places.
LIST_LENGTHS = (4, 8, 16)


def route(
    q: Tensor, k: Tensor | None, sequences: Sequences, selection: Selection, means: Tensor | None = None
) -> Tensor:
    """The routing of every query: int32 [R, T, H, K]. See `moba.backends` for the contract.

    A router that is a user's function runs in plain torch, as no kernel can call it.

    Numerics: block means summed in fp32 and rounded once to k's dtype; scores in fp32 from exact products of 16-bit
        inputs, in full fp32 for fp32 ones. Selections do not depend on tile sizes.
    """
    if selection.score not in (None, routers.mean_key_scores):
        return routing.route(q, k, sequences, selection, means)
    if selection.score is None or selection.topk >= sequences.num_blocks(selection.block_size):
        indices = routing.kept_indices(sequences.positions(q.device), selection)
        return indices[:, :, None].expand(-1, -1, q.shape[2], -1)
    return _route_by_means(
        q, k if means is None else None,
        None if means is None else global_means(means, sequences, selection.block_size),
        sequences.num_keys, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k,
        selection.block_size, selection.topk, selection.keep_first, selection.keep_recent,
    )  # fmt: skip


@operator("triton_route")
def _route_by_means(
    q: Tensor,
    k: Tensor | None,
    means: Tensor | None,
    num_keys: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
) -> Tensor:
    """The routing by mean-key scores: int32 [R, T, H, K], by means as `global_means` gives them, or by those of k.

    Other arguments are as in `Sequences` and `Selection`.
    """
    indices = q.new_empty((*q.shape[:3], topk), dtype=torch.int32)
    if cu_q is not None and cu_q.numel() == 1:
        return indices.fill_(-1)
    if indices.numel():
        sequences = Sequences(q.shape[0], q.shape[1], num_keys, key_start, key_end, cu_q, cu_k)
        run_planned(
            plan_select, q, k, means, indices, key_start, key_end, cu_q, cu_k, device=q.device,
            # Values mostly have the shape of keys; where not, this compiles what is not needed.
            following=None if k is None else lambda: variants_after_routing(q, k, k, topk, sequences, block_size),
            num_keys=num_keys, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
            arch=arch_of(q.device),
        )  # fmt: skip
    return indices


def plan_select(
    plan: Plan,
    q: Tensor,
    k: Tensor | None,
    means: Tensor | None,
    indices: Tensor,
    *bounds: Tensor | None,
    num_keys: int,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
    arch: int,
) -> None:
    """The launches of `moba::triton_route`."""
    sequences = Sequences(q.shape[0], q.shape[1], num_keys, *bounds)
    if means is None:
        assert k is not None
        means = plan_block_means(plan, k, sequences, block_size)
    padded_dim, element_bytes = padded_head_dim(q.shape[3]), q.element_size()
    config = lookup("select", arch, head_dim=padded_dim, block_size=block_size, element_bytes=element_bytes)
    num_tiles = cdiv(q.shape[1], config["TILE_M"])
    places = topk - 1 - keep_first - keep_recent
    plan.launch(
        _select_kernel, (q.shape[0] * num_tiles, q.shape[2]),
        rows_of(q), Means(means, means.stride(1)), indices, layout_of(sequences, block_size), block_size, topk,
        keep_first, keep_recent, num_tiles, q.shape[2] // means.shape[1],
        HEAD_DIM=q.shape[3], TILE_D=padded_dim if element_bytes == 2 else min(padded_dim, 32),
        LENGTH=next((length for length in LIST_LENGTHS if places < length), 0), **config,
    )  # fmt: skip


@fake(_route_by_means)
def _(q: Tensor, *rest: Any) -> Tensor:
    *_, topk, _keep_first, _keep_recent = rest
    return q.new_empty((*q.shape[:3], topk), dtype=torch.int32)
