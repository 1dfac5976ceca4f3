"""MoBA by masks, as in the paper's equations 2-6: what every other backend is checked against.

tests/oracle.py, loops over single queries, checks this one.

Written to be read, not to be fast: it sorts all scores and makes T × S masks. Every dtype works, fp64 included.

Letters: T query tokens, S key tokens, H query heads, G key/value heads, D head dim, N blocks, K = topk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba import routing
from moba.numerics import accumulation_dtype, full_fp32_matmul
from moba.routing import Selection, outside_graphs
from moba.sequences import Sequences, Span


def unsupported(q: Tensor, k: Tensor, *, own_block: bool = True) -> str | None:
    """Why this backend cannot run on these tensors: None, it always can."""
    return None


@outside_graphs
def route(
    q: Tensor, k: Tensor | None, sequences: Sequences, selection: Selection, means: Tensor | None = None
) -> Tensor:
    """Equations 3-6: score every block, keep the top-k. See `moba.backends` for the contract."""
    indices = q.new_full((*q.shape[:3], selection.topk), -1, dtype=torch.int32)
    for span in sequences.spans():
        q_rows = slice(span.q_start, span.q_start + span.q_len)
        finished = routing.span_blocks(k, means, span, selection)
        indices[span.row, q_rows] = _route_sequence(q[span.row, q_rows], finished, span, selection)
    return indices


def _route_sequence(q: Tensor, means: Tensor, span: Span, selection: Selection) -> Tensor:
    """The routing [T, H, K] of queries [T, H, D] by the means [N, G, D] of the finished blocks."""
    position = torch.arange(span.offset, span.k_len, device=q.device)[:, None, None]  # [T, 1, 1]
    own = position // selection.block_size
    block = torch.arange(means.shape[0], device=q.device)  # [N]

    if selection.score is None:
        score = torch.zeros(q.shape[0], q.shape[1], means.shape[0], device=q.device)
    else:
        score = selection.scores(q, means, selection.first_of_equals(means))  # [T, H, N]
        score = score.nan_to_num(nan=torch.finfo(score.dtype).min)  # NaN and -inf become the same lowest number
    kept = (block < selection.keep_first) | (block >= own - selection.keep_recent)
    # The order: past blocks first, among them kept ones, then higher scores, then lower indices. As sorts are stable,
    # the least important criterion is sorted by first.
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    order = order.gather(-1, _flagged_first(kept.expand_as(score).gather(-1, order)))
    order = order.gather(-1, _flagged_first((block < own).expand_as(score).gather(-1, order)))

    if selection.top_p is not None:
        mass = torch.softmax(score.masked_fill(block >= own, -torch.inf), dim=-1).gather(-1, order)
        before = torch.nn.functional.pad(mass.cumsum(dim=-1)[..., :-1], (1, 0))
        is_kept = kept.expand_as(score).gather(-1, order)
        order = order.masked_fill((before >= selection.top_p) & ~is_kept, -1)
    chosen = order[..., : selection.topk - 1]
    chosen = chosen.masked_fill(chosen >= own, -1)
    with_own = torch.cat([chosen, own.expand(-1, q.shape[1], -1)], dim=-1)
    return _ascending(with_own, selection.topk).to(torch.int32)


def _flagged_first(flag: Tensor) -> Tensor:
    """Order that brings flagged entries to the front and keeps the order within both groups."""
    return torch.argsort(flag.int(), dim=-1, descending=True, stable=True)


def _ascending(chosen: Tensor, width: int) -> Tensor:
    """Sort block numbers, move -1 to the end, pad with -1 to `width`."""
    last = torch.iinfo(chosen.dtype).max
    chosen = chosen.masked_fill(chosen < 0, last).sort(dim=-1).values
    return torch.nn.functional.pad(chosen.masked_fill(chosen == last, -1), (0, width - chosen.shape[-1]), value=-1)


def attention_mask(indices: Tensor, span: Span, block_size: int) -> Tensor:
    """Which keys each query of one sequence attends to: those of its blocks, at positions up to its own.

    Args:
        indices: int [T, H, K], the routing of the sequence's queries.

    Returns:
        bool [H, T, S].
    """
    key = torch.arange(span.k_len, dtype=torch.int32, device=indices.device)
    query = torch.arange(span.offset, span.k_len, dtype=torch.int32, device=indices.device)
    num_blocks = -(-span.k_len // block_size)
    chosen = routing.Routing(indices, block_size).block_mask(num_blocks)  # [T, H, N]
    chosen_key = chosen.transpose(0, 1).repeat_interleave(block_size, dim=-1)[..., : span.k_len]
    return chosen_key & (key <= query[:, None])


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
    """Equation 2: softmax(scale · q Kᵀ) V over the selected keys, by masking. See `moba.backends` for the contract.

    `own_block` changes nothing here: `indices` hold the own block wherever it is read.
    """
    group = q.shape[2] // k.shape[2]
    indices = routing.for_query_heads(indices, q.shape[2])
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    for span in sequences.spans():
        all_rows = torch.arange(span.q_start, span.q_start + span.q_len, device=q.device)
        k_rows = slice(span.k_start, span.k_start + span.k_len)
        masked_by_head = attention_mask(indices[span.row, all_rows], span, block_size).logical_not_()
        for head in range(q.shape[2]):
            sees_any = ~masked_by_head[head].all(dim=-1)
            q_rows, masked = all_rows[sees_any], masked_by_head[head, sees_any]
            out[span.row, q_rows, head], lse[span.row, q_rows, head] = _masked_attention(
                q[span.row, q_rows, head], k[span.row, k_rows, head // group], v[span.row, k_rows, head // group],
                masked, scale, softcap,
            )  # fmt: skip
    if torch.is_grad_enabled():
        # Where no sequence has a query, too, the results have a gradient: zeros.
        nothing = sum(x[:, :0].sum() for x in (q, k, v))
        out, lse = out + nothing, lse + nothing
    return out, lse


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`_softmax_attention`, whose mask also keeps NaN and inf out.

    0 · NaN would pass through the mask, so NaN and inf are zeros at first. A row that sees one is then computed again,
    from the keys that it sees alone.
    """
    is_bad_query, is_bad_key, is_bad_value = (~torch.isfinite(x).all(dim=-1) for x in (q, k, v))
    out, lse = _softmax_attention(
        q.masked_fill(is_bad_query[:, None], 0.0),
        k.masked_fill(is_bad_key[:, None], 0.0),
        v.masked_fill(is_bad_value[:, None], 0.0),
        masked,
        scale,
        softcap,
    )
    sees_bad = is_bad_query | (~masked & (is_bad_key | is_bad_value)).any(dim=-1)
    for row in sees_bad.nonzero()[:, 0].tolist():
        seen = ~masked[row]
        out[row], lse[row] = _softmax_attention(q[row], k[seen], v[seen], None, scale, softcap)
    return out, lse


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Out [..., Dv] and lse [...] of queries [..., D] over keys [S, D] and values [S, Dv]."""
    wide = accumulation_dtype(q.dtype)
    logits = (scale * q.to(wide)) @ k.to(wide).T
    logits = _capped(logits, softcap)
    if masked is not None:
        logits.masked_fill_(masked, -torch.inf)
    largest = logits.detach().amax(dim=-1, keepdim=True)
    weights = logits.sub_(largest).exp_()  # in place: a second T × S tensor would double the memory
    total = weights.sum(dim=-1, keepdim=True)
    return (weights @ v.to(wide) / total).to(q.dtype), (largest + total.log())[..., 0]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@outside_graphs
def append_means(means: Tensor, k: Tensor, sequences: Sequences, block_size: int) -> None:
    """Write the means of the blocks that the new keys finish. See `moba.backends` for the contract."""
    keys, places = k, None
    if sequences.page_table is not None:
        keys, places = sequences.gather_pages(k), sequences.mean_places(block_size)
        sequences = sequences.without_pages()
    for span in sequences.spans():
        for block in range(span.offset // block_size, span.k_len // block_size):
            first_key = span.k_start + block * block_size
            mean = routing.mean_keys(keys[span.row, first_key : first_key + block_size], block_size)[0]
            place = (span.row, block) if places is None else tuple(part[span.row, block] for part in places)
            means[place] = mean


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
    """Route by the means, then `attend`. See `moba.backends` for the contract."""
    if sequences.page_table is not None:
        means = means[sequences.mean_places(selection.block_size)]
        k, v = sequences.gather_pages(k), sequences.gather_pages(v)
        sequences = sequences.without_pages()
    indices = route(q, None, sequences, selection, means)
    options: dict[str, Any] = {"block_size": selection.block_size, "scale": scale, "softcap": softcap}
    return (*attend(q, k, v, indices, sequences, **options), indices)


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
    """Gather pages into rows, then `attend`. See `moba.backends` for the contract."""
    if sequences.page_table is not None:
        k, v = sequences.gather_pages(k), sequences.gather_pages(v)
        sequences = sequences.without_pages()
    return attend(q, k, v, indices, sequences, block_size=block_size, scale=scale, softcap=softcap, own_block=own_block)


@outside_graphs
def log_masses(q: Tensor, k: Tensor, block_size: int, scale: float, softcap: float | None) -> Tensor:
    """The log-sum-exp of each block's visible logits. See `moba.backends` for the contract."""
    position = torch.arange(k.shape[0], device=q.device)
    logits = _capped(scale * _products(q, k), softcap)
    return _by_block(logits.masked_fill(position > position[-q.shape[0] :, None], -torch.inf), block_size).logsumexp(-1)


@outside_graphs
def largest_products(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The largest product with each block's keys. See `moba.backends` for the contract."""
    return _by_block(_products(q, k), block_size).amax(-1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Products [H, T, S] of q [T, H, D] and k [S, G, D]."""
    wide = accumulation_dtype(q.dtype)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with full_fp32_matmul():
        return q.to(wide).transpose(0, 1) @ keys.permute(1, 2, 0)


def _by_block(x: Tensor, block_size: int) -> Tensor:
    """[.., S] as [.., N, block_size], with -inf behind the last key."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size), value=-torch.inf)
    return padded.unflatten(-1, (-1, block_size))
