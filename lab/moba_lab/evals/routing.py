"""How good the choice of blocks is: the attention mass that the chosen blocks hold, beside the best possible choice.

    mass(t, j) = Σ_{s in block j, s <= t} softmax_s(⟨q_t, k_s⟩ · scale)

Of a query with K places, `covered` is the mass of the blocks it attends to, `best` that of its own block and the K - 1
past blocks with the largest mass, `recent` that of its own, the first and the K - 2 nearest: what needs no router.

Letters: T queries, S keys, H query heads, G key/value heads, D head dim, N blocks, K = topk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from moba.hf.record import require_moba
from moba.numerics import full_fp32_matmul
from moba.routing import Routing
from moba_lab.evals.reader import chunk_tokens_for
from moba_lab.models.generation import prefill

# Probabilities of so many queries, heads and keys exist at once.
_ELEMENTS = 1 << 24

Observer = Callable[[int, Tensor, Tensor, Routing, float], None]


@contextmanager
def observe_layers(model: Any, observe: Observer) -> Iterator[None]:
    """Inside, `observe(layer, q, k, routing, scale)` is called for each MoBA layer in each forward pass.

    q is [T, H, D], k [S, G, D]: one sequence, no padding; the queries are the last T positions.

    Raises:
        ValueError: if the model's attention is not "moba" or "moba_naive".
    """
    name = require_moba(model)
    attention = AttentionInterface()[name]

    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen: list[Routing] = []
        result = attention(
            module, query, key, value, mask, observe=lambda module, routing: seen.append(routing), **options
        )
        if seen:
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            observe(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), seen[0], scale)
        return result

    AttentionInterface.register(name, call)
    try:
        yield
    finally:
        AttentionInterface.register(name, attention)


def block_mass(q: Tensor, k: Tensor, positions: Tensor, block_size: int, scale: float) -> Tensor:
    """The attention mass of each block.

    Args:
        q: [T, H, D]. k: [S, G, D]. positions: int64 [T], of the queries among the keys.

    Returns:
        fp32 [T, H, N], N = ceil(S / block_size); every row sums to 1. Numerics: fp32 throughout.
    """
    num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    num_blocks = -(-num_keys // block_size)
    queries = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, -1)
    mass = q.new_zeros(num_queries, num_heads, num_blocks * block_size, dtype=torch.float32)
    with full_fp32_matmul():
        scores = torch.einsum("tgmd,sgd->tgms", queries * scale, k.float()).reshape(num_queries, num_heads, num_keys)
    future = torch.arange(num_keys, device=q.device) > positions[:, None]
    mass[..., :num_keys] = scores.masked_fill(future[:, None], -torch.inf).softmax(dim=-1)
    return mass.unflatten(-1, (num_blocks, block_size)).sum(dim=-1)


def choice_masses(mass: Tensor, indices: Tensor, own: Tensor, topk: int) -> dict[str, Tensor]:
    """What choices of blocks cover, of masses fp32 [T, H, N].

    Args:
        indices: int [T, H, K], the blocks attended to, -1 for none. own: int64 [T], each query's own block.
        topk: K, the number of blocks a query may attend to.

    Returns:
        covered, best, recent: fp32 [T, H].
    """
    num_blocks = mass.shape[-1]
    block = torch.arange(num_blocks, device=mass.device)
    chosen = torch.where(indices >= 0, mass.gather(-1, indices.long().clamp(min=0)), 0.0).sum(dim=-1)
    of_own = mass.gather(-1, own[:, None, None].expand(-1, mass.shape[1], 1))[..., 0]
    past = mass.masked_fill((block >= own[:, None])[:, None], 0.0)
    best = of_own + past.topk(min(topk - 1, num_blocks), dim=-1).values.sum(dim=-1)
    near = (block <= own[:, None]) & (block >= own[:, None] - (topk - 2))
    near = near | (block == 0) if topk > 1 else block == own[:, None]
    return {"covered": chosen, "best": best, "recent": (mass * near[:, None]).sum(dim=-1)}


def routing_quality(
    model: Any,
    tokens: Tensor,
    *,
    needle: tuple[int, int] | None = None,
    num_question: int = 0,
    num_queries: int = 64,
    chunk_tokens: int = 1024,
) -> list[dict[str, Any]]:
    """Statistics of each layer and head that MoBA runs in, over some queries of a text.

    Args:
        model: a transformers model whose attention is "moba".
        tokens: int64 [T].
        needle: first and one past the last token that the question, the last `num_question` tokens, needs.
        num_question: 0 leaves the statistics of the needle out.
        num_queries: about so many queries, evenly spread, are looked at for the masses; all of the question's are.
        chunk_tokens: tokens read in one forward pass; None: as for `Reader`.

    Returns:
        for each layer and head: layer, head, the means of `covered`, `best` and `recent` over the sampled queries
        that have more past blocks than places (elsewhere every choice is the same), `num_queries` of them; with a
        needle also needle_chosen, the share of the question's tokens that attend to all blocks that hold the needle,
        and needle_mass, the attention mass that full attention over these queries and keys gives its blocks.

    Raises:
        ValueError: if the model's attention is not MoBA's, or the text is too short for any query to choose.
    """
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise ValueError(f"tokens must be int64 [T] with T >= 2, got shape {tuple(tokens.shape)}")
    first_question = tokens.numel() - num_question
    every = max(1, tokens.numel() // num_queries)
    sums: dict[int, dict[str, Tensor]] = {}

    def observe(layer: int, q: Tensor, k: Tensor, routing: Routing, scale: float) -> None:
        start = k.shape[0] - q.shape[0]
        position = torch.arange(start, k.shape[0], device=q.device)
        is_question = position >= first_question
        looked_at = ((position % every == every - 1) | (is_question & (needle is not None))).nonzero()[:, 0]
        at_once = max(1, _ELEMENTS // (q.shape[1] * k.shape[0]))
        for rows in looked_at.split(at_once):
            _add(sums.setdefault(layer, {}), q[rows], k, position[rows], routing.indices[0, rows], routing, scale)

    def _add(
        total: dict[str, Tensor],
        q: Tensor,
        k: Tensor,
        position: Tensor,
        indices: Tensor,
        routing: Routing,
        scale: float,
    ) -> None:
        size, topk = routing.block_size, routing.topk
        mass = block_mass(q, k, position, size, scale)
        own = position // size
        chooses = (own >= topk) & (position % every == every - 1)
        values = {name: value[chooses] for name, value in choice_masses(mass, indices, own, topk).items()}
        values["num_queries"] = values["covered"].new_ones(values["covered"].shape)
        if needle is not None:
            asks = position >= first_question
            blocks = torch.arange(needle[0] // size, (needle[1] - 1) // size + 1, device=q.device)
            hit = (indices[asks][..., None] == blocks).any(dim=-2).all(dim=-1)
            values["needle_chosen"] = hit.float()
            values["needle_mass"] = mass[asks][..., blocks].sum(dim=-1)
        for name, value in values.items():
            part = value.double().sum(dim=0).cpu()
            total[name] = total[name] + part if name in total else part

    with observe_layers(model, observe):
        prefill(model, tokens, chunk_tokens=chunk_tokens or chunk_tokens_for(model.device))
    if not sums or not any(total["num_queries"].any() for total in sums.values()):
        raise ValueError(f"{tokens.numel():,} tokens leave no query a choice of blocks: take more, or fewer blocks")
    return [
        _record(layer, head, total, num_question)
        for layer, total in sorted(sums.items())
        for head in range(total["covered"].numel())
    ]


def _record(layer: int, head: int, total: dict[str, Tensor], num_question: int) -> dict[str, Any]:
    count = total["num_queries"][head].item()
    record: dict[str, Any] = {"layer": layer, "head": head, "num_queries": int(count)}
    record |= {name: (total[name][head] / count).item() for name in ("covered", "best", "recent")}
    if "needle_chosen" in total:
        record |= {name: (total[name][head] / num_question).item() for name in ("needle_chosen", "needle_mass")}
    return record


def averages(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean over layers and heads of every statistic."""
    names = [name for name in ("covered", "best", "recent", "needle_chosen", "needle_mass") if name in records[0]]
    return {name: sum(record[name] for record in records) / len(records) for name in names}


def average_heads(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean over several texts of `routing_quality`'s records of each layer and head."""
    return [
        {key: sum(record[key] for record in records) / len(records) for key in records[0]}
        | {"layer": records[0]["layer"], "head": records[0]["head"]}
        for records in zip(*runs, strict=True)
    ]
