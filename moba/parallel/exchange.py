"""Rows that travel between ranks while something else is computed, forward and, as gradients, back.

NCCL moves them on a stream of its own: the GPU computes on what came before until `Travel.wait` orders its stream
behind the transfer, and the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moba.routing import accumulation_dtype

# Rows of a tensor: their numbers (int64), or a contiguous range.
Rows = Tensor | slice


class Transfer:
    """One exchange with every rank of a group, under way until `finish` returns what came: for each rank its rows.

    Args:
        sends: for each rank the rows [*, ...] that go there; this rank's own are copied.
        counts: for each rank how many rows come from there.
    """

    def __init__(self, sends: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup) -> None:
        me = group.rank()
        self.received = sends[me].new_empty(sum(counts), *sends[me].shape[1:])
        parts = self.received.split(list(counts))
        parts[me].copy_(sends[me])
        # Held until the transfer is over: the allocator must not give their memory away before.
        self._sends = [rows.contiguous() if peer != me else rows[:0] for peer, rows in enumerate(sends)]
        operations = []
        for peer in range(group.size()):
            if peer == me:
                continue
            place = dist.get_global_rank(group, peer)
            if self._sends[peer].numel():
                operations.append(dist.P2POp(dist.isend, self._sends[peer], place, group))
            if parts[peer].numel():
                operations.append(dist.P2POp(dist.irecv, parts[peer], place, group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> Tensor:
        """What came, [sum of counts, ...], in the ranks' order."""
        for work in self._works:
            work.wait()
        self._works, self._sends = [], []
        return self.received


def send_and_receive(sends: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Exchange rows with every rank of a group, without gradients.

    Args:
        sends: for each rank the rows [*, ...] that go there; this rank's own are copied.
        counts: for each rank how many rows come from there.

    Returns:
        What came, [sum of counts, ...], in the ranks' order.
    """
    return Transfer(sends, counts, group).finish()


class Travel:
    """Rows of this rank on their way to others, and theirs to here, from now on.

    Args:
        rows: [n, ...]; differentiable.
        places: for each rank the rows that go there, none twice; also for this rank, whose rows are copied.
        counts: for each rank how many rows come from there.
        group: the process group, all of whose ranks do the same.
        is_partition: whether every row goes to exactly one rank, so that no gradients need to be added.

    Numerics: the gradients of a row that went to several ranks are added in fp32 (fp64 for fp64), in the ranks' order,
        and rounded once: they repeat bit for bit.
    """

    def __init__(
        self,
        rows: Tensor,
        places: Sequence[Rows],
        counts: Sequence[int],
        group: ProcessGroup,
        *,
        is_partition: bool = False,
    ) -> None:
        self._places, self._counts, self._group, self._is_partition = places, list(counts), group, is_partition
        self._lengths = [_num_rows(place, rows.shape[0]) for place in places]
        self._num_rows = rows.shape[0]
        self._transfer: Transfer | None = None
        self._ticket: Tensor | None = _Send.apply(rows, self)

    def wait(self) -> Tensor:
        """What came, [sum of counts, ...], in the ranks' order; to be called once."""
        ticket, self._ticket = self._ticket, None
        arrived: Tensor = _Receive.apply(ticket, self)
        return arrived

    def start(self, rows: Tensor) -> None:
        """Send rows [n, ...]."""
        rows = rows.contiguous()
        self._transfer = Transfer([rows[place] for place in self._places], self._counts, self._group)

    def start_back(self, gradient: Tensor) -> None:
        """Send the gradient of what came back to where it came from."""
        self._transfer = Transfer(gradient.split(self._counts), self._lengths, self._group)

    def finish(self) -> Tensor:
        """What came."""
        assert self._transfer is not None
        transfer, self._transfer = self._transfer, None
        return transfer.finish()

    def finish_back(self) -> Tensor:
        """The gradient of the rows, from those of all ranks that they went to."""
        parts = self.finish().split(self._lengths)
        dtype = parts[0].dtype if self._is_partition else accumulation_dtype(parts[0].dtype)
        total = parts[0].new_zeros(self._num_rows, *parts[0].shape[1:], dtype=dtype)
        for place, part in zip(self._places, parts, strict=True):
            total[place] += part
        return total.to(parts[0].dtype)


def _num_rows(place: Rows, num_rows: int) -> int:
    return len(range(num_rows)[place]) if isinstance(place, slice) else place.numel()


class _Send(torch.autograd.Function):
    """Rows -> a ticket for what will come. Backward waits for the gradients that `_Receive` sent."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.start(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.travel.finish_back(), None


class _Receive(torch.autograd.Function):
    """A ticket -> what came. Backward sends the gradients on their way and does not wait."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        return travel.finish()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.travel.start_back(gradient.contiguous())
        return gradient.new_empty(0), None
