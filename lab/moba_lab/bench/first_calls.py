"""`moba bench first-calls`: what the first calls of one setting after another take on a GPU, beside later ones."""

from __future__ import annotations

from typing import Any

import torch
import typer

from moba import moba_attention
from moba_lab.bench import machine, suite
from moba_lab.bench.cases import K
from moba_lab.bench.measure import seconds
from moba_lab.bench.report import Records, require_writable, write

# Tokens, rows, query and key/value heads, head dim, block size, topk.
SETTINGS = [
    (8 * K, 1, 16, 16, 128, 128, 8),
    (9000, 1, 16, 16, 128, 128, 8),
    (32 * K, 1, 16, 16, 128, 128, 8),
    (128 * K, 1, 16, 16, 128, 128, 8),
    (128 * K - 7, 1, 16, 16, 128, 128, 8),
    (128 * K, 1, 32, 8, 128, 512, 8),
    (128 * K - 7, 1, 32, 8, 128, 512, 8),
    (128 * K, 1, 16, 16, 128, 2048, 3),
    (8 * K, 4, 9, 3, 64, 128, 8),
]


def measure(setting: tuple[int, ...]) -> dict[str, Any]:
    """First and median later seconds of a forward, and of a forward with its backward."""
    tokens, rows, heads, kv_heads, head_dim, block_size, topk = setting
    q, k, v, d_out = (
        torch.randn(rows, tokens, h, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (heads, kv_heads, kv_heads, heads)
    )

    def forward() -> None:
        with torch.no_grad():
            moba_attention(q, k, v, block_size=block_size, topk=topk)

    def train() -> None:
        torch.autograd.grad(moba_attention(q, k, v, block_size=block_size, topk=topk), (q, k, v), d_out)

    record: dict[str, Any] = {
        "setting": f"{rows} × {tokens:,} tokens, {heads}/{kv_heads} heads, D {head_dim}, {block_size}/{topk}"
    }
    for name, call in (("forward", forward), ("forward + backward", train)):
        record[f"first {name}, s"] = round(seconds(call), 2)
        record[f"{name}, ms"] = round(1000 * sorted(seconds(call) for _ in range(9))[4], 3)
    return record


def rows(records: Records) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells."""
    return list(records[0]), [[str(value) for value in record.values()] for record in records]


def first_calls(out: suite.OutOption = None) -> None:
    """Time the first calls of one setting after another, as a training or a server meets them, beside later ones.

    Another length of a known setting should compile nothing. An empty TRITON_CACHE_DIR makes the caches cold.
    """
    device = machine.device_to_time("cuda")
    if out is not None:
        require_writable(out)
    # A gradient that is given makes torch import sympy: two seconds of the first backward that no kernel takes.
    one = torch.ones(1, device=device, requires_grad=True)
    torch.autograd.grad(one * 1, one, torch.ones_like(one))
    header, records = machine.describe(device), []
    for setting in SETTINGS:
        records.append(measure(setting))
        typer.echo(f"{records[-1]}", err=True)
        if out is not None:
            write(header, records, out, rows)
    suite.tell(header, records, rows)
