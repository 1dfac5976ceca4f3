"""Rows that travel between ranks while something else is computed, forward and, as gradients, back.

NCCL moves them on a stream of its own: the GPU computes on what came before until `Travel.wait` orders its stream
behind the transfer, and the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moba.numerics import accumulation_dtype


class Transfer:
    """Exchanges with every rank of a group, under way until `finish` returns what came.

    Args:
        sends: of each tensor that travels, for each rank the rows [*, ...] that go there.
        counts: for each rank how many rows come from there.
        copies_own: whether this rank's own rows are copied to stand among those that come; where others get the same
            object, that copy is sent.
    """

    def __init__(
        self, sends: Sequence[Sequence[Tensor]], counts: Sequence[int], group: ProcessGroup, copies_own: bool = True
    ) -> None:
        me = group.rank()
        self._received: list[Tensor] = []
        # Held until the transfer is over: the allocator must not give their memory away before.
        self._sends: list[Tensor] = []
        operations = []
        for rows in sends:
            come = [count if copies_own or peer != me else 0 for peer, count in enumerate(counts)]
            received = rows[me].new_empty(sum(come), *rows[me].shape[1:])
            parts = received.split(come)
            if copies_own:
                parts[me].copy_(rows[me])
            self._received.append(received)
            for peer in range(group.size()):
                place = dist.get_global_rank(group, peer)
                if peer != me and rows[peer].numel():
                    is_copied = copies_own and rows[peer] is rows[me]
                    self._sends.append(parts[me] if is_copied else rows[peer].contiguous())
                    operations.append(dist.P2POp(dist.isend, self._sends[-1], place, group))
                if peer != me and parts[peer].numel():
                    operations.append(dist.P2POp(dist.irecv, parts[peer], place, group))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> list[Tensor]:
        """What came of each tensor, [sum of counts, ...], in the ranks' order."""
        for work in self._works:
            work.wait()
        self._works, self._sends = [], []
        return self._received


def send_and_receive(sends: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Exchange rows of one tensor with every rank of a group, without gradients: [sum of counts, ...]."""
    (received,) = Transfer([sends], counts, group).finish()
    return received


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut into the rows for each rank, and its gradient put together.

    Attributes:
        cut: the tensor -> for each rank rows [*, ...]; all ranks' may be views of it.
        merge: for each rank the gradient of the rows that went there -> the tensor's.
    """

    cut: Callable[[Tensor], Sequence[Tensor]]
    merge: Callable[[list[Tensor]], Tensor]


class Travel:
    """Rows of this rank's tensors on their way to others, and theirs to here, from now on.

    Args:
        tensors: cut alike; differentiable.
        cut: what goes where.
        counts: for each rank how many rows come from there.
        group: the process group, all of whose ranks do the same.
    """

    def __init__(self, tensors: Sequence[Tensor], cut: Cut, counts: Sequence[int], group: ProcessGroup) -> None:
        self._cut, self._counts, self._group = cut, list(counts), group
        self._lengths: list[int] = []
        self._own: list[Tensor] = []
        self._transfer: Transfer | None = None
        self._ticket: Tensor | None = _Send.apply(self, *tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """What came of each tensor, [sum of counts, ...], in the ranks' order; to be called once."""
        ticket, self._ticket = self._ticket, None
        arrived: tuple[Tensor, ...] = _Receive.apply(ticket, self)
        return arrived

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Send the tensors' rows."""
        sends = [self._cut.cut(x) for x in tensors]
        self._lengths = [rows.shape[0] for rows in sends[0]]
        self._transfer = Transfer(sends, self._counts, self._group)

    def start_back(self, gradients: Sequence[Tensor]) -> None:
        """Send the gradients of what came back to where it came from."""
        sends = [x.split(self._counts) for x in gradients]
        self._own = [rows[self._group.rank()] for rows in sends]
        self._transfer = Transfer(sends, self._lengths, self._group, copies_own=False)

    def finish(self) -> list[Tensor]:
        """What came."""
        assert self._transfer is not None
        transfer, self._transfer = self._transfer, None
        return transfer.finish()

    def finish_back(self) -> list[Tensor]:
        """The gradients of the tensors, from those of all ranks that their rows went to."""
        me, own, self._own = self._group.rank(), self._own, []
        lengths = [0 if rank == me else length for rank, length in enumerate(self._lengths)]
        parts = [list(x.split(lengths)) for x in self.finish()]
        return [self._cut.merge([*rows[:me], mine, *rows[me + 1 :]]) for rows, mine in zip(parts, own, strict=True)]


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, rounded once: in fp32 (fp64 for fp64), in their order, so that it repeats bit for bit."""
    if len(parts) <= 2:
        # Any dtype's addition of two rounds once.
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    total = parts[0].to(accumulation_dtype(parts[0].dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)


class _Send(torch.autograd.Function):
    """Tensors -> a ticket for what will come. Backward waits for the gradients that `_Receive` sent."""

    @staticmethod
    def forward(ctx: Any, travel: Travel, *tensors: Tensor) -> Tensor:
        ctx.travel = travel
        travel.start(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.travel.finish_back()


class _Receive(torch.autograd.Function):
    """A ticket -> what came. Backward sends the gradients on their way and does not wait."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, travel: Travel) -> tuple[Tensor, ...]:
        ctx.travel = travel
        return tuple(travel.finish())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.travel.start_back([x.contiguous() for x in gradients])
        return gradients[0].new_empty(0), None
