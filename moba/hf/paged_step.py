"""MoBA over the pages of transformers' continuous batching: what one forward pass reads and writes, layer by layer.

Letters: R requests, T query tokens of each, S key tokens, H query heads, G key/value heads, D head dim, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from moba.block_means import append_block_means, moba_attention_paged
from moba.config import MoBAConfig
from moba.hf.attention import refuse_unknown
from moba.hf.pages import PageBook
from moba.sequences import page_means_shape

# What continuous batching passes through the model to every layer, by the names of any version served here.
FROM_THE_MANAGER = frozenset(
    {
        "cu_seq_lens_q",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_length_q",
        "max_seqlen_k",
        "max_seqlen_q",
        "position_ids",
        "read_index",
        "write_index",
    }
)


@torch.compiler.disable
def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any = None,
    block_table: Tensor | None = None,
    cu_seq_lens_k: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer while a manager serves the model.

    Args:
        module: the attention layer, with its layer_idx.
        query: [1, H, total, D], the requests' tokens one after another. key, value: [1, G, total, D], the new ones.
        attention_mask: None.
        cache, block_table, cu_seq_lens_k: the manager's cache; for a batch of decode steps its page tables.
        dropout, scaling, is_causal, kwargs: as for `moba_attention_forward`.

    Returns:
        [1, total, H, D] and None for the attention weights.

    Raises:
        ValueError: outside a manager that `enable_paged` made, and for what MoBA cannot honour.
    """
    pages: PagedMoBA | None = getattr(cache, "moba", None)
    if pages is None or attention_mask is not None:
        raise ValueError("a manager of enable_paged is serving this model: stop it before calling the model otherwise")
    refuse_unknown(module, dropout, is_causal, {k: v for k, v in kwargs.items() if k not in FROM_THE_MANAGER})
    layer: Any = module.layer_idx
    if layer == 0:
        pages.start_step(query.shape[2], block_table, cu_seq_lens_k)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return pages.attend(layer, q, k, v, scaling)[None], None


@dataclass(frozen=True)
class Piece:
    """Some requests' tokens of one forward pass, as many of each, that attend alike.

    Args:
        rows: which of the packed tokens: R · T of them.
        page_table: int32 [R, pages].
        key_end: int32 [R], keys of each request, its T tokens the last of them.
        num_queries: T.
        num_keys: the keys of the one request where T > 1.
        is_dense: full attention whatever the layer.
        page, place: int64 [R, T], where the tokens' keys and values go.
    """

    rows: slice | Tensor
    page_table: Tensor
    key_end: Tensor
    num_queries: int
    num_keys: int
    is_dense: bool
    page: Tensor
    place: Tensor

    def of(self, packed: Tensor) -> Tensor:
        """This piece's rows of [total, heads, D]: [R, T, heads, D]."""
        return packed[self.rows].unflatten(0, (-1, self.num_queries))


class PagedMoBA:
    """The block means beside the pages of one cache, and the forward pass under way.

    A page's means are written in the step that finishes the block, before any other request can be given the page, and
    copied when transformers copies the page; a freed page's stay until its next owner finishes a block of its own.
    """

    def __init__(self, processor: Any, book: PageBook, config: MoBAConfig, num_layers: int) -> None:
        self._processor = processor
        self._book = book
        self._config = config
        self._pieces: list[Piece] = []
        self._pages = [book.pages(layer) for layer in range(num_layers)]
        self._means: list[Tensor | None] = [
            None if config.is_full_layer(layer, num_layers) else k.new_empty(page_means_shape(k, config.block_size))
            for layer, (k, _) in enumerate(self._pages)
        ]
        book.on_copy(self._copy_means)

    def start_step(self, num_tokens: int, block_table: Tensor | None, cu_seq_lens_k: Any) -> None:
        """Lay out a forward pass over `num_tokens` packed tokens, once for all layers.

        With a block table nothing is read on the host, so that a CUDA graph can hold it.
        """
        if block_table is None:
            self._pieces = self._lay_out(self._requests())
            return
        cu = next(iter(cu_seq_lens_k.values())) if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
        table = block_table[0]
        if not any(self._processor.cb_config.cuda_graph_booleans):
            longest = max(request.state.position_offset for request in self._requests())
            table = table[:, : -(-longest // self._book.page_size)]
        pages = (table // self._book.table_step).masked_fill(table < 0, self._book.trash)
        self._pieces = [self._piece(slice(0, num_tokens), pages.int(), cu.diff().int(), 1, 0, False)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Store the new keys and values and attend: q [total, H, D], k, v [total, G, D] -> [total, H, D]."""
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        (k_pages, v_pages), means = self._pages[layer], self._means[layer]
        config = self._config
        for piece in self._pieces:
            k_pages[piece.page, piece.place] = piece.of(k)
            v_pages[piece.page, piece.place] = piece.of(v)
            if means is not None:
                append_block_means(
                    means,
                    k_pages,
                    num_new=piece.num_queries,
                    block_size=config.block_size,
                    key_end=piece.key_end,
                    page_table=piece.page_table,
                    backend=config.backend,
                )
            if means is None or piece.is_dense:
                result = _dense(piece, piece.of(q), k_pages, v_pages, scale)
            else:
                result = moba_attention_paged(
                    piece.of(q),
                    k_pages,
                    v_pages,
                    page_table=piece.page_table,
                    key_end=piece.key_end,
                    block_means=means,
                    scale=scale,
                    backend=config.backend,
                    **config.selection,
                )
            out[piece.rows] = result.flatten(0, 1)
        return out

    def _requests(self) -> list[Any]:
        """What transformers put into this forward pass, in the order of its tokens."""
        io = self._processor.inputs_and_outputs
        if hasattr(io, "io_pairs"):
            io = io.io_pairs[io.current_pair].host_io
        return io.requests_in_batch

    def _lay_out(self, requests: list[Any]) -> list[Piece]:
        """Pieces of a forward pass over prompts and decode steps: single tokens together, the rest one by one."""
        pieces: list[Piece] = []
        singles: dict[bool, list[tuple[int, list[int], int]]] = {False: [], True: []}
        start = 0
        for request in requests:
            state, num_queries = request.state, request.query_length
            table, end = self._book.table(state.request_id), state.position_offset
            num_dense = self._num_dense(request)
            for count, key_end, is_dense in ((num_queries - num_dense, end - num_dense, False), (num_dense, end, True)):
                if count == 1:
                    singles[is_dense].append((start, table, key_end))
                elif count:
                    rows = slice(start, start + count)
                    pieces.append(self._host_piece(rows, [table], [key_end], count, is_dense))
                start += count
        for is_dense, tokens in singles.items():
            if tokens:
                at, tables, ends = map(list, zip(*tokens, strict=True))
                index = torch.tensor(at, device=self._device)
                pieces.append(self._host_piece(index, tables, ends, 1, is_dense))
        return pieces

    def _num_dense(self, request: Any) -> int:
        """How many of a request's tokens in this forward pass are its own output and need full attention."""
        if self._config.decode == "moba":
            return 0
        state, num_queries, page_size = request.state, request.query_length, self._book.page_size
        # A request that was evicted reads its own output again, and not as a prompt.
        num_prompt = state._true_initial_tokens or len(state.initial_tokens)
        end = state.position_offset
        if request.complete_blocks:
            num_shared = min(end, num_prompt) // page_size - (end - num_queries) // page_size
            self._book.share_at_most(request, max(num_shared, 0))
        return min(max(end - num_prompt, 0), num_queries)

    def _host_piece(
        self, rows: slice | Tensor, tables: list[list[int]], ends: list[int], num_queries: int, is_dense: bool
    ) -> Piece:
        width = -(-max(ends) // self._book.page_size)
        padded = [(table[:width] + [self._book.trash] * width)[:width] for table in tables]
        pages, key_end = (torch.tensor(x, dtype=torch.int32).to(self._device) for x in (padded, ends))
        return self._piece(rows, pages, key_end, num_queries, max(ends), is_dense)

    def _piece(
        self, rows: slice | Tensor, pages: Tensor, key_end: Tensor, num_queries: int, num_keys: int, is_dense: bool
    ) -> Piece:
        position = key_end[:, None].long() - num_queries + torch.arange(num_queries, device=key_end.device)
        place = position.clamp(min=0)
        page = pages.long().gather(1, place // self._book.page_size)
        page = page.masked_fill(position < 0, self._book.trash)
        return Piece(rows, pages, key_end, num_queries, num_keys, is_dense, page, place % self._book.page_size)

    def _copy_means(self, source: list[int], target: list[int]) -> None:
        if not source:
            return
        for means in self._means:
            if means is not None:
                means[target] = means[source]

    @property
    def _device(self) -> torch.device:
        return self._pages[0][0].device


def _dense(piece: Piece, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float | None) -> Tensor:
    """Full attention of q [R, T, H, D] over keys copied out of their pages."""
    k, v = (pages[piece.page_table.long()].flatten(1, 2) for pages in (k_pages, v_pages))
    mask: Any = None
    if piece.num_queries > 1:
        k, v = k[:, : piece.num_keys], v[:, : piece.num_keys]
        if piece.num_queries < piece.num_keys:
            mask = causal_lower_right(piece.num_queries, piece.num_keys)
    else:
        real = torch.arange(k.shape[1], device=k.device) < piece.key_end[:, None]
        # Pages that nobody has written to can hold NaN, which no mask stops.
        k, v = (x.masked_fill(~real[..., None, None], 0) for x in (k, v))
        mask = real[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)
    return out if piece.num_queries > 1 else out.masked_fill((piece.key_end == 0)[:, None, None, None], 0)
