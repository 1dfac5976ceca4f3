"""MoBA over a sequence whose tokens lie across ranks: the same routing and, up to rounding, the same result as on one.

Three ways for keys and queries to meet:

- "gather": every rank gets the keys and values of all ranks before it. Simple, serves packed sequences, cheap where
  there are few key/value heads.
- "selective": every rank gets the block means of all ranks before it, routes, and then only those blocks of keys and
  values that one of its queries chose. Memory and traffic follow the routing.
- "heads": every rank gets all tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509), and gives their results back.

Heads do not depend on each other, so whatever travels does so for a few key/value heads at a time: while one group of
heads is computed, the next one's rows travel, forward and backward, and only two groups' rows are in memory for that.

Letters: B batch, T tokens of this rank, S tokens of the sequence, H query heads, G key/value heads, D head dim,
N blocks before this rank's, M blocks that travelled for one key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from moba.parallel.exchange import Cut, Travel, add_up
from moba.parallel.routing import SharedRouting
from moba.parallel.selective import all_wishes, beside_own, chosen_before, fetch
from moba.parallel.shards import Ranks, Shards, agree, fingerprint, float_bits, ranks_of
from moba.routers import ranks_by_means
from moba.routing import Routing
from moba.sequences import Sequences
from moba.validate import DTYPES, check_attention, check_cu_seqlens, check_scale, require_tensors

# Out [B, T, H, D], lse [B, T, H] and the routing's indices [B, T, H, K] of this rank's tokens.
_Results = tuple[Tensor, Tensor, Tensor]
TRANSPORTS = ("gather", "selective", "heads")
# Groups of key/value heads that travel one after the other; more would hide more of the first one's way, and leave
# less work to each launch.
HEAD_GROUPS = 4


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
        q: [B, T, H, D], this rank's tokens: contiguous shards of the sequence, in the ranks' order. Their lengths may
            differ, and be 0.
        k, v: [B, T, G, D].
        group: the ranks that share the sequence: a process group, a mesh of one dimension, or None for all. With a mesh
            of two dimensions, nodes and the ranks of each, the ranks of a node exchange heads, and `transport` says how
            keys travel between nodes: each rank then sends and gets those of its own heads only.
        block_size, topk, scale, keep_first, keep_recent, router, backend: as in `moba_attention`; the same everywhere.
        cu_seqlens: int32 [documents + 1], bounds of packed documents in the whole sequence, the same on every rank;
            batch size 1, and not with "selective".
        transport: "gather", "selective" or "heads". "selective" needs shards of whole blocks (but for the last), and
            waits for the device to learn what travels; "heads" needs as many key/value heads as ranks, or a multiple,
            as a mesh of two dimensions needs them inside a node; neither takes a router that is a function, which might
            look at all heads.
        shards: of an earlier call with these lengths and settings on every rank, such as that of a model's first layer.
            Nothing is compared then, so the host need not wait for the device; a difference would end in a timeout.
        return_lse, return_routing, return_shards: also return this rank's log-sum-exp [B, T, H], the `Routing`, whose
            blocks are those of the whole sequence, and the `Shards`.

    Returns:
        out [B, T, H, D]; or a tuple of out, lse, routing and shards, of what was asked for. Differentiable as
        `moba_attention`; gradients of keys that travelled come back to their rank.

    Raises:
        ValueError: on every rank, naming what the ranks disagree on, or what is not valid.

    Numerics: block means and routing are those of one device, bit for bit. Gradients of a key from several ranks are
        rounded to its dtype before they travel and added in fp32 in the ranks' order, so results repeat.
    """
    ranks = ranks_of(group)
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = to_autocast_dtype(q, k, v)

    def check() -> None:
        validate_selection(block_size, topk, keep_first, keep_recent, router)
        require_one_of("transport", transport, TRANSPORTS)
        require_one_of("backend", backend, BACKENDS)
        require_tensors(q=q, k=k, v=v)
        _check_shapes(q, k, v, cu_seqlens, transport, ranks)
        if callable(router) and not ranks_by_means(router) and (transport == "heads" or ranks.between is not None):
            raise ValueError(
                'a router that is a function needs all heads, and transport="heads" or a mesh of two dimensions gives '
                f'a rank some of them: take "gather" or "selective" and a mesh of one dimension, got router={router!r}'
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
    call = _Call(shards, transport, cu_seqlens, scale, block_size, topk, keep_first, keep_recent, router, backend)
    by = BY_TRANSPORT[transport] if shards.between is None else _by_heads
    out, lse, indices = by(q, k, v, call)
    asked = ((return_lse, lse), (return_routing, Routing(indices, block_size)), (return_shards, shards))
    results = (out, *(value for is_asked, value in asked if is_asked))
    return results if len(results) > 1 else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, transport: str, ranks: Ranks) -> None:
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
        if transport == "selective" or q.shape[0] != 1:
            raise ValueError(
                f'cu_seqlens needs batch size 1 and transport="gather" or "heads", got {q.shape[0]} and {transport!r}'
            )
        # How many tokens there are in all is known later.
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.device, None)
    if transport == "heads" and ranks.between is not None:
        raise ValueError(
            'transport="heads" holds inside the nodes of a mesh of two dimensions; take "gather" or "selective" between'
        )
    if (transport == "heads" or ranks.between is not None) and k.shape[2] % ranks.inside.size():
        raise ValueError(
            f'transport="heads" needs key/value heads in a multiple of the {ranks.inside.size()} ranks, got '
            f'{k.shape[2]}; take "gather" or "selective", and a mesh of one dimension'
        )


@dataclass(frozen=True)
class _Call:
    """What the transports are told beside tensors."""

    shards: Shards
    transport: str
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
        """How many of some heads travel at a time."""
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
        """Attention over a routing [B, T, H, K] of these keys that was made here, and so need not be put in order."""
        sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
        size, scale = sequences.fitting_block_size(self.block_size), check_scale(self.scale, q.shape[3])
        with torch.autocast(q.device.type, enabled=False):
            backend = backends.resolve(self.backend, q, k)
            out, lse = backend.attend(q, k, v, indices, sequences, block_size=size, scale=scale)
        return out, lse


def _one_ahead(starts: Sequence[Callable[[], Travel]]) -> Iterator[tuple[Tensor, ...]]:
    """What each of these travels brings, the next one under way. The first begins now."""
    first = starts[0]()

    def arrivals() -> Iterator[tuple[Tensor, ...]]:
        travel = first
        for start in starts[1:]:
            following = start()
            yield travel.wait()
            travel = following
        yield travel.wait()

    return arrivals()


def _joined(parts: Iterator[tuple[Tensor, ...]], num_heads: int) -> tuple[Tensor, ...]:
    """Tensors [B, T, H, ...] of all heads from those of groups of heads, each let go of at once without gradients."""
    if torch.is_grad_enabled():
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    whole: tuple[Tensor, ...] = ()
    first = 0
    for part in parts:
        whole = whole or tuple(x.new_empty(*x.shape[:2], num_heads, *x.shape[3:]) for x in part)
        for x, some in zip(whole, part, strict=True):
            x[:, :, first : first + some.shape[2]] = some
        first += part[0].shape[2]
        del part, some  # before the next group of heads is computed
    return whole


def _gather(k: Tensor, v: Tensor, shards: Shards) -> Travel:
    """Keys and values [B, T, heads, D] on their way to this rank and those behind: rows [.., B, heads, D] will come."""
    num_ranks, me = len(shards.lengths), shards.rank

    def cut(x: Tensor) -> list[Tensor]:
        rows = x.transpose(0, 1)
        return [rows if rank >= me else rows[:0] for rank in range(num_ranks)]

    def merge(parts: list[Tensor]) -> Tensor:
        return add_up(parts[me:]).transpose(0, 1)

    counts = [length if rank <= me else 0 for rank, length in enumerate(shards.lengths)]
    return Travel((k, v), Cut(cut, merge), counts, shards.group)


def _by_gathering(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    shards, cu = call.shards, call.cu_seqlens
    sizes = call.group_sizes(k.shape[2])
    query_sizes = [size * (q.shape[2] // k.shape[2]) for size in sizes]
    pairs = zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    queries = q.split(query_sizes, dim=2)
    starts = [partial(_gather, *pair, shards) for pair in pairs]
    if cu is not None or shards.inside_a_block(call.block_size) is not None:
        cu_q = None if cu is None else cu.clamp(shards.start, shards.stop) - shards.start
        cu_k = None if cu is None else cu.clamp(max=shards.stop)
        arrivals = _one_ahead(starts)
        # What came has no name here, so that it is let go of before the next but one sets out.
        attended = (call.attend(of_q, *_keys_and_values(next(arrivals)), cu_q, cu_k) for of_q in queries)
        out, lse, indices = _joined(attended, q.shape[2])
        return out, lse, indices
    routing = SharedRouting(q, k, shards, call.selection)
    arrivals = _one_ahead(starts)  # behind what routing needs, and while it is computed
    indices = routing.finish().indices
    chosen = indices.split(query_sizes, dim=2)
    replayed = (
        call.replay(of_q, *_keys_and_values(next(arrivals)), blocks)
        for of_q, blocks in zip(queries, chosen, strict=True)
    )
    out, lse = _joined(replayed, q.shape[2])
    return out, lse, indices


def _keys_and_values(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What `_gather` brought, [S, B, heads, D] each, as [B, S, heads, D]."""
    k, v = (x.transpose(0, 1) for x in rows)
    return k, v


def _by_selecting(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    shards, block_size = call.shards, call.block_size
    shards.require_whole_blocks(block_size)
    sizes = call.group_sizes(k.shape[2])
    query_sizes = [size * (q.shape[2] // k.shape[2]) for size in sizes]
    indices = SharedRouting(q, k, shards, call.selection).finish().indices
    chosen = chosen_before(indices, shards, block_size, k.shape[2])
    # The host learns of every group what travels before the first one does, so that it need not wait in between.
    wishes = all_wishes(chosen, shards, sizes, block_size)
    pairs = list(zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True))
    arrivals = _one_ahead(
        [partial(fetch, *pair, wish, shards.group, block_size) for pair, wish in zip(pairs, wishes, strict=True)]
    )
    queries = zip(q.split(query_sizes, dim=2), indices.split(query_sizes, dim=2), strict=True)
    parts = (
        call.replay(of_q, *beside_own(next(arrivals), pair, wish), wish.renumbered(of_all))
        for (of_q, of_all), pair, wish in zip(queries, pairs, wishes, strict=True)
    )
    out, lse = _joined(parts, q.shape[2])
    return out, lse, indices


def _by_heads(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    shards = call.shards
    num_ranks, group = len(shards.lengths), q.shape[2] // k.shape[2]
    sizes = [size * num_ranks for size in call.group_sizes(k.shape[2] // num_ranks)]
    parts = zip(
        q.split([size * group for size in sizes], dim=2), k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True
    )
    across = call if shards.between is None else replace(call, shards=shards.between)
    attend = _attend_here if shards.between is None else BY_TRANSPORT[call.transport]
    returning: list[list[Travel]] = []
    arrivals = _one_ahead([partial(_to_heads, part, shards) for part in parts])
    for _ in sizes:
        returning.append([_to_tokens(x, shards) for x in attend(*_by_batch(next(arrivals)), across)])
    arrived = (tuple(_arrived_tokens(travel, shards) for travel in travels) for travels in returning)
    out, lse, indices = _joined(arrived, q.shape[2])
    return out, lse, indices


def _by_batch(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that `_to_heads` brought, [S, B, heads, D] each, as [B, S, heads, D]."""
    q, k, v = (x.transpose(0, 1) for x in rows)
    return q, k, v


def _attend_here(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> _Results:
    """Attention where all tokens are."""
    return call.attend(q, k, v, call.cu_seqlens, call.cu_seqlens)


def _to_heads(tensors: tuple[Tensor, ...], shards: Shards) -> Travel:
    """Tensors [B, T, heads, D] of this rank's tokens on their way: rows [S, B, heads / ranks, D] of each will come."""
    num_ranks = len(shards.lengths)

    def cut(x: Tensor) -> Sequence[Tensor]:
        return x.transpose(0, 1).chunk(num_ranks, dim=2)

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=2).transpose(0, 1)

    return Travel(tensors, Cut(cut, merge), shards.lengths, shards.group)


def _to_tokens(x: Tensor, shards: Shards) -> Travel:
    """[B, S, heads / ranks, ...] of this rank's heads on their way: [ranks · T, B, heads / ranks, ...] will come."""

    def cut(x: Tensor) -> Sequence[Tensor]:
        return x.transpose(0, 1).split(shards.lengths)

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).transpose(0, 1)

    counts = [shards.lengths[shards.rank]] * len(shards.lengths)
    return Travel((x,), Cut(cut, merge), counts, shards.group)


def _arrived_tokens(travel: Travel, shards: Shards) -> Tensor:
    """[B, T, heads, ...] of this rank's tokens from what `_to_tokens` brought."""
    (rows,) = travel.wait()
    per_rank = rows.unflatten(0, (len(shards.lengths), shards.lengths[shards.rank]))
    return per_rank.movedim(0, 2).transpose(0, 1).flatten(2, 3)


BY_TRANSPORT: dict[str, Callable[[Tensor, Tensor, Tensor, _Call], _Results]] = {
    "gather": _by_gathering, "selective": _by_selecting, "heads": _by_heads
}  # fmt: skip
