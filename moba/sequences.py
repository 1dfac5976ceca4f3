"""Where each sequence lies inside padded or packed tensors: the one place that knows of padding and cu_seqlens.

Backends see tensors [R, T, H, D] and [R, S, G, D]. A padded batch has one sequence a row (R = B); packed sequences
share one row (R = 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

MAX_POSITIONS = 2**31 - 1
# Blocks larger than this, and than all keys, are cut to what holds all keys.
LARGE_BLOCK = 1 << 16


class Span(NamedTuple):
    """One sequence: `q_len` query rows from `q_start`, `k_len` key rows from `k_start`, both of tensor row `row`.

    The queries are the last q_len of the sequence's k_len positions, so q_len <= k_len.
    """

    row: int
    q_start: int
    q_len: int
    k_start: int
    k_len: int

    @property
    def offset(self) -> int:
        """Position in the sequence of its first query."""
        return self.k_len - self.q_len


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call, kept as the tensors they were given in so that a GPU never waits for the host.

    Args:
        num_rows, num_queries, num_keys: R, T and S of the tensors.
        key_start, key_end: int32 [R] or None; each row's real keys, its queries end at key_end (padded batch).
        cu_q, cu_k: int32 [num_sequences + 1] or None; both given for packed sequences, where R = 1.
        page_table: int32 [R, pages] or None; if given, keys and values are pages [P, page_size, G, D], and position p
            of row r lies in page page_table[r, p // page_size] at p % page_size. Then key_end holds the lengths,
            key_start is None and num_keys = pages · page_size. Entries after a row's last page are ignored.
    """

    num_rows: int
    num_queries: int
    num_keys: int
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    page_table: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_keys > MAX_POSITIONS:
            raise ValueError(f"there can be at most {MAX_POSITIONS} keys, as positions are int32, got {self.num_keys}")

    @property
    def is_plain(self) -> bool:
        """Whether every row is one whole sequence: neither padding nor packing nor pages."""
        return self.key_start is None and self.key_end is None and self.cu_q is None

    @property
    def page_size(self) -> int:
        """Keys in a page."""
        assert self.page_table is not None
        return self.num_keys // max(self.page_table.shape[1], 1)

    @property
    def num_sequences(self) -> int:
        """Packed sequences; 0 where every row is one."""
        return 0 if self.cu_k is None else self.cu_k.numel() - 1

    def num_blocks(self, block_size: int) -> int:
        """An upper bound, known without reading the device, of the number of blocks in any sequence."""
        return -(-self.num_keys // block_size)

    def fitting_block_size(self, block_size: int) -> int:
        """Return block_size; shrink a block that is much larger than all keys to one that just covers them."""
        if block_size <= LARGE_BLOCK or block_size <= self.num_keys:
            return block_size
        # A power of two times the page size, so that a growing cache seldom changes it.
        fitting = 1 if self.page_table is None else self.page_size
        while fitting <= max(self.num_keys, LARGE_BLOCK):
            fitting *= 2
        return min(block_size, fitting)

    def spans(self) -> list[Span]:
        """The sequences with at least one real query, in order. Waits for the device that holds the tensors."""
        if self.cu_q is not None and self.cu_k is not None:
            q, k = self.cu_q.tolist(), self.cu_k.tolist()
            bounds = [(0, q[i], q[i + 1], k[i], k[i + 1]) for i in range(len(q) - 1)]
        else:
            starts = [0] * self.num_rows if self.key_start is None else self.key_start.tolist()
            ends = [self.num_keys] * self.num_rows if self.key_end is None else self.key_end.tolist()
            bounds = [(row, 0, self.num_queries, starts[row], ends[row]) for row in range(self.num_rows)]
        spans = []
        for row, q_start, q_end, k_start, k_end in bounds:
            q_len = min(q_end - q_start, k_end - k_start)
            if q_len > 0:
                spans.append(Span(row, q_end - q_len, q_len, k_start, k_end - k_start))
        return spans

    def positions(self, device: torch.device) -> Tensor:
        """Position of every query row in its own sequence, negative for padded rows: int32 [R, T]."""
        rows = torch.arange(self.num_queries, dtype=torch.int32, device=device)
        if self.cu_q is not None and self.cu_k is not None:
            if self.cu_q.numel() == 1:
                return torch.full_like(rows, -1)[None]
            sequence = torch.searchsorted(self.cu_q[1:], rows, right=True).clamp_(max=self.cu_q.numel() - 2)
            k_len = (self.cu_k[1:] - self.cu_k[:-1])[sequence]
            positions = (k_len - self.cu_q[1:][sequence] + rows).to(torch.int32)
            return torch.where(rows < self.cu_q[-1], positions, -1)[None]
        end = self.num_keys if self.key_end is None else self.key_end.to(device)[:, None]
        start = 0 if self.key_start is None else self.key_start.to(device)[:, None]
        return (end - start - self.num_queries + rows).to(torch.int32).expand(self.num_rows, -1)

    def without_pages(self) -> Sequences:
        """The same sequences after `gather_pages` copied their pages together."""
        return replace(self, page_table=None)

    def pages_in_use(self) -> Tensor:
        """The page table, with page 0 in the entries after each row's last page: int64 [R, pages]."""
        assert self.page_table is not None
        assert self.key_end is not None
        first_key = torch.arange(self.page_table.shape[1], device=self.page_table.device) * self.page_size
        return self.page_table.long().masked_fill(first_key >= self.key_end[:, None], 0)

    def gather_pages(self, pages: Tensor) -> Tensor:
        """Copy every row's keys out of pages [P, page_size, G, D]: [R, S, G, D], undefined after a row's end."""
        return pages[self.pages_in_use()].flatten(1, 2)

    def mean_places(self, block_size: int) -> tuple[Tensor, Tensor]:
        """Page of each block's mean, that of its first key, and the place there: int64 [R, S // block_size] each."""
        pages = self.pages_in_use()
        first_key = torch.arange(self.num_keys // block_size, device=pages.device) * block_size
        page = pages[:, first_key // self.page_size]
        return page, (first_key % self.page_size // block_size).expand_as(page)


def page_means_shape(pages: Tensor, block_size: int) -> tuple[int, ...]:
    """Shape of the block means beside pages [P, page_size, G, D]: [P, blocks of a page, G, D].

    Where a block spans several pages, its mean lies under the page that holds its first key.

    Raises:
        ValueError: if neither block_size nor the page size divides the other.
    """
    page_size = pages.shape[1]
    if page_size % block_size and block_size % page_size:
        raise ValueError(f"block_size must divide the page size {page_size} or be a multiple of it, got {block_size}")
    return (pages.shape[0], max(1, page_size // block_size), *pages.shape[2:])
