"""The correctness gate: sampled rows of the very tensors that are timed, against an fp64 computation."""

from __future__ import annotations

import torch
from torch import Tensor

from moba.routing import Routing, mean_keys

NUM_ROWS = 8

# ‖out − exact‖ / ‖exact‖ that rounding explains, per dtype of the inputs.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def sample_rows(num_queries: int) -> list[int]:
    """Rows spread over the sequence, the first and the last among them."""
    return sorted({round(i * (num_queries - 1) / (NUM_ROWS - 1)) for i in range(NUM_ROWS)})


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    routing: Routing,
    topk: int,
    d_out: Tensor | None = None,
    d_q: Tensor | None = None,
) -> str | None:
    """Compare sampled rows of one sequence with fp64; None if they agree, else what does not.

    Args:
        q: [1, T, H, D]. k, v: [1, T, G, D]. out, d_out, d_q: [1, T, H, D]. routing: of the same call.

    The blocks chosen may differ from fp64's only where their scores are closer than the error of an fp32 sum.
    """
    block_size, group = routing.block_size, q.shape[2] // k.shape[2]
    errors: dict[str, list[float]] = {"out": [], "d_q": []}
    for kv_head in range(k.shape[2]):
        means = mean_keys(k[:, :, kv_head : kv_head + 1], block_size)[0, :, 0].double()
        for row in sample_rows(q.shape[1]):
            for head in range(kv_head * group, (kv_head + 1) * group):
                query, own = q[0, row, head].double(), row // block_size
                blocks = routing.indices[0, row, head]
                blocks = blocks[blocks >= 0].long()
                if problem := check_blocks(query, means[:own], blocks.tolist(), own, topk):
                    return f"routing of row {row}, head {head}: {problem}"
                keys = (blocks[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()
                keys = keys[keys <= row]
                chosen_k, chosen_v = k[0, keys, kv_head].double(), v[0, keys, kv_head].double()
                weights = torch.softmax(query.shape[0] ** -0.5 * (chosen_k @ query), dim=0)
                exact = weights @ chosen_v
                errors["out"].append(relative_error(out[0, row, head], exact))
                if d_out is not None and d_q is not None and row > 0:  # a single key's weight has no gradient
                    through = chosen_v @ d_out[0, row, head].double()
                    d_scores = weights * (through - weights @ through)
                    exact = query.shape[0] ** -0.5 * (d_scores @ chosen_k)
                    errors["d_q"].append(relative_error(d_q[0, row, head], exact))
    # A gradient passes through two roundings of what the output passes through one.
    bounds = {"out": BOUND[q.dtype], "d_q": 2 * BOUND[q.dtype]}
    bad = [
        f"relative error of {name} is {max(found, key=lambda e: (e != e, e)):.1e}, more than {bounds[name]:.0e}"
        for name, found in errors.items()
        if not all(error <= bounds[name] for error in found)
    ]
    return "; ".join(bad) or None


def check_blocks(query: Tensor, means: Tensor, blocks: list[int], own: int, topk: int) -> str | None:
    """Whether a query [D] chose its best blocks among the means [own, D], in fp64; None or what is wrong."""
    if blocks != sorted(set(blocks)) or blocks[-1:] != [own] or len(blocks) != min(topk, own + 1):
        return f"{blocks} is not {min(topk, own + 1)} ascending blocks ending in the own block {own}"
    left_out = sorted(set(range(own)) - set(blocks))
    if not left_out or len(blocks) == 1:
        return None
    scores = means @ query
    error = query.shape[0] * 2**-23 * (means.abs() @ query.abs()).max()
    gap = scores[left_out].max() - scores[blocks[:-1]].min()
    return f"a block left out scores {gap:.2e} above one chosen" if gap > error else None


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in fp64."""
    return ((actual.double() - exact).norm() / exact.norm()).item()
