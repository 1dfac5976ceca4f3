"""MoBA by the definition, one query at a time in plain Python and fp64: what every backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def select(q, k, position, block_size, topk, keep_first=0, keep_recent=0):
    """Blocks that one query [D] selects among the keys [S, D] of its kv head: ascending list, own block last."""
    own = position // block_size
    means = [k[j * block_size : (j + 1) * block_size].double().mean(0).to(k.dtype).double() for j in range(own)]
    kept = set(range(min(keep_first, own))) | set(range(max(0, own - keep_recent), own))
    scores = {j: float(q.double() @ means[j]) for j in range(own) if j not in kept}
    places = min(topk - 1, own) - len(kept)
    best = sorted(scores, key=lambda j: (-scores[j], j))[:places]
    return sorted([*kept, *best, own])


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, *, block_size, topk, scale=None, softcap=None, sinks=None,
                    indices=None, **keep):  # fmt: skip
    """One sequence: q [T, H, D], k [S, G, D] and v [S, G, Dv] -> out, lse in fp64, indices [T, H, K].

    The indices are those given, if any. Differentiable.
    """
    given = indices
    num_queries, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(num_queries, num_heads, v.shape[2], dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -torch.inf, dtype=torch.float64)
    indices = torch.full((num_queries, num_heads, topk), -1, dtype=torch.int32)
    for row in range(num_queries):
        position = k.shape[0] - num_queries + row
        if position < 0:
            continue
        for head in range(num_heads):
            keys, values = k[:, head // group], v[:, head // group]
            if given is None:
                blocks = select(q[row, head].detach(), keys.detach(), position, block_size, topk, **keep)
            else:
                blocks = [j for j in given[row, head].tolist() if j >= 0]
            indices[row, head, : len(blocks)] = torch.tensor(blocks)
            chosen = [i for j in blocks for i in range(j * block_size, min((j + 1) * block_size, position + 1))]
            logits = scale * (keys[chosen].double() @ q[row, head].double())
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None and chosen:
                logits = torch.cat([logits, sinks[head].double()[None]])
            lse[row, head] = torch.logsumexp(logits, 0)
            out[row, head] = torch.softmax(logits, 0)[: len(chosen)] @ values[chosen].double()
    return out, lse, indices


def attend_batch(q: Tensor, k: Tensor, v: Tensor, *, key_start=None, key_end=None, **options):
    """A padded batch, row by row."""
    rows = []
    for b in range(q.shape[0]):
        start = 0 if key_start is None else int(key_start[b])
        end = k.shape[1] if key_end is None else int(key_end[b])
        rows.append(attend_sequence(q[b], k[b, start:end], v[b, start:end], **options))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
