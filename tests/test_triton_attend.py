"""The attention kernels against the reference in fp64. In Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, make_qkv, relative_error

from moba import moba_attention, moba_attention_varlen
from moba.backends import reference
from moba.routing import Selection
from moba.routing import route as plain_route
from moba.sequences import Sequences

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends.triton import dkv, launch, workspace  # noqa: E402
from moba.backends.triton.attention import _attend, _attend_backward, plan_attend, plan_attend_backward  # noqa: E402
from moba.backends.triton.by_block import new_view  # noqa: E402
from moba.backends.triton.device import View  # noqa: E402
from moba.backends.triton.launch import run_planned  # noqa: E402
from moba.backends.triton.tuning import arch_of  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
AMPLE = 1 << 30


def problem(shape, *, dtype=torch.float32, indices=None, block_size=16, topk=3):
    """q, k, v, a routing, and gradients of out and lse. `shape`: B, T, S, H, G, D, and Dv where it differs."""
    q, k, v = make_qkv(*shape, dtype=dtype, device=DEVICE)
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
    if indices is None:
        indices = plain_route(q, k, sequences, Selection.of(block_size, topk, 0, 0, "mean"))
    d_out = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype, device=DEVICE)
    return q, k, v, indices, d_out, torch.randn(q.shape[:3], device=DEVICE)


def kernels(q, k, v, indices, d_out, d_lse, *, block_size=16, workspace_bytes=AMPLE, arch=None):
    """Out, lse, dQ, dK, dV of the kernels, without the operators around them."""
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
    view = new_view(indices, sequences, block_size)
    options = {"block_size": block_size, "scale": 0.2, "workspace_bytes": workspace_bytes}
    options["arch"] = arch_of(DEVICE) if arch is None else arch
    out, lse = torch.full_like(d_out, torch.nan), torch.full_like(d_lse, torch.nan)
    inputs = (q, k, v, indices, *view, out, lse)
    run_planned(plan_attend, *inputs, None, None, None, None, device=q.device, **options)
    inputs = (d_out, d_lse, q, k, v, out, lse, indices, *view)
    gradients = [torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    run_planned(plan_attend_backward, *inputs, *gradients, None, None, None, None, device=q.device, **options)
    return out, lse, *gradients


def exact(q, k, v, indices, d_out, d_lse, *, block_size=16):
    """The same by the mask-based reference in fp64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
    out, lse = reference.attend(q, k, v, indices, sequences, block_size=block_size, scale=0.2)
    return out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out.double(), d_lse.double()])


def plain(q, k, v, indices, d_out, *, block_size=16):
    """Out, dQ, dK, dV of one head of one row, as plain PyTorch in the inputs' dtype would compute them."""
    q, k, v = (x[0, :, 0].detach().clone().requires_grad_() for x in (q, k, v))
    span = Sequences(1, q.shape[0], k.shape[0]).spans()[0]
    mask = reference.attention_mask(indices[0], span, block_size)[0]
    logits = (q @ k.T * 0.2).masked_fill(~mask, -torch.inf)
    out = torch.softmax(logits, -1) @ v
    return out, *torch.autograd.grad(out, [q, k, v], d_out[0, :, 0])


@pytest.mark.parametrize("streams", [False, True], ids=["keys stay", "keys stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_plain_torch(dtype, streams, monkeypatch):
    if streams:
        monkeypatch.setattr(workspace, "KEPT_BYTES", 0)
    case = problem((1, 80, 80, 1, 1, 32), dtype=dtype)
    q, k, v, indices, d_out, _ = case
    no_d_lse = torch.zeros(q.shape[:3], device=DEVICE)
    out, lse, *gradients = kernels(*case[:5], no_d_lse)
    expected_out, expected_lse, *expected = exact(*case[:5], no_d_lse)
    budgets = plain(q, k, v, indices, d_out)
    for actual, wanted, budget in zip((out, *gradients), (expected_out, *expected), budgets, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) <= 2 * relative_error(budget, wanted[0, :, 0])
    assert_close(lse, expected_lse, 2e-6)


CASES = {
    "groups of three": ((1, 40, 40, 3, 1, 16), 16, 2),
    "batch, head dim 80": ((2, 35, 35, 1, 1, 80), 16, 2),
    "head dim 96, block 24": ((1, 60, 60, 1, 1, 96), 24, 2),
    "chunk of a prefill": ((1, 13, 75, 2, 1, 16), 16, 3),
    "block above a tile": ((1, 200, 200, 1, 1, 16), 96, 2),
    "wider values": ((1, 60, 60, 2, 1, 16, 40), 24, 2),
}


@pytest.mark.parametrize("arch", [80, 90], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, arch):
    shape, block_size, topk = CASES[case]
    inputs = problem(shape, block_size=block_size, topk=topk)
    actual = kernels(*inputs, block_size=block_size, arch=arch if DEVICE.type == "cpu" else None)
    for a, b in zip(actual, exact(*inputs, block_size=block_size), strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.parametrize("arch", [80, 90], ids=["pointers", "descriptors"])
def test_what_lies_between_tensor_rows_is_not_read(arch):
    """The room of a cache that grows holds anything, NaN included, behind the keys of each row."""
    inputs = problem((2, 75, 75, 2, 1, 16))
    rooms = [torch.full((2, 1, 96, 16), torch.nan, device=DEVICE)[:, :, :75].transpose(1, 2) for _ in range(2)]
    for room, x in zip(rooms, inputs[1:3], strict=True):
        room.copy_(x)
    arch = arch if DEVICE.type == "cpu" else None
    actual = kernels(inputs[0], *rooms, *inputs[3:], arch=arch)
    assert all(torch.equal(x, y) for x, y in zip(actual, kernels(*inputs, arch=arch), strict=True))


def test_chunks_change_no_bit(monkeypatch):
    """Heads in turn, and where a head is too large, query rows in turn."""
    monkeypatch.setattr(workspace, "ROW_MULTIPLE", 48)
    inputs = problem((1, 80, 80, 2, 2, 16))
    head_bytes = 2 * 80 * (16 * 4 + 4)
    whole = kernels(*inputs)
    by_head = kernels(*inputs, workspace_bytes=head_bytes)
    assert all(torch.equal(a, b) for a, b in zip(whole, by_head, strict=True))
    by_rows = kernels(*inputs, workspace_bytes=0)
    assert all(torch.equal(whole[i], by_rows[i]) for i in (0, 1, 3, 4))
    assert_close(by_rows[2], whole[2], 2e-6)


def test_chunks_cover_heads_and_rows_within_the_budget():
    for budget in (0, 1, 5_000, 100_000, AMPLE):
        pieces = workspace.chunks(5, 700, row_bytes=10, budget_bytes=budget)
        cells = [(c.first_head + h, c.row_begin + r) for c in pieces for h in range(c.num_heads)
                 for r in range(c.num_rows)]  # fmt: skip
        assert sorted(cells) == [(h, r) for h in range(5) for r in range(700)]
        least = min(700, workspace.ROW_MULTIPLE) * 10
        assert all(c.num_heads * c.num_rows * 10 <= max(budget, least) for c in pieces)


def everyone_chooses_first_block(num_queries, heads):
    own = torch.arange(num_queries, device=DEVICE)[:, None] // 16
    indices = torch.cat([torch.zeros_like(own), torch.where(own > 0, own, -1), torch.full_like(own, -1)], dim=1)
    return indices.int()[None, :, None].expand(1, -1, heads, -1).contiguous()


@pytest.mark.parametrize(("shortest", "value_dim"), [(16, 16), (4096, 16), (16, 8), (16, 40)])
@pytest.mark.parametrize("sums", [2, 3, 1 << 10])
def test_every_query_choosing_one_block(shortest, value_dim, sums, monkeypatch):
    """Memory for so many segments' sums decides how long they are."""
    monkeypatch.setattr(dkv, "MIN_SEGMENT_LENGTH", shortest)
    monkeypatch.setattr(dkv, "MIN_SEGMENT_BYTES", sums * 16 * 16 * max(16, value_dim))
    monkeypatch.setattr(dkv, "SEGMENT_SHARE", 0)
    launch._plans.clear()
    inputs = problem((1, 90, 90, 2, 1, 16, value_dim), indices=everyone_chooses_first_block(90, 2))
    for a, b in zip(kernels(*inputs), exact(*inputs), strict=True):
        assert_close(a, b, 3e-5)


def test_segments_are_as_short_as_there_is_room_for():
    """Two heads of a group choose together; the full segments of a length l are Σ (entries - 1) // l of the blocks."""
    entries = torch.tensor([[300, 1, 0, 40, 65], [100, 0, 0, 25, 0]])
    offsets = torch.nn.functional.pad(entries.cumsum(1), (1, 0)).int().to(DEVICE)
    counted = {(8, 400, 1): 200, (8, 200, 2): 200, (8, 200, 3): 100, (8, 200, 5): 100, (8, 200, 14): 50,
               (8, 400, 1000): 8, (16, 16, 40): 16, (9, 320, 57): 10, (9, 320, 58): 9}  # fmt: skip
    for (shortest, longest, count), length in counted.items():
        extra = torch.full((1, 7), -1, dtype=torch.int32, device=DEVICE)
        segments = dkv.Segments(extra, None, shortest, longest, count)
        view = View(offsets, None, 0)
        dkv._count_segments_kernel[(1,)](view, segments, 0, 5, GROUP=2, TILE=4, LENGTHS=dkv.SEGMENT_LENGTHS)
        of_block = (entries.sum(0) - 1).clamp(min=0) // length
        assert of_block.sum() <= count
        assert extra[0].tolist() == [0, *of_block.cumsum(0).tolist(), length], (shortest, longest, count)


def test_operators_pass_opcheck():
    # Every query has all its past blocks, so that no entry of the by-block view is left undefined.
    q, k, v, indices, d_out, d_lse = problem((1, 4, 36, 2, 1, 16))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, indices, None, None, None, None, 16, 0.2, None)
    torch.library.opcheck(_attend, arguments, atol=1e-5, rtol=1e-5)
    out, lse, offsets, entries = (x.detach() for x in _attend(*arguments))
    saved = (*(x.detach() for x in (q, k, v)), out, lse, indices, offsets, entries, *arguments[4:])
    torch.library.opcheck(_attend_backward, (d_out, d_lse, *saved))


def test_compiles_without_graph_breaks_and_checkpoints():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 20, 20, 2, 1, 16, device=DEVICE))
    indices = problem((1, 20, 20, 2, 1, 16))[3]

    def loss(q, k, v):
        out, lse, _, _ = _attend(q * 1.5, k, v, indices, None, None, None, None, 16, 0.2, None)
        return (out * out).sum() + lse.sum()

    expected = torch.autograd.grad(loss(q, k, v), [q, k, v])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), [q, k, v]), expected, strict=True):
        assert_close(a, b, 1e-6)
    again = torch.utils.checkpoint.checkpoint(loss, q, k, v, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, [q, k, v]), expected, strict=True))


def test_public_functions_compile_without_graph_breaks():
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 40, 40, 2, 1, 16, device=DEVICE))
    cu = torch.tensor([0, 17, 40], dtype=torch.int32, device=DEVICE)
    options = {"block_size": 8, "topk": 2, "backend": "triton"}

    def plain(q, k, v):
        return moba_attention(q, k, v, **options)

    def packed(q, k, v):
        return moba_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu, **options)

    for function in (plain, packed):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(q, k, v), function(q, k, v)
        assert torch.equal(actual, expected)
        for a, b in zip(torch.autograd.grad(actual.sum(), [q, k, v]), torch.autograd.grad(expected.sum(), [q, k, v]),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
