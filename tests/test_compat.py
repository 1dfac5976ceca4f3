"""The MoBA release's names, with one meaning for both."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, make_qkv

from moba import moba_attention, moba_attention_varlen, moba_attn_varlen, moba_attn_varlen_naive

CU = torch.tensor([0, 17, 17, 57], dtype=torch.int32)


@pytest.fixture
def qkv():
    return [x[0] for x in make_qkv(1, 57, 57, 4, 2, 16)]


@pytest.mark.parametrize("adapter", [moba_attn_varlen, moba_attn_varlen_naive])
@pytest.mark.parametrize("max_seqlen", [40, 57])
def test_is_the_varlen_function(qkv, adapter, max_seqlen):
    out = adapter(*qkv, CU, max_seqlen, moba_chunk_size=8, moba_topk=3)
    assert_close(out, moba_attention_varlen(*qkv, cu_seqlens=CU, block_size=8, topk=3, backend="reference"), 1e-5)


@pytest.mark.parametrize("adapter", [moba_attn_varlen, moba_attn_varlen_naive])
def test_topk_one_is_the_own_block(qkv, adapter):
    out = adapter(*qkv, CU, 40, 8, 1)
    own = [x[25:33][None] for x in qkv]  # the second block of the third sequence
    assert_close(out[25:33], moba_attention(*own, block_size=8, topk=1, backend="reference")[0], 1e-5)


@pytest.mark.parametrize("adapter", [moba_attn_varlen, moba_attn_varlen_naive])
@pytest.mark.parametrize(
    ("name", "cu", "max_seqlen", "block_size", "topk"),
    [
        ("max_seqlen must be at least the longest sequence, 40, got 39", CU, 39, 8, 3),
        ("max_seqlen", CU, 40.0, 8, 3),
        ("max_seqlen", CU, torch.tensor(40), 8, 3),
        ("moba_chunk_size", CU, 40, 0, 3),
        ("moba_topk", CU, 40, 8, 0),
        ("cu_seqlens", CU.tolist(), 40, 8, 3),
        ("cu_seqlens", CU + 1, 40, 8, 3),
        ("cu_seqlens", CU.float(), 40, 8, 3),
    ],
)
def test_refuses(qkv, adapter, name, cu, max_seqlen, block_size, topk):
    with pytest.raises(ValueError, match=name):
        adapter(*qkv, cu, max_seqlen, block_size, topk)
