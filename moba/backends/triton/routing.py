"""Routing in Triton. No step waits for the host.

By means: the means, then scores and the selection in one kernel, which computes scores again and again. By tokens, the
scores of a chunk of queries, then their selection: a pass is T · S · D multiplications instead of T · N · D, while to
write T · N scores and to read them twice takes a tenth of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moba import routers, routing
from moba.backends.triton.attention import variants_after_routing
from moba.backends.triton.block_scores import ROW_MULTIPLE, Scores, plan_block_scores, scores_shape
from moba.backends.triton.device import Rows, layout_of, padded_head_dim, rows_of
from moba.backends.triton.launch import Plan, cdiv, run_planned
from moba.backends.triton.means import Means, global_means, plan_block_means
from moba.backends.triton.registration import fake, operator
from moba.backends.triton.select import OpenRows, _select_kernel
from moba.backends.triton.select_once import _select_once_kernel
from moba.backends.triton.tuning import arch_of, lookup
from moba.backends.triton.variants import Variant
from moba.routing import Selection
from moba.sequences import Sequences

# Lengths of the sorted lists that the kernel is compiled for; a list holds one score more than there are scored slots.
LIST_LENGTHS = (4, 8, 16)
# Those that `_select_once_kernel` is compiled for.
ONCE_LENGTHS = (4, 8)
ALL_ROWS = OpenRows(None, None)
# Memory for scores by tokens of a chunk of queries.
SCORE_BYTES = 256 << 20


def route(
    q: Tensor, k: Tensor | None, sequences: Sequences, selection: Selection, means: Tensor | None = None
) -> Tensor:
    """The routing of every query: int32 [R, T, H, K], or [R, T, G, K] for "shared". See `moba.backends`.

    A router that is a user's function runs in plain torch, as no kernel can call it.

    Numerics: block means summed in fp32 and rounded once to k's dtype; scores in fp32 from exact products of 16-bit
        inputs, in full fp32 for fp32 ones; those of "shared" from the query heads' sum in fp32. Selections do
        not depend on tile sizes.
    """
    by_tokens, is_shared = selection.score is routers.max_token_scores, selection.score is routers.shared_scores
    has_kernel = selection.score in (None, routers.mean_key_scores) or is_shared or (by_tokens and means is None)
    if not has_kernel:
        return routing.route(q, k, sequences, selection, means)
    keys = k if means is None else means
    assert keys is not None
    num_heads = keys.shape[2] if is_shared else q.shape[2]
    if selection.score is None or selection.topk >= sequences.num_blocks(selection.block_size):
        indices = routing.kept_indices(sequences.positions(q.device), selection)
        return indices[:, :, None].expand(-1, -1, num_heads, -1)
    if is_shared and q.dtype == torch.float32:
        q = q.unflatten(2, (num_heads, -1)).sum(dim=3)
    return _route_by_scores(
        q, k if means is None else None,
        None if means is None else global_means(means, sequences, selection.block_size),
        sequences.num_keys, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k,
        num_heads, selection.block_size, selection.topk, selection.keep_first, selection.keep_recent, by_tokens,
    )  # fmt: skip


@operator("triton_route")
def _route_by_scores(
    q: Tensor,
    k: Tensor | None,
    means: Tensor | None,
    num_keys: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    num_heads: int,
    block_size: int,
    topk: int,
    keep_first: int,
    keep_recent: int,
    by_tokens: bool,
) -> Tensor:
    """The routing by mean-key scores: int32 [R, T, num_heads, K], by means as `global_means` gives them or of k.

    With fewer heads than q has, each chooses for as many query heads, by the sum of their scores.

    Other arguments are as in `Sequences` and `Selection`. by_tokens: by `max_token_scores` instead.
    """
    indices = q.new_empty((*q.shape[:2], num_heads, topk), dtype=torch.int32)
    if cu_q is not None and cu_q.numel() == 1:
        return indices.fill_(-1)
    if indices.numel():
        bounds = (key_start, key_end, cu_q, cu_k)

        def following() -> Iterator[Variant]:
            # Values mostly have the shape of keys; where not, this compiles what is not needed.
            assert k is not None
            sequences = Sequences(q.shape[0], q.shape[1], num_keys, *bounds)
            return variants_after_routing(q, k, k, indices.shape[2:], sequences, block_size)

        run_planned(
            plan_select, q, k, means, indices, *bounds, device=q.device,
            following=None if k is None or by_tokens else following,
            num_keys=num_keys, block_size=block_size, topk=topk, keep_first=keep_first, keep_recent=keep_recent,
            by_tokens=by_tokens, arch=arch_of(q.device),
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
    by_tokens: bool = False,
    arch: int,
) -> None:
    """The launches of `moba::triton_route`."""
    num_rows, num_queries, num_query_heads, head_dim = q.shape
    num_heads = indices.shape[2]
    is_shared = num_heads < num_query_heads
    sequences = Sequences(num_rows, num_queries, num_keys, *bounds)
    padded_dim, element_bytes = padded_head_dim(head_dim), q.element_size()
    table = "select_scored" if by_tokens else "select"
    config: Mapping[str, Any] = lookup(
        table, arch, head_dim=padded_dim, block_size=block_size, element_bytes=element_bytes, is_packed=is_shared
    )
    num_scored_slots = topk - 1 - keep_first - keep_recent
    length = next((length for length in LIST_LENGTHS if num_scored_slots < length), 0)
    setting = (layout_of(sequences, block_size), block_size, topk, keep_first, keep_recent)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, is_needed: bool = True, **named: Any) -> None:
        if is_needed:
            plan.launch(kernel, grid, *args, **named)
        else:
            plan.foresee(kernel, *args, **named)

    def select_chunk(
        rows: Rows, means: Means, scores: Scores, first: int, count: int, open_rows: OpenRows = ALL_ROWS, **named: Any
    ) -> None:
        num_tiles, group = cdiv(count, config["TILE_M"]), num_query_heads // num_kv_heads
        factor = 0.5 ** (group - 1).bit_length() if is_shared else None
        launch(
            _select_kernel, (num_rows * num_tiles, num_heads), rows, means, scores, indices, *setting, open_rows, first,
            num_tiles, group, factor, **named, LENGTH=length, **config,
        )  # fmt: skip

    if by_tokens:
        assert k is not None
        num_kv_heads = k.shape[2]
        count = score_chunk(sequences, num_heads, block_size)
        memory = plan.buffer(*scores_shape(sequences, num_heads, block_size, count), dtype=torch.float32)
        for first in range(0, num_queries, count):
            chunk = (first, min(count, num_queries - first))
            scores = plan_block_scores(plan, q, k, memory, None, sequences, block_size, *chunk, arch)
            select_chunk(Rows(None, None, None, None), Means(None, None), scores, *chunk, HEAD_DIM=0, TILE_D=0)
        return
    if means is None:
        assert k is not None
        means = plan_block_means(plan, k, sequences, block_size)
    num_kv_heads = means.shape[1]
    tile_d = padded_dim if element_bytes == 2 else min(padded_dim, 32)
    dims: dict[str, Any] = {"HEAD_DIM": head_dim, "TILE_D": tile_d}
    given = (rows_of(q), Means(means, means.stride(1)), Scores(None, None, None), 0, num_queries)
    once: Mapping[str, Any] = lookup(
        "select_once", arch, head_dim=padded_dim, block_size=block_size, element_bytes=element_bytes,
        is_packed=is_shared,
    )  # fmt: skip
    if not once or length not in ONCE_LENGTHS:
        select_chunk(*given, **dims)
        return
    # One is launched, the other foreseen.
    is_long = sequences.num_blocks(block_size) >= once["MIN_BLOCKS"]
    counts = plan.buffer(num_rows, num_heads, dtype=torch.int32)
    open_rows = OpenRows(counts, plan.buffer(num_rows, num_heads, num_queries if is_long else 1, dtype=torch.int32))
    if is_long:
        plan.zero(counts)
    num_tiles = cdiv(num_queries, once["TILE_M"])
    launch(
        _select_once_kernel, (num_rows * num_tiles, num_heads), *given[:2], indices, open_rows, *setting, num_tiles,
        num_query_heads // num_kv_heads, **dims, LENGTH=length, is_needed=is_long,
        **{name: value for name, value in once.items() if name != "MIN_BLOCKS"},
    )  # fmt: skip
    select_chunk(*given, open_rows=open_rows, is_needed=is_long, **dims)
    select_chunk(*given, is_needed=not is_long, **dims)


def score_chunk(sequences: Sequences, num_heads: int, block_size: int) -> int:
    """Queries of a row whose scores by tokens are in memory at one time."""
    row_heads, num_blocks, _ = scores_shape(sequences, num_heads, block_size, 1)
    count = SCORE_BYTES // (4 * row_heads * max(1, num_blocks) * ROW_MULTIPLE) * ROW_MULTIPLE
    return min(max(count, ROW_MULTIPLE), sequences.num_queries)


@fake(_route_by_scores)
def _(q: Tensor, *rest: Any) -> Tensor:
    *_, num_heads, _block_size, topk, _keep_first, _keep_recent, _by_tokens = rest
    return q.new_empty((*q.shape[:2], num_heads, topk), dtype=torch.int32)
