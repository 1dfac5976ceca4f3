"""Routing in Triton: block means, then scores and the selection in one kernel. No step waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from moba import routing
from moba.backends.triton.case import Case
from moba.backends.triton.means import block_means
from moba.backends.triton.primitives import num_global_blocks
from moba.backends.triton.select import _select_kernel
from moba.backends.triton.tuning import arch_of, lookup
from moba.layout import Sequences
from moba.routing import Selection

# Lengths of the sorted lists that the kernel is compiled for; a list holds one score more than there are places.
LIST_LENGTHS = (4, 8, 16)


def route(q: Tensor, k: Tensor, sequences: Sequences, selection: Selection) -> Tensor:
    """The routing of every query: int32 [R, T, H, K]. See `moba.backends` for the contract.

    A router that is a user's function runs in plain torch, as no kernel can call it.

    Numerics: block means summed in fp32 and rounded once to k's dtype; scores in fp32 from exact products of 16-bit
        inputs, in full fp32 for fp32 ones. Selections do not depend on tile sizes.
    """
    if selection.score not in (None, routing.mean_key_scores):
        return routing.route(q, k, sequences, selection)
    if selection.score is None or selection.topk >= sequences.num_blocks(selection.block_size):
        indices = routing.kept_indices(sequences.positions(q.device), selection)
        return indices[:, :, None].expand(-1, -1, q.shape[2], -1)
    return select(
        q, k, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k,
        selection.block_size, selection.topk, selection.keep_first, selection.keep_recent,
    )  # fmt: skip


@torch.library.custom_op("moba::triton_route", mutates_args=())
def select(
    q: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
) -> Tensor:
    """The routing by mean-key scores: int32 [R, T, H, K]. Arguments as in `Sequences` and `Selection`."""
    num_rows, num_queries, num_heads, _ = q.shape
    sequences = Sequences(num_rows, num_queries, k.shape[1], key_start, key_end, cu_q, cu_k)
    indices = q.new_empty((num_rows, num_queries, num_heads, topk), dtype=torch.int32)
    if cu_q is not None and cu_q.numel() == 1:
        return indices.fill_(-1)
    if indices.numel():
        means = block_means(k, sequences, block_size)
        selection = Selection(block_size, topk, keep_first, keep_recent, routing.mean_key_scores)
        arguments = select_arguments(q, means, indices, sequences, selection, arch_of(q.device))
        _select_kernel[(num_rows * arguments["num_tiles"], num_heads)](**arguments)
    return indices


@select.register_fake
def _(
    q: Tensor,
    k: Tensor,
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
    padded_dim = max(16, triton.next_power_of_2(q.shape[3]))
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
        "num_tiles": triton.cdiv(sequences.num_queries, config["TILE_M"]),
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
    sequences = Sequences(1, 131072, 131072, bound, bound, cu, cu)
    means = q.new_empty(16, num_global_blocks(sequences, 128), head_dim).transpose(0, 1)
    indices = q.new_empty((1, 131072, 16, topk), dtype=torch.int32)
    selection = Selection(128, topk, 0, 0, routing.mean_key_scores)
    chosen = {("plain", 128, 8, torch.bfloat16), ("packed", 80, 3, torch.bfloat16), ("plain", 256, 16, torch.float16)}
    return Case(
        f"select {str(dtype)[6:]} D={head_dim} topk={topk} {kind}",
        _select_kernel,
        select_arguments(q, means, indices, sequences, selection, arch),
        representative=(kind, head_dim, topk, dtype) in chosen and (arch == 90 or topk == 8),
    )
