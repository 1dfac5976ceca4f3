"""DESIGN's semantics where values have another head dim than keys. Over every backend, as test_semantics.py."""

from __future__ import annotations

import pytest
import torch
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, make_qkv
from oracle import attend_batch
from test_decode import Pages, means_of
from test_semantics import BOTH, dense, gradients, needs_dtype
from test_semantics_gradients import expected_gradients

from moba import moba_attention, moba_attention_paged, moba_attention_varlen

# Batch, queries, keys, heads, kv heads, head dims of keys and values, block size, topk.
CASES = {
    "as MLA": (1, 20, 20, 1, 1, 192, 128, 8, 2),
    "wider values": (1, 37, 37, 4, 2, 16, 40, 8, 3),
    "values of one": (2, 20, 20, 2, 1, 5, 1, 7, 2),
    "chunk of a prefill": (1, 13, 45, 4, 2, 24, 16, 8, 3),
    "own block only": (1, 40, 40, 2, 1, 16, 32, 16, 1),
    "one query": (2, 1, 45, 4, 2, 24, 16, 8, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(backend, device, case, dtype):
    needs_dtype(backend, dtype)
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, dtype=dtype, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk, "scale": 0.1}
    expected_out, expected_lse, expected_indices = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    for means in (None, means_of(k, backend, block_size)):
        out, lse, routing = moba_attention(q, k, v, **options, block_means=means, backend=backend, **BOTH)
        assert torch.equal(routing.indices.cpu(), expected_indices)
        assert out.dtype == dtype
        assert_close(out, expected_out, TOLERANCE[dtype])
        assert_close(lse, expected_lse, LSE_TOLERANCE[dtype])


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_the_definition(backend, device, case, with_lse):
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk, "scale": 0.1}
    d_out = torch.randn(*q.shape[:3], v.shape[3], device=device)
    d_lse = torch.randn(q.shape[:3], device=device) if with_lse else None
    expected = expected_gradients(q, k, v, d_out, d_lse, **options)
    for actual, wanted in zip(gradients(q, k, v, d_out, d_lse, **options, backend=backend), expected, strict=True):
        assert_close(actual, wanted, 5e-5)


def test_packed_is_separate_sequences(backend, device):
    q, k, v = (x[0].requires_grad_() for x in make_qkv(1, 33, 33, 4, 2, 24, 16, device=device))
    cu = torch.tensor([0, 5, 5, 30], dtype=torch.int32, device=device)
    options = {"block_size": 8, "topk": 2, "backend": backend}
    out = moba_attention_varlen(q, k, v, cu_seqlens=cu, **options)
    d_out = torch.randn_like(out)
    packed = torch.autograd.grad(out, (q, k, v), d_out)
    assert (out[30:] == 0).all()
    for rows in (slice(0, 5), slice(5, 30)):
        alone = moba_attention(*(x[None, rows] for x in (q, k, v)), **options)
        assert_close(out[rows], alone[0], 2e-6)
        for got, want in zip(packed, torch.autograd.grad(alone, (q, k, v), d_out[None, rows]), strict=True):
            assert_close(got[rows], want[rows], 2e-6)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 40)])
@pytest.mark.parametrize("queries", [3, 20])
def test_pages(backend, device, head_dim, value_dim, queries):
    q, k, v = make_qkv(2, queries, 45, 4, 2, head_dim, value_dim, device=device, exact_for=8)
    pages = Pages(k, v, [45, 33], 16, 8)
    options = {"block_size": 8, "topk": 3, "backend": backend, **BOTH}
    out, lse, routing = moba_attention_paged(q, **pages.filled(backend), **options)
    expected = moba_attention(q, k, v, key_end=pages.key_end, **options)
    assert torch.equal(routing.indices, expected[2].indices)
    assert_close(out, expected[0], 2e-6)
    assert_close(lse, expected[1], 2e-6)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 40)])
def test_full_attention(backend, device, head_dim, value_dim):
    q, k, v = make_qkv(2, 40, 40, 4, 2, head_dim, value_dim, device=device)
    expected = dense(q, k, v)
    for backend_or_auto in (backend, "auto"):
        out = moba_attention(q, k, v, block_size=8, topk=5, backend=backend_or_auto)
        assert_close(out, expected, 2e-5)
        step = moba_attention(q[:, -1:], k, v, block_size=8, topk=5, backend=backend_or_auto)
        assert_close(step, expected[:, -1:], 2e-5)
