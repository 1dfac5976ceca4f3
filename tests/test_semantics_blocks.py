"""Semantics of blocks that somebody else selected. Over every backend, as test_semantics.py."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import assert_close, make_qkv
from oracle import attend_sequence
from test_decode import Pages
from test_semantics import gradients
from test_semantics_gradients import expected_gradients

from moba import Routing, moba_attention, moba_attention_paged, moba_attention_varlen

KEYS, BLOCK = 45, 8
# In any order, with repeats, with blocks behind the query's own, with -1 and less anywhere.
LISTS = [[0, 3, -1], [4, 1, 0], [-1, -1, -1], [5, 0, -7], [-1, 2, 2], [5, 5, 1], [1, 2**31 - 1, 3]]


def selection(rows, queries, heads, device, dtype=torch.int64):
    lists = torch.tensor(LISTS, dtype=dtype)
    return lists.repeat(rows * queries, 1)[: rows * queries * heads].view(rows, queries, heads, 3).to(device)


def read_blocks(block_indices, own_block, num_heads, offset=None, block_size=BLOCK):
    """int32 [R, T, H, 7]: what each query reads, ascending, as the definition says."""
    rows, queries, lists, _ = block_indices.shape
    offset = KEYS - queries if offset is None else offset
    result = torch.full((rows, queries, num_heads, 7), -1, dtype=torch.int32)
    for row in range(rows):
        for query in range(max(0, -offset), queries):
            own = (offset + query) // block_size
            for head in range(num_heads):
                listed = block_indices[row, query, head * lists // num_heads].tolist()
                blocks = sorted({j for j in listed if 0 <= j <= own} | ({own} if own_block else set()))
                result[row, query, head, : len(blocks)] = torch.tensor(blocks)
    return result


def needs_own_block(backend, own_block, *tensors):
    """Whether this backend can; the test of a refusal."""
    if backend == "triton" and not own_block:
        with pytest.raises(ValueError, match=re.escape("its kernels always read the own block, so own_block must be")):
            moba_attention(*tensors[:3], block_size=BLOCK, block_indices=tensors[3], own_block=False, backend="triton")
        pytest.skip("the triton backend refuses own_block=False by design")


@pytest.mark.parametrize("own_block", [True, False], ids=["own block", "as listed"])
@pytest.mark.parametrize("lists", [2, 4], ids=["kv heads", "heads"])
@pytest.mark.parametrize("queries", [1, 13, 45])
def test_matches_the_definition(backend, device, queries, lists, own_block):
    q, k, v = make_qkv(2, queries, KEYS, 4, 2, 24, 16, device=device)
    block_indices = selection(2, queries, lists, device)
    needs_own_block(backend, own_block, q, k, v, block_indices)
    options = {"block_size": BLOCK, "block_indices": block_indices, "own_block": own_block, "backend": backend}
    out, lse, routing = moba_attention(q, k, v, **options, return_lse=True, return_routing=True)
    read = read_blocks(block_indices, own_block, 4)
    assert torch.equal(Routing(routing.indices.cpu(), BLOCK).block_mask(6), Routing(read, BLOCK).block_mask(6))
    for row in range(2):
        given = {"block_size": BLOCK, "topk": 7, "indices": read[row]}
        expected = attend_sequence(q[row].cpu(), k[row].cpu(), v[row].cpu(), **given)
        assert_close(out[row], expected[0], 2e-5)
        assert_close(lse[row], expected[1], 2e-5)
    # With gradients a few queries take the prefill's way.
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = expected_gradients(q[:1], k[:1], v[:1], d_out[:1], d_lse[:1], **{**given, "indices": read[0]})
    actual = gradients(q[:1], k[:1], v[:1], d_out[:1], d_lse[:1], **{**options, "block_indices": block_indices[:1]})
    for got, want in zip(actual, wanted, strict=True):
        assert_close(got, want, 5e-5)


def test_is_a_routing(backend, device):
    q, k, v = make_qkv(2, KEYS, KEYS, 4, 2, 16, device=device)
    options = {"block_size": BLOCK, "backend": backend}
    out, routing = moba_attention(q, k, v, topk=3, **options, return_routing=True)
    shuffled = routing.indices[..., torch.tensor([2, 0, 1])]
    assert torch.equal(moba_attention(q, k, v, block_indices=shuffled, **options), out)
    shared = moba_attention(q, k, v, topk=3, router="shared", **options, return_routing=True)
    by_kv_head = shared[1].indices[:, :, ::2].long()
    assert torch.equal(moba_attention(q, k, v, topk=3, block_indices=by_kv_head, **options), shared[0])


@pytest.mark.parametrize("own_block", [True, False], ids=["own block", "as listed"])
def test_padding_and_packing(backend, device, own_block):
    q, k, v = make_qkv(2, KEYS, KEYS, 4, 2, 16, device=device)
    block_indices = selection(2, KEYS, 2, device, torch.int32)
    needs_own_block(backend, own_block, q, k, v, block_indices)
    start = torch.tensor([0, 11], dtype=torch.int32, device=device)
    options = {"block_size": BLOCK, "own_block": own_block, "backend": backend, "return_lse": True}
    padded = moba_attention(q, k, v, key_start=start, block_indices=block_indices, **options)
    cu = torch.tensor([0, KEYS, KEYS, 2 * KEYS - 11], dtype=torch.int32, device=device)
    rows = [torch.cat([x[0], x[1, 11:]]) for x in (q, k, v, block_indices)]
    packed = moba_attention_varlen(*rows[:3], cu_seqlens=cu, block_indices=rows[3], **options)
    alone = moba_attention(q[1:, 11:], k[1:, 11:], v[1:, 11:], block_indices=block_indices[1:, 11:], **options)
    for of_padded, of_packed, expected in zip(padded, packed, alone, strict=True):
        assert_close(of_padded[1, 11:], expected[0], 2e-6)
        assert_close(of_packed[KEYS:], expected[0], 2e-6)
        assert_close(of_packed[:KEYS], of_padded[0], 2e-6)
    assert (padded[0][1, :11] == 0).all()
    assert (padded[1][1, :11] == -torch.inf).all()


@pytest.mark.parametrize("own_block", [True, False], ids=["own block", "as listed"])
@pytest.mark.parametrize("queries", [1, 5, 20])
def test_steps_and_pages_are_prefill(backend, device, queries, own_block):
    q, k, v = make_qkv(2, KEYS, KEYS, 4, 2, 16, device=device)
    block_indices = selection(2, KEYS, 2, device)
    needs_own_block(backend, own_block, q, k, v, block_indices)
    options = {"block_size": BLOCK, "own_block": own_block, "backend": backend, "return_lse": True}
    whole = moba_attention(q, k, v, block_indices=block_indices, **options)
    last = slice(KEYS - queries, KEYS)
    step = moba_attention(q[:, last], k, v, block_indices=block_indices[:, last], **options)
    pages = Pages(k, v, [KEYS, KEYS], 16, BLOCK).arguments()
    del pages["block_means"]
    paged = moba_attention_paged(q[:, last], **pages, block_indices=block_indices[:, last], **options)
    for expected, of_step, of_pages in zip(whole, step, paged, strict=True):
        assert_close(of_step, expected[:, last], 2e-6)
        assert_close(of_pages, expected[:, last], 2e-6)


def test_gradients_where_keys_that_are_not_read_would_weigh_most(backend, device):
    q, k, v = make_qkv(1, KEYS, KEYS, 2, 1, 16, device=device)
    block_indices = torch.zeros(1, KEYS, 1, 1, dtype=torch.int64, device=device)
    needs_own_block(backend, False, q, k, v, block_indices)
    q, k = q.abs(), torch.cat([k[:, :8], 100 * k[:, 8:].abs()], dim=1)
    options = {"block_size": BLOCK, "block_indices": block_indices, "own_block": False, "backend": backend}
    d_q, d_k, d_v = gradients(q, k, v, torch.ones_like(q), **options)
    assert all(torch.isfinite(x).all() for x in (d_q, d_k, d_v))
    assert (d_q != 0).any()
    assert (d_v[:, 8:] == 0).all()


def test_what_is_not_listed_is_not_read(backend, device):
    if backend == "reference":
        pytest.skip("the reference masks what is not selected, so it reads every key")
    q, k, v = make_qkv(1, 2, KEYS, 4, 2, 16, device=device)
    k[:, 8:40], v[:, 8:40] = torch.nan, torch.nan
    options = {"block_size": BLOCK, "block_indices": torch.zeros(1, 2, 1, 1).int().to(device).expand(1, 2, 2, 1)}
    assert torch.isfinite(moba_attention(q, k, v, **options, backend=backend)).all()
