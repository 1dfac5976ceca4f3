"""Semantics of attention sinks and softcaps. Over every backend, as test_semantics.py."""

from __future__ import annotations

import pytest
import torch
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, make_qkv
from oracle import attend_batch
from test_decode import Pages, means_of
from test_semantics import needs_dtype

from moba import merge_partials, moba_attention, moba_attention_paged, moba_attention_varlen

# Batch, queries, keys, heads, kv heads, head dims of keys and values, block size, topk.
CASES = {
    "plain": (1, 30, 30, 4, 2, 16, 16, 8, 3),
    "other values": (2, 20, 20, 2, 1, 24, 16, 7, 2),
    "chunk of a prefill": (1, 9, 37, 2, 1, 16, 16, 8, 3),
    "one query": (2, 1, 45, 4, 2, 16, 16, 8, 3),
}


def sinks_of(heads, device):
    """Below all logits, among them, far above."""
    return torch.tensor([-4.0, 0.5, 2.0, 30.0], device=device)[:heads]


def results_and_gradients(call, leaves, d_out, d_lse):
    """Out, lse, then gradients of the leaves through out, and through lse if there is a d_lse."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = call(*leaves)
    if d_lse is None:
        return out, lse, *torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    return out, lse, *torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), d_lse.to(lse.dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("with_sinks", "softcap"), [(True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(backend, device, case, with_sinks, softcap, dtype):
    """Forward and gradients; steps of decoding as well."""
    needs_dtype(backend, dtype)
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, dtype=dtype, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk, "scale": 0.1, "softcap": softcap}
    d_out = torch.randn(*q.shape[:3], v.shape[3], device=device)
    d_lse = torch.randn(q.shape[:3]) if softcap is None else None
    inputs = [q, k, v, sinks_of(q.shape[2], device)] if with_sinks else [q, k, v]

    def oracle(q, k, v, sinks=None):
        return attend_batch(q, k, v, sinks=sinks, **options)[:2]

    def moba(q, k, v, sinks=None, **more):
        return moba_attention(q, k, v, sinks=sinks, **options, **more, backend=backend, return_lse=True)

    expected = results_and_gradients(oracle, [x.cpu().double() for x in inputs], d_out.cpu(), d_lse)
    actual = results_and_gradients(moba, inputs, d_out, None if d_lse is None else d_lse.to(device))
    step = moba(*inputs, block_means=means_of(k, backend, block_size))
    for out, lse in (actual[:2], step):
        assert out.dtype == dtype
        assert_close(out, expected[0], TOLERANCE[dtype])
        assert_close(lse, expected[1], LSE_TOLERANCE[dtype])
    for x, got, want in zip(inputs, actual[2:], expected[2:], strict=True):
        assert got.dtype == x.dtype
        assert_close(got, want, {torch.bfloat16: 6e-2}.get(dtype, 5e-5))


def test_no_sink_is_minus_infinity(backend, device):
    q, k, v = (x.requires_grad_() for x in make_qkv(2, 30, 30, 4, 2, 16, device=device))
    sinks = torch.full((4,), -torch.inf, device=device, requires_grad=True)
    start = torch.tensor([0, 11], dtype=torch.int32, device=device)
    options = {"block_size": 8, "topk": 2, "key_start": start, "backend": backend, "return_lse": True}
    out, lse = moba_attention(q, k, v, sinks=sinks, **options)
    expected_out, expected_lse = moba_attention(q, k, v, **options)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    assert (lse[1, :11] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), (q, k, v, sinks))
    assert all(torch.isfinite(x).all() for x in grads)
    assert (grads[3] == 0).all()


def test_sinks_of_packed_and_paged_rows(backend, device):
    q, k, v = make_qkv(2, 45, 45, 4, 2, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend, "sinks": sinks_of(4, device), "return_lse": True}
    whole = moba_attention(q, k, v, **options)
    cu = torch.tensor([0, 45, 90], dtype=torch.int32, device=device)
    packed = moba_attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens=cu, **options)
    paged = moba_attention_paged(q[:, -2:], **Pages(k, v, [45, 45], 16, 8).filled(backend), **options)
    for expected, of_packed, of_pages in zip(whole, packed, paged, strict=True):
        assert_close(of_packed.unflatten(0, (2, 45)), expected, 2e-6)
        assert_close(of_pages, expected[:, -2:], 2e-6)


def test_parts_of_which_one_was_given_the_sinks_make_the_whole(backend, device):
    q, k, v = make_qkv(1, 45, 45, 2, 2, 16, device=device)
    options = {"block_size": 15, "backend": backend, "sinks": sinks_of(2, device), "return_lse": True}
    expected = moba_attention(q, k, v, topk=3, **options)
    own_out, own_lse = moba_attention(q, k, v, topk=1, **options)
    logits = torch.einsum("bthd,bshd->bths", q[:, 30:], k[:, :30]) / 4
    before_out = torch.einsum("bths,bshd->bthd", logits.softmax(-1), v[:, :30])
    outs, lses = torch.stack([own_out[:, 30:], before_out]), torch.stack([own_lse[:, 30:], logits.logsumexp(-1)])
    for actual, wanted in zip(merge_partials(outs, lses), expected, strict=True):
        assert_close(actual, wanted[:, 30:], 2e-6)


@pytest.mark.parametrize("queries", [1, 40])
def test_auto_never_forgets_them(device, queries):
    q, k, v = make_qkv(1, queries, 40, 4, 2, 16, device=device)
    for asked in ({"sinks": sinks_of(4, device)}, {"softcap": 0.5}):
        wanted = moba_attention(q, k, v, block_size=8, topk=5, backend="reference", **asked)
        assert_close(moba_attention(q, k, v, block_size=8, topk=5, **asked), wanted, 2e-5)


@pytest.mark.parametrize("topk", [1, 9])
def test_a_softcap_is_of_the_logits(backend, device, topk):
    """Large logits, where it is what decides, and small ones, where it is nothing."""
    q, k, v = make_qkv(1, 40, 40, 2, 1, 16, device=device)
    options = {"block_size": 8, "topk": topk, "backend": backend}
    assert_close(moba_attention(q, k, v, softcap=1e4, **options), moba_attention(q, k, v, **options), 2e-5)
    capped = moba_attention(100 * q, k, v, softcap=3.0, **options)
    wanted, _, _ = attend_batch(100 * q.cpu(), k.cpu(), v.cpu(), softcap=3.0, block_size=8, topk=topk)
    assert_close(capped, wanted, 2e-5)
    assert (capped - moba_attention(100 * q, k, v, **options)).abs().max() > 0.1
