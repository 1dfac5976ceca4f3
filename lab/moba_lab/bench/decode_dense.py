"""What a user would decode with instead: every way to dense attention over a cache that this installation offers.

All take q [B, H, T, D] and k, v [B, G, S, D] and attend to every key. With one query a sequence, the query heads of a
kv head are the same as so many queries of one head: baselines called "as queries" read each key once by that identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]

CUDA_BACKENDS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_baselines(device: torch.device, num_queries: int, flex: bool) -> dict[str, Dense]:
    """Dense decode steps by name; whether each runs on given tensors is for the caller to find out."""
    if device.type != "cuda":
        backends: dict[str, SDPBackend | None] = {"SDPA": None}
    else:
        backends = {f"SDPA {name}": backend for name, backend in CUDA_BACKENDS.items()}
    baselines: dict[str, Dense] = {}
    for name, backend in backends.items():
        baselines[name] = _sdpa(backend, as_queries=False)
        if num_queries == 1:
            baselines[f"{name}, as queries"] = _sdpa(backend, as_queries=True)
    if flex:
        baselines["FlexAttention"] = _flex()
    if device.type == "cuda":
        baselines |= _flash_attention()
    return baselines


def _sdpa(backend: SDPBackend | None, as_queries: bool) -> Dense:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, mask = q.shape, None
        if as_queries:
            q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        elif q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril_(k.shape[2] - q.shape[2])
        is_grouped = q.shape[1] != k.shape[1]
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
        return out.reshape(shape)

    return attend


def _flex() -> Dense:
    """FlexAttention, whose compiled kernel for few queries splits the keys."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(key <= query + (k.shape[2] - q.shape[2]), score, -torch.inf)

        score_mod = None if q.shape[2] == 1 else causal
        return compiled(q, k, v, score_mod=score_mod, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _flash_attention() -> dict[str, Dense]:
    """FlashAttention's own packages, where they are installed."""
    found: dict[str, Dense] = {}
    try:
        from flash_attn import flash_attn_with_kvcache

        found["flash_attn"] = _with_kvcache(flash_attn_with_kvcache)
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_with_kvcache as fa3_with_kvcache

        found["FA3"] = _with_kvcache(fa3_with_kvcache)
    except ImportError:
        pass
    return found


def _with_kvcache(function: Callable[..., Tensor]) -> Dense:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)

    return attend
