"""How steps of decoding are launched: operators, plans, graphs. On a GPU, or in the interpreter."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import assert_close, make_qkv
from test_triton_decode import DEVICE, SCALE, inputs, means_of, tensor
from test_triton_decode import poisoned as poisoned

from moba.backends import triton as backend
from moba.backends.triton import decode_select, launch
from moba.backends.triton.decoding import _append_means, _attend, _decode
from moba.routing import Selection
from moba.sequences import Sequences


def test_operators_pass_opcheck():
    q, k, v = inputs(1, 2, 36, 2, 1, 16, 8)
    means, start, end = means_of(k, 8), tensor([0]), tensor([36])
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    for bounds in ((None, None, None), (start, end, None), (None, tensor([8]), table)):
        pages = means[:, :1] if bounds[2] is not None else means
        k_in, v_in = (x[:, :8] if bounds[2] is not None else x for x in (k, v))
        torch.library.opcheck(_decode, (q, k_in, v_in, pages, *bounds, 8, 3, 0, 0, SCALE), atol=1e-5, rtol=1e-5)
        indices = torch.zeros(1, 2, 2, 1, dtype=torch.int32, device=DEVICE)
        torch.library.opcheck(_attend, (q, k_in, v_in, indices, *bounds, 8, SCALE), atol=1e-5, rtol=1e-5)
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
    means = torch.full((1, 15, 1, 16), torch.nan, device=DEVICE)
    for length in (33, 34, 40, 60):
        some = room[:, :length]
        num_new = length if length == 33 else 1
        backend.append_means(means[:, : length // 8], some, Sequences(1, num_new, length), 8)
        if length < 60:
            backend.decode(q, some, v[:, :length], means, Sequences(1, 1, length), _selection(8, 3), scale=SCALE)
    assert len(plans) == 3  # 33 new keys, one new key, and the step


def _selection(block_size, topk):
    return Selection.of(block_size, topk, 0, 0, "mean")


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
    monkeypatch.setattr(sys.modules["moba.backends.triton.decoding"], "_config", lambda kernel, *_: rows[kernel])
    actual = backend.decode(*arguments, scale=SCALE)
    assert torch.equal(actual[2], expected[2])
    assert_close(actual[0], expected[0], 2e-6)
