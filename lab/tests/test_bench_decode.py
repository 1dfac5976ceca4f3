"""The decode benchmark's own checks: it refuses wrong results, counts bytes right, and ends in one JSON line."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from helpers import make_qkv

from moba import append_block_means, moba_attention
from moba.routing import Routing
from moba_lab.bench import cases
from moba_lab.bench.cases import DecodeCase
from moba_lab.bench.check import check_dense, check_means, find_error
from moba_lab.bench.decode import rows
from moba_lab.bench.dense import decode_baselines

CPU = torch.device("cpu")


@pytest.fixture
def step():
    q, k, v = make_qkv(2, 2, 200, 4, 2, 16)
    means = torch.full((2, 12, 2, 16), torch.nan)
    append_block_means(means, k, num_new=200, block_size=16)
    out, routing = moba_attention(q, k, v, block_means=means, block_size=16, topk=3, return_routing=True)
    return {"q": q, "k": k, "v": v, "means": means, "out": out, "routing": routing, "topk": 3}


def test_a_right_step_passes(step):
    assert check_means(step["means"], step["k"], 16) is None
    assert find_error(**step) is None


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_a_wrong_step_fails(step, wrong):
    spoiled = step["out"].clone()
    spoiled[1, 1, 3] *= wrong
    assert "relative error" in find_error(**{**step, "out": spoiled})
    spoiled = step["means"].clone()
    spoiled[1, 11, 1] *= wrong
    assert "row 1, head 1" in check_means(spoiled, step["k"], 16)


def test_a_wrong_routing_fails(step):
    chosen = step["routing"].indices[1, 1, 3].tolist()
    for block in range(12):
        if block not in chosen:
            indices = step["routing"].indices.clone()
            indices[1, 1, 3] = torch.tensor([*sorted((block, chosen[1])), 12])
            problem = find_error(**{**step, "routing": Routing(indices, 16)})
            if "scores" in problem:
                return
    raise AssertionError("no exchange of a chosen block for another was noticed")


def test_every_dense_baseline_is_dense_attention():
    q, k, v = (x.transpose(1, 2) for x in make_qkv(2, 1, 50, 4, 2, 16))
    for name, dense in decode_baselines(CPU, 1, flex=False).items():
        assert check_dense(q, k, v, dense(q, k, v)) is None, name
        assert "relative error" in check_dense(q, k, v, 1.01 * dense(q, k, v))
    q, k, v = (x.transpose(1, 2) for x in make_qkv(1, 3, 50, 4, 2, 16))
    baselines = decode_baselines(CPU, 3, flex=False)
    assert list(baselines) == ["SDPA"]
    assert check_dense(q, k, v, baselines["SDPA"](q, k, v)) is None


def test_bytes_are_counted():
    case = DecodeCase(100, 4, 2, 16, 16, 3, torch.float32, batch=2)
    assert case.dense_bytes == 2 * 2 * 100 * 2 * 16 * 4
    assert case.means_bytes == 2 * 6 * 2 * 16 * 4
    indices = torch.tensor([[0, 2, 6], [0, 3, 6], [1, 2, 6], [1, 2, 6]]).int()[None, None].expand(2, 1, -1, -1)
    # Of each sequence, four different blocks for the first kv head and three for the second; the last holds 4 tokens.
    num_tokens = 2 * ((3 * 16 + 4) + (2 * 16 + 4))
    assert case.bytes_read(Routing(indices, 16)) == case.means_bytes + 2 * num_tokens * 16 * 4


def test_layers_outgrow_caches_but_not_the_memory():
    case = DecodeCase(131072, 32, 8, 128, 128, 16, torch.bfloat16)
    layer_bytes = case.dense_bytes + case.means_bytes
    selected = 32 * 16 * 128 * 128 * 2 * 2
    assert (case.num_layers(torch.device("cuda"), 1 << 40) - 1) * (case.means_bytes + selected) >= cases.COLD_BYTES
    assert case.num_layers(CPU, 3 * layer_bytes) == 2
    assert case.num_layers(CPU, layer_bytes) == 0


def test_cases_that_do_not_fit_or_fail_stand_in_the_table(monkeypatch):
    case = DecodeCase(256, 4, 2, 16, 16, 3, torch.float32)
    from moba_lab.bench import decode

    run = (case, CPU, "pytorch", 1, False, 1e10, {})
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1000)
    skipped = decode.run_case(*run)
    monkeypatch.undo()
    monkeypatch.setattr(decode, "find_error", lambda *_, **__: "wrong")
    failed = decode.run_case(*run)
    assert "moba_ms" not in failed
    _, (first, second) = rows([skipped, failed])
    assert first[1].startswith("skipped: ")
    assert second[1] == "failed: wrong"


def test_the_command_writes_its_files_and_one_json_line_last(moba, tmp_path):
    options = shlex.split("--tokens 512 --batch 2 --heads 4 --kv-heads 2 --head-dim 16 --block-size 32 --topk 3")
    options += ["--dtype", "fp32", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "result")]
    code, out, err = moba("bench", "decode", *options)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert {"device", "versions", "commit", "command", "copy"} <= set(result["header"])
    record = result["records"][0]
    assert record["moba_ms"] > 0
    assert min(record["dense_ms"].values()) > 0
    assert record["moba_bytes"] < record["dense_bytes"]
    assert "| 512, batch 2, 32/3 |" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
