"""What a user would pick instead of MoBA: every way to dense attention that this installation offers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba.routing import Routing

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_baselines(device: torch.device) -> dict[str, Dense]:
    """Causal attention over whole sequences [B, T, H, D], by name."""
    if device.type != "cuda":
        return {"dense": masked_sdpa}
    baselines = {
        "dense_fa2": lambda q, k, v: masked_sdpa(q, k, v, backend=SDPBackend.FLASH_ATTENTION),
        "dense_cudnn": lambda q, k, v: masked_sdpa(q, k, v, backend=SDPBackend.CUDNN_ATTENTION),
    }
    if fa3 := _from_package("flash_attn_interface", "flash_attn_func"):
        baselines["dense_fa3"] = lambda q, k, v: fa3(q, k, v, causal=True)
    return baselines


def packed_baselines(device: torch.device, num_documents: int) -> dict[str, Dense]:
    """Causal attention over [1, T, H, D] of packed documents of one length."""
    if device.type != "cuda":
        return {"dense": partial(_each_document, num_documents=num_documents)}
    from torch.nn.attention.varlen import varlen_attn

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1] // num_documents
        cu = torch.arange(0, q.shape[1] + 1, length, device=device, dtype=torch.int32)
        grouped: Any = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}  # of torch >= 2.12
        out: Any = varlen_attn(q[0], k[0], v[0], cu, cu, length, length, window_size=(-1, 0), **grouped)
        return out[None]

    return {"dense_varlen": varlen}


def _each_document(q: Tensor, k: Tensor, v: Tensor, num_documents: int) -> Tensor:
    q, k, v = (x[0].unflatten(0, (num_documents, -1)) for x in (q, k, v))
    return masked_sdpa(q, k, v).flatten(0, 1)[None]


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: SDPBackend | None = None
) -> Tensor:
    """Causal attention over [B, T, H, D], or under a boolean mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _sdpa(q, k, v, backend, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def flex_attention_of(routing: Routing, q: Tensor, k: Tensor) -> Dense:
    """FlexAttention over [1, T, H, D] tensors with the mask of `routing`, compiled.

    The mask looks up a table [H, T, N] of which queries chose which block. FlexAttention skips a tile of keys only if
    no query of a tile of queries needs it, which MoBA's own kernels do query by query.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    chosen = routing.block_mask(-(-k.shape[1] // routing.block_size))[0].transpose(0, 1).contiguous()

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen[head, query, key // routing.block_size] & (key <= query)

    mask = torch.compile(create_block_mask)(visible, 1, q.shape[2], q.shape[1], k.shape[1], device=q.device)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend


def decode_baselines(device: torch.device, num_queries: int, flex: bool) -> dict[str, Dense]:
    """Steps of decoding by name: q [B, H, T, D] attends to every key of k, v [B, G, S, D].

    With one query a sequence, the query heads of a kv head are the same as so many queries of one head: baselines
    called "as queries" read each key once by that identity. Whether each runs on given tensors is for the caller to
    find out.
    """
    backends: dict[str, SDPBackend | None] = {"SDPA": None}
    if device.type == "cuda":
        backends = {"SDPA FA2": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
                    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
    baselines: dict[str, Dense] = {}
    for name, backend in backends.items():
        baselines[name] = _step(backend, as_queries=False)
        if num_queries == 1:
            baselines[f"{name}, as queries"] = _step(backend, as_queries=True)
    if flex:
        baselines["FlexAttention"] = _flex_step()
    if device.type == "cuda":
        for name, package in (("flash_attn", "flash_attn"), ("FA3", "flash_attn_interface")):
            if with_kvcache := _from_package(package, "flash_attn_with_kvcache"):
                baselines[name] = _transposed(with_kvcache)
    return baselines


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, **options: Any) -> Tensor:
    """SDPA on [B, H, T, D]; by this backend alone if one is named."""
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _step(backend: SDPBackend | None, as_queries: bool) -> Dense:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, mask = q.shape, None
        if as_queries:
            q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        elif q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril_(k.shape[2] - q.shape[2])
        return _sdpa(q, k, v, backend, attn_mask=mask).reshape(shape)

    return attend


def _flex_step() -> Dense:
    """FlexAttention, whose compiled kernel for few queries splits the keys."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(key <= query + (k.shape[2] - q.shape[2]), score, -torch.inf)

        score_mod = None if q.shape[2] == 1 else causal
        return compiled(q, k, v, score_mod=score_mod, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _transposed(function: Callable[..., Tensor]) -> Dense:
    return lambda q, k, v: function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(
        1, 2
    )


def _from_package(package: str, name: str) -> Any:
    """A function of one of FlashAttention's own packages; None where it is not installed."""
    try:
        return getattr(import_module(package), name)
    except ImportError:
        return None
