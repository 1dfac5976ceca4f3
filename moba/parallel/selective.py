"""What travels with transport="selective": the blocks of keys and values that some query of another rank chose.

Letters: B batch, T tokens of this rank, H query heads, G key/value heads, g of them in a group, D head dim, N blocks
before this rank's, M blocks that travelled for one key/value head, K = topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moba.numerics import accumulation_dtype
from moba.parallel.exchange import Cut, Travel, send_and_receive
from moba.parallel.shards import Shards


@dataclass(frozen=True)
class Wishes:
    """The blocks of a group of g key/value heads that this rank's queries chose among those of the ranks before it.

    Attributes:
        row, slot, head: int64 [blocks], where each block that comes shall stand, in the order in which they come.
        slots: int64 [N, B, g], where a chosen block stands among those that travel for its key/value head.
        num_slots: M, the most of any key/value head.
        counts: for each rank how many come from there.
        places: for each rank, which of this rank's blocks go there: block, row and head, int64 each.
    """

    row: Tensor
    slot: Tensor
    head: Tensor
    slots: Tensor
    num_slots: int
    counts: list[int]
    places: list[tuple[Tensor, ...]]

    def renumbered(self, indices: Tensor) -> Tensor:
        """The routing [B, T, H, K] of these heads' queries, among the keys of `beside_own`."""
        num_before = self.slots.shape[0]
        own = indices - num_before + self.num_slots
        if num_before:
            queries_per_head = indices.shape[2] // self.slots.shape[2]
            table = self.slots.permute(1, 2, 0).repeat_interleave(queries_per_head, dim=1)  # [B, H, N]
            place = indices.clamp(0, num_before - 1).long().transpose(1, 2).flatten(2)  # [B, H, T K]
            travelled = table.gather(2, place).unflatten(2, (indices.shape[1], indices.shape[3])).transpose(1, 2)
            own = torch.where(indices < num_before, travelled, own)
        return torch.where(indices < 0, -1, own).to(torch.int32)


def chosen_before(indices: Tensor, shards: Shards, block_size: int, num_kv_heads: int) -> Tensor:
    """Whether a block before this rank's was chosen by one of its queries, for each row and kv head: bool [N, B, G].

    Args:
        indices: int32 [B, T, H, K].
    """
    num_before = shards.start // block_size
    chosen = torch.zeros(num_kv_heads, indices.shape[0], num_before + 1, dtype=torch.bool, device=indices.device)
    for of_head, of_queries in zip(chosen, indices.chunk(num_kv_heads, dim=2), strict=True):
        is_before = (of_queries >= 0) & (of_queries < num_before)
        of_head.scatter_(1, torch.where(is_before, of_queries, num_before).flatten(1).long(), True)
    return chosen[..., :num_before].permute(2, 1, 0)


def all_wishes(chosen: Tensor, shards: Shards, sizes: list[int], block_size: int) -> list[Wishes]:
    """What travels, for each group of key/value heads, of the blocks [N, B, G] that this rank and all others chose."""
    blocks = [length // block_size for length in shards.lengths]
    ranks_before = [count if rank < shards.rank else 0 for rank, count in enumerate(blocks)]
    mine = [blocks[shards.rank] if rank > shards.rank else 0 for rank in range(len(blocks))]
    wanted = send_and_receive(chosen.to(torch.uint8).split(ranks_before), mine, shards.group)
    # A byte for each block: the host waits for them once, and finds out there what comes and goes.
    device = chosen.device
    chosen, wanted = _on_host(chosen, wanted.bool())
    wishes = []
    for of_heads, wanted_of_heads in zip(chosen.split(sizes, dim=2), wanted.split(sizes, dim=2), strict=True):
        slots = of_heads.long().cumsum(0) - 1
        block, row, head = of_heads.nonzero(as_tuple=True)
        places = [part.nonzero(as_tuple=True) for part in wanted_of_heads.split(mine)]
        wishes.append(
            Wishes(
                row.to(device), slots[block, row, head].to(device), head.to(device), slots.to(device),
                num_slots=int(slots[-1].max()) + 1 if slots.numel() else 0,
                counts=[int(part.sum()) for part in of_heads.split(ranks_before)],
                places=[tuple(x.to(device) for x in place) for place in places],
            )
        )  # fmt: skip
    return wishes


def _on_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one dtype, read in one go."""
    flat = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))


def fetch(k: Tensor, v: Tensor, wish: Wishes, group: ProcessGroup, block_size: int) -> Travel:
    """Chosen blocks of keys and values [B, T, heads, D] on their way: [blocks, block_size, D] will come."""
    num_blocks = k.shape[1] // block_size
    # The backward holds what `merge` names: not k, which may be freed until then.
    shape, kind, device = k.shape, k.dtype, k.device

    def blocks_of(x: Tensor) -> Tensor:
        return x[:, : num_blocks * block_size].unflatten(1, (num_blocks, block_size))

    def cut(x: Tensor) -> list[Tensor]:
        return [_narrow(blocks_of(_wide(x))[row, block, :, head], x) for block, row, head in wish.places]

    def merge(parts: list[Tensor]) -> Tensor:
        # In fp32 where more than one rank may have chosen a block.
        is_shared = sum(len(part) > 0 for part in parts) > 1
        total = torch.zeros(shape, dtype=accumulation_dtype(kind) if is_shared else kind, device=device)
        for part, (block, row, head) in zip(parts, wish.places, strict=True):
            blocks_of(total)[row, block, :, head] += part
        return total.to(kind)

    return Travel((k, v), Cut(cut, merge), wish.counts, group)


def beside_own(came: tuple[Tensor, ...], own: tuple[Tensor, Tensor], wish: Wishes) -> tuple[Tensor, Tensor]:
    """Keys and values [B, M · block_size + T, g, D]: the blocks [.., block_size, D] that came, and this rank's own.

    Heads for which fewer than M blocks travelled have zeros, which no query chose.
    """
    k, v = (_Beside.apply(blocks, x, wish) for blocks, x in zip(came, own, strict=True))
    return k, v


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, own: Tensor, wish: Wishes) -> Tensor:
        ctx.wish, ctx.shape = wish, (wish.num_slots, blocks.shape[1])
        num_before = wish.num_slots * blocks.shape[1]
        result = own.new_zeros(own.shape[0], num_before + own.shape[1], *own.shape[2:])
        result[:, num_before:] = own
        came = _wide(result)[:, :num_before].unflatten(1, ctx.shape)
        came[wish.row, wish.slot, :, wish.head] = blocks if came.dtype == blocks.dtype else _wide(blocks)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        num_before = ctx.shape[0] * ctx.shape[1]
        came = _wide(gradient)[:, :num_before].unflatten(1, ctx.shape)
        blocks = _narrow(came[ctx.wish.row, ctx.wish.slot, :, ctx.wish.head], gradient)
        return blocks, gradient[:, num_before:], None


def _wide(x: Tensor) -> Tensor:
    """The same memory [.., D] as numbers of eight bytes, of which an index moves fewer; x where that cannot be."""
    ratio = 8 // x.element_size()
    is_whole = not any(count % ratio for count in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    return x.view(torch.int64) if is_whole and x.stride(-1) == 1 else x


def _narrow(x: Tensor, like: Tensor) -> Tensor:
    """Numbers that `_wide` made of some like `like`, as those again."""
    if not x.numel():
        return like.new_empty(*x.shape[:-1], like.shape[-1])
    return x.contiguous().view(like.dtype)
