"""The largest scores of each row, ties to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def top_blocks(scores: Tensor, count: int, *, may_wait: bool = True) -> Tensor:
    """The `count` largest scores of each row, ties to the lower index; -inf entries come last.

    torch.topk promises no order among equal scores, so rows whose last place is contested are sorted stably.

    Args:
        scores: [..., N], no NaN. count: 1 … N.
        may_wait: False sorts every row, so that the host does not wait to learn whether a row is contested.

    Returns:
        int64 [..., count] in no particular order.
    """
    num_blocks = scores.shape[-1]
    if not may_wait:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    values, indices = _largest(scores, min(count + 1, num_blocks))
    indices = indices[..., :count]
    if count == num_blocks:
        return indices
    contested = (values[..., count - 1] == values[..., count]) & (values[..., count] > -torch.inf)
    if contested.any():
        ranked = scores[contested].sort(dim=-1, descending=True, stable=True).indices
        indices[contested] = ranked[..., :count]
    return indices


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """torch.topk, in two steps where its one takes twice as long: on a CPU, in rows of fewer than 64 · count scores.

    The largest scores lie in those columns of four whose own largest score is among the largest.
    """
    num_scores, width = scores.shape[-1], scores.shape[-1] // 4
    if scores.device.type != "cpu" or not 3 * count <= width or num_scores >= 64 * count:
        return scores.topk(count, dim=-1)
    columns = scores[..., : 4 * width].unflatten(-1, (4, width)).amax(dim=-2).topk(count, dim=-1, sorted=False).indices
    places = (columns.unsqueeze(-2) + width * torch.arange(4)[:, None]).flatten(-2)
    rest = torch.arange(4 * width, num_scores).expand(*places.shape[:-1], -1)
    places = torch.cat([places, rest], dim=-1)
    values, chosen = scores.gather(-1, places).topk(count, dim=-1)
    return values, places.gather(-1, chosen)
