"""Routers beside the mean key: one choice for a kv head's query heads, budgets, other queries and keys to route by."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, make_qkv

from moba import MoBAConfig, append_block_means, moba_attention, moba_attention_varlen
from moba.routers import TopP
from moba.routing import Selection, select_blocks

CPU_BACKENDS = ("reference", "pytorch")
BOTH = {"return_lse": True, "return_routing": True}
OPTIONS = {"block_size": 6, "topk": 5}


def test_shared_selection_is_that_of_the_summed_queries(backend, device):
    q, k, v = make_qkv(2, 60, 60, 6, 2, 16, exact_for=6, device=device)
    _, routing = moba_attention(q, k, v, **OPTIONS, router="shared", backend=backend, return_routing=True)
    by_group = routing.indices.unflatten(2, (2, 3))
    assert torch.equal(by_group, by_group[..., :1, :].expand_as(by_group))
    summed = q.unflatten(2, (2, 3)).sum(dim=3)
    _, expected = moba_attention(summed, k, v, **OPTIONS, backend=backend, return_routing=True)
    assert torch.equal(by_group[..., 0, :], expected.indices)
    _, own = moba_attention(q, k, v, **OPTIONS, backend=backend, return_routing=True)
    assert not torch.equal(routing.indices, own.indices)


def chosen_by_hand(q, k, t, head, p, *, topk, block_size, keep_first=0, keep_recent=0):
    """Blocks of the query at t, by the words of the docstring."""
    own, group = t // block_size, q.shape[1] // k.shape[1]
    scores = [
        (q[t, head].double() @ k[j * block_size : (j + 1) * block_size, head // group].double().mean(0)).item()
        for j in range(own)
    ]
    weights = [math.exp(score * q.shape[-1] ** -0.5) for score in scores]
    kept = [j for j in range(own) if j < keep_first or j >= own - keep_recent]
    order = sorted(range(own), key=lambda j: (j not in kept, -scores[j], j))[: topk - 1]
    taken, mass = [], 0.0
    for j in order:
        if j in kept or mass < p * sum(weights):
            taken.append(j)
        mass += weights[j]
    return [*sorted(taken), own]


@pytest.mark.parametrize("p", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("kept", [{}, {"keep_first": 1, "keep_recent": 1}], ids=["none kept", "kept"])
def test_top_p_takes_what_holds_the_mass(backend, device, p, kept):
    torch.manual_seed(1)
    q, k, v = make_qkv(1, 66, 66, 4, 2, 16, device=device)
    out, lse, routing = moba_attention(q * 3, k, v, **OPTIONS, **kept, router=TopP(p), backend=backend, **BOTH)
    counts = routing.num_selected()
    assert counts.unique().numel() > 2 or kept  # the budgets differ from query to query
    for t in (0, 5, 6, 17, 29, 41, 60, 65):
        for head in range(4):
            expected = chosen_by_hand(3 * q[0].cpu(), k[0].cpu(), t, head, p, topk=5, block_size=6, **kept)
            assert routing.indices[0, t, head].tolist() == expected + [-1] * (5 - len(expected)), (t, head)
    named = moba_attention(q * 3, k, v, **OPTIONS, **kept, router=f"top_p={p}", backend=backend, return_routing=True)
    assert torch.equal(named[1].indices, routing.indices)
    replayed = moba_attention(q * 3, k, v, **OPTIONS, routing=routing, backend="reference", return_lse=True)
    assert_close(out, replayed[0], 2e-5)
    assert_close(lse, replayed[1], 2e-5)


@pytest.mark.parametrize("router", ["mean", "shared", "top_p=0.5"])
def test_blocks_of_equal_means_are_known_to_be(router):
    means = torch.randn(3, 1, 4)[[0, 1, 0, 2]]
    assert Selection.of(8, 3, 0, 0, router).first_of_equals(means)[:, 0].tolist() == [0, 1, 0, 3]
    assert Selection.of(8, 3, 0, 0, lambda q, means: q).first_of_equals(means) is None


def test_equal_masses_go_to_the_lower_block():
    # Of a quarter each: half of the mass is two blocks.
    selection = Selection.of(1, 4, 0, 0, "top_p=0.5")
    chosen = select_blocks(torch.zeros(1, 1, 4), torch.tensor([4]), selection)
    assert chosen.tolist() == [[[0, 1, 4, -1]]]


@pytest.mark.parametrize("router", ["shared", "top_p=0.7"])
def test_prefill_in_chunks_and_decoding_choose_the_same(router):
    q, k, v = make_qkv(2, 60, 60, 4, 2, 16, exact_for=6)
    out, routing = moba_attention(q, k, v, **OPTIONS, router=router, return_routing=True)
    means = torch.empty(2, 10, 2, 16)
    append_block_means(means, k, num_new=60, block_size=6)
    for start, stop in ((0, 17), (17, 48), (58, 60)):
        some = moba_attention(q[:, start:stop], k[:, :stop], v[:, :stop], **OPTIONS, router=router, return_routing=True)
        assert torch.equal(some[1].indices, routing.indices[:, start:stop])
        assert_close(some[0], out[:, start:stop], 2e-5)
    with torch.no_grad():
        step = moba_attention(q[:, 58:], k, v, **OPTIONS, router=router, block_means=means, return_routing=True)
    assert torch.equal(step[1].indices, routing.indices[:, 58:])
    assert_close(step[0], out[:, 58:], 2e-5)


def test_a_budget_holds_where_topk_would_be_dense():
    q, k, v = make_qkv(1, 24, 24, 2, 1, 16)
    sparse, routing = moba_attention(q, k, v, block_size=6, topk=4, router="top_p=0.2", return_routing=True)
    assert (routing.num_selected() < 4)[0, 18:].any()
    assert_close(moba_attention(q, k, v, block_size=6, topk=4, router="top_p=0.2"), sparse, 1e-6)
    assert_close(moba_attention(q, k, v, block_size=6, topk=4, routing=routing), sparse, 1e-6)


def test_gradients_of_fewer_blocks_than_places():
    q, k, v = make_qkv(1, 40, 40, 4, 2, 8, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    options = {"block_size": 4, "topk": 5, "router": "top_p=0.5"}
    grads = []
    for backend in CPU_BACKENDS:
        out = moba_attention(*inputs, **options, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-10)


def test_route_by_other_queries_and_keys(backend, device):
    q, k, v = make_qkv(2, 60, 60, 4, 2, 16, exact_for=6, device=device)
    by_q, by_k, _ = make_qkv(2, 60, 60, 4, 2, 24, exact_for=6, device=device)
    end = torch.tensor([60, 47], dtype=torch.int32, device=device)
    _, routing = moba_attention(by_q, by_k, by_k, **OPTIONS, key_end=end, backend=backend, return_routing=True)
    expected = moba_attention(q, k, v, **OPTIONS, key_end=end, routing=routing, backend=backend)
    actual = moba_attention(q, k, v, **OPTIONS, key_end=end, route_by=(by_q, by_k), backend=backend)
    assert torch.equal(actual, expected)
    cu = torch.tensor([0, 25, 60], dtype=torch.int32, device=device)
    options = {**OPTIONS, "cu_seqlens": cu, "backend": backend}
    _, routing = moba_attention_varlen(by_q[0], by_k[0], by_k[0], **options, return_routing=True)
    expected = moba_attention_varlen(q[0], k[0], v[0], **options, routing=routing)
    assert torch.equal(moba_attention_varlen(q[0], k[0], v[0], **options, route_by=(by_q[0], by_k[0])), expected)


@pytest.mark.parametrize("router", ["shared", "top_p=0.9", "unrotated"])
def test_names_are_saved(router):
    config = MoBAConfig(64, 4, router=router)
    assert MoBAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("router", ["top_p=1", "top_p=0", "top_p=nan", "top_p=", "top-p", "unrotated"])
def test_refused_names(router):
    q, k, v = make_qkv(1, 8, 8, 2, 1, 4)
    with pytest.raises(ValueError, match=r"router|top_p"):
        moba_attention(q, k, v, block_size=4, topk=2, router=router)
    if router != "unrotated":
        with pytest.raises(ValueError, match=r"router|top_p"):
            MoBAConfig(4, 2, router=router)


def test_other_refusals():
    q, k, v = make_qkv(1, 8, 8, 2, 1, 4)
    options = {"block_size": 4, "topk": 2}
    with pytest.raises(ValueError, match="top_p must lie between 0 and 1"):
        TopP(1.0)
    for route_by in ((q, k[:, :7]), (q[..., :1], k), (q, k.double()), (q,), "mean"):
        with pytest.raises(ValueError, match="route_by"):
            moba_attention(q, k, v, **options, route_by=route_by)
    _, routing = moba_attention(q, k, v, **options, return_routing=True)
    with pytest.raises(ValueError, match="routing"):
        moba_attention(q, k, v, **options, route_by=(q, k), routing=routing)
