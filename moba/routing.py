"""Routing: which blocks each query attends to. The rules that score blocks are in routers.py.

Letters: R tensor rows, T query tokens, S key tokens, H query heads, G key/value heads, D head dim, N blocks, K = topk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.config import Router
from moba.numerics import accumulation_dtype
from moba.routers import ScoreFunction, TopP, max_token_scores, ranks_by_means, score_function
from moba.sequences import Sequences, Span
from moba.threads import for_each
from moba.top_blocks import top_blocks
from moba.validate import describe, is_readable

P = ParamSpec("P")
T = TypeVar("T")

# Elements in a chunk: few enough that scores, or keys while they are summed, stay in a core's cache.
_CHUNK_SIZE = 1 << 20


@dataclass(frozen=True)
class Selection:
    """The rule that selects blocks: everything about routing that is not a tensor.

    A query gets `topk` blocks: its own block, the sequence's first `keep_first` blocks, the nearest `keep_recent` past
    blocks, and the candidates that `score` ranks highest. `score` is None if kept blocks fill every place.
    """

    block_size: int
    topk: int
    keep_first: int
    keep_recent: int
    score: ScoreFunction | None

    @classmethod
    def of(cls, block_size: int, topk: int, keep_first: int, keep_recent: int, router: Router) -> Selection:
        """The rule for a named router or a user's function; "recent" and "sink" select kept blocks only."""
        if router == "recent":
            keep_recent = topk - 1 - keep_first
        elif router == "sink":
            keep_first = max(keep_first, min(1, topk - 1 - keep_recent))
            keep_recent = topk - 1 - keep_first
        num_scored_slots = topk - 1 - keep_first - keep_recent
        score = None if num_scored_slots == 0 else score_function(router)
        return cls(block_size, topk, keep_first, keep_recent, score)

    @property
    def top_p(self) -> float | None:
        """The share of the mass that is enough, if the rule has a budget; else None."""
        return self.score.p if isinstance(self.score, TopP) else None

    def first_of_equals(self, means: Tensor) -> Tensor | None:
        """`first_of_equals` of means, for `scores`; None if the rule may score blocks of equal means differently."""
        return first_of_equals(means) if ranks_by_means(self.score) else None

    def scores(self, q: Tensor, means: Tensor, first: Tensor | None = None) -> Tensor:
        """`score` of query rows [rows, H, D] against what `span_blocks` gives: floating [rows, H, N].

        Args:
            first: `first_of_equals` of these means and perhaps more.

        Raises:
            ValueError: if a user's function returns anything else.
        """
        assert self.score is not None
        scores = self.score(q, means)
        expected = (*q.shape[:2], means.shape[0])
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected or not scores.is_floating_point():
            raise ValueError(f"router must return floating scores [rows, H, N] = {expected}, got {describe(scores)}")
        return scores if first is None else equal_scores(scores, first[: means.shape[0]])


@dataclass(frozen=True)
class Routing:
    """The blocks every query attends to.

    Attributes:
        indices: int32 [B, T, H, K], or [total, H, K] of packed sequences. Ascending block numbers within the query's
            own sequence, the own block last (with `own_block=False` if it was listed), then -1 where fewer than K
            blocks exist or a budget (`moba.routers.TopP`) takes fewer. A padded query row has -1 everywhere.
        block_size: tokens in a block.
    """

    indices: Tensor
    block_size: int

    @property
    def topk(self) -> int:
        """Places a query has for blocks, its own included."""
        return self.indices.shape[-1]

    def own_block(self) -> Tensor:
        """Each query's own block, its last one, -1 for padded rows: int32 [B, T, H] or [total, H]."""
        return self.indices.amax(dim=-1)

    def num_selected(self) -> Tensor:
        """How many blocks each query attends to: int64 [B, T, H] or [total, H]."""
        return (self.indices >= 0).sum(dim=-1)

    def block_mask(self, num_blocks: int | None = None) -> Tensor:
        """Whether each query attends to each of the blocks 0 … num_blocks - 1, by default all.

        Returns:
            bool [B, T, H, N] or [total, H, N].
        """
        count = int(self.indices.max().item()) + 1 if num_blocks is None and self.indices.numel() else num_blocks or 0
        mask = torch.zeros(*self.indices.shape[:-1], count + 1, dtype=torch.bool, device=self.indices.device)
        place = torch.where((self.indices >= 0) & (self.indices < count), self.indices.long(), count)
        return mask.scatter_(-1, place, True)[..., :count]


def by_block(past: Tensor, own: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The by-block view of past blocks: for each block, the places of the routing that chose it.

    Args:
        past: int32 [T, H, P], the past-block places of a sequence's routing; entries outside 0 … own - 1 are ignored.
        own: int64 [T], each query's own block.
        num_blocks: N, at least the largest own block.

    Returns:
        entries int64 [E], flat places of `past`, by block, ascending within each; counts int64 [N].
    """
    entries = ((past >= 0) & (past < own[:, None, None])).flatten().nonzero()[:, 0]
    blocks, order = torch.sort(past.flatten()[entries], stable=True)
    return entries[order], torch.bincount(blocks, minlength=num_blocks)


def given_indices(indices: Tensor, own: Tensor, *, own_block: bool = True) -> Tensor:
    """A selection made by somebody else as a backend makes it: ascending, each block once, the own block last.

    Args:
        indices: int32 or int64 [R, T, H or G, K] in any order; entries outside 0 … own block count for nothing.
        own: int [R, T], each query's own block, negative for padded rows.
        own_block: whether every query reads its own block; otherwise where it is listed.

    Returns:
        int32 [R, T, H or G, K + 1], -1 behind the last block: the last place is never a past block's. Where the values
        can be read, K places if these are enough.
    """
    own = own[..., None, None].expand(*indices.shape[:3], 1).to(indices.dtype)
    none = torch.iinfo(torch.int32).max
    blocks = torch.cat([indices, own if own_block else torch.full_like(own, -1)], dim=-1)
    blocks = blocks.masked_fill((blocks < 0) | (blocks > own), none).to(torch.int32).sort(dim=-1).values
    is_again = F.pad(blocks.diff(dim=-1) == 0, (1, 0))
    blocks = blocks.masked_fill(is_again, none).sort(dim=-1).values
    blocks = blocks.masked_fill(blocks == none, -1)
    if is_readable(blocks):
        last, before = blocks[..., -1:], blocks[..., -2:-1]
        if not bool(((last >= 0) | ((before >= 0) & (before < own))).any()):
            blocks = blocks[..., :-1]
    return blocks


def for_query_heads(indices: Tensor, num_heads: int) -> Tensor:
    """A routing [..., H or G, K] for every query head, [..., H, K]: one of a key/value head serves its query heads."""
    group = num_heads // indices.shape[-2]
    return indices if group == 1 else indices.repeat_interleave(group, dim=-2)


def mean_keys(k: Tensor, block_size: int) -> Tensor:
    """Mean key of every finished block of one sequence; a short last block is left out, as it is never scored.

    mean(K_j) = 1/block_size · Σ_{i in block j} k_i

    Args:
        k: [..., S, G, D], floating.
        block_size: tokens in a block.

    Returns:
        [..., S // block_size, G, D] in k's dtype.

    Numerics: accumulated in fp32 (fp64 for fp64 keys) and rounded once to k's dtype. Summed by halves, with additions
        of whole tensors only, so a block's mean has the same bits whatever the other blocks and the memory layout are.
    Source: MoBA, eq. 6.
    """
    num_finished = k.shape[-3] // block_size
    blocks = k[..., : num_finished * block_size, :, :].unflatten(-3, (num_finished, block_size))
    means = k.new_empty(*blocks.shape[:-3], *blocks.shape[-2:])
    # A tensor, because on a GPU division by a Python number multiplies by its rounded reciprocal.
    size = torch.full((), block_size, dtype=accumulation_dtype(k.dtype), device=k.device)
    at_once = max(1, _CHUNK_SIZE // max(1, means[..., :1, :, :].numel() * block_size))
    for start in range(0, num_finished, at_once):
        some = slice(start, start + at_once)
        means[..., some, :, :] = _sum_by_halves(blocks[..., some, :, :, :]) / size
    return means


def _sum_by_halves(x: Tensor) -> Tensor:
    """Sum of [..., n, G, D] over n, in the accumulation dtype."""
    count = x.shape[-3]
    half = (count + 1) // 2
    total = x[..., :half, :, :].to(accumulation_dtype(x.dtype), copy=True)
    total[..., : count - half, :, :] += x[..., half:, :, :]
    while half > 1:
        count, half = half, (half + 1) // 2
        total[..., : count - half, :, :] += total[..., half:count, :, :]
    return total[..., 0, :, :]


def first_of_equals(means: Tensor, pick: Callable[[Tensor], Tensor] = lambda means: means) -> Tensor | None:
    """For each block the first one with the same mean, bit for bit: int64 [..., N, G]; None if no two are the same.

    A CPU's matrix product may round equal columns differently, depending on their place. A GPU's does not, so None is
    returned at once.

    Args:
        means: [..., N, G, D], or a tensor from which `pick` takes these after its last dimension is cut.
    """
    if means.device.type != "cpu":
        return None
    # Almost always the first eight bytes say that all differ.
    width = 8 // means.element_size()
    beginning = pick(means[..., :width])
    keys = F.pad(beginning, (0, width - beginning.shape[-1])).contiguous().view(torch.int64)[..., 0]
    if not bool((keys.sort(dim=-2).values.diff(dim=-2) == 0).any()):
        return None
    bits = pick(means).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[means.element_size()])
    first = keys.new_empty(keys.shape).movedim(-2, 0).flatten(1)
    for column, of_head in enumerate(bits.movedim(-3, 0).flatten(1, -2).unbind(1)):
        group = torch.unique(of_head, dim=0, return_inverse=True)[1]
        in_order, block = group.sort(stable=True)
        first[:, column] = block[F.pad(in_order.diff() != 0, (1, 0), value=True)][group]
    return first.unflatten(1, (*keys.shape[:-2], keys.shape[-1])).movedim(0, -2)


def equal_scores(scores: Tensor, first: Tensor) -> Tensor:
    """Give blocks of equal means the score of their `first` [..., N, G]: scores [..., rows, H, N]."""
    of_heads = first.mT.repeat_interleave(scores.shape[-2] // first.shape[-1], dim=-2).unsqueeze(-3)
    return scores.gather(-1, of_heads.expand(scores.shape))


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Keep a function that loops over data out of torch.compile's graphs.

    `torch.compiler.disable` alone would import the whole compiler; here that happens only while something is compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def kept_indices(positions: Tensor, selection: Selection) -> Tensor:
    """The routing when kept blocks fill every place: the first, the nearest past, and the own block.

    Args:
        positions: int32 [...], each query's position in its sequence, negative for padded rows.

    Returns:
        int32 [..., K], ascending, -1 where fewer than K blocks exist.
    """
    own = torch.div(positions, selection.block_size, rounding_mode="floor")[..., None]
    slot = torch.arange(selection.topk, dtype=torch.int32, device=positions.device)
    recent = own - (selection.topk - 1 - slot)
    chosen = torch.where(slot < selection.keep_first, slot, recent)
    return torch.where(own < selection.topk, torch.where(slot <= own, slot, -1), chosen).to(torch.int32)


def select_blocks(scores: Tensor, own: Tensor, selection: Selection, *, may_wait: bool = True) -> Tensor:
    """Turn scores into a routing: kept blocks first, then the best-scoring candidates, then the own block.

    Args:
        scores: [rows, H, N] of every block number below the largest own block. own: int [rows], own block of each row.
        may_wait: as for `top_blocks`.

    Returns:
        int32 [rows, H, min(K, N + 1)], ascending, -1 where fewer blocks exist or the mass of fewer is enough.
    """
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    own = own[:, None, None]
    limit = torch.finfo(scores.dtype).max
    finite = torch.nan_to_num(scores, nan=-limit, posinf=limit, neginf=-limit)
    scores = finite if selection.top_p is None else finite.clone()
    if selection.keep_first or selection.keep_recent:
        scores.masked_fill_((block < selection.keep_first) | (block >= own - selection.keep_recent), torch.inf)
    scores.masked_fill_(block >= own, -torch.inf)
    num_past = min(selection.topk - 1, num_blocks)
    past = top_blocks(scores, num_past, may_wait=may_wait) if num_past else own.new_empty(*scores.shape[:-1], 0)
    if selection.top_p is not None and num_past:
        past = past.sort(dim=-1).values
        past = past.gather(-1, scores.gather(-1, past).sort(dim=-1, descending=True, stable=True).indices)
        mass = finite.masked_fill_(block >= own, -torch.inf).softmax(dim=-1).gather(-1, past)
        before = F.pad(mass.cumsum(dim=-1)[..., :-1], (1, 0))
        is_kept = scores.gather(-1, past) == torch.inf
        past = past.masked_fill((before >= selection.top_p) & ~is_kept, num_blocks + 1)
    past = past.masked_fill(past >= own, num_blocks + 1)
    chosen = torch.cat([past, own.expand(*scores.shape[:-1], 1)], dim=-1).sort(dim=-1).values
    return chosen.masked_fill(chosen > num_blocks, -1).to(torch.int32)


def span_blocks(k: Tensor | None, means: Tensor | None, span: Span, selection: Selection) -> Tensor:
    """What a rule scores of one sequence's finished blocks: their means [N, G, D], or keys [N, block_size, G, D].

    Args:
        k: [R, S, G, D]. means: [R, N, G, D] if known; k is then not read.
    """
    num_blocks = span.k_len // selection.block_size
    if means is not None:
        return means[span.row, :num_blocks]
    assert k is not None
    keys = k[span.row, span.k_start : span.k_start + span.k_len]
    if selection.score is max_token_scores:
        return keys[: num_blocks * selection.block_size].unflatten(0, (num_blocks, selection.block_size))
    return mean_keys(keys, selection.block_size)


def route_span(q: Tensor, means: Tensor, span: Span, selection: Selection) -> Tensor:
    """Route one sequence in chunks of query rows, so that scores of all rows are never in memory at once.

    Args:
        q: [T, H, D] the sequence's queries. means: as `span_blocks` gives them.

    Returns:
        int32 [T, H, K].
    """
    num_queries, num_heads, _ = q.shape
    positions = torch.arange(span.offset, span.k_len, dtype=torch.int32, device=q.device)
    if selection.score is None:
        return kept_indices(positions, selection)[:, None].expand(-1, num_heads, -1)
    indices = q.new_full((num_queries, num_heads, selection.topk), -1, dtype=torch.int32)
    own = torch.div(positions, selection.block_size, rounding_mode="floor").long()
    first = selection.first_of_equals(means)
    # A user's function is called in the thread that passed it.
    is_shared = ranks_by_means(selection.score) and q.device.type == "cpu"
    rows = max(1, (_CHUNK_SIZE >> is_shared) // max(1, num_heads * means.shape[0]))

    def run(start: int) -> None:
        stop = min(num_queries, start + rows)
        num_candidates = (span.offset + stop - 1) // selection.block_size
        scores = selection.scores(q[start:stop], means[:num_candidates], first)
        chosen = select_blocks(scores, own[start:stop], selection)
        indices[start:stop, :, : chosen.shape[-1]] = chosen

    chunks = range(0, num_queries, rows)
    if is_shared:
        for_each(run, chunks, q.device)
    else:
        for start in chunks:
            run(start)
    return indices


@outside_graphs
def route(
    q: Tensor, k: Tensor | None, sequences: Sequences, selection: Selection, means: Tensor | None = None
) -> Tensor:
    """The routing of every query, in plain torch: int32 [R, T, H, K].

    Args:
        q: [R, T, H, D]. k: [R, S, G, D], any strides with a contiguous last dimension; not read if there are
            means: [R, N, G, D], of finished blocks.
    """
    if selection.score is None:
        positions = sequences.positions(q.device)
        return kept_indices(positions, selection)[:, :, None].expand(-1, -1, q.shape[2], -1)
    indices = q.new_full((*q.shape[:3], selection.topk), -1, dtype=torch.int32)
    for span in sequences.spans():
        rows = slice(span.q_start, span.q_start + span.q_len)
        finished = span_blocks(k, means, span, selection)
        indices[span.row, rows] = route_span(q[span.row, rows], finished, span, selection)
    return indices
