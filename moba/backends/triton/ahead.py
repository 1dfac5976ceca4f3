"""Plans made without tensors: what calls and steps of decoding with a setting will launch, to compile it ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba.backends.triton.attention import plan_attend, plan_attend_backward
from moba.backends.triton.block_scores import plan_block_numbers, scores_shape
from moba.backends.triton.by_block import new_view
from moba.backends.triton.decoding import plan_append, plan_decode
from moba.backends.triton.device import bounds_of
from moba.backends.triton.launch import Plan, make_plan
from moba.backends.triton.routing import plan_select
from moba.backends.triton.variants import Variant
from moba.backends.triton.workspace import routing_heads
from moba.routing import for_query_heads
from moba.sequences import Sequences

NUM_TOKENS = 16384
# So many that strides are beyond 32 bits.
FAR_TOKENS = 1 << 24
# Small enough that the dQ of large blocks, and chunks of query rows, are compiled as well.
TIGHT_BYTES_PER_KEY = 64
PAGE_SIZE = 256


def variants_of(
    arch: int,
    dtype: torch.dtype,
    block_size: int,
    topk: int,
    num_kept: int,
    heads: tuple[int, int, int, int],
    *,
    softcap: float | None,
    is_shared: bool = False,
    training: bool,
    max_tokens: int,
) -> list[Variant]:
    """What calls and steps with a setting launch, whatever their length: each variant once.

    Args:
        heads: query heads, key/value heads, head dim of keys and of values.
        is_shared: whether the query heads of a key/value head choose together.
        training: whether the backward is among them.
        max_tokens: the longest context of a step.
    """
    num_heads, num_kv_heads, head_dim, value_dim = heads
    setting = (arch, dtype, head_dim, block_size, topk)
    options: Any = {"value_dim": None if value_dim == head_dim else value_dim, "num_heads": num_heads,
                    "num_kv_heads": num_kv_heads, "num_kept": num_kept, "softcap": softcap}  # fmt: skip
    plans = []
    for layout in ("plain", "padded", "packed"):
        num_tokens = max(NUM_TOKENS, (topk + 1) * block_size)
        # Heads first, as models of transformers may have them: what a uniform stride needs is then foreseen.
        plans += call_plans(
            *setting, layout, num_tokens=num_tokens, heads_first=True, is_shared=is_shared, training=training, **options
        )  # fmt: skip
    lengths = [min(1024 << i, max_tokens) for i in range(max(1, max_tokens.bit_length() - 9))]
    for layout in ("plain", "padded"):
        for num_keys in dict.fromkeys(lengths):
            plans += step_plans(*setting, layout, num_keys=num_keys, **options)
    return _distinct(plans)


def index_variants_of(
    arch: int,
    dtype: torch.dtype,
    block_size: int,
    topk: int,
    num_kept: int,
    heads: tuple[int, int],
    *,
    by_tokens: bool,
) -> list[Variant]:
    """What a learned router launches beside `variants_of`. `heads`: its heads and their dim."""
    num_heads, head_dim = heads
    options: Any = {"num_heads": num_heads, "num_kept": num_kept, "by_tokens": by_tokens}
    num_tokens = max(NUM_TOKENS, (topk + 1) * block_size)
    plans = [
        plan
        for layout in ("plain", "padded", "packed")
        for plan in index_plans(arch, dtype, head_dim, block_size, topk, layout, num_tokens=num_tokens, **options)
    ]
    return _distinct(plans)


def _distinct(plans: list[Plan]) -> list[Variant]:
    return list(dict.fromkeys(variant for plan in plans for variant in plan.variants()))


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_plans(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    topk: int,
    layout: str = "plain",
    *,
    value_dim: int | None = None,
    softcap: float | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_kept: int = 0,
    num_tokens: int = NUM_TOKENS,
    num_sequences: int = 4,
    num_rows: int | None = None,
    workspaces: tuple[int, ...] = (),
    heads_first: bool = False,
    is_shared: bool = False,
    training: bool = True,
) -> list[Plan]:
    """The plans of a forward and a backward: routing, by-block view and attention, with room to spare and without.

    Args:
        layout: "plain", "padded", "packed", "one query" or "far", of strides beyond 32 bits.
        num_kept: blocks that are always selected, keep_first and keep_recent together.
        workspaces: bytes; by default ample ones and tight ones.
        heads_first: whether the queries of a head, and their gradients, lie one after another in memory.
        is_shared: whether the query heads of a key/value head choose together.
        training: whether the backward is among them, with a gradient of the log-sum-exp and without.
    """
    num_rows = num_rows or (2 if layout == "padded" else 1)
    num_keys = FAR_TOKENS if layout == "far" else num_tokens
    num_queries = 1 if layout == "one query" else num_keys
    bound = _empty(num_rows) if layout == "padded" else None
    cu = _empty(num_sequences + 1) if layout == "packed" else None
    sequences = Sequences(num_rows, num_queries, num_keys, key_start=bound, key_end=bound, cu_q=cu, cu_k=cu)
    bounds = bounds_of(sequences)
    q = _queries((num_rows, num_queries, num_heads, head_dim), dtype, heads_first)
    k, v = (_empty(num_rows, num_keys, num_kv_heads, dim, dtype=dtype) for dim in (head_dim, value_dim or head_dim))
    out = _empty(num_rows, num_queries, num_heads, v.shape[3], dtype=dtype)
    d_out = _queries(out.shape, dtype, heads_first)
    if layout == "far":
        # Head after head, one of two key/value heads: the strides of rows and of heads are both beyond 2^31.
        q = d_out = _queries(q.shape, dtype, heads_first=True)
        k, v = (_empty(num_rows, 2, num_keys, head_dim, dtype=dtype).transpose(1, 2)[:, :, :1] for _ in range(2))
    indices = _empty(num_rows, num_queries, num_kv_heads if is_shared else num_heads, topk)
    # As `route` sums fp32 queries.
    by = _empty(num_rows, num_queries, num_kv_heads, head_dim, dtype=dtype) if is_shared and q.itemsize == 4 else q
    plans = [
        make_plan(
            plan_select, by, k, None, indices, *bounds, num_keys=num_keys, block_size=block_size, topk=topk,
            keep_first=num_kept, keep_recent=0, arch=arch,
        )
    ]  # fmt: skip
    indices = for_query_heads(indices, routing_heads(q, v, indices, block_size, arch))
    view = new_view(indices, sequences, block_size)
    d_q = _empty(*q.shape, dtype=dtype)
    lse = _empty(num_rows, num_queries, num_heads, dtype=torch.float32)
    for workspace_bytes in workspaces or (1 << 40, TIGHT_BYTES_PER_KEY * num_keys):
        options: dict[str, Any] = {
            "block_size": block_size, "scale": head_dim**-0.5, "softcap": softcap, "arch": arch,
            "workspace_bytes": workspace_bytes,
        }  # fmt: skip
        forward = (q, k, v, indices, *view, out, lse)
        plans.append(make_plan(plan_attend, *forward, *bounds, **options))
        backward = (q, k, v, out, lse, indices, *view, d_q, k, v, *bounds)
        for d_lse in (lse, None) if training else ():
            plans.append(make_plan(plan_attend_backward, d_out, d_lse, *backward, **options))
    return plans


def index_plans(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    topk: int,
    layout: str = "plain",
    *,
    num_heads: int = 2,
    num_kept: int = 0,
    num_tokens: int = NUM_TOKENS,
    num_rows: int | None = None,
    by_tokens: bool = True,
) -> list[Plan]:
    """The plans of a learned router, which has as many query heads as key heads. Arguments as in `call_plans`."""
    num_rows = num_rows or (2 if layout == "padded" else 1)
    bound = _empty(num_rows) if layout == "padded" else None
    cu = _empty(5) if layout == "packed" else None
    q, k = (_empty(num_rows, num_tokens, num_heads, head_dim, dtype=dtype) for _ in range(2))
    return [
        make_plan(
            plan_select, q, k, None, _empty(*q.shape[:3], topk), bound, bound, cu, cu, num_keys=num_tokens,
            block_size=block_size, topk=topk, keep_first=num_kept, keep_recent=0, by_tokens=by_tokens, arch=arch,
        )
    ]  # fmt: skip


def index_loss_plans(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    softcap: float | None = None,
    num_tokens: int = NUM_TOKENS,
) -> list[Plan]:
    """The plan of the log masses that a learned router's loss compares with. Arguments as in `call_plans`."""
    q, k = (_empty(1, num_tokens, heads, head_dim, dtype=dtype) for heads in (num_heads, num_kv_heads))
    shape = scores_shape(Sequences(1, num_tokens, num_tokens), num_heads, block_size, num_tokens)
    numbers = _empty(*shape, dtype=torch.float32)
    options: Any = {"block_size": block_size, "scale": head_dim**-0.5, "softcap": softcap, "arch": arch}
    return [make_plan(plan_block_numbers, q, k, numbers, **options)]


def _queries(shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool) -> Tensor:
    """[R, T, H, D] in either order of memory."""
    num_rows, num_queries, num_heads, dim = shape
    if not heads_first:
        return _empty(*shape, dtype=dtype)
    return _empty(num_rows, num_heads, num_queries, dim, dtype=dtype).transpose(1, 2)


def step_plans(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    topk: int,
    layout: str = "plain",
    *,
    value_dim: int | None = None,
    softcap: float | None = None,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    num_kept: int = 0,
    num_keys: int = 131072,
    num_rows: int = 2,
) -> list[Plan]:
    """The plans of a step of decoding, and of the means that it finishes."""
    if layout not in ("padded", "pages"):
        num_rows = 1
    num_queries = 16 if layout == "many queries" else 1
    q = _empty(num_rows, num_queries, num_heads, head_dim, dtype=dtype)
    k, v = (_empty(num_rows, num_keys, num_kv_heads, dim, dtype=dtype) for dim in (head_dim, value_dim or head_dim))
    means = _empty(num_rows, num_keys // block_size, num_kv_heads, head_dim, dtype=dtype)
    bounds: tuple[Tensor | None, ...] = (None, None, None)
    if layout == "padded":
        bounds = (_empty(num_rows), _empty(num_rows), None)
    elif layout == "pages":
        bounds = (None, _empty(num_rows), _empty(num_rows, num_keys // PAGE_SIZE))
        k, v = (_empty(1024, PAGE_SIZE, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
        means = _empty(1024, PAGE_SIZE // block_size, num_kv_heads, head_dim, dtype=dtype)
    page_size = PAGE_SIZE if layout == "pages" else 0
    indices = _empty(num_rows, num_queries, num_heads, topk)
    results = (_empty(*q.shape[:3], v.shape[3], dtype=dtype), _empty(*q.shape[:3], dtype=torch.float32), indices)
    step = make_plan(
        plan_decode, q, k, v, means, *bounds, *results, block_size=block_size, keep_first=num_kept, keep_recent=0,
        scale=head_dim**-0.5, softcap=softcap, arch=arch, capacity=num_keys, page_size=page_size,
    )  # fmt: skip
    append = make_plan(plan_append, means, k, *bounds, num_new=num_queries, block_size=block_size, page_size=page_size)
    return [step, append]
