"""What `moba_attention` says that it does, one meaning for every backend. A new backend joins through `--backend`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, gradients, make_qkv, needs_dtype
from oracle import attend_batch, attend_sequence

from moba import moba_attention, moba_attention_varlen

BOTH = {"return_lse": True, "return_routing": True}


def dense(q, k, v):
    """Full causal attention in fp64 for queries that are the last of the keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


# Batch, queries, keys, heads, kv heads, head dim, that of values where it differs, block size, topk.
CASES = {
    "plain": (1, 37, 37, 2, 2, 16, 8, 3),
    "batch of two": (2, 33, 33, 2, 1, 16, 16, 2),
    "six heads of two": (1, 40, 40, 6, 2, 32, 16, 2),
    "head dim 80": (1, 48, 48, 2, 1, 80, 16, 2),
    "head dim 96": (1, 48, 48, 1, 1, 96, 16, 2),
    "head dim 1": (1, 20, 20, 1, 1, 1, 4, 2),
    "head dim 256": (1, 33, 33, 1, 1, 256, 16, 2),
    "own block only": (1, 40, 40, 2, 1, 16, 16, 1),
    "block of one": (1, 20, 20, 2, 1, 16, 1, 4),
    "block of seven": (1, 45, 45, 2, 1, 16, 7, 3),
    "block longer than the sequence": (1, 20, 20, 2, 1, 16, 64, 3),
    "topk above the number of blocks": (1, 40, 40, 2, 1, 16, 16, 9),
    "chunk of a prefill": (1, 13, 45, 4, 2, 16, 8, 3),
    "one query": (2, 1, 37, 4, 2, 16, 8, 3),
    "one key": (1, 1, 1, 4, 2, 16, 8, 3),
    "many blocks": (1, 130, 130, 1, 1, 16, 4, 5),
    "values as MLA": (1, 20, 20, 1, 1, 192, 128, 8, 2),
    "wider values": (1, 37, 37, 4, 2, 16, 40, 8, 3),
    "values of one": (2, 20, 20, 2, 1, 5, 1, 7, 2),
    "chunk, narrower values": (1, 13, 45, 4, 2, 24, 16, 8, 3),
    "own block only, wider values": (1, 40, 40, 2, 1, 16, 32, 16, 1),
    "one query, narrower values": (2, 1, 45, 4, 2, 24, 16, 8, 3),
}
OTHER_VALUES = tuple(CASES)[-6:]
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64)
IN_EVERY_DTYPE = ("plain", "six heads of two", "head dim 80", "head dim 1", "own block only", "chunk of a prefill",
                  *OTHER_VALUES)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, dtype) for case in IN_EVERY_DTYPE for dtype in OTHER_DTYPES],
    ids=str,
)
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


@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (24, 16), (16, 40)])
def test_enough_blocks_are_dense_attention(backend, device, head_dim, value_dim):
    q, k, v = make_qkv(2, 40, 40, 4, 2, head_dim, value_dim, device=device)
    expected = dense(q, k, v)
    for backend_or_auto in (backend, "auto"):
        options = {"block_size": 8, "topk": 5, "backend": backend_or_auto}
        assert_close(moba_attention(q, k, v, **options), expected, 2e-5)
        assert_close(moba_attention(q[:, -1:], k, v, **options), expected[:, -1:], 2e-5)


def test_auto_takes_dense_only_where_it_is_the_same_function(device):
    q, k, v = make_qkv(1, 40, 40, 4, 2, 32, device=device)
    sparse = moba_attention(q, k, v, block_size=8, topk=4)
    assert_close(sparse, moba_attention(q, k, v, block_size=8, topk=4, backend="reference"), 2e-5)
    q.requires_grad_()
    trained = moba_attention(q, k, v, block_size=8, topk=5)
    taken = "triton" if device.type == "cuda" else "pytorch"
    assert torch.equal(trained, moba_attention(q, k, v, block_size=8, topk=5, backend=taken))


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
    lengths = [17, 0, 30, 1, 8]
    q, k, v = make_qkv(1, sum(lengths) + 3, sum(lengths) + 3, 2, 1, 16, device=device)
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
    _, recent = moba_attention_varlen(q, k, v, cu_seqlens=cu, router="recent", **{**options, "return_lse": False})
    assert (recent.indices[sum(lengths) :] == -1).all()


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


def test_chunked_prefill_and_decode_are_prefill(backend, device):
    q, k, v = make_qkv(1, 45, 45, 2, 1, 16, device=device, exact_for=8)
    options = {"block_size": 8, "topk": 3, "backend": backend, **BOTH}
    whole = moba_attention(q, k, v, **options)
    # One token on each side of a block's end, part of a block, whole blocks, and several with parts.
    for start, end in ((0, 1), (15, 16), (16, 17), (44, 45), (20, 24), (16, 24), (19, 38), (38, 45)):
        part = moba_attention(q[:, start:end], k[:, :end], v[:, :end], **options)
        assert_close(part[0], whole[0][:, start:end], 2e-6)
        assert_close(part[1], whole[1][:, start:end], 2e-6)
        assert torch.equal(part[2].indices, whole[2].indices[:, start:end])


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


def test_strides(backend, device):
    q, k, v = (x[:1].repeat(2, 1, 1, 1) for x in make_qkv(1, 25, 25, 2, 1, 16, device=device))
    options = {"block_size": 8, "topk": 3, "backend": backend}
    expected = moba_attention(q, k, v, **options)
    for views in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in (q, k, v)],
        [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)],
    ):
        assert torch.equal(moba_attention(*views, **options), expected)
