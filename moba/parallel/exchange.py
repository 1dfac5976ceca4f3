"""Rows that travel between ranks, forward and, as gradients, back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moba.routing import accumulation_dtype


def send_and_receive(sends: list[Tensor], counts: list[int], group: ProcessGroup) -> list[Tensor]:
    """Exchange rows with every rank of a group.

    Args:
        sends: for each rank the rows [*, ...] that go there; this rank's own stay.
        counts: for each rank how many rows come from there.

    Returns:
        For each rank the rows that came from there.
    """
    me = group.rank()
    received = [rows.new_empty(count, *rows.shape[1:]) for rows, count in zip(sends, counts, strict=True)]
    received[me] = sends[me]
    operations = []
    for peer in range(group.size()):
        if peer == me:
            continue
        place = dist.get_global_rank(group, peer)
        if sends[peer].numel():
            operations.append(dist.P2POp(dist.isend, sends[peer].contiguous(), place, group))
        if received[peer].numel():
            operations.append(dist.P2POp(dist.irecv, received[peer], place, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup, counts: list[int], *places: Tensor) -> Tensor:
        ctx.group, ctx.counts, ctx.num_rows = group, counts, rows.shape[0]
        ctx.save_for_backward(*places)
        taken = {id(place): rows[place] for place in places}  # once, where several ranks get the same
        return torch.cat(send_and_receive([taken[id(place)] for place in places], counts, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.saved_tensors
        returned = send_and_receive(
            list(gradient.split(ctx.counts)), [place.numel() for place in places], ctx.group
        )  # fmt: skip
        total = gradient.new_zeros(
            ctx.num_rows, *gradient.shape[1:], dtype=accumulation_dtype(gradient.dtype)
        )  # fmt: skip
        for place, part in zip(places, returned, strict=True):
            total[place] += part
        return total.to(gradient.dtype), None, None, *(None,) * len(places)


def exchange(rows: Tensor, places: list[Tensor], counts: list[int], group: ProcessGroup) -> Tensor:
    """Send each rank some of this rank's rows, and return those that came: [sum of counts, ...], in the ranks' order.

    Args:
        rows: [n, ...]. places: int64, for each rank the numbers of the rows that go there, none twice; also for this
            rank, whose rows are copied.
        counts: for each rank how many rows come from there.

    Numerics: the gradients of a row that went to several ranks are added in fp32 (fp64 for fp64), in the ranks' order,
        and rounded once: they repeat bit for bit.
    """
    received: Tensor = _Exchange.apply(rows, group, counts, *places)
    return received
