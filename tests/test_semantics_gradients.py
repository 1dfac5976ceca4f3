"""Semantics: gradients, repeats, precision. Over every backend, as test_semantics.py."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, gradients, make_qkv
from oracle import attend_batch
from test_semantics import CASES, OTHER_VALUES

from moba import moba_attention, moba_attention_varlen


def expected_gradients(q, k, v, d_out, d_lse=None, **options):
    """The gradients of the definition, in fp64."""
    q, k, v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    out, lse, _ = attend_batch(q, k, v, **options)
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.double().cpu()
    # Where a row has no key, its lse is a constant.
    roots = (torch.where(lse.isfinite(), lse, 0.0), out)
    return torch.autograd.grad(roots, (q, k, v), (d_lse, d_out.double().cpu()))


GRADIENT_CASES = ("plain", "chunk of a prefill", "six heads of two", "head dim 80", "block of seven", "one query",
                  "own block only", "batch of two")  # fmt: skip


@pytest.mark.parametrize(
    ("case", "with_lse"),
    [(case, True) for case in (*GRADIENT_CASES, *OTHER_VALUES)]
    + [(case, False) for case in (*GRADIENT_CASES[:3], *OTHER_VALUES)],
)
def test_gradients_match_the_definition(backend, device, case, with_lse):
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk, "scale": 0.1}
    d_out = torch.randn(*q.shape[:3], v.shape[3], device=device)
    d_lse = torch.randn(q.shape[:3], device=device) if with_lse else None
    expected = expected_gradients(q, k, v, d_out, d_lse, **options)
    for actual, wanted in zip(gradients(q, k, v, d_out, d_lse, **options, backend=backend), expected, strict=True):
        assert_close(actual, wanted, 5e-5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (24, 16)])
def test_gradients_of_padded_and_packed_sequences(backend, device, head_dim, value_dim):
    q, k, v = make_qkv(2, 30, 30, 2, 1, head_dim, value_dim, device=device, exact_for=8)
    d_out = torch.randn(2, 30, 2, value_dim, device=device)
    pad = torch.tensor([0, 11], dtype=torch.int32, device=device)
    for x in (q, k, v):
        x[1, :11] = torch.nan
    options = {"block_size": 8, "topk": 2, "key_start": pad}
    expected = expected_gradients(q, k, v, d_out, **options)
    for actual, wanted in zip(gradients(q, k, v, d_out, **options, backend=backend), expected, strict=True):
        assert_close(actual, wanted, 5e-5)
        assert (actual[1, :11] == 0).all()
    cu = torch.tensor([0, 5, 5, 30], dtype=torch.int32, device=device)
    packed = [x[0].detach().clone().requires_grad_() for x in (q, k, v)]
    out = moba_attention_varlen(*packed, cu_seqlens=cu, block_size=8, topk=2, backend=backend)
    actual = torch.autograd.grad(out, packed, d_out[0])
    for rows in (slice(0, 5), slice(5, 30)):
        wanted = expected_gradients(*(x[:1, rows] for x in (q, k, v, d_out)), block_size=8, topk=2)
        for got, want in zip(actual, wanted, strict=True):
            assert_close(got[rows], want[0], 5e-5)


def test_unchosen_blocks_get_exact_zero_gradients(backend, device):
    q, k, v = make_qkv(1, 4, 64, 2, 1, 16, device=device)
    _, d_k, d_v = gradients(q, k, v, torch.randn_like(q), block_size=8, topk=2, backend=backend)
    _, routing = moba_attention(q, k, v, block_size=8, topk=2, backend=backend, return_routing=True)
    unchosen = ~routing.block_mask(8).any(dim=2).any(dim=1)[0]
    assert unchosen.any()
    for grad in (d_k, d_v):
        by_block = grad[0].unflatten(0, (8, 8))
        assert (by_block[unchosen] == 0).all()
        assert (by_block[~unchosen] != 0).any(dim=1).all()


@pytest.mark.parametrize("keep_first", [0, 1])
def test_gradcheck(keep_first):
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 9, 11, 2, 1, 3))
    routing = moba_attention(q, k, v, block_size=3, topk=2, keep_first=keep_first, backend="reference",
                             return_routing=True)[1]  # fmt: skip

    def attention(q, k, v):
        return moba_attention(q, k, v, block_size=3, topk=2, routing=routing, backend="reference", return_lse=True)

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(backend, device, dtype):
    q, k, v = make_qkv(1, 64, 64, 2, 1, 16, dtype=dtype, device=device)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = moba_attention(*inputs, block_size=16, topk=3, backend=backend)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_routing_is_not_changed_by_reduced_precision_matmuls(backend, device):
    q, k, v = make_qkv(1, 100, 100, 1, 1, 64, device=device)
    options = {"block_size": 8, "topk": 4, "backend": backend, "return_routing": True}
    expected = moba_attention(q, k, v, **options)[1].indices
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(moba_attention(q, k, v, **options)[1].indices, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)


def test_autocast(backend, device):
    q, k, v = make_qkv(1, 40, 40, 2, 1, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = moba_attention(q, k, v, **options)
    assert torch.equal(out, moba_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options))
