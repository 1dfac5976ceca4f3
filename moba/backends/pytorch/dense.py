"""Dense attention of a batch of small problems, forward and backward: what the pytorch backend is made of.

The backward takes the out and log-sum-exp of the whole softmax, of which a problem is only a part, as in ring
attention: p = exp(s − lse) is then this part's share of the weights.

A causal product multiplies what its mask hides by weights of zero, and 0 · NaN is NaN. `is_careful` asks for the
slower way that never reads what is hidden, and that keeps weights at most 1 however large the logits are.

Letters: C problems, H heads, M query rows, L keys, D head dim, Dv that of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moba.merge import merge_partials
from moba.numerics import accumulation_dtype, padded_to


class Logits(NamedTuple):
    """How logits are made: x = scale · q Kᵀ with a scale larger than 0, or with a softcap c, c · tanh(x / c)."""

    scale: float
    softcap: float | None = None

    def of(self, q: Tensor, k: Tensor) -> Tensor:
        """[C, H, M, L] in the accumulation dtype."""
        wide = accumulation_dtype(q.dtype)
        scores = self.scale * (q.to(wide) @ k.to(wide).mT)
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of logits by what the softcap was given; None without one."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square_()


def holds_scores(q: Tensor, logits: Logits, d_lse: Tensor | None = None) -> bool:
    """Whether `forward`, and `backward` where d_lse is given, have all scores in memory at once."""
    return not _has_flash_kernel(q) or logits.softcap is not None or d_lse is not None


def forward(
    q: Tensor, k: Tensor, v: Tensor, logits: Logits, is_causal: bool, is_careful: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(logits) V and its log-sum-exp for each problem.

    Args:
        q: [C, H, M, D]. k: [C, H, L, D], v: [C, H, L, Dv], any strides with a contiguous last dimension.
        is_causal: row i sees keys 0 … i only; M must equal L.

    Returns:
        out [C, H, M, Dv] in q's dtype, lse [C, H, M] in fp32 (fp64 for fp64).
    """
    if is_careful and is_causal:
        return _careful_forward(q, k, v, logits)
    if not holds_scores(q, logits):
        rows = padded_to(max(q.shape[3], v.shape[3]), q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, is_causal, scale=logits.scale)
        return out[..., : v.shape[3]], lse
    wide = accumulation_dtype(q.dtype)
    scores = _causal(logits.of(q, k), is_causal)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - lse[..., None]) @ v.to(wide)
    return out.to(q.dtype), lse


def _careful_forward(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """Causal attention where some keys or values are not finite. Rows that see none of these get the same bits as
    without them.
    """
    out, lse = forward(q, k, v, logits, is_causal=True)
    is_bad = ~(torch.isfinite(k).all(dim=-1) & torch.isfinite(v).all(dim=-1))
    clean_k, clean_v = (x.masked_fill(is_bad[..., None], 0.0) for x in (k, v))
    clean_out, clean_lse = forward(q, clean_k, clean_v, logits, is_causal=True)
    seen_out, seen_lse = _forward_by_halves(q, k, v, logits=logits)
    sees_bad = is_bad.cumsum(dim=-1) > 0
    is_right = torch.isfinite(out).all(dim=-1)
    lse = torch.where(is_right, lse, torch.where(sees_bad, seen_lse, clean_lse))
    sees_bad, is_right = sees_bad[..., None], is_right[..., None]
    return torch.where(is_right, out, torch.where(sees_bad, seen_out, clean_out)), lse


def _forward_by_halves(q: Tensor, k: Tensor, v: Tensor, *, logits: Logits) -> tuple[Tensor, Tensor]:
    """Causal attention without a mask: a half of the rows sees all keys of the half before it, down to single rows."""
    half = q.shape[2] // 2
    if half == 0:
        return forward(q, k, v, logits, is_causal=False)
    first = _forward_by_halves(*(x[:, :, :half] for x in (q, k, v)), logits=logits)
    own = _forward_by_halves(*(x[:, :, half:] for x in (q, k, v)), logits=logits)
    before = forward(q[:, :, half:], k[:, :, :half], v[:, :, :half], logits, is_causal=False)
    second = merge_partials(*map(torch.stack, zip(before, own, strict=True)))
    out, lse = (torch.cat(parts, dim=2) for parts in zip(first, second, strict=True))
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    logits: Logits,
    is_causal: bool,
    is_careful: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through this part of a softmax.

    Args:
        d_out, d_lse: gradients of the whole softmax's out [C, H, M, Dv] and lse [C, H, M] (None for zero).
        out, lse: its results, as `forward` returns them. q, k, v, logits, is_causal: as in `forward`.

    Returns:
        d_q, d_k, d_v, shaped like q, k and v.
    """
    if not holds_scores(q, logits, d_lse) and not is_careful:
        head_dim, value_dim = q.shape[3], v.shape[3]
        d_out, q, k, v, out = padded_to(max(head_dim, value_dim), d_out, q, k, v, out)
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, is_causal, scale=logits.scale
        )
        return d_q[..., :head_dim], d_k[..., :head_dim], d_v[..., :value_dim]
    d_out = d_out.to(accumulation_dtype(q.dtype))
    through = (d_out * out).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        through = through - d_lse[..., None]
    if is_careful and is_causal:
        d_q, d_k, d_v = _backward_by_halves((d_out, through, q, lse), (k, v), logits)
    else:
        d_q, d_k, d_v = _backward_formula(d_out, through, q, lse, k, v, logits=logits, is_causal=is_causal)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _backward_formula(
    d_out: Tensor, through: Tensor, q: Tensor, lse: Tensor, k: Tensor, v: Tensor, *, logits: Logits, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the accumulation dtype; `through` [C, H, M, 1] is ⟨d_out, out⟩ − d_lse."""
    # Rounding may lift a logit above its row's sum, and by much if logits are huge.
    scores = logits.of(q, k)
    slope = logits.slope(scores)
    weights = (_causal(scores, is_causal) - lse[..., None]).clamp_(max=0.0).exp_()
    d_scores = logits.scale * weights * (d_out @ v.to(d_out.dtype).mT - through)
    if slope is not None:
        d_scores *= slope
    return d_scores @ k.to(d_out.dtype), d_scores.mT @ q.to(d_out.dtype), weights.mT @ d_out


def _backward_by_halves(
    rows: tuple[Tensor, ...], keys: tuple[Tensor, ...], logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `_forward_by_halves`. rows: d_out, through, q and lse. keys: k and v."""
    half = rows[0].shape[2] // 2
    if half == 0:
        return _backward_formula(*rows, *keys, logits=logits, is_causal=False)
    first, second = (tuple(x[:, :, some] for x in rows) for some in (slice(half), slice(half, None)))
    earlier, later = (tuple(x[:, :, some] for x in keys) for some in (slice(half), slice(half, None)))
    d_q_first, d_k_earlier, d_v_earlier = _backward_by_halves(first, earlier, logits)
    d_q_second, d_k_later, d_v_later = _backward_by_halves(second, later, logits)
    d_q_before, d_k_before, d_v_before = _backward_formula(*second, *earlier, logits=logits, is_causal=False)
    return (
        torch.cat((d_q_first, d_q_second + d_q_before), dim=2),
        torch.cat((d_k_earlier + d_k_before, d_k_later), dim=2),
        torch.cat((d_v_earlier + d_v_before, d_v_later), dim=2),
    )


def _has_flash_kernel(q: Tensor) -> bool:
    """Whether torch offers, on this device, a fused kernel that also gives the log-sum-exp."""
    return q.device.type == "cpu"


def _causal(scores: Tensor, is_causal: bool) -> Tensor:
    """Scores with those of later keys at -inf, in place."""
    if not is_causal:
        return scores
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return scores.masked_fill_(future, -torch.inf)
