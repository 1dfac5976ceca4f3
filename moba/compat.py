"""The names and arguments of the MoBA release's varlen functions, for code written against them."""

from __future__ import annotations

from torch import Tensor

from moba.attention import moba_attention_varlen
from moba.config import require_int


def moba_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """Call `moba_attention_varlen` with the arguments of the MoBA release and backend="auto".

    Args:
        q: [total, H, D].
        k, v: [total, G, D].
        cu_seqlens: int32 [num_sequences + 1], ascending from 0 to total.
        max_seqlen: at least the length of the longest sequence. Checking it reads cu_seqlens, which waits for a GPU.
        moba_chunk_size: block size.
        moba_topk: blocks a query attends to, its own included; 1 means the own block only.

    Returns:
        [total, H, D].

    Raises:
        ValueError: naming the argument, what it was, and what is valid.
    """
    return _varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk, "auto")


def moba_attn_varlen_naive(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int, moba_topk: int
) -> Tensor:
    """`moba_attn_varlen` on the mask-based reference: same arguments, same meaning, also at moba_topk = 1."""
    return _varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk, "reference")


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_size: int, topk: int, backend: str
) -> Tensor:
    require_int("max_seqlen", max_seqlen, 0)
    require_int("moba_chunk_size", block_size, 1)
    require_int("moba_topk", topk, 1)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.numel() > 1:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen must be at least the longest sequence, {longest}, got {max_seqlen}")
    out: Tensor = moba_attention_varlen(
        q, k, v, cu_seqlens=cu_seqlens, block_size=block_size, topk=topk, backend=backend
    )
    return out
