"""MoBA over a sequence that is split between ranks: the routing of one device and, up to rounding, its results.

Two transports bring keys and queries together:

- "gather": every rank gets the keys and values of all ranks before it, in two groups of heads. While one group is
  computed, the rows of the other travel, forward and backward. Any number of heads, shards of any length.
- "heads": every rank gets all tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509), and returns their results.

Letters: B batch, T tokens of this rank, S tokens of the sequence, H query heads, G key/value heads, D head dim,
K = topk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moba import backends
from moba.attention import moba_attention, moba_attention_varlen
from moba.config import BACKENDS, Router, require_one_of, validate_selection
from moba.numerics import to_autocast_dtype
from moba.parallel.exchange import Gathering, to_heads, to_tokens
from moba.parallel.routing import SharedRouting
from moba.parallel.shards import Shards, agree, fingerprint, float_bits, process_group
from moba.routers import ranks_by_means
from moba.routing import Routing
from moba.sequences import Sequences
from moba.validate import DTYPES, check_attention, check_cu_seqlens, check_scale, require_tensors

# Out [B, T, H, D], lse [B, T, H] and the routing's indices [B, T, H, K] of this rank's tokens.
_Results = tuple[Tensor, Tensor, Tensor]
TRANSPORTS = ("gather", "heads")
# Groups of key/value heads that are gathered one after another. More groups hide more of the last transfer back, but
# give each launch less work: four were slower than two.
HEAD_GROUPS = 2


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    block_size: int,
    topk: int,
    scale: float | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    cu_seqlens: Tensor | None = None,
    transport: str = "gather",
    backend: str = "auto",
    shards: Shards | None = None,
    return_lse: bool = False,
    return_routing: bool = False,
    return_shards: bool = False,
) -> Any:
    """Mixture of Block Attention over a sequence that is split between ranks. Every rank calls it.

    Args:
        q: [B, T, H, D], this rank's tokens. Shards are contiguous and in the ranks' order; their lengths may differ, or
            be 0.
        k, v: [B, T, G, D].
        group: the ranks that share the sequence: a process group, a mesh of one dimension, or None for all.
        block_size, topk, scale, keep_first, keep_recent, router, backend: as in `moba_attention`; the same everywhere.
        cu_seqlens: int32 [documents + 1], bounds of packed documents in the whole sequence, the same on every rank;
            batch size 1.
        transport: "gather", or "heads". "heads" needs as many key/value heads as ranks, or a multiple, and accepts no
            router that is a function, because it might look at all heads.
        shards: the `Shards` of an earlier call with the same lengths and settings on every rank, such as a model's
            first layer. The ranks then compare nothing, and the host does not wait for the device; a difference would
            end in a timeout.
        return_lse, return_routing, return_shards: also return this rank's log-sum-exp [B, T, H], the `Routing`, whose
            blocks are those of the whole sequence, and the `Shards`.

    Returns:
        out [B, T, H, D]; or a tuple of out, lse, routing and shards, of what was asked for. Differentiable like
        `moba_attention`; gradients of keys return to the rank that holds them.

    Raises:
        ValueError: on every rank, naming what the ranks disagree on, or what is not valid.

    Numerics: block means and routing are those of one device, bit for bit. Gradients of a key from several ranks are
        rounded to its dtype before they travel and added in fp32 in the ranks' order, so results repeat.
    """
    ranks = process_group(group)
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = to_autocast_dtype(q, k, v)

    def check() -> None:
        validate_selection(block_size, topk, keep_first, keep_recent, router)
        require_one_of("transport", transport, TRANSPORTS)
        require_one_of("backend", backend, BACKENDS)
        require_tensors(q=q, k=k, v=v)
        _check_shapes(q, k, v, cu_seqlens)
        if transport == "heads" and k.shape[2] % ranks.size():
            raise ValueError(
                f'transport="heads" needs key/value heads in a multiple of the {ranks.size()} ranks, got {k.shape[2]}; '
                'take "gather"'
            )
        if callable(router) and not ranks_by_means(router) and transport == "heads":
            raise ValueError(
                'a router that is a function needs all heads, and transport="heads" gives a rank some of them: take '
                f'"gather", got router={router!r}'
            )
        check_scale(scale, q.shape[3])
        backends.resolve(backend, q, k)

    def settings() -> dict[str, int | Tensor]:
        check()
        differentiable = [torch.is_grad_enabled() and x.requires_grad for x in (q, k, v)]
        return {
            "batch size": q.shape[0], "query heads": q.shape[2], "key/value heads": k.shape[2],
            "head dim": q.shape[3], "dtype": DTYPES.index(q.dtype), "block_size": block_size, "topk": topk,
            "scale": float_bits(check_scale(scale, q.shape[3])), "keep_first": keep_first, "keep_recent": keep_recent,
            "router": -1 if callable(router) else crc32(router.encode()), "transport": TRANSPORTS.index(transport),
            "backend": BACKENDS.index(backend),
            "gradients asked for": sum(asked << i for i, asked in enumerate(differentiable)),
            "number of documents": 0 if cu_seqlens is None else cu_seqlens.numel(),
            "cu_seqlens": 0 if cu_seqlens is None else fingerprint(cu_seqlens),
        }  # fmt: skip

    if shards is None:
        shards = agree(q, ranks, settings)
    else:
        check()
        if shards.lengths[shards.rank] != q.shape[1]:
            raise ValueError(f"shards gives this rank {shards.lengths[shards.rank]} tokens, got {q.shape[1]}")
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.device, shards.num_tokens)
    call = _Call(shards, cu_seqlens, scale, block_size, topk, keep_first, keep_recent, router, backend)
    out, lse, indices = BY_TRANSPORT[transport](q, k, v, call)
    asked = ((return_lse, lse), (return_routing, Routing(indices, block_size)), (return_shards, shards))
    results = (out, *(value for is_asked, value in asked if is_asked))
    return results if len(results) > 1 else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    check_attention(4, q=q, k=k, v=v)
    if v.shape[3] != k.shape[3]:
        raise ValueError(
            f"context parallelism needs keys and values of one head dim, got {k.shape[3]} and {v.shape[3]}"
        )
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q must be [B, T, H, D] and k and v [B, T, G, D] with this rank's tokens, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs batch size 1, got {q.shape[0]}")
        # The total number of tokens is known later.
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.device, None)


@dataclass(frozen=True)
class _Call:
    """What the transports get besides tensors."""

    shards: Shards
    cu_seqlens: Tensor | None
    scale: float | None
    block_size: int
    topk: int
    keep_first: int
    keep_recent: int
    router: Router
    backend: str

    @property
    def selection(self) -> dict[str, Any]:
        """The arguments that choose blocks."""
        names = ("block_size", "topk", "keep_first", "keep_recent", "router", "backend")
        return {name: getattr(self, name) for name in names}

    def group_sizes(self, num_heads: int) -> list[int]:
        """How many key/value heads are gathered at a time."""
        # A user's router may look at all heads at once.
        count = 1 if callable(self.router) or len(self.shards.lengths) == 1 else min(HEAD_GROUPS, num_heads)
        return [num_heads * (i + 1) // count - num_heads * i // count for i in range(count)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> _Results:
        """Attention of q [B, T, H, D], the last of the keys [B, S, G, D], or within documents."""
        options = {**self.selection, "scale": self.scale, "return_lse": True, "return_routing": True}
        if cu_q is None:
            out, lse, routing = moba_attention(q, k, v, **options)
            return out, lse, routing.indices
        out, lse, routing = moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options)
        return out[None], lse[None], routing.indices[None]

    def replay(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over a routing [B, T, H, K] of these keys, which is in a backend's form already."""
        sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
        size, scale = sequences.fitting_block_size(self.block_size), check_scale(self.scale, q.shape[3])
        with torch.autocast(q.device.type, enabled=False):
            backend = backends.resolve(self.backend, q, k)
            out, lse = backend.attend(q, k, v, indices, sequences, block_size=size, scale=scale)
        return out, lse


def _by_gathering(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    shards, cu = call.shards, call.cu_seqlens
    sizes = call.group_sizes(k.shape[2])
    query_sizes = [size * (q.shape[2] // k.shape[2]) for size in sizes]
    if cu is not None or shards.starts_inside_a_block(call.block_size):
        cu_q = None if cu is None else cu.clamp(shards.start, shards.stop) - shards.start
        cu_k = None if cu is None else cu.clamp(max=shards.stop)
        gathering = Gathering(k, v, shards, sizes)
        # Received rows have no name here, so that they are freed once they are attended to.
        parts = [call.attend(of_q, *gathering.next(), cu_q, cu_k) for of_q in q.split(query_sizes, dim=2)]
        out, lse, indices = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        return out, lse, indices
    routing = SharedRouting(q, k, shards, call.selection)
    gathering = Gathering(k, v, shards, sizes)  # after what routing needs, and while it is computed
    indices = routing.finish().indices
    # Autograd starts from what was made last: q is split after `gathering`, so its gradient is joined before any wait.
    queries = zip(q.split(query_sizes, dim=2), indices.split(query_sizes, dim=2), strict=True)
    replayed = [call.replay(of_q, *gathering.next(), blocks) for of_q, blocks in queries]
    out, lse = (torch.cat(tensors, dim=2) for tensors in zip(*replayed, strict=True))
    return out, lse, indices


def _by_heads(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    shards = call.shards
    q, k, v = to_heads((q, k, v), shards)
    out, lse, indices = (to_tokens(x, shards) for x in call.attend(q, k, v, call.cu_seqlens, call.cu_seqlens))
    return out, lse, indices


BY_TRANSPORT: dict[str, Callable[[Tensor, Tensor, Tensor, _Call], _Results]] = {
    "gather": _by_gathering, "heads": _by_heads
}  # fmt: skip
