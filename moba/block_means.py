"""Means of the finished blocks of a cache's keys: write them once, route by them, attend with them.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim, N blocks, P pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from moba import backends
from moba.attention import route_and_attend
from moba.backends import MAX_DECODE_QUERIES
from moba.config import BACKENDS, Router, require_int, require_one_of, validate_selection
from moba.numerics import to_autocast_dtype
from moba.options import Call, No, PagedOptions, Yes
from moba.routing import Routing, Selection, for_query_heads
from moba.sequences import Sequences
from moba.validate import (
    check_attention,
    check_block_indices,
    check_bounds,
    check_head_dim,
    check_heads,
    check_means,
    check_page_means,
    check_page_numbers,
    check_pages,
    check_tensors,
    require_tensors,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@torch.no_grad()
def append_block_means(
    means: Tensor,
    k: Tensor,
    *,
    num_new: int,
    block_size: int,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    page_table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write the means of the blocks that the last keys of each row finished. Call it once for every new key.

    mean(K_j) = 1/block_size · Σ_{i in block j} k_i

    Args:
        means: [B, N, G, D], N >= S // block_size, in k's dtype; written in place. Entries of unfinished blocks are not
            touched. With a page_table: the shape of `moba_attention_paged`'s block_means.
        k: [B, S, G, D], the keys with the new ones among them; or pages [P, page_size, G, D].
        num_new: number of new keys at the end of each row. If it exceeds a row's keys, all of them are new.
        block_size: tokens in a block, counted from key_start.
        key_start, key_end: int32 [B], as in `moba_attention`.
        page_table: int32 [B, pages], as in `moba_attention_paged`; key_end is then required.
        backend: the backend that will use the means, as in `moba_attention`.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.

    Numerics: accumulated in fp32 (fp64 for fp64) and rounded once: the bits that the backend's prefill computes.
    """
    require_tensors(k=k)
    check_tensors(4, k=k)
    require_int("num_new", num_new, 0)
    require_int("block_size", block_size, 1)
    require_one_of("backend", backend, BACKENDS)
    if page_table is not None:
        if key_start is not None:
            raise ValueError("key_start cannot be combined with page_table: rows begin with their first page")
        check_pages(k, page_table, key_end, None)
        check_page_means("means", means, k, block_size)
        sequences = _paged_sequences(min(num_new, page_table.shape[1] * k.shape[1]), k, page_table, key_end)
    else:
        check_bounds(key_start, key_end, k, k.shape[1])
        check_means("means", means, k, k.shape[1] // block_size)
        sequences = Sequences(k.shape[0], min(num_new, k.shape[1]), k.shape[1], key_start=key_start, key_end=key_end)
    if sequences.num_queries and block_size <= sequences.num_keys:
        backends.resolve(backend, k, k).append_means(means, k, sequences, block_size)


@torch.no_grad()
def moba_route(
    q: Tensor,
    block_means: Tensor,
    *,
    num_keys: int,
    block_size: int,
    topk: int,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    backend: str = "auto",
) -> Routing:
    """Choose blocks by their means alone, without the keys.

    Args:
        q: [B, T, H, D]. The queries are the last T of num_keys positions.
        block_means: [B, N, G, D], N >= num_keys // block_size, in q's dtype, as `append_block_means` writes them.
        num_keys: S, at least T.
        block_size, topk, keep_first, keep_recent, router, backend: as in `moba_attention`.

    Returns:
        The `Routing` that `moba_attention` chooses over keys with these means.

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    validate_selection(block_size, topk, keep_first, keep_recent, router)
    require_one_of("backend", backend, BACKENDS)
    require_tensors(q=q, block_means=block_means)
    check_tensors(4, q=q, block_means=block_means)
    check_head_dim(q=q, block_means=block_means)
    check_heads(q.shape[2], block_means.shape[2])
    require_int("num_keys", num_keys, q.shape[1])
    check_means("block_means", block_means, block_means[:, :0], num_keys // block_size)
    if q.shape[0] != block_means.shape[0]:
        raise ValueError(f"block_means must have q's batch size {q.shape[0]}, got {block_means.shape[0]}")
    implementation = backends.resolve(backend, q, block_means)
    sequences = Sequences(q.shape[0], q.shape[1], num_keys)
    selection = Selection.of(sequences.fitting_block_size(block_size), topk, keep_first, keep_recent, router)
    with torch.autocast(q.device.type, enabled=False):
        indices = implementation.route(q, None, sequences, selection, block_means)
    return Routing(for_query_heads(indices, q.shape[2]), block_size)


@overload
def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    return_lse: No = ...,
    return_routing: No = ...,
    **given: Unpack[PagedOptions],
) -> Tensor: ...
@overload
def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    return_lse: Yes,
    return_routing: No = ...,
    **given: Unpack[PagedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    return_lse: No = ...,
    return_routing: Yes,
    **given: Unpack[PagedOptions],
) -> tuple[Tensor, Routing]: ...
@overload
def moba_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, *, return_lse: Yes, return_routing: Yes, **given: Unpack[PagedOptions]
) -> tuple[Tensor, Tensor, Routing]: ...
@overload
def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    return_lse: bool = ...,
    return_routing: bool = ...,
    **given: Unpack[PagedOptions],
) -> Any: ...
def moba_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    page_table: Tensor,
    key_end: Tensor,
    block_means: Tensor | None = None,
    block_size: int,
    topk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    router: Router = "mean",
    block_indices: Tensor | None = None,
    own_block: bool = True,
    backend: str = "auto",
    return_lse: bool = False,
    return_routing: bool = False,
) -> Any:
    """Mixture of Block Attention over a cache of pages, for inference.

    With at most 16 queries a row, a step reads the means and the selected keys in place. With more queries, each row's
    keys are first copied out of their pages.

    Args:
        q: [B, T, H, D]. Row b's queries are the last T of its key_end[b] positions; rows with fewer keys than
            queries have padding in front, which gives zeros.
        k_pages, v_pages: [P, page_size, G, D] and [P, page_size, G, Dv] of q's dtype and device, any strides with a
            contiguous last dimension.
        page_table: int32 [B, pages]: position p of row b lies in page page_table[b, p // page_size] at
            p % page_size. Entries after a row's last page are ignored.
        key_end: int32 [B], the number of keys of each row.
        block_means: [P, page_size // block_size, G, D] where block_size divides page_size, or [P, 1, G, D] where it is
            a multiple; the means of finished blocks, as `append_block_means` writes them. Left out with block_indices.
        block_size, topk, scale, softcap, sinks, keep_first, keep_recent, router, block_indices, own_block, backend,
            return_lse, return_routing: as in `moba_attention`.

    Returns:
        As `moba_attention`, without gradients.

    Raises:
        ValueError: naming the argument, what it was, and what is valid; also if a gradient is asked for.

    Numerics: as in `moba_attention`.
    """
    require_tensors(q=q, k_pages=k_pages, v_pages=v_pages)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_pages, v_pages, sinks)):
        raise ValueError("a paged cache serves inference only: call moba_attention_paged under torch.no_grad()")
    q, k_pages, v_pages = to_autocast_dtype(q, k_pages, v_pages)
    check_attention(4, q=q, k_pages=k_pages, v_pages=v_pages)
    require_int("block_size", block_size, 1)
    check_pages(k_pages, page_table, key_end, q.shape[0])
    if block_indices is None:
        check_page_means("block_means", block_means, k_pages, block_size)
    else:
        topk = check_block_indices(block_indices, q, k_pages.shape[2], topk, own_block, block_means=block_means)
    sequences = _paged_sequences(q.shape[1], k_pages, page_table, key_end)
    if q.shape[1] > MAX_DECODE_QUERIES:
        k_pages, v_pages = sequences.gather_pages(k_pages), sequences.gather_pages(v_pages)
        sequences = sequences.without_pages()
    call = Call(
        block_size=block_size, topk=topk, scale=scale, softcap=softcap, sinks=sinks, keep_first=keep_first,
        keep_recent=keep_recent, router=router, own_block=own_block, backend=backend, return_lse=return_lse,
        return_routing=return_routing,
    )  # fmt: skip
    by_means = None if sequences.page_table is None else block_means
    return route_and_attend(q, k_pages, v_pages, sequences, call, block_indices=block_indices, block_means=by_means)


def _paged_sequences(num_queries: int, pages: Tensor, page_table: Tensor, key_end: Tensor | None) -> Sequences:
    """The sequences of checked pages; checks the page numbers."""
    num_keys = page_table.shape[1] * pages.shape[1]
    sequences = Sequences(page_table.shape[0], num_queries, num_keys, key_end=key_end, page_table=page_table)
    check_page_numbers(sequences, pages.shape[0])
    return sequences


class Phase:
    """Whether a cache is used for a prefill; one object, shared by the cache's layers."""

    is_prefill = False


class CachedMeans:
    """The means of the finished blocks of one layer, kept current by the attention function.

    Attributes:
        means: [B, G, N, D], with room for the blocks of all keys that there is room for; None before the first use.
        phase: whether a prefill is under way.
        is_static: whether the means keep their memory, as a static cache's keys do.
    """

    def __init__(self, phase: Phase, *, is_static: bool = False) -> None:
        self.phase = phase
        self.is_static = is_static
        self.means: Tensor | None = None
        self._block_size = 0
        self._key_start: Tensor | None = None
        self._room = 0
        self._num_new = 0
        self._has_keys = False
        self._is_complete = True  # except for the noted keys

    def note(self, num_new: int, room: int) -> None:
        """Note that `num_new` keys were appended to a layer with room for `room`."""
        if self._num_new:
            self._is_complete = False
        self._num_new, self._room = num_new, room

    def update(
        self, k: Tensor, *, block_size: int, key_start: Tensor | None, key_end: Tensor | None, backend: str
    ) -> Tensor:
        """Compute the means of the blocks that the noted keys finished.

        If some keys were not seen, because another attention ran, or the blocks have another size, compute all means.

        Args:
            k: [B, S, G, D], all keys of the layer.
            block_size, key_start, key_end, backend: as in `moba_attention`. A row that begins elsewhere than before is
                noticed on a CPU only, because a GPU is not waited for.

        Returns:
            [B, N, G, D], as `moba_attention` takes them.
        """
        is_continued = self._is_complete and (not self._has_keys or self._fits(k, block_size, key_start))
        means = self._with_room(k, block_size)
        append_block_means(
            means, k, num_new=self._num_new if is_continued else k.shape[1], block_size=block_size,
            key_start=key_start, key_end=key_end, backend=backend,
        )  # fmt: skip
        self._block_size, self._key_start = block_size, key_start
        self._num_new, self._has_keys, self._is_complete = 0, True, True
        return means

    def skip(self) -> None:
        """Drop the means. If the layer needs them later, `update` computes them all."""
        self.means, self._num_new, self._is_complete = None, 0, False

    def reset(self) -> None:
        """Start anew: the layer's keys are gone."""
        self._num_new, self._has_keys, self._is_complete = 0, False, True

    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select rows as `take` did with the layer's keys."""
        self.means = None if self.means is None else take(self.means)
        self._key_start = None if self._key_start is None else take(self._key_start)

    def _fits(self, k: Tensor, block_size: int, key_start: Tensor | None) -> bool:
        """Whether the means so far belong to these keys, cut into these blocks."""
        means = self.means
        if means is None or self._block_size != block_size or means.dtype != k.dtype or means.device != k.device:
            return False
        if k.device.type != "cpu" or torch.compiler.is_compiling():
            return True
        zero = torch.zeros(k.shape[0], dtype=torch.int32)
        before, now = (zero if start is None else start for start in (self._key_start, key_start))
        return torch.equal(before, now)

    def _with_room(self, k: Tensor, block_size: int) -> Tensor:
        """The means [B, N, G, D] with room for every block; earlier means keep their places."""
        shape = (k.shape[0], k.shape[2], self._room // block_size, k.shape[3])
        means = self.means
        if means is None or means.shape != shape or means.dtype != k.dtype or means.device != k.device:
            with torch.inference_mode(False):
                self.means = torch.empty(shape, dtype=k.dtype, device=k.device)
            if self.is_static and not torch.compiler.is_compiling():
                # As transformers marks static keys: torch.compile refuses CUDA graphs that write to unmarked inputs.
                torch._dynamo.mark_static_address(self.means)
            if means is not None and means.shape[:2] == shape[:2]:
                num_kept = min(means.shape[2], shape[2])
                self.means[:, :, :num_kept] = means[:, :, :num_kept]
        assert self.means is not None
        return self.means.transpose(1, 2)
