"""What is the pytorch backend's own: passes and steps, memory, and the path of devices without a flash kernel."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close, assert_is_rounded, gradients, make_qkv
from test_semantics import CASES

from moba import backends, moba_attention, routing
from moba.backends.pytorch import attention as pytorch_attention
from moba.backends.pytorch import dense


@pytest.fixture
def tiny_passes(monkeypatch):
    monkeypatch.setattr(pytorch_attention, "CPU_PASS_BYTES", 1)
    monkeypatch.setattr(pytorch_attention, "CPU_STEP_BYTES", 1)


@pytest.mark.usefixtures("tiny_passes")
@pytest.mark.parametrize("case", ["many blocks", "block of seven", "chunk of a prefill", "six heads of two"])
def test_many_passes_and_steps_change_nothing(case):
    *shape, block_size, topk = CASES[case]
    shape = [shape[0], shape[1] + 150, shape[2] + 150, *shape[3:]]
    q, k, v = make_qkv(*shape, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk, "scale": 0.1}
    out, lse = moba_attention(q, k, v, **options, backend="pytorch", return_lse=True)
    expected_out, expected_lse = moba_attention(q, k, v, **options, backend="reference", return_lse=True)
    assert_close(out, expected_out, 2e-5)
    assert_close(lse, expected_lse, 2e-5)
    d_out = torch.randn_like(q)
    expected = gradients(q, k, v, d_out, **options, backend="reference")
    for actual, wanted in zip(gradients(q, k, v, d_out, **options, backend="pytorch"), expected, strict=True):
        assert_close(actual, wanted, 5e-5)


@pytest.mark.parametrize("chosen", ["all", "fewer"])
@pytest.mark.parametrize("offset", [0, 70])
def test_first_queries_that_read_everything_are_one_problem(monkeypatch, offset, chosen):
    q, k, v = make_qkv(1, 400, 400 + offset, 4, 2, 16)
    problems, forward = set(), dense.forward

    def observed(q, k, v, logits, is_causal, is_careful=False):
        problems.add((q.shape[2], k.shape[2], is_causal))
        return forward(q, k, v, logits, is_causal, is_careful)

    monkeypatch.setattr(dense, "forward", observed)
    choice = {"topk": 6} if chosen == "all" else {"block_indices": torch.tensor([0, 1, 2, 4, 5]).expand(1, 400, 4, 5)}
    moba_attention(q, k, v, block_size=32, **choice, backend="pytorch")
    count = 192 - offset
    expected = {(count, count, True), (count, offset, False)} if offset else {(count, count, True)}
    assert (expected <= problems) == (chosen == "all")


def test_by_block_view_is_in_order():
    past = torch.tensor([[[0, 2]], [[1, 0]], [[-1, 1]], [[0, 1]], [[7, 3]]])
    entries, counts = routing.by_block(past.int(), torch.tensor([0, 2, 2, 2, 3]), 3)
    assert entries.tolist() == [3, 6, 2, 5, 7]
    assert counts.tolist() == [2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 5, 1001])
def test_mean_keys_in_chunks_of_blocks(monkeypatch, block_size, dtype):
    k = torch.randn(2, 2050, 2, 3, dtype=dtype) + 3
    expected = k[:, : 2050 // block_size * block_size].double().unflatten(1, (-1, block_size)).mean(2)
    whole = routing.mean_keys(k, block_size)
    assert_is_rounded(whole, expected)
    monkeypatch.setattr(routing, "_CHUNK_SIZE", 64)
    assert torch.equal(routing.mean_keys(k, block_size), whole)


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_formula_equals_the_flash_kernel(monkeypatch, is_causal):
    """Other devices take the formula; here both run on the CPU, forward and backward."""
    q, k, v = (torch.randn(3, 2, 24, 16, dtype=torch.float64) for _ in range(3))
    d_out = torch.randn_like(q)
    out, lse = dense.forward(q, k, v, dense.Logits(0.3), is_causal)
    grads = dense.backward(d_out, None, q, k, v, out, lse, dense.Logits(0.3), is_causal)
    monkeypatch.setattr(dense, "_has_flash_kernel", lambda q: False)
    assert_close(dense.forward(q, k, v, dense.Logits(0.3), is_causal)[0], out, 1e-12)
    assert_close(dense.forward(q, k, v, dense.Logits(0.3), is_causal)[1], lse, 1e-12)
    for formula, kernel in zip(
        dense.backward(d_out, None, q, k, v, out, lse, dense.Logits(0.3), is_causal), grads, strict=True
    ):
        assert_close(formula, kernel, 1e-12)


def test_semantics_without_the_flash_kernel(monkeypatch):
    monkeypatch.setattr(dense, "_has_flash_kernel", lambda q: False)
    q, k, v = make_qkv(2, 45, 50, 4, 2, 16)
    options = {"block_size": 8, "topk": 3}
    d_out = torch.randn_like(q)
    expected = gradients(q, k, v, d_out, **options, backend="reference")
    for actual, wanted in zip(gradients(q, k, v, d_out, **options, backend="pytorch"), expected, strict=True):
        assert_close(actual, wanted, 5e-5)


def test_runs_inside_torch_compile():
    """The backend's loops over data stay outside the graph; what is around them is compiled."""

    def double(q, k, v):
        return 2 * moba_attention(q, k, v, block_size=16, topk=3, backend="pytorch")

    q, k, v = make_qkv(1, 100, 100, 2, 1, 16)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(double, backend=graphs)
    assert torch.equal(compiled(q, k, v), double(q, k, v))
    assert torch.equal(compiled(k.expand_as(q).clone(), k, v), double(k.expand_as(q), k, v))
    assert graphs.frame_count <= 2 * 3, "more than: before routing, between it and attention, after; for two layouts"


def test_an_eager_call_between_compiled_ones_does_not_compile_them_again(monkeypatch):
    monkeypatch.setattr(backends, "_announced", set())
    q, k, v = make_qkv(1, 100, 100, 2, 1, 16)
    compiled = torch.compile(partial(moba_attention, block_size=16, topk=3), backend="eager")
    compiled(q, k, v)
    moba_attention(q, k, v, block_size=16, topk=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    """Errors against fp64 are at most twice those of the reference, plain torch in the same dtype."""
    q, k, v = make_qkv(1, 512, 512, 4, 2, 64, dtype=dtype)
    d_out = torch.randn_like(q)
    chosen = moba_attention(q, k, v, block_size=32, topk=4, backend="reference", return_routing=True)[1]
    options = {"block_size": 32, "topk": 4, "routing": chosen}

    def results(backend, q, k, v, d_out):
        return moba_attention(q, k, v, **options, backend=backend), *gradients(
            q, k, v, d_out, **options, backend=backend
        )

    exact = results("reference", *(x.double() for x in (q, k, v, d_out)))
    plain = plain_attention(q, k, v, d_out, chosen)
    for name, ours, theirs, true in zip(("out", "d_q", "d_k", "d_v"), results("pytorch", q, k, v, d_out), plain, exact,
                                        strict=True):  # fmt: skip
        error, budget = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= 2 * budget, f"{name}: {error:.2e} against {budget:.2e}"
        assert budget <= 8 * torch.finfo(dtype).eps, f"{name}: what is called exact is not"


def plain_attention(q, k, v, d_out, routing):
    """Masked softmax attention with every intermediate in the inputs' dtype, and its gradients by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    q, k, v = (x[0].transpose(0, 1) for x in leaves)
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    position = torch.arange(q.shape[1])
    chosen = routing.block_mask(-(-q.shape[1] // routing.block_size))[0].transpose(0, 1)
    mask = chosen[..., position // routing.block_size] & (position <= position[:, None])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    out = (torch.softmax(scores, dim=-1) @ v).transpose(0, 1)[None]
    return out, *torch.autograd.grad(out, leaves, d_out)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 24)])
def test_the_careful_ways_take_values_of_another_head_dim_and_softcaps(head_dim, value_dim, softcap):
    q, k, v = make_qkv(1, 40, 40, 2, 1, head_dim, value_dim)
    options = {"block_size": 8, "topk": 3, "softcap": softcap, "backend": "pytorch"}
    d_out = torch.randn(1, 40, 2, value_dim)
    expected, (expected_d_q, _, _) = moba_attention(q, k, v, **options), gradients(q, k, v, d_out, **options)
    v[:, 30:] = torch.nan
    assert_close(moba_attention(q, k, v, **options)[:, :30], expected[:, :30], 2e-6)
    assert_close(gradients(q, k, v, d_out, **options)[0][:, :30], expected_d_q[:, :30], 2e-6)
