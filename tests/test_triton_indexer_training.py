"""Kernels of the indexers' loss against fp64: log masses, largest products, and the loss with its gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import make_qkv, relative_error
from test_hf_indexer_training import SIZE, naive_loss

from moba.backends import pytorch, reference
from moba.hf.indexer_training import Target, _Divergence

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends import triton as backend  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


def assert_as_close(actual, plain, exact, places):
    """Nowhere much further from fp64 than plain torch, in the same precision, is somewhere."""
    errors = [(x[:, places].double() - exact[:, places]).abs().max() for x in (actual, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("block_size", [1, 7, 16, 130])
@pytest.mark.parametrize(("queries", "keys"), [(1, 15), (40, 40), (70, 300)])
def test_log_masses_and_largest_products(queries, keys, block_size, softcap, dtype):
    q, k = (x[0] for x in make_qkv(1, queries, keys, 4, 2, 40, dtype=dtype, device=DEVICE)[:2])
    own = torch.arange(keys - queries, keys, device=DEVICE)[:, None] // block_size
    block = torch.arange(-(-keys // block_size), device=DEVICE)
    for name, is_asked, options in (
        ("log_masses", block <= own, (block_size, -0.4, softcap)),
        ("largest_products", block < own, (block_size,)),
    ):
        actual, plain = (getattr(module, name)(q, k, *options) for module in (backend, pytorch))
        exact = getattr(reference, name)(q.double(), k.double(), *options)
        assert actual.shape == plain.shape == exact.shape
        if is_asked.any():
            assert_as_close(actual, plain, exact, is_asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_loss_and_gradients(is_sparse, pool, dtype):
    """No further from fp64 than what plain torch computes from the same inputs."""
    by_q, by_k, k = (torch.randn(2, 27, 2, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    q, sinks = torch.randn(2, 27, 4, 16, device=DEVICE, dtype=dtype), torch.randn(4, device=DEVICE)
    chosen = torch.randint(-1, 7, (2, 27, 2, 3), device=DEVICE).int() if is_sparse else None
    spans = [(0, 0, 27), (1, 2, 5), (1, 5, 24)]
    target = Target(q, k, chosen, spans, SIZE, pool, 0.7, 2.0, sinks)
    exact = target._replace(q=q.double(), k=k.double(), sinks=sinks.double())

    def found(loss_of, inputs, target):
        inputs = [x.detach().requires_grad_() for x in inputs]
        loss = loss_of(*inputs, target)
        return [loss, *torch.autograd.grad(loss, inputs)]

    expected = found(naive_loss, (by_q.double(), by_k.double()), exact)
    by_torch = found(_Divergence.apply, (by_q, by_k), target._replace(backend="pytorch"))
    by_kernels = found(_Divergence.apply, (by_q, by_k), target._replace(backend="triton"))
    for exactly, plain, actual in zip(expected, by_torch, by_kernels, strict=True):
        assert actual.dtype == plain.dtype
        assert relative_error(actual, exactly) <= 2 * relative_error(plain, exactly) + 2e-7


@pytest.mark.parametrize("scale", [None, 0.3])
def test_operator(scale):
    q, k = make_qkv(1, 20, 30, 4, 2, 16, device=DEVICE)[:2]
    torch.library.opcheck(
        torch.ops.moba.triton_block_numbers, (q[0], k[0], 8, scale, None), test_utils=("test_schema", "test_faketensor")
    )
