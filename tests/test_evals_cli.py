"""`moba eval`: what each evaluation writes, that it goes on after a stop, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_folder import save_tiny_model, words

from moba.cli import main
from moba.data.build import Text, Unit, build
from moba.evals.language import token_losses
from moba.evals.texts import haystack_text, long_documents
from moba.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def evaluate(capsys, tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text(words(400))

    def run(name, *args, texts=("--text", text)):
        given = ["-m", model, "--block-size", 8, "--topk", 3, "--out", tmp_path / "out", *texts, *args]
        with pytest.raises(SystemExit) as stop:
            main(["eval", name, *map(str, given)])
        return (stop.value.code, *capsys.readouterr())

    return run


def records(tmp_path, name):
    settings, *rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return settings["settings"], rows


def test_needle_fills_the_grid_and_goes_on(evaluate, tmp_path):
    args = ("needle", "--lengths", "64,100", "--depths", 3, "--compare")
    code, out, err = evaluate(*args)
    assert code == 0, err
    settings, rows = records(tmp_path, "needle")
    assert settings["config"]["block_size"] == 8
    cells = [(row["attention"], row["length"], row["depth"]) for row in rows]
    assert sorted(cells) == sorted((a, n, d) for a in ("sdpa", "moba") for n in (64, 100) for d in (0, 0.5, 1))
    assert "full attention: found" in out
    path = tmp_path / "out" / "needle.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:6]) + "\n" + '{"attention": "mo')
    code, again, err = evaluate(*args)
    assert "5 of 12 measured before" in err
    assert again == out
    assert {key: value for key, value in records(tmp_path, "needle")[1][7].items() if key != "seconds"} == {
        key: value for key, value in rows[7].items() if key != "seconds"
    }
    code, _, err = evaluate(*args, "--task", "passkey")
    assert code == 2
    assert "made with another task" in err


def test_loss_by_position_is_that_of_the_model(evaluate, tmp_path, model):
    code, out, err = evaluate("loss", "--length", 120, "--last", 40, "--compare")
    assert code == 0, err
    rows = {row["attention"]: row for row in records(tmp_path, "loss")[1]}
    loaded, tokenizer = load_model(str(model))
    losses = token_losses(loaded, torch.tensor(tokenizer(words(120))["input_ids"]))
    assert rows["sdpa"]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert rows["sdpa"]["perplexity_last"] == pytest.approx(losses[-40:].mean().exp().item(), rel=1e-3)
    assert rows["moba"]["loss"] != rows["sdpa"]["loss"]
    assert f"{losses.mean().item():.4f}" in out


def test_sparsity_measures_full_attention_and_every_setting(evaluate, tmp_path):
    code, out, err = evaluate("sparsity", "--settings", "8x2,8x4,16x16", "--length", 192)
    assert code == 0, err
    rows = {row["setting"]: row for row in records(tmp_path, "sparsity")[1]}
    assert list(rows) == ["full", "8x2", "8x4", "16x16"]
    assert rows["full"]["keys_read"] == rows["16x16"]["keys_read"] == 1
    assert rows["8x2"]["keys_read"] < rows["8x4"]["keys_read"] < 1
    assert rows["16x16"]["perplexity"] == pytest.approx(rows["full"]["perplexity"], rel=1e-3)
    assert abs(math.log(rows["8x2"]["perplexity"] / rows["full"]["perplexity"])) > 1e-3
    assert "above full" in out


def test_copy_recall_by_distance(evaluate, tmp_path):
    code, _, err = evaluate("copy", "--length", 160, "--distances", "40,100", "--copied", 20, "--compare")
    assert code == 0, err
    rows = records(tmp_path, "copy")[1]
    assert [(row["attention"], row["distance"]) for row in rows] == [
        ("sdpa", 40), ("sdpa", 100), ("moba", 40), ("moba", 100),
    ]  # fmt: skip


def test_routing_measures_layers_and_heads(evaluate, tmp_path):
    code, out, err = evaluate("routing", "--length", 120, "--prompts", 2)
    assert code == 0, err
    _, rows = records(tmp_path, "routing")
    assert [len(row["heads"]) for row in rows] == [12, 12]
    assert all(0 < head["covered"] <= head["best"] + 1e-6 <= 1 + 1e-5 for row in rows for head in row["heads"])
    assert "needle's block chosen" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("needle", "--lengths", "8K"), "context is 256"),
        (("needle", "--lengths", "no"), "1K,8K,100000"),
        (("loss", "--length", 250), "no document has 250"),
        (("sparsity", "--settings", "8-3"), "128x4,512x3"),
        (("routing", "--length", 24, "--topk", 16), "length must exceed|no query a choice"),
    ],
)
def test_bad_input_is_refused_in_one_line(evaluate, tmp_path, args, message):
    short = tmp_path / "short.txt"
    short.write_text(words(100))
    code, _, err = evaluate(*args, texts=("--text", short))
    assert code == 2
    assert any(part in err.splitlines()[-1] for part in message.split("|")), err


def test_held_out_documents_are_taken_in_turn_from_each_source(tmp_path, model):
    tokenizer = load_tokenizer(str(model))
    units = [
        Unit(name, {}, lambda work, n=n: ({}, [Text(f"{n}-{i}", [words(40 + i)], True) for i in range(3)]))
        for n, name in enumerate("ab")
    ]
    build(tmp_path, units, tokenizer, tokenizer_name="tiny", end_of_text="<pad>")
    documents = long_documents(tokenizer, 41, 3, data=tmp_path)
    assert [name for name, _ in documents] == ["0-1", "1-1", "0-2"]
    assert documents[0][1].tolist() == tokenizer(words(41))["input_ids"]
    with pytest.raises(ValueError, match="no document has 50"):
        long_documents(tokenizer, 50, 3, data=tmp_path)


def test_addresses_are_the_haystack():
    text = haystack_text()
    assert len(text) > 5_000_000
    tokenizer = load_tokenizer()
    documents = long_documents(tokenizer, 512, 2)
    assert len(documents) == 2
    assert documents[0][1].numel() == 512
    assert documents[0][0] != documents[1][0]
