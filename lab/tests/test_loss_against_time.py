"""benchmarks/loss_against_time.py at toy size: arms train for the same seconds from the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import loss_against_time
import pytest
import torch
from from_scratch import Training, read_rows
from loss_against_time_report import complete, held_out, passes, report, training_loss
from tiny_shards import save_shards
from typer.testing import CliRunner

from moba_lab.data import open_shards

RECIPE = Path(__file__).parents[2] / "recipes" / "long.toml"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CHANGES = [
    "data.context=256", "model.shape.num_hidden_layers=2", "attention.block_size=16", "attention.topk=3",
    "training.tokens=8192", "training.rows_per_step=2", "training.rows_at_once=2", "training.compile=false",
    *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("data"), lengths=(4096, 2048), held_out=(512, 512))


@pytest.fixture(scope="module")
def changes(data):
    return [f"data.folder={data}", *CHANGES]


@pytest.fixture(scope="module")
def lines(changes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "time.jsonl"
    options = [word for change in changes for word in ("-s", change)]
    given = ["train", "dense", "moba", "32x2", "--out", str(out), "--recipe", str(RECIPE), "--seconds", "0.6"]
    loss_against_time.START_CONTEXT, before = 64, loss_against_time.START_CONTEXT
    try:
        result = CliRunner().invoke(loss_against_time.app, [*given, "--start-seconds", "0.3", "--rows", "2", *options])
    finally:
        loss_against_time.START_CONTEXT = before
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_arms_train_for_the_same_time_from_one_start(lines):
    runs = complete(lines)
    assert [run[-1]["arm"] for run in runs] == ["dense", "moba", "32x2"]
    for run in runs:
        assert [moment["seconds"] >= share * 0.6 for moment, share in zip(run, loss_against_time.MOMENTS, strict=True)]
        assert run[-1]["seconds"] < 0.6 + 0.5
        assert run[-1]["steps"] == sum(len(moment["train"]) for moment in run)
        assert run[-1]["tokens"] == run[-1]["steps"] * 512
        assert run[-1]["start"] == runs[0][-1]["start"]
        assert run[-1]["start"]["context"] == 64
        assert set(run[0]["loss"]) == set(run[0]["last"]) == {"source 0", "source 1"}
        assert len(run[0]["positions"]["source 0"]) == 16
        assert held_out(run[-1]) < held_out(run[0]) < 4.2, "the start has learned, and the arm more"
    first = {run[-1]["arm"]: run[0]["positions"]["source 0"] for run in runs}
    assert first["moba"][:3] == pytest.approx(first["dense"][:3], abs=1e-3), "the first 48 tokens read the same keys"
    assert runs[1][-1]["recipe"]["attention"]["topk"] == 3
    assert runs[2][-1]["recipe"]["attention"]["block_size"] == 32


def test_compiling_leaves_no_trace_in_weights_and_optimizer(changes, data):
    recipe, shards = loss_against_time.arm_recipe(RECIPE, "moba", changes), open_shards(data)
    rows = read_rows(recipe, shards, 8, torch.device("cpu"))
    start = loss_against_time.weights(Training(recipe, "moba", shards, rows.device))
    one = loss_against_time.prepare(recipe, "moba", shards, rows, None, None)
    two = loss_against_time.prepare(recipe, "moba", shards, rows, start, None)
    for training in (one, two):
        assert not training.optimizer.state
        for name, value in training.model.state_dict().items():
            assert torch.equal(value, start["model"][name]), name
    one.step(rows[0])
    later = loss_against_time.weights(one)
    momenta = [state["momentum_buffer"].clone() for state in later["optimizer"]["state"].values() if len(state) == 1]
    loss_against_time.restore(two, later)
    two.step(rows[1])
    now = [state["momentum_buffer"] for state in later["optimizer"]["state"].values() if len(state) == 1]
    assert momenta
    assert all(torch.equal(a, b) for a, b in zip(momenta, now, strict=True)), "an arm changed another's start"


def test_the_learning_rate_follows_the_time(changes, data):
    recipe = loss_against_time.arm_recipe(RECIPE, "dense", changes)
    training = Training(recipe, "dense", open_shards(data), torch.device("cpu"))
    clock = loss_against_time.Clock(training, 0.1, 0.1)
    rates = []
    for share in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2):
        clock.set(share)
        rates.append(training.optimizer.param_groups[0]["lr"] / 3e-3)
    assert rates == pytest.approx([0.01, 0.51, 1.0, 0.55, 0.1, 0.1])
    flat = loss_against_time.Clock(training, 0.0, 1.0)
    flat.set(0.7)
    assert training.optimizer.param_groups[1]["lr"] == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("arm", "change"),
    [("sparse", ""), ("128x", ""), ("moba", "attention.schedule=hybrid"), ("moba", "training.optimizer=adamw")],
)
def test_what_cannot_be_compared_is_refused(changes, arm, change):
    with pytest.raises(ValueError):
        loss_against_time.arm_recipe(RECIPE, arm, [*changes, *([change] if change else [])])


def test_report_compares_at_the_same_time(lines, tmp_path):
    path = tmp_path / "time.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report([path], tmp_path / "one")
    report([tmp_path / "one.json"], tmp_path / "two")
    assert (tmp_path / "two.md").read_text() == (tmp_path / "one.md").read_text()
    assert (tmp_path / "one.png").stat().st_size > 10_000
    dense, moba, other = complete(lines)
    gap = held_out(moba[-1]) - held_out(dense[-1])
    text = (tmp_path / "one.md").read_text()
    assert f"{moba[-1]['tokens'] / dense[-1]['tokens']:.2f} times the tokens" in text
    assert f"ends {gap:+.4f} held-out" in text
    assert "| MoBA 16 × 3, nearest kept |" in text
    # A run that was stopped is no run, and one begun again replaces it.
    assert complete([*dense, *moba[:3]]) == [dense]
    assert complete([*other[:3], *other, *dense]) == [dense, other]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*dense, *moba[:-1]]))
    with pytest.raises(ValueError, match="another arm must have ended"):
        report([path], tmp_path / "three")
    steps = [loss for moment in dense for _, loss in moment["train"]]
    smooth = [loss for *_, loss in training_loss(dense)]
    assert min(steps) <= min(smooth) <= max(smooth) <= max(steps)


def test_when_a_loss_is_reached():
    run = [{"seconds": at, "loss": {"a": loss, "b": loss + 1}} for at, loss in ((0.0, 4.0), (10.0, 3.0), (20.0, 2.0))]
    assert [passes(run, loss) for loss in (5.0, 4.5, 3.5, 2.75)] == [0.0, 0.0, 10.0, pytest.approx(17.5)]
    assert passes(run, 2.0) is None
    assert not math.isnan(held_out(run[0]))
