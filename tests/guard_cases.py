"""What test_triton_guards.py runs in processes of their own: calls of every kind on guarded tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from guard import Bytes, guarded

from moba import moba_attention, moba_attention_paged, moba_attention_varlen
from moba.backends.triton.launch import Plan
from moba.block_means import append_block_means

# tokens, query heads, key/value heads, head dims of keys and values, block size, topk: blocks of one tile of keys or
# several, even and uneven, short last blocks, a single block, blocks longer than the text.
SHAPES = [
    (224, 2, 1, 16, 16, 96, 3),
    (130, 2, 2, 32, 32, 32, 4),
    (300, 4, 2, 80, 80, 128, 2),
    (200, 1, 1, 24, 16, 7, 5),
    (260, 2, 1, 128, 128, 256, 2),
    (100, 2, 2, 64, 64, 16, 1),
    (33, 2, 1, 16, 40, 64, 2),
    (1, 1, 1, 16, 16, 16, 2),
]
# The lengths of packed sequences: one, two, several, empty ones, and rows that belong to none.
DTYPES = [torch.bfloat16, torch.float32]
PACKED = [[200], [96, 104], [1, 0, 130, 64], [0, 33, 0], [97, 31, 50]]


def touch_outside(device: str, at_end: str) -> None:
    """Read the byte before or behind a tensor that is guarded there."""
    x = guarded(torch.zeros(64, device=device), at_end == "True")
    address = x.data_ptr() + (256 if at_end == "True" else -1)
    if device == "cpu":
        print(ctypes.string_at(address, 1), "was read", flush=True)
    else:
        print(torch.as_tensor(Bytes(address, 1), device=device).tolist(), "was read", flush=True)


@contextmanager
def guarded_allocations(at_end: bool) -> Iterator[None]:
    """Everything that the library allocates is guarded, too."""
    empty, new_empty, buffers = torch.empty, torch.Tensor.new_empty, Plan._buffers

    def guard(x):
        return x if x.is_meta else guarded(x, at_end)

    with ExitStack() as stack:
        for owner, name, function in (
            (torch, "empty", lambda *args, **options: guard(empty(*args, **options))),
            (torch.Tensor, "new_empty", lambda *args, **options: guard(new_empty(*args, **options))),
            (Plan, "_buffers", lambda plan, memory: [guard(x) for x in buffers(plan, memory)]),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _some(device: str, cases: list[Any], every: int) -> list[Any]:
    """All cases on a card; in the interpreter, which takes a hundred times longer, one of so many."""
    return cases if device == "cuda" else cases[::every]


def attention(device: str, side: str) -> None:
    """Forward and backward over plain, chunked, padded and packed sequences, in 16 and 32 bits."""
    at_end = side == "end"
    for dtype in _some(device, DTYPES, 2):
        # Every kernel of every setting is compiled on a card: fp32 takes a few.
        shapes = SHAPES if dtype == torch.bfloat16 else SHAPES[::4]
        for tokens, heads, kv_heads, head_dim, value_dim, block_size, topk in _some(device, shapes, 3):
            for layout in _some(device, ["plain", "last", "padded", "heads first"], 2):
                print(dtype, tokens, heads, kv_heads, head_dim, value_dim, block_size, topk, layout, flush=True)
                rows, queries = (2, tokens) if layout == "padded" else (1, tokens)
                queries = (tokens + 1) // 2 if layout == "last" else queries
                shapes = [
                    (rows, queries, heads, head_dim),
                    *((rows, tokens, kv_heads, d) for d in (head_dim, value_dim)),
                ]
                if layout == "heads first":
                    q, k, v = (torch.randn(r, h, t, d).transpose(1, 2) for r, t, h, d in shapes)
                else:
                    q, k, v = (torch.randn(shape) for shape in shapes)
                bounds = {}
                if layout == "padded":
                    bounds["key_start"] = guarded(torch.tensor([0, tokens // 3], dtype=torch.int32, device=device))
                    bounds["key_end"] = guarded(torch.tensor([tokens, tokens], dtype=torch.int32, device=device))
                leaves = [guarded(x.to(device, dtype), at_end).requires_grad_() for x in (q, k, v)]
                with guarded_allocations(at_end):
                    out = moba_attention(*leaves, block_size=block_size, topk=topk, backend="triton", **bounds)
                    out.backward(guarded(torch.randn_like(out), at_end))
                _finish(device)
        for lengths in _some(device, PACKED, 3):
            for block_size, topk in ((32, 3), (96, 2)):
                print(dtype, lengths, block_size, topk, flush=True)
                cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
                total = sum(lengths) + (5 if lengths[-1] == 50 else 0)
                leaves = [
                    guarded(torch.randn(total, h, 16).to(device, dtype), at_end).requires_grad_() for h in (2, 1, 1)
                ]
                with guarded_allocations(at_end):
                    out = moba_attention_varlen(
                        *leaves, cu_seqlens=guarded(cu, at_end), block_size=block_size, topk=topk, backend="triton"
                    )
                    out.backward(guarded(torch.randn_like(out), at_end))
                _finish(device)
    print("all done", flush=True)


def decoding(device: str, side: str) -> None:
    """Steps over a cache and over pages, one query and several."""
    at_end = side == "end"
    for dtype in _some(device, DTYPES, 2):
        for tokens, heads, kv_heads, head_dim, value_dim, block_size, topk in _some(device, SHAPES, 2):
            for queries in (1, 5):
                if queries > tokens:
                    continue
                print(dtype, tokens, heads, kv_heads, head_dim, value_dim, block_size, topk, queries, flush=True)
                q = guarded(torch.randn(1, queries, heads, head_dim).to(device, dtype), at_end)
                k, v = (
                    guarded(torch.randn(1, tokens, kv_heads, d).to(device, dtype), at_end)
                    for d in (head_dim, value_dim)
                )
                means = guarded(k.new_zeros(1, tokens // block_size, kv_heads, head_dim), at_end)
                with torch.no_grad(), guarded_allocations(at_end):
                    append_block_means(means, k, num_new=tokens, block_size=block_size, backend="triton")
                    moba_attention(q, k, v, block_size=block_size, topk=topk, block_means=means, backend="triton")
                _finish(device)
        for page_size, block_size in ((16, 16), (32, 16), (16, 64)):
            print(dtype, page_size, block_size, flush=True)
            pages = [guarded(torch.randn(9, page_size, 1, 16).to(device, dtype), at_end) for _ in "kv"]
            means = guarded(pages[0].new_zeros(9, max(1, page_size // block_size), 1, 16), at_end)
            table = guarded(torch.tensor([[3, 8, 0, 5], [1, 2, 4, 7]], dtype=torch.int32, device=device), at_end)
            lengths = guarded(torch.tensor([4 * page_size, page_size + 3], dtype=torch.int32, device=device), at_end)
            q = guarded(torch.randn(2, 1, 2, 16).to(device, dtype), at_end)
            options = {"page_table": table, "key_end": lengths, "block_size": block_size, "backend": "triton"}
            with torch.no_grad(), guarded_allocations(at_end):
                append_block_means(means, pages[0], num_new=4 * page_size, **options)
                moba_attention_paged(q, *pages, block_means=means, topk=3, **options)
            _finish(device)
    print("all done", flush=True)
