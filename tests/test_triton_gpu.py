"""What only a GPU shows: load, graphs, compilation to machine code, sizes beyond 2³¹ elements, several devices."""

from __future__ import annotations

import pytest
import torch

from moba import moba_attention
from moba.backends.triton import launch, tuning

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

OPTIONS = {"block_size": 128, "topk": 4, "backend": "triton"}


def inputs(num_tokens, num_heads=4, num_kv_heads=2, head_dim=64):
    """q, k, v that ask for gradients, and the gradient of out; bf16."""
    q, k, v, d_out = (
        torch.randn(1, num_tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    return [x.requires_grad_() for x in (q, k, v)], d_out


def train(leaves, d_out, **options):
    out = moba_attention(*leaves, **{**OPTIONS, **options})
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def assert_same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("block_size", "topk"), [(128, 8), (512, 3)])
def test_repeats_under_load_bit_for_bit(block_size, topk):
    leaves, d_out = inputs(32768, num_heads=16, num_kv_heads=16, head_dim=128)
    expected = train(leaves, d_out, block_size=block_size, topk=topk)
    load, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        with torch.cuda.stream(load):
            for _ in range(4):
                matrix @ matrix
        assert_same(train(leaves, d_out, block_size=block_size, topk=topk), expected)


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="a kernel for compute capability 9.0")
@pytest.mark.parametrize(("block_size", "topk"), [(512, 3), (1024, 1), (640, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_both_kernels_of_dk_and_dv_agree(head_dim, block_size, topk, num_kv_heads, monkeypatch):
    leaves, d_out = inputs(5000, 4, num_kv_heads, head_dim)
    by_kernel = {}
    for table in (tuning.TABLE["dkv_hopper"], (tuning.Row({}),)):
        monkeypatch.setitem(tuning.TABLE, "dkv_hopper", table)
        launch._plans.clear()
        results = train(leaves, d_out, block_size=block_size, topk=topk)
        names = {v.kernel.__name__ for plan in launch._plans.values() for v in plan.variants()}
        (name,) = (name for name in names if "dkv" in name)
        by_kernel[name] = [x.float() for x in results]
    launch._plans.clear()
    assert set(by_kernel) == {"_dkv_hopper_kernel", "_dkv_kernel"}
    for x, y in zip(*by_kernel.values(), strict=True):
        assert (x - y).norm() < 1e-3 * y.norm()


def test_forward_and_backward_in_a_cuda_graph():
    leaves, d_out = inputs(4096)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        train(leaves, d_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(leaves, d_out)
    others, d_other = inputs(4096)
    for x, y in zip((*leaves, d_out), (*others, d_other), strict=True):
        x.data.copy_(y)
    graph.replay()
    assert_same(captured, train(others, d_other))


def test_compiled_without_graph_breaks():
    leaves, d_out = inputs(2048)
    compiled = torch.compile(lambda q, k, v: moba_attention(q, k, v, **OPTIONS), fullgraph=True)
    out = compiled(*leaves)
    assert_same((out.detach(), *torch.autograd.grad(out, leaves, d_out)), train(leaves, d_out))


def test_tensors_on_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    leaves, d_out = inputs(1024)
    expected = train(leaves, d_out)
    others = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    for _ in range(2):  # the second time from the plan
        actual = train(others, d_out.to("cuda:1"))
        assert actual[0].device.index == 1
        assert_same([x.to("cuda:0") for x in actual], expected)
