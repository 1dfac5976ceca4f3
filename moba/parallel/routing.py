"""Routing over shards: block means travel, 1/block_size of the keys, and every query then knows its blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moba.attention import append_block_means, moba_route
from moba.parallel.exchange import send_and_receive
from moba.parallel.shards import Shards
from moba.routing import Routing


def route(q: Tensor, k: Tensor, shards: Shards, selection: dict[str, Any]) -> Routing:
    """The routing of this rank's queries, its blocks those of the whole sequence.

    Args:
        q: [B, T, H, D]. k: [B, T, G, D].
        shards: of whole blocks.
        selection: block_size, topk and the other arguments of `moba_route`.
    """
    return moba_route(q, _means_before(k, shards, selection), num_keys=shards.stop, **selection)


def _means_before(k: Tensor, shards: Shards, selection: dict[str, Any]) -> Tensor:
    """Means [B, blocks, G, D] of the finished blocks of all ranks up to this one."""
    block_size = selection["block_size"]
    means = k.new_empty(k.shape[0], k.shape[1] // block_size, *k.shape[2:])
    append_block_means(
        means, k.detach(), num_new=k.shape[1], block_size=block_size, backend=selection["backend"]
    )  # fmt: skip
    rows = means.transpose(0, 1).contiguous()
    sends = [rows if rank >= shards.rank else rows[:0] for rank in range(len(shards.lengths))]
    counts = [length // block_size if rank <= shards.rank else 0 for rank, length in enumerate(shards.lengths)]
    return send_and_receive(sends, counts, shards.group).transpose(0, 1)
