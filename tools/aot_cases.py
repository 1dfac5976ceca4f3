"""What is compiled ahead of time: the variants that calls of many kinds launch, recorded from the plans that run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from moba.backends.triton.ahead import call_plans, index_loss_plans, index_plans, step_plans
from moba.backends.triton.launch import Plan
from moba.backends.triton.variants import Variant

HEAD_DIMS = {
    torch.bfloat16: (16, 64, 80, 128, 256),
    torch.float16: (64, 128, 256),
    torch.float32: (16, 64, 128, 256),
}
# Of keys and values where these differ: as MLA has them, and values that are the wider ones.
UNEQUAL_HEAD_DIMS = ((192, 128), (64, 256))
LAYOUTS = ("plain", "padded", "packed", "one query")
# Block size and topk: a block that is one tile of keys, several, or uneven; few slots, and so many that scores are
# counted.
SETTINGS = ((80, 3), (128, 8), (512, 4), (16, 64))
DECODE_SETTINGS = ((128, 16), (4096, 12), (16, 64))
INDEX_SETTINGS = ((128, 16), (512, 4), (80, 3), (16, 64), (1, 8))
# The least and the most shared memory.
REPRESENTATIVE_ARCHITECTURES = (86, 90)


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
            for block_size, topk in SETTINGS:
                is_usual = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                name = f"{str(dtype)[6:]} D{head_dim} {block_size}/{topk}"
                yield name, call_plans(arch, dtype, head_dim, block_size, topk), is_usual and common
            for block_size, topk in DECODE_SETTINGS:
                is_usual = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                name = f"{str(dtype)[6:]} D{head_dim} {block_size}/{topk} decode"
                yield name, step_plans(arch, dtype, head_dim, block_size, topk), is_usual and common
            for block_size, topk in INDEX_SETTINGS:
                is_usual = (dtype, head_dim, block_size) == (torch.bfloat16, 128, 128)
                name = f"{str(dtype)[6:]} D{head_dim} {block_size}/{topk} indexer"
                yield name, index_plans(arch, dtype, head_dim, block_size, topk), is_usual and common
                yield f"{name} loss", index_loss_plans(arch, dtype, head_dim, block_size), is_usual and common
    softcap = index_loss_plans(arch, torch.bfloat16, 128, 128, softcap=50.0)
    yield "indexer loss softcap", softcap, False
    for layout in ("padded", "packed"):
        yield f"indexer {layout}", index_plans(arch, torch.bfloat16, 64, 128, 16, layout), arch == 90
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
    for num_heads, num_kv_heads in ((64, 4), (16, 2), (32, 8)):
        heads: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "is_shared": True}
        plans = call_plans(arch, torch.bfloat16, 128, 128, 16, **heads)
        yield f"shared {num_heads}/{num_kv_heads}", plans, common and num_heads == 64
    yield "shared 512", call_plans(arch, torch.bfloat16, 128, 512, 8, **heads), False
    yield "softcap float32", call_plans(arch, torch.float32, 64, 128, 4, softcap=50.0), False
    yield "softcap wide", call_plans(arch, torch.bfloat16, 256, 128, 4, softcap=50.0), False
    yield "decode softcap", step_plans(arch, torch.bfloat16, 128, 128, 16, softcap=50.0), common
    for layout in ("padded", "pages", "many queries"):
        yield f"decode {layout}", step_plans(arch, torch.bfloat16, 128, 128, 16, layout), False
    yield "decode alone", step_plans(arch, torch.bfloat16, 128, 128, 16, num_heads=8, num_kv_heads=8), False
    yield "decode streamed", step_plans(arch, torch.bfloat16, 64, 16, 1024), False
