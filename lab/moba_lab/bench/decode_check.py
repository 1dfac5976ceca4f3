"""The correctness gate of `moba bench decode`: sampled heads of the very tensors that are timed, against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from moba.routing import Routing
from moba_lab.bench.check import BOUND, check_blocks, relative_error

NUM_SAMPLES = 3


def samples(count: int) -> list[int]:
    """At most NUM_SAMPLES numbers below `count`, the first and the last among them."""
    return sorted({round(i * (count - 1) / (NUM_SAMPLES - 1)) for i in range(NUM_SAMPLES)})


def check_means(means: Tensor, k: Tensor, block_size: int) -> str | None:
    """Compare sampled heads of the block means [B, N, G, D] of keys [B, S, G, D] with fp64; None or what is wrong."""
    num_blocks = k.shape[1] // block_size
    half_a_unit = torch.finfo(k.dtype).eps / 2
    for row in samples(k.shape[0]):
        for head in samples(k.shape[2]):
            keys = k[row, : num_blocks * block_size, head].unflatten(0, (num_blocks, block_size))
            exact = torch.cat([part.double().mean(dim=1) for part in keys.split(4096)])
            actual = means[row, :num_blocks, head].double()
            # One rounding, after a sum in fp32 of numbers of order one.
            bound = 1.01 * half_a_unit * exact.abs() + 2e-6
            if not bool(((actual - exact).abs() <= bound).all()):
                return f"block means of row {row}, head {head} are off by {(actual - exact).abs().max():.1e}"
    return None


def check_step(q: Tensor, k: Tensor, v: Tensor, means: Tensor, out: Tensor, routing: Routing, topk: int) -> str | None:
    """Compare sampled heads of one step with fp64; None if they agree, else what does not.

    Args:
        q, out: [B, T, H, D]. k, v: [B, S, G, D]. means: [B, N, G, D]. routing: of the same call.

    The blocks chosen may differ from fp64's only where their scores are closer than the error of an fp32 sum.
    """
    num_queries, num_heads, num_keys = q.shape[1], q.shape[2], k.shape[1]
    block_size, group = routing.block_size, num_heads // k.shape[2]
    errors = []
    for row in samples(q.shape[0]):
        for query in samples(num_queries):
            position = num_keys - num_queries + query
            own = position // block_size
            for head in samples(num_heads):
                where = f"row {row}, query {query}, head {head}"
                kv_head = head // group
                blocks = routing.indices[row, query, head]
                blocks = blocks[blocks >= 0].long()
                vector = q[row, query, head].double()
                scored = means[row, :own, kv_head].double()
                if problem := check_blocks(vector, scored, blocks.tolist(), own, topk):
                    return f"routing of {where}: {problem}"
                keys = (blocks[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()
                keys = keys[keys <= position]
                exact = _attend(vector, k[row, keys, kv_head], v[row, keys, kv_head])
                errors.append(relative_error(out[row, query, head], exact))
    return _judge(errors, q.dtype)


def check_dense(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str | None:
    """Compare sampled heads of a dense step with fp64: q, out [B, H, T, D], k, v [B, G, S, D]."""
    group = q.shape[1] // k.shape[1]
    errors = []
    for row in samples(q.shape[0]):
        for head in samples(q.shape[1]):
            last = q.shape[2] - 1
            exact = _attend(q[row, head, last].double(), k[row, head // group], v[row, head // group])
            errors.append(relative_error(out[row, head, last], exact))
    # Over so many keys an output is small beside its parts, each rounded: twice the bound of the sparse step.
    return _judge(errors, q.dtype, slack=2.0)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(D^-0.5 · q Kᵀ) V of one query [D] in fp64, in pieces that take little memory."""
    logits = torch.cat([part.double() @ q for part in k.split(1 << 16)]) * q.shape[0] ** -0.5
    weights = torch.softmax(logits, dim=0)
    parts = zip(weights.split(1 << 16), v.split(1 << 16), strict=True)
    return torch.stack([weight @ part.double() for weight, part in parts]).sum(dim=0)


def _judge(errors: list[float], dtype: torch.dtype, slack: float = 1.0) -> str | None:
    bound = slack * BOUND[dtype]
    if all(error <= bound for error in errors):
        return None
    return f"relative error is {max(errors, key=lambda e: (e != e, e)):.1e}, more than {bound:.0e}"
