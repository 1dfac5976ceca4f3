"""Making inputs and comparing results."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba import moba_attention
from moba.backends import load


def make_qkv(batch, queries, keys, heads, kv_heads, head_dim, value_dim=None, *, dtype=torch.float32, device="cpu",
             exact_for=None):  # fmt: skip
    """Random q, k, v. With `exact_for=block_size`, small integers whose block means and scores are exact everywhere."""

    def draw(*shape):
        x = torch.randn(shape) if exact_for is None else torch.randint(-2, 3, shape).float()
        return x.to(device=device, dtype=dtype)

    q, k = draw(batch, queries, heads, head_dim), draw(batch, keys, kv_heads, head_dim)
    v = draw(batch, keys, kv_heads, head_dim if value_dim is None else value_dim)
    if exact_for is not None:
        k *= exact_for // (exact_for & -exact_for)  # the odd part: what a power of two would not divide exactly
    return q, k, v


def gradients(q, k, v, d_out, d_lse=None, **options):
    """dQ, dK, dV of `moba_attention` through out, and through the log-sum-exp where its gradient is given."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = moba_attention(q, k, v, **options, return_lse=True)
    roots, grads = ([out], [d_out]) if d_lse is None else ([out, lse], [d_out, d_lse])
    return torch.autograd.grad(roots, (q, k, v), grads)


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖ in fp64; NaN anywhere gives NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(actual, expected, tolerance):
    """Same non-finite places, finite values within `tolerance` (absolute and relative); names the worst index."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite), "non-finite values at different places"
    assert torch.equal(actual[~finite], expected[~finite]), "different non-finite values"
    error = torch.where(finite, (actual - expected).abs() - tolerance * (1 + expected.abs()), 0.0)
    if error.numel() and error.max() > 0:
        worst = tuple(i.item() for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(f"worst at {worst}: got {actual[worst]}, expected {expected[worst]}")


def assert_is_rounded(actual, exact):
    """Within half a unit in the last place of actual's dtype, and the error of an fp32 sum of values of order one."""
    error = (actual.double().cpu() - exact.cpu()).abs()
    bound = torch.finfo(actual.dtype).eps / 2 * 1.001 * exact.cpu().abs() + 1e-6
    assert (error <= bound).all(), f"largest error {error.max()}"


def needs_dtype(backend, dtype):
    """Skip where a backend refuses a dtype by design; it must say so."""
    q = torch.zeros(1, 1, 1, 16, dtype=dtype)
    if backend == "triton" and dtype == torch.float64:
        assert "float64" in load(backend).unsupported(q, q)
        pytest.skip("the triton backend refuses fp64 by design")


# Bound on the elementwise error of one forward, per dtype: a few units in the last place of values of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The log-sum-exp is fp32 for half inputs too, but torch's CPU kernel takes a cheaper exp for them.
LSE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}


class LargestNewTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator made while this was active."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.num_elements = max(self.num_elements, x.untyped_storage().nbytes() // x.element_size())
        return result
