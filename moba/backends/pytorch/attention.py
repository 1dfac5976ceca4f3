"""Attention over a routing in plain torch: for each block, gather the queries that chose it; attend; merge.

A pass takes the query heads of one kv head over a range of queries. Its past blocks become tiles: up to M of the rows
(query, head) that chose one block, beside that block's keys. Every row's results land in parts, which `merge_partials`
merges: K - 1 for the past blocks, one for the own block up to the query, and where the pass begins inside a block, one
for that block's keys before the pass. Read `_forward_pass` and `_backward_pass` first; `_passes` and `Turn` share the
work among threads.

Letters: T query tokens, H query heads, G key/value heads, D head dim, Dv that of values, N blocks, K = topk, M rows of
a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moba.backends.pytorch import dense
from moba.merge import merge_partials
from moba.numerics import accumulation_dtype, all_finite, positive_scale
from moba.routing import by_block, for_query_heads, outside_graphs
from moba.sequences import Sequences, Span
from moba.threads import Turn, for_each

# Working memory of a pass: its parts, and the gathered tiles of one step. On a CPU each thread has its own.
PASS_BYTES = 24 << 20
STEP_BYTES = 16 << 20
CPU_PASS_BYTES = 12 << 20
CPU_STEP_BYTES = 4 << 20


@outside_graphs
def attend(
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
    """Attention over the routing's blocks. See `moba.backends` for the contract."""
    q, scale = positive_scale(q, scale)
    indices = for_query_heads(indices, q.shape[2])
    return _Attend.apply(q, k, v, indices, sequences, _Options(block_size, dense.Logits(scale, softcap), own_block))


class _Options(NamedTuple):
    """What `attend` is told beside tensors."""

    block_size: int
    logits: dense.Logits
    own_block: bool


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sequences: Sequences, options: _Options
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
        for is_careful in (False, True):

            def run(part: _Pass, is_careful: bool = is_careful) -> None:
                out[part.where], lse[part.where] = _forward_pass(part, is_careful)

            for_each(run, list(_passes(q, k, v, indices, sequences, options)), q.device)
            # What is not finite may have come through a mask: see `dense`.
            if all_finite(out):
                break
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.sequences, ctx.options = sequences, options
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = grads
        q, k, v, indices, out, lse = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        d_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        wide = accumulation_dtype(q.dtype)
        for is_careful in (False, True):
            d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))

            def run(part: _Pass, d_k: Tensor = d_k, d_v: Tensor = d_v, is_careful: bool = is_careful) -> None:
                at = part.where
                results = _Results(out[at], lse[at], d_out[at], None if d_lse is None else d_lse[at])
                try:
                    d_q[at] = _backward_pass(part, results, d_k[part.keys], d_v[part.keys], is_careful)
                finally:
                    part.turn.end()

            passes = _passes(q, k, v, indices, ctx.sequences, ctx.options, d_lse)
            for_each(run, list(passes), q.device)
            if all_finite(d_q, d_k, d_v):
                break
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


class _Pass(NamedTuple):
    """The query heads of one kv head over a range of one sequence's queries."""

    q: Tensor  # [T, H/G, D]
    k: Tensor  # [S, D], the sequence's keys
    v: Tensor  # [S, Dv]
    indices: Tensor  # int32 [T, H/G, K]
    offset: int  # position of the first query
    options: _Options
    where: tuple[int, slice, slice]  # of the pass's rows in q
    keys: tuple[int, slice, int]  # of the sequence's keys in k
    turn: Turn  # among the passes of the same keys

    @property
    def block_size(self) -> int:
        return self.options.block_size

    @property
    def num_past(self) -> int:
        """Places for past blocks: K - 1."""
        return self.indices.shape[-1] - 1

    @property
    def num_rows(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def num_parts(self) -> int:
        return self.num_past + (1 if self.offset % self.block_size == 0 else 2)

    def new_parts(self, *size: int, fill: float | None = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Room for every row's results in each part, then one row to drop results into: [parts * rows + 1, ...]."""
        parts = self.q.new_empty((self.num_parts * self.num_rows + 1, *size), dtype=dtype)
        return parts if fill is None else parts.fill_(fill)

    def by_part(self, parts: Tensor) -> Tensor:
        """The same as [parts, T, H/G, ...]."""
        return parts[:-1].unflatten(0, (self.num_parts, *self.q.shape[:2]))

    def reads_own(self) -> Tensor | None:
        """Which rows read their own block: bool [T, H/G], None for all."""
        if self.options.own_block:
            return None
        positions = torch.arange(self.offset, self.offset + self.q.shape[0], device=self.q.device)
        own = torch.div(positions, self.block_size, rounding_mode="floor")
        return (self.indices == own[:, None, None]).any(dim=-1)

    def finished_blocks(self, x: Tensor) -> Tensor:
        """[S, D] -> [N, block_size, D], a view."""
        count = x.shape[0] // self.block_size
        return x[: count * self.block_size].unflatten(0, (count, self.block_size))


class _Results(NamedTuple):
    """Forward results of a pass's rows and their gradients, [T, H/G, Dv] and [T, H/G]."""

    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None


def _passes(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sequences: Sequences, options: _Options,
    d_lse: Tensor | None = None,
) -> Iterator[_Pass]:  # fmt: skip
    group, block_size = q.shape[2] // k.shape[2], options.block_size
    # A sequence's first queries read everything before them: then as one block, which has no tiles to gather and merge.
    may_be_dense = options.own_block and not dense.holds_scores(q, options.logits, d_lse)
    for span in sequences.spans():
        most_blocks = (span.k_len - 1) // block_size + 1
        topk = min(indices.shape[3], most_blocks)
        bytes_per_query = group * topk * max(q.shape[3], v.shape[3]) * q.element_size()
        if q.device.type == "cpu":  # at least two ranges of a long sequence, for threads to share
            num_queries = min(CPU_PASS_BYTES // bytes_per_query, max(1024, span.q_len // 2))
        else:
            num_queries = PASS_BYTES // bytes_per_query
        num_ranges = -(-span.q_len // max(block_size, 64, num_queries))
        num_queries = -(-span.q_len // (num_ranges * block_size)) * block_size
        keys = slice(span.k_start, span.k_start + span.k_len)
        turns: list[Turn | None] = [None] * k.shape[2]
        first = topk * block_size - span.offset
        for start, stop in _ranges(span, num_queries, block_size, first if may_be_dense else num_queries):
            for kv_head in range(k.shape[2]):
                turns[kv_head] = turn = Turn(turns[kv_head])
                heads = slice(kv_head * group, (kv_head + 1) * group)
                where = (span.row, slice(span.q_start + start, span.q_start + stop), heads)
                at = (span.row, keys, kv_head)
                chosen = indices[where][..., :topk]  # as past blocks come first, this leaves the own block its place
                made = options
                if start == 0 and may_be_dense and _reads_all(chosen[..., :-1], span.offset, block_size):
                    made, chosen = options._replace(block_size=span.offset + stop), chosen[..., -1:]
                yield _Pass(q[where], k[at], v[at], chosen, span.offset + start, made, where, at, turn)


def _ranges(span: Span, num_queries: int, block_size: int, first: int) -> Iterator[tuple[int, int]]:
    """Ranges of a sequence's queries, about `num_queries` each, that end where a block ends; of the first, `first` if
    it is positive and less.
    """
    start, most = 0, min(first, num_queries) if first > 0 else num_queries
    while start < span.q_len:
        stop = (span.offset + start + most) // block_size * block_size - span.offset
        stop = min(stop, span.q_len)
        yield start, stop
        start, most = stop, num_queries


def _reads_all(past: Tensor, offset: int, block_size: int) -> bool:
    """Whether each of the queries from position `offset` on chose all blocks before its own; past [T, H/G, K - 1]."""
    positions = torch.arange(offset, offset + past.shape[0], device=past.device)
    own = torch.div(positions, block_size, rounding_mode="floor")[:, None]
    return bool((((past >= 0) & (past < own[..., None])).sum(dim=-1) == own).all())


class _Step(NamedTuple):
    """Some tiles of a pass."""

    blocks: Tensor  # int64 [C], the block of each tile
    rank: Tensor  # int64 [C], the place of each tile among its block's
    rows: Tensor  # int64 [C * M], row t * H/G + h of each place
    parts: Tensor  # int64 [C * M], where its result goes
    real: Tensor  # bool [C, M], False where a tile is filled up by repeating a row

    def gather(self, rows: Tensor) -> Tensor:
        """The tiles' rows [*, ...]: [C, 1, M, ...]."""
        return rows.index_select(0, self.rows).unflatten(0, self.real.shape)[:, None]

    def gather_blocks(self, blocks: Tensor) -> Tensor:
        """The tiles' blocks [N, block_size, D]: [C, 1, block_size, D]."""
        return blocks.index_select(0, self.blocks)[:, None]

    def add_to_blocks(self, blocks: Tensor, tiles: Tensor) -> None:
        """blocks[self.blocks] += tiles [C, 1, ...], one tile of each block at a time, in a fixed order."""
        for rank in range(int(self.rank.min()), int(self.rank.max()) + 1):
            now = self.rank == rank
            at = self.blocks[now]
            blocks[at] = blocks[at] + tiles[now, 0]


def _steps(part: _Pass, d_lse: Tensor | None = None) -> Iterator[_Step]:
    positions = torch.arange(part.offset, part.offset + part.q.shape[0], device=part.q.device)
    own = torch.div(positions, part.block_size, rounding_mode="floor")
    num_blocks = (part.offset + part.q.shape[0] - 1) // part.block_size
    entries, counts = by_block(part.indices[..., :-1], own, num_blocks)
    if entries.numel() == 0:
        return
    # Tiles long enough for the matrix units, short enough that filling up the last of a block costs little.
    mean_count = entries.numel() // int((counts > 0).sum())
    size = min(512, max(16, 1 << (mean_count // 4).bit_length()))
    tiles = torch.div(counts + size - 1, size, rounding_mode="floor")
    block = torch.arange(num_blocks, device=counts.device).repeat_interleave(tiles)
    rank = torch.arange(block.numel(), device=counts.device) - (tiles.cumsum(0) - tiles)[block]
    last = counts.cumsum(0)[block]
    place = (last - counts[block] + rank * size)[:, None] + torch.arange(size, device=counts.device)
    real = place < last[:, None]
    # Only with rows that chose the block: another row's logits may be far above its own log-sum-exp.
    place = torch.minimum(place, last[:, None] - 1)

    tile_bytes = (size + part.block_size) * (part.q.shape[2] + part.v.shape[1]) * part.q.element_size()
    if dense.holds_scores(part.q, part.options.logits, d_lse):
        tile_bytes += 16 * size * part.block_size
    step = max(1, (CPU_STEP_BYTES if part.q.device.type == "cpu" else STEP_BYTES) // tile_bytes)
    for start in range(0, block.numel(), step):
        some = slice(start, start + step)
        entry = entries[place[some].flatten()]
        row = torch.div(entry, part.num_past, rounding_mode="floor")
        target = torch.where(
            real[some].flatten(), entry % part.num_past * part.num_rows + row, part.num_parts * part.num_rows
        )
        yield _Step(block[some], rank[some], row, target, real[some])


class _Own(NamedTuple):
    """Own-block work of one shape: n problems, M query rows each; their keys are the same positions or those before."""

    first: int  # query row of the first problem
    start: int  # key position of the first problem
    num_problems: int
    num_queries: int
    num_keys: int
    is_causal: bool
    part: int

    def take(self, x: Tensor) -> Tensor:
        """[T, H/G, ...] -> [n, H/G, M, ...], a view."""
        rows = x[self.first : self.first + self.num_problems * self.num_queries]
        return rows.unflatten(0, (self.num_problems, self.num_queries)).transpose(1, 2)

    def keys(self, x: Tensor, num_heads: int) -> Tensor:
        """[S, D] -> [n, H/G, L, D], a view."""
        rows = x[self.start : self.start + self.num_problems * self.num_keys]
        return rows.unflatten(0, (self.num_problems, self.num_keys))[:, None].expand(-1, num_heads, -1, -1)

    def add_to_keys(self, x: Tensor, values: Tensor) -> None:
        """x [S, D] += the sum over heads of values [n, H/G, L, D]."""
        x[self.start : self.start + self.num_problems * self.num_keys] += values.sum(dim=1, dtype=x.dtype).flatten(0, 1)


def _own_blocks(part: _Pass, d_lse: Tensor | None = None) -> Iterator[_Own]:
    size, start, stop = part.block_size, part.offset, part.offset + part.q.shape[0]
    diagonal = part.num_past
    if before := start % size:
        rows = min(stop, start - before + size) - start
        yield _Own(0, start - before, 1, rows, before, False, diagonal + 1)
        yield _Own(0, start, 1, rows, rows, True, diagonal)
        start += rows
    at_once = part.q.shape[0]
    if dense.holds_scores(part.q, part.options.logits, d_lse):
        at_once = max(1, STEP_BYTES // (16 * part.q.shape[1] * size**2))
    while (count := min(at_once, (stop - start) // size)) > 0:
        yield _Own(start - part.offset, start, count, size, size, True, diagonal)
        start += count * size
    if stop > start:
        yield _Own(start - part.offset, start, 1, stop - start, stop - start, True, diagonal)


def _forward_pass(part: _Pass, is_careful: bool) -> tuple[Tensor, Tensor]:
    """out [T, H/G, Dv] and lse [T, H/G] of a pass."""
    logits, reads_own = part.options.logits, part.reads_own()
    outs = part.new_parts(part.v.shape[1], fill=None)
    lses = part.new_parts(fill=-torch.inf, dtype=accumulation_dtype(part.q.dtype))
    q_rows = part.q.flatten(0, 1)
    k_blocks, v_blocks = part.finished_blocks(part.k), part.finished_blocks(part.v)
    for step in _steps(part):
        k, v = step.gather_blocks(k_blocks), step.gather_blocks(v_blocks)
        out, lse = dense.forward(step.gather(q_rows), k, v, logits, is_causal=False)
        outs[step.parts] = out.flatten(0, 2)
        lses[step.parts] = lse.flatten()
    outs, lses = part.by_part(outs), part.by_part(lses)
    for own in _own_blocks(part):
        q = own.take(part.q)
        k, v = own.keys(part.k, q.shape[1]), own.keys(part.v, q.shape[1])
        out, lse = dense.forward(q, k, v, logits, own.is_causal, is_careful)
        if reads_own is not None:
            lse = lse.masked_fill(~own.take(reads_own), -torch.inf)
        own.take(outs[own.part]).copy_(out)
        own.take(lses[own.part]).copy_(lse)
    return merge_partials(outs, lses)


def _backward_pass(part: _Pass, results: _Results, d_k: Tensor, d_v: Tensor, is_careful: bool) -> Tensor:
    """d_q [T, H/G, D] of a pass; adds to d_k [S, D] and d_v [S, Dv] of its kv head, in a fixed order."""
    logits, reads_own = part.options.logits, part.reads_own()
    d_qs = part.new_parts(part.q.shape[2])
    q_rows, out_rows, lse_rows, d_out_rows = (x.flatten(0, 1) for x in (part.q, *results[:3]))
    d_lse_rows = None if results.d_lse is None else results.d_lse.flatten(0, 1)
    k_blocks, v_blocks, d_k_blocks, d_v_blocks = (part.finished_blocks(x) for x in (part.k, part.v, d_k, d_v))
    # First: a later pass waits only until the past blocks are done.
    for own in _own_blocks(part, results.d_lse):
        q, out, lse, d_out = (own.take(x) for x in (part.q, *results[:3]))
        d_lse = None if results.d_lse is None else own.take(results.d_lse)
        k, v = own.keys(part.k, q.shape[1]), own.keys(part.v, q.shape[1])
        if reads_own is not None:
            # What weighs nothing, and passes nothing on.
            is_left_out = ~own.take(reads_own)
            d_out, lse = d_out.masked_fill(is_left_out[..., None], 0.0), lse.masked_fill(is_left_out, torch.inf)
            d_lse = None if d_lse is None else d_lse.masked_fill(is_left_out, 0.0)
        d_q, d_k_own, d_v_own = dense.backward(d_out, d_lse, q, k, v, out, lse, logits, own.is_causal, is_careful)
        own.take(part.by_part(d_qs)[own.part]).copy_(d_q)
        own.add_to_keys(d_k, d_k_own)
        own.add_to_keys(d_v, d_v_own)
    for step in _steps(part, results.d_lse):
        real = step.real[:, None]
        d_out = step.gather(d_out_rows) * real[..., None]
        d_lse = None if d_lse_rows is None else step.gather(d_lse_rows) * real
        d_q, d_k_tiles, d_v_tiles = dense.backward(
            d_out, d_lse, step.gather(q_rows), step.gather_blocks(k_blocks), step.gather_blocks(v_blocks),
            step.gather(out_rows), step.gather(lse_rows), logits, is_causal=False, is_careful=is_careful,
        )  # fmt: skip
        d_qs[step.parts] = d_q.flatten(0, 2)
        last = int(step.blocks[-1])
        part.turn.wait(last + 1)
        step.add_to_blocks(d_k_blocks, d_k_tiles)
        step.add_to_blocks(d_v_blocks, d_v_tiles)
        part.turn.done(last)  # the next step may have more tiles of the last block
    return part.by_part(d_qs).sum(dim=0, dtype=d_k.dtype).to(part.q.dtype)
