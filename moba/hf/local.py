"""Layers of hybrid models that read a sliding window or a chunk: they attend as their model defines it, not with MoBA.

Every query reads the keys from a first to a last one, so a run of queries needs a slice of the keys and a small mask:
nothing is T × S.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba.hf.layout import Local, PackedRows, PaddedRows, local_width
from moba.numerics import to_autocast_dtype

# Queries that are read at once: at least these, and as many as a window is wide up to the second.
_LEAST, _MOST = 256, 1024


def attend_locally(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PaddedRows | PackedRows,
    scaling: float | None,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a layer whose `rows.local` says how far it reads.

    Args:
        module: the attention layer. query: [B, H, T, D]. key, value: [B, G, S, D]. scaling: factor of the logits.
        rows: the layout of the rows.
        sinks: [H], logits of a key without a value. softcap: the logits' bound, approached as tanh does.

    Returns:
        [B, T, H, D].
    """
    assert rows.local is not None
    query, key, value = to_autocast_dtype(query, key, value)
    num_queries, num_keys = query.shape[2], key.shape[2]
    width = local_width(module.config, rows.local)
    low, high = _bounds(rows, width, num_queries, num_keys)
    column = torch.arange(num_keys, device=key.device)
    step = max(_LEAST, min(width, _MOST))
    # Not more keys than a window holds may be a static cache's, whose last ones are empty; then all are looked at.
    offset, is_short = num_keys - num_queries, num_keys <= width
    parts = []
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        keys = slice(0, num_keys) if is_short else slice(max(0, offset + start - width + 1), offset + stop)
        mask = (column[keys] >= low[:, start:stop, None]) & (column[keys] <= high[:, start:stop, None])
        part = query[:, :, start:stop], key[:, :, keys], value[:, :, keys]
        if sinks is None and softcap is None:
            parts.append(sdpa_attention_forward(module, *part, mask[:, None], scaling=scaling)[0])
        elif torch.is_grad_enabled():
            # Else every run's probabilities would be kept.
            parts.append(checkpoint(_attend, *part, mask, scaling, sinks, softcap, use_reentrant=False))
        else:
            parts.append(_attend(*part, mask, scaling, sinks, softcap))
    return torch.cat(parts, dim=1)


def _bounds(rows: PaddedRows | PackedRows, width: int, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query reads, [B, T] each; none where the first is behind the last."""
    if isinstance(rows, PaddedRows):
        token = torch.arange(num_queries, device=rows.query_end.device)
        token = token + (rows.query_end - num_queries)[:, None]
        first = rows.key_start[:, None].expand_as(token)
        high = torch.minimum(token, rows.real_end[:, None] - 1)
    else:
        cu = rows.cu_seqlens
        token = torch.arange(num_keys, device=cu.device, dtype=cu.dtype).expand(cu.shape[0], -1).contiguous()
        first = cu.gather(1, torch.searchsorted(cu, token, right=True) - 1)
        high = token
    return torch.maximum(first, _low(rows.local, token, first, width)), high


def _low(local: Local | None, token: Tensor, first: Tensor, width: int) -> Tensor:
    if local == "sliding":
        return token - width + 1
    return first + torch.div(token - first, width, rounding_mode="floor") * width


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention by its formula, logits and softmax in fp32: [B, H, T, D] and [B, G, S, D] to [B, T, H, D]."""
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q @ k.transpose(2, 3)).to(wide) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # A finite bound, so that a row that reads nothing has no NaN.
        logits = logits.masked_fill(~mask[:, None], torch.finfo(wide).min)
        if sinks is not None:
            sink = sinks.to(wide)[None, :, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], dim=3)
        probabilities = logits.softmax(dim=3)[..., : k.shape[2]].masked_fill(~mask[:, None], 0)
        return (probabilities.to(v.dtype) @ v).transpose(1, 2).contiguous()
