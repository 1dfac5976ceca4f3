"""MoBA attention: validate → choose a backend → route → attend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from moba import backends
from moba.backends import MAX_DECODE_QUERIES
from moba.config import BACKENDS, Router, require_int, require_one_of, validate_selection
from moba.merge import add_sinks
from moba.numerics import all_finite, padded_to, positive_scale, to_autocast_dtype
from moba.options import Call, No, Options, PackedOptions, Yes
from moba.routing import Routing, Selection, for_query_heads, given_indices
from moba.sequences import Sequences
from moba.validate import (
    check_attention,
    check_block_indices,
    check_bounds,
    check_choice,
    check_cu_seqlens,
    check_means,
    check_route_by,
    check_scale,
    check_sinks,
    check_softcap,
    describe,
    is_readable,
    require_tensors,
    warn_of_layout,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = ..., return_routing: No = ..., **given: Unpack[Options]
) -> Tensor: ...
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, return_routing: No = ..., **given: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = ..., return_routing: Yes, **given: Unpack[Options]
) -> tuple[Tensor, Routing]: ...
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, return_routing: Yes, **given: Unpack[Options]
) -> tuple[Tensor, Tensor, Routing]: ...
@overload
def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = ..., return_routing: bool = ..., **given: Unpack[Options]
) -> Any: ...
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    routing: Routing | None = None,
    block_indices: Tensor | None = None,
    own_block: bool = True,
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
        k: [B, S, G, D], T <= S, G divides H, of q's dtype (fp16, bf16, fp32, fp64) and device. Any strides with a
            contiguous last dimension; never expanded, and copied only by autocast, or where torch's dense attention
            serves and Dv differs from D.
        v: [B, S, G, Dv], with k's dtype, device and rule for strides. Dv may differ from D; both are at most 256.
        block_size: tokens in a block, >= 1. Blocks are counted from each sequence's first real key.
        topk: blocks a query attends to, its own included, >= 1. May be left out with routing or block_indices.
        scale: factor of the attention logits, D^-0.5 by default. It does not enter the routing.
        softcap: a number c > 0 that bounds the logits: c · tanh(scale · q_t Kᵀ / c) takes their place (Gemma 2). It
            does not enter the routing.
        sinks: [H] of any floating dtype: exp(sinks[h]) is added to the denominator of head h's softmax, as a key with
            this logit and a value of zeros would. -inf for none.
        keep_first, keep_recent: the first blocks, and the past blocks nearest to the own, that are always selected;
            they take places of topk.
        router: "mean", "recent" (sliding window), "sink" (first and recent blocks), "shared" (one choice for the query
            heads of a kv head), "top_p=0.9" (as few blocks as hold so much of the mass, at most topk), or a function
            (query rows [rows, H, D], block means [N, G, D]) -> scores [rows, H, N], called in chunks of rows; see
            `moba.routers`.
        routing: attend over this routing instead of choosing one (replay). Blocks may be in any order. Repeats are
            read once; numbers below 0 or beyond the query's own block are ignored; the own block is always read.
        block_indices: int32 or int64 [B, T, G or H, K]: attend over a selection that somebody else made, such as a
            model's own indexer: a list for every query head, or one that the query heads of a key/value head share. In
            any order, counted from key_start, -1 for none. Repeats are read once, numbers beyond the query's own block
            are ignored, and the own block is read besides: K + 1 blocks in all where it is not listed. With at most 16
            queries a row and no gradient asked for, it is a step of decoding: memory is read for these keys alone.
        own_block: True: every query also reads its own block. False: only if block_indices list it (a query left
            without blocks gives zeros and an lse of -inf); on a GPU "auto" then takes the pytorch backend, and
            backend="triton" raises.
        key_start, key_end: int32 [B]; row b's real keys are key_start[b] … key_end[b] - 1 and its queries end at
            key_end[b]. Query rows that fall before key_start are padding: they give zeros, an lse of -inf.
        block_means: [B, N, G, D], N >= S // block_size, in k's dtype: the means of finished blocks, counted from
            key_start, that `append_block_means` wrote for these keys. With at most 16 queries a row and no gradient
            asked for, it is a step of decoding, which reads the means and the selected keys alone. Otherwise the call
            differs only in that no mean is computed again. Routers without scores ("recent", "sink") need no means.
        route_by: queries [B, T, H, any D] and keys [B, S, G, the same D] to choose blocks by in the place of q and k,
            such as those from before the rotary embedding. No gradient flows to them.
        backend: "auto", "reference", "pytorch" or "triton". A named backend runs or raises.
        return_lse, return_routing: also return the log-sum-exp, the routing.

    Returns:
        out [B, T, H, Dv]; or a tuple of out, lse (fp32, natural log, [B, T, H]; fp64 for fp64) and the `Routing`, of
        what was asked for, in that order. Differentiable in q, k, v and sinks through out and lse, not through the
        selection. A `routing` that was given is returned as it is; that of block_indices has K or K + 1 places.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics: softmax and sums in fp32 (fp64 for fp64 inputs); block means accumulated in fp32 and rounded once to k's
        dtype; routing scores in fp32, never TF32. Same inputs, same outputs, bit for bit, on one device and version.
        NaN and inf in keys and values that a query does not attend to never reach it, with two exceptions. The Triton
        kernels let those of values through that follow the query in its own tile of at most 64 keys. Torch's dense
        kernels, which "auto" takes where MoBA is full attention and no gradient is asked for, may let those of any
        later key or value through on a GPU or under torch.compile.
    Source: MoBA (arXiv 2502.13189), section 2.
    """
    require_tensors(q=q, k=k, v=v)
    q, k, v = to_autocast_dtype(q, k, v)
    check_attention(4, q=q, k=k, v=v)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"queries are the last of the keys, so T must be at most S, got T={q.shape[1]}, S={k.shape[1]} for "
            f"q [B, T, H, D] {tuple(q.shape)} and k [B, S, G, D] {tuple(k.shape)}"
        )
    warn_of_layout(q)
    check_bounds(key_start, key_end, q, k.shape[1])
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=key_start, key_end=key_end)
    if block_means is not None:
        require_int("block_size", block_size, 1)
        check_means("block_means", block_means, k, k.shape[1] // block_size)
        if routing is not None:
            raise ValueError("block_means serve to choose a routing, so they cannot be combined with `routing`")
    route_by = check_route_by(route_by, q, k, routing=routing, block_means=block_means)
    if block_indices is not None:
        chosen = {"routing": routing, "block_means": block_means, "route_by": route_by}
        topk = check_block_indices(block_indices, q, k.shape[2], topk, own_block, **chosen)
    call = Call(
        block_size=block_size, topk=topk, scale=scale, softcap=softcap, sinks=sinks, keep_first=keep_first,
        keep_recent=keep_recent, router=router, own_block=own_block, backend=backend, return_lse=return_lse,
        return_routing=return_routing,
    )  # fmt: skip
    return route_and_attend(
        q, k, v, sequences, call, routing=routing, block_indices=block_indices, block_means=block_means,
        route_by=route_by,
    )  # fmt: skip


@overload
def moba_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = ..., return_routing: No = ..., **given: Unpack[PackedOptions]
) -> Tensor: ...
@overload
def moba_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, return_routing: No = ..., **given: Unpack[PackedOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: No = ..., return_routing: Yes, **given: Unpack[PackedOptions]
) -> tuple[Tensor, Routing]: ...
@overload
def moba_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Yes, return_routing: Yes, **given: Unpack[PackedOptions]
) -> tuple[Tensor, Tensor, Routing]: ...
@overload
def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_routing: bool = ...,
    **given: Unpack[PackedOptions],
) -> Any: ...
def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    block_size: int,
    topk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    routing: Routing | None = None,
    block_indices: Tensor | None = None,
    own_block: bool = True,
    route_by: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over packed sequences, each attending only to itself.

    Args:
        q: [total, H, D], the sequences' queries one after another.
        k, v: [total_k, G, D] and [total_k, G, Dv].
        cu_seqlens: int32 [num_sequences + 1], ascending from 0: sequence i has query rows cu_seqlens[i] …
            cu_seqlens[i + 1] - 1. Rows past the last are padding. Checked on CPU tensors only: a GPU is not waited for.
        cu_seqlens_k: the same for keys, `cu_seqlens` by default. Each sequence's queries are the last of its keys.
        block_size, topk, scale, softcap, sinks, keep_first, keep_recent, router, routing, block_indices, own_block,
            route_by, backend, return_lse, return_routing: as in `moba_attention`, block_indices [total, G or H, K] and
            route_by packed like q and k; blocks are numbered within each sequence.

    Returns:
        out [total, H, Dv]; or a tuple of out, lse [total, H] and the `Routing` ([total, H, K]), of what was asked for.

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
    by = check_route_by(route_by, q, k, routing=routing)
    by = None if by is None else (by[0][None], by[1][None])
    if block_indices is not None:
        topk = check_block_indices(block_indices, q, k.shape[1], topk, own_block, routing=routing, route_by=route_by)
        block_indices = block_indices[None]
    call = Call(
        block_size=block_size, topk=topk, scale=scale, softcap=softcap, sinks=sinks, keep_first=keep_first,
        keep_recent=keep_recent, router=router, own_block=own_block, backend=backend, return_lse=return_lse,
        return_routing=return_routing,
    )  # fmt: skip
    results = route_and_attend(
        q[None], k[None], v[None], sequences, call, routing=routing, block_indices=block_indices, route_by=by
    )
    if not isinstance(results, tuple):
        return results[0]
    return tuple(Routing(r.indices[0], r.block_size) if isinstance(r, Routing) else r[0] for r in results)


def route_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    call: Call,
    *,
    routing: Routing | None = None,
    block_indices: Tensor | None = None,
    block_means: Tensor | None = None,
    route_by: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Choose a backend, route, attend: what the public functions do once their tensors are checked.

    Args:
        q: [R, T, H, D]. k: [R, S, G, D] and v: [R, S, G, Dv], or pages, where the sequences say so.
        sequences: where the sequences lie in q, k and v.
        call: the other arguments of the public function; they are checked here.
        routing, block_indices, block_means, route_by: as in `moba_attention`.
    """
    block_size = call.block_size
    of_routing = routing.topk if isinstance(routing, Routing) else None
    topk = require_int("topk", of_routing if call.topk is None else call.topk, 1)
    validate_selection(block_size, topk, call.keep_first, call.keep_recent, call.router)
    require_one_of("backend", call.backend, BACKENDS)
    check_choice(
        call.router, call.keep_first, call.keep_recent, call.own_block, routing=routing, block_indices=block_indices,
        route_by=route_by,
    )  # fmt: skip
    scale = check_scale(call.scale, q.shape[-1])
    softcap = check_softcap(call.softcap)
    check_sinks(call.sinks, q)
    fitting_size = sequences.fitting_block_size(block_size)
    selection = Selection.of(fitting_size, topk, call.keep_first, call.keep_recent, call.router)
    # A selection that is given may list fewer blocks than topk.
    is_given = routing is not None or block_indices is not None
    if call.backend == "auto" and not is_given and _dense_serves(q, k, v, sequences, selection, call):
        out = _dense(q, k, v, scale)
        # Torch's kernels may let a NaN or inf of a later key or value through the mask. A single query has no mask. On
        # a GPU or in a traced graph the result cannot be read, so it is returned unchecked.
        if q.shape[1] == 1 or not is_readable(out) or all_finite(out):
            return out

    implementation = backends.resolve(call.backend, q, k, own_block=call.own_block)
    is_step = q.shape[1] <= MAX_DECODE_QUERIES and sequences.cu_q is None and not _needs_grad(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        if block_means is not None and is_step:
            out, lse, indices = implementation.decode(
                q, k, v, block_means, sequences, selection, scale=scale, softcap=softcap
            )
        else:
            chosen = block_indices if routing is None else _checked(routing, q, block_size, topk)
            if chosen is None:
                with torch.no_grad():
                    indices = implementation.route(*(route_by or (q, k)), sequences, selection, block_means)
            else:
                own = torch.div(sequences.positions(q.device), fitting_size, rounding_mode="floor")
                indices = given_indices(chosen, own, own_block=call.own_block)
            # Without means a step goes the way of a prefill, but for lists of blocks, which need none.
            attend = implementation.attend
            if is_step and block_indices is not None:
                attend, indices = implementation.attend_step, for_query_heads(indices, q.shape[2])
            out, lse = attend(
                q, k, v, indices, sequences, block_size=fitting_size, scale=scale, softcap=softcap,
                own_block=call.own_block,
            )  # fmt: skip
        if call.sinks is not None:
            out, lse = add_sinks(out, lse, call.sinks)

    asked = [lse] if call.return_lse else []
    if call.return_routing:
        asked.append(Routing(for_query_heads(indices, q.shape[2]), block_size) if routing is None else routing)
    return (out, *asked) if asked else out


def _dense_serves(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, selection: Selection, call: Call) -> bool:
    """Whether torch's dense attention is the same function, needs no T × S mask, and gives all that is asked for."""
    num_read = selection.block_size * selection.topk
    reads_all = sequences.is_plain and num_read >= sequences.num_keys and selection.top_p is None
    is_plain_softmax = call.softcap is None and call.sinks is None
    asks_more = call.return_lse or call.return_routing or _needs_grad(q, k, v)
    return reads_all and is_plain_softmax and not asks_more and q.shape[1] in (1, k.shape[1])


def _needs_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention to all keys."""
    q, scale = positive_scale(q, scale)
    value_dim = v.shape[3]
    # Without zeros behind the shorter rows, torch's fused kernels refuse, and the others build a T × S mask.
    q, k, v = (x.transpose(1, 2) for x in padded_to(max(q.shape[3], value_dim), q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :value_dim].transpose(1, 2)


def _checked(routing: Routing, q: Tensor, block_size: int, topk: int) -> Tensor:
    """The indices of a routing given by the user, after checking that they belong to this call."""
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be a Routing, got {describe(routing)}")
    if routing.block_size != block_size:
        raise ValueError(f"routing was made with block_size={routing.block_size}, got block_size={block_size}")
    indices, expected = routing.indices, (*q.shape[:3], topk)
    if tuple(indices.shape) != expected or indices.dtype != torch.int32 or indices.device != q.device:
        raise ValueError(
            f"routing.indices must be int32 {expected} on {q.device} (topk may be left out), "
            f"got {indices.dtype} {tuple(indices.shape)} on {indices.device}"
        )
    return indices
