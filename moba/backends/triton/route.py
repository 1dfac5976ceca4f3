"""Routing in Triton: block means, then scores and the selection in one kernel. No step waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moba import routing
from moba.backends.triton.case import Case
from moba.backends.triton.launch import Plan, cdiv, make_plan, next_power_of_2, run_planned
from moba.backends.triton.means import global_means, plan_block_means
from moba.backends.triton.select import _select_kernel
from moba.backends.triton.tuning import arch_of, lookup
from moba.layout import Sequences
from moba.routing import Selection

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
    if selection.score not in (None, routing.mean_key_scores):
        return routing.route(q, k, sequences, selection, means)
    if selection.score is None or selection.topk >= sequences.num_blocks(selection.block_size):
        indices = routing.kept_indices(sequences.positions(q.device), selection)
        return indices[:, :, None].expand(-1, -1, q.shape[2], -1)
    return select(
        q, k if means is None else None,
        None if means is None else global_means(means, sequences, selection.block_size),
        sequences.num_keys, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k,
        selection.block_size, selection.topk, selection.keep_first, selection.keep_recent,
    )  # fmt: skip


@torch.library.custom_op("moba::triton_route", mutates_args=())
def select(
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
        run_planned(
            _plan_select, q, k, means, indices, key_start, key_end, cu_q, cu_k, device=q.device,
            num_keys=num_keys, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
            arch=arch_of(q.device),
        )  # fmt: skip
    return indices


def _plan_select(
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
    sequences = Sequences(q.shape[0], q.shape[1], num_keys, *bounds)
    selection = Selection(block_size, topk, keep_first, keep_recent, routing.mean_key_scores)
    if means is None:
        assert k is not None
        means = plan_block_means(plan, k, sequences, block_size)
    arguments = select_arguments(q, means, indices, sequences, selection, arch)
    plan.launch(_select_kernel, (q.shape[0] * arguments["num_tiles"], q.shape[2]), **arguments)


@select.register_fake
def _(
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
    return q.new_empty((*q.shape[:3], topk), dtype=torch.int32)


def select_arguments(
    q: Tensor, means: Tensor, indices: Tensor, sequences: Sequences, selection: Selection, arch: int
) -> dict[str, Any]:
    """Arguments of one launch of the selection kernel."""
    places = selection.topk - 1 - selection.keep_first - selection.keep_recent
    padded_dim = max(16, next_power_of_2(q.shape[3]))
    config = lookup(
        "select", arch, head_dim=padded_dim, block_size=selection.block_size, element_bytes=q.element_size()
    )
    return {
        "q_ptr": q,
        "means_ptr": means,
        "indices_ptr": indices,
        "key_start_ptr": sequences.key_start,
        "key_end_ptr": sequences.key_end,
        "cu_q_ptr": sequences.cu_q,
        "cu_k_ptr": sequences.cu_k,
        "num_queries": sequences.num_queries,
        "num_keys": sequences.num_keys,
        "num_sequences": 0 if sequences.cu_q is None else sequences.cu_q.numel() - 1,
        "blocks_per_row": sequences.num_blocks(selection.block_size),
        "num_blocks": means.shape[0],
        "block_size": selection.block_size,
        "topk": selection.topk,
        "keep_first": selection.keep_first,
        "keep_recent": selection.keep_recent,
        "num_tiles": cdiv(sequences.num_queries, config["TILE_M"]),
        "heads_per_kv_head": q.shape[2] // means.shape[1],
        "q_stride_r": q.stride(0),
        "q_stride_t": q.stride(1),
        "q_stride_h": q.stride(2),
        "means_stride_n": means.stride(0),
        "means_stride_g": means.stride(1),
        "HEAD_DIM": q.shape[3],
        "TILE_D": padded_dim if q.element_size() == 2 else min(padded_dim, 32),
        "LENGTH": next((length for length in LIST_LENGTHS if places < length), 0),
        **config,
    }


def aot_cases(arch: int) -> Iterator[Case]:
    """Every dtype, head dim and list length; padded and packed sequences."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 64, 80, 128, 256):
            for topk in (3, 8, 16, 64):
                yield _aot_case(arch, dtype, head_dim, topk, "plain")
        for kind in ("padded", "packed"):
            yield _aot_case(arch, dtype, 80, 3, kind)


def _aot_case(arch: int, dtype: torch.dtype, head_dim: int, topk: int, kind: str) -> Case:
    q = torch.empty(1, 131072, 16, head_dim, dtype=dtype, device="meta")
    bound = torch.empty(1, dtype=torch.int32, device="meta") if kind == "padded" else None
    cu = torch.empty(5, dtype=torch.int32, device="meta") if kind == "packed" else None
    indices = q.new_empty((1, 131072, 16, topk), dtype=torch.int32)
    plan = make_plan(
        _plan_select, q, q, None, indices, bound, bound, cu, cu, num_keys=131072,
        block_size=128, topk=topk, keep_first=0, keep_recent=0, arch=arch,
    )  # fmt: skip
    *_, (kernel, arguments) = plan.launches()
    chosen = {("plain", 128, 8, torch.bfloat16), ("packed", 80, 3, torch.bfloat16), ("plain", 256, 16, torch.float16)}
    return Case(
        f"select {str(dtype)[6:]} D={head_dim} topk={topk} {kind}",
        kernel,
        arguments,
        representative=(kind, head_dim, topk, dtype) in chosen and (arch == 90 or topk == 8),
    )
