"""What is compiled ahead of time: the variants that calls of many kinds launch, recorded from the plans that run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moba.backends.triton.attention import plan_attend, plan_attend_backward
from moba.backends.triton.by_block import new_view
from moba.backends.triton.decoding import plan_append, plan_decode
from moba.backends.triton.device import bounds_of
from moba.backends.triton.launch import Plan, Variant, make_plan
from moba.backends.triton.routing import plan_select
from moba.sequences import Sequences

HEAD_DIMS = {
    torch.bfloat16: (16, 64, 80, 128, 256),
    torch.float16: (64, 128, 256),
    torch.float32: (16, 64, 128, 256),
}
# Of keys and values where these differ: as MLA has them, and values that are the wider ones.
UNEQUAL_HEAD_DIMS = ((192, 128), (64, 256))
LAYOUTS = ("plain", "padded", "packed", "one query")
# Block size and topk: a block that is one tile of keys, several, or uneven; few places, and so many that scores are
# counted.
RULES = ((80, 3), (128, 8), (512, 4), (16, 64))
DECODE_RULES = ((128, 16), (4096, 12), (16, 64))
# The least and the most shared memory.
REPRESENTATIVE_ARCHITECTURES = (86, 90)
NUM_TOKENS = 16384
# So many that strides are beyond 32 bits.
FAR_TOKENS = 1 << 24
# Small enough that the dQ of large blocks, and chunks of query rows, are compiled as well.
TIGHT_BYTES_PER_KEY = 64
PAGE_SIZE = 256


@dataclass(frozen=True)
class Case:
    """A variant of a kernel, named; `representative` ones are compiled in every run of the tests."""

    name: str
    variant: Variant = field(repr=False)
    representative: bool = False


def cases(arch: int) -> Iterator[Case]:
    """Every case for one architecture, each variant once."""
    seen = set()
    for name, plans, representative in _calls(arch):
        for plan in plans:
            for variant in plan.variants():
                if variant not in seen:
                    seen.add(variant)
                    yield Case(f"{variant.kernel.__name__} {name}", variant, representative)


def _calls(arch: int) -> Iterator[tuple[str, list[Plan], bool]]:
    common = arch in REPRESENTATIVE_ARCHITECTURES
    for dtype, head_dims in HEAD_DIMS.items():
        for head_dim in head_dims:
            for block_size, topk in RULES:
                is_usual = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                name = f"{str(dtype)[6:]} D{head_dim} {block_size}/{topk}"
                yield name, call_plans(arch, dtype, head_dim, block_size, topk), is_usual and common
            for block_size, topk in DECODE_RULES:
                is_usual = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                name = f"{str(dtype)[6:]} D{head_dim} {block_size}/{topk} decode"
                yield name, step_plans(arch, dtype, head_dim, block_size, topk), is_usual and common
    for head_dim, value_dim in UNEQUAL_HEAD_DIMS:
        for dtype in (torch.bfloat16, torch.float32):
            name, dims = f"{str(dtype)[6:]} D{head_dim}/{value_dim}", (arch, dtype, head_dim)
            is_usual = (dtype, head_dim) == (torch.bfloat16, 192) and common
            for block_size, topk in ((80, 3), (128, 8), (512, 4)):
                plans = call_plans(*dims, block_size, topk, value_dim=value_dim)
                yield f"{name} {block_size}/{topk}", plans, is_usual and block_size == 128
            yield f"{name} 128/16 decode", step_plans(*dims, 128, 16, value_dim=value_dim), is_usual
    for layout in LAYOUTS[1:]:
        yield layout, call_plans(arch, torch.bfloat16, 80, 128, 3, layout), arch == 90 and layout == "packed"
    for block_size in (128, 512):
        yield f"far {block_size}", call_plans(arch, torch.bfloat16, 128, block_size, 4, "far"), arch == 90
    for block_size in (128, 512):
        plans = call_plans(arch, torch.bfloat16, 128, block_size, 4, softcap=50.0)
        yield f"softcap {block_size}", plans, common and block_size == 128
    yield "softcap float32", call_plans(arch, torch.float32, 64, 128, 4, softcap=50.0), False
    yield "softcap wide", call_plans(arch, torch.bfloat16, 256, 128, 4, softcap=50.0), False
    yield "decode softcap", step_plans(arch, torch.bfloat16, 128, 128, 16, softcap=50.0), common
    for layout in ("padded", "pages", "alone", "many queries"):
        yield f"decode {layout}", step_plans(arch, torch.bfloat16, 128, 128, 16, layout), False
    yield "decode streamed", step_plans(arch, torch.bfloat16, 64, 16, 1024), False


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
    num_tokens: int = NUM_TOKENS,
    num_sequences: int = 4,
    num_rows: int | None = None,
    workspaces: tuple[int, ...] = (),
) -> list[Plan]:
    """The plans of a forward and a backward: routing, by-block view and attention, with room to spare and without."""
    num_rows = num_rows or (2 if layout == "padded" else 1)
    num_keys = FAR_TOKENS if layout == "far" else num_tokens
    num_queries = 1 if layout == "one query" else num_keys
    num_heads, num_kv_heads = 4, 2
    bound = _empty(num_rows) if layout == "padded" else None
    cu = _empty(num_sequences + 1) if layout == "packed" else None
    sequences = Sequences(num_rows, num_queries, num_keys, key_start=bound, key_end=bound, cu_q=cu, cu_k=cu)
    bounds = bounds_of(sequences)
    q = _empty(num_rows, num_queries, num_heads, head_dim, dtype=dtype)
    k, v = (_empty(num_rows, num_keys, num_kv_heads, dim, dtype=dtype) for dim in (head_dim, value_dim or head_dim))
    if layout == "far":
        # Head after head, one of two key/value heads: the strides of rows and of heads are both beyond 2^31.
        q = _empty(num_rows, num_heads, num_queries, head_dim, dtype=dtype).transpose(1, 2)
        k, v = (_empty(num_rows, 2, num_keys, head_dim, dtype=dtype).transpose(1, 2)[:, :, :1] for _ in range(2))
    indices = _empty(num_rows, num_queries, num_heads, topk)
    plans = [
        make_plan(
            plan_select, q, k, None, indices, *bounds, num_keys=num_keys, block_size=block_size, topk=topk,
            keep_first=0, keep_recent=0, arch=arch,
        )
    ]  # fmt: skip
    view = new_view(indices, sequences, block_size)
    out = q if value_dim is None else _empty(num_rows, num_queries, num_heads, value_dim, dtype=dtype)
    lse = _empty(num_rows, num_queries, num_heads, dtype=torch.float32)
    for workspace_bytes in workspaces or (1 << 40, TIGHT_BYTES_PER_KEY * num_keys):
        options: dict[str, Any] = {
            "block_size": block_size, "scale": head_dim**-0.5, "softcap": softcap, "arch": arch,
            "workspace_bytes": workspace_bytes,
        }  # fmt: skip
        forward = (q, k, v, indices, *view, out, lse)
        backward = (out, lse, q, k, v, out, lse, indices, *view, q, k, v)
        plans.append(make_plan(plan_attend, *forward, *bounds, **options))
        plans.append(make_plan(plan_attend_backward, *backward, *bounds, **options))
    return plans


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
    num_keys: int = 131072,
    num_rows: int = 2,
) -> list[Plan]:
    """The plans of a step of decoding, and of the means that it finishes."""
    if layout not in ("padded", "pages"):
        num_rows = 1
    num_queries = 16 if layout == "many queries" else 1
    num_heads, num_kv_heads = (8, 8) if layout == "alone" else (32, 8)
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
        plan_decode, q, k, v, means, *bounds, *results, block_size=block_size, keep_first=0, keep_recent=0,
        scale=head_dim**-0.5, softcap=softcap, arch=arch, capacity=num_keys, page_size=page_size,
    )  # fmt: skip
    append = make_plan(plan_append, means, k, *bounds, num_new=num_queries, block_size=block_size, page_size=page_size)
    return [step, append]
