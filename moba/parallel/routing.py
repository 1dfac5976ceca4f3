"""Routing over shards: only block means travel, 1/block_size of the keys; then every query knows its blocks.

Scoring a query costs more the more blocks lie before it, so the last rank would take longest. Ranks pair up, the first
with the last: the later one lends the earlier one its first queries, as many as make their work equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba.block_means import append_block_means, moba_route
from moba.parallel.exchange import Transfer
from moba.parallel.shards import Shards
from moba.routing import Routing

# Lending pays from this many blocks on. A query of 128 dims and its choice are 0.3 KB; sending them takes as long as
# scoring (2 ps a score on an H100) 500 blocks over a fast link (300 GB/s), 3000 blocks over a slow one (50 GB/s).
LENDING_BLOCKS = 2048


class SharedRouting:
    """The routing of this rank's queries. Transfers start now; `finish` computes the routing.

    Args:
        q: [B, T, H, D]. k: [B, T, G, D].
        shards: of whole blocks.
        selection: block_size, topk and the other arguments of `moba_route`.
        lends: whether ranks lend each other queries; None: if it pays.
    """

    def __init__(
        self, q: Tensor, k: Tensor, shards: Shards, selection: dict[str, Any], lends: bool | None = None
    ) -> None:
        self._q, self._shards, self._selection = q.detach(), shards, selection
        if lends is None:
            scores = selection["router"] not in ("recent", "sink")
            lends = scores and shards.num_tokens >= LENDING_BLOCKS * selection["block_size"]
        lent = lent_rows(shards.lengths) if lends else [0] * len(shards.lengths)
        self._means = _send_means(k, shards, selection, to_all=lends)
        rows = self._q.transpose(0, 1)
        self._partner = len(shards.lengths) - 1 - shards.rank
        self._from_partner = lent[self._partner] if self._partner > shards.rank else 0
        self._to_partner = lent[shards.rank] if self._partner < shards.rank else 0
        self._rows = self._between_partners(rows[: self._to_partner], self._from_partner)

    def finish(self) -> Routing:
        """Return the routing; its blocks are numbered in the whole sequence."""
        means = next(self._means.arrivals()).transpose(0, 1)
        stop, num_lent = self._shards.stop, self._to_partner
        own = moba_route(self._q[:, num_lent:], means, num_keys=stop, **self._selection).indices
        rows = next(self._rows.arrivals()).transpose(0, 1)
        answers = own[:, :0]
        if self._from_partner:
            last = sum(self._shards.lengths[: self._partner]) + self._from_partner
            answers = moba_route(rows, means, num_keys=last, **self._selection).indices
        returned = next(self._between_partners(answers.transpose(0, 1), num_lent).arrivals())
        if num_lent:
            own = torch.cat([returned.transpose(0, 1), own], dim=1)
        return Routing(own, self._selection["block_size"])

    def _between_partners(self, rows: Tensor, count: int) -> Transfer:
        """Send these rows to this rank's partner, and receive `count` rows from it."""
        num_ranks, partner = len(self._shards.lengths), self._partner
        has_partner = partner != self._shards.rank
        sends = [rows if has_partner and rank == partner else rows[:0] for rank in range(num_ranks)]
        counts = [count if has_partner and rank == partner else 0 for rank in range(num_ranks)]
        return Transfer([sends], counts, self._shards.group)


def lent_rows(lengths: tuple[int, ...]) -> list[int]:
    """For each rank, the number of its first queries that another rank routes.

    Scoring the queries a … b - 1 costs b² - a², up to a constant. A rank with the tokens s … e - 1, whose partner has
    cost c, lends the queries s … x - 1. Both then cost the same: e² - x² = x² - s² + c.
    """
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    lent = [0] * len(lengths)
    for early in range(len(lengths) // 2):
        late = len(lengths) - 1 - early
        start, stop = starts[late], starts[late] + lengths[late]
        cost = (starts[early] + lengths[early]) ** 2 - starts[early] ** 2
        keeps_from = ((stop**2 + start**2 - cost) / 2) ** 0.5 if stop**2 + start**2 > cost else start
        lent[late] = int(min(max(keeps_from - start, 0), lengths[late]))
    return lent


def _send_means(k: Tensor, shards: Shards, selection: dict[str, Any], to_all: bool) -> Transfer:
    """Send this rank's block means; receive those of all ranks up to this one, or of all: [blocks, B, G, D]."""
    block_size = selection["block_size"]
    means = k.new_empty(k.shape[0], k.shape[1] // block_size, *k.shape[2:])
    append_block_means(means, k.detach(), num_new=k.shape[1], block_size=block_size, backend=selection["backend"])
    rows = means.transpose(0, 1)
    sends = [rows if to_all or rank >= shards.rank else rows[:0] for rank in range(len(shards.lengths))]
    counts = [n // block_size if to_all or rank <= shards.rank else 0 for rank, n in enumerate(shards.lengths)]
    return Transfer([sends], counts, shards.group)
