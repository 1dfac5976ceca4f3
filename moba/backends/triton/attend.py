"""Attention over a routing as PyTorch operators: `moba::triton_attend` and its backward.

Both are opaque to torch.compile, with shapes that depend on the shapes of their arguments alone, and neither waits for
the GPU, so they compile without graph breaks and record into CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba.backends.triton import by_block
from moba.backends.triton.backward import backward
from moba.backends.triton.forward import forward
from moba.backends.triton.plan import View
from moba.backends.triton.primitives import num_global_blocks
from moba.backends.triton.tuning import arch_of
from moba.layout import Sequences

# Workspace beyond inputs and outputs: this share of their bytes, but for small inputs MIN_WORKSPACE_BYTES, where memory
# is no concern and every further chunk would cost a launch.
WORKSPACE_SHARE = 0.25
MIN_WORKSPACE_BYTES = 256 << 20


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sequences: Sequences, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q Kᵀ) V over the keys that `indices` select. See `moba.backends` for the contract."""
    out, lse, _, _ = _attend(
        q, k, v, indices, sequences.key_start, sequences.key_end, sequences.cu_q, sequences.cu_k, block_size, scale
    )
    return out, lse


def workspace_bytes(q: Tensor, k: Tensor, view: View) -> int:
    """Memory for partial results: the budget less what the by-block view takes."""
    inputs_and_outputs = 2 * (q.numel() + k.numel()) * q.element_size()
    budget = max(int(WORKSPACE_SHARE * inputs_and_outputs), MIN_WORKSPACE_BYTES)
    return budget - 4 * (view.offsets.numel() + view.entries.numel())


def _sequences(
    q: Tensor, k: Tensor, key_start: Tensor | None, key_end: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None
) -> Sequences:
    return Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=key_start, key_end=key_end, cu_q=cu_q, cu_k=cu_k)


@torch.library.custom_op("moba::triton_attend", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, lse, and the by-block view (offsets, entries), which the backward reads again."""
    sequences = _sequences(q, k, key_start, key_end, cu_q, cu_k)
    view = View(*by_block.group_by_block(indices, sequences, block_size))
    out, lse = forward(
        q, k, v, indices, view, sequences, block_size=block_size, scale=scale,
        workspace_bytes=workspace_bytes(q, k, view), arch=arch_of(q.device),
    )  # fmt: skip
    return out, lse, view.offsets, view.entries


@_attend.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_queries, num_heads, _ = q.shape
    num_blocks = num_global_blocks(_sequences(q, k, key_start, key_end, cu_q, cu_k), block_size)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        indices.new_empty(num_heads, num_blocks + 1),
        indices.new_empty(num_heads, num_rows * num_queries * (indices.shape[3] - 1)),
    )


@torch.library.custom_op("moba::triton_attend_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor,
    d_lse: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    view = View(offsets, entries)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return backward(
        d_out, d_lse.contiguous(), q, k, v, out, lse, indices, view, _sequences(q, k, key_start, key_end, cu_q, cu_k),
        block_size=block_size, scale=scale, workspace_bytes=workspace_bytes(q, k, view), arch=arch_of(q.device),
    )  # fmt: skip


@_attend_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, key_start, key_end, cu_q, cu_k, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, indices, key_start, key_end, cu_q, cu_k, *output)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, indices, key_start, key_end, cu_q, cu_k, out, lse, offsets, entries = ctx.saved_tensors
    gradients = _attend_backward(
        d_out, d_lse, q, k, v, out, lse, indices, offsets, entries, key_start, key_end, cu_q, cu_k, ctx.block_size,
        ctx.scale,
    )  # fmt: skip
    return *gradients, *(None,) * 7


_attend.register_autograd(_backward, setup_context=_setup_context)
