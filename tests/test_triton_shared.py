"""Routings that the query heads of a key/value head share, in the kernels. In Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, make_qkv, relative_error

from moba import moba_attention
from moba.backends import reference
from moba.routing import Selection, for_query_heads
from moba.routing import route as plain_route
from moba.sequences import Sequences

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends import triton as backend  # noqa: E402
from moba.backends.triton import attention, launch, workspace  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


def tensor(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def packed(*lengths):
    cu = tensor(0, *torch.tensor(lengths).cumsum(0).tolist())
    return Sequences(1, sum(lengths), sum(lengths), cu_q=cu, cu_k=cu)


# Sequences; H, G, D, Dv; block size and topk.
CASES = {
    "one head in a group": (Sequences(1, 40, 40), (2, 2, 16, 16), 16, 3),
    "groups of two": (Sequences(2, 40, 40), (4, 2, 16, 16), 16, 3),
    "groups of three are expanded": (Sequences(1, 40, 40), (6, 2, 16, 16), 16, 3),
    "groups of four, wider values": (Sequences(1, 13, 75), (8, 2, 16, 40), 16, 3),
    "groups of sixteen": (Sequences(1, 40, 40), (16, 1, 32, 16), 16, 2),
    "more heads than a tile has rows": (Sequences(1, 20, 20), (128, 1, 16, 16), 8, 2),
    "own blocks only": (Sequences(1, 40, 40), (4, 1, 16, 16), 16, 1),
    "block above a tile": (Sequences(1, 200, 200), (4, 1, 16, 16), 96, 2),
    "uneven blocks": (Sequences(1, 60, 60), (4, 1, 16, 16), 7, 4),
    "padded": (Sequences(2, 60, 60, key_start=tensor(3, 0), key_end=tensor(60, 50)), (4, 2, 16, 16), 8, 3),
    "packed": (packed(17, 0, 43), (4, 2, 16, 16), 8, 3),
}


def problem(sequences, heads, block_size, topk, dtype=torch.float32):
    """q, k, v, a routing by key/value head, and gradients of out and lse."""
    sizes = sequences.num_rows, sequences.num_queries, sequences.num_keys
    q, k, v = make_qkv(*sizes, *heads, dtype=dtype, device=DEVICE)
    by, _, _ = make_qkv(*sizes, heads[1], *heads[1:], dtype=dtype, device=DEVICE)
    indices = plain_route(by, k, sequences, Selection.of(block_size, topk, 0, 0, "mean"))
    d_out = torch.randn(*q.shape[:3], v.shape[3], device=DEVICE).to(dtype)
    return q, k, v, indices, d_out, torch.randn(q.shape[:3], device=DEVICE)


def results(implementation, q, k, v, indices, d_out, d_lse, sequences, block_size, **options):
    """Out, lse, dQ, dK, dV of a backend's `attend`."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, lse = implementation.attend(q, k, v, indices, sequences, block_size=block_size, scale=0.2, **options)
    return out, lse, *torch.autograd.grad([out, lse], [q, k, v], [d_out.to(out.dtype), d_lse.to(lse.dtype)])


def assert_as_expanded(inputs, sequences, block_size, **options):
    """As where every query head has the routing to itself, and as in fp64.

    Bit for bit, where tiles begin at the same keys and nothing is summed over queries.
    """
    q, k, v, indices, *d_results = inputs
    shared = results(backend, *inputs, sequences, block_size, **options)
    expanded = for_query_heads(indices, q.shape[2])
    alone = results(backend, q, k, v, expanded, *d_results, sequences, block_size, **options)
    for a, b in zip(shared[:3], alone[:3], strict=True):
        assert_close(a, b, 0 if block_size % 16 == 0 else 2e-6)
    exact = results(reference, *(x.double() for x in (q, k, v)), indices, *d_results, sequences, block_size, **options)
    for a, b in zip(shared, exact, strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_is_as_expanded(case):
    sequences, heads, block_size, topk = CASES[case]
    assert_as_expanded(problem(sequences, heads, block_size, topk), sequences, block_size)


@pytest.mark.parametrize("case", ["groups of two", "padded", "packed"])
def test_chunks_of_query_rows(case, monkeypatch):
    """Windows are cut from the entries of a chunk, and tiles of queries that have none of its rows are left out."""
    sequences, heads, block_size, topk = CASES[case]
    inputs = problem(sequences, heads, block_size, topk)
    whole = results(backend, *inputs, sequences, block_size)
    monkeypatch.setattr(workspace, "ROW_MULTIPLE", 24)
    monkeypatch.setattr(workspace, "GATHERED_BYTES", 0)
    monkeypatch.setattr(attention, "MIN_WORKSPACE_BYTES", 0)
    lookup, narrow = workspace.lookup, {"WINDOW": 8, "BLOCK_COST": 2}
    monkeypatch.setattr(workspace, "lookup", lambda *args, **kwargs: {
        name: narrow.get(name, size) for name, size in lookup(*args, **kwargs).items()
    })  # fmt: skip
    launch._plans.clear()
    cut = results(backend, *inputs, sequences, block_size)
    launch._plans.clear()
    assert all(torch.equal(whole[i], cut[i]) for i in (0, 1))
    for a, b in zip(whole[2:], cut[2:], strict=True):
        assert_close(a, b, 2e-6)


def test_softcap():
    sequences, heads, block_size, topk = CASES["groups of two"]
    assert_as_expanded(problem(sequences, heads, block_size, topk), sequences, block_size, softcap=3.0)


def test_queries_that_lie_head_after_head():
    sequences, heads, block_size, topk = CASES["groups of two"]
    q, *rest = problem(sequences, heads, block_size, topk)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_expanded((q, *rest), sequences, block_size)


def test_error_of_half_precision_is_no_larger_than_where_heads_are_alone():
    sequences, heads, block_size, topk = CASES["groups of two"]
    q, k, v, indices, *d_results = problem(sequences, heads, block_size, topk, torch.bfloat16)
    exact = results(reference, *(x.double() for x in (q, k, v)), indices, *d_results, sequences, block_size)
    shared = results(backend, q, k, v, indices, *d_results, sequences, block_size)
    alone = results(backend, q, k, v, for_query_heads(indices, q.shape[2]), *d_results, sequences, block_size)
    for a, b, wanted in zip(shared, alone, exact, strict=True):
        assert relative_error(a, wanted) <= 1.1 * relative_error(b, wanted)


def test_every_query_chooses_the_first_block(monkeypatch):
    """A block whose entries are cut into segments."""
    monkeypatch.setattr("moba.backends.triton.dkv.MIN_SEGMENT_LENGTH", 16)
    sequences, heads, block_size = Sequences(1, 90, 90), (4, 2, 16, 16), 16
    inputs = list(problem(sequences, heads, block_size, 3))
    own = torch.arange(90, device=DEVICE)[:, None] // block_size
    first = torch.cat([torch.zeros_like(own), torch.where(own > 0, own, -1), torch.full_like(own, -1)], dim=1)
    inputs[3] = first.int()[None, :, None].expand(1, -1, 2, -1).contiguous()
    launch._plans.clear()
    assert_as_expanded(inputs, sequences, block_size)
    launch._plans.clear()


def test_block_indices_of_key_value_heads_reach_the_kernels_as_they_are(monkeypatch):
    q, k, v = make_qkv(1, 40, 40, 4, 2, 16, device=DEVICE)
    chosen = torch.randint(-1, 5, (1, 40, 2, 2), device=DEVICE)
    seen = []
    plan = attention.plan_forward
    monkeypatch.setattr(
        attention, "plan_forward", lambda *args, **kwargs: (seen.append(args[4].shape), plan(*args, **kwargs))
    )
    launch._plans.clear()
    out = moba_attention(q, k, v, block_size=8, block_indices=chosen, backend="triton")
    launch._plans.clear()
    # Planned for the call, and on a GPU also by what compiles ahead of it.
    assert {shape[2] for shape in seen} == {2}
    assert_close(out, moba_attention(q, k, v, block_size=8, block_indices=chosen, backend="reference"), 2e-5)
