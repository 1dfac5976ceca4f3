"""Send rows between ranks, and send their gradients back.

NCCL uses a stream of its own. The GPU computes on earlier rows until a wait makes its stream wait for the transfer; the
host never waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moba.numerics import accumulation_dtype
from moba.parallel.shards import Shards


class Transfer:
    """An exchange with every rank of a group. It starts now; `arrivals` yields the received rows.

    Args:
        sends: for each tensor, the rows [*, ...] that go to each rank.
        counts: number of rows that come from each rank.
        group: the process group.
        copies_own: whether this rank's own rows are copied into the result. If other ranks get the same object, that
            copy is sent.
    """

    def __init__(
        self, sends: Sequence[Sequence[Tensor]], counts: Sequence[int], group: ProcessGroup, copies_own: bool = True
    ) -> None:
        # For each tensor: the works, the received rows, and the sent rows. The latter are kept until the transfer is
        # over, so that the allocator does not reuse their memory.
        self._under_way = [_exchange(rows, counts, group, copies_own) for rows in sends]

    def arrivals(self) -> Iterator[Tensor]:
        """Wait for each tensor's rows and yield them, [sum of counts, ...], in the ranks' order."""
        while self._under_way:
            works, received, _ = self._under_way.pop(0)
            for work in works:
                work.wait()
            yield received


def _exchange(
    rows: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup, copies_own: bool
) -> tuple[list[Any], Tensor, list[Tensor]]:
    """Start to exchange one tensor's rows: the works, the room for received rows, and the sent rows."""
    me = group.rank()
    come = [count if copies_own or peer != me else 0 for peer, count in enumerate(counts)]
    received = rows[me].new_empty(sum(come), *rows[me].shape[1:])
    parts = received.split(come)
    if copies_own:
        parts[me].copy_(rows[me])
    sent: list[Tensor] = []
    operations = []
    for peer in range(group.size()):
        place = dist.get_global_rank(group, peer)
        if peer != me and rows[peer].numel():
            sent.append(parts[me] if copies_own and rows[peer] is rows[me] else rows[peer].contiguous())
            operations.append(dist.P2POp(dist.isend, sent[-1], place, group))
        if peer != me and parts[peer].numel():
            operations.append(dist.P2POp(dist.irecv, parts[peer], place, group))
    return dist.batch_isend_irecv(operations) if operations else [], received, sent


class Gathering:
    """Keys and values of all ranks up to this one, one group of key/value heads after another.

    The first group is sent now. Each later group is sent when the group before it is asked for, and travels while that
    one is computed. In the backward, gradients travel back while the group before is differentiated.

    Args:
        k, v: [B, T, G, D]; differentiable.
        shards: of the sequence.
        sizes: key/value heads in each group.
    """

    def __init__(self, k: Tensor, v: Tensor, shards: Shards, sizes: Sequence[int]) -> None:
        self._shards, self._sizes = shards, list(sizes)
        heads = [x.detach().split(self._sizes, dim=2) for x in (k, v)]
        self._waiting = list(zip(*heads, strict=True))
        self._under_way: list[Transfer] = []
        self._back: list[tuple[Transfer, list[Tensor]]] = []
        self._tickets: list[Tensor] = list(_Depart.apply(self, k, v))
        self._start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, heads, D] of the next group; S counts the tokens of all ranks up to this one."""
        if self._waiting:
            self._start()
        # Autograd's graph refers to this object, so this object must not refer to the graph.
        k, v = _Arrive.apply(self._tickets.pop(0), self)
        return k, v

    def _start(self) -> None:
        me = self._shards.rank
        rows = [x.transpose(0, 1) for x in self._waiting.pop(0)]
        sends = [[x if rank >= me else x[:0] for rank in range(len(self._shards.lengths))] for x in rows]
        self._under_way.append(Transfer(sends, self._counts, self._shards.group))

    @property
    def _counts(self) -> list[int]:
        """Rows that come from each rank."""
        return [length if rank <= self._shards.rank else 0 for rank, length in enumerate(self._shards.lengths)]

    def arrive(self) -> tuple[Tensor, ...]:
        """The received rows of the group that was sent first."""
        return tuple(x.transpose(0, 1) for x in self._under_way.pop(0).arrivals())

    def start_back(self, gradients: Sequence[Tensor]) -> None:
        """Send gradients [B, S, heads, D] of received rows back to their ranks; the last group comes first."""
        me = self._shards.rank
        sends = [x.transpose(0, 1).contiguous().split(self._counts) for x in gradients]
        counts = [self._shards.lengths[me] if rank > me else 0 for rank in range(len(self._shards.lengths))]
        transfer = Transfer(sends, counts, self._shards.group, copies_own=False)
        self._back.append((transfer, [rows[me] for rows in sends]))

    def gradients(self) -> list[Tensor]:
        """The gradients of k and v, summed over all ranks that received them."""
        num_later = len(self._shards.lengths) - 1 - self._shards.rank
        of_rows = [own.new_empty(*own.shape[:2], sum(self._sizes), own.shape[3]) for own in self._back[0][1]]
        ends = list(accumulate(self._sizes))
        for (transfer, own), size, end in zip(self._back, self._sizes[::-1], ends[::-1], strict=True):
            for whole, mine, came in zip(of_rows, own, transfer.arrivals(), strict=True):
                parts = came.unflatten(0, (num_later, mine.shape[0])).unbind()
                add_up([mine, *parts], whole[:, :, end - size : end])
        self._back = []
        return [x.transpose(0, 1) for x in of_rows]


def add_up(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write the sum of tensors to out: in fp32 (fp64 for fp64), in order, rounded once, so that its bits repeat."""
    if len(parts) == 1:
        out.copy_(parts[0])
    elif len(parts) == 2:
        # Adding two tensors rounds once, in any dtype.
        torch.add(*parts, out=out)
    else:
        total = parts[0].to(accumulation_dtype(out.dtype), copy=True)
        for part in parts[1:]:
            total += part
        out.copy_(total)


class _Depart(torch.autograd.Function):
    """Keys and values -> a ticket for each group of heads. Backward waits for the gradients that `_Arrive` sent."""

    @staticmethod
    def forward(ctx: Any, gathering: Gathering, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.gathering = gathering
        return tuple(k.new_empty(0) for _ in gathering._sizes)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gathering.gradients()


class _Arrive(torch.autograd.Function):
    """A ticket -> the received rows. Backward starts to send the gradients and does not wait."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, gathering: Gathering) -> tuple[Tensor, ...]:
        ctx.gathering = gathering
        return gathering.arrive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.start_back(gradients)
        return gradients[0].new_empty(0), None


def to_heads(tensors: Sequence[Tensor], shards: Shards) -> tuple[Tensor, ...]:
    """Tensors [B, T, heads, D] of this rank's tokens -> [B, S, heads / ranks, D] of all tokens; differentiable."""
    came: tuple[Tensor, ...] = _ToHeads.apply(shards, *tensors)
    return came


def to_tokens(x: Tensor, shards: Shards) -> Tensor:
    """[B, S, heads / ranks, ...] of all tokens -> [B, T, heads, ...] of this rank's tokens; differentiable."""
    came: Tensor = _ToTokens.apply(shards, x)
    return came


class _ToHeads(torch.autograd.Function):
    """`to_heads`; its gradients are exchanged as in `to_tokens`."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shards = shards
        return _exchange_heads(tensors, shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_exchange_tokens(gradients, ctx.shards)


class _ToTokens(torch.autograd.Function):
    """`to_tokens`; its gradient is exchanged as in `to_heads`."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, x: Tensor) -> Tensor:
        ctx.shards = shards
        return _exchange_tokens([x], shards)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _exchange_heads([gradient], ctx.shards)[0]


def _exchange_heads(tensors: Sequence[Tensor], shards: Shards) -> tuple[Tensor, ...]:
    sends = [x.transpose(0, 1).chunk(len(shards.lengths), dim=2) for x in tensors]
    return tuple(x.transpose(0, 1) for x in Transfer(sends, shards.lengths, shards.group).arrivals())


def _exchange_tokens(tensors: Sequence[Tensor], shards: Shards) -> tuple[Tensor, ...]:
    me, num_ranks = shards.rank, len(shards.lengths)
    sends = [x.transpose(0, 1).split(shards.lengths) for x in tensors]
    transfer = Transfer(sends, [shards.lengths[me]] * num_ranks, shards.group, copies_own=False)
    results = []
    for rows, came in zip(sends, transfer.arrivals(), strict=True):
        others = came.unflatten(0, (num_ranks - 1, shards.lengths[me])).unbind()
        results.append(torch.cat([*others[:me], rows[me], *others[me:]], dim=2).transpose(0, 1))
    return tuple(results)
