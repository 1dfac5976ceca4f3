"""Numbers that a model can meet: huge logits, outlier keys, NaN and inf, any finite scale. All backends."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from helpers import assert_close, gradients, make_qkv
from oracle import attend_batch
from torch.utils._python_dispatch import TorchDispatchMode

from moba import moba_attention, moba_route
from moba.backends import reference
from moba.numerics import full_fp32_matmul
from moba.routing import mean_keys
from moba.sequences import Span

BOTH = {"return_lse": True, "return_routing": True}


# Of integers, whose logits are exact, so that what is compared is not their rounding.


def huge(q, k, v):
    """Logits to ±4000."""
    return 64 * q, k, v


def outlier_keys(q, k, v):
    """Keys with logits far from all others, as massive activations make them."""
    k = k.clone()
    k[:, 5::37] *= 256
    return q, k, v


def sink(q, k, v):
    """A first token that takes all the weight of half of the queries."""
    q, k = q.clone(), k.clone()
    q[:, ::2, :, 0], k[:, 0, :, 0] = 16, 512
    return q, k, v


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [huge, outlier_keys, sink])
def test_gradients_are_finite_and_right_at_huge_logits(backend, device, change, dtype, with_lse):
    q, k, v = (x.to(dtype) for x in change(*make_qkv(1, 150, 150, 2, 1, 32, device=device, exact_for=16)))
    v = torch.randn_like(v)
    d_out = torch.randn_like(q)
    d_lse = torch.randn(q.shape[:3], device=device) if with_lse else None
    routing = moba_attention(q, k, v, block_size=16, topk=3, backend=backend, return_routing=True)[1]
    options = {"block_size": 16, "topk": 3, "scale": 0.5, "routing": routing}
    wide = [x.double() for x in (q, k, v, d_out)]
    expected = gradients(*wide, None if d_lse is None else d_lse.double(), **options, backend="reference")
    for actual, wanted in zip(gradients(q, k, v, d_out, d_lse, **options, backend=backend), expected, strict=True):
        assert torch.isfinite(actual).all()
        largest = wanted.abs().max()
        assert_close(actual / largest, wanted / largest, 2e-3 if dtype == torch.float32 else 4e-2)


def test_real_numbers_of_any_size(backend, device):
    """Logits to 10^10, whose rounding alone is hundreds: the softmax is of the largest, and nothing overflows."""
    q, k, v = make_qkv(1, 60, 60, 2, 1, 16, device=device)
    q, k = 3e4 * q, 3e4 * k
    options = {"block_size": 8, "topk": 3, "backend": backend}
    out, routing = moba_attention(q, k, v, **options, return_routing=True)
    for d_lse in (None, torch.randn(q.shape[:3], device=device)):
        for gradient in gradients(q, k, v, torch.randn_like(q), d_lse, **options):
            assert torch.isfinite(gradient).all()
    step = moba_attention(q[:, -3:], k, v, **options, block_means=mean_keys(k, 8))
    assert_close(step, out[:, -3:], 2e-5)
    expected = moba_attention(*(x.double() for x in (q, k, v)), block_size=8, topk=3, routing=routing,
                              backend="reference")  # fmt: skip
    assert_close(out, expected, 2e-5)


def needs_a_tight_mask(backend):
    if backend == "triton":
        pytest.skip("NaN and inf reach earlier queries of their own tile in these kernels: docs/kernels.md")


def poison(x, position, value):
    x = x.clone()
    x[:, position] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize(("block_size", "topk"), [(16, 3), (7, 2), (64, 1)])
def test_what_a_mask_hides_does_not_reach_a_result(backend, device, block_size, topk, where, value):
    if where != "key":
        needs_a_tight_mask(backend)
    q, k, v = make_qkv(1, 50, 50, 2, 1, 16, device=device)
    position = 37
    options = {"block_size": block_size, "topk": topk, "backend": backend, **BOTH}
    clean_out, clean_lse, _ = moba_attention(q, k, v, **options)
    bad_k = k if where == "value" else poison(k, position, value)
    bad_v = v if where == "key" else poison(v, position, value)
    out, lse, routing = moba_attention(q, bad_k, bad_v, **options)
    assert torch.equal(out[:, :position], clean_out[:, :position])
    assert torch.equal(lse[:, :position], clean_lse[:, :position])
    chose = routing.block_mask(-(-50 // block_size))[..., position // block_size]
    chose[:, :position] = False
    assert torch.isfinite(out[~chose]).all()
    assert not torch.isfinite(out[chose]).all(dim=-1).any() or where == "key"
    if where == "value":
        expected_out, expected_lse, _ = attend_batch(q.cpu(), k.cpu(), bad_v.cpu(), block_size=block_size, topk=topk)
        assert torch.equal(out.isnan().cpu(), expected_out.isnan())
        assert_close(out.masked_fill(out.isnan(), 0.0), expected_out.masked_fill(expected_out.isnan(), 0.0), 2e-5)
        assert_close(lse, expected_lse, 2e-5)


@pytest.mark.parametrize("topk", [1, 3])
def test_gradients_do_not_pass_through_a_mask(backend, device, topk):
    """NaN in a query, a key, a value and a gradient: it reaches the gradients of what they attend to, and no others."""
    needs_a_tight_mask(backend)
    q, k, v = make_qkv(1, 50, 50, 2, 1, 16, device=device)
    routing = moba_attention(q, k, v, block_size=16, topk=topk, backend=backend, return_routing=True)[1]
    options = {"block_size": 16, "topk": topk, "routing": routing, "backend": backend}
    seen = reference.attention_mask(routing.indices[0], Span(0, 0, 50, 0, 50), 16)  # [H, T, S]
    d_out = torch.randn_like(q)
    clean = gradients(q, k, v, d_out, **options)
    for position in (20, 37):
        for bad in range(3):
            given = [poison(x, position, torch.nan) if i == bad else x for i, x in enumerate((q, k, v))]
            d_q, d_k, d_v = gradients(*given, d_out, **options)
            bad_rows = seen[:, position].new_zeros(seen.shape[:2])  # [H, T]
            if bad == 0:
                bad_rows[:, position] = True
            else:
                bad_rows |= seen[:, :, position]
            bad_keys = (seen & bad_rows[..., None]).any(dim=1).any(dim=0)  # [S]
            assert torch.equal(d_q[0].isnan().all(dim=-1), bad_rows.T)
            for actual, wanted in ((d_k, clean[1]), (d_v, clean[2])):
                assert_close(actual[0, ~bad_keys], wanted[0, ~bad_keys], 5e-5)
            assert_close(d_q[0][~bad_rows.T], clean[0][0][~bad_rows.T], 5e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3, -1e-50, 1e-50, 1e-30])
def test_any_finite_scale(backend, device, scale):
    q, k, v = make_qkv(2, 30, 37, 4, 2, 16, device=device, exact_for=8)
    options = {"block_size": 8, "topk": 3, "scale": scale}
    expected_out, expected_lse, _ = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    out, lse = moba_attention(q, k, v, **options, backend=backend, return_lse=True)
    assert_close(out, expected_out, 2e-5)
    assert_close(lse, expected_lse, 2e-5)
    d_out = torch.randn_like(q)
    wide = [x.double() for x in (q, k, v, d_out)]
    expected = gradients(*wide, **options, backend="reference")
    for actual, wanted in zip(gradients(q, k, v, d_out, **options, backend=backend), expected, strict=True):
        assert_close(actual, wanted, 5e-5)
    step, means = q[:, -1:], mean_keys(k, 8)
    step_out = moba_attention(step, k, v, **options, backend=backend, block_means=means)
    assert_close(step_out, expected_out[:, -1:], 2e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-50])
def test_any_finite_scale_of_dense_attention(device, scale):
    q, k, v = make_qkv(1, 37, 37, 4, 2, 16, device=device)
    options = {"block_size": 8, "topk": 5, "scale": scale}
    assert_close(moba_attention(q, k, v, **options), moba_attention(q, k, v, **options, backend="reference"), 2e-5)


def test_dense_attention_on_a_cpu_keeps_the_mask():
    q, k, v = make_qkv(1, 37, 37, 4, 2, 16)
    bad = poison(v, 20, torch.nan)
    out = moba_attention(q, k, bad, block_size=8, topk=5)
    assert torch.isfinite(out[:, :20]).all()
    assert out[:, 20:].isnan().all()


@pytest.mark.parametrize("allowed", ["highest", "medium"])
def test_full_precision_holds_in_every_thread_and_is_given_back(allowed):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    inside = []

    def work():
        for _ in range(20):
            with full_fp32_matmul():
                time.sleep(random.random() / 1000)
                inside.append(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=work) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(inside) == {"highest"}
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_full_precision_holds_until_the_last_user_is_out():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    first, second = full_fp32_matmul(), full_fp32_matmul()
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_scores_are_products_in_full_precision():
    """Whatever is allowed outside; a CPU without bf16 units would compute the same numbers either way."""

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs or {})

    q, k, v = make_qkv(1, 40, 40, 2, 1, 16)
    options, means, seen = {"block_size": 8, "topk": 3, "backend": "pytorch"}, mean_keys(k, 8), []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precisions():
            moba_route(q, means, num_keys=40, **options)
            moba_attention(q[:, -1:], k, v, block_means=means, **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) >= 2
    assert set(seen) == {"highest"}


def test_precision_set_by_backend():
    """Torch's older getter refuses to speak once `torch.backends.…` was used."""
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(mkldnn, "fp32_precision"):
        pytest.skip("this torch has one precision for all backends")
    q, k, v = make_qkv(1, 200, 200, 2, 1, 64)
    options = {"block_size": 8, "topk": 4, "backend": "pytorch", "return_routing": True}
    expected = moba_attention(q, k, v, **options)[1].indices
    mkldnn.fp32_precision = "bf16"
    try:
        assert torch.equal(moba_attention(q, k, v, **options)[1].indices, expected)
        with full_fp32_matmul():
            assert mkldnn.fp32_precision == "ieee"
        assert mkldnn.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
