"""The benchmark's own checks: it refuses wrong results, counts operations right, and ends in one JSON line."""

from __future__ import annotations

import json
import shlex
import time

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import make_qkv

from moba import moba_attention
from moba.backends import pytorch
from moba_lab.bench import attention, decode
from moba_lab.bench.attention import rows, run_case
from moba_lab.bench.cases import Case, length_name
from moba_lab.bench.check import find_error
from moba_lab.bench.report import plot_growth, to_markdown


@pytest.fixture
def results():
    leaves = [x.requires_grad_() for x in make_qkv(1, 200, 200, 4, 2, 16)]
    out, routing = moba_attention(*leaves, block_size=16, topk=3, backend="pytorch", return_routing=True)
    d_out = torch.randn_like(out)
    d_q = torch.autograd.grad(out, leaves, d_out)[0]
    q, k, v = (x.detach() for x in leaves)
    return {"q": q, "k": k, "v": v, "out": out.detach(), "routing": routing, "topk": 3, "d_out": d_out, "d_q": d_q}


def test_right_results_pass(results):
    assert find_error(**results) is None


def test_heads_that_choose_together_are_judged_together(results):
    """Each head's own choice is another one, so either is refused where the other is said."""
    q, k, v = (results[name] for name in "qkv")
    for router, other in (("shared", "mean"), ("mean", "shared")):
        out, routing = moba_attention(q, k, v, block_size=16, topk=3, router=router, return_routing=True)
        given = {"q": q, "k": k, "v": v, "out": out, "routing": routing, "topk": 3}
        assert find_error(**given, router=router) is None
        assert "scores" in find_error(**given, router=other)


@pytest.mark.parametrize("name", ["out", "d_q"])
def test_a_wrong_or_missing_value_fails(results, name):
    for wrong in (1.01, torch.nan):
        spoiled = results[name].clone()
        spoiled[0, -1, 2] *= wrong
        assert f"relative error of {name}" in find_error(**{**results, name: spoiled})


def test_a_wrong_routing_fails(results):
    indices = results["routing"].indices
    last = indices[0, -1, 0].clone()
    for blocks in ([last[1], last[0], last[2]], [last[0], last[2], -1]):
        indices[0, -1, 0] = torch.tensor(blocks)
        assert "routing of row 0, query 199, head 0" in find_error(**results)
    worst = next(j for j in range(12) if j not in last.tolist())
    for other in range(12):
        if other != worst:
            indices[0, -1, 0] = torch.tensor([*sorted((worst, other)), 12])
            if set(indices[0, -1, 0].tolist()) != set(last.tolist()):
                assert "scores" in find_error(**results)


def test_operations_are_counted():
    case = Case(100, 2, 1, 16, 16, 3, torch.float32)
    pairs = sum(min(t // 16, 2) * 16 + t % 16 + 1 for t in range(100))
    assert case.moba_flops == 4 * 2 * 16 * pairs
    assert case.dense_flops == 4 * 2 * 16 * sum(t + 1 for t in range(100))
    assert [length_name(n) for n in (2048, 1048576, 1000)] == ["2K", "1M", "1000"]


def test_the_command_writes_its_files_and_one_json_line_last(moba, tmp_path):
    options = shlex.split("--tokens 512 --heads 2 --head-dim 16 --block-size 64 --topk 3 --dtype fp32 --reference")
    code, out, err = moba("bench", "attention", *options, "--device", "cpu", "--out", tmp_path / "result")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert {"device", "versions", "commit", "command"} <= set(result["header"])
    record = result["records"][0]
    assert record["moba"]["forward_ms"] > 0
    assert record["dense"]["train_ms"] > 0
    assert record["reference"]["forward_ms"] > 0
    assert "| 512, 2 heads" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def record(backend, topk):
    case = Case(256, 2, 1, 16, 32, topk, torch.float32, backward=False, dense=False)
    return run_case(case, torch.device("cpu"), backend, 1, False, {})["moba"]


def test_routing_is_measured_where_there_is_some(monkeypatch):
    route, calls = pytorch.route, []

    def slow(*args, **options):
        calls.append(args)
        time.sleep(0.05)
        return route(*args, **options)

    monkeypatch.setattr(pytorch, "route", slow)
    assert 50 <= record("pytorch", 3)["routing_ms"] < record("pytorch", 3)["forward_ms"] + 50
    assert calls
    assert record("pytorch", 8)["routing_ms"] >= 50, "a named backend routes in any case"
    dense = record("auto", 8)
    assert "routing_ms" not in dense, "dense attention serves"
    assert "256" in to_markdown({}, [{"case": "256", "moba_flops": 1.0, "moba": dense}], rows)


def test_a_picture_shows_random_routings_of_one_document():
    shape = {"tokens": 512, "heads": 2, "kv_heads": 1, "block_size": 32, "topk": 3, "dtype": "float32"}
    kinds = [("random", 1, 1.0), ("model", 1, 2.0), ("random", 4, 3.0)]
    records = [
        {**shape, "routing": routing, "documents": documents, "moba": {"forward_ms": ms}}
        for routing, documents, ms in kinds
    ]
    assert list(attention.panels(records)[1].values()) == [{"MoBA 32/3": {512: 1.0}}]
    assert list(attention.panels(records[1:])[1].values()) == [{"MoBA 32/3": {512: 2.0}}]


@pytest.mark.parametrize("lengths", [(128,), (1024,), (131072,), (512, 1024, 2048)])
@pytest.mark.parametrize("kind", ["attention", "decode"])
def test_the_legend_hides_no_point(tmp_path, monkeypatch, kind, lengths):
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16, "block_size": 32, "topk": 3, "dtype": "float32", "batch": 1}
    times = {"moba_ms": 1.0, "moba": {"forward_ms": 1.0}, "dense": {"forward_ms": 40.0}, "dense_bound_ms": 0.1}
    times |= {"dense_ms": {"dense": 40.0}, "dense_failed": {}, "routing": "random", "documents": 1}
    records = [{**shape, **times, "tokens": length} for length in lengths]
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    panels = {"attention": attention.panels, "decode": decode.panels}[kind]
    plot_growth("here", *panels(records), tmp_path / "x.png")
    monkeypatch.undo()
    for axes in drawn[0].axes:
        legend = axes.get_legend().get_window_extent()
        points = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
        assert points
        assert not any(legend.contains(*point) for point in points)
    plt.close(drawn[0])


@pytest.mark.parametrize("name", ["attention", "decode", "parallel"])
@pytest.mark.parametrize("option", ["tokens", "heads", "kv-heads", "head-dim", "block-size", "topk", "repeats"])
def test_sizes_are_at_least_one(moba, name, option):
    code, out, err = moba("bench", name, f"--{option}", 0)
    assert (code, out) == (2, "")
    assert f"Invalid value for '--{option}'" in err
