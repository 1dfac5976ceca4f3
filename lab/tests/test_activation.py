"""The activation's script and recipes at toy size: trained, measured, lengthened, asked, reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import activation as script
import pytest
import torch
from tiny_folder import save_tiny_model, words
from tiny_shards import save_shards
from torch.nn import functional
from typer.testing import CliRunner

from moba_lab.data.shards import tokenizer_hash
from moba_lab.models.load import load_model, load_tokenizer
from moba_lab.train.recipe import read_recipe
from moba_lab.train.run import train

ROOT = Path(__file__).parents[2]
LENGTH = 128
OPTIONS = ("--config", "8x3 full=1", "--device", "cpu")


def run(*args):
    result = CliRunner().invoke(script.app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and a dense and a MoBA run of the published recipe, cut to toy size."""
    folder = tmp_path_factory.mktemp("activation")
    save_tiny_model(folder / "base", initializer_range=0.05)
    digest = tokenizer_hash(load_tokenizer(str(folder / "base")))
    save_shards(folder / "data", (600, 400, 520), (3 * LENGTH, 260, 90), tokenizer_hash=digest)
    for schedule in ("full", "activation"):
        changes = [
            f'data.folder="{folder / "data"}"', "data.sources=[]", f"data.context={LENGTH}",
            f'model.base="{folder / "base"}"', f"attention.schedule={schedule}", "attention.block_size=8",
            "attention.topk=3", "attention.full_layers=1", f"training.tokens={8 * 2 * LENGTH}",
            "training.precision=fp32", "training.log_every=2", "training.save_every=4", "training.evaluate_every=4",
            "training.learning_rate=1e-2", f'out="{folder / schedule}"', "attention.at=0.25",
        ]  # fmt: skip
        train(read_recipe(ROOT / "recipes" / "activation.toml", changes), say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    out = folder / "activation.jsonl"
    models = [f"before={folder / 'base'}", f"dense={folder / 'full'}", f"moba={folder / 'activation'}"]
    run("measure", *models, "--data", folder / "data", "--out", out, "--length", LENGTH, "--copied", 16, *OPTIONS)
    return out


def test_every_checkpoint_is_read_with_both_attentions(folder, measured):
    first, *records = map(json.loads, measured.read_text().splitlines())
    assert first["settings"]["config"] == "8x3 full=1"
    seen = {(r["model"], r["attention"], r["source"], r["row"]) for r in records}
    models = ("before", "dense 4", "dense 8", "moba 4", "moba 8")
    rows = [("source 0", 0), ("source 0", 1), ("source 0", 2), ("source 1", 0), ("source 1", 1)]
    assert seen == {(m, a, *row) for m in models for a in (script.FULL, "MoBA") for row in rows}
    assert len(records) == len(seen)
    means = {m: sum(r["loss"] for r in records if (r["model"], r["attention"]) == (m, "MoBA")) for m in models}
    assert means["moba 8"] < means["moba 4"] < means["before"], "training helps"
    size = measured.stat().st_size
    models = [f"moba={folder / 'activation'}"]
    run("measure", *models, "--data", folder / "data", "--out", measured, "--length", LENGTH, "--copied", 16, *OPTIONS)
    assert measured.stat().st_size == size, "nothing is measured twice"


def test_a_record_is_what_a_forward_pass_gives(folder, measured):
    records = [json.loads(line) for line in measured.read_text().splitlines()[1:]]
    record = next(r for r in records if (r["model"], r["attention"]) == ("dense 8", script.FULL))
    shards = script.open_shards(folder / "data", "held_out")
    tokens = script.held_out_rows(shards, LENGTH, 4)[record["source"], record["row"]]
    text = torch.cat([tokens[: LENGTH - 16], tokens[LENGTH - 16 - 48 : LENGTH - 48]])
    model, _ = load_model(str(folder / "full" / "model"))
    with torch.no_grad():
        logits = model(text[None]).logits[0]
    losses = functional.cross_entropy(logits[:-1], text[1:], reduction="none")
    assert record["loss"] == pytest.approx(losses[: LENGTH - 17].mean().item(), abs=1e-4)
    assert record["second"] == pytest.approx(losses[-15:].mean().item(), abs=1e-4)
    assert record["first"] == pytest.approx(losses[LENGTH - 16 - 48 : LENGTH - 16 - 48 + 15].mean().item(), abs=1e-4)


@pytest.mark.parametrize(("run", "expected"), [("activation", (8, 3, 1)), ("full", (4, 2, 0))])
def test_a_model_is_read_as_it_was_trained_and_a_dense_one_as_asked(folder, run, expected):
    model, _ = load_model(str(folder / run / "model"))
    config = script.own_config(model, "4x2")
    assert (config.block_size, config.topk, config.full_layers) == expected


@pytest.mark.parametrize(("by", "key"), [("base", "rope_theta"), ("interpolation", "factor")])
def test_a_lengthened_model_reads_longer_texts(folder, tmp_path, by, key):
    run("lengthen", folder / "activation" / "model", tmp_path / by, "--length", 1024, "--by", by)
    model, _ = load_model(str(tmp_path / by))
    old = json.loads((folder / "activation" / "model" / "config.json").read_text())
    assert model.config.max_position_embeddings == 1024
    assert old["max_position_embeddings"] == 256
    # 8 channels a head: four times the length turns the slowest frequency a quarter as fast.
    expected = old["rope_parameters"]["rope_theta"] * 4 ** (8 / 6) if by == "base" else 4.0
    assert model.config.rope_parameters[key] == pytest.approx(expected)
    slowest = old["rope_parameters"]["rope_theta"] ** (-6 / 8) / 4
    assert model.model.rotary_emb.inv_freq[-1].item() == pytest.approx(slowest)


def test_prompts_and_the_report(folder, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "haystack_text", lambda: words(500))
    out = tmp_path / "prompts.jsonl"
    command = ["prompts", folder / "activation" / "model", "--name", "moba", "--lengths", "100,200", *OPTIONS]
    run(*command, "--depths", 2, "--out", out)
    _, *records = map(json.loads, out.read_text().splitlines())
    assert [(r["length"], r["attention"], r["depth"]) for r in records] == [
        (length, how, depth) for length in (100, 200) for how in ("moba", "full") for depth in (0.25, 0.75)
    ]
    assert all(math.isfinite(r["loss"]) and r["read_s"] > 0 for r in records)
    run(*command, "--depths", 1, "--yarn", 4, "--out", tmp_path / "yarn.jsonl")
    settings, *stretched = map(json.loads, (tmp_path / "yarn.jsonl").read_text().splitlines())
    assert settings["settings"]["yarn"] == 4
    assert stretched[0]["loss"] not in [r["loss"] for r in records]
    logs = [part for name in ("full", "activation") for part in ("--log", f"{name}={folder / name / 'log.jsonl'}")]
    needle = tmp_path / "needle.jsonl"
    answers = [
        {"attention": how, "length": length, "depth": depth, "found": depth == 0 or length == 64}
        for how in ("full", "8x3 full=1 decode=moba")
        for length in (64, 1024)
        for depth in (0.0, 1.0)
    ]
    header = {
        "settings": {"needles": 1, "model": "m"},
        "made_on": {"device": "a device", "command": "moba eval needle"},
    }
    needle.write_text("".join(json.dumps(line) + "\n" for line in (header, *answers)))
    options = ("--prompts", out, *logs, "--needle", f"dense={needle}", "--note", "Small.", "--against", "dense 8")
    printed = run("report", measured, *options, "--out", tmp_path / "result")
    assert (tmp_path / "result.md").read_text() + "\n" == printed
    assert "| moba 8 | MoBA |" in printed
    assert "| moba | moba | 100 | " in printed
    assert "activation: 2,048 tokens trained" in printed
    assert (tmp_path / "result.png").stat().st_size > 10_000
    assert (tmp_path / "result-needle.png").stat().st_size > 5_000
    for line in ("- note: Small.", "| needles found | 64 | 1K |", "| dense: MoBA, its answer too | 2 of 2 | 1 of 2 |"):
        assert line in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["made_on"]["note"] == "Small."
    assert result["prompts"] == records
    assert result["needle"] == [["dense", header, *answers]]
    rows = [json.loads(line) for line in measured.read_text().splitlines()[1:]]
    moba, dense = (
        [r["last"] for r in rows if (r["model"], r["attention"]) == key]
        for key in (("moba 8", "MoBA"), ("dense 8", script.FULL))
    )
    apart = torch.tensor(moba) - torch.tensor(dense)
    mean, error = apart.mean().item(), apart.std().item() / math.sqrt(len(moba))
    share = mean * len(dense) / sum(dense)
    row = next(line for line in printed.split("above dense 8")[1].splitlines() if line.startswith("| moba 8 | MoBA"))
    assert f"| {mean:+.4f} ± {error:.4f} ({share:+.1%}) |" in row
    with pytest.raises(ValueError, match="against must be a model of which the same rows"):
        run("report", measured, "--against", "dense", "--out", tmp_path / "again")
    with pytest.raises(ValueError, match="NAME=PATH"):
        run("report", measured, "--needle", needle, "--out", tmp_path / "again")
    with pytest.raises(ValueError, match=r"result\.json must be JSON lines as measure, prompts"):
        run("report", tmp_path / "result.json", "--out", tmp_path / "again")


def test_lengths_are_named_as_everywhere():
    _, cells = script.prompts_table([{"model": "m", "attention": "moba", "length": 1 << 20, "failed": "out of memory"}])
    assert cells == [["m", "moba", "1M", "", "", "", "out of memory"]]


def test_texts_that_are_too_short_are_refused(folder):
    with pytest.raises(ValueError, match="no document of 4,096 tokens"):
        script.held_out_rows(script.open_shards(folder / "data", "held_out"), 4096, 1)
    with pytest.raises(ValueError, match="there is no"):
        script.find_models("a=nowhere")
    with pytest.raises(ValueError, match="NAME=PATH"):
        script.find_models("nowhere")
