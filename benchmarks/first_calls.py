"""Seconds of the first calls of one setting after another on a GPU, beside the times of later ones.

    python benchmarks/first_calls.py --out benchmarks/results/first-calls-CARD

An empty TRITON_CACHE_DIR makes the caches cold. Settings run in one process, as a training or a server meets them:
another length of a known setting should compile nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moba import moba_attention
from moba_lab.bench.machine import describe

K = 1024
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


def seconds(call: Callable[[], object]) -> float:
    """Of one call, its work on the GPU included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setting: tuple[int, ...]) -> dict[str, float | str]:
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

    record: dict[str, float | str] = {
        "setting": f"{rows} × {tokens:,} tokens, {heads}/{kv_heads} heads, D {head_dim}, {block_size}/{topk}"
    }
    for name, call in (("forward", forward), ("forward + backward", train)):
        record[f"first {name}, s"] = round(seconds(call), 2)
        record[f"{name}, ms"] = round(1000 * sorted(seconds(call) for _ in range(9))[4], 3)
    return record


def main() -> None:
    """Measure, print and write OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="without a suffix")
    options = parser.parse_args()
    records = []
    for setting in SETTINGS:
        records.append(measure(setting))
        print(json.dumps(records[-1], ensure_ascii=False), flush=True)
    if options.out is not None:
        header = describe(torch.device("cuda"))
        options.out.with_suffix(".json").write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")
        lines = [f"- {name}: {value}" for name, value in header.items()]
        lines += ["", "| " + " | ".join(records[0]) + " |", "|" + "---|" * len(records[0])]
        lines += ["| " + " | ".join(str(x) for x in record.values()) + " |" for record in records]
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
