"""`moba eval`: what each evaluation writes, that it goes on after a stop, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folder import save_tiny_model, words

from moba import MoBAConfig, register_moba
from moba.hf import set_moba_config
from moba_lab.cli import main
from moba_lab.cli.eval_setup import parse_lengths, parse_settings, setting_name
from moba_lab.cli.options import Choice
from moba_lab.data.build import Text, Unit, build_shards
from moba_lab.evals.reader import Reader
from moba_lab.evals.texts import haystack_text, long_documents
from moba_lab.models.generation import num_keys_read
from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.models.load import load_model, load_tokenizer
from moba_lab.pictures.evaluations import plot_needle


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
        blocks = () if "--settings" in args else ("--block-size", 8, "--topk", 3)
        given = ["-m", model, *blocks, "--out", tmp_path / "out", *texts, *args]
        with pytest.raises(SystemExit) as stop:
            main(["eval", name, *map(str, given)])
        return (stop.value.code, *capsys.readouterr())

    return run


MOBA = "8x3 first=1"


def records(tmp_path, name):
    first, *rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "out" / f"{name}.md").read_text()
    assert {"device", "versions", "commit", "command", "date", "dtype"} == {*first["made_on"]} - {"threads"}
    assert all(f"- {key}: {value}" in summary for key, value in first["made_on"].items())
    assert all(row["attention"] in summary for row in rows)
    return first["settings"], rows


def without_time(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_needle_fills_the_grid_and_goes_on(evaluate, tmp_path):
    args = ("needle", "--lengths", "64,100", "--depths", 3, "--compare")
    code, out, err = evaluate(*args)
    assert code == 0, err
    settings, rows = records(tmp_path, "needle")
    assert settings["task"]["num_digits"] == 5
    cells = [(row["attention"], row["length"], row["depth"]) for row in rows]
    assert sorted(cells) == sorted((a, n, d) for a in ("full", MOBA) for n in (64, 100) for d in (0, 0.5, 1))
    assert "full: found" in out
    assert sum(row["num_read"] for row in rows) < 0.8 * 6 * (64 + 100)
    path = tmp_path / "out" / "needle.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:6]) + "\n" + '{"attention": "fu')
    code, again, err = evaluate(*args)
    assert "5 of 12 measured before" in err
    assert again == out
    assert without_time(records(tmp_path, "needle")[1][8]) == without_time(rows[8])
    code, _, err = evaluate(*args, "--task", "passkey")
    assert code == 2
    assert "made with another task" in err


def test_loss_by_position_is_that_of_the_model(evaluate, tmp_path, model):
    code, out, err = evaluate("loss", "--length", 120, "--last", 40, "--compare")
    assert code == 0, err
    rows = {row["attention"]: row for row in records(tmp_path, "loss")[1]}
    loaded, tokenizer = load_model(str(model))
    losses = Reader(loaded).losses(torch.tensor(tokenizer(words(120))["input_ids"]))
    assert rows["full"]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert rows["full"]["perplexity_last"] == pytest.approx(losses[-40:].mean().exp().item(), rel=1e-3)
    assert rows[MOBA]["loss"] != rows["full"]["loss"]
    assert f"{losses.mean().item():.4f}" in out


def test_sparsity_measures_full_attention_and_every_setting(evaluate, tmp_path):
    settings = "8x2 first=0, 8x4 first=0 router=shared, 16x16, 8x8 first=0 router=top_p=0.1"
    code, out, err = evaluate("sparsity", "--settings", settings, "--length", 192)
    assert code == 0, err
    rows = {row["attention"]: row for row in records(tmp_path, "sparsity")[1]}
    names = ["full", "8x2", "8x4 router=shared", "16x16 first=1", "8x8 router=top_p=0.1"]
    assert list(rows) == names
    read = [rows[name]["keys_read"] for name in names]
    assert read[0] == read[3] == 1
    assert read[1] < read[2] < 1
    budget = MoBAConfig(8, 8, router="top_p=0.1")
    assert 0.05 < read[4] < num_keys_read(budget, 3, 192)[0] / num_keys_read(None, 3, 192)[0]
    assert rows["16x16 first=1"]["perplexity"] == pytest.approx(rows["full"]["perplexity"], rel=1e-3)
    assert abs(math.log(rows["8x2"]["perplexity"] / rows["full"]["perplexity"])) > 1e-3
    assert "above full" in out
    assert "at most 5% above full attention's" in (tmp_path / "out" / "sparsity.md").read_text()


def test_sparsity_of_one_setting(evaluate, tmp_path):
    code, _, err = evaluate("sparsity", "--length", 96)
    assert code == 0, err
    assert [row["attention"] for row in records(tmp_path, "sparsity")[1]] == ["full", MOBA]


def test_copy_recall_by_distance(evaluate, tmp_path):
    code, _, err = evaluate("copy", "--length", 160, "--distances", "40,100", "--copied", 20, "--compare")
    assert code == 0, err
    rows = records(tmp_path, "copy")[1]
    assert [(row["attention"], row["distance"]) for row in rows] == [
        ("full", 40), ("full", 100), (MOBA, 40), (MOBA, 100),
    ]  # fmt: skip


def test_layers_are_chosen_one_after_another(evaluate, tmp_path):
    code, out, err = evaluate("layers", "--length", 96, "--copied", 16, "--choose", 2, "--documents", 1)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "layers.jsonl").read_text().splitlines()[1:]]
    copy = {row["attention"]: row["perplexity_second"] for row in rows}
    assert {*copy} >= {"8x3 first=1", *(f"8x3 first=1 full={layers}" for layers in ("1", "2", "3", "0+", "1+", "2+"))}
    first = min(range(3), key=lambda layer: copy[f"8x3 first=1 full={layer}+"])
    pairs = [name for name in copy if re.search(r"full=\d\+\d", name)]
    assert len(pairs) == 2
    assert all(str(first) in name.split("full=")[1] for name in pairs)
    best = min(pairs, key=copy.__getitem__).split("full=")[1].replace("+", ",")
    assert out.splitlines()[-1] == f"--full-layers {best}"
    assert (tmp_path / "out" / "layers.png").is_file()
    code, again, err = evaluate("layers", "--length", 96, "--copied", 16, "--choose", 2, "--documents", 1)
    assert (code, again) == (0, out)
    assert "measured before" in err


def test_layers_refuses_more_than_there_are(evaluate):
    code, _, err = evaluate("layers", "--length", 96, "--copied", 16, "--choose", 3)
    assert code == 2
    assert "choose must be below the model's 3 layers" in err


def test_routing_measures_layers_and_heads(evaluate, tmp_path):
    settings = "8x3, 8x3 router=unrotated full=0, 8x3 first=0 full=1"
    code, _, err = evaluate("routing", "--length", 120, "--prompts", 2, "--settings", settings)
    assert code == 0, err
    _, rows = records(tmp_path, "routing")
    names = [MOBA, "8x3 first=1 router=unrotated", "8x3 full=1"]
    assert [row["attention"] for row in rows] == [name for name in names for _ in range(2)]
    assert [len(row["heads"]) for row in rows] == [12, 12, 12, 12, 8, 8]
    assert len({rows[0]["covered"], rows[2]["covered"], rows[4]["covered"]}) == 3
    assert all(0 < head["covered"] <= head["best"] + 1e-6 <= 1 + 1e-5 for row in rows for head in row["heads"])
    assert "needle chosen" in (tmp_path / "out" / "routing.md").read_text()


def test_trained_models_with_key_convolutions_carry_their_settings(moba, tmp_path, model):
    register_moba(None)
    loaded, tokenizer = load_model(str(model))
    add_key_convolution(loaded, 5)
    with torch.no_grad():
        for layer in loaded.model.layers:
            layer.self_attn.key_convolution.weight.normal_()
    set_moba_config(loaded, MoBAConfig(8, 4, keep_recent=1))
    loaded.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(words(400))
    args = (
        "-m",
        tmp_path / "model",
        "--text",
        tmp_path / "text.txt",
        "--length",
        120,
        "--settings",
        "8x4,8x4 router=shared",
    )
    for name, *more in (
        ("loss", "--last", 40),
        ("copy", "--distances", "40,80", "--copied", 16),
        ("routing", "--prompts", 1),
    ):
        code, _, err = moba("eval", name, *args, *more, "--out", tmp_path / "out")
        assert code == 0, err
        _, rows = records(tmp_path, name)
        assert {row["attention"] for row in rows} == {"8x4 recent=1", "8x4 recent=1 router=shared"}
        if name == "loss":
            loaded.set_attn_implementation("moba")
            expected = Reader(loaded).losses(torch.tensor(tokenizer(words(120))["input_ids"]))
            assert rows[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


BINARY, EMPTY = "binary.txt", "empty.txt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("needle", "--lengths", "8K"), "context is 256 tokens; --yarn 32 stretches it far enough"),
        (("needle", "--lengths", "no"), "a number of tokens such as 8K or 100000, got 'no'"),
        (("loss", "--length", 250), "short.txt has 100 tokens, 250 are needed"),
        (
            ("loss", "--length", 90, "--text", "1848-Pork-1"),
            "a file or the name of an address such as 1848-Polk-1, got '1848-Pork-1'",
        ),
        (("loss", "--length", 90, "--text", BINARY), "binary.txt is not UTF-8 text (byte 0)"),
        (("loss", "--length", 90, "--text", EMPTY), "empty.txt is empty"),
        (("loss", "--length", 90, "--data", "x"), "give either data or text, not both"),
        (("loss", "--length", "1K,2K"), "a number of tokens such as 8K or 100000, got '1K,2K'"),
        (("loss", "--length", "0"), "got '0'"),
        (("copy", "--length", "1K"), "context is 256"),
        (
            ("copy", "--length", 90, "--copied", 20, "--distances", "40,80"),
            "copied <= distances <= length - copied must hold, got copied=20, distances=40,80, length=90",
        ),
        (("copy", "--copied", 1), "greater than or equal to 2"),
        (
            ("layers", "--length", 90, "--copied", 30, "--choose", 1),
            "copied must be at most a quarter of length=90, got 30",
        ),
        (("loss", "--length", 1), "length must be at least 2 tokens"),
        (("sparsity", "--length", 8), "length must be at least 32 tokens"),
        (("sparsity", "--settings", "8-3"), "a list such as '128x4, 512x3"),
        (("needle", "--settings", "8x3 last=3"), "got '8x3 last=3'; valid words: first, recent, full, router, decode"),
        (("needle", "--settings", "8x3 first=x"), "got '8x3 first=x'"),
        (("needle", "--settings", "8x3 router=no"), "router must be"),
        (("needle", "--settings", "8x3,"), "got ''"),
        (
            ("loss", "--settings", "8x3", "--topk", 4),
            "settings='8x3' says the blocks: leave out --block-size and --topk",
        ),
        (("loss", "--out", __file__), "is a file: name a folder"),
        (("routing", "--compare"), "full attention chooses no blocks"),
        (("routing", "--length", 24, "--topk", 16), "length must exceed|no query a choice"),
    ],
)
def test_bad_input_is_refused_in_one_line(evaluate, tmp_path, monkeypatch, args, message):
    short = tmp_path / "short.txt"
    short.write_text(words(100))
    monkeypatch.chdir(tmp_path)
    Path(BINARY).write_bytes(b"\xff")
    Path(EMPTY).write_text(" ")
    code, _, err = evaluate(*args, texts=("--text", short))
    assert code == 2
    assert any(part in err.splitlines()[-1] for part in message.split("|")), err


def test_a_run_that_failed_at_once_is_not_in_the_way(evaluate, tmp_path):
    code, _, err = evaluate("routing", "--length", 90, "--topk", 16)
    assert (code, "no query a choice" in err) == (2, True), err
    code, _, err = evaluate("routing", "--length", 120, "--prompts", 1)
    assert code == 0, err
    assert records(tmp_path, "routing")[0]["length"] == 120
    code, _, err = evaluate("routing", "--length", 110, "--prompts", 1)
    assert (code, "made with another length" in err) == (2, True), err


def test_held_out_documents_are_taken_in_turn_from_each_source(tmp_path, model):
    tokenizer = load_tokenizer(str(model))
    units = [
        Unit(name, {}, lambda work, n=n: ({}, [Text(f"{n}-{i}", [words(40 + i)], True) for i in range(3)]))
        for n, name in enumerate("ab")
    ]
    build_shards(tmp_path, units, tokenizer, tokenizer_name="tiny", end_of_text="<pad>")
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


def test_lengths():
    assert parse_lengths("512, 8K,2m ,1k") == [512, 8192, 2**21, 1024]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("needle", "--depths"),
        ("needle", "--needles"),
        ("needle", "--trials"),
        ("loss", "--last"),
        ("loss", "--documents"),
        ("loss", "--prefill-chunk"),
        ("routing", "--prompts"),
        ("routing", "--queries"),
        ("ruler", "--examples"),
    ],
)
def test_nothing_is_done_no_times(evaluate, name, option):
    code, _, err = evaluate(name, option, 0)
    assert code == 2
    assert option in err
    assert "greater than or equal to 1" in err


@pytest.mark.parametrize(
    ("text", "config", "name"),
    [
        ("128x6", MoBAConfig(128, 6, keep_first=1), "128x6 first=1"),
        ("128x1", MoBAConfig(128, 1), "128x1"),
        ("128x6 first=0", MoBAConfig(128, 6), "128x6"),
        ("64x8 router=top_p=0.5 full=10", MoBAConfig(64, 8, keep_first=1, full_layers=10, router="top_p=0.5"),
         "64x8 first=1 full=10 router=top_p=0.5"),
        ("64x8  full=0+3 first=0 recent=2 decode=moba",
         MoBAConfig(64, 8, keep_recent=2, full_layers=(0, 3), decode="moba"), "64x8 recent=2 full=0+3 decode=moba"),
        ("8x4 router=sink", MoBAConfig(8, 4, router="sink"), "8x4 router=sink"),
        ("full", None, "full"),
    ],
)  # fmt: skip
def test_settings_and_their_names(text, config, name):
    untrained = Choice(MoBAConfig(32, 3, keep_first=1, backend="pytorch"), kept_by_default=True)
    (read,) = parse_settings(text, untrained)
    assert read == (config and replace(config, backend="pytorch"))
    assert setting_name(read) == name
    assert parse_settings(name, Choice(MoBAConfig(32, 3), kept_by_default=False)) == [config]


def test_many_heat_maps_stand_in_rows_each_with_its_own_lengths():
    lengths = {"a": (4096, 8192), "b": (4096,), "c": (4096,), "d": (4096,), "e": (131072,)}
    grids = {name: {(n, depth): depth for n in of for depth in (0.0, 1.0)} for name, of in lengths.items()}
    *panels, bar = plot_needle(grids, "title").axes
    assert [axes.get_visible() for axes in panels] == [True] * 5 + [False] * 3
    shown = [[label.get_text() for label in axes.get_xticklabels()] for axes in panels[:5]]
    assert shown == [["4K", "8K"], ["4K"], ["4K"], ["4K"], ["128K"]]
    assert [axes.get_title(loc="left") for axes in panels[:5]] == [f"{name}: 50% found" for name in "abcde"]
    assert [axes.get_ylabel() for axes in panels[:5]] == ["depth of the needle", "", "", "", "depth of the needle"]
    assert bar.get_ylim() == (0, 1)
