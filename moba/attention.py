"""MoBA attention: validate → choose a backend → route → attend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba import backends
from moba.backends import MAX_DECODE_QUERIES
from moba.checks import (
    check_attention,
    check_bound,
    check_cu_seqlens,
    check_heads,
    check_key_range,
    check_means,
    check_page_numbers,
    check_scale,
    check_tensors,
    describe,
    is_readable,
    require_tensors,
)
from moba.config import BACKENDS, Router, require_int, require_one_of, validate_selection
from moba.layout import Sequences, page_means_shape
from moba.routing import Routing, Selection

# Those with autocast. A list, as torch.compile cannot trace torch's own question in every version.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    scale: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    routing: Routing | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    block_means: Tensor | None = None,
    route_by: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over a batch.

    Every query attends causally to its own block and to the topk - 1 past blocks whose mean key has the largest inner
    product with it: out_t = softmax(scale · q_t Kᵀ) V over the keys at positions <= t of those blocks.

    Args:
        q: [B, T, H, D]. The queries are the last T of the S positions: prefill, chunked prefill and decode alike.
        k, v: [B, S, G, D], T <= S, G divides H, of q's dtype (fp16, bf16, fp32, fp64) and device. Any strides with a
            contiguous last dimension; never copied or expanded.
        block_size: tokens in a block, >= 1. Blocks are counted from each sequence's first real key.
        topk: blocks a query attends to, its own included, >= 1.
        scale: factor of the attention logits, D^-0.5 by default. It does not enter the routing.
        keep_first, keep_recent: the first blocks, and the past blocks nearest to the own, that are always selected;
            they take places of topk.
        router: "mean", "recent" (sliding window), "sink" (first and recent blocks), "shared" (one choice for the query
            heads of a kv head), "top_p=0.9" (as few blocks as hold so much of the mass, at most topk), or a function
            (query rows [rows, H, D], block means [N, G, D]) -> scores [rows, H, N], called in chunks of rows; see
            `moba.routers`.
        routing: attend over this routing instead of choosing one (replay).
        key_start, key_end: int32 [B]; row b's real keys are key_start[b] … key_end[b] - 1 and its queries end at
            key_end[b]. Query rows that fall before key_start are padding: they give zeros, an lse of -inf.
        block_means: [B, N, G, D], N >= S // block_size, in k's dtype: the means of finished blocks, counted from
            key_start, that `append_block_means` wrote for these keys. With at most 16 queries a row and no gradient
            asked for, a step of decoding then reads the means and the selected keys only. More queries, or gradients,
            take the prefill's way without computing the means again.
        route_by: queries [B, T, H, any D] and keys [B, S, G, the same D] to choose blocks by in the place of q and k,
            such as those from before the rotary embedding. No gradient flows to them.
        backend: "auto", "reference", "pytorch" or "triton". A named backend runs or raises.
        return_lse, return_routing: also return the log-sum-exp, the routing.

    Returns:
        out [B, T, H, D]; or a tuple of out, lse (fp32, natural log, [B, T, H]; fp64 for fp64) and the `Routing`, of
        what was asked for, in that order. Differentiable in q, k and v through out and lse, not through the selection.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics: softmax and sums in fp32 (fp64 for fp64 inputs); block means accumulated in fp32 and rounded once to k's
        dtype; routing scores in fp32, never TF32. Same inputs, same outputs, bit for bit, on one device and version.
    Source: MoBA (arXiv 2502.13189), section 2.
    """
    require_tensors(q=q, k=k, v=v)
    q, k, v = to_autocast_dtype(q, k, v)
    check_attention(4, q=q, k=k, v=v)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"queries are the last of the keys, so T must be at most S, got T={q.shape[1]}, S={k.shape[1]}"
        )
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        check_bound(name, bound, q)
    if not (key_start is None and key_end is None):
        check_key_range(key_start, key_end, k.shape[1])
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=key_start, key_end=key_end)
    if block_means is not None:
        require_int("block_size", block_size, 1)
        check_means("block_means", block_means, k, k.shape[1] // block_size)
        if routing is not None:
            raise ValueError("block_means serve to choose a routing, so they cannot be combined with `routing`")
    route_by = _route_by(route_by, q, k, {"routing": routing, "block_means": block_means})
    return _attention(
        q, k, v, sequences, block_size, topk, scale, keep_first, keep_recent, router, routing, backend, return_lse,
        return_routing, block_means, route_by,
    )  # fmt: skip


def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_size: int,
    topk: int,
    scale: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    routing: Routing | None = None,
    route_by: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over packed sequences, each attending only to itself.

    Args:
        q: [total, H, D], the sequences' queries one after another.
        k, v: [total_k, G, D].
        cu_seqlens: int32 [num_sequences + 1], ascending from 0: sequence i has query rows cu_seqlens[i] …
            cu_seqlens[i + 1] - 1. Rows past the last are padding. Checked on CPU tensors only: a GPU is not waited for.
        cu_seqlens_k: the same for keys, `cu_seqlens` by default. Each sequence's queries are the last of its keys.
        block_size, topk, scale, keep_first, keep_recent, router, routing, route_by, backend, return_lse,
            return_routing: as in `moba_attention`, route_by packed like q and k; a routing's blocks are numbered
            within each sequence.

    Returns:
        out [total, H, D]; or a tuple of out, lse [total, H] and the `Routing` ([total, H, K]), of what was asked for.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics and source: as in `moba_attention`.
    """
    require_tensors(q=q, k=k, v=v)
    q, k, v = to_autocast_dtype(q, k, v)
    check_attention(3, q=q, k=k, v=v)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    check_cu_seqlens("cu_seqlens", cu_seqlens, q.device, q.shape[0])
    check_cu_seqlens("cu_seqlens_k", cu_k, k.device, k.shape[0])
    if cu_k.numel() != cu_seqlens.numel():
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens, got {cu_k.numel()} and {cu_seqlens.numel()}"
        )
    if is_readable(cu_seqlens) and bool((cu_k.diff() < cu_seqlens.diff()).any()):
        raise ValueError("cu_seqlens_k must give every sequence at least as many keys as queries")
    sequences = Sequences(1, q.shape[0], k.shape[0], cu_q=cu_seqlens.int(), cu_k=cu_k.int())
    if isinstance(routing, Routing):
        routing = Routing(routing.indices[None], routing.block_size)
    by = _route_by(route_by, q, k, {"routing": routing})
    results = _attention(
        q[None], k[None], v[None], sequences, block_size, topk, scale, keep_first, keep_recent, router, routing,
        backend, return_lse, return_routing, None, None if by is None else (by[0][None], by[1][None]),
    )  # fmt: skip
    if not isinstance(results, tuple):
        return results[0]
    return tuple(Routing(r.indices[0], r.block_size) if isinstance(r, Routing) else r[0] for r in results)


def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    page_table: Tensor,
    key_end: Tensor,
    block_means: Tensor,
    block_size: int,
    topk: int,
    scale: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    backend: str = "auto",
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over a cache of pages, for inference.

    With at most 16 queries a row nothing is gathered: a step reads the means and the selected keys. With more, each
    row's keys are first copied out of their pages.

    Args:
        q: [B, T, H, D]. Row b's queries are the last T of its key_end[b] positions; rows with fewer keys than
            queries have padding in front, which gives zeros.
        k_pages, v_pages: [P, page_size, G, D] of q's dtype and device, any strides with a contiguous last dimension.
        page_table: int32 [B, pages]: position p of row b lies in page page_table[b, p // page_size] at
            p % page_size. Entries behind a row's last page mean nothing.
        key_end: int32 [B], the number of keys of each row.
        block_means: [P, page_size // block_size, G, D] where block_size divides page_size, or [P, 1, G, D] where it is
            a multiple; the means of finished blocks, as `append_block_means` writes them.
        block_size, topk, scale, keep_first, keep_recent, router, backend, return_lse, return_routing:
            as in `moba_attention`.

    Returns:
        As `moba_attention`, without gradients.

    Raises:
        ValueError: naming the argument, what it was, and what is valid; also if a gradient is asked for.

    Numerics: as in `moba_attention`.
    """
    require_tensors(q=q, k_pages=k_pages, v_pages=v_pages)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages)):
        raise ValueError("a paged cache serves inference only: call moba_attention_paged under torch.no_grad()")
    q, k_pages, v_pages = to_autocast_dtype(q, k_pages, v_pages)
    check_attention(4, q=q, k_pages=k_pages, v_pages=v_pages)
    sequences = _paged_sequences(q, k_pages, q.shape[1], page_table, key_end, block_means, block_size)
    if q.shape[1] > MAX_DECODE_QUERIES:
        k_pages, v_pages = sequences.gather_pages(k_pages), sequences.gather_pages(v_pages)
        sequences = sequences.without_pages()
    return _attention(
        q, k_pages, v_pages, sequences, block_size, topk, scale, keep_first, keep_recent, router, None, backend,
        return_lse, return_routing, None if sequences.page_table is None else block_means,
    )  # fmt: skip


@torch.no_grad()
def moba_route(
    q: Tensor,
    block_means: Tensor,
    *,
    num_keys: int,
    block_size: int,
    topk: int,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    backend: str = "auto",
) -> Routing:
    """The routing alone, by block means, where the keys themselves are elsewhere.

    Args:
        q: [B, T, H, D]. The queries are the last T of num_keys positions.
        block_means: [B, N, G, D], N >= num_keys // block_size, in q's dtype, as `append_block_means` writes them.
        num_keys: S, at least T.
        block_size, topk, keep_first, keep_recent, router, backend: as in `moba_attention`.

    Returns:
        The `Routing` that `moba_attention` chooses over keys with these means.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    validate_selection(block_size, topk, keep_first, keep_recent, router)
    require_one_of("backend", backend, BACKENDS)
    require_tensors(q=q, block_means=block_means)
    check_tensors(4, q=q, block_means=block_means)
    check_heads(q.shape[2], block_means.shape[2])
    require_int("num_keys", num_keys, q.shape[1])
    check_means("block_means", block_means, block_means[:, :0], num_keys // block_size)
    if q.shape[0] != block_means.shape[0]:
        raise ValueError(f"block_means must have q's batch size {q.shape[0]}, got {block_means.shape[0]}")
    implementation = backends.resolve(backend, q, block_means)
    sequences = Sequences(q.shape[0], q.shape[1], num_keys)
    selection = Selection.of(sequences.fitting_block_size(block_size), topk, keep_first, keep_recent, router)
    with torch.autocast(q.device.type, enabled=False):
        indices = implementation.route(q, None, sequences, selection, block_means)
    return Routing(indices, block_size)


@torch.no_grad()
def append_block_means(
    means: Tensor,
    k: Tensor,
    *,
    num_new: int,
    block_size: int,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    page_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write the means of the blocks that each row's last keys finished; to be called once for every new key.

    mean(K_j) = 1/block_size · Σ_{i in block j} k_i

    Args:
        means: written in place, [B, N, G, D] with N >= S // block_size, in k's dtype; what stands for unfinished
            blocks is left as it is. With a page_table, of the shape that `moba_attention_paged` takes.
        k: [B, S, G, D], the keys with the new ones among them; or pages [P, page_size, G, D].
        num_new: how many of each row's last keys are new. More than there are is no error: all are then.
        block_size: tokens in a block, counted from key_start.
        key_start, key_end: int32 [B], as in `moba_attention`.
        page_table: int32 [B, pages], as in `moba_attention_paged`; key_end is then required.
        backend: the backend whose prefill the means shall equal, as in `moba_attention`.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics: accumulated in fp32 (fp64 for fp64) and rounded once: the bits that the backend's prefill scores.
    """
    require_tensors(k=k)
    check_tensors(4, k=k)
    require_int("num_new", num_new, 0)
    require_int("block_size", block_size, 1)
    require_one_of("backend", backend, BACKENDS)
    if page_table is not None:
        if key_start is not None:
            raise ValueError("key_start cannot be combined with page_table: rows begin with their first page")
        sequences = _paged_sequences(page_table, k, num_new, page_table, key_end, means, block_size, "means")
    else:
        for name, bound in (("key_start", key_start), ("key_end", key_end)):
            check_bound(name, bound, k)
        if not (key_start is None and key_end is None):
            check_key_range(key_start, key_end, k.shape[1])
        check_means("means", means, k, k.shape[1] // block_size)
        sequences = Sequences(k.shape[0], min(num_new, k.shape[1]), k.shape[1], key_start=key_start, key_end=key_end)
    if sequences.num_queries and block_size <= sequences.num_keys:
        backends.resolve(backend, k, k).append_means(means, k, sequences, block_size)


def _paged_sequences(
    rows: Tensor,
    pages: Tensor,
    num_queries: int,
    page_table: Tensor,
    key_end: Tensor | None,
    means: Tensor,
    block_size: int,
    means_name: str = "block_means",
) -> Sequences:
    """The sequences of a paged cache, after checking what describes it; `rows` [B, ...] has a row for each."""
    require_int("block_size", block_size, 1)
    if not isinstance(page_table, Tensor) or page_table.dtype != torch.int32 or page_table.ndim != 2:
        raise ValueError(f"page_table must be an int32 tensor [B, pages], got {describe(page_table)}")
    if page_table.shape[1] < 1:
        raise ValueError("page_table must have at least one column, got none")
    if page_table.shape[0] != rows.shape[0]:
        raise ValueError(f"page_table must have a row for each of q's {rows.shape[0]}, got {page_table.shape[0]}")
    if page_table.device != pages.device:
        raise ValueError(f"page_table must be on {pages.device} like the pages, got {page_table.device}")
    if pages.shape[0] < 1 or pages.shape[1] < 1:
        raise ValueError(f"there must be at least one page of one key, got shape {tuple(pages.shape)}")
    if key_end is None:
        raise ValueError("key_end must be given with a page_table: the number of keys of each row")
    check_bound("key_end", key_end, page_table)
    num_keys = page_table.shape[1] * pages.shape[1]
    check_key_range(None, key_end, num_keys)
    expected = page_means_shape(pages, block_size)
    if not isinstance(means, Tensor) or tuple(means.shape) != expected or means.dtype != pages.dtype:
        raise ValueError(f"{means_name} must be {pages.dtype} {expected} beside these pages, got {describe(means)}")
    if means.device != pages.device:
        raise ValueError(f"{means_name} must be on {pages.device} like the pages, got {means.device}")
    if means.stride(-1) != 1 and means.shape[-1] > 1:
        raise ValueError(f"the last dimension of {means_name} must be contiguous, got strides {means.stride()}")
    num_queries = min(num_queries, num_keys) if rows is page_table else num_queries
    sequences = Sequences(rows.shape[0], num_queries, num_keys, key_end=key_end, page_table=page_table)
    if is_readable(page_table):
        check_page_numbers(sequences.pages_in_use(), pages.shape[0])
    return sequences


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    block_size: int,
    topk: int,
    scale: float | None,
    keep_first: int,
    keep_recent: int,
    router: Router,
    routing: Routing | None,
    backend: str,
    return_lse: bool,
    return_routing: bool,
    block_means: Tensor | None = None,
    route_by: tuple[Tensor, Tensor] | None = None,
) -> Any:
    validate_selection(block_size, topk, keep_first, keep_recent, router)
    require_one_of("backend", backend, BACKENDS)
    scale = check_scale(scale, q.shape[-1])

    fitting_size = sequences.fitting_block_size(block_size)
    selection = Selection.of(fitting_size, topk, keep_first, keep_recent, router)
    # A routing that is replayed may have fewer blocks than there are.
    is_whole = sequences.is_plain and block_size * topk >= sequences.num_keys and selection.top_p is None
    is_whole = is_whole and routing is None
    if backend == "auto" and is_whole and not (return_lse or return_routing) and _dense_fits(q, k, v):
        return _dense(q, k, v, scale)

    implementation = backends.resolve(backend, q, k)
    with torch.autocast(q.device.type, enabled=False):
        if block_means is not None and q.shape[1] <= MAX_DECODE_QUERIES and not _needs_grad(q, k, v):
            out, lse, indices = implementation.decode(q, k, v, block_means, sequences, selection, scale=scale)
        else:
            if routing is None:
                with torch.no_grad():
                    indices = implementation.route(*(route_by or (q, k)), sequences, selection, block_means)
            else:
                indices = _replayed(routing, q, block_size, topk)
            out, lse = implementation.attend(q, k, v, indices, sequences, block_size=fitting_size, scale=scale)

    results = (out, *([lse] if return_lse else []), *([Routing(indices, block_size)] if return_routing else []))
    return results if len(results) > 1 else out


def _route_by(
    route_by: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, others: dict[str, object]
) -> tuple[Tensor, Tensor] | None:
    """The queries and keys to route by, checked against those that attend."""
    if route_by is None:
        return None
    for name, other in others.items():
        if other is not None:
            raise ValueError(f"route_by serves to choose a routing, so it cannot be combined with {name}")
    if not isinstance(route_by, tuple) or len(route_by) != 2:
        raise ValueError(f"route_by must be a pair of queries and keys, got {type(route_by).__name__}")
    by_q, by_k = route_by
    require_tensors(**{"route_by[0]": by_q, "route_by[1]": by_k})
    by_q, by_k, _ = to_autocast_dtype(by_q, by_k, by_k)
    check_attention(q.ndim, **{"route_by[0]": by_q, "route_by[1]": by_k, "route_by[1] again": by_k})
    if by_q.shape[:-1] != q.shape[:-1] or by_k.shape[:-1] != k.shape[:-1] or by_q.device != q.device:
        raise ValueError(
            f"route_by must be like q and k but for the head dim, {tuple(q.shape)} and {tuple(k.shape)} on {q.device}, "
            f"got {tuple(by_q.shape)} and {tuple(by_k.shape)} on {by_q.device}"
        )
    return by_q, by_k


def _dense_fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's dense attention needs no T × S mask for this, and no gradient is asked for."""
    return not _needs_grad(q, k, v) and q.shape[1] in (1, k.shape[1])


def _needs_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _replayed(routing: Routing, q: Tensor, block_size: int, topk: int) -> Tensor:
    """The indices of a routing given by the user, after checking that they belong to this call."""
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be a Routing, got {describe(routing)}")
    if routing.block_size != block_size:
        raise ValueError(f"routing was made with block_size={routing.block_size}, got block_size={block_size}")
    indices, expected = routing.indices, (*q.shape[:3], topk)
    if tuple(indices.shape) != expected or indices.dtype != torch.int32 or indices.device != q.device:
        raise ValueError(
            f"routing.indices must be int32 {expected} on {q.device}, "
            f"got {indices.dtype} {tuple(indices.shape)} on {indices.device}"
        )
    return indices


def to_autocast_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own does."""
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)
