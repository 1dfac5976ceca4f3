"""Attention over a routing as PyTorch operators: `moba::triton_attend` and its backward.

Both are opaque to torch.compile, with shapes that depend on the shapes of their arguments alone, and neither waits for
the GPU, so they compile without graph breaks and record into CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moba.backends.triton.backward import plan_backward
from moba.backends.triton.by_block import new_view, plan_group_by_block
from moba.backends.triton.device import View, num_global_blocks, view_of
from moba.backends.triton.forward import plan_forward
from moba.backends.triton.launch import Plan, make_plan, run_planned
from moba.backends.triton.registration import differentiable, fake, operator
from moba.backends.triton.tuning import arch_of
from moba.backends.triton.variants import Variant
from moba.backends.triton.workspace import num_elements, routing_heads
from moba.routing import for_query_heads
from moba.sequences import Sequences

# Workspace beyond inputs and outputs: this share of their bytes, but for small inputs MIN_WORKSPACE_BYTES, where memory
# is no concern and every further chunk would cost a launch.
WORKSPACE_SHARE = 0.25
MIN_WORKSPACE_BYTES = 256 << 20


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sequences: Sequences,
    *,
    block_size: int,
    scale: float,
    softcap: float | None = None,
    own_block: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q Kᵀ) V over the keys that `indices` select. See `moba.backends` for the contract."""
    assert own_block, "refused by `unsupported`"
    out, lse, _, _ = _attend(
        q,
        k,
        v,
        indices,
        sequences.key_start,
        sequences.key_end,
        sequences.cu_q,
        sequences.cu_k,
        block_size,
        scale,
        softcap,
    )
    return out, lse


def workspace_bytes(q: Tensor, k: Tensor, v: Tensor, view: View) -> int:
    """Memory for partial results: the budget less what the by-block view takes."""
    budget = max(int(WORKSPACE_SHARE * num_elements(q, k, v) * q.element_size()), MIN_WORKSPACE_BYTES)
    return budget - 4 * (view.offsets.numel() + view.entries.numel())


def _options(
    q: Tensor, k: Tensor, v: Tensor, view: View, block_size: int, scale: float, softcap: float | None
) -> dict[str, Any]:
    """What the plans of forward and backward are told."""
    return {
        "block_size": block_size,
        "scale": scale,
        "softcap": softcap,
        "workspace_bytes": workspace_bytes(q, k, v, view),
        "arch": arch_of(q.device),
    }


@operator("triton_attend")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, lse, and the by-block view (offsets, entries), which the backward reads again."""
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1], key_start, key_end, cu_q, cu_k)
    indices = for_query_heads(indices, routing_heads(q, v, indices, block_size, arch_of(q.device)))
    view = new_view(indices, sequences, block_size)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    run_planned(
        plan_attend, q, k, v, indices, *view, out, lse, key_start, key_end, cu_q, cu_k, device=q.device,
        following=lambda: variants_after_routing(q, k, v, indices.shape[2:], sequences, block_size, softcap),
        **_options(q, k, v, view_of(*view), block_size, scale, softcap),
    )  # fmt: skip
    return out, lse, *view


def variants_after_routing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: tuple[int, ...],
    sequences: Sequences,
    block_size: int,
    softcap: float | None = None,
) -> Iterator[Variant]:
    """What attention with these tensors launches, then, if a gradient may be asked for, its backward.

    Args:
        chosen: heads of the routing, and topk.
    """
    bounds = (sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k)
    indices = torch.empty(*q.shape[:2], *chosen, dtype=torch.int32, device="meta")
    view = new_view(indices, sequences, block_size)
    options = _options(q, k, v, view_of(*view), block_size, 1.0, softcap)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device="meta")
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    yield from make_plan(plan_attend, q, k, v, indices, *view, out, lse, *bounds, **options).variants()
    if q.requires_grad or k.requires_grad or v.requires_grad:
        gradients = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (q, k, v)]
        inputs = (out, None, q, k, v, out, lse, indices, *view, *gradients, *bounds)
        yield from make_plan(plan_attend_backward, *inputs, **options).variants()


def plan_attend(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, offsets: Tensor, entries: Tensor, out: Tensor,
    lse: Tensor, *bounds: Tensor | None, **options: Any,
) -> None:  # fmt: skip
    """The launches of `moba::triton_attend`."""
    sequences, view = Sequences(q.shape[0], q.shape[1], k.shape[1], *bounds), view_of(offsets, entries)
    plan_group_by_block(plan, indices, offsets, entries, sequences, options["block_size"], options["arch"])
    if q.numel():
        plan_forward(plan, q, k, v, indices, view, out, lse, sequences, **options)


@fake(_attend)
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *bounds, block_size, _scale, _softcap = rest
    num_rows, num_queries = q.shape[:2]
    num_heads = routing_heads(q, v, indices, block_size, arch_of(q.device))
    num_blocks = num_global_blocks(Sequences(num_rows, num_queries, k.shape[1], *bounds), block_size)
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        indices.new_empty(num_heads, num_blocks + 1),
        indices.new_empty(num_heads, num_rows * num_queries * (indices.shape[3] - 1)),
    )


@operator("triton_attend_backward")
def _attend_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    offsets: Tensor,
    entries: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    indices = for_query_heads(indices, offsets.shape[0])
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    run_planned(
        plan_attend_backward, d_out, d_lse, q, k, v, out, lse, indices, offsets, entries, d_q, d_k, d_v, key_start,
        key_end, cu_q, cu_k, device=q.device,
        **_options(q, k, v, view_of(offsets, entries), block_size, scale, softcap),
    )  # fmt: skip
    return d_q, d_k, d_v


def plan_attend_backward(
    plan: Plan, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indices: Tensor, offsets: Tensor, entries: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor, *bounds: Tensor | None,
    **options: Any,
) -> None:  # fmt: skip
    """The launches of `moba::triton_attend_backward`."""
    sequences, view = Sequences(q.shape[0], q.shape[1], k.shape[1], *bounds), view_of(offsets, entries)
    if q.numel() == 0:
        plan.zero(d_k)
        plan.zero(d_v)
        return
    plan_backward(plan, d_out, d_lse, q, k, v, out, lse, indices, view, d_q, d_k, d_v, sequences, **options)


@fake(_attend_backward)
def _(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, key_start, key_end, cu_q, cu_k, ctx.block_size, ctx.scale, ctx.softcap = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, indices, key_start, key_end, cu_q, cu_k, *output)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, indices, key_start, key_end, cu_q, cu_k, out, lse, offsets, entries = ctx.saved_tensors
    gradients = _attend_backward(
        torch.zeros_like(out) if d_out is None else d_out, d_lse, q, k, v, out, lse, indices, offsets, entries,
        key_start, key_end, cu_q, cu_k, ctx.block_size, ctx.scale, ctx.softcap,
    )  # fmt: skip
    return *gradients, *(None,) * 8


differentiable(_attend, _backward, _setup_context)
