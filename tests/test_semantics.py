"""DESIGN's semantics, one meaning for every backend. A new backend joins through `--backend`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, make_qkv
from hypothesis import given
from hypothesis import strategies as st
from oracle import attend_batch, attend_sequence

from moba import Routing, moba_attention, moba_attention_varlen
from moba.backends import load, reference
from moba.routing import mean_keys

BOTH = {"return_lse": True, "return_routing": True}


def needs_dtype(backend, dtype):
    q = torch.zeros(1, 1, 1, 16, dtype=dtype)
    if backend == "triton" and dtype == torch.float64:
        assert "float64" in load(backend).unsupported(q, q)
        pytest.skip("the triton backend refuses fp64 by design")


def dense(q, k, v):
    """Full causal attention in fp64 for queries that are the last of the keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


CASES = {
    "plain": (1, 37, 37, 2, 2, 16, 8, 3),
    "batch of two": (2, 40, 40, 2, 1, 16, 16, 2),
    "nine heads of three": (1, 50, 50, 9, 3, 32, 16, 2),
    "head dim 80": (1, 48, 48, 2, 1, 80, 16, 2),
    "head dim 96": (1, 48, 48, 2, 2, 96, 16, 2),
    "head dim 1": (1, 20, 20, 1, 1, 1, 4, 2),
    "head dim 256": (1, 33, 33, 1, 1, 256, 16, 2),
    "own block only": (1, 40, 40, 2, 1, 16, 16, 1),
    "block of one": (1, 20, 20, 2, 1, 16, 1, 4),
    "block of seven": (1, 45, 45, 2, 1, 16, 7, 3),
    "block longer than the sequence": (1, 20, 20, 2, 1, 16, 64, 3),
    "topk above the number of blocks": (1, 40, 40, 2, 1, 16, 16, 9),
    "chunk of a prefill": (1, 13, 45, 4, 2, 16, 8, 3),
    "one query": (2, 1, 45, 4, 2, 16, 8, 3),
    "one key": (1, 1, 1, 4, 2, 16, 8, 3),
    "many blocks": (1, 130, 130, 1, 1, 16, 4, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(backend, device, case, dtype):
    needs_dtype(backend, dtype)
    *shape, block_size, topk = CASES[case]
    q, k, v = make_qkv(*shape, dtype=dtype, device=device, exact_for=block_size)
    options = {"block_size": block_size, "topk": topk}
    expected_out, expected_lse, expected_indices = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    out, lse, routing = moba_attention(q, k, v, **options, backend=backend, **BOTH)
    assert torch.equal(routing.indices.cpu(), expected_indices)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, expected_out, TOLERANCE[dtype])
    assert_close(lse, expected_lse, LSE_TOLERANCE[dtype])


def test_full_topk_is_dense(backend, device):
    q, k, v = make_qkv(2, 40, 40, 4, 2, 32, device=device)
    assert_close(moba_attention(q, k, v, block_size=8, topk=5, backend=backend), dense(q, k, v), 2e-5)


def test_auto_takes_dense_only_where_it_is_the_same_function(device):
    q, k, v = make_qkv(1, 40, 40, 4, 2, 32, device=device)
    assert_close(moba_attention(q, k, v, block_size=8, topk=5), dense(q, k, v), 2e-5)
    assert_close(moba_attention(q[:, -1:], k, v, block_size=8, topk=5), dense(q[:, -1:], k, v), 2e-5)
    sparse = moba_attention(q, k, v, block_size=8, topk=4)
    assert_close(sparse, moba_attention(q, k, v, block_size=8, topk=4, backend="reference"), 2e-5)
    q.requires_grad_()
    trained = moba_attention(q, k, v, block_size=8, topk=5)
    taken = "triton" if device.type == "cuda" else "pytorch"
    assert torch.equal(trained, moba_attention(q, k, v, block_size=8, topk=5, backend=taken))


def test_topk_one_is_own_block_only(backend, device):
    q, k, v = make_qkv(1, 24, 24, 2, 2, 16, device=device)
    out = moba_attention(q, k, v, block_size=8, topk=1, backend=backend)
    for start in range(0, 24, 8):
        rows = slice(start, start + 8)
        assert_close(out[:, rows], dense(q[:, rows], k[:, rows], v[:, rows]), 2e-5)


def test_causal(backend, device):
    q, k, v = make_qkv(1, 40, 40, 2, 1, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    before = moba_attention(q, k, v, **options)
    k[:, 21:], v[:, 21:] = torch.randn_like(k[:, 21:]), torch.randn_like(v[:, 21:])
    after = moba_attention(q, k, v, **options)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])


def test_ties_go_to_the_lower_block(backend, device):
    q, k, v = make_qkv(1, 64, 64, 2, 1, 16, device=device, exact_for=8)
    k = torch.ones_like(k)
    _, routing = moba_attention(q, k, v, block_size=8, topk=3, backend=backend, return_routing=True)
    assert routing.indices[0, 63].tolist() == [[0, 1, 7]] * 2
    assert routing.indices[0, 12].tolist() == [[0, 1, -1]] * 2


# A matrix product may round equal columns to different numbers: MKL does for one row, and by its width for several.
@pytest.mark.parametrize("router", ["mean", "top_p=0.999"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2)])
def test_equal_means_tie(backend, device, dtype, heads, kv_heads, router):
    needs_dtype(backend, dtype)
    k = torch.randn(2, 3, kv_heads, 40, dtype=dtype, device=device)[:, torch.arange(31) // 2 % 3]
    q = torch.randn(2, 31, heads, 40, dtype=dtype, device=device)
    options = {"block_size": 2, "topk": 4, "router": router, "backend": backend, "return_routing": True}
    by_prefill = moba_attention(q, k, k, **options)[1].indices
    for means in (None, mean_keys(k, 2)):
        by_step = moba_attention(q[:, -1:], k, k, **options, block_means=means)[1].indices
        assert torch.equal(by_step, by_prefill[:, -1:])
    for blocks in by_prefill.flatten(0, 2).tolist():
        past = set(blocks) - {max(blocks), -1}
        # Of three kinds of blocks in turn, a later one of a kind is taken after all earlier ones only.
        assert all(block - 3 in past for block in past if block >= 3)


@pytest.mark.parametrize(("first", "recent"), [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_kept_blocks(backend, device, first, recent):
    q, k, v = make_qkv(1, 60, 60, 2, 1, 16, device=device, exact_for=6)
    options = {"block_size": 6, "topk": 4, "keep_first": first, "keep_recent": recent}
    out, lse, routing = moba_attention(q, k, v, **options, backend=backend, **BOTH)
    expected_out, expected_lse, expected = attend_batch(q.cpu(), k.cpu(), v.cpu(), **options)
    assert torch.equal(routing.indices.cpu(), expected)
    assert_close(out, expected_out, 2e-5)
    assert_close(lse, expected_lse, 2e-5)


@pytest.mark.parametrize(
    ("router", "same_as"),
    [
        ("recent", {"keep_recent": 3}),
        ("sink", {"keep_first": 1, "keep_recent": 2}),
        (lambda q, means: moba_scores(q, means), {}),
        (lambda q, means: -moba_scores(q, means), None),
    ],
    ids=["recent", "sink", "function", "another function"],
)
def test_routers(backend, device, router, same_as):
    q, k, v = make_qkv(1, 60, 60, 4, 2, 16, device=device, exact_for=6)
    options = {"block_size": 6, "topk": 4, "backend": backend}
    out, routing = moba_attention(q, k, v, **options, router=router, return_routing=True)
    if same_as is None:
        same_as = {"routing": moba_attention(-q, k, v, **options, return_routing=True)[1]}
    expected_out, expected = moba_attention(q, k, v, **options, **same_as, return_routing=True)
    assert torch.equal(routing.indices, expected.indices)
    assert torch.equal(out, expected_out)


@pytest.mark.parametrize(
    ("router", "keep", "same_as"),
    [
        ("sink", {"keep_recent": 1}, {"keep_recent": 1}),
        ("sink", {"keep_first": 1}, {"keep_first": 1}),
        ("recent", {"keep_recent": 1}, {"keep_recent": 1}),
        ("recent", {"keep_first": 1}, {"keep_first": 1}),
    ],
)
def test_kept_blocks_hold_with_routers_that_score_nothing(backend, device, router, keep, same_as):
    q, k, v = make_qkv(1, 60, 60, 2, 1, 16, device=device)
    options = {"block_size": 6, "topk": 2, "backend": backend, "return_routing": True}
    indices = moba_attention(q, k, v, **options, **keep, router=router)[1].indices
    assert torch.equal(indices, moba_attention(q, k, v, **options, **same_as)[1].indices)


def moba_scores(q, means):
    """The default rule, written as a user would write it."""
    means = means.repeat_interleave(q.shape[1] // means.shape[1], dim=1)
    return torch.einsum("thd,nhd->thn", q, means)


def test_left_padding_is_no_padding(backend, device):
    q, k, v = make_qkv(3, 30, 30, 2, 1, 16, device=device)
    pad = torch.tensor([0, 11, 30], dtype=torch.int32, device=device)
    q[1, :11], k[1, :11], v[1, :11] = torch.nan, torch.nan, torch.nan
    out, lse, routing = moba_attention(q, k, v, block_size=8, topk=2, key_start=pad, backend=backend, **BOTH)
    for row, start in enumerate(pad.tolist()):
        alone = moba_attention(q[row, start:][None], k[row, start:][None], v[row, start:][None], block_size=8, topk=2,
                               backend=backend, **BOTH)  # fmt: skip
        assert torch.equal(out[row, start:], alone[0][0])
        assert torch.equal(lse[row, start:], alone[1][0])
        assert torch.equal(routing.indices[row, start:], alone[2].indices[0])
        assert (out[row, :start] == 0).all()
        assert (lse[row, :start] == -torch.inf).all()
        assert (routing.indices[row, :start] == -1).all()


def test_preallocated_cache(backend, device):
    q, k, v = make_qkv(2, 5, 64, 2, 1, 16, device=device)
    start = torch.tensor([0, 6], dtype=torch.int32, device=device)
    end = torch.tensor([40, 33], dtype=torch.int32, device=device)
    for row in range(2):
        k[row, end[row] :], v[row, end[row] :] = torch.nan, torch.nan
    options = {"block_size": 8, "topk": 3, "backend": backend, "return_lse": True}
    out, lse = moba_attention(q, k, v, key_start=start, key_end=end, **options)
    for row in range(2):
        real = slice(start[row], end[row])
        alone, alone_lse = moba_attention(q[row][None], k[row, real][None], v[row, real][None], **options)
        assert_close(out[row], alone[0], 2e-6)
        assert_close(lse[row], alone_lse[0], 2e-6)


def test_packed_is_separate_sequences(backend, device):
    lengths = [17, 0, 40, 1, 8]
    q, k, v = make_qkv(1, sum(lengths) + 3, sum(lengths) + 3, 4, 2, 16, device=device)
    q, k, v = q[0], k[0], v[0]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    options = {"block_size": 8, "topk": 2, "backend": backend, **BOTH}
    out, lse, routing = moba_attention_varlen(q, k, v, cu_seqlens=cu, **options)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        rows = slice(start, end)
        alone = moba_attention(q[rows][None], k[rows][None], v[rows][None], **options)
        assert_close(out[rows], alone[0][0], 2e-6)
        assert_close(lse[rows], alone[1][0], 2e-6)
        assert torch.equal(routing.indices[rows], alone[2].indices[0])
    assert (out[sum(lengths) :] == 0).all()
    assert (routing.indices[sum(lengths) :] == -1).all()


def test_packed_chunks(backend, device):
    q_lengths, k_lengths = [3, 8, 1], [20, 8, 33]
    q, k, v = make_qkv(1, sum(q_lengths), sum(k_lengths), 2, 1, 16, device=device, exact_for=8)
    q, k, v = q[0], k[0], v[0]
    cu_q = torch.tensor([0, 3, 11, 12], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 20, 28, 61], dtype=torch.int32, device=device)
    out = moba_attention_varlen(q, k, v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, block_size=8, topk=2, backend=backend)
    for i in range(3):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        expected, _, _ = attend_sequence(q[rows].cpu(), k[keys].cpu(), v[keys].cpu(), block_size=8, topk=2)
        assert_close(out[rows], expected, 2e-5)


@pytest.mark.parametrize("chunk", [1, 7, 8, 19])
def test_chunked_prefill_and_decode_are_prefill(backend, device, chunk):
    q, k, v = make_qkv(2, 45, 45, 4, 2, 16, device=device, exact_for=8)
    options = {"block_size": 8, "topk": 3, "backend": backend, **BOTH}
    whole = moba_attention(q, k, v, **options)
    for start in range(0, 45, chunk):
        end = min(45, start + chunk)
        part = moba_attention(q[:, start:end], k[:, :end], v[:, :end], **options)
        assert_close(part[0], whole[0][:, start:end], 2e-6)
        assert_close(part[1], whole[1][:, start:end], 2e-6)
        assert torch.equal(part[2].indices, whole[2].indices[:, start:end])


def test_replayed_routing_is_fresh_routing(backend, device):
    q, k, v = make_qkv(2, 45, 45, 4, 2, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    out, routing = moba_attention(q, k, v, **options, return_routing=True)
    assert torch.equal(moba_attention(q, k, v, **options, routing=routing), out)
    other = moba_attention(torch.randn_like(q), k, v, **options, return_routing=True)[1]
    assert not torch.equal(moba_attention(q, k, v, **options, routing=other), out)
    cu = torch.tensor([0, 20, 45], dtype=torch.int32, device=device)
    packed = q[0], k[0], v[0]
    out, routing = moba_attention_varlen(*packed, cu_seqlens=cu, **options, return_routing=True)
    assert torch.equal(moba_attention_varlen(*packed, cu_seqlens=cu, **options, routing=routing), out)


def test_one_routing_gives_one_result(backend, device):
    """A routing that the queries would not choose, of real numbers: arithmetic apart from selection and ties."""
    q, k, v = make_qkv(1, 70, 70, 4, 2, 32, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    routing = moba_attention(torch.randn_like(q), k, v, **options, return_routing=True)[1]
    out, lse = moba_attention(q, k, v, **options, routing=routing, return_lse=True)
    expected_out, expected_lse, _ = attend_sequence(
        q[0].cpu(), k[0].cpu(), v[0].cpu(), block_size=8, topk=3, indices=routing.indices[0]
    )
    assert_close(out[0], expected_out, 2e-5)
    assert_close(lse[0], expected_lse, 2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 9)])
def test_no_queries(backend, device, queries, keys):
    q, k, v = make_qkv(2, queries, keys, 4, 2, 16, device=device)
    out, lse, routing = moba_attention(q, k, v, block_size=8, topk=3, backend=backend, **BOTH)
    assert out.shape == (2, 0, 4, 16)
    assert lse.shape == (2, 0, 4)
    assert routing.indices.shape == (2, 0, 4, 3)
    packed = moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=torch.zeros(1, dtype=torch.int32, device=device),
                                   block_size=8, topk=3, backend=backend)  # fmt: skip
    assert packed.shape == (0, 4, 16)
    grads = gradients(q, k, v, torch.zeros_like(q), torch.zeros_like(lse), block_size=8, topk=3, backend=backend)
    for x, grad in zip((q, k, v), grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("view", ["transposed", "sliced heads", "expanded batch"])
def test_strides(backend, device, view):
    q, k, v = make_qkv(2, 40, 40, 4, 2, 16, device=device)
    options = {"block_size": 8, "topk": 3, "backend": backend}
    if view == "transposed":
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif view == "sliced heads":
        views = [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in (q, k, v)]
    else:
        q, k, v = (x[:1].repeat(2, 1, 1, 1) for x in (q, k, v))
        views = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(moba_attention(*views, **options), moba_attention(q, k, v, **options))


def gradients(q, k, v, d_out, d_lse=None, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = moba_attention(q, k, v, **options, return_lse=True)
    roots, grads = ([out], [d_out]) if d_lse is None else ([out, lse], [d_out, d_lse])
    return torch.autograd.grad(roots, (q, k, v), grads)


def test_close_scores_may_differ_only_within_summation_error(backend, device):
    """On real inputs no block is chosen over one whose fp64 score is higher by more than ε."""
    q, k, v = make_qkv(1, 512, 512, 2, 1, 64, device=device)
    routing = moba_attention(q, k, v, block_size=8, topk=5, backend=backend, return_routing=True)[1]
    chosen = routing.block_mask(64)[0].cpu()
    q, means = q[0].cpu().double(), k[0, :, 0].cpu().double().unflatten(0, (64, 8)).mean(1)
    scores = q @ means.T
    # What sums of 64 products and of 8 keys, rounded to 24 bits, can differ by at most.
    epsilon = (64 + 8) * 2**-24 * (q.abs() @ k[0, :, 0].cpu().double().abs().unflatten(0, (64, 8)).mean(1).T)
    own = (torch.arange(512) // 8)[:, None, None]
    block = torch.arange(64)
    assert torch.equal(chosen.sum(-1), (own[..., 0] + 1).clamp(max=5).expand(-1, 2))
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


def test_reference_mask_holds_the_routing():
    q, k, v = make_qkv(1, 20, 20, 2, 1, 16)
    out, routing = moba_attention(q, k, v, block_size=4, topk=2, backend="reference", return_routing=True)
    from moba.sequences import Span

    mask = reference.attention_mask(routing.indices[0], Span(0, 0, 20, 0, 20), 4)
    assert mask.shape == (2, 20, 20)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                              attn_mask=mask[None], enable_gqa=True)  # fmt: skip
    assert_close(out, expected.transpose(1, 2), 2e-5)
    assert isinstance(routing, Routing)


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


def test_a_routing_made_by_hand_leaves_padding_alone(backend, device):
    q, k, v = make_qkv(2, 30, 30, 2, 1, 16, device=device)
    pad = torch.tensor([0, 11], dtype=torch.int32, device=device)
    everything = torch.arange(3, -1, -1, dtype=torch.int32, device=device).expand(2, 30, 2, 4)
    options = {"block_size": 8, "topk": 4, "key_start": pad, "backend": backend, "return_lse": True}
    out, lse = moba_attention(q, k, v, **options, routing=Routing(everything, 8))
    expected_out, expected_lse = moba_attention(q, k, v, **options)
    assert_close(out, expected_out, 2e-6)
    assert_close(lse, expected_lse, 2e-6)


def test_block_mask_counts_blocks_that_there_are():
    routing = Routing(torch.tensor([[[0, 3, -1]], [[1, 2, 10**6]]], dtype=torch.int32), 8)
    assert routing.block_mask(3).tolist() == [[[True, False, False]], [[False, True, True]]]
    assert routing.block_mask(4)[..., 3].tolist() == [[True], [False]]
    assert routing.block_mask(0).shape == (2, 1, 0)
