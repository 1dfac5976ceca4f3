"""The correctness gate: sampled rows of the very tensors that are timed, against an fp64 computation."""

from __future__ import annotations

import torch
from torch import Tensor

from moba.routing import Routing, mean_keys

# ‖out − exact‖ / ‖exact‖ that rounding explains, per dtype of the inputs.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
NUM_QUERIES, NUM_SAMPLES = 8, 3


def samples(count: int, most: int = NUM_SAMPLES) -> list[int]:
    """At most so many numbers below `count`, evenly spread, the first and the last among them."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def find_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    routing: Routing,
    topk: int,
    d_out: Tensor | None = None,
    d_q: Tensor | None = None,
    means: Tensor | None = None,
    router: str = "mean",
) -> str | None:
    """Compare sampled queries of all heads with fp64; None if they agree, else what does not.

    Args:
        q, out, d_out, d_q: [B, T, H, D], the last T positions. k, v: [B, S, G, D]. routing: of the same call.
        means: [B, N, G, D], the block means of a cache; None: they are computed here.
        router: "mean", or "shared", with which the query heads of a key/value head choose together.

    The blocks chosen may differ from fp64's only where their scores are closer than the error of an fp32 sum.
    """
    block_size, group, before = routing.block_size, q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    errors: dict[str, list[float]] = {"out": [], "d_q": []}
    for row in samples(q.shape[0]):
        for kv_head in range(k.shape[2]):
            one = slice(kv_head, kv_head + 1)
            found = mean_keys(k[row : row + 1, :, one], block_size) if means is None else means[row : row + 1, :, one]
            scored = found[0, :, 0].double()
            for query in samples(q.shape[1], NUM_QUERIES):
                position = before + query
                own = position // block_size
                heads = range(kv_head * group, (kv_head + 1) * group)
                vectors = q[row, query, heads.start : heads.stop].double()
                for head, vector in zip(heads, vectors, strict=True):
                    blocks = routing.indices[row, query, head]
                    blocks = blocks[blocks >= 0].long()
                    scorers = vectors if router == "shared" else vector[None]
                    if problem := check_blocks(scorers, scored[:own], blocks.tolist(), own, topk):
                        return f"routing of row {row}, query {query}, head {head}: {problem}"
                    keys = (blocks[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()
                    keys = keys[keys <= position]
                    chosen_k, chosen_v = k[row, keys, kv_head].double(), v[row, keys, kv_head].double()
                    scale = vector.shape[0] ** -0.5
                    weights = torch.softmax(scale * (chosen_k @ vector), dim=0)
                    errors["out"].append(relative_error(out[row, query, head], weights @ chosen_v))
                    if d_out is not None and d_q is not None and position > 0:  # one key's weight has no gradient
                        through = chosen_v @ d_out[row, query, head].double()
                        mean = weights @ through
                        exact = scale * ((weights * (through - mean)) @ chosen_k)
                        # Where one key has all the weight the terms cancel, but not their roundings.
                        terms = weights * (through.abs() + mean.abs()) * chosen_k.norm(dim=1)
                        size = torch.maximum(exact.norm(), scale * terms.norm())
                        errors["d_q"].append(((d_q[row, query, head].double() - exact).norm() / size).item())
    # A gradient passes through two roundings of what the output passes through one.
    return _judge("out", errors["out"], BOUND[q.dtype]) or _judge("d_q", errors["d_q"], 2 * BOUND[q.dtype])


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


def check_dense(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> str | None:
    """Compare sampled heads of a dense step's last query with fp64: q, out [B, H, T, D], k, v [B, G, S, D]."""
    group, errors = q.shape[1] // k.shape[1], []
    for row in samples(q.shape[0]):
        for head in samples(q.shape[1]):
            vector, keys, values = q[row, head, -1].double(), k[row, head // group], v[row, head // group]
            # In pieces that take little memory.
            logits = torch.cat([part.double() @ vector for part in keys.split(1 << 16)]) * vector.shape[0] ** -0.5
            parts = zip(torch.softmax(logits, dim=0).split(1 << 16), values.split(1 << 16), strict=True)
            exact = torch.stack([weights @ part.double() for weights, part in parts]).sum(dim=0)
            errors.append(relative_error(out[row, head, -1], exact))
    # Over so many keys an output is small beside its parts, each rounded: twice the bound of the sparse step.
    return _judge("out", errors, 2 * BOUND[q.dtype])


def check_blocks(queries: Tensor, means: Tensor, blocks: list[int], own: int, topk: int) -> str | None:
    """Whether queries [n, D] together chose their best blocks of the means [own, D], in fp64; None or what is wrong."""
    if blocks != sorted(set(blocks)) or blocks[-1:] != [own] or len(blocks) != min(topk, own + 1):
        return f"{blocks} is not {min(topk, own + 1)} ascending blocks ending in the own block {own}"
    left_out = sorted(set(range(own)) - set(blocks))
    if not left_out or len(blocks) == 1:
        return None
    scores = means @ queries.mean(dim=0)
    error = queries.shape[1] * 2**-23 * (means.abs() @ queries.abs().mean(dim=0)).max()
    gap = scores[left_out].max() - scores[blocks[:-1]].min()
    return f"a block left out scores {gap:.2e} above one chosen" if gap > error else None


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in fp64."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _judge(name: str, errors: list[float], bound: float) -> str | None:
    if all(error <= bound for error in errors):
        return None
    return f"relative error of {name} is {max(errors, key=lambda e: (e != e, e)):.1e}, more than {bound:.0e}"
