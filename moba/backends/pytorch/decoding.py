"""Decoding with block means in plain torch: score the means, gather the selected keys, attend.

Every query head picks its own blocks, and the heads of a group share few, so each reads for itself. A query's keys are
copied into a small workspace for the product with it; on a CPU its values are summed where they lie.

Letters: R tensor rows, T query tokens, H query heads, G key/value heads, D head dim, Dv that of values, N blocks,
K = topk, M = R · T · H query rows, C slices of W consecutive keys that each of them reads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moba import routers, routing
from moba.numerics import accumulation_dtype, full_fp32_matmul
from moba.routing import Selection, outside_graphs
from moba.sequences import Sequences

# Bytes of keys, or of means, that are copied at a time.
WORKSPACE_BYTES = 16 << 20


@outside_graphs
def append_means(means: Tensor, k: Tensor, sequences: Sequences, block_size: int) -> None:
    """Means of the newly finished blocks. See `moba.backends` for the contract."""
    num_new, num_keys = sequences.num_queries, sequences.num_keys
    if sequences.is_plain:
        first, stop = (num_keys - num_new) // block_size, num_keys // block_size
        if first < stop:
            means[:, first:stop] = routing.mean_keys(k[:, first * block_size : stop * block_size], block_size)
        return
    position = sequences.positions(k.device)[:, -1:].long()  # of each row's last key, [R, 1]
    # As many blocks as the new keys of a row can finish.
    num_blocks = min((num_new - 1) // block_size + 1, num_keys // block_size)
    if not (num_blocks and sequences.num_rows):
        return
    first_block = torch.div(position + 1, block_size, rounding_mode="floor") - num_blocks
    block = first_block.clamp(min=0) + torch.arange(num_blocks, device=k.device)
    end = (block + 1) * block_size
    is_new = (end <= position + 1) & (end > position + 1 - num_new)
    if k.device.type == "cpu" and not is_new.any():
        return
    # Entries with nothing to write repeat the first one that has: equal values, so the order of writes is no matter.
    entry = torch.arange(is_new.numel(), device=k.device)
    entry = torch.where(is_new.flatten(), entry, is_new.flatten().int().argmax())
    row, block = torch.div(entry, num_blocks, rounding_mode="floor"), block.flatten()[entry]
    first_key = block * block_size
    token = first_key[:, None] + torch.arange(block_size, device=k.device)
    keys = k[_places(sequences, row[:, None], token)]
    place = (row, block)
    if sequences.page_table is not None:
        page, key = _places(sequences, row, first_key)
        place = page, torch.div(key, block_size, rounding_mode="floor")
    new = routing.mean_keys(keys, block_size)[:, 0]
    means[place] = torch.where(is_new.any(), new, means[place])


@outside_graphs
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    sequences: Sequences,
    selection: Selection,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by the means and attend to the selected keys. See `moba.backends` for the contract."""
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
        out = q.new_empty(*q.shape[:3], v.shape[3])
        return out, lse, q.new_empty(*q.shape[:3], selection.topk, dtype=torch.int32)
    positions = sequences.positions(q.device).long()
    chosen = _route(q, means, positions, sequences, selection)
    out, lse = attend_step(q, k, v, chosen, sequences, block_size=selection.block_size, scale=scale, softcap=softcap)
    indices = F.pad(chosen, (0, selection.topk - chosen.shape[-1]), value=-1)
    return out, lse, indices


def _route(q: Tensor, means: Tensor, positions: Tensor, sequences: Sequences, selection: Selection) -> Tensor:
    """The routing of every query by the given means: int32 [R, T, H, at most K]."""
    num_rows, num_queries, num_heads, _ = q.shape
    if selection.score is None:
        return routing.kept_indices(positions, selection)[:, :, None].expand(-1, -1, num_heads, -1)
    if selection.score is routers.mean_key_scores:
        scores = _mean_scores(q, means, sequences, selection.block_size)
    else:
        scores = _function_scores(q, means, sequences, selection)
    own = torch.div(positions, selection.block_size, rounding_mode="floor").clamp_(min=-1)
    may_wait = q.device.type == "cpu"
    chosen = routing.select_blocks(scores.flatten(0, 1), own.flatten(), selection, may_wait=may_wait)
    return chosen.view(num_rows, num_queries, num_heads, chosen.shape[-1])


def _mean_scores(q: Tensor, means: Tensor, sequences: Sequences, block_size: int) -> Tensor:
    """Every head's scores of the blocks that can be past ones: [R, T, H, N], of unfinished blocks anything."""
    num_rows, num_queries, _, head_dim = q.shape
    num_blocks, num_kv_heads = max(sequences.num_keys - 1, 0) // block_size, means.shape[2]
    wide = accumulation_dtype(q.dtype)
    rows = q.to(wide).unflatten(2, (num_kv_heads, -1)).transpose(1, 2).reshape(num_rows, num_kv_heads, -1, head_dim)
    is_direct = sequences.page_table is None and means.dtype == wide
    mean_bytes = max(1, num_rows * num_kv_heads * head_dim * rows.element_size())
    at_once = max(num_blocks, 1) if is_direct else max(1, WORKSPACE_BYTES // mean_bytes)
    parts = []
    with full_fp32_matmul():
        for start in range(0, max(num_blocks, 1), at_once):
            some = _some_means(means, sequences, start, min(start + at_once, num_blocks), block_size)
            parts.append(rows @ some.to(wide).permute(0, 2, 3, 1))
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # [R, G, T * H/G, N]
    scores = scores.unflatten(2, (num_queries, -1)).transpose(1, 2).flatten(2, 3)
    first = routing.first_of_equals(means, lambda x: _some_means(x, sequences, 0, num_blocks, block_size))
    return scores if first is None else routing.equal_scores(scores, first)


def _some_means(means: Tensor, sequences: Sequences, start: int, stop: int, block_size: int) -> Tensor:
    """Means of blocks start … stop - 1 of each row, [R, stop - start, G, D]; a copy where they lie in pages."""
    if sequences.page_table is None:
        return means[:, start:stop]
    first_key = torch.arange(start, stop, device=means.device) * block_size
    row = torch.arange(sequences.num_rows, device=means.device)[:, None]
    page, key = _places(sequences, row, first_key)
    return means[page, torch.div(key, block_size, rounding_mode="floor")]


def _function_scores(q: Tensor, means: Tensor, sequences: Sequences, selection: Selection) -> Tensor:
    """A user's function sees the means of one sequence's finished blocks, so lengths are read on the host here."""
    block_size = selection.block_size
    scores = q.new_zeros(*q.shape[:3], max(sequences.num_keys - 1, 0) // block_size, dtype=torch.float64)
    places = None if sequences.page_table is None else sequences.mean_places(block_size)
    for span in sequences.spans():
        num_candidates = (span.k_len - 1) // block_size
        place = (span.row,) if places is None else tuple(part[span.row, :num_candidates] for part in places)
        finished = means[place][:num_candidates]
        rows = slice(q.shape[1] - span.q_len, q.shape[1])
        of_span = selection.scores(q[span.row, rows], finished, selection.first_of_equals(finished))
        scores[span.row, rows, :, :num_candidates] = of_span.double()
    return scores


def _places(sequences: Sequences, row: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Index into the first two dimensions of k of position `token` of row `row`: somewhere valid if it has no key."""
    if sequences.page_table is None:
        key = token if sequences.key_start is None else token + sequences.key_start[row]
        return row.expand(key.shape), key.clamp(max=sequences.num_keys - 1)
    assert sequences.key_end is not None
    page_size = sequences.page_size
    is_key = token < sequences.key_end[row]
    page = sequences.page_table[row, torch.div(torch.where(is_key, token, 0), page_size, rounding_mode="floor")]
    return torch.where(is_key, page, 0).long(), token % page_size


class _Rows(NamedTuple):
    """Keys or values as a table of rows: row i is the D numbers that begin i · unit elements in."""

    table: Tensor  # [rows, D], a view whose rows may overlap
    steps: tuple[int, int, int]  # rows from one index of the first dimension, token, kv head to the next

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        """The rows of x [R, S, G, D], or of pages."""
        sizes = x.shape[:3]
        strides = [stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], sizes, strict=True)]
        unit = math.gcd(x.shape[3], *strides)
        first, token, head = (stride // unit for stride in strides)
        count = 1 + first * (sizes[0] - 1) + token * (sizes[1] - 1) + head * (sizes[2] - 1)
        return cls(x.as_strided((count, x.shape[3]), (unit, 1)), (first, token, head))


class _Slices(NamedTuple):
    """What every query row reads: C slices of W consecutive keys, hidden from `stop` on."""

    first: Tensor  # int64 [M, C], index into the first dimension of k
    token: Tensor  # int64 [M, C], of a slice's first key, into the second
    head: Tensor  # int64 [M, 1], the kv head
    stop: Tensor  # int64 [M, C], how many of the keys the query sees; may be negative or beyond W

    def of(self, some: slice) -> _Slices:
        """The slices of some query rows."""
        return _Slices(*(part[some] for part in self))

    def rows(self, steps: tuple[int, int, int], hidden: Tensor) -> Tensor:
        """Rows of a table, int64 [M, C * W]; those of hidden keys are the first that the query sees instead, as a
        hidden key or value may be NaN.
        """
        slices = self.first * steps[0] + self.token * steps[1] + self.head * steps[2]
        inside = torch.arange(hidden.shape[2], device=hidden.device) * steps[1]
        return torch.where(hidden, slices[:, :1, None], slices[..., None] + inside).flatten(1)


def _slices(chosen: Tensor, positions: Tensor, sequences: Sequences, k: Tensor, block_size: int, width: int) -> _Slices:
    """The slices of the chosen blocks [R, T, H, K]; width divides block_size."""
    num_rows, num_queries, num_heads, _ = chosen.shape
    begin = chosen.clamp(min=0).long() * block_size
    stop = (positions[..., None, None] - begin + 1).masked_fill_(chosen < 0, 0)
    if width < block_size:
        into_block = torch.arange(0, block_size, width, device=k.device)
        begin, stop = (begin[..., None] + into_block).flatten(-2), (stop[..., None] - into_block).flatten(-2)
    row = torch.arange(num_rows, device=k.device)[:, None, None, None]
    first, token = _places(sequences, row, begin)
    head = torch.arange(num_heads, device=k.device) // (num_heads // k.shape[2])
    head = head.expand(num_rows, num_queries, -1).reshape(-1, 1)
    return _Slices(first.flatten(0, 2), token.flatten(0, 2), head, stop.flatten(0, 2))


@outside_graphs
def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sequences: Sequences,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    own_block: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of every query head over its own blocks. See `moba.backends` for the contract."""
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
        return q.new_empty(*q.shape[:3], v.shape[3]), lse
    positions = sequences.positions(q.device).long()
    width = block_size if sequences.page_table is None else min(block_size, sequences.page_size)
    slices = _slices(indices, positions, sequences, k, block_size, width)
    keys, values = _Rows.of(k), _Rows.of(v)
    q_rows = q.reshape(-1, q.shape[3])
    row_bytes = slices.token.shape[1] * width * max(8, max(q.shape[3], v.shape[3]) * q.element_size())
    at_once = max(1, WORKSPACE_BYTES // row_bytes)
    parts = [
        _attend_rows(
            q_rows[start : start + at_once],
            keys,
            values,
            slices.of(slice(start, start + at_once)),
            width,
            scale,
            softcap,
        )
        for start in range(0, q_rows.shape[0], at_once)
    ]
    out, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    if not sequences.is_plain or not own_block:
        sees_none = (indices < 0).all(dim=-1).flatten()
        out.masked_fill_(sees_none[:, None], 0.0)
        lse.masked_fill_(sees_none, -torch.inf)
    return out.view(*q.shape[:3], v.shape[3]), lse.view(q.shape[:3])


def _attend_rows(
    q: Tensor, keys: _Rows, values: _Rows, slices: _Slices, width: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [M, Dv] and lse [M] of query rows [M, D]; NaN where a row sees no key."""
    hidden = torch.arange(width, device=q.device) >= slices.stop[..., None]  # [M, C, W]
    key_rows = slices.rows(keys.steps, hidden)
    value_rows = key_rows if values.steps == keys.steps else slices.rows(values.steps, hidden)
    logits = _products(q, keys.table, key_rows)
    logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    logits.masked_fill_(hidden.flatten(1), -torch.inf)
    largest = logits.amax(dim=-1)
    weights = logits.sub_(largest[:, None]).exp_()
    total = weights.sum(dim=-1)
    out = _weighted_sum(weights, values.table, value_rows) / total[:, None]
    return out.to(q.dtype), largest + total.log()


def _products(q: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The product of each query [M, D] with its rows [M, L] of a table [rows, D]: [M, L], fp32 (fp64 for fp64)."""
    wide = accumulation_dtype(q.dtype)
    if table.device.type == "cpu" and table.dtype == wide and table.is_contiguous():
        # What differentiates a weighted sum of rows by its weights is just this product, and copies no row.
        num_queries, count = rows.shape
        first = torch.arange(0, rows.numel(), count)
        query = torch.arange(num_queries).repeat_interleave(count)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            q.contiguous(), table, rows.flatten(), first, query, 0
        ).view(num_queries, count)
    k = table.index_select(0, rows.flatten()).view(*rows.shape, -1)
    with full_fp32_matmul():
        # A row times a matrix: a matrix times a column takes eight times as long on a CPU.
        return torch.bmm(q.to(wide)[:, None], k.to(wide).mT)[:, 0]


def _weighted_sum(weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The sum, by weights [M, L] of at most 1, of rows [M, L] of a table [rows, D]: [M, D]."""
    if table.device.type == "cpu" and table.is_contiguous():
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.to(table.dtype))
    v = table.index_select(0, rows.flatten()).view(*rows.shape, -1)
    with full_fp32_matmul():
        return torch.bmm(weights[:, None], v.to(weights.dtype))[:, 0]
