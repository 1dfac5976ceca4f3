"""What type checkers know of the results. mypy reads this file; nothing runs it."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from moba import Routing, moba_attention, moba_attention_paged, moba_attention_varlen


def batch(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert_type(moba_attention(q, k, v, block_size=8, topk=2), Tensor)
    assert_type(moba_attention(q, k, v, block_size=8, topk=2, return_lse=True), tuple[Tensor, Tensor])
    assert_type(moba_attention(q, k, v, block_size=8, topk=2, return_routing=True), tuple[Tensor, Routing])
    out, lse, routing = moba_attention(q, k, v, block_size=8, topk=2, return_lse=True, return_routing=True)
    assert_type((out, lse, routing), tuple[Tensor, Tensor, Routing])
    assert_type(moba_attention(q, k, v, block_size=8, routing=routing, router="mean"), Tensor)


def refused(q: Tensor, k: Tensor, v: Tensor) -> None:
    moba_attention(q, k, v, topk=2)  # type: ignore[call-overload]
    moba_attention(q, k, v, block_size=8, top_k=2)  # type: ignore[call-overload]


def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    assert_type(moba_attention_varlen(q, k, v, cu_seqlens=cu_seqlens, block_size=8, topk=2), Tensor)
    results = moba_attention_varlen(q, k, v, cu_seqlens=cu_seqlens, block_size=8, topk=2, return_routing=True)
    assert_type(results, tuple[Tensor, Routing])


def paged(q: Tensor, pages: Tensor, page_table: Tensor, key_end: Tensor, means: Tensor) -> None:
    results = moba_attention_paged(
        q,
        pages,
        pages,
        page_table=page_table,
        key_end=key_end,
        block_means=means,
        block_size=8,
        topk=2,
        return_lse=True,
    )
    assert_type(results, tuple[Tensor, Tensor])
