"""The loss that trains a model's indexers: each learns where its layer's own attention goes.

loss = model(**batch).loss + indexer_loss(model)

For a query t and a key/value head, P(j) is the attention mass of past block j, summed over the head's query heads, as a
share of all past blocks' mass; Q = softmax_j(score(t, j) · d^−0.5) is the indexer's. The loss is the mean of KL(P ‖ Q)
over queries with a past block, heads and layers. Where the layer's attention is full, j runs over all past blocks (the
dense warm-up); where it is sparse, over the selected ones only, so P and Q say nothing of the others.

Gradients: the layer's input, queries and keys are constants here, so the loss trains indexers alone; the model's own
loss does not reach them, as no gradient flows through a selection.

Letters: T tokens of a sequence, H query heads, G key/value heads, D head dim, d index head dim, N blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moba import backends
from moba.hf.indexer import Layout
from moba.hf.layout import row_spans
from moba.numerics import accumulation_dtype
from moba.routers import mean_key_scores

# Elements of the largest intermediate results, by the device's type.
_PRODUCTS = {"cpu": 1 << 20}
_PRODUCTS_OTHERWISE = 1 << 26


def indexer_loss(model: nn.Module) -> Tensor:
    """The indexers' loss in the model's last forward pass, a scalar; a second call needs another forward pass.

    A layer computes it in training mode with gradients, for weights that require them, where the config's router is
    "indexer"; a dense warm-up is that config with `full_layers` for all layers. With gradient checkpointing it is
    computed once more in the backward pass. Sequences must be whole: no cache.

    Raises:
        ValueError: if no layer has computed it.
    """
    losses = []
    for module in model.modules():
        indexer: Any = getattr(module, "moba_indexer", None)
        if indexer is not None and indexer.loss is not None:
            losses.append(indexer.loss)
            indexer.loss = None
    if not losses:
        raise ValueError(
            "model: no layer has computed an indexer loss since the last call: it needs a forward pass in training "
            'mode, with router="indexer" and gradients (gradient checkpointing with use_reentrant=False)'
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class Target(NamedTuple):
    """What a layer attends to, and how its indexer scores.

    Attributes:
        q: [B, T, H, D]. k: [B, T, G, D]. chosen: int32 [B, T, G, K], the blocks that are read; None: all.
        spans: row, first and one past the last token of each sequence.
        scale, softcap, sinks: of the layer's softmax.
        backend: what computes logits and scores: Triton's kernels, where it is theirs, or plain torch.
    """

    q: Tensor
    k: Tensor
    chosen: Tensor | None
    spans: list[tuple[int, int, int]]
    block_size: int
    pool: str
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    backend: str = "auto"


def keep_loss(
    module: Any,
    by_index: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    layout: Layout,
    softmax: dict[str, Any],
    block_size: int,
    chosen: Tensor | None,
    backend: str,
) -> None:
    """Compute and keep the loss of a layer's running call, where one is asked for (see `indexer_loss`).

    Args:
        by_index: what `index_vectors` gave. The rest as in `Target`.

    Raises:
        ValueError: if keys come from a cache.
    """
    by_q, by_k = by_index
    if not (module.training and by_q.requires_grad):
        return
    if by_k is None or q.shape[1] != k.shape[1]:
        raise ValueError("past_key_values: indexers learn from whole sequences; call the model with use_cache=False")
    spans = row_spans(layout, q.shape[0], q.shape[1])
    pool = module.moba_indexer.pool
    target = Target(q.detach(), k.detach(), chosen, spans, block_size, pool, **softmax, backend=backend)
    loss: Tensor = _Divergence.apply(by_q, by_k, target)
    # Within a backward pass the layer's activations are computed again; the loss was kept before.
    if torch._C._current_graph_task_id() == -1:
        module.moba_indexer.loss = loss


class _Divergence(torch.autograd.Function):
    """The loss of index queries and keys [B, T, G, d]; forward computes their gradients in the same chunks."""

    @staticmethod
    def forward(ctx: Any, by_q: Tensor, by_k: Tensor, target: Target) -> Tensor:
        wide = accumulation_dtype(by_q.dtype)
        grads = [torch.zeros_like(x, dtype=wide) for x in (by_q, by_k)]
        num_rows = sum(max(0, stop - start - target.block_size) for _, start, stop in target.spans)
        loss = torch.zeros((), dtype=wide, device=by_q.device)
        with torch.autocast(by_q.device.type, enabled=False):
            for row, start, stop in target.spans:
                part = slice(start, stop)
                index_q, index_k, q, k = (x[row, part] for x in (by_q, by_k, target.q, target.k))
                chosen = None if target.chosen is None else target.chosen[row, part].long()
                loss += _add_span(index_q, index_k, q, k, chosen, target, [grad[row, part] for grad in grads])
        count = max(1, num_rows * by_q.shape[2])
        ctx.save_for_backward(*(grad.div_(count).to(by_q.dtype) for grad in grads))
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k = ctx.saved_tensors
        return grad * d_q, grad * d_k, None


def _add_span(
    by_q: Tensor, by_k: Tensor, q: Tensor, k: Tensor, chosen: Tensor | None, target: Target, grads: list[Tensor]
) -> Tensor:
    """Sum of the divergences of one sequence [T, …]; adds their gradients to `grads`, [T, G, d] each."""
    size, (length, num_heads, head_dim), num_kv_heads = target.block_size, q.shape, by_q.shape[1]
    num_blocks = (length - 1) // size
    factor = by_q.shape[-1] ** -0.5
    scale = head_dim**-0.5 if target.scale is None else target.scale
    log_masses = backends.resolve(target.backend, q, k).log_masses
    largest_products = backends.resolve(target.backend, by_q, by_k).largest_products
    given_q, given_k = by_q, by_k
    by_q, by_k = by_q.to(grads[0].dtype), by_k.to(grads[0].dtype)
    tokens = by_k[: num_blocks * size].unflatten(0, (num_blocks, size))
    if target.pool == "mean":
        tokens = tokens.mean(1, keepdim=True)
    d_tokens, total = torch.zeros_like(tokens), by_q.new_zeros(())
    rows = max(1, _products(q) // (num_heads * max(num_blocks + 1, size)))
    for start in range(size, length, rows):
        stop = min(start + rows, length)
        own = torch.arange(start, stop, device=q.device)[:, None] // size
        block = torch.arange((stop - 1) // size + 1, device=q.device)
        past, is_read = (block < own)[None], (block <= own)[None]
        if chosen is not None:
            some = chosen[start:stop].transpose(0, 1)
            place = torch.where((some >= 0) & (some <= own), some, len(block))
            is_chosen = past.new_zeros(*some.shape[:2], len(block) + 1).scatter_(-1, place, True)[..., :-1]
            past, is_read = past & is_chosen, (past & is_chosen) | (block == own)
        log_mass = log_masses(q[start:stop], k[:stop], size, scale, target.softcap).unflatten(0, (num_kv_heads, -1))
        log_mass = log_mass.masked_fill(~is_read[:, None], -torch.inf)
        whole = log_mass.logsumexp(-1, keepdim=True)
        if target.sinks is not None:
            whole = torch.logaddexp(whole, target.sinks.to(whole.dtype).view(num_kv_heads, -1, 1, 1))
        # The last block is nobody's past.
        past = past[..., :-1]
        log_p = (log_mass - whole)[..., :-1].logsumexp(1).masked_fill(~past, -torch.inf).log_softmax(-1)
        if target.pool == "max":
            scores = largest_products(given_q[start:stop], given_k[:stop], size)[..., : len(block) - 1]
        else:
            scores = mean_key_scores(by_q[start:stop], tokens[: len(block) - 1, 0]).transpose(0, 1)
        log_q = (scores * factor).masked_fill(~past, -torch.inf).log_softmax(-1)
        p = log_p.exp()
        total += torch.where(past & (p > 0), p * (log_p - log_q), 0.0).sum()
        d_scores = torch.where(past, log_q.exp() - p, 0.0) * factor
        _add_gradients(by_q[start:stop], tokens, d_scores, grads[0][start:stop], d_tokens)
    if target.pool == "mean":
        d_tokens = (d_tokens / size).expand(-1, size, -1, -1)
    grads[1][: num_blocks * size] += d_tokens.flatten(0, 1)
    return total


def _add_gradients(by_q: Tensor, tokens: Tensor, d_scores: Tensor, d_q: Tensor, d_tokens: Tensor) -> None:
    """Add the gradients of scores [G, rows, n] to those of queries [rows, G, d] and of tokens [N, m, G, d]."""
    num_blocks, width, rows = d_scores.shape[-1], tokens.shape[1], by_q.transpose(0, 1)
    step = max(1, _products(by_q) // (by_q.shape[0] * by_q.shape[1] * width))
    for start in range(0, num_blocks, step):
        some = slice(start, min(start + step, num_blocks))
        keys = tokens[some].permute(2, 0, 1, 3)
        products = (rows @ keys.flatten(1, 2).mT).unflatten(-1, keys.shape[1:3])
        is_most = products == products.amax(-1, keepdim=True)
        d_products = (d_scores[..., some, None] * is_most / is_most.sum(-1, keepdim=True)).flatten(2)
        d_q += (d_products @ keys.flatten(1, 2)).transpose(0, 1)
        d_tokens[some] += (d_products.mT @ rows).unflatten(1, keys.shape[1:3]).permute(1, 2, 0, 3)


def _products(x: Tensor) -> int:
    return _PRODUCTS.get(x.device.type, _PRODUCTS_OTHERWISE)
