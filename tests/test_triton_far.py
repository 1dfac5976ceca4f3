"""Tensors whose elements lie 2³¹ and more apart: no offset is computed in 32 bits. In the interpreter, or on a GPU.

Few of their elements are touched, so that on a CPU few of their pages exist.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from helpers import TOLERANCE, assert_close, make_qkv

from moba import append_block_means, moba_attention
from moba.routing import Routing

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

# Not the function of that name.
from moba.backends.triton import attention as attend  # noqa: E402
from moba.backends.triton import device, workspace  # noqa: E402
from moba.backends.triton.launch import run_planned  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
FAR = 1 << 31
# Linux's, which Python 3.10's mmap does not name.
MAP_NORESERVE = 0x4000
# Room for FAR numbers of 4 bytes and what lies around the last.
NUM_BYTES = 5 * FAR
# Elements between tensors that lie in one another's gaps.
APART = 1 << 14
OPTIONS = {"block_size": 16, "topk": 2, "backend": "triton"}
ROWS, TOKENS, HEADS = 0, 1, 2


@pytest.fixture
def memory():
    """Bytes, all 0."""
    if DEVICE.type == "cpu":
        # Not reserved: machines with less memory have it too.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, NUM_BYTES, flags=flags), dtype=torch.uint8)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NUM_BYTES:
        pytest.skip(f"needs {NUM_BYTES >> 30} GiB of free GPU memory")
    return torch.zeros(NUM_BYTES, dtype=torch.uint8, device=DEVICE)


@pytest.fixture
def far(memory):
    """A function (tensors, dim) that copies them to where index 0 and the last of a dimension lie FAR apart."""

    def spread(tensors, dim):
        copies = []
        for x in tensors:
            strides, step = [0] * x.ndim, 1
            for inner in reversed([d for d in range(x.ndim) if d != dim]):
                strides[inner] = step
                step *= x.shape[inner]
            strides[dim] = (FAR // (x.shape[dim] - 1) // 64 + 1) * 64
            whole = memory.view(x.dtype)[len(copies) * APART :]
            copies.append(whole.as_strided(x.shape, strides).copy_(x))
        return copies

    return spread


def train(q, k, v, d_out, d_lse, **options):
    """Out, lse, the routing's indices, dQ, dK, dV."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, routing = moba_attention(*leaves, **OPTIONS, **options, return_lse=True, return_routing=True)
    return out, lse, routing.indices, *torch.autograd.grad([out, lse], leaves, [d_out, d_lse])


def assert_same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, TOLERANCE.get(x.dtype, 0))


@pytest.mark.parametrize("dim", [ROWS, TOKENS, HEADS], ids=["rows", "tokens", "heads"])
@pytest.mark.parametrize("arch", [80, 90], ids=["pointers", "descriptors"])
def test_forward_and_backward(dim, arch, far, monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attend, "arch_of", lambda device: arch)
    q, k, v = make_qkv(2, 24, 24, 2, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    d_out, d_lse = torch.randn_like(q), torch.randn(q.shape[:3], device=DEVICE)
    expected = train(q, k, v, d_out, d_lse)
    *qkv, far_d_out, indices = far([q, k, v, d_out, expected[2]], dim)
    _, routing = moba_attention(*qkv, **OPTIONS, return_routing=True)
    assert torch.equal(routing.indices, expected[2])
    assert_same(train(*qkv, far_d_out, d_lse, routing=Routing(indices, OPTIONS["block_size"])), expected)


@pytest.mark.parametrize("dim", [ROWS, TOKENS, HEADS], ids=["rows", "tokens", "heads"])
def test_decoding(dim, far):
    q, k, v = make_qkv(2, 3, 40, 2, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    near = [q, k, v, torch.zeros(2, 2, 2, 16, dtype=torch.bfloat16, device=DEVICE)]
    results = []
    for tensors in (near, far(near, dim)):
        *qkv, means = tensors
        append_block_means(means, qkv[1], num_new=40, block_size=16, backend="triton")
        with torch.no_grad():
            out, lse = moba_attention(*qkv, **OPTIONS, block_means=means, return_lse=True)
        results.append((out, lse, means))
    assert_same(*results)


def test_bounds_of_a_chunk_among_more_than_2_30_entries(memory):
    """Only the last of three blocks has entries that are not 0, and a search goes through its middle."""
    offsets = torch.tensor([[0, 5, FAR - 9, FAR - 2]], dtype=torch.int32, device=DEVICE)
    entries = memory.view(torch.int32)[: FAR - 1]
    entries[FAR - 9 : FAR - 2] = torch.arange(70, 140, 10, dtype=torch.int32, device=DEVICE)
    found = [torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in ((2, 2, 1, 3), (2, 1, 4))]

    def build(steps, offsets, entries, bounds, starts):
        view = device.view_of(offsets, entries)
        steps.launch(workspace._row_chunks_kernel, (2, 1), view, bounds, starts, 90, 3, bounds.stride(0), 2)

    run_planned(build, offsets, entries[None], *found, device=DEVICE)
    entries[FAR - 9 : FAR - 2] = 0
    # Of the entries 70, 80 ..., the first at 90 or above, and at 180 or above.
    begin, end, starts = *found[0][:, 1, 0].tolist(), found[1][1, 0].tolist()
    assert begin == [5, FAR - 9, FAR - 7]
    assert end == [5, FAR - 9, FAR - 2]
    assert starts == [0, 0, 0, 5]


def test_more_entries_and_blocks_than_kernels_count():
    assert workspace.windows(2**31 - 10**9, 10_000_000, {"BLOCK_COST": 32, "WINDOW": 128})
    with pytest.raises(ValueError, match=r"below 2\^31, got 1147483648 \+ 10000000 · 192: take a larger block_size"):
        workspace.windows(2**31 - 10**9, 10_000_000, {"BLOCK_COST": 192, "WINDOW": 1024})
