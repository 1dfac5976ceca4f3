"""Dense attention of a batch of small problems, forward and backward: what the pytorch backend is made of.

The backward takes the out and log-sum-exp of the whole softmax, of which a problem is only a part, as in ring
attention: p = exp(s − lse) is then this part's share of the weights.

Letters: C problems, H heads, M query rows, L keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba.routing import accumulation_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale · q Kᵀ) V and its log-sum-exp for each problem.

    Args:
        q: [C, H, M, D]. k, v: [C, H, L, D], any strides with a contiguous last dimension.
        is_causal: row i sees keys 0 … i only; M must equal L.

    Returns:
        out [C, H, M, D] in q's dtype, lse [C, H, M] in fp32 (fp64 for fp64).
    """
    if _has_flash_kernel(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    wide = accumulation_dtype(q.dtype)
    scores = _scores(q, k, scale, is_causal)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - lse[..., None]) @ v.to(wide)
    return out.to(q.dtype), lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through this part of a softmax.

    Args:
        d_out, d_lse: gradients of the whole softmax's out [C, H, M, D] and lse [C, H, M] (None for zero).
        out, lse: its results, as `forward` returns them. q, k, v, scale, is_causal: as in `forward`.

    Returns:
        d_q, d_k, d_v, shaped like q, k and v.
    """
    if _has_flash_kernel(q) and d_lse is None:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
    wide = accumulation_dtype(q.dtype)
    d_out = d_out.to(wide)
    weights = torch.exp(_scores(q, k, scale, is_causal) - lse[..., None])
    through = (d_out * out.to(wide)).sum(dim=-1)
    if d_lse is not None:
        through = through - d_lse
    d_scores = scale * weights * (d_out @ v.to(wide).mT - through[..., None])
    d_q = d_scores @ k.to(wide)
    d_k = d_scores.mT @ q.to(wide)
    d_v = weights.mT @ d_out
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _has_flash_kernel(q: Tensor) -> bool:
    """Whether torch offers, on this device, a fused kernel that also gives the log-sum-exp."""
    return q.device.type == "cpu"


def _scores(q: Tensor, k: Tensor, scale: float, is_causal: bool) -> Tensor:
    wide = accumulation_dtype(q.dtype)
    scores = scale * (q.to(wide) @ k.to(wide).mT)
    if not is_causal:
        return scores
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill_(future, -torch.inf)
