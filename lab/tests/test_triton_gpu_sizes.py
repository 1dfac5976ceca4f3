"""What only a GPU shows: load, graphs, compilation to machine code, sizes beyond 2³¹ elements, several devices."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from test_triton_gpu import inputs

from moba import moba_attention
from moba_lab.bench.check import find_error


@pytest.mark.parametrize("num_kv_heads", [2, 16])
def test_more_than_2_31_elements(num_kv_heads):
    needed = 60 << 30
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    num_tokens, block_size, topk, group = 1_100_000, 4096, 2, 16 // num_kv_heads
    leaves, d_out = inputs(num_tokens, num_heads=16, num_kv_heads=num_kv_heads, head_dim=128)
    q, k, v = leaves
    assert q.numel() > 2**31
    assert (k.numel() > 2**31) == (group == 1)
    out, lse, routing = moba_attention(
        q, k, v, block_size=block_size, topk=topk, backend="triton", return_lse=True, return_routing=True
    )
    d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
    with torch.no_grad():
        assert find_error(q, k, v, out, routing, topk, d_out, d_q) is None
        # Only its own queries attend to the last block.
        last = slice(num_tokens // block_size * block_size, num_tokens)
        for kv_head in range(k.shape[2]):
            exact_k, exact_v = (torch.zeros(num_tokens - last.start, 128, device="cuda").double() for _ in range(2))
            for head in range(kv_head * group, (kv_head + 1) * group):
                query, gradient, result = (x[0, last, head].double() for x in (q, d_out, out))
                keys, values = k[0, last, kv_head].double(), v[0, last, kv_head].double()
                weights = (128**-0.5 * query @ keys.T - lse[0, last, head, None].double()).exp().tril()
                d_weights = gradient @ values.T - (gradient * result).sum(1, keepdim=True)
                exact_k += 128**-0.5 * (weights * d_weights).T @ query
                exact_v += weights.T @ gradient
            assert relative_error(d_k[0, last, kv_head], exact_k) < 1e-2
            assert relative_error(d_v[0, last, kv_head], exact_v) < 1e-2
