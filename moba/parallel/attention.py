"""MoBA over a sequence whose tokens lie across ranks: the same routing and, up to rounding, the same result as on one.

Three ways for keys and queries to meet:

- "gather": every rank gets the keys and values of all ranks before it. Simple, serves packed sequences, cheap where
  there are few key/value heads.
- "selective": every rank gets the block means of all ranks before it, routes, and then only those blocks of keys and
  values that one of its queries chose. Memory and traffic follow the routing.
- "heads": every rank gets all tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509), and gives their results back.

Letters: B batch, T tokens of this rank, S tokens of the sequence, H query heads, G key/value heads, D head dim,
N blocks before this rank's, M blocks that travelled for one key/value head.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moba.attention import append_block_means, moba_attention, moba_attention_varlen, moba_route
from moba.checks import check_attention, check_cu_seqlens, require_tensors
from moba.config import BACKENDS, Router, require_one_of, validate_selection
from moba.parallel.exchange import exchange, send_and_receive
from moba.parallel.shards import DTYPES, Shards, agree, process_group
from moba.routing import Routing

TRANSPORTS = ("gather", "selective", "heads")


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
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over a sequence that is split between ranks. Every rank calls it.

    Args:
        q: [B, T, H, D], this rank's tokens: contiguous shards of the sequence, in the ranks' order. Their lengths may
            differ, and be 0.
        k, v: [B, T, G, D].
        group: the ranks that share the sequence: a process group, a mesh of one dimension, or None for all.
        block_size, topk, scale, keep_first, keep_recent, router, backend: as in `moba_attention`; the same everywhere.
        cu_seqlens: int32 [documents + 1], bounds of packed documents in the whole sequence, the same on every rank;
            batch size 1, and not with "selective".
        transport: "gather", "selective" or "heads". "selective" needs shards of whole blocks (but for the last), and
            waits for the device to learn what travels; "heads" needs as many key/value heads as ranks, or a multiple.
        return_lse, return_routing: also return this rank's log-sum-exp [B, T, H] and `Routing`, whose blocks are those
            of the whole sequence.

    Returns:
        out [B, T, H, D]; or a tuple of out, lse and routing, of what was asked for. Differentiable as `moba_attention`;
        gradients of keys that travelled come back to their rank.

    Raises:
        ValueError: on every rank, naming what the ranks disagree on, or what is not valid.

    Numerics: block means and routing are those of one device, bit for bit. Gradients of a key from several ranks are
        rounded to its dtype before they travel and added in fp32 in the ranks' order, so results repeat.
    """
    group = process_group(group)

    def settings() -> dict[str, int]:
        validate_selection(block_size, topk, keep_first, keep_recent, router)
        require_one_of("transport", transport, TRANSPORTS)
        require_one_of("backend", backend, BACKENDS)
        _check_shapes(q, k, v, cu_seqlens, transport, group.size())
        return {
            "batch size": q.shape[0], "query heads": q.shape[2], "key/value heads": k.shape[2],
            "head dim": q.shape[3], "dtype": DTYPES.index(q.dtype), "block_size": block_size, "topk": topk,
            "keep_first": keep_first, "keep_recent": keep_recent,
            "router": -1 if callable(router) else crc32(router.encode()), "transport": TRANSPORTS.index(transport),
            "documents": 0 if cu_seqlens is None else cu_seqlens.numel(),
        }  # fmt: skip

    device = next((x.device for x in (q, k, v) if isinstance(x, Tensor)), torch.device("cpu"))
    shards = agree(q, device, group, settings)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.device, shards.num_tokens)
    options: dict[str, Any] = {
        "block_size": block_size, "topk": topk, "keep_first": keep_first, "keep_recent": keep_recent,
        "router": router, "backend": backend,
    }  # fmt: skip
    if transport == "gather":
        out, lse, routing = _by_gathering(q, k, v, shards, cu_seqlens, scale, options)
    elif transport == "selective":
        out, lse, routing = _by_selecting(q, k, v, shards, scale, options)
    else:
        out, lse, routing = _by_heads(q, k, v, shards, cu_seqlens, scale, options)
    results = (out, *([lse] if return_lse else []), *([routing] if return_routing else []))
    return results if len(results) > 1 else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, transport: str, num_ranks: int) -> None:
    require_tensors(q=q, k=k, v=v)
    check_attention(4, q=q, k=k, v=v)
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
    if transport == "heads" and k.shape[2] % num_ranks:
        raise ValueError(
            f'transport="heads" needs key/value heads in a multiple of the {num_ranks} ranks, got {k.shape[2]}; '
            'take "gather" or "selective"'
        )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, scale: float | None, options: Any
) -> tuple[Tensor, Tensor, Routing]:
    """Attention of q [B, T, H, D], the last of the keys [B, S, G, D], or within documents."""
    both: dict[str, Any] = {"scale": scale, "return_lse": True, "return_routing": True}
    if cu_q is None:
        result: tuple[Tensor, Tensor, Routing] = moba_attention(q, k, v, **options, **both)
        return result
    out, lse, routing = moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options, **both)
    return out[None], lse[None], Routing(routing.indices[None], routing.block_size)


def _by_gathering(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, cu_seqlens: Tensor | None, scale: float | None, options: Any
) -> tuple[Tensor, Tensor, Routing]:
    rows = torch.cat([k, v], dim=-1).transpose(0, 1)  # [T, B, G, 2 D]
    all_rows = torch.arange(rows.shape[0], device=q.device)
    places = [all_rows if rank >= shards.rank else all_rows[:0] for rank in range(len(shards.lengths))]
    counts = [length if rank <= shards.rank else 0 for rank, length in enumerate(shards.lengths)]
    k, v = exchange(rows, places, counts, shards.group).transpose(0, 1).chunk(2, dim=-1)
    if cu_seqlens is None:
        return _attend(q, k, v, None, None, scale, options)
    cu_q = cu_seqlens.clamp(shards.start, shards.stop) - shards.start
    return _attend(q, k, v, cu_q, cu_seqlens.clamp(max=shards.stop), scale, options)


def _by_selecting(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, scale: float | None, options: Any
) -> tuple[Tensor, Tensor, Routing]:
    block_size = options["block_size"]
    shards.require_whole_blocks(block_size)
    routing = moba_route(q, _means_before(k, shards, options), num_keys=shards.stop, **options)
    chosen = _chosen_before(routing, shards, k.shape[2])  # [N, B, G]
    wanted = _tell_wishes(chosen, shards, block_size)
    travelled = _fetch(k, v, chosen, wanted, shards, block_size)
    num_before = shards.start // block_size
    slots = chosen.long().cumsum(0) - 1  # among the blocks that travel for a key/value head
    num_slots = int(slots[-1].max()) + 1 if num_before and slots.numel() else 0
    block, row, head = chosen.nonzero(as_tuple=True)
    before = travelled.new_zeros(k.shape[0], k.shape[2], num_slots, *travelled.shape[1:])
    before = before.index_put((row, head, slots[block, row, head]), travelled)  # [B, G, M, block_size, 2 D]
    own = torch.cat([k, v], dim=-1)
    keys, values = torch.cat([before.flatten(2, 3).transpose(1, 2), own], dim=1).chunk(2, dim=-1)
    local = _renumbered(routing.indices, slots, num_before, num_slots)
    out, lse = moba_attention(
        q, keys, values, block_size=block_size, topk=options["topk"], backend=options["backend"], scale=scale,
        routing=Routing(local, block_size), return_lse=True,
    )  # fmt: skip
    return out, lse, routing


def _means_before(k: Tensor, shards: Shards, options: Any) -> Tensor:
    """Means [B, blocks, G, D] of the finished blocks of all ranks up to this one."""
    block_size = options["block_size"]
    means = k.new_empty(k.shape[0], k.shape[1] // block_size, *k.shape[2:])
    append_block_means(means, k.detach(), num_new=k.shape[1], block_size=block_size, backend=options["backend"])
    rows = means.transpose(0, 1).contiguous()
    sends = [rows if rank >= shards.rank else rows[:0] for rank in range(len(shards.lengths))]
    counts = [length // block_size if rank <= shards.rank else 0 for rank, length in enumerate(shards.lengths)]
    return torch.cat(send_and_receive(sends, counts, shards.group)).transpose(0, 1)


def _chosen_before(routing: Routing, shards: Shards, num_kv_heads: int) -> Tensor:
    """Whether a block before this rank's was chosen by one of its queries, for each row and kv head: bool [N, B, G]."""
    num_before = shards.start // routing.block_size
    indices = routing.indices.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2)  # [B, G, all choices]
    place = torch.where((indices >= 0) & (indices < num_before), indices, num_before).long()
    chosen = torch.zeros(*indices.shape[:2], num_before + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter_(2, place, True)[..., :num_before].permute(2, 0, 1)


def _tell_wishes(chosen: Tensor, shards: Shards, block_size: int) -> list[Tensor]:
    """Which of this rank's blocks each rank wants: for each rank bool [its blocks or none, B, G]."""
    blocks = [length // block_size for length in shards.lengths]
    wishes = list(chosen.to(torch.uint8).split([n if rank < shards.rank else 0 for rank, n in enumerate(blocks)]))
    counts = [blocks[shards.rank] if rank > shards.rank else 0 for rank in range(len(blocks))]
    return [rows.bool() for rows in send_and_receive(wishes, counts, shards.group)]


def _fetch(k: Tensor, v: Tensor, chosen: Tensor, wanted: list[Tensor], shards: Shards, block_size: int) -> Tensor:
    """Blocks of keys and values, in the order of `chosen.nonzero()`: [blocks, block_size, 2 D]."""
    num_blocks = k.shape[1] // block_size
    blocks = torch.cat([k, v], dim=-1)[:, : num_blocks * block_size].unflatten(1, (num_blocks, block_size))
    rows = blocks.permute(1, 0, 3, 2, 4).flatten(0, 2)  # (block, row, head): [.., block_size, 2 D]
    places = [rows_of.flatten().nonzero()[:, 0] for rows_of in wanted]
    before = [length // block_size for length in shards.lengths[: shards.rank]]
    counts = [int(part.sum()) for part in chosen.split(before)] if before else []
    counts += [0] * (len(shards.lengths) - len(counts))
    return exchange(rows, places, counts, shards.group)


def _renumbered(indices: Tensor, slots: Tensor, num_before: int, num_slots: int) -> Tensor:
    """The routing [B, T, H, K] among the blocks that travelled and this rank's own.

    Args:
        slots: int64 [N, B, G], where a chosen block stands among those that travelled for its key/value head.
    """
    own = indices - num_before + num_slots
    if num_before:
        group = indices.shape[2] // slots.shape[2]
        table = slots.permute(1, 2, 0).repeat_interleave(group, dim=1)  # [B, H, N]
        place = indices.clamp(0, num_before - 1).long().transpose(1, 2).flatten(2)  # [B, H, T K]
        travelled = table.gather(2, place).unflatten(2, (indices.shape[1], indices.shape[3])).transpose(1, 2)
        own = torch.where(indices < num_before, travelled, own)
    return torch.where(indices < 0, -1, own).to(torch.int32)


def _by_heads(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, cu_seqlens: Tensor | None, scale: float | None, options: Any
) -> tuple[Tensor, Tensor, Routing]:
    q, k, v = (_to_heads(x, shards) for x in (q, k, v))
    out, lse, routing = _attend(q, k, v, cu_seqlens, cu_seqlens, scale, options)
    indices = _to_tokens(routing.indices, shards)
    return _to_tokens(out, shards), _to_tokens(lse[..., None], shards)[..., 0], Routing(indices, routing.block_size)


def _to_heads(x: Tensor, shards: Shards) -> Tensor:
    """[B, T, heads, ...] of this rank's tokens -> [B, S, heads / ranks, ...] of this rank's heads."""
    num_ranks = len(shards.lengths)
    rows = x.unflatten(2, (num_ranks, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # (rank, token)
    places = list(torch.arange(rows.shape[0], device=x.device).split(x.shape[1])) if x.shape[1] else []
    places = places or [torch.arange(0, device=x.device)] * num_ranks
    return exchange(rows, places, list(shards.lengths), shards.group).transpose(0, 1)


def _to_tokens(x: Tensor, shards: Shards) -> Tensor:
    """The inverse of `_to_heads`."""
    num_ranks, num_tokens = len(shards.lengths), shards.lengths[shards.rank]
    rows = x.transpose(0, 1)
    places = list(torch.arange(rows.shape[0], device=x.device).split(shards.lengths))
    received = exchange(rows, places, [num_tokens] * num_ranks, shards.group)
    return received.unflatten(0, (num_ranks, num_tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)
