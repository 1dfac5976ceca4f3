"""Evaluations against what a plain forward pass gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_tokens, tiny_model

from moba import MoBAConfig, register_moba
from moba_lab.cli.eval_setup import setting_name
from moba_lab.cli.options import Backend, choose_config
from moba_lab.evals.language import append_copy, copy_recall, perplexity, summarise
from moba_lab.evals.layers import choose_layers
from moba_lab.evals.reader import Reader, reading_order
from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.models.unrotated import apply_config


@pytest.fixture(scope="module")
def model():
    register_moba(None)
    model = tiny_model().double()
    apply_config(model, MoBAConfig(4, 3))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "moba"])
@pytest.mark.parametrize("chunk_tokens", [7, 20, 64])
def test_losses_are_those_of_one_forward_pass(model, attention, chunk_tokens):
    model.set_attn_implementation(attention)
    tokens = random_tokens(1, 61)
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    losses = Reader(model, chunk_tokens=chunk_tokens).losses(tokens[0])
    assert losses.shape == (60,)
    assert torch.allclose(losses, expected.float(), atol=1e-5)


@pytest.fixture(scope="module")
def models():
    """Models whose caches differ: by name, in fp64, so that other chunks give the same to within 1e-4 in fp32."""
    register_moba(None)
    made = {name: tiny_model().double() for name in ("full", "mean", "unrotated", "convolved", "sliding")}
    add_key_convolution(made["convolved"])
    with torch.no_grad():
        for name, weight in made["convolved"].named_parameters():
            if "key_convolution" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3))
    for name, model in made.items():
        apply_config(
            model,
            MoBAConfig(4, 3, router="unrotated" if name == "unrotated" else "mean",
                       full_layers=3 if name == "full" else 0, decode="moba"),
        )  # fmt: skip
        model.set_attn_implementation("moba")
    made["sliding"] = tiny_model("Mistral", sliding_window=16).double()
    return made


def forward_tokens(model):
    """A list that grows by the number of tokens of each forward pass."""
    counts = []
    model.register_forward_pre_hook(
        lambda module, args, options: counts.append(options["input_ids"].numel()), with_kwargs=True
    )
    return counts


TEXTS = [random_tokens(1, 90)[0][:length].clone() for length in (70, 90, 40, 70, 66)]
TEXTS[1][50:] = TEXTS[1][50:].flip(0)
TEXTS[3][22:] = TEXTS[0][:48]
TEXTS[4] = TEXTS[0][:66]


@pytest.mark.parametrize("name", ["full", "mean", "unrotated", "convolved", "sliding"])
def test_what_texts_begin_with_is_read_once(models, name):
    model = models[name]
    counts = forward_tokens(model)
    reader = Reader(model, chunk_tokens=16)
    for i in reading_order(TEXTS):
        logits = [reader.read(TEXTS[i]), reader.step(5), reader.step(9)]
        assert sum(counts) == reader.num_read
        num_read = reader.num_read
        fresh = Reader(model, chunk_tokens=128)
        expected = [fresh.read(TEXTS[i]), fresh.step(5), fresh.step(9)]
        for got, want in zip(logits, expected, strict=True):
            assert torch.allclose(got, want, atol=1e-4)
        del counts[-3:]
    beginnings = {tuple(text[:n].tolist()) for text in TEXTS for n in range(1, len(text) + 1)}
    in_all, steps = sum(map(len, TEXTS)), 2 * len(TEXTS)
    assert num_read == (in_all if name == "sliding" else len(beginnings)) + steps
    assert len(beginnings) < in_all / 2


@pytest.mark.parametrize("name", ["full", "mean", "unrotated", "convolved", "sliding"])
def test_losses_of_texts_that_begin_alike(models, name):
    reader = Reader(models[name], chunk_tokens=16)
    reader.read(TEXTS[2])
    for text in [*TEXTS, TEXTS[4], TEXTS[0]]:
        assert torch.allclose(reader.losses(text), Reader(models[name]).losses(text), atol=1e-4)
    reader.read(TEXTS[1])
    assert torch.allclose(reader.losses(TEXTS[1]), Reader(models[name]).losses(TEXTS[1]), atol=1e-4)


def test_several_copies_of_one_text_read_it_once(models):
    tokens = random_tokens(1, 80)[0]
    reader = Reader(models["mean"])
    for distance in (20, 40, 60):
        record = copy_recall(reader, tokens, num_copied=8, distance=distance)
        assert record == pytest.approx(
            copy_recall(Reader(models["mean"]), tokens, num_copied=8, distance=distance), rel=1e-4
        )
    assert reader.num_read == 80 + 8 + 2 * (8 + 1)


def test_attention_matters_to_the_losses(model):
    tokens = random_tokens(1, 61)[0]
    model.set_attn_implementation("sdpa")
    dense = Reader(model).losses(tokens)
    model.set_attn_implementation("moba")
    assert (Reader(model).losses(tokens) - dense).abs().max() > 0.1


def test_summary_of_known_losses():
    record = summarise(torch.tensor([math.log(2.0)] * 3 + [math.log(8.0)] * 2), last=2)
    assert record["num_tokens"] == 5
    assert record["perplexity"] == pytest.approx(2 ** (9 / 5))
    assert record["perplexity_last"] == pytest.approx(8)
    assert [part["start"] for part in record["positions"]] == [0, 2, 4]
    assert [part["perplexity"] for part in record["positions"]] == pytest.approx([2, 4, 8])


def test_perplexity_summarises_the_model_s_losses(model):
    tokens = random_tokens(1, 50)[0]
    assert perplexity(Reader(model), tokens, last=10) == summarise(Reader(model).losses(tokens), last=10)


def test_copy_is_appended_from_the_given_distance():
    text = append_copy(torch.arange(20), num_copied=5, distance=8)
    assert text.tolist() == [*range(20), 12, 13, 14, 15, 16]
    assert text[20 - 8] == text[20]


def test_copy_recall_looks_at_the_copies(model):
    tokens = random_tokens(1, 40)[0]
    record = copy_recall(Reader(model), tokens, num_copied=6, distance=20)
    losses = Reader(model).losses(append_copy(tokens, num_copied=6, distance=20))
    # Losses have no entry for the first token: loss i is that of token i + 1, and the copy's own first one is left out.
    assert record["perplexity_second"] == pytest.approx(losses[40:].mean().exp().item())
    assert record["perplexity_first"] == pytest.approx(losses[20:25].mean().exp().item())


class Rememberer(torch.nn.Module):
    """Predicts the token that followed the last earlier appearance of the current one."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(num_hidden_layers=1)
        self.seen = []

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], 100)
        for i, token in enumerate(input_ids[0].tolist()):
            if token in self.seen:
                logits[0, i, self.seen[len(self.seen) - self.seen[::-1].index(token)]] = 20.0
            self.seen.append(token)
        return type("Output", (), {"logits": logits})


def test_copy_recall_is_low_for_a_model_that_remembers():
    record = copy_recall(Reader(Rememberer(), chunk_tokens=16), torch.randperm(100)[:80], num_copied=20, distance=40)
    assert record["perplexity_second"] < 1.01
    assert record["perplexity_first"] > 50


@pytest.mark.parametrize(("num_copied", "distance"), [(1, 8), (9, 8), (5, 21)])
def test_the_passage_must_lie_in_the_text(num_copied, distance):
    with pytest.raises(ValueError, match="num_copied"):
        append_copy(torch.arange(20), num_copied=num_copied, distance=distance)


@pytest.mark.parametrize("tokens", [torch.zeros(1, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)])
def test_losses_need_a_sequence(model, tokens):
    with pytest.raises(ValueError, match="tokens"):
        Reader(model).losses(tokens)


def test_the_command_lines_default_is_the_choice_of_the_quality_table():
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "quality" / "sparsity.jsonl"
    losses, share = {}, {}
    for row in map(json.loads, results.read_text().splitlines()[1:]):
        losses.setdefault(row["attention"], []).append(math.log(row["perplexity"]))
        share[row["attention"]] = row["keys_read"]
    means = {setting: sum(values) / 2 for setting, values in losses.items() if len(values) == 2}
    within = [setting for setting, mean in means.items() if mean <= means["full"] + math.log(1.05)]
    sparsest = min(within, key=lambda setting: share[setting])
    assert share[sparsest] <= 0.35
    assert setting_name(choose_config(None, Backend.auto, None).config) == sparsest
    assert f"above full attention's: {sparsest}." in results.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("count", "layers", "values"), [(1, (7,), [10]), (2, (7, 9), [10, 3]), (3, (7, 8, 9), [10, 3, 2])]
)
def test_layers_are_chosen_for_what_they_do_together(count, layers, values):
    """Layer 1 is second best alone, and adds nothing to 7; 9 adds most to it. 15 would, but is poor alone."""
    alone = [20.0 + layer for layer in range(16)]
    alone[7], alone[1], alone[8], alone[9] = 10, 11, 12, 13

    def value(full):
        if len(full) == 1:
            return alone[full[0]]
        return 10 - 7 * ({7, 9} <= {*full}) - ({7, 8} <= {*full}) - 9 * ({7, 15} <= {*full})

    best = choose_layers(lambda tried: [value(full) for full in tried], 16, count)
    assert (best.layers, best.values) == (layers, values)
    assert list(best.alone)[:4] == [7, 1, 8, 9]
    assert best.alone == dict(enumerate(alone))
