"""The decode kernels' own ways to select and to launch; what they compute is test_decode.py's. On a GPU, or in the
interpreter.
"""

from __future__ import annotations

import sys

import oracle
import pytest
import torch
from helpers import LSE_TOLERANCE, TOLERANCE, assert_close, make_qkv, relative_error

from moba.backends import reference
from moba.routing import Selection
from moba.sequences import Sequences, page_means_shape

triton = pytest.importorskip("triton", reason="the triton backend needs Triton")
if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moba.backends import triton as backend  # noqa: E402
from moba.backends.triton import decode_select, launch  # noqa: E402
from moba.backends.triton.decoding import _append_means, _attend, _decode  # noqa: E402

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
SCALE = 0.2


def tensor(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(batch, queries, keys, heads, kv_heads, head_dim, block_size, dtype=torch.float32):
    """q and k of integers, so that every backend scores alike, and real v."""
    q, k, _ = make_qkv(
        batch, queries, keys, heads, kv_heads, head_dim, dtype=dtype, device=DEVICE, exact_for=block_size
    )
    return q, k, torch.randn_like(k)


def means_of(k, block_size, starts=None, ends=None):
    """Block means of every row as the cache holds them, NaN where no block is finished."""
    means = torch.full((k.shape[0], k.shape[1] // block_size, *k.shape[2:]), torch.nan, dtype=k.dtype, device=DEVICE)
    sequences = Sequences(k.shape[0], k.shape[1], k.shape[1], key_start=tensor(starts), key_end=tensor(ends))
    backend.append_means(means, k, sequences, block_size)
    return means


def assert_matches_the_definition(
    q, k, v, block_size, topk, keep_first=0, keep_recent=0, starts=None, ends=None, tolerance=None
):
    selection = Selection.of(block_size, topk, keep_first, keep_recent, "mean")
    sequences = Sequences(q.shape[0], q.shape[1], k.shape[1], key_start=tensor(starts), key_end=tensor(ends))
    means = means_of(k, block_size, starts, ends)
    out, lse, indices = backend.decode(q, k, v, means, sequences, selection, scale=SCALE)
    assert (out.dtype, lse.dtype, indices.dtype) == (q.dtype, torch.float32, torch.int32)
    expected_out, expected_lse, expected_indices = oracle.attend_batch(
        q.cpu(), k.cpu(), v.cpu(), key_start=starts, key_end=ends, block_size=block_size, topk=topk, scale=SCALE,
        keep_first=keep_first, keep_recent=keep_recent,
    )  # fmt: skip
    wrong = (indices.cpu() != expected_indices).any(-1)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        got, wanted = indices.cpu()[wrong][0].tolist(), expected_indices[wrong][0].tolist()
        raise AssertionError(f"first at {first}: got {got}, not {wanted}")
    assert_close(out, expected_out, TOLERANCE[q.dtype] if tolerance is None else tolerance)
    assert_close(lse, expected_lse, LSE_TOLERANCE[q.dtype])
    return out, lse, indices


# Batch, queries, keys, heads, kv heads, head dim, block size, topk: what test_decode.py's cases do not reach.
CASES = {
    "more query rows than a tile": (1, 3, 30, 24, 1, 16, 16, 2),
    "head dim 96": (1, 2, 50, 1, 1, 96, 16, 3),
    "head dim 256": (1, 1, 40, 1, 1, 256, 16, 2),
    "block of several parts": (1, 3, 1300, 1, 1, 16, 600, 2),
    "families of blocks": (1, 1, 1200, 2, 1, 16, 1, 4),
    "every key is a query": (1, 5, 5, 2, 1, 16, 2, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case):
    *shape, topk = CASES[case]
    assert_matches_the_definition(*inputs(*shape), shape[-1], topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_that_of_plain_torch(dtype):
    q, k, v = make_qkv(1, 1, 300, 1, 1, 64, dtype=dtype, device=DEVICE)
    sequences, selection = Sequences(1, 1, 300), Selection.of(32, 4, 0, 0, "mean")
    out, lse, indices = backend.decode(q, k, v, means_of(k, 32), sequences, selection, scale=SCALE)
    options = {"block_size": 32, "scale": SCALE}
    exact, exact_lse = reference.attend(q.double(), k.double(), v.double(), indices, sequences, **options)
    blocks = indices[0, 0, 0].long()
    keys = (blocks[:, None] * 32 + torch.arange(32, device=DEVICE)).flatten()
    keys = keys[keys < 300]
    plain = torch.softmax(q[0, 0] @ k[0, keys, 0].T * SCALE, dim=-1) @ v[0, keys, 0]
    assert relative_error(out, exact) <= 2 * relative_error(plain, exact[0, 0])
    assert_close(lse, exact_lse, 2e-6)


@pytest.mark.parametrize("kept", [(2, 3), (20, 0), (0, 20)])
def test_kept_blocks_take_places(kept):
    q, k, v = inputs(1, 2, 70, 1, 1, 16, 4)
    for topk in {sum(kept) + 1, sum(kept) + 4}:
        assert_matches_the_definition(q, k, v, 4, topk, *kept)


@pytest.fixture(params=["families", "at once", "streamed"])
def way(request, monkeypatch):
    """Each way to select: by families, among all blocks at once, and streamed in chunks; a number of places for it."""
    monkeypatch.setattr(launch, "_plans", {})
    if request.param == "families":
        monkeypatch.setattr(decode_select, "MAX_AT_ONCE", 0)
    elif request.param == "streamed":
        monkeypatch.setattr(decode_select, "MAX_HELD", 0)
    return {"families": 2, "at once": 30, "streamed": 9}[request.param]


def test_every_way_selects_alike(way):
    q, k, v = inputs(1, 1, 230, 2, 1, 16, 2)
    assert_matches_the_definition(q, k, v, 2, way + 1)
    assert_matches_the_definition(q, k, v, 2, way + 3, 1, 1)


@pytest.mark.parametrize("keys", ["constant", "two values", "zeros of both signs"])
def test_ties_go_to_the_lower_block(keys, way):
    q, k, v = inputs(1, 1, 260, 2, 1, 16, 2)
    block = torch.arange(260, device=DEVICE)[None, :, None, None] // 2
    if keys == "constant":
        k = torch.ones_like(k)
    elif keys == "two values":
        k = torch.ones_like(k) * (block % 23 == 3)
    else:
        k = torch.zeros_like(k) * torch.where(block % 3 == 1, -1.0, 1.0)
    assert_matches_the_definition(q, k, v, 2, way + 1)


def test_scores_that_are_not_finite(way):
    """NaN and -inf rank below every number and tie; +inf ranks above."""
    q, k, v = inputs(1, 1, 260, 1, 1, 16, 2)
    q[..., 1:] = 0
    q[..., 0] = q[..., 0].abs() + 1
    sequences, selection = Sequences(1, 1, 260), Selection.of(2, way + 1, 0, 0, "mean")
    for value, block in ((torch.nan, 3), (-torch.inf, 1), (torch.inf, 5), (torch.nan, 9), (torch.inf, 120)):
        k[:, 2 * block : 2 * block + 2] = value
    for values in (k, torch.full_like(k, torch.nan)):
        means = means_of(values, 2)
        _, _, indices = backend.decode(q, values, v, means, sequences, selection, scale=SCALE)
        assert torch.equal(indices, reference.decode(q, values, v, means, sequences, selection, scale=SCALE)[2])


def test_a_cache_larger_than_its_contents():
    """A graph recorded for a cache of this size serves every length; what lies behind the end is never read."""
    q, k, v = inputs(1, 1, 200, 2, 1, 16, 4)
    means = means_of(k, 4)
    selection = Selection.of(4, 5, 0, 0, "mean")
    for end in (1, 4, 133):
        whole = backend.decode(q, k, v, means, Sequences(1, 1, 200, key_end=tensor([end])), selection, scale=SCALE)
        nan_k, nan_v, nan_means = k.clone(), v.clone(), means.clone()
        nan_k[:, end:], nan_v[:, end:], nan_means[:, end // 4 :] = torch.nan, torch.nan, torch.nan
        short = Sequences(1, 1, 200, key_end=tensor([end]))
        for a, b in zip(whole, backend.decode(q, nan_k, nan_v, nan_means, short, selection, scale=SCALE), strict=True):
            assert torch.equal(a, b)


def test_more_rows_than_a_grid_takes_are_refused():
    rows = 33_000
    q, k = torch.zeros(rows, 1, 2, 16, device=DEVICE), torch.zeros(rows, 4, 2, 16, device=DEVICE)
    means = torch.zeros(page_means_shape(k, 4), device=DEVICE)
    with pytest.raises(ValueError, match=r"at most 65,535 rows x key/value heads in a call, got 66,000; split"):
        _decode(q, k, k, means, None, None, None, 4, 1, 0, 0, SCALE, None)


def test_operators_pass_opcheck():
    q, k, v = inputs(1, 2, 36, 2, 1, 16, 8)
    means, start, end = means_of(k, 8), tensor([0]), tensor([36])
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    for bounds in ((None, None, None), (start, end, None), (None, tensor([8]), table)):
        pages = means[:, :1] if bounds[2] is not None else means
        k_in, v_in = (x[:, :8] if bounds[2] is not None else x for x in (k, v))
        torch.library.opcheck(_decode, (q, k_in, v_in, pages, *bounds, 8, 3, 0, 0, SCALE, None), atol=1e-5, rtol=1e-5)
        indices = torch.zeros(1, 2, 2, 1, dtype=torch.int32, device=DEVICE)
        torch.library.opcheck(_attend, (q, k_in, v_in, indices, *bounds, 8, SCALE, None), atol=1e-5, rtol=1e-5)
        torch.library.opcheck(_append_means, (pages.clone(), k_in, *bounds, 36, 8))


def test_compiles_without_graph_breaks():
    q, k, v = inputs(1, 1, 40, 2, 1, 16, 8)
    selection = Selection.of(8, 3, 0, 0, "mean")

    def step(q, k, v, means):
        sequences = Sequences(1, 1, 40)
        backend.append_means(means, k, sequences, 8)
        return backend.decode(q * 2, k, v, means, sequences, selection, scale=SCALE)

    means, others = means_of(k[:, :39], 8), means_of(k[:, :39], 8)
    means, others = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1), value=torch.nan) for x in (means, others))
    expected = step(q, k, v, means)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, others)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(means, others)


def test_a_step_is_four_kernels(monkeypatch):
    plans = {}
    monkeypatch.setattr(launch, "_plans", plans)
    q, k, v = inputs(1, 1, 40, 2, 1, 16, 8)
    means = means_of(k, 8)
    plans.clear()
    backend.decode(q, k, v, means, Sequences(1, 1, 40), Selection.of(8, 3, 0, 0, "mean"), scale=SCALE)
    (plan,) = plans.values()
    names = [step.kernel.__name__ for step in plan._steps]
    assert names == ["_score_kernel", "_decode_select_kernel", "_decode_attend_kernel", "_decode_merge_kernel"]


def test_a_growing_cache_takes_one_plan(monkeypatch):
    plans = {}
    monkeypatch.setattr(launch, "_plans", plans)
    q, k, v = inputs(1, 1, 60, 2, 1, 16, 8)
    room = torch.cat([k, torch.full_like(k, torch.nan)], dim=1)
    selection = Selection.of(8, 3, 0, 0, "mean")
    means = torch.full((1, 15, 1, 16), torch.nan, device=DEVICE)
    for length in (33, 34, 40, 60):
        some = room[:, :length]
        num_new = length if length == 33 else 1
        backend.append_means(means[:, : length // 8], some, Sequences(1, num_new, length), 8)
        if length < 60:
            backend.decode(q, some, v[:, :length], means, Sequences(1, 1, length), selection, scale=SCALE)
    assert len(plans) == 3  # 33 new keys, one new key, and the step


class _Compiled:
    """Stands for a compiled kernel, and records what it is launched with."""

    arg_names = ("x", "bounds", "num_keys", "SIZE")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, stream: self.launches.append((grid, args, stream))


def test_a_launch_takes_pointers_and_numbers_at_every_run():
    kernel, x, y = _Compiled(), torch.zeros(4), torch.zeros(9, dtype=torch.int32)

    def build(plan, x, y):
        table = decode_select.Table(y[5:], launch.Number(1))
        plan.launch(kernel, (3,), x, table, launch.Number(0), SIZE=8, num_warps=4)

    plan = launch.make_plan(build, x, y)
    run = plan._launching(plan._steps[0], kernel)
    for number in (5, 6):
        run([x.data_ptr(), y.data_ptr()], (x, y), None, (number, 2 * number), 77)
    expected = [((3, 1, 1), (x.data_ptr(), (y.data_ptr() + 20, 2 * n), n, 8), 77) for n in (5, 6)]
    assert kernel.launches == expected


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_one_graph_serves_a_growing_context():
    q, k, v = inputs(1, 1, 5000, 8, 2, 64, 32, torch.bfloat16)
    means, selection, end = means_of(k, 32), Selection.of(32, 6, 0, 0, "mean"), tensor([100])
    arguments = (q, k, v, means, Sequences(1, 1, 5000, key_end=end), selection)
    backend.decode(*arguments, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = backend.decode(*arguments, scale=SCALE)
    for length in (100, 1, 4999, 3232):
        end.fill_(length)
        graph.replay()
        expected = backend.decode(*arguments, scale=SCALE)
        assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))


def test_tile_sizes_change_no_selection(monkeypatch):
    q, k, v = make_qkv(1, 2, 300, 2, 1, 32, device=DEVICE)
    arguments = (q, k, v, means_of(k, 2), Sequences(1, 2, 300), Selection.of(2, 5, 0, 0, "mean"))
    expected = backend.decode(*arguments, scale=SCALE)
    rows = {
        "decode_score": {"TILE_N": 64, "num_warps": 4},
        "decode_attend": {"TILE_N": 32, "PART": 64, "NUM_STAGES": 1, "num_warps": 4},
        "decode_merge": {"TILE_P": 2, "TILE_D": 16, "num_warps": 4},
    }
    monkeypatch.setattr(launch, "_plans", {})
    # By its name in the package, `decode` is the function.
    decoding = sys.modules["moba.backends.triton.decoding"]
    monkeypatch.setattr(decoding, "tile_sizes", lambda kernel, *_: dict(rows[kernel]))
    actual = backend.decode(*arguments, scale=SCALE)
    assert torch.equal(actual[2], expected[2])
    assert_close(actual[0], expected[0], 2e-6)
