"""Semantics: which blocks are chosen, and what a routing means. Over every backend, as test_semantics.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, gradients, make_qkv, needs_dtype
from hypothesis import given
from hypothesis import strategies as st
from oracle import attend_batch
from test_decode import moba_scores

from moba import Routing, backends, moba_attention, moba_attention_varlen, moba_route
from moba.routing import given_indices, mean_keys

BOTH = {"return_lse": True, "return_routing": True}


def test_ties_go_to_the_lower_block(backend, device):
    q, k, v = make_qkv(1, 64, 64, 2, 1, 16, device=device, exact_for=8)
    k = torch.ones_like(k)
    _, routing = moba_attention(q, k, v, block_size=8, topk=3, backend=backend, return_routing=True)
    assert routing.indices[0, 63].tolist() == [[0, 1, 7]] * 2
    assert routing.indices[0, 12].tolist() == [[0, 1, -1]] * 2

    def latest(q, means):
        return torch.arange(means.shape[0], device=device).float().expand(*q.shape[:2], -1)

    # A rule of the user's own may rank blocks of equal means differently.
    _, routing = moba_attention(q, k, v, block_size=8, topk=3, router=latest, backend=backend, return_routing=True)
    assert routing.indices[0, 63].tolist() == [[5, 6, 7]] * 2


# A matrix product may round equal columns to different numbers: MKL does for one row, and by its width for several.
@pytest.mark.parametrize(
    ("router", "dtype", "heads", "kv_heads"),
    [("mean", dtype, *heads) for dtype in (torch.float32, torch.bfloat16, torch.float64) for heads in ((1, 1), (4, 2))]
    + [(router, torch.float32, 4, 2) for router in ("shared", "top_p=0.999")],
)
def test_equal_means_tie(backend, device, router, dtype, heads, kv_heads):
    needs_dtype(backend, dtype)
    kinds = torch.randn(2, 3, kv_heads, 40, dtype=dtype, device=device)
    # A kv head's blocks are of three kinds in turn, another's of two.
    cycle = [3 - head * kv_heads // heads for head in range(heads)]
    k = torch.stack([kinds[:, torch.arange(31) // 2 % (3 - head), head] for head in range(kv_heads)], dim=2)
    q = torch.randn(2, 31, heads, 40, dtype=dtype, device=device)
    options = {"block_size": 2, "topk": 4, "router": router, "backend": backend, "return_routing": True}
    by_prefill = moba_attention(q, k, k, **options)[1].indices
    for means in (None, mean_keys(k, 2)):
        by_step = moba_attention(q[:, -1:], k, k, **options, block_means=means)[1].indices
        assert torch.equal(by_step, by_prefill[:, -1:])
    for of_heads in by_prefill.flatten(0, 1).tolist():
        for count, blocks in zip(cycle, of_heads, strict=True):
            past = set(blocks) - {max(blocks), -1}
            # A later block of a kind is taken after all earlier ones only.
            assert all(block - count in past for block in past if block >= count)


@pytest.mark.parametrize("topk", [3, 20])
def test_scores_that_are_not_finite(backend, device, topk):
    """NaN and -inf rank below every number and tie; +inf ranks above."""
    q, k, v = make_qkv(1, 160, 160, 1, 1, 16, device=device, exact_for=4)
    q[..., 1:] = 0
    q[..., 0] = q[..., 0].abs() + 1
    for value, block in ((torch.nan, 1), (-torch.inf, 3), (torch.inf, 5), (torch.nan, 9), (torch.inf, 20)):
        k[:, 4 * block : 4 * block + 4, :, 0] = value
    for keys in (k, torch.full_like(k, torch.nan)):
        means = mean_keys(keys, 4)
        rank = means[0, :, 0, 0].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist()
        indices = moba_route(q, means, num_keys=160, block_size=4, topk=topk, backend=backend).indices
        for t, blocks in enumerate(indices[0, :, 0].tolist()):
            best = sorted(range(t // 4), key=lambda j: (-rank[j], j))[: topk - 1]
            assert blocks == [*sorted(best), t // 4] + [-1] * (topk - 1 - len(best)), t
        step = {"block_size": 4, "topk": topk, "block_means": means, "backend": backend, "return_routing": True}
        assert torch.equal(moba_attention(q[:, -1:], keys, v, **step)[1].indices, indices[:, -1:])


@pytest.mark.parametrize(("first", "recent"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_kept_blocks(backend, device, first, recent):
    q, k, v = make_qkv(1, 42, 42, 2, 1, 16, device=device, exact_for=6)
    options = {"block_size": 6, "topk": 4, "keep_first": first, "keep_recent": recent}
    out, lse, routing = moba_attention(q, k, v, **options, backend=backend, **BOTH)
    expected_out, expected_lse, expected = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    assert torch.equal(routing.indices.cpu(), expected)
    assert_close(out, expected_out, 2e-5)
    assert_close(lse, expected_lse, 2e-5)


@pytest.mark.parametrize(
    ("router", "keep", "same_as"),
    [
        ("recent", {}, {"keep_recent": 3}),
        ("recent", {"keep_first": 1}, {"keep_first": 1, "keep_recent": 2}),
        ("recent", {"keep_recent": 1}, {"keep_recent": 3}),
        ("sink", {}, {"keep_first": 1, "keep_recent": 2}),
        ("sink", {"keep_first": 2}, {"keep_first": 2, "keep_recent": 1}),
        ("sink", {"keep_recent": 3}, {"keep_recent": 3}),
        (moba_scores, {}, {}),
        (lambda q, means: -moba_scores(q, means), {}, None),
    ],
)
def test_routers(backend, device, router, keep, same_as):
    q, k, v = make_qkv(1, 48, 48, 2, 1, 16, device=device, exact_for=6)
    options = {"block_size": 6, "topk": 4, "backend": backend}
    out, routing = moba_attention(q, k, v, **options, **keep, router=router, return_routing=True)
    if same_as is None:
        same_as = {"routing": moba_attention(-q, k, v, **options, return_routing=True)[1]}
    expected_out, expected = moba_attention(q, k, v, **options, **same_as, return_routing=True)
    assert torch.equal(routing.indices, expected.indices)
    assert torch.equal(out, expected_out)


def test_replayed_routing_is_fresh_routing(backend, device):
    q, k, v = make_qkv(1, 45, 45, 2, 1, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    out, routing = moba_attention(q, k, v, **options, return_routing=True)
    assert torch.equal(moba_attention(q, k, v, **options, routing=routing), out)
    assert torch.equal(moba_attention(q, k, v, block_size=8, backend=backend, routing=routing), out), "topk left out"
    other = moba_attention(torch.randn_like(q), k, v, **options, return_routing=True)[1]
    assert not torch.equal(moba_attention(q, k, v, **options, routing=other), out)
    cu = torch.tensor([0, 20, 45], dtype=torch.int32, device=device)
    packed = q[0], k[0], v[0]
    out, routing = moba_attention_varlen(*packed, cu_seqlens=cu, **options, return_routing=True)
    assert torch.equal(moba_attention_varlen(*packed, cu_seqlens=cu, **options, routing=routing), out)


def test_close_scores_may_differ_only_within_summation_error(backend, device):
    """On real inputs no block is chosen over one whose fp64 score is higher by more than ε."""
    q, k, v = make_qkv(1, 256, 512, 2, 1, 64, device=device)
    routing = moba_attention(q, k, v, block_size=8, topk=5, backend=backend, return_routing=True)[1]
    chosen = routing.block_mask(64)[0].cpu()
    q, blocks = q[0].cpu().double(), k[0, :, 0].cpu().double().unflatten(0, (64, 8))
    scores = q @ blocks.mean(1).T
    # What sums of 64 products and of 8 keys, rounded to 24 bits, can differ by at most.
    epsilon = (64 + 8) * 2**-24 * (q.abs() @ blocks.abs().mean(1).T)
    own = (torch.arange(256, 512) // 8)[:, None, None]
    block = torch.arange(64)
    assert (chosen.sum(-1) == 5).all()
    assert chosen.gather(-1, own.expand(-1, 2, 1)).all()
    past = block < own
    least_chosen = (scores + epsilon).masked_fill(~(chosen & past), torch.inf).amin(-1)
    most_left = (scores - epsilon).masked_fill(chosen | ~past, -torch.inf).amax(-1)
    assert (least_chosen >= most_left).all()


shapes = st.fixed_dictionaries(
    {
        "queries": st.integers(1, 40),
        "extra_keys": st.integers(0, 40),
        "group": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "block_size": st.integers(1, 20),
        "topk": st.integers(1, 6),
        "seed": st.integers(0, 10_000),
        "data": st.sampled_from(["normal", "integers", "constant"]),
    }
)


@given(shape=shapes, kept=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_routing_properties(backend, device, shape, kept):
    """Causal, ascending, unique, own block last, min(topk, b + 1) of them, kept ones present; the oracle's if exact."""
    torch.manual_seed(shape["seed"])
    topk, block_size = shape["topk"], shape["block_size"]
    first = min(kept[0], topk - 1)
    recent = min(kept[1], topk - 1 - first)
    heads, keys = shape["group"] * shape["kv_heads"], shape["queries"] + shape["extra_keys"]
    exact_for = None if shape["data"] == "normal" else block_size
    q, k, v = make_qkv(1, shape["queries"], keys, heads, shape["kv_heads"], 16, device=device, exact_for=exact_for)
    if shape["data"] == "constant":
        k = torch.ones_like(k)
    options = {"block_size": block_size, "topk": topk, "keep_first": first, "keep_recent": recent}
    indices = moba_attention(q, k, v, **options, backend=backend, return_routing=True)[1].indices[0].cpu()
    own = torch.arange(keys - shape["queries"], keys) // block_size
    for row, blocks_of_heads in enumerate(indices.tolist()):
        for blocks in blocks_of_heads:
            count = min(topk, own[row].item() + 1)
            chosen = blocks[:count]
            assert blocks[count:] == [-1] * (topk - count)
            assert chosen == sorted(set(chosen))
            assert chosen[0] >= 0
            assert chosen[-1] == own[row]
            assert set(range(min(first, own[row] + 1))) <= set(chosen)
            assert set(range(max(0, own[row] - recent), own[row])) <= set(chosen)
    if shape["data"] != "normal":
        expected = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)[2][0]
        assert torch.equal(indices, expected)


def attended_blocks(blocks, own):
    """What a routing made by hand means: the blocks up to the own one, once each, and the own one always."""
    return sorted({block for block in blocks if 0 <= block <= own} | {own})


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_a_routing_made_by_hand_has_one_meaning(backend, device, packed):
    q, k, v = make_qkv(2, 30, 45, 4, 2, 16, device=device)
    by_hand = torch.tensor(
        [[0, 0, 5], [4, 1, 0], [-1, -1, -1], [10**6, 0, -7], [2, 1, 0], [3, 3, 3], [5, 5, 1], [-(2**31), 2**31 - 1, 2]],
        dtype=torch.int32,
    )
    indices = by_hand.repeat(30, 1).view(1, 30, 8, 3).expand(2, -1, -1, -1)[:, :, ::2].clone().to(device)
    indices[1] = indices[1].flip(0, 2)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    own = [position // 8 for position in range(15, 45)]
    widest = torch.full((2, 30, 4, 4), -1, dtype=torch.int32)
    for row, blocks_of_row in enumerate(indices.tolist()):
        for query, blocks_of_heads in enumerate(blocks_of_row):
            for head, blocks in enumerate(blocks_of_heads):
                blocks = attended_blocks(blocks, own[query])
                widest[row, query, head, : len(blocks)] = torch.tensor(blocks)
    assert (widest[..., -1] >= 0).any(), "some rows list as many past blocks as there are places"
    assert torch.equal(given_indices(indices, torch.tensor([own, own], device=device)).cpu(), widest)
    assert torch.equal(given_indices(widest, torch.tensor([own, own])), widest)
    mask = Routing(widest, 8).block_mask(6).repeat_interleave(8, dim=-1)[..., :45]
    mask &= torch.arange(45) <= torch.arange(15, 45)[:, None, None]
    wide = [x.double().cpu().transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask.transpose(1, 2), enable_gqa=True).transpose(1, 2)
    if packed:
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (30, 45))
        bounds = {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k, "routing": Routing(indices.flatten(0, 1), 8)}
        out = moba_attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), **bounds, **options).unflatten(0, (2, 30))
    else:
        out, routing = moba_attention(q, k, v, **options, routing=Routing(indices, 8), return_routing=True)
        assert torch.equal(routing.indices, indices)
    assert_close(out, expected, 2e-5)
    d_out = torch.randn_like(q)
    if not packed:
        given = gradients(q, k, v, d_out, **options, routing=Routing(indices, 8))
        sorted_first = gradients(q, k, v, d_out, **{**options, "topk": 4}, routing=Routing(widest.to(device), 8))
        for actual, wanted in zip(given, sorted_first, strict=True):
            assert_close(actual, wanted, 2e-5)


def test_what_a_routing_says_of_itself():
    routing = Routing(torch.tensor([[[0, 3, -1]], [[1, 2, 5]]], dtype=torch.int32), 8)
    assert routing.topk == 3
    assert routing.own_block().tolist() == [[3], [5]]
    assert routing.num_selected().tolist() == [[2], [3]]
    assert routing.block_mask().int().tolist() == [[[1, 0, 0, 1, 0, 0]], [[0, 1, 1, 0, 0, 1]]]
    assert routing.block_mask(3).tolist() == [[[True, False, False]], [[False, True, True]]]
    assert routing.block_mask(0).shape == (2, 1, 0)
    assert Routing(routing.indices[:0], 8).block_mask().shape == (0, 1, 0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_log_masses_and_largest_products(backend, device, block_size, softcap):
    """What the loss of a learned router reads, block by block."""
    q, k = (x[0] for x in make_qkv(1, 9, 25, 4, 2, 16, device=device)[:2])
    masses = backends.load(backend).log_masses(q, k, block_size, -0.4, softcap)
    products = backends.load(backend).largest_products(q, k, block_size)
    assert masses.shape == products.shape == (4, 9, -(-25 // block_size))
    for query, head in itertools.product(range(9), range(4)):
        position = 16 + query
        product = k[:, head // 2].double() @ q[query, head].double()
        logits = -0.4 * product if softcap is None else softcap * torch.tanh(-0.4 * product / softcap)
        for block in range(position // block_size + 1):
            keys = slice(block * block_size, min((block + 1) * block_size, position + 1))
            assert_close(masses[head, query, block], logits[keys].logsumexp(0), 1e-6)
            if block < position // block_size:
                assert_close(products[head, query, block], product[keys].amax(), 1e-6)
