"""Data, training and evaluation by the three commands: a small model learns, with MoBA, to find a needle."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
import transformers

from moba_lab.cli import main
from moba_lab.models.load import load_model

CONTEXT = 64
HAY = [f"w{i}" for i in range(8)]
VALUES = [f"v{i}" for i in range(8)]
TASK = {"needle": "KEY {value}", "question": "KEY", "answer": "", "values": VALUES}
RECIPE = """
[data]
context = 64

[model]
architecture = "llama"
shape = { hidden_size = 128, intermediate_size = 256, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, initializer_range = 0.1 }

[attention]
block_size = 8
topk = 3

[training]
tokens = 98304
rows_per_step = 16
rows_at_once = 16
learning_rate = 5e-3
warmup = 0.1
precision = "fp32"
checkpoint_activations = false
log_every = 16
save_every = 96
"""  # noqa: E501


def run(*args):
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 0


def hay(generator, count):
    start = generator.randrange(len(HAY))
    return [HAY[(start + i) % len(HAY)] for i in range(count)]


def passkey_document(generator):
    """A value, hidden anywhere and asked for until the end; CONTEXT - 1 words, as the end of text is a token too."""
    value, start = generator.choice(VALUES), generator.randrange(len(HAY))
    words, asked_at = [], generator.randrange(CONTEXT - 6)
    while len(words) < CONTEXT - 3:
        if len(words) == asked_at and asked_at < CONTEXT - 4:
            words += ["KEY", value]
            asked_at = len(words) + generator.randrange(4, 12)
        else:
            words.append(HAY[start % len(HAY)])
            start += 1
    return " ".join([*words, "KEY", value])


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "KEY", *HAY, *VALUES])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_toy_model_learns_to_find_the_needle(tmp_path, tokenizer, capsys):
    generator = random.Random(0)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": passkey_document(generator)}) for _ in range(1600)))
    (tmp_path / "hay.txt").write_text(" ".join(hay(generator, 400)))
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    (tmp_path / "recipe.toml").write_text(RECIPE)

    run("data", tmp_path / "data", "--from", texts, "--tokenizer", tokenizer)
    run("train", tmp_path / "recipe.toml", "--data", tmp_path / "data", "--out", tmp_path / "run")
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").open()) if "loss" in row]
    assert losses[-1] < 0.4 < 1 < losses[0]

    model = tmp_path / "run" / "model"
    assert load_model(str(model))[0].config.moba["topk"] == 3, "the model says how it wants to be read"
    run(
        "eval", "needle", "-m", model, "--task", tmp_path / "task.json", "--text", tmp_path / "hay.txt",
        "--lengths", "40,62", "--depths", 6, "--trials", 4, "--out", tmp_path / "needle",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "needle" / "needle.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 48
    assert {row["attention"] for row in rows} == {"8x3"}
    found = sum(row["found"] for row in rows)
    assert found >= 36, f"{found} of 48 found; by chance it would be 6"

    for folder in (model, model.with_name("checkpoint-96")):
        for name in ("copy", "routing"):
            options = ("--distances", "16,32", "--copied", 8) if name == "copy" else ("--prompts", 1)
            out = tmp_path / folder.name / name
            texts = ("--text", tmp_path / "hay.txt", "--length", 60, *options)
            run("eval", name, "-m", folder, *texts, "--router", "shared", "--out", out)
            first, row, *_ = map(json.loads, (out / f"{name}.jsonl").read_text().splitlines())
            assert row["attention"] == "8x3 router=shared"
            assert first["settings"]["model"] == str(folder)
