"""FlexAttention with MoBA's routing as a BlockMask: dense tiles wherever any of a tile's queries chose the block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moba.routing import Routing


def flex_attention_of(routing: Routing, q: Tensor, k: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention over [1, T, H, D] tensors with the mask of `routing`, compiled.

    The mask looks up a table [H, T, N] of which queries chose which block. FlexAttention skips a tile of keys only if
    no query of a tile of queries needs it, which MoBA's own kernels do query by query.
    """
    chosen = routing.block_mask(-(-k.shape[1] // routing.block_size))[0].transpose(0, 1).contiguous()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen[head, query, key // routing.block_size] & (key <= query)

    mask = torch.compile(create_block_mask)(visible, 1, q.shape[2], q.shape[1], k.shape[1], device=q.device)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend
