"""The proof's script at toy size: two runs of a recipe are trained, measured and compared."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

import from_scratch as script
import pytest
import torch
from from_scratch_report import write_report
from from_scratch_report.runs import own_positions
from from_scratch_report.tables import read_losses
from tiny_shards import save_shards
from torch.nn import functional

from moba import MoBAConfig
from moba.hf import set_moba_config
from moba.hf.schedule import throughout
from moba_lab.data import open_shards
from moba_lab.train.recipe import Recipe
from moba_lab.train.run import train

CONTEXT, ROWS = 128, 6
CONFIG = MoBAConfig(8, 3)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def recipe(folder, data, schedule, seed=0, **model):
    return Recipe.from_dict(
        {
            "out": str(folder / f"{schedule}-{seed}"),
            "data": {"folder": str(data), "context": CONTEXT, "whole_rows": True, "held_out_rows": 2},
            "model": {"architecture": "llama", "shape": {**SHAPE, "num_key_value_heads": 2}, **model},
            "attention": {"schedule": schedule, "block_size": CONFIG.block_size, "topk": CONFIG.topk},
            "training": {
                "tokens": 20 * 2 * CONTEXT, "rows_per_step": 2, "rows_at_once": 2, "learning_rate": 1e-2, "seed": seed,
                "precision": "fp32", "checkpoint_activations": False, "log_every": 2, "save_every": 10,
                "evaluate_every": 10, "keep": 100,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_shards(tmp_path_factory.mktemp("data"), lengths=(600, 400, 520), held_out=(3 * CONTEXT, 260, 140, 400))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Name -> folder of a run."""
    folder = tmp_path_factory.mktemp("runs")
    for schedule in ("full", "throughout", "hybrid"):
        train(recipe(folder, data, schedule), say=lambda line: None)
    return {schedule: folder / f"{schedule}-0" for schedule in ("full", "throughout", "hybrid")}


def measured(run, **changes):
    options = {
        "configs": [CONFIG],
        "rows": ROWS,
        "history_rows": 4,
        "copy_rows": 2,
        "routing_rows": 2,
        "rows_at_once": 4,
    }
    return script.measure_run(run, device=torch.device("cpu"), **{**options, **changes})


@pytest.fixture(scope="module")
def results(runs):
    return {name: measured(run) for name, run in runs.items()}


def row_losses(model, row):
    with torch.no_grad():
        return functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")


def test_losses_are_those_of_each_row_read_alone(runs, results, data):
    model = script.load_checkpoint(runs["full"] / "checkpoint-20", torch.device("cpu"))
    rows = script.held_out_rows(open_shards(data, "held_out"), CONTEXT, ROWS)
    assert {source: len(tokens) for source, (tokens, _) in rows.items()} == {"source 0": 4, "source 1": 5}
    final = results["full"]["final"]
    assert list(final) == ["full", "8/3"]
    for name, config in (("full", throughout(None).at(1, 2)), ("8/3", CONFIG)):
        set_moba_config(model, config)
        for source, (tokens, _) in rows.items():
            expected = [row_losses(model, row) for row in tokens]
            got = final[name]["positions"][source]
            assert got["loss"] == pytest.approx([loss.mean().item() for loss in expected], abs=2e-5)
            assert got["last"] == pytest.approx([loss[-16:].mean().item() for loss in expected], abs=2e-5)
            if name == "full":
                assert got["bins"][-1] == got["last"]
                counts = [stop - max(start, 1) for start, stop in pairwise(results["full"]["bins"])]
                whole = sum(n * statistics.mean(part) for n, part in zip(counts, got["bins"], strict=True))
                assert whole / (CONTEXT - 1) == pytest.approx(statistics.mean(got["loss"]), abs=2e-5)
    assert final["full"]["positions"] != final["8/3"]["positions"]


def test_first_rows_of_all_documents_come_first(data):
    shards = open_shards(data, "held_out")
    tokens, num_documents = script.held_out_rows(shards, CONTEXT, 3)["source 1"]
    assert num_documents == 2
    members = [i for i, document in enumerate(shards.documents) if document.source == "source 1"]
    expected = [shards[members[0]][:CONTEXT], shards[members[1]][:CONTEXT], shards[members[0]][CONTEXT : 2 * CONTEXT]]
    assert tokens.tolist() == [part.tolist() for part in expected]


def test_routing_is_followed_over_the_training(results):
    for name, result in results.items():
        assert [point["step"] for point in result["checkpoints"]] == [10, 20]
        assert all(list(point["routing"]) == ["8/3"] for point in result["checkpoints"]), name
        for point in result["checkpoints"]:
            quality = point["routing"]["8/3"]
            assert 0 < quality["covered"] <= quality["best"] + 1e-6 <= 1 + 1e-5
            assert set(quality["layers"]) == {0, 1}
    attentions = {name: [point["attention"] for point in result["checkpoints"]] for name, result in results.items()}
    assert attentions == {"full": ["full"] * 2, "throughout": ["8/3"] * 2, "hybrid": ["8/3", "full"]}


def test_key_convolutions_are_read_with_their_weights(tmp_path, data):
    train(recipe(tmp_path, data, "throughout", key_convolution=3), say=lambda line: None)
    result = measured(tmp_path / "throughout-0")
    assert result["name"] == "MoBA 8/3, key convolution 3"
    check_against_the_log(result)


def test_the_last_checkpoint_has_the_loss_that_the_training_logged(results):
    for result in results.values():
        check_against_the_log(result)


def check_against_the_log(result):
    """The training evaluated the first two rows of the first document, which are the first and third measured."""
    step, _, logged = result["log"]["held_out"][-1]
    assert step == 20
    losses = own_positions(result)["source 0"]["loss"]
    assert (losses[0] + losses[2]) / 2 == pytest.approx(logged["source 0"], abs=2e-5)


def test_a_wrong_folder_is_refused(runs, data, tmp_path):
    other = save_shards(tmp_path / "other", lengths=(128,))
    with pytest.raises(ValueError, match="not the data"):
        measured(runs["full"], data=other)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text((runs["full"] / "recipe.json").read_text())
    with pytest.raises(ValueError, match="has not ended"):
        measured(tmp_path / "run")


def test_report_compares_with_the_dense_run(results, tmp_path):
    write_report(list(results.values()), tmp_path / "proof")
    assert {path.name for path in tmp_path.iterdir()} == {
        "proof.md", "proof.json", "proof-training.png", "proof-loss.png", "proof-positions.png", "proof-routing.png"
    }  # fmt: skip
    text = (tmp_path / "proof.md").read_text()
    dense, moba = (own_positions(results[name])["source 0"]["loss"] for name in ("full", "throughout"))
    gaps = [b - a for a, b in zip(dense, moba, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    assert f"{statistics.mean(gaps):+.4f} ± {error:.4f}" in text
    assert f"{statistics.mean(dense):.4f} ± " in text
    read = read_losses(results["throughout"], "source 0")
    assert set(read) == {"8/3", "full"}
    weights = read["full"] - statistics.mean(dense)
    assert (
        f"| {read['8/3'] - statistics.mean(dense):+.4f} | {weights:+.4f} | {read['8/3'] - read['full']:+.4f} |" in text
    )


def test_a_report_is_made_again_from_its_own_file(results, tmp_path):
    small = [json.loads(json.dumps(result)) for result in results.values()]
    for result in small:
        result["recipe"]["training"]["tokens"] -= 1
        result["checkpoints"][-1]["tokens"] -= 1
    write_report([*small, *results.values()], tmp_path / "proof")
    kept = json.loads((tmp_path / "proof.json").read_text())
    assert [result["name"] for result in kept[:3]] == [result["name"] for result in results.values()]
    assert all("bins" not in result["final"][result["own"]]["positions"]["source 0"] for result in kept[3:])
    write_report(kept, tmp_path / "again")
    assert (tmp_path / "again.md").read_text() == (tmp_path / "proof.md").read_text()
    assert json.loads((tmp_path / "again.json").read_text()) == kept


@pytest.fixture
def stopped(runs, tmp_path):
    """What is read of a run with MoBA 8/2 that was stopped after step 14, 0.5 behind the dense run at every step."""
    folder = tmp_path / "stopped"
    folder.mkdir()
    saved = json.loads((runs["throughout"] / "recipe.json").read_text())
    saved["recipe"]["attention"]["topk"] = 2
    (folder / "recipe.json").write_text(json.dumps(saved))
    lines = [json.loads(line) for line in (runs["full"] / "log.jsonl").read_text().splitlines()]
    kept = [{**line, "loss": line["loss"] + 0.5} for line in lines if "loss" in line and line["step"] <= 14]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return script.read_stopped(folder)


def test_a_stopped_run_is_compared_up_to_its_last_step(results, stopped, tmp_path):
    assert stopped["name"] == "MoBA 8/2"
    noted = {**stopped, "note": "for lack of time"}
    write_report([noted, *results.values()], tmp_path / "proof")
    text = (tmp_path / "proof.md").read_text()
    assert "- MoBA 8/2: stopped at step 14, not measured; for lack of time\n" in text
    assert "| MoBA 8/2 | +0.5000 | +0.5000 | +0.5000 | +0.5000 |\n" in text
    logs = {name: [line for line in result["log"]["train"] if line[0] <= 14] for name, result in results.items()}
    gaps = [ours[2] - theirs[2] for ours, theirs in zip(logs["throughout"], logs["full"], strict=True)]
    parts = [statistics.mean(gaps[:5]), statistics.mean(gaps[5:]), min(gaps), max(gaps)]
    assert len(gaps) == 7
    assert f"| MoBA 8/3 | {' | '.join(f'{part:+.4f}' for part in parts)} |\n" in text
    kept = json.loads((tmp_path / "proof.json").read_text())
    assert kept[-1] == noted
    write_report(kept, tmp_path / "again")
    assert (tmp_path / "again.md").read_text() == text


def test_where_a_run_differs_is_told_and_an_unknown_rate_is_not(results, tmp_path):
    other = results["throughout"]
    other = {
        **other,
        "header": {**other["header"], "commit": "another"},
        "note": "beside another",
        "log": {**other["log"], "tokens_per_s": None},
    }
    write_report([results["full"], other], tmp_path / "proof")
    lines = (tmp_path / "proof.md").read_text().splitlines()
    commands = {name: results[name]["header"]["command"] for name in ("full", "throughout")}
    assert f"- dense: `{commands['full']}`" in lines
    assert f"- MoBA 8/3: `{commands['throughout']}`; commit another; beside another" in lines
    rates = [line.split(" | ")[-1] for line in lines if line.startswith(("| dense | ", "| MoBA 8/3 | "))][:2]
    assert rates == [f"{results['full']['log']['tokens_per_s']:,.0f} |", " |"]


def test_report_needs_a_dense_run_and_each_run_once(results, stopped, tmp_path):
    with pytest.raises(ValueError, match="no dense run"):
        write_report([stopped], tmp_path / "proof")
    with pytest.raises(ValueError, match="give each once"):
        write_report([results["full"], stopped, stopped], tmp_path / "proof")
    with pytest.raises(ValueError, match="no dense run"):
        write_report([results["throughout"]], tmp_path / "proof")
    with pytest.raises(ValueError, match="give each once"):
        write_report([results["full"], results["full"]], tmp_path / "proof")
