"""MoBA over the pages of a serving engine: what one forward pass reads and writes. Nothing of an engine is used here.

Letters: R requests, T query tokens, S key tokens, H query heads, G key/value heads, D head dim, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from moba.attention import moba_attention_varlen
from moba.block_means import append_block_means, moba_attention_paged
from moba.config import MoBAConfig
from moba.sequences import page_means_shape


class Keys(NamedTuple):
    """The keys of some requests, one request after another.

    Args:
        page, place: int64 [total], where each key lies.
        cu_q, cu_k: int32 [R + 1], bounds of the requests' tokens and keys.
    """

    page: Tensor
    place: Tensor
    cu_q: Tensor
    cu_k: Tensor


@dataclass(frozen=True)
class Part:
    """The tokens of some requests in one forward pass, which attend alike.

    Args:
        tokens: which of the packed tokens.
        page_table: int32 [R, pages].
        key_end: int32 [R], keys of each request, those of its tokens the last.
        num_new: the most tokens of a request.
        keys: where requests have several tokens; None where each has one, which reads its pages in place.
        is_dense: full attention.
    """

    tokens: slice | Tensor
    page_table: Tensor
    key_end: Tensor
    num_new: int = 1
    keys: Keys | None = None
    is_dense: bool = False


Dense = Callable[[Tensor, Part], Tensor]


def lay_out_single_tokens(page_table: Tensor, key_end: Tensor, *, longest: int, page_size: int) -> list[Part]:
    """The part of a forward pass in which request i has token i and no other. Nothing is read from tensors.

    Args:
        page_table: int32 [R, pages].
        key_end: int32 [R]; 0 for a row that pads the batch, whose token gets zeros.
        longest: at least the keys of every request.
        page_size: tokens in a page.
    """
    width = max(1, min(ceil(longest / page_size), page_table.shape[1]))
    return [Part(slice(0, key_end.shape[0]), page_table[:, :width], key_end)]


def lay_out(
    query_start: Sequence[int],
    num_keys: Sequence[int],
    page_table: Tensor,
    key_end: Tensor,
    *,
    page_size: int,
    is_dense: Sequence[bool],
    most_keys: int,
) -> list[Part]:
    """The parts of a forward pass: single tokens together, chunks of prompts as many at a time as their keys permit.

    Args:
        query_start: R + 1 bounds of the requests' packed tokens.
        num_keys: of each request; at least those of a request with a single token, exactly those of another.
        page_table: int32 [R, pages].
        key_end: int32 [R], the keys of each request, on the device: never read by the host.
        page_size: tokens in a page.
        is_dense: for each request, whether it gets full attention if it has a single token.
        most_keys: of the requests of a part, unless a request alone has more.
    """
    counts = [stop - start for start, stop in pairwise(query_start)]
    parts = []
    for kind in (False, True):
        rows = [row for row, count in enumerate(counts) if count == 1 and is_dense[row] == kind]
        if rows:
            parts.append(_part(rows, query_start, num_keys, page_table, key_end, page_size, is_dense=kind))
    for rows in _groups([row for row, count in enumerate(counts) if count > 1], num_keys, most_keys):
        parts.append(_part(rows, query_start, num_keys, page_table, key_end, page_size, is_dense=False))
    return parts


def attend(
    parts: list[Part],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_means: Tensor,
    out: Tensor,
    config: MoBAConfig,
    *,
    scale: float,
    dense: Dense,
) -> None:
    """Write the block means that this forward pass finishes, then attend: one layer's share of it.

    Args:
        parts: what `lay_out` made.
        q: [total, H, D].
        k_pages, v_pages: [P, page_size, G, D], the new keys and values among them.
        block_means: what `means_beside` gave for these pages.
        out: [total, H, D], written where the parts have tokens.
        config: the model's.
        scale: factor of the logits.
        dense: (q [R, H, D], part) -> [R, H, D], full attention of single tokens.
    """
    # All means before any attention: a request may share the pages of another that fills them in this very pass.
    for part in parts:
        append_block_means(
            block_means, k_pages, num_new=part.num_new, block_size=config.block_size, key_end=part.key_end,
            page_table=part.page_table, backend=config.backend,
        )  # fmt: skip
    for part in parts:
        rows = q[part.tokens]
        if part.is_dense:
            out[part.tokens] = dense(rows, part)
        elif part.keys is None:
            out[part.tokens] = moba_attention_paged(
                q=rows[:, None], k_pages=k_pages, v_pages=v_pages, page_table=part.page_table, key_end=part.key_end,
                block_means=block_means, scale=scale, backend=config.backend, **config.selection,
            )[:, 0]  # fmt: skip
        else:
            keys = part.keys
            out[part.tokens] = moba_attention_varlen(
                q=rows, k=k_pages[keys.page, keys.place], v=v_pages[keys.page, keys.place], cu_seqlens=keys.cu_q,
                cu_seqlens_k=keys.cu_k, scale=scale, backend=config.backend, **config.selection,
            )  # fmt: skip


def means_beside(means: Tensor | None, k_pages: Tensor, block_size: int) -> Tensor:
    """`means` if they are those of these pages, otherwise new ones, [P, page_size // block_size, G, D].

    What they hold need not be cleared: a block's mean is written when the block is finished, and not read before.
    """
    shape = page_means_shape(k_pages, block_size)
    if means is None or means.shape != shape or means.dtype != k_pages.dtype or means.device != k_pages.device:
        return k_pages.new_empty(shape)
    return means


def _part(
    rows: list[int],
    query_start: Sequence[int],
    num_keys: Sequence[int],
    page_table: Tensor,
    key_end: Tensor,
    page_size: int,
    *,
    is_dense: bool,
) -> Part:
    device = page_table.device
    lengths = [num_keys[row] for row in rows]
    counts = [query_start[row + 1] - query_start[row] for row in rows]
    taken = _index(rows, [1] * len(rows), device)
    tables = page_table[taken, : ceil(max(lengths) / page_size)]
    tokens = _index([query_start[row] for row in rows], counts, device)
    keys = None
    if max(counts) > 1:
        cu_q, cu_k = (_to(torch.tensor([0, *accumulate(x)], dtype=torch.int32), device) for x in (counts, lengths))
        total = sum(lengths)
        row = torch.repeat_interleave(cu_k.diff(), output_size=total)
        position = torch.arange(total, device=device) - cu_k[row]
        page = tables[row, torch.div(position, page_size, rounding_mode="floor")].long()
        keys = Keys(page, position % page_size, cu_q, cu_k)
    return Part(tokens, tables, key_end[taken], max(counts), keys, is_dense)


def _groups(rows: list[int], num_keys: Sequence[int], most_keys: int) -> Iterator[list[int]]:
    """The rows in order, in groups of at most `most_keys` keys or of one row."""
    group: list[int] = []
    for row in rows:
        if group and sum(num_keys[i] for i in group) + num_keys[row] > most_keys:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _index(starts: list[int], counts: list[int], device: torch.device) -> slice | Tensor:
    """The places start … start + count - 1 of each pair: a slice where they follow one another."""
    stops = [start + count for start, count in zip(starts, counts, strict=True)]
    if stops[:-1] == starts[1:]:
        return slice(starts[0], stops[-1])
    places = torch.cat([torch.arange(*ends) for ends in zip(starts, stops, strict=True)])
    return _to(places, device)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
