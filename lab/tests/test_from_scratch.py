"""benchmarks/from_scratch.py at toy size: arms are trained, measured and compared."""

from __future__ import annotations

import json
from pathlib import Path

import from_scratch
import from_scratch_measure
import pytest
import torch
from from_scratch_measure import flops, last_row_gradients
from from_scratch_report import differences, report
from tiny_shards import save_shards
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from moba_lab.train.model import build_model

RECIPE = Path(__file__).parents[2] / "recipes" / "gap.toml"
CONTEXT = 256
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CHANGES = [
    f"data.context={CONTEXT}", "model.shape.num_hidden_layers=2", "attention.block_size=16", "attention.topk=3",
    "training.tokens=2048", "training.rows_per_step=2", "training.rows_at_once=1", "training.compile=false",
    *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("data"), lengths=(4096, 2048), held_out=(1024, 1024))


def run(data, out, *runs, changes=CHANGES):
    options = [word for change in (f"data.folder={data}", *changes) for word in ("-s", change)]
    given = ["train", *runs, "--out", str(out), "--recipe", str(RECIPE), "--rows", "2", *options]
    result = CliRunner().invoke(from_scratch.app, given)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def records(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gap.jsonl"
    return run(data, out, *(f"{arm}:0" for arm in from_scratch.ARMS), "dense:1", "moba:1")


def test_every_arm_is_trained_and_measured(records):
    assert [(record["arm"], record["seed"]) for record in records] == [
        *((arm, 0) for arm in from_scratch.ARMS),
        ("dense", 1),
        ("moba", 1),
    ]
    for record in records:
        assert "error" not in record
        assert set(record["loss"]) == set(record["last"]) == {"source 0", "source 1"}
        assert len(record["train"]) == 4
        assert record["train"][-1] < record["train"][0]
        assert set(record["copy"]) == {"1024", "3072"}
    by_arm = {record["arm"]: record for record in records if record["seed"] == 0}
    assert by_arm["dense"]["train"][0] == pytest.approx(by_arm["moba"]["train"][0], abs=0.05), "the same weights, rows"
    assert by_arm["recent"]["covered"] <= by_arm["recent"]["best"] <= 1


def test_ended_runs_are_not_repeated_and_failed_arms_are_left_out(data, tmp_path, monkeypatch):
    out = tmp_path / "gap.jsonl"
    run(data, out, "dense:0")
    measured = from_scratch.HeldOut.measure

    def fails(self, training):
        if training.recipe.attention.keep_recent:
            raise ValueError("as broken as can be")
        return measured(self, training)

    monkeypatch.setattr(from_scratch.HeldOut, "measure", fails)
    records = run(data, out, "dense:0", "recent:0", "recent:1", "moba:0")
    assert [(record["arm"], record["seed"]) for record in records] == [("dense", 0), ("recent", 0), ("moba", 0)]
    assert records[1]["error"] == "ValueError: as broken as can be"


def test_an_arm_that_does_not_compile_is_trained_without(data, tmp_path, monkeypatch):
    def fails(model):
        raise RuntimeError("no graph")

    monkeypatch.setattr(from_scratch, "compile_layers", fails)
    for runs in (["moba:0"], ["moba:0", "moba:1"]):
        ended = run(data, tmp_path / "gap.jsonl", *runs, changes=[*CHANGES, "training.compile=true"])
        assert [(record["arm"], record["seed"]) for record in ended] == [("moba", seed) for seed in range(len(runs))]
        assert not any(record["recipe"]["training"]["compile"] for record in ended)


def test_what_is_the_same_in_all_runs_is_not_changed_silently(data, tmp_path):
    given = ["train", "moba:0", "--out", str(tmp_path / "gap.jsonl"), "--recipe", str(RECIPE)]
    result = CliRunner().invoke(from_scratch.app, [*given, "-s", "training.optimizer=adamw"])
    assert "training.optimizer must be 'muon' here" in result.output


def test_operations_are_those_of_the_keys_that_are_read(data):
    counted = {}
    for arm in ("dense", "moba", "local"):
        recipe = from_scratch.arm_recipe(RECIPE, arm, 0, CHANGES)
        model, _ = build_model(recipe, {"vocab_size": 64, "tokenizer": "tiny"})
        weights = 6 * sum(p.numel() for p in model.parameters())
        counted[arm] = (flops(recipe, model) - weights) / (12 * 2 * 32)
    # Of blocks of 16, at most 3 are read: half of the own one, and two past ones but at the start.
    moba = 8.5 + 16 * (0 + 1 + 14 * 2) / 16
    window = sum(min(t + 1, 32) for t in range(CONTEXT)) / CONTEXT
    assert counted == pytest.approx({"dense": (CONTEXT + 1) / 2, "moba": moba, "local": (moba + window) / 2})


def test_report_compares_seed_by_seed(records, tmp_path):
    lines = tmp_path / "gap.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    report([lines], tmp_path / "one")
    report([tmp_path / "one.json"], tmp_path / "two")
    assert (tmp_path / "two.md").read_text() == (tmp_path / "one.md").read_text()
    assert (tmp_path / "one.png").stat().st_size > 10_000
    dense, moba = ([record for record in records if record["arm"] == arm] for arm in ("dense", "moba"))
    gaps = [b["last"]["source 0"] - a["last"]["source 0"] for a, b in zip(dense, moba, strict=True)]
    assert differences(records, "moba", lambda record: record["last"]["source 0"]) == gaps
    table = (tmp_path / "one.md").read_text()
    assert table.count("| moba | 2 |") == 1
    lines.write_text(json.dumps(moba[0]) + "\n")
    with pytest.raises(ValueError, match="no run of dense"):
        report([lines], tmp_path / "three")


def test_the_gradients_that_backends_are_held_to_are_of_the_last_row(monkeypatch):
    monkeypatch.setattr(from_scratch_measure, "_QUERIES", 10)
    q, k, v = (torch.randn(2, heads, 24, 8, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn_like(q)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    whole = torch.autograd.grad(out, (q, k, v), grad)
    for mine, all_rows in zip(last_row_gradients(q, k, v, grad), whole, strict=True):
        torch.testing.assert_close(mine, all_rows[-1])
