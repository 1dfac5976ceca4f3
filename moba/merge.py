"""Merging partial attention results: softmax over a union of key sets from softmaxes over its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.numerics import accumulation_dtype


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P partial attentions of the same queries over disjoint sets of keys.

    lse = log Σ_p exp(lse_p);  out = Σ_p exp(lse_p − lse) · out_p

    Args:
        outs: [P, ..., D] floating; each part is normalised by its own softmax.
        lses: [P, ...] log-sum-exp of each part, natural log; -inf where a part has no key (its `out` is ignored).

    Returns:
        out [..., D] in the dtype of `outs`, zeros where no part has a key;
        lse [...] in fp32 (fp64 for fp64), -inf there.

    Raises:
        ValueError: if the shapes do not match.

    Numerics: weights and sums in fp32 (fp64 for fp64), rounded once. Differentiable.
    """
    if outs.ndim < 2 or outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs must be [P, ..., D] and lses [P, ...], got {tuple(outs.shape)} and {tuple(lses.shape)}")
    wide = accumulation_dtype(outs.dtype)
    lses = lses.to(wide)
    has_key = lses != -torch.inf
    # Rows without a key sum zeros in place of -inf, because the gradient of log 0 is NaN; their lse is set below.
    is_empty = ~has_key.any(dim=0)
    lse = torch.logsumexp(lses.masked_fill(is_empty, 0.0), dim=0)
    weights = torch.exp(lses - lse)
    lse = lse.masked_fill(is_empty, -torch.inf)
    out = torch.zeros(outs.shape[1:], dtype=wide, device=outs.device)
    for part, weight, is_used in zip(outs, weights, has_key, strict=True):
        out.addcmul_(part.to(wide).masked_fill(~is_used[..., None], 0.0), weight[..., None])
    return out.to(outs.dtype), lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has one more term in its denominator, exp(sink), that brings no value.

    out' = sigmoid(lse − sink) · out;  lse' = log(exp(lse) + exp(sink)) = lse − log sigmoid(lse − sink)

    Args:
        out: [..., H, D], lse: [..., H] of the softmax without it.
        sinks: floating [H]; -inf stands for none.

    Returns:
        out and lse in their dtypes. Where a query has no key, zeros and -inf as before. Differentiable in all three.
    """
    is_empty = lse == -torch.inf
    gap = (lse - sinks.to(lse.dtype)).masked_fill(is_empty, 0.0)
    scaled = (out * torch.sigmoid(gap)[..., None]).to(out.dtype)
    return scaled, lse - F.logsigmoid(gap)
